//! What happens to sessions anywhere in the fleet, as a stream.

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
use crate::invalidation::source::Fault;
use crate::invalidation::{FailureCounts, MAX_REFUSALS, RefusalAction, UNSUPPORTED_RETRY, backoff};
use crate::mongo::change_stream::events::{
    ChangeKind, EventSource, EventStream, ResumeToken, SessionChange,
};
use crate::session::id::SessionKey;
use crate::store::CachedMongoStore;
use crate::store::events::expiry_tracker::ExpiryTracker;
use crate::sync::{Mutex, lock};
use crate::telemetry::spans;

/// How many events wait for the slowest consumer before it misses some.
const MAX_BUFFERED: usize = 4_096;
/// How long the server waits for a report, and so how long a stream outlives its last consumer.
const POLL_INTERVAL: Duration = Duration::from_millis(500);

/// Something that an [`Events`] stream tells.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Event {
    /// Something became of a session.
    Session(SessionEvent),
    /// The consumer was too slow: so many events are lost to it, a [`Gap`](Self::Gap) maybe among
    /// them.
    Lagged(u64),
    /// What happened for some time is lost to all consumers: the database could not say what came
    /// after the last event, or the collection as a whole was dropped or renamed. From here on
    /// everything is told again.
    Gap,
}

/// What became of a session, and when.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct SessionEvent {
    /// What it is.
    pub kind: EventKind,
    /// The key of the session, which is what its id becomes by `into()`. The id itself is nowhere
    /// in the database.
    pub key: SessionKey,
    /// When, by the database's clock, in whole seconds.
    pub at: OffsetDateTime,
    /// Whether this store or a clone of it did it. Unknown of an end: the database does not say who
    /// removed a document.
    pub by_this_instance: Option<bool>,
}

/// What can become of a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum EventKind {
    /// It was created, or imported.
    Created,
    /// Its data was saved, or it was edited by hand. A save that only prolongs a session is not told.
    Changed,
    /// It was removed before it expired: a log-out, as a rule.
    Deleted,
    /// It was removed after it had expired, by whomever.
    Expired,
    /// It was removed, and which of both it was is not known here: its expiry was not heard of since
    /// the stream began, or was forgotten.
    Removed,
}

/// A stream of what happens to all sessions, from [`CachedMongoStore::events`].
///
/// It ends when the store is shut down. Dropping it is all that there is to do to end it; it does not
/// keep the store open.
#[must_use = "streams do nothing unless polled"]
pub struct Events {
    next: ReusableBoxFuture<'static, (Result<Event, RecvError>, broadcast::Receiver<Event>)>,
}

impl CachedMongoStore {
    /// A stream of what happens to sessions from now on, on all instances, in the order in which the
    /// database made the changes. For live counts, audit logs, or to close a web socket whose session
    /// has ended; not for decisions of safety, which belong to a `load`.
    ///
    /// All streams of a store and its clones share one change stream of their own, which is open while
    /// there is any. It costs the server a second look at each change for this instance, and the
    /// network a report of each, prolongations included. It goes on after an outage from where it was. 4,096 events may wait for a consumer; one that is slower is told how many it
    /// [missed](Event::Lagged), and a history that was lost is a [`Gap`](Event::Gap).
    ///
    /// An end is [`Deleted`](EventKind::Deleted) or [`Expired`](EventKind::Expired) by comparing the
    /// time of the removal, of which the database tells the second, with the expiry that was heard of
    /// last: of sessions that were created, saved or prolonged since the first of these streams was
    /// opened, the latest 65,536 at least. Of others it is [`Removed`](EventKind::Removed): the database no
    /// longer has what it removed. MongoDB removes what has expired within a minute or so, so `Expired`
    /// comes late.
    ///
    /// # Errors
    ///
    /// [`Config`](ErrorKind::Config) for a store with
    /// [`Coherence::TimeBound`](crate::Coherence::TimeBound), with a pool of fewer than
    /// three connections, or if the server has no change streams (a standalone one, or any that refuses
    /// one three times in a row; the message has the server's error) or the user may not open one;
    /// [`Timeout`](ErrorKind::Timeout) if it is not open within the operation timeout.
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
        let opens = async move {
            let opened = opened.wait_for(Option::is_some).await;
            // It was dropped: with the store, or with the runtime.
            opened.map_err(|_| Error::closed())?.clone().unwrap_or_else(|| Err(Error::cut_off()))
        };
        self.mongo.tasks().wait_for(opens).await??;
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

/// What all streams of one store share.
pub(crate) struct EventBroadcaster {
    allowed: bool,
    running: Mutex<Option<Running>>,
}

/// Whether the change stream is open: not yet, yes, or why it cannot be.
type Opened = Option<Result<()>>;

struct Running {
    events: broadcast::Sender<Event>,
    opened: watch::Receiver<Opened>,
}

impl EventBroadcaster {
    pub(crate) fn new(allowed: bool) -> Arc<Self> {
        Arc::new(Self { allowed, running: Mutex::default() })
    }

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
        let teller = Publisher {
            broadcaster: Arc::clone(self),
            // Nothing that keeps the store open.
            source: store.mongo.event_source(),
            events,
            opens,
            store_id: store.tiers.revs.store(),
            timeout: tasks.timeout(),
        };
        let closed = tasks.closed().clone();
        // Where the runtime is gone the task ends in here, and takes the lock.
        drop(running);
        tasks.spawn(async move {
            tokio::select! {
                biased;
                () = closed.cancelled() => {}
                () = teller.run() => {}
            }
        });
        (received, opened)
    }
}

