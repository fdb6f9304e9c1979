//! `Events`: a stream of what happens to sessions on every instance. One change stream feeds all `Events` of a store.

mod expiry_tracker;

use std::fmt;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use futures_core::Stream;
use time::OffsetDateTime;
use tokio::sync::broadcast::error::RecvError;
use tokio::sync::{broadcast, watch};
use tokio::time::{sleep, timeout};
use tokio_util::sync::ReusableBoxFuture;

use crate::error::{Error, ErrorKind, Result};
use crate::invalidation::reconnect::{NextStep, Reconnect, UNSUPPORTED_RETRY, judge_slow_open};
use crate::invalidation::source::Fault;
use crate::mongo::change_stream::events::{
    ChangeKind, EventSource, EventStream, ResumeToken, SessionChange,
};
use crate::session::id::SessionKey;
use crate::store::CachedMongoStore;
use crate::store::events::expiry_tracker::ExpiryTracker;
use crate::sync::{Mutex, lock};
use crate::telemetry::spans;

/// How many events are buffered for the slowest consumer before it loses some.
const MAX_BUFFERED: usize = 4_096;
/// How long the server waits for a change before it answers with none. The stream outlives its last consumer by
/// about this time.
const POLL_INTERVAL: Duration = Duration::from_millis(500);

/// An item of an [`Events`] stream.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Event {
    /// A session was created, changed or removed.
    Session(SessionEvent),
    /// The consumer was too slow and has lost this number of events. A [`Gap`](Self::Gap) may have been
    /// among them.
    Lagged(u64),
    /// All consumers have lost the events of some time: MongoDB could not report what came after the last
    /// event, or the collection was dropped or renamed. From here on every event is reported again.
    Gap,
}

/// What happened to a session, and when.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct SessionEvent {
    /// What happened.
    pub kind: EventKind,
    /// The key of the session, which is the digest of its id: `SessionKey::from(id)`. MongoDB does not hold the id
    /// itself.
    pub key: SessionKey,
    /// When it happened, by MongoDB's clock, in whole seconds.
    pub at: OffsetDateTime,
    /// Whether this store or a clone of it made the change. `None` for a removal: MongoDB does not report
    /// who removed a document.
    pub by_this_instance: Option<bool>,
}

/// What can happen to a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum EventKind {
    /// It was created, or imported.
    Created,
    /// Its data was saved, or its document was edited by hand. A save that only extends the expiry is not
    /// reported.
    Changed,
    /// It was removed before it expired, usually by a log-out.
    Deleted,
    /// It was removed after it had expired.
    Expired,
    /// It was removed, and this store does not know whether it had expired: the stream has not reported its
    /// expiry, or the store no longer remembers it.
    Removed,
}

/// A stream of what happens to all sessions, from [`CachedMongoStore::events`].
///
/// It ends when the store is shut down. Drop it to unsubscribe. It does not keep the store open.
#[must_use = "streams do nothing unless polled"]
pub struct Events {
    next: ReusableBoxFuture<'static, (Result<Event, RecvError>, broadcast::Receiver<Event>)>,
}

impl CachedMongoStore {
    /// Subscribes to what happens to sessions from now on, on all instances, in the order in which MongoDB made
    /// the changes.
    ///
    /// Use it for live counts, for audit logs, or to close a web socket whose session has ended. Do not use it
    /// for security decisions: a `load` decides whether a session exists.
    ///
    /// All streams of a store and its clones share one change stream. It is open while at least one of them
    /// exists, and it is not the stream that keeps the cache true. So the server looks at each change a second
    /// time for this instance, and sends each one, also those that only extend an expiry. After an outage it
    /// resumes after the last event.
    ///
    /// - 4,096 events are buffered for a consumer. A consumer that is slower gets
    ///   [`Lagged`](Event::Lagged) with the number that it has lost.
    /// - If MongoDB cannot resume the stream, every consumer gets a [`Gap`](Event::Gap).
    /// - A removal is [`Deleted`](EventKind::Deleted) or [`Expired`](EventKind::Expired), by comparing its time
    ///   with the session's last reported expiry. The store remembers the expiry of at least the latest 65,536
    ///   sessions that were created, saved or extended since the first of these streams was opened. For other
    ///   sessions the event is [`Removed`](EventKind::Removed).
    /// - MongoDB usually removes an expired session within a minute, so `Expired` comes late.
    ///
    /// # Errors
    ///
    /// - [`Config`](ErrorKind::Config) if the store was built with
    ///   [`Coherence::TimeBound`](crate::Coherence::TimeBound), if its pool has fewer than three
    ///   connections, if the user may not open a change stream, or if the server has none: a standalone server,
    ///   or one that refuses three times in a row. The message has the server's error.
    /// - [`Timeout`](ErrorKind::Timeout) if the stream is not open within the operation timeout.
    ///
    /// # Cancel safety
    ///
    /// May be dropped at any time.
    pub async fn events(&self) -> Result<Events> {
        spans::verb!("session_store.events", self.listen())
    }

