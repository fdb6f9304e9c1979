//! `InvalidationListener`: keeps one cache true. It opens the change stream, applies each change to the cache,
//! resumes the stream after a failure, empties the cache after a gap, and renews the lease.
//!
//! The lease is renewed by *checkpoints*, without a comparison of two clocks. The listener notes the local time
//! and asks the primary for its time. Once every change up to the primary's time has been applied, the cache is
//! true as of the local time that was noted.

mod checkpoints;
pub(crate) mod reconnect;
pub(crate) mod source;
pub(crate) mod watermark;

use std::convert::Infallible;
use std::time::Duration;

use tokio::sync::oneshot;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

use crate::cache::Cache;
use crate::error::{Error, Result as Outcome};
use crate::invalidation::checkpoints::Checkpoints;
use crate::invalidation::reconnect::{
    NextStep, Reconnect, UNSUPPORTED_RETRY, backoff, judge_slow_open,
};
use crate::invalidation::source::{Batch, ChangeSource, Fault, PrimaryTime, SourceCall};
use crate::runtime::Tasks;
use crate::telemetry::metrics::{Gap, Invalidation, StreamMetrics};
use crate::time::Clock;

/// How long the server waits at most before it sends an empty batch, and the pause between two checkpoints.
pub(crate) fn poll_interval(max_staleness: Duration) -> Duration {
    (max_staleness / 10).clamp(Duration::from_millis(10), Duration::from_millis(500))
}

/// The number of failures in a row after which an operator is warned that the stream is lost: about three
/// seconds, if each attempt fails at once.
const FAILURES_BEFORE_WARNING: u32 = 8;

/// How long checkpoints may be answered without being confirmed before the stream is resumed: this time, or twice
/// the operation timeout if that is longer. A resume goes to the primary, and the stream may hang on a member
/// that is no longer the primary.
///
/// It is long because on an idle sharded cluster the stream is as late as the shards' no-op entries, usually
/// 10 s. There is no hurry: a stream that is behind renews no lease, so nothing is served past its bound. An
/// unneeded resume costs little and loses nothing.
const MAX_CHECKPOINT_AGE: Duration = Duration::from_secs(30);

/// The pause before the next batch is requested, after a batch that contained only this store's own writes: the
/// next batch then carries more. Without it, an instance that writes much would get a reply for each write.
const OWN_WRITES_DEBOUNCE: Duration = Duration::from_millis(5);

/// How long a checkpoint request may take, in poll intervals. Five intervals are half of `max_staleness`, if that
/// is at most five seconds: a lost request must not cost the lease that the next one would renew.
const CHECKPOINT_TIMEOUT_INTERVALS: u32 = 5;

/// Keeps one cache true.
#[derive(Debug)]
pub(crate) struct InvalidationListener<C> {
    pub(crate) source: C,
    pub(crate) cache: Cache,
    pub(crate) clock: Clock,
    pub(crate) poll_interval: Duration,
    /// How long the database may take to answer.
    pub(crate) timeout: Duration,
    pub(crate) metrics: StreamMetrics,
    pub(crate) rng: fastrand::Rng,
}

/// What the listener remembers between two streams.
struct Progress<P> {
    /// Where the next stream begins. `None`: now, since nothing before can be delivered.
    position: Option<P>,
    listening: Listening,
    reconnect: Reconnect,
    /// Whether the log says that the stream is lost.
    is_loss_logged: bool,
    /// Whether the log says that the server has no change streams.
    is_unsupported_logged: bool,
    /// Notifies `build` that the listener has started. `None` after that.
    opened: Option<oneshot::Sender<Outcome<()>>>,
}

/// Whether the cache relies on the stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Listening {
    /// No stream has been open.
    NotYet,
    /// A stream has been open, and the cache was not emptied for the lack of one since.
    Active,
    /// The cache was emptied, and no stream has been open since.
    Stopped,
}

