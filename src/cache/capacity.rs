//! The bounds of the cache, in moka's terms, and the account of what it holds.

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};

use crate::cache::{CacheConfig, Coherence};
use crate::telemetry::metrics::{CacheMetrics, Gauge, Portion};

/// moka knows one bound, a sum of weights. Were each entry to weigh at least its share of the
/// capacity, no more than the given number would fit.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Capacity {
    pub(crate) capacity: u64,
    share: u32,
}

impl Capacity {
    pub(crate) fn of(limits: &CacheConfig) -> Self {
        let longest = limits.max_staleness.saturating_add(limits.outage_grace);
        if limits.coherence != Coherence::SoleWriter && longest.is_zero() {
            // Nothing would ever be served.
            return Self { capacity: 0, share: 0 };
        }
        let Some(entries) = limits.max_entries else {
            return Self { capacity: limits.max_bytes, share: 0 };
        };
        // A weight has 32 bits, so a capacity beyond 4 GiB for each entry is cut to that.
        let share = limits.max_bytes / entries.max(1);
        let share = u32::try_from(share).unwrap_or(u32::MAX);
        if share == 0 {
            return Self { capacity: limits.max_bytes, share: 0 };
        }
        Self { capacity: entries.saturating_mul(share.into()), share }
    }

    pub(crate) fn weigh(self, bytes: u32) -> u32 {
        bytes.max(self.share)
    }

    /// An entry that would not fit by itself is not worth the others.
    pub(crate) fn admits(self, bytes: u32) -> bool {
        u64::from(self.weigh(bytes)) <= self.capacity
    }

    /// Whether moka should tidy up at once: it applies up to 64 writes late, which are many bytes
    /// if each is large.
    pub(crate) fn is_large(self, bytes: u32) -> bool {
        u64::from(self.weigh(bytes)) > self.capacity / 1_024
    }
}

/// What is held, as the gauges show it. They are shared with other stores, so this takes back what
/// it added when the cache goes.
#[derive(Clone, Debug)]
pub(crate) struct Usage(Arc<UsageCounters>);

#[derive(Debug)]
struct UsageCounters {
    entries: AtomicI64,
    bytes: AtomicI64,
    gauges: [Gauge; 2],
    limits: (u64, Option<u64>),
    _taken_back: [Portion; 2],
}

impl Usage {
    pub(crate) fn new(metrics: &CacheMetrics, limits: &CacheConfig) -> Self {
        let gauges = [metrics.entries.clone(), metrics.bytes.clone()];
        for gauge in &gauges {
            gauge.increment(0);
        }
        let portions = [
            Portion::new(metrics.limit_bytes.clone(), limits.max_bytes),
            Portion::new(metrics.limit_entries.clone(), limits.max_entries.unwrap_or(0)),
        ];
        let limits = (limits.max_bytes, limits.max_entries);
        Self(Arc::new(UsageCounters {
            entries: 0.into(),
            bytes: 0.into(),
            gauges,
            limits,
            _taken_back: portions,
        }))
    }

    /// The bounds in bytes and in entries.
    pub(crate) fn limits(&self) -> (u64, Option<u64>) {
        self.0.limits
    }

    /// How many entries, and how many bytes.
    pub(crate) fn totals(&self) -> (u64, u64) {
        let [entries, bytes] =
            [&self.0.entries, &self.0.bytes].map(|sum| sum.load(Ordering::Relaxed));
        // They are counted one after the other, so for a moment there may be less than nothing.
        (entries.try_into().unwrap_or(0), bytes.try_into().unwrap_or(0))
    }

    pub(crate) fn add(&self, bytes: u32) {
        self.0.entries.fetch_add(1, Ordering::Relaxed);
        self.0.bytes.fetch_add(bytes.into(), Ordering::Relaxed);
        self.0.gauges[0].increment(1);
        self.0.gauges[1].increment(bytes);
    }

    pub(crate) fn subtract(&self, bytes: u32) {
        self.0.entries.fetch_sub(1, Ordering::Relaxed);
        self.0.bytes.fetch_sub(bytes.into(), Ordering::Relaxed);
        self.0.gauges[0].decrement(1);
        self.0.gauges[1].decrement(bytes);
    }
}

impl Drop for UsageCounters {
    #[allow(clippy::cast_precision_loss, reason = "a gauge is a float")]
    fn drop(&mut self) {
        self.gauges[0].decrement(*self.entries.get_mut() as f64);
        self.gauges[1].decrement(*self.bytes.get_mut() as f64);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::cache::EvictionPolicy;

    fn bound(max_bytes: u64, max_entries: Option<u64>) -> Capacity {
        Capacity::of(&CacheConfig {
            max_bytes,
            max_entries,
            max_absent_ids: 0,
            policy: EvictionPolicy::Lru,
            max_staleness: Duration::from_secs(5),
            coherence: Coherence::ChangeStream,
            outage_grace: Duration::ZERO,
            compact: false,
        })
    }

    /// How many of the lightest entries fit.
    fn fit(bound: Capacity) -> u64 {
        bound.capacity / u64::from(bound.weigh(1))
    }

    #[test]
    fn no_more_entries_fit_than_asked_and_no_fewer() {
        for max_bytes in [1_000, 64 << 20, 64 << 30, u64::MAX] {
            for entries in [1, 7, 10, 100] {
                assert_eq!(fit(bound(max_bytes, Some(entries))), entries, "{max_bytes} {entries}");
            }
        }
    }

    #[test]
    fn the_bound_in_bytes_holds_beside_the_one_in_entries() {
        for entries in [None, Some(1), Some(1_000), Some(u64::MAX)] {
            assert!(bound(64 << 20, entries).capacity <= 64 << 20);
            assert!(!bound(0, entries).admits(1));
        }
    }
}
