//! Every metric: its name, labels, unit and description, and the handles that the tiers hold.
//!
//! Handles are resolved once, when a store is built, from the recorder that is installed at that
//! moment: install the exporter first. Names follow Prometheus: base units, `_total` for counters.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use metrics::{
    Counter, Gauge, Histogram, Unit, counter, describe_counter, describe_gauge, describe_histogram,
    gauge, histogram,
};

use crate::clock::Moment;
use crate::error::{ErrorKind, Result};

const LOADS: &str = "session_store_loads_total";
const EVICTIONS: &str = "session_store_cache_evictions_total";
const ENTRIES: &str = "session_store_cache_entries";
const BYTES: &str = "session_store_cache_bytes";
const LIMIT: &str = "session_store_cache_limit_bytes";
const OPERATIONS: &str = "session_store_mongo_operations_total";
const DURATION: &str = "session_store_mongo_operation_duration_seconds";
const TOGETHER: &str = "session_store_mongo_together_size";
const SKIPPED: &str = "session_store_touches_skipped_total";
const DROPPED: &str = "session_store_saves_dropped_total";
const REFUSALS: &str = "session_store_lease_refusals_total";
const GRACE: &str = "session_store_grace_served_total";
const STREAM_OPEN: &str = "session_store_stream_open";
const STREAM_LAG: &str = "session_store_stream_lag_seconds";
const STREAM_EVENTS: &str = "session_store_stream_events_total";
const STREAM_RESUMES: &str = "session_store_stream_resumes_total";
const STREAM_GAPS: &str = "session_store_stream_gaps_total";
const FLUSHES: &str = "session_store_cache_flushes_total";

fn describe() {
    describe_counter!(
        LOADS,
        Unit::Count,
        "Sessions asked for, by result: hit (served from the cache), miss (read from MongoDB), \
         absent (known not to exist), shared (waited for another load's read), grace (served past \
         its lease while MongoDB does not answer)"
    );
    describe_counter!(
        EVICTIONS,
        Unit::Count,
        "Entries the cache let go by itself, by cause: size (the bound was reached), expired"
    );
    describe_gauge!(ENTRIES, Unit::Count, "Sessions held in the cache");
    describe_gauge!(BYTES, Unit::Bytes, "Heap taken by the sessions held in the cache");
    describe_gauge!(LIMIT, Unit::Bytes, "Heap that the cached sessions may take");
    describe_counter!(
        OPERATIONS,
        Unit::Count,
        "Operations sent to MongoDB, by verb and outcome (ok, duplicate, timeout, unreachable, error)"
    );
    describe_histogram!(
        DURATION,
        Unit::Seconds,
        "How long an operation on MongoDB took to its answer, by verb"
    );
    describe_histogram!(
        TOGETHER,
        Unit::Count,
        "How many calls left as one command because MongoDB was busy, by verb (find, bulk)"
    );
    describe_counter!(
        SKIPPED,
        Unit::Count,
        "Saves that were not sent: unchanged data, and an expiry within touch_after of the stored one"
    );
    describe_counter!(
        DROPPED,
        Unit::Count,
        "Saves of a session that no longer existed (a log-out won, or it expired): nothing stored"
    );
    describe_counter!(
        REFUSALS,
        Unit::Count,
        "Loads that found a cached session which was too old to be served, and asked MongoDB"
    );
    describe_counter!(
        GRACE,
        Unit::Count,
        "Sessions served past their lease since MongoDB did not answer, as outage_grace allows"
    );
    describe_gauge!(STREAM_OPEN, Unit::Count, "Change streams that are open, one for each store");
    describe_gauge!(
        STREAM_LAG,
        Unit::Seconds,
        "How long ago the moment is up to which every change is known to have reached the cache"
    );
    describe_counter!(
        STREAM_EVENTS,
        Unit::Count,
        "Changes that the stream reported, by origin: own (nothing new), other (evicted)"
    );
    describe_counter!(STREAM_RESUMES, Unit::Count, "Streams resumed without a gap");
    describe_counter!(
        STREAM_GAPS,
        Unit::Count,
        "Streams that could not be resumed, by cause: history_lost, collection_gone, refused"
    );
    describe_counter!(
        FLUSHES,
        Unit::Count,
        "How often the cache was emptied: a stream was opened anew, or the collection is gone"
    );
}

