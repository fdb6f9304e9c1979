//! `Capacity`: the bounds of the cache as one weight, and `Usage`: what the cache holds now.

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};

use crate::cache::{CacheConfig, Coherence};
use crate::telemetry::metrics::{CacheMetrics, Gauge, Portion};

/// Both bounds of the cache, bytes and entries, as one sum of weights, since moka has one bound only.
///
/// With a bound on entries, each entry weighs at least `capacity / max_entries`. So no more than
/// `max_entries` of them fit.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Capacity {
    pub(crate) capacity: u64,
    /// The least that an entry weighs.
    share: u32,
}

impl Capacity {
    pub(crate) fn of(config: &CacheConfig) -> Self {
        let longest = config.max_staleness.saturating_add(config.outage_grace);
        if config.coherence != Coherence::SoleWriter && longest.is_zero() {
            // The lease never permits an entry, so do not keep any.
            return Self { capacity: 0, share: 0 };
        }
        let Some(entries) = config.max_entries else {
            return Self { capacity: config.max_bytes, share: 0 };
        };
        // A weight has 32 bits, so a share above 4 GiB is cut to 4 GiB.
        let share = config.max_bytes / entries.max(1);
        let share = u32::try_from(share).unwrap_or(u32::MAX);
        if share == 0 {
            return Self { capacity: config.max_bytes, share: 0 };
        }
        Self { capacity: entries.saturating_mul(share.into()), share }
    }

    pub(crate) fn weigh(self, bytes: u32) -> u32 {
        bytes.max(self.share)
    }

    /// Whether an entry fits into an empty cache. If it does not, inserting it would evict all others for
    /// nothing.
    pub(crate) fn admits(self, bytes: u32) -> bool {
        u64::from(self.weigh(bytes)) <= self.capacity
    }

    /// Whether moka must evict at once after this entry was inserted. moka buffers up to 64 inserts before
    /// it evicts, and large ones would exceed the bound by too much in the meantime.
    pub(crate) fn is_large(self, bytes: u32) -> bool {
        u64::from(self.weigh(bytes)) > self.capacity / 1_024
    }
}

/// Counts the entries and bytes that the cache holds, for the gauges and for `health()`.
///
/// Other stores add to the same gauges. So the last clone subtracts what it has added when it is dropped.
#[derive(Clone, Debug)]
pub(crate) struct Usage(Arc<UsageCounters>);

#[derive(Debug)]
struct UsageCounters {
    entries: AtomicI64,
    bytes: AtomicI64,
    gauges: [Gauge; 2],
    limits: (u64, Option<u64>),
    /// What this cache adds to the gauges of the bounds.
    _portions: [Portion; 2],
}

impl Usage {
    pub(crate) fn new(metrics: &CacheMetrics, config: &CacheConfig) -> Self {
        let gauges = [metrics.entries.clone(), metrics.bytes.clone()];
        for gauge in &gauges {
            gauge.increment(0);
        }
        let portions = [
            Portion::new(metrics.limit_bytes.clone(), config.max_bytes),
            Portion::new(metrics.limit_entries.clone(), config.max_entries.unwrap_or(0)),
        ];
        let limits = (config.max_bytes, config.max_entries);
        Self(Arc::new(UsageCounters {
            entries: 0.into(),
            bytes: 0.into(),
            gauges,
            limits,
            _portions: portions,
        }))
    }

    /// The bounds in bytes and in entries.
    pub(crate) fn limits(&self) -> (u64, Option<u64>) {
        self.0.limits
    }

    /// The number of entries and of bytes.
    pub(crate) fn totals(&self) -> (u64, u64) {
        let [entries, bytes] =
            [&self.0.entries, &self.0.bytes].map(|sum| sum.load(Ordering::Relaxed));
        // moka may report the removal of an entry before its insertion was added here. So a sum can be
        // negative for a moment.
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

    fn capacity(max_bytes: u64, max_entries: Option<u64>) -> Capacity {
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
    fn max_entries(capacity: Capacity) -> u64 {
        capacity.capacity / u64::from(capacity.weigh(1))
    }

    #[test]
    fn exactly_the_maximum_number_of_entries_fits() {
        for max_bytes in [1_000, 64 << 20, 64 << 30, u64::MAX] {
            for entries in [1, 7, 10, 100] {
                assert_eq!(
                    max_entries(capacity(max_bytes, Some(entries))),
                    entries,
                    "{max_bytes} {entries}"
                );
            }
        }
    }

    #[test]
    fn the_bound_in_bytes_holds_with_and_without_a_bound_in_entries() {
        for entries in [None, Some(1), Some(1_000), Some(u64::MAX)] {
            assert!(capacity(64 << 20, entries).capacity <= 64 << 20);
            assert!(!capacity(0, entries).admits(1));
        }
    }
}
