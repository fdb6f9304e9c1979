//! How the cache stands, as [`Health`](crate::Health) tells it, and its end.

use std::time::Duration;

use super::Cache;
use crate::clock::Moment;

/// What the cache knows of its lease, and what it holds.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Standing {
    pub(crate) now: Moment,
    /// `None`: without a bound.
    pub(crate) max_staleness: Option<Duration>,
    pub(crate) synced_at: Moment,
    /// How much longer entries are served now.
    pub(crate) grace: Option<Duration>,
    pub(crate) entries: u64,
    pub(crate) bytes: u64,
    pub(crate) max_bytes: u64,
    pub(crate) max_entries: Option<u64>,
}

impl Cache {
    pub(crate) fn standing(&self) -> Standing {
        let shared = &self.0;
        let (entries, bytes) = shared.account.held();
        let (max_bytes, max_entries) = shared.account.limits();
        Standing {
            now: shared.clock.now(),
            max_staleness: shared.lease.bound(),
            synced_at: shared.lease.synced_at(),
            grace: shared.outage.grace(),
            entries,
            bytes,
            max_bytes,
            max_entries,
        }
    }

    /// Empties the cache for good, to the last entry: moka clears a part at a time.
    pub(crate) fn empty(&self) {
        self.clear();
        let mut left = self.0.account.held().0;
        while left > 0 {
            self.0.sessions.run_pending_tasks();
            let now = self.0.account.held().0;
            if now >= left {
                return;
            }
            left = now;
        }
    }
}