/// The one task behind all streams of a store.
struct Publisher {
    broadcaster: Arc<EventBroadcaster>,
    source: EventSource,
    events: broadcast::Sender<Event>,
    opens: watch::Sender<Opened>,
    store_id: [u8; 12],
    timeout: Duration,
}

impl Drop for Publisher {
    /// However it ends: the next who wants events begins anew.
    fn drop(&mut self) {
        let mut running = lock(&self.broadcaster.running);
        if running.as_ref().is_some_and(|it| it.events.same_channel(&self.events)) {
            *running = None;
        }
    }
}

impl Publisher {
    async fn run(self) {
        let mut place = None;
        let mut began = false;
        let mut known = ExpiryTracker::default();
        let mut failed = FailureCounts::default();
        let mut chance = fastrand::Rng::new();
        loop {
            let opens = self.source.open(place.clone(), POLL_INTERVAL);
            let fault = match timeout(self.timeout, opens).await {
                Ok(Ok(news)) => {
                    if began && place.is_none() {
                        known = ExpiryTracker::default();
                        tracing::warn!(
                            "the stream of events has a gap: what happened meanwhile is told to nobody"
                        );
                        self.publish(Event::Gap);
                    }
                    began = true;
                    self.opens.send_replace(Some(Ok(())));
                    self.read(news, &mut place, &mut known, &mut failed).await
                }
                Ok(Err(fault)) => Some(fault),
                Err(_) => {
                    // As the follower does: a server that answers other questions has more of its
                    // history to walk through than there is patience for.
                    let answers = timeout(self.timeout, self.source.is_answering()).await;
                    Some(if matches!(answers, Ok(true)) { Fault::TooSlow } else { Fault::Passing })
                }
            };
            let Some(fault) = fault else { return };
            if fault == Fault::Closed {
                self.opens.send_replace(Some(Err(Error::client_closed())));
                return;
            }
            failed.record(&fault);
            let no_streams = match fault {
                Fault::Passing | Fault::Overloaded | Fault::Closed => None,
                Fault::TooSlow => {
                    if place.is_some() && failed.too_slow >= MAX_REFUSALS {
                        place = None;
                        failed.too_slow = 0;
                    }
                    None
                }
                Fault::Refused(refusal) => match failed.record_refusal(place.is_some()) {
                    RefusalAction::Retry => None,
                    RefusalAction::GiveUpPosition => {
                        place = None;
                        None
                    }
                    RefusalAction::NoStreams => Some(refusal.reason()),
                },
                Fault::Lost | Fault::Ended => {
                    place = None;
                    None
                }
                Fault::Unsupported(why) => Some(why.to_owned()),
            };
            if self.is_abandoned() {
                return;
            }
            let Some(why) = no_streams else {
                sleep(backoff(failed.consecutive, &mut chance)).await;
                continue;
            };
            // Those who ask from now on are told so at once.
            let error = Error::new(ErrorKind::Config, format!("there are no events: {why}"));
            self.opens.send_replace(Some(Err(error)));
            if !began {
                return;
            }
            // Those who listen already hear of the gap once there is a stream again.
            place = None;
            sleep(UNSUPPORTED_RETRY).await;
        }
    }

    /// Tells what a stream brings until it breaks off, or until nobody listens any more: `None`.
    async fn read(
        &self,
        mut news: EventStream,
        place: &mut Option<ResumeToken>,
        known: &mut ExpiryTracker,
        failed: &mut FailureCounts,
    ) -> Option<Fault> {
        loop {
            // After it was told: what was not must be handed over again.
            if let Some(reached) = news.resume_token() {
                *place = Some(reached);
            }
            if self.is_abandoned() {
                return None;
            }
            match timeout(self.timeout + POLL_INTERVAL, news.next()).await {
                Ok(Ok(report)) => {
                    *failed = FailureCounts::default();
                    if let Some(event) = report.and_then(|report| self.event(&report, known)) {
                        self.publish(Event::Session(event));
                    }
                }
                Ok(Err(fault)) => return Some(fault),
                Err(_) => return Some(Fault::Passing),
            }
        }
    }

    fn event(&self, report: &SessionChange, known: &mut ExpiryTracker) -> Option<SessionEvent> {
        if let Some(expires) = report.expires {
            known.insert(report.key, expires);
        }
        let kind = match report.kind {
            ChangeKind::Created => EventKind::Created,
            ChangeKind::Changed => EventKind::Changed,
            ChangeKind::Touched => return None,
            ChangeKind::Removed => match known.remove(report.key) {
                // What is removed within the second in which it expires has expired.
                Some(expires) if report.at.millis() + 999 >= expires.millis() => EventKind::Expired,
                Some(_) => EventKind::Deleted,
                None => EventKind::Removed,
            },
        };
        let by_this_instance = match report.kind {
            ChangeKind::Removed => None,
            _ => Some(report.rev.is_some_and(|rev| rev.store() == self.store_id)),
        };
        let at = report.at.to_datetime()?;
        Some(SessionEvent { kind, key: report.key, at, by_this_instance })
    }

    /// That nobody listens is no error.
    fn publish(&self, event: Event) {
        drop(self.events.send(event));
    }

    /// Whether nobody listens any more; then the next one who does begins anew.
    fn is_abandoned(&self) -> bool {
        let mut running = lock(&self.broadcaster.running);
        let left = self.events.receiver_count() == 0;
        if left {
            *running = None;
        }
        left
    }
}
