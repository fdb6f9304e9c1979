//! `Availability`: whether MongoDB answers. One for each `MongoStore`.
//!
//! | what ended | reported with | health and its "last answer" | outage grace | log |
//! |---|---|---|---|---|
//! | a call of the store (load, save, `length`, …) | [`observe_call`](Availability::observe_call) | yes | starts and ends it | yes |
//! | a command, of a call or a background task | [`observe_answer`](Availability::observe_answer), [`observe_silence`](Availability::observe_silence) | yes | an answer ends an unresponsive state | no |
//! | `hello`, a checkpoint | the same | yes | an answer ends an unresponsive state | no |
//! | a call of a background task, an import, a warm-up without an error | by its commands alone | yes | as a command | no |
//! | a change stream that breaks off | [`observe_silence`](Availability::observe_silence) | yes | no | no |
//!
//! What does not count: a call that was not sent, and a batch of the change stream, since a deposed primary may
//! go on feeding it.
//!
//! Health and grace differ in one point. For health, a failure counts only if MongoDB has answered nothing since
//! the failed call began: one slow call among many fast ones is not an outage. The grace follows the last call:
//! its caller has waited for the whole timeout, and is served what the grace allows.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64 as UnmodelledU64};
use std::time::Duration;

use crate::error::{Error, Result};
use crate::sync::{AtomicU64, Ordering};
use crate::time::{Clock, Moment};

/// Whether MongoDB answers. Clones share it.
#[derive(Clone, Debug)]
pub(crate) struct Availability(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    clock: Clock,
    /// How the last call ended, as a [`CallOutcome`]. An atomic, because each load of an entry past its lease
    /// reads it. The model check explores its reads and writes.
    last_call: AtomicU64,
    /// When MongoDB answered last, in nanoseconds of the steady clock. 0 if it never has.
    /// This and the next field decide only what `health()` shows, so the model check leaves them out.
    answered_at: UnmodelledU64,
    /// When the first call began that was not answered. It counts only if it is later than `answered_at`,
    /// so an answer need not reset it. 0 if there is none.
    unanswered_since: UnmodelledU64,
    log: OutageLog,
}

/// What the end of a call says about MongoDB.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum CallOutcome {
    /// MongoDB answered, if only with an error.
    Answered,
    /// MongoDB did not answer in time, or could not be reached.
    Unresponsive,
    /// MongoDB rejected the call because it is overloaded.
    Overloaded,
}

/// Whether MongoDB answers, for [`Health`](crate::Health).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Responsiveness {
    /// The last answer came this long ago.
    Answering(Duration),
    /// The first call that got no answer began this long ago.
    Unresponsive(Duration),
}

impl CallOutcome {
    /// `None`: the call was not sent, so it says nothing about MongoDB.
    fn of(error: Option<&Error>) -> Option<Self> {
        match error {
            Some(error) if error.is_ours() => None,
            Some(error) if error.is_server_overload() => Some(Self::Overloaded),
            Some(error) if error.is_outage() => Some(Self::Unresponsive),
            _ => Some(Self::Answered),
        }
    }
}

impl Availability {
    pub(crate) fn new(clock: Clock) -> Self {
        Self(Arc::new(Inner {
            clock,
            last_call: AtomicU64::new(CallOutcome::Answered as u64),
            answered_at: UnmodelledU64::new(0),
            unanswered_since: UnmodelledU64::new(0),
            log: OutageLog::default(),
        }))
    }

    /// The time on the clock of this `Availability`, for the `began` of a later report.
    pub(crate) fn now(&self) -> Moment {
        self.0.clock.now()
    }

    /// Reports that a call that began at `began` has ended.
    pub(crate) fn observe_call<T>(&self, began: Moment, result: &Result<T>) {
        let error = result.as_ref().err();
        let Some(outcome) = CallOutcome::of(error) else { return };
        if self.last_call() != outcome as u64 {
            self.0.last_call.store(outcome as u64, Ordering::Relaxed);
        }
        let now = self.now();
        match outcome {
            CallOutcome::Answered | CallOutcome::Overloaded => self.record_answer(now),
            CallOutcome::Unresponsive => self.observe_silence(began),
        }
        self.0.log.observe(outcome, error, now);
    }