impl<P> Progress<P> {
    fn notify_opened(&mut self, result: Outcome<()>) {
        if let Some(opened) = self.opened.take() {
            // `build` may have given up waiting.
            let _ = opened.send(result);
        }
    }

    /// Records that the stream has delivered a batch after the one with which it was opened.
    fn record_batch(&mut self) {
        if self.is_loss_logged || self.is_unsupported_logged {
            tracing::warn!("change stream recovered");
        }
        self.is_loss_logged = false;
        self.is_unsupported_logged = false;
        self.reconnect.reset();
    }
}

impl<C: ChangeSource> InvalidationListener<C> {
    /// Starts the listener in a task that ends when `ends` is cancelled.
    ///
    /// The receiver gets `Ok` when the stream is open for the first time, or when it is known that the server
    /// has no change streams. It gets an error if the client was shut down.
    pub(crate) fn start(
        self,
        tasks: &Tasks,
        ends: CancellationToken,
    ) -> oneshot::Receiver<Outcome<()>> {
        let (opened, is_opened) = oneshot::channel();
        tasks.spawn(async move {
            let _panic_logger = PanicLogger;
            tokio::select! {
                biased;
                () = ends.cancelled() => {}
                never = self.report_lag() => match never {},
                never = self.run(opened) => match never {},
            }
        });
        is_opened
    }

    async fn run(&self, opened: oneshot::Sender<Outcome<()>>) -> Infallible {
        let mut progress = Progress {
            position: None,
            listening: Listening::NotYet,
            reconnect: Reconnect::new(self.rng.clone()),
            is_loss_logged: false,
            is_unsupported_logged: false,
            opened: Some(opened),
        };
        loop {
            let fault = self.open_and_listen(&mut progress).await;
            let has_position = progress.position.is_some();
            match progress.reconnect.record(&fault, has_position) {
                NextStep::Resume => log_fault(&fault, &progress.reconnect),
                NextStep::Restart(gap) => self.record_gap(gap, &mut progress),
                NextStep::Unsupported(why) => {
                    self.record_unsupported(&why, &mut progress);
                    sleep(UNSUPPORTED_RETRY).await;
                    self.metrics.retries.increment(1);
                    continue;
                }
                NextStep::Stop => {
                    self.metrics.set_unavailable();
                    let error = Error::client_closed();
                    tracing::warn!(%error, "change stream ended, and is not opened again");
                    progress.notify_opened(Err(error));
                    return std::future::pending().await;
                }
            }
            if progress.reconnect.consecutive() == FAILURES_BEFORE_WARNING {
                progress.is_loss_logged = true;
                tracing::warn!(
                    "change stream lost; retrying. Until it recovers, sessions are re-read once they \
                     are older than max_staleness"
                );
            }
            progress.reconnect.wait().await;
            self.metrics.retries.increment(1);
        }
    }

    /// Opens the stream and applies its changes, until it breaks off.
    async fn open_and_listen(&self, progress: &mut Progress<C::Position>) -> Fault {
        let position = progress.position.clone();
        let is_resumed = position.is_some();
        match self.with_timeout(self.source.open(position)).await {
            Some(Ok((stream, first))) => {
                self.on_open(is_resumed, progress.listening == Listening::NotYet);
                progress.listening = Listening::Active;
                progress.notify_opened(Ok(()));
                let fault = self.listen(stream, first, progress).await;
                self.metrics.set_lost();
                fault
            }
            Some(Err(fault)) => fault,
            None => {
                let answer = self.with_timeout(self.source.primary_time()).await;
                let answers_hello = matches!(answer, Some(Ok(PrimaryTime { .. })));
                if answers_hello {
                    self.cache.availability().observe_answer();
                }
                judge_slow_open(answers_hello)
            }
        }
    }

