//! Until when an entry may be served: pure logic, time passed in.

use std::time::Duration;

use crate::sync::{AtomicU64, Ordering};
use crate::time::Moment;

/// How old the state of a session may be that is served from the cache.
///
/// An entry is as old as the moment at which its read began, or as the latest moment up to which
/// every change is known to have reached this cache, whichever is later.
#[derive(Debug)]
pub(crate) struct Lease {
    max_staleness: Option<Duration>,
    /// In nanoseconds of the steady clock. Zero, its beginning, if nothing was ever vouched for.
    synced_at: AtomicU64,
}

impl Lease {
    /// `None`: without a bound, for a cache that is the only one to change its sessions.
    pub(crate) fn new(max_staleness: Option<Duration>) -> Self {
        Self { max_staleness, synced_at: AtomicU64::new(0) }
    }

    pub(crate) fn bound(&self) -> Option<Duration> {
        self.max_staleness
    }

    /// The lease as it stands. To be taken before the entry that it is to judge is looked up: once a
    /// change has removed an entry, the lease may be renewed, which must not prolong what was taken
    /// from the cache before.
    pub(crate) fn snapshot(&self) -> LeaseSnapshot {
        LeaseSnapshot { max_staleness: self.max_staleness, synced_at: self.synced_through() }
    }

    /// Every change that the database made before `at` has reached this cache and been taken.
    pub(crate) fn renew(&self, at: Moment) {
        self.synced_at.fetch_max(at.as_nanos(), Ordering::AcqRel);
    }

    pub(crate) fn synced_through(&self) -> Moment {
        Moment::from_nanos(self.synced_at.load(Ordering::Acquire))
    }
}

/// A [`Lease`] as it stood at some time.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LeaseSnapshot {
    max_staleness: Option<Duration>,
    synced_at: Moment,
}

impl LeaseSnapshot {
    /// Whether what was read at `read_at` may be served `now`.
    pub(crate) fn permits(self, read_at: Moment, now: Moment) -> bool {
        self.permits_with_grace(Duration::ZERO, read_at, now)
    }

    /// Whether it may be served up to `grace` longer than the lease lasts.
    pub(crate) fn permits_with_grace(self, grace: Duration, read_at: Moment, now: Moment) -> bool {
        let Some(bound) = self.max_staleness else { return true };
        now.since(read_at.max(self.synced_at)) <= bound.saturating_add(grace)
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
    fn age_counts_from_the_read_or_the_last_moment_vouched_for() {
        let lease = Lease::new(Some(5 * SECOND));
        assert!(lease.snapshot().permits(at(10), at(15)));
        assert!(!lease.snapshot().permits(at(10), at(16)));
        lease.renew(at(12));
        assert!(lease.snapshot().permits(at(10), at(17)));
        assert!(!lease.snapshot().permits(at(10), at(18)));
        lease.renew(at(11));
        assert!(lease.snapshot().permits(at(10), at(17)), "a renewal never goes back");
        assert!(lease.snapshot().permits(at(15), at(20)), "nor does it age what was read since");
    }

    #[test]
    fn a_grace_comes_on_top_and_a_sole_writer_needs_none() {
        let lease = Lease::new(Some(5 * SECOND));
        assert!(lease.snapshot().permits_with_grace(3 * SECOND, at(10), at(18)));
        assert!(!lease.snapshot().permits_with_grace(3 * SECOND, at(10), at(19)));
        assert!(Lease::new(None).snapshot().permits(at(0), at(1_000_000)));
    }
}