    /// Reports that MongoDB has answered something that is not a call. It ends an unresponsive state, and never
    /// an overload: MongoDB exempts `hello` from its limits, so only a call shows that it takes calls again.
    pub(crate) fn observe_answer(&self) {
        self.record_answer(self.now());
        let [from, to] = [CallOutcome::Unresponsive, CallOutcome::Answered].map(|it| it as u64);
        if self.last_call() == from {
            // In one step: a call may be rejected for overload at the same moment. If the outcome is another one by
            // now, there is nothing to end.
            let _ =
                self.0.last_call.compare_exchange(from, to, Ordering::Relaxed, Ordering::Relaxed);
        }
    }

    /// Reports that MongoDB has not answered what was sent at `began`. That says nothing if MongoDB has
    /// answered something else since.
    pub(crate) fn observe_silence(&self, began: Moment) {
        let answered_at = self.0.answered_at.load(Ordering::Relaxed);
        let began = began.as_nanos();
        // The first unanswered call counts, so only a value from before the last answer is replaced.
        let _ =
            self.0.unanswered_since.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |since| {
                (since <= answered_at).then_some(began)
            });
    }

    /// Whether MongoDB is unresponsive or overloaded, so that a cache may serve what its grace allows.
    pub(crate) fn is_down(&self) -> bool {
        self.last_call() != CallOutcome::Answered as u64
    }

    /// Whether MongoDB answers, as far as that is known without I/O.
    pub(crate) fn responsiveness(&self) -> Responsiveness {
        let now = self.now();
        let answered_at = self.0.answered_at.load(Ordering::Relaxed);
        let unanswered_since = self.0.unanswered_since.load(Ordering::Relaxed);
        if unanswered_since > answered_at {
            return Responsiveness::Unresponsive(now.since(Moment::from_nanos(unanswered_since)));
        }
        if answered_at == 0 {
            return Responsiveness::Unresponsive(Duration::ZERO);
        }
        Responsiveness::Answering(now.since(Moment::from_nanos(answered_at)))
    }

    fn last_call(&self) -> u64 {
        self.0.last_call.load(Ordering::Relaxed)
    }

    fn record_answer(&self, at: Moment) {
        self.0.answered_at.fetch_max(at.as_nanos(), Ordering::Relaxed);
    }
}

/// Logs once that an outage begins, and once that it ends.
#[derive(Debug, Default)]
struct OutageLog {
    /// Whether `outage_since` is set. An atomic beside the lock, because every call reads it.
    is_outage: AtomicBool,
    /// When the outage was logged. A lock, so that two calls that end together log it once.
    /// It is std's, which the model check leaves out: nothing else depends on the log.
    outage_since: std::sync::Mutex<Option<Moment>>,
    /// When the last overload was logged.
    overload_logged: std::sync::Mutex<Option<Moment>>,
}

/// The shortest time between two log lines about an overload. An overloaded server rejects some calls and
/// takes others, so one call shows neither the beginning of an overload nor its end.
const OVERLOAD_LOG_INTERVAL: Duration = Duration::from_secs(60);

impl OutageLog {
    fn observe(&self, outcome: CallOutcome, error: Option<&Error>, now: Moment) {
        match (outcome, error) {
            (CallOutcome::Overloaded, Some(error)) => self.log_overload(error, now),
            (CallOutcome::Unresponsive, Some(error)) => self.begin_outage(error, now),
            _ => self.end_outage(now),
        }
    }

    fn begin_outage(&self, error: &Error, now: Moment) {
        if self.is_outage.load(Ordering::Relaxed) {
            return;
        }
        let mut since = lock(&self.outage_since);
        if since.is_none() {
            *since = Some(now);
            tracing::warn!(%error, "an outage begins: MongoDB does not answer");
        }
        self.is_outage.store(true, Ordering::Relaxed);
    }

    fn end_outage(&self, now: Moment) {
        if !self.is_outage.load(Ordering::Relaxed) {
            return;
        }
        let mut since = lock(&self.outage_since);
        if let Some(begun) = since.take() {
            let seconds = now.since(begun).as_secs_f64();
            tracing::warn!(seconds, "the outage has ended: MongoDB answers again");
        }
        self.is_outage.store(false, Ordering::Relaxed);
    }

    fn log_overload(&self, error: &Error, now: Moment) {
        let mut logged = lock(&self.overload_logged);
        if logged.is_none_or(|at| now.since(at) >= OVERLOAD_LOG_INTERVAL) {
            *logged = Some(now);
            tracing::warn!(%error, "MongoDB is overloaded and refuses calls");
        }
    }
}

