//! Follows the changes that the database reports, so that the cache hears of them: opens the
//! stream, resumes it, begins anew after a gap, and keeps the lease by fences.
//!
//! A *fence* tells up to when the cache has heard everything, and compares no two clocks: the local
//! time is noted, the database is asked for its own time, and once every change up to that has been
//! handed over, the lease is good as of the local time that was noted.

mod checkpoints;
pub(crate) mod source;
pub(crate) mod watermark;

use std::convert::Infallible;
use std::time::Duration;

use tokio::sync::oneshot;
use tokio::time::error::Elapsed;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

use crate::cache::Cache;
use crate::error::{Error, Result as Outcome};
use crate::invalidation::checkpoints::Checkpoints;
use crate::invalidation::source::{Batch, ChangeSource, Fault, SourceCall};
use crate::runtime::Tasks;
use crate::telemetry::metrics::{Gap, Invalidation, StreamMetrics};
use crate::time::Clock;

/// How long an empty answer of the stream takes at most, and how often a fence is asked for.
pub(crate) fn poll_interval(max_staleness: Duration) -> Duration {
    (max_staleness / 10).clamp(Duration::from_millis(10), Duration::from_millis(500))
}

/// The first pause after a failure, and the longest; each is twice the one before, less a part by
/// chance, so that the instances of an app do not all come back at once.
const MIN_BACKOFF: Duration = Duration::from_millis(25);
const MAX_BACKOFF: Duration = Duration::from_secs(2);
/// How often a server without change streams is asked whether it has them by now.
pub(crate) const UNSUPPORTED_RETRY: Duration = Duration::from_secs(60);
/// How often in a row a server may refuse a position, or not answer in time to it alone, before it is
/// given up; and how often it may refuse a stream without a position, or one that brings nothing, before
/// it counts as a server that has no change streams. Three attempts take less than 0.1 s beside their round trips, so `build` waits
/// no longer than that. One attempt is too few: errors that pass have codes of their own, but a proxy, or
/// a server that is just starting, may answer once with another one. A mistake costs little: each session
/// keeps its own bound until the server is asked again after [`UNSUPPORTED_RETRY`].
pub(crate) const MAX_REFUSALS: u32 = 3;
/// After so many failures in a row, about three seconds if each comes at once, a stream counts as lost,
/// of which an operator must hear.
const FAILURES_BEFORE_WARNING: u32 = 8;
/// How long fences may be answered and not passed before the stream is resumed, which goes to the
/// primary: this one may hang on a member that is one no more. Twice the timeout, and no sooner than
/// this: on an idle sharded cluster the stream is as late as the shards' no-op entries, 10 s as a rule.
/// Where there are none, to resume now and then costs little and loses nothing. In no hurry either:
/// what is behind renews no lease, so nothing is served past its bound meanwhile.
const MAX_CHECKPOINT_AGE: Duration = Duration::from_secs(30);
/// The pause before the next question after a batch of nothing but this store's own writes: the next batch
/// then carries more. Without it, an instance that writes much would get a reply for each of its writes.
const OWN_WRITES_DEBOUNCE: Duration = Duration::from_millis(5);
/// How many times the pace a fence may take to be answered: half of `max_staleness`, if that is no
/// more than five seconds. A lost question must not cost the lease that the next one would renew.
const CHECKPOINT_TIMEOUT_INTERVALS: u32 = 5;

/// What keeps one cache true.
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

