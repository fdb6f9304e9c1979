//! The list of all metrics. Names follow Prometheus: base units, `_total` for counters.

use metrics::{Unit, describe_counter, describe_gauge, describe_histogram};

use crate::telemetry::metrics::handles::guarded;
use crate::telemetry::metrics::labels::{
    BatchVerb, Eviction, Fill, Gap, Invalidation, LoadResult, MergeResult, OperationOutcome,
    Origin, OverLimit, Retry, Values, Verb,
};

/// A metric, with its description.
#[derive(Debug)]
pub(crate) struct Metric {
    pub(crate) name: &'static str,
    pub(crate) kind: Kind,
    pub(crate) unit: Unit,
    pub(crate) labels: &'static [Label],
    pub(crate) help: &'static str,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Counter,
    Gauge,
    Histogram,
}

/// A label and its values, from [`Values::ALL`].
#[derive(Debug)]
pub(crate) struct Label {
    pub(crate) name: &'static str,
    pub(crate) values: &'static [(&'static str, &'static str)],
}

macro_rules! catalogue {
    ($($constant:ident = $kind:ident($name:literal, $unit:ident)
        { $($label:ident: $values:ty),* } $help:literal;)+
    ) => {
        $(pub(crate) const $constant: Metric = Metric {
            name: $name,
            kind: Kind::$kind,
            unit: Unit::$unit,
            labels: &[$(Label { name: stringify!($label), values: <$values>::ALL }),*],
            help: $help,
        };)+

        pub(crate) const CATALOGUE: &[Metric] = &[$($constant),+];
    };
}

catalogue! {
    LOADS = Counter("session_store_loads_total", Count) { result: LoadResult }
        "Loads, by how they were answered; each is counted when it ends";
    FILLS = Counter("session_store_cache_fills_total", Count) { outcome: Fill }
        "Reads from MongoDB for the cache, by what they stored there";
    INVALIDATIONS = Counter("session_store_cache_invalidations_total", Count) { cause: Invalidation }
        "Entries removed from the cache because the session had changed, or may have, by cause; the \
         whole cache counts as one";
    EVICTIONS = Counter("session_store_cache_evictions_total", Count) { cause: Eviction }
        "Entries that the cache evicted, by cause";
    ENTRIES = Gauge("session_store_cache_entries", Count) {}
        "Sessions in the cache";
    BYTES = Gauge("session_store_cache_bytes", Bytes) {}
        "Heap memory of the sessions in the cache";
    LIMIT_BYTES = Gauge("session_store_cache_limit_bytes", Bytes) {}
        "Heap memory that the sessions in the cache may take";
    LIMIT_ENTRIES = Gauge("session_store_cache_limit_entries", Count) {}
        "Sessions that the cache may hold; 0 if only the bytes are bounded";
    MAX_STALENESS = Gauge("session_store_max_staleness_seconds", Seconds) {}
        "The configured max_staleness, to compare the lag with; infinite for a sole writer";
    SKIPPED = Counter("session_store_touches_skipped_total", Count) {}
        "Saves that were not sent, because the data had not changed and the new expiry was within \
         touch_after of the stored one";
    STREAM_OPEN = Gauge("session_store_stream_open", Count) {}
        "Invalidation streams that are open, at most one for each store";
    STREAM_LAG = Gauge("session_store_stream_lag_seconds", Seconds) {}
        "Age of the newest moment up to which the cache has every change; past max_staleness, sessions \
         are re-read from MongoDB. 0 without a change stream";
    STREAM_EVENTS = Counter("session_store_stream_events_total", Count) { origin: Origin }
        "Changes that the change stream reported, by who made them";
    STREAM_RESUMES = Counter("session_store_stream_resumes_total", Count) {}
        "Change streams that were resumed without a gap";
    STREAM_GAPS = Counter("session_store_stream_gaps_total", Count) { cause: Gap }
        "Change streams that could not be resumed without a gap, by cause; the cache is emptied";
    OPERATIONS = Counter("session_store_mongo_operations_total", Count) { verb: Verb, outcome: OperationOutcome }
        "Operations sent to MongoDB, by verb and outcome";
    DURATION = Histogram("session_store_mongo_operation_duration_seconds", Seconds) { verb: Verb }
        "Duration of the operations on MongoDB, by verb";
    BATCH_SIZE = Histogram("session_store_mongo_batch_size", Count) { verb: BatchVerb }
        "Calls in a batch, which is sent as one command, by verb";
    RETRIES = Counter("session_store_mongo_retries_total", Count) { cause: Retry }
        "Retries by this store, by cause; the driver's own retries are not counted";
    DROPPED = Counter("session_store_saves_dropped_total", Count) {}
        "Saves that stored nothing, because the session was deleted or had expired";
    MERGES = Counter("session_store_merges_total", Count) { result: MergeResult }
        "Saves in a request scope that had something to store, by how they ended";
    MERGE_ATTEMPTS = Histogram("session_store_merge_attempts", Count) {}
        "Updates that a save in a request scope sent until it was stored";
    MERGE_CONFLICTS = Counter("session_store_merge_conflicts_total", Count) {}
        "Keys that two requests had changed, so that on_conflict merged them or the later save won";
    OVER_LIMIT = Counter("session_store_sessions_over_limit_total", Count) { outcome: OverLimit }
        "Sessions beyond max_sessions_per_owner, by what happened to them";
    LIVE = Gauge("session_store_live_sessions", Count) {}
        "Sessions in MongoDB that have not expired, counted at the interval count_every; 0 without that option";
}

/// Describes every metric to the recorder.
pub(crate) fn describe() {
    for Metric { name, kind, unit, help, .. } in CATALOGUE {
        let _ = guarded(|| match kind {
            Kind::Counter => describe_counter!(*name, *unit, *help),
            Kind::Gauge => describe_gauge!(*name, *unit, *help),
            Kind::Histogram => describe_histogram!(*name, *unit, *help),
        });
    }
}
