//! Whether the database answers, and what may be served while it does not.

use std::sync::Arc;
use std::time::Duration;

use crate::error::Error;
use crate::sync::{AtomicBool, AtomicU64, Ordering};

#[derive(Debug)]
pub(crate) struct Outage {
    grace: Duration,
    /// A [`State`].
    state: AtomicU64,
    probing: Arc<AtomicBool>,
}

/// How the last call ended that tells of the database.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum State {
    /// It was answered.
    Up,
    /// It was not answered.
    Silent,
    /// It was refused for overload.
    Overloaded,
}

impl State {
    /// `None`: such a call tells nothing of the database.
    pub(crate) fn after(error: Option<&Error>) -> Option<Self> {
        match error {
            Some(error) if error.is_ours() => None,
            Some(error) if error.is_server_overload() => Some(Self::Overloaded),
            Some(error) if error.is_outage() => Some(Self::Silent),
            _ => Some(Self::Up),
        }
    }
}

/// The one look at a time whether the database answers again.
#[derive(Debug)]
pub(crate) struct Probe(Arc<AtomicBool>);

impl Outage {
    pub(crate) fn new(grace: Duration) -> Self {
        let state = AtomicU64::new(State::Up as u64);
        Self { grace, state, probing: Arc::new(AtomicBool::new(false)) }
    }

    /// Takes note of the last call's end.
    pub(crate) fn note(&self, state: State) {
        if self.state.load(Ordering::Relaxed) != state as u64 {
            self.state.store(state as u64, Ordering::Relaxed);
        }
    }

    /// The primary has answered a question that an overloaded server answers too: `hello` is exempt from
    /// MongoDB's limits. So this ends a silence, and an overload only ends with a call of a verb.
    pub(crate) fn answers_hello(&self) {
        if self.state.load(Ordering::Relaxed) == State::Silent as u64 {
            self.state.store(State::Up as u64, Ordering::Relaxed);
        }
    }

    /// How much longer than its lease an entry may be served now, if at all.
    pub(crate) fn grace(&self) -> Option<Duration> {
        let down = || self.state.load(Ordering::Relaxed) != State::Up as u64;
        (!self.grace.is_zero() && down()).then_some(self.grace)
    }

    pub(crate) fn probe(&self) -> Option<Probe> {
        let taken = self.probing.swap(true, Ordering::AcqRel);
        (!taken).then(|| Probe(Arc::clone(&self.probing)))
    }
}

impl Drop for Probe {
    fn drop(&mut self) {
        self.0.store(false, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;

    #[test]
    fn a_grace_is_given_only_while_nothing_answers_and_only_if_it_was_asked_for() {
        let (outage, none) = (Outage::new(Duration::from_secs(1)), Outage::new(Duration::ZERO));
        assert_eq!(outage.grace(), None);
        for state in [State::Silent, State::Overloaded] {
            outage.note(state);
            none.note(state);
            assert_eq!((outage.grace(), none.grace()), (Some(Duration::from_secs(1)), None));
            outage.note(State::Up);
            assert_eq!(outage.grace(), None);
        }
    }

    #[test]
    fn a_hello_ends_a_silence_and_no_overload() {
        let outage = Outage::new(Duration::from_secs(1));
        outage.note(State::Silent);
        outage.answers_hello();
        assert_eq!(outage.grace(), None);
        outage.note(State::Overloaded);
        outage.answers_hello();
        assert_eq!(outage.grace(), Some(Duration::from_secs(1)));
    }

    #[test]
    fn a_call_that_was_not_sent_tells_nothing_and_one_that_was_turned_away_does() {
        let full = Error::new(ErrorKind::Overloaded, "too many calls wait");
        assert_eq!(State::after(Some(&full)), None);
        let turned_away = Error::server_overloaded("error 462", true);
        assert_eq!(State::after(Some(&turned_away)), Some(State::Overloaded));
        let lost = Error::new(ErrorKind::Connection, "reset");
        assert_eq!(State::after(Some(&lost)), Some(State::Silent));
        let refused = Error::new(ErrorKind::Permission, "not allowed");
        assert_eq!(State::after(Some(&refused)), Some(State::Up));
        assert_eq!(State::after(None), Some(State::Up));
    }

    #[test]
    fn one_looks_at_a_time() {
        let outage = Outage::new(Duration::from_secs(1));
        let probe = outage.probe();
        assert!(probe.is_some() && outage.probe().is_none());
        drop(probe);
        assert!(outage.probe().is_some());
    }
}
