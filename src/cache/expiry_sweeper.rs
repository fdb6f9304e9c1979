//! The expiry sweeper: frees the memory of expired sessions, and measures the wall clock.
//!
//! The cache never serves an expired session, so the sweeper only frees memory, and a pass each minute is
//! enough. moka can expire entries too, but that would make a hit a quarter slower, and add a node to each
//! entry.

use std::time::{Duration, Instant};

use tokio_util::sync::CancellationToken;

use crate::cache::{Cache, Entry};
use crate::telemetry::metrics::Eviction;

const SWEEP_INTERVAL: Duration = Duration::from_secs(60);
/// How often the two clocks are compared. A step of the wall clock may go unnoticed for this long.
const CLOCK_CHECK_INTERVAL: Duration = Duration::from_secs(1);
/// The passes take at most 1/200 of one core.
const MAX_CPU_SHARE: u32 = 200;

impl Cache {
    /// Removes expired entries every minute, and compares the two clocks every second. Once `cancellation`
    /// is cancelled, removes all entries and returns.
    pub(crate) async fn run_sweeper(self, cancellation: CancellationToken) {
        let mut pause = SWEEP_INTERVAL;
        while cancellation.run_until_cancelled(self.compare_clocks(pause)).await.is_some() {
            let cache = self.clone();
            let pass_cancellation = cancellation.clone();
            // On a thread for blocking work, since a pass over a million entries takes a while.
            let pass = tokio::task::spawn_blocking(move || {
                let start = Instant::now();
                cache.sweep_expired(|| pass_cancellation.is_cancelled());
                start.elapsed()
            });
            // After a pass that panicked, the next one follows as usual.
            let elapsed = pass.await.unwrap_or_default();
            pause = SWEEP_INTERVAL.max(elapsed.saturating_mul(MAX_CPU_SHARE));
        }
        // The store was shut down or dropped, so it serves nothing any longer.
        self.purge();
    }

    /// Measures the wall clock against the steady one every second, for the time of `duration`.
    async fn compare_clocks(&self, duration: Duration) {
        let end = tokio::time::Instant::now() + duration;
        while tokio::time::Instant::now() < end {
            tokio::time::sleep(CLOCK_CHECK_INTERVAL).await;
            let now = self.0.clock.now();
            self.0.wall.measure(now, self.0.clock.wall());
        }
    }

    /// Removes the entries of expired sessions. Stops early once `should_stop` returns true.
    pub(crate) fn sweep_expired(&self, should_stop: impl Fn() -> bool) {
        let shared = &self.0;
        let now = shared.clock.now();
        for (key, entry) in &shared.sessions {
            let key = *key;
            if should_stop() {
                return;
            }
            if !shared.wall.is_past(entry.expires(), now) {
                continue;
            }
            // Another operation may have replaced the entry. So look at it again under the key's lock,
            // where nothing can replace it.
            shared.versions.with_key_locked(key, || {
                let has_expired = |entry: Entry| shared.wall.is_past(entry.expires(), now);
                if shared.sessions.get(&key).is_some_and(has_expired) {
                    shared.sessions.invalidate(&key);
                    shared.metrics.count_eviction(Eviction::Expired);
                }
            });
        }
        shared.sessions.run_pending_tasks();
    }
}
