//! `Reconnect`: what a task that keeps a change stream open does after each fault. The invalidation listener and
//! the events publisher both have one.

use std::time::Duration;

use tokio::time::sleep;

use crate::invalidation::source::{Fault, Refusal};
use crate::telemetry::metrics::Gap;

/// The first pause after a failure, and the longest. Each pause is twice the one before, less a random part, so
/// that the instances of an app do not all come back at once.
const MIN_BACKOFF: Duration = Duration::from_millis(25);
const MAX_BACKOFF: Duration = Duration::from_secs(2);

/// The pause before a server without change streams is asked again.
pub(crate) const UNSUPPORTED_RETRY: Duration = Duration::from_secs(60);

/// A limit for three counts, each of events in a row:
///
/// - After this many refusals of a position, the position is given up.
/// - After this many attempts in which the server was too slow to reach a position, the position is given up.
/// - After this many refusals without a position, or positions given up, the server counts as one without change
///   streams.
///
/// Three attempts take less than 0.1 s beside their round trips, so `build` waits no longer than that. One
/// attempt is too few: errors that pass have codes of their own, but a proxy, or a server that is just starting,
/// may answer once with another one. A mistake costs little: each session keeps its own bound until the server is
/// asked again after [`UNSUPPORTED_RETRY`].
pub(crate) const MAX_REFUSALS: u32 = 3;

/// Counts the failures of one change stream since it last delivered a batch.
#[derive(Debug)]
pub(crate) struct Reconnect {
    rng: fastrand::Rng,
    failures: FailureCounts,
}

#[derive(Debug, Default)]
struct FailureCounts {
    consecutive: u32,
    /// Refusals in a row of a stream with a position. An overload in between does not end the row.
    refusals: u32,
    /// In a row: refusals of a stream without a position, and positions that were given up.
    fruitless: u32,
    /// How often a server that answers `hello` did not reach the position in time.
    too_slow: u32,
}

/// What to do after a fault.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum NextStep {
    /// Open the stream again after [`Reconnect::wait`], from the last position if there is one.
    Resume,
    /// The same, without a position: the changes since the last one cannot be delivered.
    Restart(Gap),
    /// Ask again after [`UNSUPPORTED_RETRY`], without a position. The text says why there is no stream.
    Unsupported(String),
    /// The client was shut down. Never ask again.
    Stop,
}

impl Reconnect {
    pub(crate) fn new(rng: fastrand::Rng) -> Self {
        Self { rng, failures: FailureCounts::default() }
    }

    /// Forgets all failures, because the stream has delivered a batch.
    pub(crate) fn reset(&mut self) {
        self.failures = FailureCounts::default();
    }

    /// Counts a fault of a stream that was opened from a position or without one.
    pub(crate) fn record(&mut self, fault: &Fault, has_position: bool) -> NextStep {
        self.failures.consecutive = self.failures.consecutive.saturating_add(1);
        if !matches!(fault, Fault::Refused(_) | Fault::Overloaded) {
            self.failures.refusals = 0;
            self.failures.fruitless = 0;
        }
        match fault {
            Fault::Passing | Fault::Overloaded => NextStep::Resume,
            Fault::TooSlow => self.record_too_slow(has_position),
            Fault::Refused(refusal) => self.record_refusal(refusal, has_position),
            Fault::Lost => NextStep::Restart(Gap::HistoryLost),
            Fault::Ended => NextStep::Restart(Gap::CollectionGone),
            Fault::Unsupported(why) => NextStep::Unsupported((*why).to_owned()),
            Fault::Closed => NextStep::Stop,
        }
    }

    /// The number of failures in a row.
    pub(crate) fn consecutive(&self) -> u32 {
        self.failures.consecutive
    }

    /// Whether the last fault was the first refusal of a position.
    pub(crate) fn is_first_refusal(&self) -> bool {
        self.failures.refusals == 1 && self.failures.fruitless == 0
    }

    /// Waits before the next attempt, the longer the more attempts have failed.
    pub(crate) async fn wait(&mut self) {
        sleep(backoff(self.failures.consecutive, &mut self.rng)).await;
    }

