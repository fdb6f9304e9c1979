//! `CacheMetrics`: the metrics of the cache.

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
    /// Also in `loads`. A field of its own, because a hit increments nothing else.
    pub(crate) hits: Counter,
    loads: [Counter; LoadResult::COUNT],
    fills: [Counter; Fill::COUNT],
    invalidations: [Counter; Invalidation::COUNT],
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
            invalidations: series.counters(&INVALIDATIONS),
            evictions: series.counters(&EVICTIONS),
            touches_skipped: series.counter(&SKIPPED),
            entries: series.gauge(&ENTRIES),
            bytes: series.gauge(&BYTES),
            limit_bytes: series.gauge(&LIMIT_BYTES),
            limit_entries: series.gauge(&LIMIT_ENTRIES),
            max_staleness: series.gauge(&MAX_STALENESS),
        }
    }

    /// Shows the bound. `None`: entries have no age bound.
    pub(crate) fn set_max_staleness(&self, bound: Option<Duration>) {
        self.max_staleness.set(bound.map_or(f64::INFINITY, |bound| bound.as_secs_f64()));
    }

    pub(crate) fn count_absent(&self) {
        self.loads[LoadResult::Absent as usize].increment(1);
    }

    pub(crate) fn count_grace(&self) {
        self.loads[LoadResult::Grace as usize].increment(1);
    }

    /// Begins to count a load that the cache did not answer at once.
    pub(crate) fn begin_load(&self) -> Load<'_> {
        Load { metrics: self, result: LoadResult::Miss }
    }

    pub(crate) fn count_fill(&self, fill: Fill) {
        self.fills[fill as usize].increment(1);
    }

    pub(crate) fn count_invalidation(&self, cause: Invalidation) {
        self.invalidations[cause as usize].increment(1);
    }

    pub(crate) fn count_eviction(&self, cause: Eviction) {
        self.evictions[cause as usize].increment(1);
    }
}

/// Counts a load once, when it is dropped, by its last result.
#[derive(Debug)]
pub(crate) struct Load<'a> {
    metrics: &'a CacheMetrics,
    result: LoadResult,
}

impl Load<'_> {
    /// Records that the cache has answered after all: with a session, or that there is none.
    pub(crate) fn record_found(&mut self, is_session: bool) {
        self.result = if is_session { LoadResult::Hit } else { LoadResult::Absent };
    }

    pub(crate) fn record_joined(&mut self) {
        self.result = LoadResult::Coalesced;
    }

    /// Records that the load reads from MongoDB. `is_expired`: the entry was too old to be served.
    pub(crate) fn record_missed(&mut self, is_expired: bool) {
        self.result = if is_expired { LoadResult::Expired } else { LoadResult::Miss };
    }

    pub(crate) fn record_grace(&mut self) {
        self.result = LoadResult::Grace;
    }
}

impl Drop for Load<'_> {
    fn drop(&mut self) {
        self.metrics.loads[self.result as usize].increment(1);
    }
}
