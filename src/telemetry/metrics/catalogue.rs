//! The list of all metrics. Names follow Prometheus: base units, `_total` for counters.

use metrics::{Unit, describe_counter, describe_gauge, describe_histogram};

use crate::telemetry::metrics::handles::guarded;
use crate::telemetry::metrics::labels::{
    BatchVerb, Eviction, Fill, Gap, Invalidation, LoadResult, OperationOutcome, Origin, Retry,
    Values, Verb,
};

/// A metric, and all that is told of it.
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

/// A label, and its values as [`Values::ALL`] has them.
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
        "Sessions asked for, each counted once it is answered or given up, by how it was answered";
    FILLS = Counter("session_store_cache_fills_total", Count) { outcome: Fill }
        "Reads from MongoDB for the cache, by what they left there";
    INVALIDATIONS = Counter("session_store_cache_invalidations_total", Count) { cause: Invalidation }
        "Sessions removed from the cache since they had changed or might have, by cause; the whole \
         cache counts as one";
    EVICTIONS = Counter("session_store_cache_evictions_total", Count) { cause: Eviction }
        "Sessions that the cache let go by itself, by cause";
    ENTRIES = Gauge("session_store_cache_entries", Count) {}
        "Sessions held in the cache";
    BYTES = Gauge("session_store_cache_bytes", Bytes) {}
        "Heap taken by the sessions held in the cache";
    LIMIT_BYTES = Gauge("session_store_cache_limit_bytes", Bytes) {}
        "Heap that the cached sessions may take";
    LIMIT_ENTRIES = Gauge("session_store_cache_limit_entries", Count) {}
        "How many sessions may be cached; 0 if the bytes alone bound them";
    MAX_STALENESS = Gauge("session_store_max_staleness_seconds", Seconds) {}
        "The bound max_staleness as configured, to compare the lag with; infinite for a sole \
         writer";
    SKIPPED = Counter("session_store_touches_skipped_total", Count) {}
        "Saves that were not sent: unchanged data, and an expiry within touch_after of the stored one";
    STREAM_OPEN = Gauge("session_store_stream_open", Count) {}
        "Change streams that are open, one for each store that follows one";
    STREAM_LAG = Gauge("session_store_stream_lag_seconds", Seconds) {}
        "How long ago the moment is up to which every change is known to have reached the cache; past \
         max_staleness cached sessions are asked for anew. 0 where no stream is followed";
    STREAM_EVENTS = Counter("session_store_stream_events_total", Count) { origin: Origin }
        "Changes that the stream reported, by whose they were";
    STREAM_RESUMES = Counter("session_store_stream_resumes_total", Count) {}
        "Streams that went on where they had broken off";
    STREAM_GAPS = Counter("session_store_stream_gaps_total", Count) { cause: Gap }
        "Streams that could not go on where they had broken off, by cause; the cache is emptied";
    OPERATIONS = Counter("session_store_mongo_operations_total", Count) { verb: Verb, outcome: OperationOutcome }
        "Operations sent to MongoDB, by verb and outcome";
    DURATION = Histogram("session_store_mongo_operation_duration_seconds", Seconds) { verb: Verb }
        "How long operations on MongoDB took to their answer or their end, by verb";
    BATCH_SIZE = Histogram("session_store_mongo_batch_size", Count) { verb: BatchVerb }
        "How many calls left as one command because MongoDB was busy, by verb";
    RETRIES = Counter("session_store_mongo_retries_total", Count) { cause: Retry }
        "What this store tried again, by cause. What the driver repeats by itself is not seen here";
    DROPPED = Counter("session_store_saves_dropped_total", Count) {}
        "Saves of a session that no longer existed (a log-out won, or it expired): nothing stored";
    LIVE = Gauge("session_store_live_sessions", Count) {}
        "Sessions in MongoDB that have not expired, counted as often as count_every says; 0 without it";
}

/// Tells the recorder of them all.
pub(crate) fn describe() {
    for Metric { name, kind, unit, help, .. } in CATALOGUE {
        let _ = guarded(|| match kind {
            Kind::Counter => describe_counter!(*name, *unit, *help),
            Kind::Gauge => describe_gauge!(*name, *unit, *help),
            Kind::Histogram => describe_histogram!(*name, *unit, *help),
        });
    }
}