    fn record_too_slow(&mut self, has_position: bool) -> NextStep {
        self.failures.too_slow = self.failures.too_slow.saturating_add(1);
        if !has_position || self.failures.too_slow < MAX_REFUSALS {
            return NextStep::Resume;
        }
        self.failures.too_slow = 0;
        NextStep::Restart(Gap::Refused)
    }

    fn record_refusal(&mut self, refusal: &Refusal, has_position: bool) -> NextStep {
        if has_position {
            self.failures.refusals = self.failures.refusals.saturating_add(1);
            if self.failures.refusals < MAX_REFUSALS {
                return NextStep::Resume;
            }
            self.failures.refusals = 0;
        }
        self.failures.fruitless = self.failures.fruitless.saturating_add(1);
        if self.failures.fruitless >= MAX_REFUSALS {
            return NextStep::Unsupported(refusal.reason());
        }
        if has_position { NextStep::Restart(Gap::Refused) } else { NextStep::Resume }
    }
}

/// The fault of a stream that was not opened in time. A server that answers another question needs longer than
/// the timeout to walk through its history to the position.
pub(crate) fn judge_slow_open(answers_hello: bool) -> Fault {
    if answers_hello { Fault::TooSlow } else { Fault::Passing }
}

/// The pause after this number of failures in a row.
pub(crate) fn backoff(failures: u32, rng: &mut fastrand::Rng) -> Duration {
    let doublings = failures.saturating_sub(1).min(16);
    let longest = MIN_BACKOFF.saturating_mul(1 << doublings).min(MAX_BACKOFF);
    longest.mul_f64(0.5 + rng.f64() / 2.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused() -> Fault {
        Fault::Refused(Refusal { code: Some(7), name: "No".to_owned(), hint: None })
    }

    /// The steps that follow from these faults of a stream with a position, or without one.
    fn steps(faults: &[Fault], has_position: bool) -> Vec<NextStep> {
        let mut reconnect = Reconnect::new(fastrand::Rng::with_seed(1));
        faults.iter().map(|fault| reconnect.record(fault, has_position)).collect()
    }

    #[test]
    fn a_position_is_given_up_after_three_refusals_in_a_row() {
        let resume = NextStep::Resume;
        let restart = NextStep::Restart(Gap::Refused);
        let three = [refused(), refused(), refused()];
        assert_eq!(steps(&three, true), [resume.clone(), resume.clone(), restart.clone()]);
        let with_overload = [refused(), Fault::Overloaded, refused(), refused()];
        assert_eq!(steps(&with_overload, true)[3], restart, "an overload does not end the row");
        let interrupted = [refused(), refused(), Fault::Passing, refused()];
        assert_eq!(steps(&interrupted, true)[3], resume);
    }

    #[test]
    fn a_server_that_refuses_three_streams_without_a_position_has_none() {
        let steps = steps(&[refused(), refused(), refused()], false);
        assert_eq!(steps[..2], [NextStep::Resume, NextStep::Resume]);
        assert!(matches!(&steps[2], NextStep::Unsupported(why) if why.contains("error 7 (No)")));
    }

    #[test]
    fn a_position_that_is_reached_too_slowly_is_given_up_and_no_position_is_not() {
        let faults = [Fault::TooSlow, Fault::TooSlow, Fault::TooSlow];
        assert_eq!(steps(&faults, true)[2], NextStep::Restart(Gap::Refused));
        assert_eq!(steps(&faults, false)[2], NextStep::Resume);
    }

    #[test]
    fn other_faults_have_one_step_each() {
        for (fault, step) in [
            (Fault::Passing, NextStep::Resume),
            (Fault::Overloaded, NextStep::Resume),
            (Fault::Lost, NextStep::Restart(Gap::HistoryLost)),
            (Fault::Ended, NextStep::Restart(Gap::CollectionGone)),
            (Fault::Unsupported("not here"), NextStep::Unsupported("not here".to_owned())),
            (Fault::Closed, NextStep::Stop),
        ] {
            assert_eq!(steps(&[fault], true), [step]);
        }
    }
}
