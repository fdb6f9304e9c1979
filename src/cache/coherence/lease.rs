//! `Lease`: decides until when an entry may be served. The caller passes the time in.

use std::time::Duration;

use crate::sync::{AtomicU64, Ordering};
use crate::time::Moment;

/// Bounds the age of the entries that the cache serves.
///
/// The age of an entry counts from the moment at which its read began, or from the latest moment up to
/// which every change has reached this cache, whichever is later.
#[derive(Debug)]
pub(crate) struct Lease {
    max_staleness: Option<Duration>,
    /// The latest moment up to which every change has reached this cache, in nanoseconds of the steady
    /// clock. Zero if there was never a renewal. An atomic, since each hit reads it and must not wait.
    synced_through: AtomicU64,
}

impl Lease {
    /// `None`: no bound, for a cache whose store is the only one that changes the sessions.
    pub(crate) fn new(max_staleness: Option<Duration>) -> Self {
        Self { max_staleness, synced_through: AtomicU64::new(0) }
    }

    pub(crate) fn bound(&self) -> Option<Duration> {
        self.max_staleness
    }

    /// The lease as it is now. Take it before you look up the entry that it judges: the lease may be
    /// renewed right after a change has removed that entry, and such a renewal must not extend the life
    /// of what was looked up before.
    pub(crate) fn snapshot(&self) -> LeaseSnapshot {
        LeaseSnapshot { max_staleness: self.max_staleness, synced_through: self.synced_through() }
    }

    /// Records that the cache has applied every change that the database made before `at`.
    pub(crate) fn renew(&self, at: Moment) {
        self.synced_through.fetch_max(at.as_nanos(), Ordering::AcqRel);
    }

    pub(crate) fn synced_through(&self) -> Moment {
        Moment::from_nanos(self.synced_through.load(Ordering::Acquire))
    }
}

/// A [`Lease`] as it was at one moment.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LeaseSnapshot {
    max_staleness: Option<Duration>,
    synced_through: Moment,
}

impl LeaseSnapshot {
    /// Whether a state that was read at `read_at` may be served at `now`.
    pub(crate) fn permits(self, read_at: Moment, now: Moment) -> bool {
        self.permits_with_grace(Duration::ZERO, read_at, now)
    }

    /// The same for a lease that is `grace` longer.
    pub(crate) fn permits_with_grace(self, grace: Duration, read_at: Moment, now: Moment) -> bool {
        let Some(bound) = self.max_staleness else { return true };
        now.since(read_at.max(self.synced_through)) <= bound.saturating_add(grace)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn at(seconds: u64) -> Moment {
        Moment::from_nanos(seconds * 1_000_000_000)
    }

    #[test]
    fn age_counts_from_the_read_or_the_last_renewal_whichever_is_later() {
        let lease = Lease::new(Some(5 * SECOND));
        assert!(lease.snapshot().permits(at(10), at(15)));
        assert!(!lease.snapshot().permits(at(10), at(16)));
        lease.renew(at(12));
        assert!(lease.snapshot().permits(at(10), at(17)));
        assert!(!lease.snapshot().permits(at(10), at(18)));
        lease.renew(at(11));
        assert!(lease.snapshot().permits(at(10), at(17)), "a renewal never goes back");
        assert!(
            lease.snapshot().permits(at(15), at(20)),
            "a later read counts from its own moment"
        );
    }

    #[test]
    fn a_grace_is_added_to_the_bound_and_no_bound_needs_none() {
        let lease = Lease::new(Some(5 * SECOND));
        assert!(lease.snapshot().permits_with_grace(3 * SECOND, at(10), at(18)));
        assert!(!lease.snapshot().permits_with_grace(3 * SECOND, at(10), at(19)));
        assert!(Lease::new(None).snapshot().permits(at(0), at(1_000_000)));
    }
}
