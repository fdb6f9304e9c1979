//! What the cache counts.

use std::time::Duration;

use crate::telemetry::metrics::Series;
use crate::telemetry::metrics::catalogue::{
    self, BYTES, ENTRIES, EVICTIONS, FILLS, INVALIDATIONS, LIMIT_BYTES, LIMIT_ENTRIES, LOADS,
    MAX_STALENESS, SKIPPED,
};
use crate::telemetry::metrics::handles::{Counter, Gauge};
use crate::telemetry::metrics::labels::{Eviction, Fill, Invalidation, LoadResult};

#[derive(Clone, Debug)]
pub(crate) struct CacheMetrics {
    /// By itself, since it is all that a hit pays.
    pub(crate) hits: Counter,
    loads: [Counter; LoadResult::COUNT],
    fills: [Counter; Fill::COUNT],
    voids: [Counter; Invalidation::COUNT],
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
        let loads: [Counter; LoadResult::COUNT] = series.counters(&LOADS);
        Self {
            hits: loads[LoadResult::Hit as usize].clone(),
            loads,
            fills: series.counters(&FILLS),
            voids: series.counters(&INVALIDATIONS),
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

    pub(crate) fn count_absent(&self) {
        self.loads[LoadResult::Absent as usize].increment(1);
    }

    pub(crate) fn count_grace(&self) {
        self.loads[LoadResult::Grace as usize].increment(1);
    }

    /// A load that was not answered at once.
    pub(crate) fn begin_load(&self) -> Load<'_> {
        Load { metrics: self, so_far: LoadResult::Miss }
    }

    pub(crate) fn count_fill(&self, fill: Fill) {
        self.fills[fill as usize].increment(1);
    }

    pub(crate) fn count_invalidation(&self, cause: Invalidation) {
        self.voids[cause as usize].increment(1);
    }

    pub(crate) fn count_eviction(&self, cause: Eviction) {
        self.evictions[cause as usize].increment(1);
    }
}

/// Counts a load once, when it ends: as what it has come to by then.
#[derive(Debug)]
pub(crate) struct Load<'a> {
    metrics: &'a CacheMetrics,
    so_far: LoadResult,
}

impl Load<'_> {
    /// The cache has it by now, or knows that there is none.
    pub(crate) fn found(&mut self, any: bool) {
        self.so_far = if any { LoadResult::Hit } else { LoadResult::Absent };
    }

    pub(crate) fn joined(&mut self) {
        self.so_far = LoadResult::Coalesced;
    }

    /// Reads by itself; `lapsed` if there was an entry, too old to be served.
    pub(crate) fn missed(&mut self, lapsed: bool) {
        self.so_far = if lapsed { LoadResult::Expired } else { LoadResult::Miss };
    }

    pub(crate) fn served_in_grace(&mut self) {
        self.so_far = LoadResult::Grace;
    }
}

impl Drop for Load<'_> {
    fn drop(&mut self) {
        self.metrics.loads[self.so_far as usize].increment(1);
    }
}
