//! `OutageGrace`: what the cache may serve past the lease while MongoDB is down (stale-if-error).

use std::sync::Arc;
use std::time::Duration;

use crate::availability::Availability;
use crate::sync::{AtomicBool, Ordering};

/// How much longer than its lease an entry may be served while MongoDB is down.
#[derive(Debug)]
pub(crate) struct OutageGrace {
    duration: Duration,
    availability: Availability,
    /// Whether a [`Probe`] exists. In an `Arc`, because the probe outlives the borrow of the cache.
    is_probing: Arc<AtomicBool>,
}

/// The right to read from MongoDB during an outage, to find out whether it answers again. One load at a time
/// has it; the others are served from the cache.
#[derive(Debug)]
pub(crate) struct Probe(Arc<AtomicBool>);

impl OutageGrace {
    pub(crate) fn new(duration: Duration, availability: Availability) -> Self {
        Self { duration, availability, is_probing: Arc::new(AtomicBool::new(false)) }
    }

    /// The grace, if there is one and MongoDB is down now.
    pub(crate) fn current(&self) -> Option<Duration> {
        (!self.duration.is_zero() && self.availability.is_down()).then_some(self.duration)
    }

    /// `None` while another load has the probe.
    pub(crate) fn begin_probe(&self) -> Option<Probe> {
        let was_probing = self.is_probing.swap(true, Ordering::AcqRel);
        (!was_probing).then(|| Probe(Arc::clone(&self.is_probing)))
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
    use crate::error::{Error, ErrorKind, Result};
    use crate::time::Clock;

    #[test]
    fn a_grace_needs_an_outage_and_the_option() {
        let availability = Availability::new(Clock::system());
        let grace = OutageGrace::new(Duration::from_secs(1), availability.clone());
        let without = OutageGrace::new(Duration::ZERO, availability.clone());
        assert_eq!(grace.current(), None);
        let lost: Result<()> = Err(Error::new(ErrorKind::Connection, "reset"));
        availability.observe_call(availability.now(), &lost);
        assert_eq!(grace.current(), Some(Duration::from_secs(1)));
        assert_eq!(without.current(), None);
        availability.observe_call(availability.now(), &Ok(()));
        assert_eq!(grace.current(), None);
    }

    #[test]
    fn one_load_probes_at_a_time() {
        let grace = OutageGrace::new(Duration::from_secs(1), Availability::new(Clock::system()));
        let probe = grace.begin_probe();
        assert!(probe.is_some());
        assert!(grace.begin_probe().is_none());
        drop(probe);
        assert!(grace.begin_probe().is_some());
    }
}