/// What the cache counts.
#[derive(Clone, Debug)]
pub(crate) struct CacheMetrics {
    pub(crate) hits: Counter,
    pub(crate) misses: Counter,
    pub(crate) absent: Counter,
    pub(crate) shared: Counter,
    /// Served in the grace, at once; counted as grace too.
    pub(crate) grace: Counter,
    pub(crate) grace_served: Counter,
    pub(crate) refused: Counter,
    pub(crate) touches_skipped: Counter,
    pub(crate) evicted_for_size: Counter,
    pub(crate) evicted_as_expired: Counter,
    pub(crate) entries: Gauge,
    pub(crate) bytes: Gauge,
    pub(crate) limit: Gauge,
}

impl CacheMetrics {
    pub(crate) fn new() -> Self {
        describe();
        Self {
            hits: counter!(LOADS, "result" => "hit"),
            misses: counter!(LOADS, "result" => "miss"),
            absent: counter!(LOADS, "result" => "absent"),
            shared: counter!(LOADS, "result" => "shared"),
            grace: counter!(LOADS, "result" => "grace"),
            grace_served: counter!(GRACE),
            refused: counter!(REFUSALS),
            touches_skipped: counter!(SKIPPED),
            evicted_for_size: counter!(EVICTIONS, "cause" => "size"),
            evicted_as_expired: counter!(EVICTIONS, "cause" => "expired"),
            entries: gauge!(ENTRIES),
            bytes: gauge!(BYTES),
            limit: gauge!(LIMIT),
        }
    }
}

/// What the follower of the database's changes counts.
#[derive(Debug)]
pub(crate) struct StreamMetrics {
    pub(crate) foreign: Counter,
    pub(crate) echoes: Counter,
    pub(crate) resumes: Counter,
    pub(crate) flushes: Counter,
    gaps: [Counter; Gap::ALL.len()],
    open: Gauge,
    lag: Gauge,
    begun: Moment,
    is_open: AtomicBool,
}

/// Why a stream could not be resumed.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Gap {
    HistoryLost,
    CollectionGone,
    Refused,
}

impl Gap {
    const ALL: [Self; 3] = [Self::HistoryLost, Self::CollectionGone, Self::Refused];

    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::HistoryLost => "history_lost",
            Self::CollectionGone => "collection_gone",
            Self::Refused => "refused",
        }
    }
}

impl StreamMetrics {
    pub(crate) fn new() -> Self {
        describe();
        let open = gauge!(STREAM_OPEN);
        open.increment(0);
        Self {
            foreign: counter!(STREAM_EVENTS, "origin" => "other"),
            echoes: counter!(STREAM_EVENTS, "origin" => "own"),
            resumes: counter!(STREAM_RESUMES),
            flushes: counter!(FLUSHES),
            gaps: Gap::ALL.map(|gap| counter!(STREAM_GAPS, "cause" => gap.name())),
            open,
            lag: gauge!(STREAM_LAG),
            begun: Moment::from_nanos(0),
            is_open: false.into(),
        }
    }

    pub(crate) fn gap(&self, gap: Gap) {
        self.gaps[gap as usize].increment(1);
    }

    pub(crate) fn opened(&self) {
        if !self.is_open.swap(true, Ordering::Relaxed) {
            self.open.increment(1);
        }
    }

    pub(crate) fn closed(&self) {
        if self.is_open.swap(false, Ordering::Relaxed) {
            self.open.decrement(1);
        }
    }

    /// Before anything is vouched for, the lag counts from this moment.
    pub(crate) fn begins(&mut self, now: Moment) {
        self.begun = now;
    }

