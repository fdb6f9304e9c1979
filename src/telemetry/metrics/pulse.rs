//! When MongoDB answered last, and since when it has not: what [`Health`](crate::Health) tells of it.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::time::{Clock, Moment};

/// What is known of MongoDB's answers, from the operations that were sent anyway.
#[derive(Debug)]
pub(crate) struct Pulse {
    clock: Clock,
    known: Mutex<Known>,
}

#[derive(Debug, Default)]
struct Known {
    answered: Option<Moment>,
    /// When the first question was asked that has had no answer, of those after the last that had.
    silent: Option<Moment>,
}

/// How it stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Beat {
    /// The last answer came so long ago.
    Answers(Duration),
    /// What was asked so long ago, and since then, has not been answered.
    Silent(Duration),
}

impl Pulse {
    pub(crate) fn new(clock: Clock) -> Self {
        Self { clock, known: Mutex::default() }
    }

    pub(crate) fn beat(&self) -> Beat {
        let (now, known) = (self.clock.now(), self.known());
        match (known.silent, known.answered) {
            (Some(since), _) => Beat::Silent(now.since(since)),
            (None, Some(at)) => Beat::Answers(now.since(at)),
            (None, None) => Beat::Silent(Duration::ZERO),
        }
    }

    pub(crate) fn answered(&self) {
        *self.known() = Known { answered: Some(self.clock.now()), silent: None };
    }

    /// What was asked so long ago was not answered. That says nothing if something else was answered
    /// since.
    pub(crate) fn unanswered(&self, took: Duration) {
        let asked = self.clock.now().before(took);
        let mut known = self.known();
        if known.answered.is_none_or(|at| at < asked) {
            known.silent.get_or_insert(asked);
        }
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A question that no verb asks. One that is dropped was not answered, if its time was up.
#[derive(Debug)]
pub(crate) struct Question<'a> {
    pulse: &'a Pulse,
    asked: Moment,
    patience: Duration,
    ended: bool,
}

impl<'a> Question<'a> {
    pub(crate) fn new(pulse: &'a Pulse, patience: Duration) -> Self {
        Self { pulse, asked: pulse.clock.now(), patience, ended: false }
    }

    /// `None`: that tells nothing.
    pub(crate) fn ends(mut self, answered: Option<bool>) {
        self.ended = true;
        match answered {
            Some(true) => self.pulse.answered(),
            Some(false) => self.pulse.unanswered(self.took()),
            None => {}
        }
    }

    fn took(&self) -> Duration {
        self.pulse.clock.now().since(self.asked)
    }
}

impl Drop for Question<'_> {
    fn drop(&mut self) {
        let took = self.took();
        if !self.ended && took >= self.patience {
            self.pulse.unanswered(took);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[tokio::test(start_paused = true)]
    async fn the_silence_counts_from_the_first_question_without_an_answer() {
        let pulse = Pulse::new(Clock::tokio());
        pulse.answered();
        tokio::time::advance(10 * SECOND).await;
        assert_eq!(pulse.beat(), Beat::Answers(10 * SECOND));
        pulse.unanswered(3 * SECOND);
        tokio::time::advance(SECOND).await;
        pulse.unanswered(SECOND);
        assert_eq!(pulse.beat(), Beat::Silent(4 * SECOND));
        pulse.answered();
        assert_eq!(pulse.beat(), Beat::Answers(Duration::ZERO));
    }

    #[tokio::test(start_paused = true)]
    async fn one_slow_operation_is_no_silence_while_others_are_answered() {
        let pulse = Pulse::new(Clock::tokio());
        tokio::time::advance(5 * SECOND).await;
        pulse.answered();
        tokio::time::advance(SECOND).await;
        pulse.unanswered(5 * SECOND);
        assert_eq!(pulse.beat(), Beat::Answers(SECOND));
    }

    #[tokio::test(start_paused = true)]
    async fn a_question_that_is_given_up_early_tells_nothing() {
        let pulse = Pulse::new(Clock::tokio());
        pulse.answered();
        tokio::time::advance(SECOND).await;
        let (early, late) = (Question::new(&pulse, 2 * SECOND), Question::new(&pulse, SECOND));
        tokio::time::advance(SECOND).await;
        drop(early);
        assert_eq!(pulse.beat(), Beat::Answers(2 * SECOND));
        drop(late);
        assert_eq!(pulse.beat(), Beat::Silent(SECOND));
    }
}