    /// Applies what the stream delivers, and requests checkpoints, until the stream breaks off.
    async fn listen(
        &self,
        stream: C::Stream,
        first: Batch<C::Position>,
        progress: &mut Progress<C::Position>,
    ) -> Fault {
        let checkpoints = Checkpoints::default();
        let reads = async {
            let mut stream = stream;
            let mut batch = first;
            let mut number = 0;
            loop {
                match self.apply_batch(&batch, number, &checkpoints, &mut progress.position) {
                    Ok(BatchContent::OwnWritesOnly) => sleep(OWN_WRITES_DEBOUNCE).await,
                    Ok(BatchContent::Other) => {}
                    Err(fault) => return fault,
                }
                number = checkpoints.begin_batch();
                match self.with_timeout(self.source.next_batch(stream)).await {
                    Some(Ok(next)) => (stream, batch) = next,
                    Some(Err(fault)) => return fault,
                    None => return Fault::Passing,
                }
                progress.record_batch();
            }
        };
        // `biased`, with the checkpoints first: a stream that never pauses must not keep them from being
        // requested.
        tokio::select! {
            biased;
            never = self.request_checkpoints(&checkpoints) => match never {},
            fault = reads => fault,
        }
    }

    /// Applies the changes of a batch, and renews the lease if the batch confirms a checkpoint.
    fn apply_batch(
        &self,
        batch: &Batch<C::Position>,
        number: u64,
        checkpoints: &Checkpoints,
        position: &mut Option<C::Position>,
    ) -> Result<BatchContent, Fault> {
        let mut own_writes_only = true;
        for change in &batch.changes {
            let origin = self.cache.apply_change(change);
            own_writes_only &= !origin.has_invalidated();
            self.metrics.count_event(origin.is_own());
        }
        if batch.ended {
            return Err(Fault::Ended);
        }
        // Only after the changes: one that was not applied must be delivered again.
        if batch.position.is_some() {
            position.clone_from(&batch.position);
        }
        let confirmed = checkpoints.confirm(batch.reached, batch.complete_on.as_ref(), number);
        if let Some(at) = confirmed {
            self.cache.renew(at);
        }
        let max_age = self.timeout.saturating_mul(2).max(MAX_CHECKPOINT_AGE);
        let age = checkpoints.pending_since().map(|since| self.clock.now().since(since));
        if age.is_some_and(|age| age > max_age) {
            return Err(Fault::Passing);
        }
        if own_writes_only && !batch.changes.is_empty() {
            return Ok(BatchContent::OwnWritesOnly);
        }
        Ok(BatchContent::Other)
    }

    async fn request_checkpoints(&self, checkpoints: &Checkpoints) -> Infallible {
        let mut rng = self.rng.clone();
        let mut overloads = 0;
        loop {
            let began = self.clock.now();
            let longest = self.poll_interval.saturating_mul(CHECKPOINT_TIMEOUT_INTERVALS);
            let limit = self.timeout.min(longest);
            let answer = self.with_limit(limit, self.source.primary_time()).await;
            let is_overloaded = matches!(answer, Some(Err(Fault::Overloaded)));
            overloads = if is_overloaded { overloads + 1 } else { 0 };
            if let Some(Ok(answer)) = answer {
                checkpoints.add(began, answer);
                self.cache.availability().observe_answer();
            }
            // Every instance requests this often, which would burden an overloaded server.
            let pause = if is_overloaded { backoff(overloads, &mut rng) } else { Duration::ZERO };
            sleep(self.poll_interval.max(pause)).await;
        }
    }

    /// Records that the stream is open and reports every change from now on. Empties the cache unless the stream
    /// was resumed, because sessions may have changed before it was opened.
    fn on_open(&self, is_resumed: bool, is_first: bool) {
        if is_resumed {
            tracing::info!("change stream resumed where it broke off");
            self.metrics.resumes.increment(1);
        } else {
            self.cache.reset(true);
            // At the start the cache is all but empty: not a gap that an operator should look into.
            if !is_first {
                self.cache.count_invalidation(Invalidation::Gap);
            }
        }
        self.metrics.set_open();
    }