/// Does what [`sync::lock`](crate::sync::lock) does, for a lock that the model check leaves out.
fn lock<T>(mutex: &std::sync::Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;

    const SECOND: Duration = Duration::from_secs(1);

    /// A call that begins now and ends with this result.
    fn end_call(availability: &Availability, result: &Result<()>) {
        availability.observe_call(availability.now(), result);
    }

    fn lost() -> Result<()> {
        Err(Error::new(ErrorKind::Connection, "reset"))
    }

    fn overloaded() -> Result<()> {
        Err(Error::server_overloaded("error 462", true))
    }

    async fn advance(duration: Duration) {
        tokio::time::advance(duration).await;
    }

    #[tokio::test(start_paused = true)]
    async fn mongodb_is_down_from_a_failed_call_until_an_answered_one() {
        let availability = Availability::new(Clock::tokio());
        assert!(!availability.is_down());
        for failure in [lost(), overloaded()] {
            end_call(&availability, &failure);
            assert!(availability.is_down());
            end_call(&availability, &Ok(()));
            assert!(!availability.is_down());
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_hello_ends_an_unresponsive_state_and_not_an_overload() {
        let availability = Availability::new(Clock::tokio());
        end_call(&availability, &lost());
        availability.observe_answer();
        assert!(!availability.is_down());
        end_call(&availability, &overloaded());
        availability.observe_answer();
        assert!(availability.is_down());
    }

    #[test]
    fn a_call_that_was_not_sent_says_nothing_and_one_that_was_rejected_does() {
        let queue_full = Error::new(ErrorKind::Overloaded, "too many calls wait");
        assert_eq!(CallOutcome::of(Some(&queue_full)), None);
        let rejected = overloaded().unwrap_err();
        assert_eq!(CallOutcome::of(Some(&rejected)), Some(CallOutcome::Overloaded));
        let lost = lost().unwrap_err();
        assert_eq!(CallOutcome::of(Some(&lost)), Some(CallOutcome::Unresponsive));
        let not_allowed = Error::new(ErrorKind::Permission, "not allowed");
        assert_eq!(CallOutcome::of(Some(&not_allowed)), Some(CallOutcome::Answered));
        assert_eq!(CallOutcome::of(None), Some(CallOutcome::Answered));
    }

    #[tokio::test(start_paused = true)]
    async fn an_unresponsive_state_lasts_from_the_first_call_without_an_answer() {
        let availability = Availability::new(Clock::tokio());
        assert_eq!(availability.responsiveness(), Responsiveness::Unresponsive(Duration::ZERO));
        availability.observe_answer();
        advance(7 * SECOND).await;
        assert_eq!(availability.responsiveness(), Responsiveness::Answering(7 * SECOND));
        let first = availability.now();
        advance(3 * SECOND).await;
        availability.observe_silence(first);
        advance(SECOND).await;
        availability.observe_call(availability.now(), &lost());
        assert_eq!(availability.responsiveness(), Responsiveness::Unresponsive(4 * SECOND));
        availability.observe_answer();
        assert_eq!(availability.responsiveness(), Responsiveness::Answering(Duration::ZERO));
        // The next outage begins with its own first call.
        advance(SECOND).await;
        end_call(&availability, &lost());
        assert_eq!(availability.responsiveness(), Responsiveness::Unresponsive(Duration::ZERO));
    }

    #[tokio::test(start_paused = true)]
    async fn one_slow_call_is_not_an_outage_while_others_are_answered() {
        let availability = Availability::new(Clock::tokio());
        let began = availability.now();
        advance(5 * SECOND).await;
        end_call(&availability, &Ok(()));
        advance(SECOND).await;
        availability.observe_call(began, &lost());
        assert_eq!(availability.responsiveness(), Responsiveness::Answering(SECOND));
        assert!(availability.is_down(), "the grace follows the last call");
    }

    #[tokio::test(start_paused = true)]
    async fn a_silent_stream_shows_in_health_and_allows_no_grace() {
        let availability = Availability::new(Clock::tokio());
        availability.observe_answer();
        advance(SECOND).await;
        availability.observe_silence(availability.now());
        assert_eq!(availability.responsiveness(), Responsiveness::Unresponsive(Duration::ZERO));
        assert!(!availability.is_down());
    }
}