    async fn listen(&self) -> Result<Events> {
        if !self.events.allowed {
            return Err(Error::config(
                "events come from a change stream, and this store was built with \
                 Coherence::TimeBound",
            ));
        }
        self.mongo.check_pool_for_events()?;
        if self.mongo.tasks().is_closed() {
            return Err(Error::closed());
        }
        let (received, mut opened) = self.events.subscribe(self);
        let is_open = async move {
            let opened = opened.wait_for(Option::is_some).await;
            // The publisher was dropped, with the store or with the runtime.
            opened.map_err(|_| Error::closed())?.clone().unwrap_or_else(|| Err(Error::cut_off()))
        };
        self.mongo.tasks().wait_for(is_open).await??;
        Ok(Events { next: ReusableBoxFuture::new(next(received)) })
    }
}

async fn next(
    mut received: broadcast::Receiver<Event>,
) -> (Result<Event, RecvError>, broadcast::Receiver<Event>) {
    (received.recv().await, received)
}

impl Stream for Events {
    type Item = Event;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Event>> {
        let (event, received) = ready!(self.next.poll(context));
        self.next.set(next(received));
        Poll::Ready(match event {
            Ok(event) => Some(event),
            Err(RecvError::Lagged(missed)) => Some(Event::Lagged(missed)),
            Err(RecvError::Closed) => None,
        })
    }
}

impl fmt::Debug for Events {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Events").finish_non_exhaustive()
    }
}

/// The one change stream that all [`Events`] of a store and its clones share.
pub(crate) struct EventBroadcaster {
    allowed: bool,
    /// The publisher's channels while it runs. A lock, so that two calls of `events` start one publisher, and so
    /// that a publisher that is about to end takes no new subscriber with it.
    running: Mutex<Option<Running>>,
}

/// Whether the change stream is open. `None`: not yet. An error says why it cannot be opened.
type Opened = Option<Result<()>>;

struct Running {
    events: broadcast::Sender<Event>,
    opened: watch::Receiver<Opened>,
}

impl EventBroadcaster {
    pub(crate) fn new(allowed: bool) -> Arc<Self> {
        Arc::new(Self { allowed, running: Mutex::default() })
    }

    /// Subscribes to the publisher, and starts it if it does not run.
    fn subscribe(
        self: &Arc<Self>,
        store: &CachedMongoStore,
    ) -> (broadcast::Receiver<Event>, watch::Receiver<Opened>) {
        let mut running = lock(&self.running);
        if let Some(running) = &*running {
            return (running.events.subscribe(), running.opened.clone());
        }
        let (events, received) = broadcast::channel(MAX_BUFFERED);
        let (opens, opened) = watch::channel(None);
        *running = Some(Running { events: events.clone(), opened: opened.clone() });
        let tasks = store.mongo.tasks();
        let publisher = Publisher {
            broadcaster: Arc::clone(self),
            // None of these keeps the store open.
            source: store.mongo.event_source(),
            events,
            opens,
            store_id: store.tiers.revs.store(),
            timeout: tasks.timeout(),
        };
        let closed = tasks.closed().clone();
        // If the runtime is gone, `spawn` drops the task at once, and the publisher's `drop` takes the lock.
        drop(running);
        tasks.spawn(async move {
            tokio::select! {
                biased;
                () = closed.cancelled() => {}
                () = publisher.run() => {}
            }
        });
        (received, opened)
    }
}

/// Reads the change stream and publishes its events to every subscriber.
struct Publisher {
    broadcaster: Arc<EventBroadcaster>,
    source: EventSource,
    events: broadcast::Sender<Event>,
    opens: watch::Sender<Opened>,
    store_id: [u8; 12],
    timeout: Duration,
}

/// What the publisher remembers between two streams.
struct Progress {
    /// Where the next stream begins. `None`: now, since nothing before can be delivered.
    resume_token: Option<ResumeToken>,
    /// Whether a stream has been open.
    has_begun: bool,
    expiries: ExpiryTracker,
    reconnect: Reconnect,
}

/// Why the publisher stops reading a stream.
enum StreamEnd {
    Fault(Fault),
    /// Nobody subscribes any more.
    Abandoned,
}

impl Drop for Publisher {
    /// The next subscriber starts a new publisher, however this one has ended.
    fn drop(&mut self) {
        let mut running = lock(&self.broadcaster.running);
        if running.as_ref().is_some_and(|it| it.events.same_channel(&self.events)) {
            *running = None;
        }
    }
}