impl<C: ChangeSource> InvalidationListener<C> {
    /// Starts to follow in a task that ends when `ends` is cancelled. The answer comes when the
    /// cache is followed for the first time, or it is known that it cannot be; an error if the store
    /// is of no use.
    pub(crate) fn start(
        self,
        tasks: &Tasks,
        ends: CancellationToken,
    ) -> oneshot::Receiver<Outcome<()>> {
        let (opened, is_opened) = oneshot::channel();
        tasks.spawn(async move {
            let _says_if = PanicLogger;
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
        let mut opened = Some(opened);
        let mut position = None;
        let mut listens = false;
        let mut is_first = true;
        let mut chance = self.rng.clone();
        let mut failed = FailureCounts::default();
        loop {
            let resumes = position.is_some();
            let fault = match self.with_timeout(self.source.open(position.clone())).await {
                Ok(Ok((stream, first))) => {
                    self.on_open(resumes, is_first);
                    listens = true;
                    is_first = false;
                    opened.take().map(|opened| opened.send(Ok(())));
                    let fault = self.listen(stream, first, &mut position, &mut failed).await;
                    self.metrics.closed();
                    fault
                }
                Ok(Err(fault)) => fault,
                Err(_) => {
                    // If the server answers other questions, it has more of its history to walk
                    // through than there is patience for.
                    let answers =
                        matches!(self.with_timeout(self.source.primary_time()).await, Ok(Ok(_)));
                    if answers {
                        self.cache.observe_hello();
                    }
                    if answers { Fault::TooSlow } else { Fault::Passing }
                }
            };
            if fault == Fault::Closed {
                self.metrics.unavailable();
                let error = Error::client_closed();
                tracing::warn!(%error, "the change stream has ended for good");
                opened.take().map(|opened| opened.send(Err(error)));
                return std::future::pending().await;
            }
            failed.record(&fault);
            let no_streams = self.handle_fault(fault, &mut position, &mut listens, &mut failed);
            let Some(why) = no_streams else {
                if failed.consecutive == FAILURES_BEFORE_WARNING {
                    failed.lost_logged = true;
                    tracing::warn!(
                        "the stream of changes is lost and cannot be opened: until it is, sessions \
                         are asked for anew past max_staleness. It is tried again and again"
                    );
                }
                sleep(backoff(failed.consecutive, &mut chance)).await;
                self.metrics.retries.increment(1);
                continue;
            };
            position = None;
            self.metrics.unavailable();
            self.stop_listening(&mut listens);
            if !std::mem::replace(&mut failed.unavailable_logged, true) {
                tracing::warn!(
                    "the cache is not told of changes by other instances: {why}. It asks MongoDB \
                     anew for each session that it read longer than max_staleness ago"
                );
            }
            opened.take().map(|opened| opened.send(Ok(())));
            sleep(UNSUPPORTED_RETRY).await;
            self.metrics.retries.increment(1);
        }
    }

    /// Takes the consequences of a fault. Answers with why the server has no change streams, if that is what
    /// it says.
    fn handle_fault(
        &self,
        fault: Fault,
        position: &mut Option<C::Position>,
        listens: &mut bool,
        failed: &mut FailureCounts,
    ) -> Option<String> {
        match fault {
            Fault::Passing | Fault::Overloaded | Fault::TooSlow if failed.consecutive == 1 => {
                tracing::info!(
                    overloaded = fault == Fault::Overloaded,
                    "the stream of changes broke off; until it is resumed, sessions are asked \
                     for anew past max_staleness"
                );
                None
            }
            // `run` has ended with the last one.
            Fault::Passing | Fault::Overloaded | Fault::Closed => None,
            Fault::TooSlow => {
                if position.is_some() && failed.too_slow >= MAX_REFUSALS {
                    *position = None;
                    failed.too_slow = 0;
                    self.record_gap(Gap::Refused);
                }
                None
            }
            Fault::Refused(refusal) => match failed.record_refusal(position.is_some()) {
                RefusalAction::Retry => {
                    if failed.refusals == 1 && failed.fruitless == 0 {
                        tracing::warn!(
                            code = refusal.code,
                            name = refusal.name,
                            "MongoDB answers the change stream with an error; it is retried"
                        );
                    }
                    None
                }
                RefusalAction::GiveUpPosition => {
                    *position = None;
                    self.record_gap(Gap::Refused);
                    None
                }
                RefusalAction::NoStreams => Some(refusal.reason()),
            },
            Fault::Lost => {
                *position = None;
                self.record_gap(Gap::HistoryLost);
                None
            }
            Fault::Ended => {
                *position = None;
                self.record_gap(Gap::CollectionGone);
                self.stop_listening(listens);
                None
            }
            Fault::Unsupported(why) => Some(why.to_owned()),
        }
    }

    /// Hands what the stream brings to the cache, until it breaks off.
    async fn listen(
        &self,
        stream: C::Stream,
        first: Batch<C::Position>,
        position: &mut Option<C::Position>,
        failed: &mut FailureCounts,
    ) -> Fault {
        let fences = Checkpoints::default();
        let reads = async {
            let (mut stream, mut batch, mut number) = (stream, first, 0);
            loop {
                match self.apply_batch(&batch, number, &fences, position) {
                    Ok(news) if !news && !batch.changes.is_empty() => {
                        sleep(OWN_WRITES_DEBOUNCE).await
                    }
                    Ok(_) => {}
                    Err(fault) => return fault,
                }
                number = fences.begin_batch();
                let more = self.with_timeout(self.source.next_batch(stream));
                match more.await {
                    Ok(Ok(next)) => (stream, batch) = next,
                    Ok(Err(fault)) => return fault,
                    Err(_) => return Fault::Passing,
                }
                if failed.lost_logged || failed.unavailable_logged {
                    tracing::warn!("the stream of changes is open again");
                }
                *failed = FailureCounts::default();
            }
        };
        // Fences first: a stream that never pauses must not keep them from being asked for.
        tokio::select! {
            biased;
            never = self.request_checkpoints(&fences) => match never {},
            fault = reads => fault,
        }
    }

    /// Whether anything in a batch was news.
    fn apply_batch(
        &self,
        batch: &Batch<C::Position>,
        number: u64,
        fences: &Checkpoints,
        position: &mut Option<C::Position>,
    ) -> Result<bool, Fault> {
        let mut any_news = false;
        for change in &batch.changes {
            let report = self.cache.apply_change(change);
            any_news |= report.has_invalidated();
            self.metrics.event(report.is_own());
        }
        if batch.ended {
            return Err(Fault::Ended);
        }
        // Only now: a change that was not taken must be handed over again.
        if batch.position.is_some() {
            position.clone_from(&batch.position);
        }
        if let Some(at) = fences.confirm(batch.reached, batch.complete_on.as_ref(), number) {
            self.cache.renew(at);
        }
        let most = self.timeout.saturating_mul(2).max(MAX_CHECKPOINT_AGE);
        let behind = fences.pending_since().map(|since| self.clock.now().since(since));
        if behind.is_some_and(|behind| behind > most) {
            return Err(Fault::Passing);
        }
        Ok(any_news)
    }

    async fn request_checkpoints(&self, fences: &Checkpoints) -> Infallible {
        let mut chance = self.rng.clone();
        let mut overloaded = 0;
        loop {
            let at = self.clock.now();
            let patience =
                self.timeout.min(self.poll_interval.saturating_mul(CHECKPOINT_TIMEOUT_INTERVALS));
            let answer = timeout(patience, self.source.primary_time()).await;
            overloaded =
                if matches!(answer, Ok(Err(Fault::Overloaded))) { overloaded + 1 } else { 0 };
            if let Ok(Ok(answer)) = answer {
                fences.add(at, answer);
                // Not what the stream brings: a deposed primary goes on feeding it.
                self.cache.observe_hello();
            }
            // Each instance asks as often as this, and an overloaded server must not be asked so often.
            let backs_off = (overloaded > 0).then(|| backoff(overloaded, &mut chance));
            sleep(self.poll_interval.max(backs_off.unwrap_or_default())).await;
        }
    }

    /// The stream is open. All is heard from here on; what was cached before may have changed
    /// meanwhile, unless the stream goes on from where the last one ended.
    fn on_open(&self, resumes: bool, is_first: bool) {
        if resumes {
            tracing::info!("the stream of changes goes on where it was");
            self.metrics.resumes.increment(1);
        } else {
            self.cache.reset(true);
            // At the start it is empty, or as good as that: no gap that anybody should look into.
            if !is_first {
                self.cache.count_invalidation(Invalidation::Gap);
            }
        }
        self.metrics.opened();
    }

    /// Empties the cache, unless nobody listened anyway.
    fn stop_listening(&self, listens: &mut bool) {
        if std::mem::take(listens) {
            self.cache.reset(false);
            self.cache.count_invalidation(Invalidation::Gap);
        }
    }

    fn record_gap(&self, gap: Gap) {
        self.metrics.gap(gap);
        tracing::warn!(
            "the stream of changes has a gap ({}): the cache is emptied once it is open again",
            gap.name()
        );
    }

    /// In a loop of its own, so that the lag is told most of all while there is no stream.
    async fn report_lag(&self) -> Infallible {
        loop {
            self.metrics.lag(self.clock.now(), self.cache.synced_through());
            sleep(self.poll_interval).await;
        }
    }

    async fn with_timeout<T>(&self, call: SourceCall<T>) -> Result<Result<T, Fault>, Elapsed> {
        timeout(self.timeout.saturating_add(self.poll_interval), call).await
    }
}

/// How long to wait after so many failures in a row.
pub(crate) fn backoff(failures: u32, chance: &mut fastrand::Rng) -> Duration {
    let doublings = failures.saturating_sub(1).min(16);
    let whole = MIN_BACKOFF.saturating_mul(1 << doublings).min(MAX_BACKOFF);
    whole.mul_f64(0.5 + chance.f64() / 2.0)
}

/// Says of a panic, which would end the task without a word, that nobody follows any more.
struct PanicLogger;

impl Drop for PanicLogger {
    fn drop(&mut self) {
        if std::thread::panicking() {
            tracing::error!(
                "a panic ended the task that follows the database's changes: this cache no longer \
                 follows them, and asks MongoDB anew for each session that it read longer than \
                 max_staleness ago, until the store is built again"
            );
        }
    }
}

/// How often the stream has failed since it brought something.
#[derive(Debug, Default)]
pub(crate) struct FailureCounts {
    pub(crate) consecutive: u32,
    /// How often in a row a position was refused. An overload in between says nothing about that.
    refusals: u32,
    /// How often in a row a stream without a position was refused, or a position was given up that had
    /// brought nothing.
    fruitless: u32,
    /// How often a server did not get to the position in time that answers other questions.
    pub(crate) too_slow: u32,
    /// An operator was told that the stream is lost, or that there is none.
    lost_logged: bool,
    unavailable_logged: bool,
}

/// What follows from a refusal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum RefusalAction {
    Retry,
    /// The position is at fault: a stream without one comes next.
    GiveUpPosition,
    /// The server has no change streams.
    NoStreams,
}

impl FailureCounts {
    pub(crate) fn record(&mut self, fault: &Fault) {
        self.consecutive = self.consecutive.saturating_add(1);
        match fault {
            Fault::Refused(_) | Fault::Overloaded => {}
            Fault::TooSlow => {
                self.too_slow = self.too_slow.saturating_add(1);
                self.refusals = 0;
                self.fruitless = 0;
            }
            _ => {
                self.refusals = 0;
                self.fruitless = 0;
            }
        }
    }

    /// Counts a refusal, of a stream with or without a position.
    pub(crate) fn record_refusal(&mut self, has_position: bool) -> RefusalAction {
        if has_position {
            self.refusals = self.refusals.saturating_add(1);
            if self.refusals < MAX_REFUSALS {
                return RefusalAction::Retry;
            }
            self.refusals = 0;
        }
        self.fruitless = self.fruitless.saturating_add(1);
        if self.fruitless >= MAX_REFUSALS {
            RefusalAction::NoStreams
        } else if has_position {
            RefusalAction::GiveUpPosition
        } else {
            RefusalAction::Retry
        }
    }
}

#[cfg(test)]
mod tests;