    fn record_gap(&self, gap: Gap, progress: &mut Progress<C::Position>) {
        progress.position = None;
        self.metrics.count_gap(gap);
        tracing::warn!(
            "change stream has a gap ({}): the cache is emptied when the stream is open again",
            gap.name()
        );
        // The sessions themselves are gone, so what is cached must not be served until then.
        if gap == Gap::CollectionGone {
            self.stop_listening(progress);
        }
    }

    fn record_unsupported(&self, why: &str, progress: &mut Progress<C::Position>) {
        progress.position = None;
        self.metrics.set_unavailable();
        self.stop_listening(progress);
        if !progress.is_unsupported_logged {
            progress.is_unsupported_logged = true;
            tracing::warn!(
                "the cache cannot follow changes by other instances: {why}. Sessions are re-read once \
                 they are older than max_staleness"
            );
        }
        progress.notify_opened(Ok(()));
    }

    /// Empties the cache, unless it did not rely on the stream anyway.
    fn stop_listening(&self, progress: &mut Progress<C::Position>) {
        if progress.listening == Listening::Active {
            progress.listening = Listening::Stopped;
            self.cache.reset(false);
            self.cache.count_invalidation(Invalidation::Gap);
        }
    }

    /// Keeps the lag metric up to date. It is a loop of its own, because the lag matters most while no stream
    /// is open.
    async fn report_lag(&self) -> Infallible {
        loop {
            self.metrics.set_lag(self.clock.now(), self.cache.synced_through());
            sleep(self.poll_interval).await;
        }
    }

    /// Awaits a call of the source for as long as an answer may take. `None`: it took longer.
    async fn with_timeout<T>(&self, call: SourceCall<T>) -> Option<Result<T, Fault>> {
        self.with_limit(self.timeout.saturating_add(self.poll_interval), call).await
    }

    /// Awaits a call of the source until this limit, and reports if MongoDB has not answered it. A call that is
    /// given up before the operation timeout says nothing.
    async fn with_limit<T>(
        &self,
        limit: Duration,
        call: SourceCall<T>,
    ) -> Option<Result<T, Fault>> {
        let availability = self.cache.availability();
        let began = availability.now();
        let result = timeout(limit, call).await.ok();
        let is_silent = match &result {
            Some(result) => matches!(result, Err(Fault::Passing)),
            None => limit >= self.timeout,
        };
        if is_silent {
            availability.observe_silence(began);
        }
        result
    }
}

/// Logs the first fault after which the stream is resumed.
fn log_fault(fault: &Fault, reconnect: &Reconnect) {
    match fault {
        Fault::Refused(refusal) if reconnect.is_first_refusal() => {
            tracing::warn!(
                code = refusal.code,
                name = refusal.name,
                "MongoDB refused the change stream; retrying"
            );
        }
        Fault::Passing | Fault::Overloaded | Fault::TooSlow if reconnect.consecutive() == 1 => {
            tracing::info!(
                overloaded = *fault == Fault::Overloaded,
                "change stream interrupted; resuming. Until then, sessions are re-read once they are \
                 older than max_staleness"
            );
        }
        _ => {}
    }
}

/// What a batch of the stream contained.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum BatchContent {
    /// Changes, all of them by this store.
    OwnWritesOnly,
    /// A change that the cache did not know of, or no change at all.
    Other,
}

/// Logs a panic of the listener's task, which would otherwise end unnoticed.
struct PanicLogger;

impl Drop for PanicLogger {
    fn drop(&mut self) {
        if std::thread::panicking() {
            tracing::error!(
                "a panic ended the invalidation listener, so the cache cannot follow changes by other \
                 instances. Sessions are re-read once they are older than max_staleness, until the app \
                 builds the store again"
            );
        }
    }
}

#[cfg(test)]
mod tests;