impl Publisher {
    async fn run(self) {
        let mut progress = Progress {
            resume_token: None,
            has_begun: false,
            expiries: ExpiryTracker::default(),
            reconnect: Reconnect::new(fastrand::Rng::new()),
        };
        loop {
            let fault = match self.open_and_publish(&mut progress).await {
                StreamEnd::Abandoned => return,
                StreamEnd::Fault(fault) => fault,
            };
            let has_token = progress.resume_token.is_some();
            let step = progress.reconnect.record(&fault, has_token);
            if self.is_abandoned() {
                return;
            }
            match step {
                NextStep::Resume => progress.reconnect.wait().await,
                NextStep::Restart(_) => {
                    progress.resume_token = None;
                    progress.reconnect.wait().await;
                }
                NextStep::Unsupported(why) => {
                    // Later calls of `events` get this error at once.
                    let error =
                        Error::new(ErrorKind::Config, format!("there are no events: {why}"));
                    self.opens.send_replace(Some(Err(error)));
                    if !progress.has_begun {
                        return;
                    }
                    // The present subscribers get a gap when a stream is open again.
                    progress.resume_token = None;
                    sleep(UNSUPPORTED_RETRY).await;
                }
                NextStep::Stop => {
                    self.opens.send_replace(Some(Err(Error::client_closed())));
                    return;
                }
            }
        }
    }

    /// Opens the stream and publishes its events, until it breaks off or nobody subscribes any more.
    async fn open_and_publish(&self, progress: &mut Progress) -> StreamEnd {
        let opens = self.source.open(progress.resume_token.clone(), POLL_INTERVAL);
        match timeout(self.timeout, opens).await {
            Ok(Ok(stream)) => {
                if progress.has_begun && progress.resume_token.is_none() {
                    progress.expiries = ExpiryTracker::default();
                    tracing::warn!("event stream has a gap: subscribers miss the events in it");
                    self.publish(Event::Gap);
                }
                progress.has_begun = true;
                self.opens.send_replace(Some(Ok(())));
                self.publish_all(stream, progress).await
            }
            Ok(Err(fault)) => StreamEnd::Fault(fault),
            Err(_) => {
                let answers_hello = timeout(self.timeout, self.source.is_answering()).await;
                StreamEnd::Fault(judge_slow_open(answers_hello.unwrap_or(false)))
            }
        }
    }

    /// Publishes what a stream delivers, until it breaks off or nobody subscribes any more.
    async fn publish_all(&self, mut stream: EventStream, progress: &mut Progress) -> StreamEnd {
        loop {
            // Only after the last event was published: one that was not must be delivered again.
            if let Some(token) = stream.resume_token() {
                progress.resume_token = Some(token);
            }
            if self.is_abandoned() {
                return StreamEnd::Abandoned;
            }
            match timeout(self.timeout + POLL_INTERVAL, stream.next()).await {
                Ok(Ok(change)) => {
                    progress.reconnect.reset();
                    let event = change.and_then(|it| self.event(&it, &mut progress.expiries));
                    if let Some(event) = event {
                        self.publish(Event::Session(event));
                    }
                }
                Ok(Err(fault)) => return StreamEnd::Fault(fault),
                Err(_) => return StreamEnd::Fault(Fault::Passing),
            }
        }
    }

    /// The event for a change. `None` for a touch, which subscribers do not get.
    fn event(&self, change: &SessionChange, tracker: &mut ExpiryTracker) -> Option<SessionEvent> {
        if let Some(expires) = change.expires {
            tracker.insert(change.key, expires);
        }
        let kind = match change.kind {
            ChangeKind::Created => EventKind::Created,
            ChangeKind::Changed => EventKind::Changed,
            ChangeKind::Touched => return None,
            ChangeKind::Removed => match tracker.remove(change.key) {
                // The database reports whole seconds. A session that was removed within the second in which
                // it expires counts as expired.
                Some(expires) if change.at.millis() + 999 >= expires.millis() => EventKind::Expired,
                Some(_) => EventKind::Deleted,
                None => EventKind::Removed,
            },
        };
        let by_this_instance = match change.kind {
            ChangeKind::Removed => None,
            _ => Some(change.rev.is_some_and(|rev| rev.store() == self.store_id)),
        };
        let at = change.at.to_datetime()?;
        Some(SessionEvent { kind, key: change.key, at, by_this_instance })
    }

    fn publish(&self, event: Event) {
        // It fails if nobody subscribes, which is not an error.
        let _ = self.events.send(event);
    }

    /// Whether nobody subscribes any more. If so, the next subscriber starts a new publisher.
    fn is_abandoned(&self) -> bool {
        let mut running = lock(&self.broadcaster.running);
        let is_abandoned = self.events.receiver_count() == 0;
        if is_abandoned {
            *running = None;
        }
        is_abandoned
    }
}
