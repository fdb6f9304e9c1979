//! Gives back the memory of sessions that have ended.
//!
//! What has expired is served to nobody, so this is about memory alone, and a pass now and then is
//! enough. moka would do it by itself, at the cost of a quarter of a look-up at each hit, and of a node
//! for each entry.

use std::time::{Duration, Instant};

use tokio_util::sync::CancellationToken;

use crate::cache::{Cache, Entry};
use crate::telemetry::metrics::Eviction;

/// How often.
const SWEEP_INTERVAL: Duration = Duration::from_secs(60);
/// How often the clocks are compared, and so how long a step of the wall clock may go unnoticed.
const CLOCK_CHECK_INTERVAL: Duration = Duration::from_secs(1);
/// The share of one core that the passes may take: one part of so many.
const MAX_CPU_SHARE: u32 = 200;

impl Cache {
    /// Removes what has ended, every minute, until it is told to stop, and then everything. Compares the
    /// clocks every second.
    pub(crate) async fn run_sweeper(self, ends: CancellationToken) {
        let mut pause = SWEEP_INTERVAL;
        while ends.run_until_cancelled(self.compare_clocks(pause)).await.is_some() {
            let (cache, told) = (self.clone(), ends.clone());
            // On a thread of its own: with a million entries it takes a moment.
            let pass = tokio::task::spawn_blocking(move || {
                let start = Instant::now();
                cache.sweep_expired(|| told.is_cancelled());
                start.elapsed()
            });
            // A pass that panicked is no reason to make no more.
            let took = pass.await.unwrap_or_default();
            pause = SWEEP_INTERVAL.max(took.saturating_mul(MAX_CPU_SHARE));
        }
        // The store is shut down, or has gone: nothing is served any more.
        self.purge();
    }

    /// Compares the wall clock with the steady one again and again, for so long.
    async fn compare_clocks(&self, lasting: Duration) {
        let end = tokio::time::Instant::now() + lasting;
        while tokio::time::Instant::now() < end {
            tokio::time::sleep(CLOCK_CHECK_INTERVAL).await;
            let now = self.0.clock.now();
            self.0.wall.measure(now, self.0.clock.wall());
        }
    }

    /// Removes the entries of sessions that have ended, until all are looked at or `enough` says so.
    pub(crate) fn sweep_expired(&self, enough: impl Fn() -> bool) {
        let shared = &self.0;
        let now = shared.clock.now();
        for (key, entry) in &shared.sessions {
            let key = *key;
            if enough() {
                return;
            }
            if !shared.wall.is_past(entry.expires(), now) {
                continue;
            }
            // Under the key's lock, where nobody places another one: it may be another one already.
            shared.versions.with_key_locked(key, || {
                let ended = |entry: Entry| shared.wall.is_past(entry.expires(), now);
                if shared.sessions.get(&key).is_some_and(ended) {
                    shared.sessions.invalidate(&key);
                    shared.metrics.count_eviction(Eviction::Expired);
                }
            });
        }
        shared.sessions.run_pending_tasks();
    }
}