    pub(crate) fn lag(&self, now: Moment, synced_at: Moment) {
        self.lag.set(now.since(synced_at.max(self.begun)).as_secs_f64());
    }
}

impl Drop for StreamMetrics {
    fn drop(&mut self) {
        self.closed();
    }
}

/// An operation on MongoDB, as the `verb` label names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verb {
    Insert,
    Replace,
    Touch,
    Bulk,
    Find,
    Remove,
    Clear,
    Count,
    List,
    Expire,
    Index,
    Ping,
}

impl Verb {
    const ALL: [Self; 12] = [
        Self::Insert,
        Self::Replace,
        Self::Touch,
        Self::Bulk,
        Self::Find,
        Self::Remove,
        Self::Clear,
        Self::Count,
        Self::List,
        Self::Expire,
        Self::Index,
        Self::Ping,
    ];

    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Insert => "insert",
            Self::Replace => "replace",
            Self::Touch => "touch",
            Self::Bulk => "bulk",
            Self::Find => "find",
            Self::Remove => "remove",
            Self::Clear => "clear",
            Self::Count => "count",
            Self::List => "list",
            Self::Expire => "expire",
            Self::Index => "index",
            Self::Ping => "ping",
        }
    }
}

/// What the persistence tier counts.
#[derive(Clone, Debug)]
pub(crate) struct MongoMetrics {
    verbs: [VerbMetrics; Verb::ALL.len()],
    pub(crate) saves_dropped: Counter,
    finds_together: Histogram,
    writes_together: Histogram,
}

#[derive(Clone, Debug)]
struct VerbMetrics {
    duration: Histogram,
    ok: Counter,
    duplicate: Counter,
    timeout: Counter,
    unreachable: Counter,
    error: Counter,
}

/// How an operation ended, as far as a metric cares.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Outcome {
    Ok,
    Duplicate,
    Failed(ErrorKind),
}

impl<T> From<&Result<T>> for Outcome {
    fn from(result: &Result<T>) -> Self {
        result.as_ref().map_or_else(|error| Self::Failed(error.kind()), |_| Self::Ok)
    }
}

impl MongoMetrics {
    pub(crate) fn new() -> Self {
        describe();
        Self {
            verbs: Verb::ALL.map(VerbMetrics::new),
            saves_dropped: counter!(DROPPED),
            finds_together: histogram!(TOGETHER, "verb" => Verb::Find.name()),
            writes_together: histogram!(TOGETHER, "verb" => Verb::Bulk.name()),
        }
    }

    #[allow(clippy::cast_precision_loss, reason = "a few hundred at most")]
    pub(crate) fn finds_together(&self, calls: usize) {
        self.finds_together.record(calls as f64);
    }

    #[allow(clippy::cast_precision_loss, reason = "a few hundred at most")]
    pub(crate) fn writes_together(&self, calls: usize) {
        self.writes_together.record(calls as f64);
    }

    pub(crate) fn record(&self, verb: Verb, outcome: Outcome, took: Duration) {
        let metrics = &self.verbs[verb as usize];
        metrics.duration.record(took);
        match outcome {
            Outcome::Ok => &metrics.ok,
            Outcome::Duplicate => &metrics.duplicate,
            Outcome::Failed(ErrorKind::Timeout) => &metrics.timeout,
            Outcome::Failed(ErrorKind::Connection) => &metrics.unreachable,
            Outcome::Failed(_) => &metrics.error,
        }
        .increment(1);
    }
}

impl VerbMetrics {
    fn new(verb: Verb) -> Self {
        let verb = verb.name();
        let count =
            |outcome: &'static str| counter!(OPERATIONS, "verb" => verb, "outcome" => outcome);
        Self {
            duration: histogram!(DURATION, "verb" => verb),
            ok: count("ok"),
            duplicate: count("duplicate"),
            timeout: count("timeout"),
            unreachable: count("unreachable"),
            error: count("error"),
        }
    }
}
