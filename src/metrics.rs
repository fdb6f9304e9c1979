//! Every metric: its name, labels, unit and description, and the handles that the tiers hold.
//!
//! Handles are resolved once, when a store is built, from the recorder that is installed at that
//! moment: install the exporter first. Names follow Prometheus: base units, `_total` for counters.

use std::time::Duration;

use metrics::{
    Counter, Gauge, Histogram, Unit, counter, describe_counter, describe_gauge, describe_histogram,
    gauge, histogram,
};

use crate::error::{ErrorKind, Result};

const LOADS: &str = "session_store_loads_total";
const EVICTIONS: &str = "session_store_cache_evictions_total";
const ENTRIES: &str = "session_store_cache_entries";
const BYTES: &str = "session_store_cache_bytes";
const LIMIT: &str = "session_store_cache_limit_bytes";
const OPERATIONS: &str = "session_store_mongo_operations_total";
const DURATION: &str = "session_store_mongo_operation_duration_seconds";
const DROPPED: &str = "session_store_saves_dropped_total";

fn describe() {
    describe_counter!(
        LOADS,
        Unit::Count,
        "Sessions asked for, by result: hit (served from the cache), miss (read from MongoDB), \
         absent (known not to exist), shared (waited for another load's read)"
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
    describe_counter!(
        DROPPED,
        Unit::Count,
        "Saves of a session that no longer existed (a log-out won, or it expired): nothing stored"
    );
}

/// What the cache counts.
#[derive(Clone, Debug)]
pub(crate) struct CacheMetrics {
    pub(crate) hits: Counter,
    pub(crate) misses: Counter,
    pub(crate) absent: Counter,
    pub(crate) shared: Counter,
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
            evicted_for_size: counter!(EVICTIONS, "cause" => "size"),
            evicted_as_expired: counter!(EVICTIONS, "cause" => "expired"),
            entries: gauge!(ENTRIES),
            bytes: gauge!(BYTES),
            limit: gauge!(LIMIT),
        }
    }
}

/// An operation on MongoDB, as the `verb` label names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verb {
    Insert,
    Replace,
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
    const ALL: [Self; 10] = [
        Self::Insert,
        Self::Replace,
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
        Self { verbs: Verb::ALL.map(VerbMetrics::new), saves_dropped: counter!(DROPPED) }
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
