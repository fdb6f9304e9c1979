//! How the cache stands, as [`Health`](crate::Health) tells it, and its end.

use std::time::Duration;

use crate::cache::Cache;
use crate::time::Moment;

/// What the cache knows of its lease, and what it holds.
#[derive(Clone, Copy, Debug)]
pub(crate) struct CacheStats {
    pub(crate) now: Moment,
    /// `None`: without a bound.
    pub(crate) max_staleness: Option<Duration>,
    pub(crate) synced_through: Moment,
    /// How much longer entries are served now.
    pub(crate) grace: Option<Duration>,
    pub(crate) entries: u64,
    pub(crate) bytes: u64,
    pub(crate) max_bytes: u64,
    pub(crate) max_entries: Option<u64>,
}

impl Cache {
    pub(crate) fn stats(&self) -> CacheStats {
        let shared = &self.0;
        let (entries, bytes) = shared.usage.totals();
        let (max_bytes, max_entries) = shared.usage.limits();
        CacheStats {
            now: shared.clock.now(),
            max_staleness: shared.lease.bound(),
            synced_through: shared.lease.synced_through(),
            grace: shared.grace.current(),
            entries,
            bytes,
            max_bytes,
            max_entries,
        }
    }

    /// Empties the cache for good, to the last entry: moka clears a part at a time.
    pub(crate) fn purge(&self) {
        self.clear();
        let mut left = self.0.usage.totals().0;
        while left > 0 {
            self.0.sessions.run_pending_tasks();
            let now = self.0.usage.totals().0;
            if now >= left {
                return;
            }
            left = now;
        }
    }
}
