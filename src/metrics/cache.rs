//! What the cache counts.

use std::time::Duration;

use super::Series;
use super::catalogue::{
    self, BYTES, ENTRIES, EVICTIONS, FILLS, LIMIT_BYTES, LIMIT_ENTRIES, LOADS, MAX_STALENESS,
    SKIPPED, VOIDS,
};
use super::handles::{Counter, Gauge};
use super::labels::{Eviction, Fill, Loaded, Void};

#[derive(Clone, Debug)]
pub(crate) struct CacheMetrics {
    /// By itself, since it is all that a hit pays.
    pub(crate) hits: Counter,
    loads: [Counter; Loaded::COUNT],
    fills: [Counter; Fill::COUNT],
    voids: [Counter; Void::COUNT],
    evictions: [Counter; Eviction::COUNT],
    pub(crate) touches_skipped: Counter,
    pub(crate) entries: Gauge,
    pub(crate) bytes: Gauge,
    pub(crate) limit_bytes: Gauge,
    pub(crate) limit_entries: Gauge,
    max_staleness: Gauge,
}

impl CacheMetrics {
    pub(crate) fn new(series: &Series) -> Self {
        catalogue::describe();
        let loads: [Counter; Loaded::COUNT] = series.counters(&LOADS);
        Self {
            hits: loads[Loaded::Hit as usize].clone(),
            loads,
            fills: series.counters(&FILLS),
            voids: series.counters(&VOIDS),
            evictions: series.counters(&EVICTIONS),
            touches_skipped: series.counter(&SKIPPED),
            entries: series.gauge(&ENTRIES),
            bytes: series.gauge(&BYTES),
            limit_bytes: series.gauge(&LIMIT_BYTES),
            limit_entries: series.gauge(&LIMIT_ENTRIES),
            max_staleness: series.gauge(&MAX_STALENESS),
        }
    }

    /// `None`: without a bound.
    pub(crate) fn max_staleness(&self, bound: Option<Duration>) {
        self.max_staleness.set(bound.map_or(f64::INFINITY, |bound| bound.as_secs_f64()));
    }

    pub(crate) fn absent(&self) {
        self.loads[Loaded::Absent as usize].increment(1);
    }

    pub(crate) fn grace(&self) {
        self.loads[Loaded::Grace as usize].increment(1);
    }

    /// A load that was not answered at once.
    pub(crate) fn load(&self) -> Load<'_> {
        Load { metrics: self, so_far: Loaded::Miss }
    }

    pub(crate) fn fill(&self, fill: Fill) {
        self.fills[fill as usize].increment(1);
    }

    pub(crate) fn void(&self, cause: Void) {
        self.voids[cause as usize].increment(1);
    }

    pub(crate) fn evicts(&self, cause: Eviction) {
        self.evictions[cause as usize].increment(1);
    }
}

/// Counts a load once, when it ends: as what it has come to by then.
#[derive(Debug)]
pub(crate) struct Load<'a> {
    metrics: &'a CacheMetrics,
    so_far: Loaded,
}

impl Load<'_> {
    /// The cache has it by now, or knows that there is none.
    pub(crate) fn finds(&mut self, any: bool) {
        self.so_far = if any { Loaded::Hit } else { Loaded::Absent };
    }

    pub(crate) fn follows(&mut self) {
        self.so_far = Loaded::Shared;
    }

    /// Reads by itself; `lapsed` if there was an entry, too old to be served.
    pub(crate) fn reads(&mut self, lapsed: bool) {
        self.so_far = if lapsed { Loaded::Lapsed } else { Loaded::Miss };
    }

    pub(crate) fn is_graced(&mut self) {
        self.so_far = Loaded::Grace;
    }
}

impl Drop for Load<'_> {
    fn drop(&mut self) {
        self.metrics.loads[self.so_far as usize].increment(1);
    }
}
