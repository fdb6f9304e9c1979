//! Whether the database answers, and what may be served while it does not.

use std::sync::Arc;
use std::time::Duration;

use crate::sync::{AtomicBool, Ordering};

#[derive(Debug)]
pub(super) struct Outage {
    grace: Duration,
    down: AtomicBool,
    probing: Arc<AtomicBool>,
}

/// The one look at a time whether the database answers again.
#[derive(Debug)]
pub(super) struct Probe(Arc<AtomicBool>);

impl Outage {
    pub(super) fn new(grace: Duration) -> Self {
        Self { grace, down: AtomicBool::new(false), probing: Arc::new(AtomicBool::new(false)) }
    }

    /// Takes note of the last call's end.
    pub(super) fn note(&self, down: bool) {
        if self.down.load(Ordering::Relaxed) != down {
            self.down.store(down, Ordering::Relaxed);
        }
    }

    /// How much longer than its lease an entry may be served now, if at all.
    pub(super) fn grace(&self) -> Option<Duration> {
        let served = !self.grace.is_zero() && self.down.load(Ordering::Relaxed);
        served.then_some(self.grace)
    }

    pub(super) fn probe(&self) -> Option<Probe> {
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

    #[test]
    fn a_grace_is_given_only_while_nothing_answers_and_only_if_it_was_asked_for() {
        let (outage, none) = (Outage::new(Duration::from_secs(1)), Outage::new(Duration::ZERO));
        assert_eq!(outage.grace(), None);
        outage.note(true);
        none.note(true);
        assert_eq!((outage.grace(), none.grace()), (Some(Duration::from_secs(1)), None));
        outage.note(false);
        assert_eq!(outage.grace(), None);
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
