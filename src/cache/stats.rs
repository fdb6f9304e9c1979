//! `CacheStats`: the part of [`Health`](crate::Health) that the cache knows.

use std::time::Duration;

use crate::cache::Cache;
use crate::time::Moment;

/// A snapshot of the cache's lease and of its contents.
#[derive(Clone, Copy, Debug)]
pub(crate) struct CacheStats {
    pub(crate) now: Moment,
    /// `None`: no bound.
    pub(crate) max_staleness: Option<Duration>,
    pub(crate) synced_through: Moment,
    /// How long past their lease entries are served now. `None`: not at all.
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
}
