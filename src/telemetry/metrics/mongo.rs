//! `MongoMetrics`: the metrics of the persistence tier.

use std::time::Duration;

use crate::error::{ErrorKind, Result};
use crate::telemetry::metrics::catalogue::{
    self, BATCH_SIZE, DROPPED, DURATION, LIVE, MERGE_ATTEMPTS, MERGE_CONFLICTS, MERGES, OPERATIONS,
    OVER_LIMIT, RETRIES,
};
use crate::telemetry::metrics::handles::{Counter, Gauge, Histogram};
use crate::telemetry::metrics::labels::{
    BatchVerb, MergeResult, OperationOutcome, OverLimit, Retry, Verb,
};
use crate::telemetry::metrics::{Portion, Series};

#[derive(Debug)]
pub(crate) struct MongoMetrics {
    series: Series,
    operations: [[Counter; OperationOutcome::COUNT]; Verb::COUNT],
    durations: [Histogram; Verb::COUNT],
    batch_sizes: [Histogram; BatchVerb::COUNT],
    retries: [Counter; Retry::COUNT],
    pub(crate) saves_dropped: Counter,
    merges: [Counter; MergeResult::COUNT],
    merge_attempts: Histogram,
    merge_conflicts: Counter,
    over_limit: [Counter; OverLimit::COUNT],
    live: Gauge,
}

/// How an operation on MongoDB ended.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Outcome {
    Ok,
    Duplicate,
    /// An update did not meet its condition.
    Changed,
    Failed(ErrorKind),
}

impl<T> From<&Result<T>> for Outcome {
    fn from(result: &Result<T>) -> Self {
        result.as_ref().map_or_else(|error| Self::Failed(error.kind()), |_| Self::Ok)
    }
}

impl From<Outcome> for OperationOutcome {
    fn from(outcome: Outcome) -> Self {
        match outcome {
            Outcome::Ok => Self::Ok,
            Outcome::Duplicate => Self::Duplicate,
            Outcome::Changed => Self::Changed,
            Outcome::Failed(ErrorKind::Timeout) => Self::Timeout,
            Outcome::Failed(ErrorKind::Connection) => Self::Unreachable,
            Outcome::Failed(ErrorKind::Overloaded) => Self::Overloaded,
            Outcome::Failed(_) => Self::Error,
        }
    }
}

impl MongoMetrics {
    pub(crate) fn new(series: Series) -> Self {
        catalogue::describe();
        let of = |verb, outcome| series.counter_of(&OPERATIONS, &[verb, outcome]);
        Self {
            operations: std::array::from_fn(|verb| std::array::from_fn(|ended| of(verb, ended))),
            durations: series.histograms(&DURATION),
            batch_sizes: series.histograms(&BATCH_SIZE),
            retries: series.counters(&RETRIES),
            saves_dropped: series.counter(&DROPPED),
            merges: series.counters(&MERGES),
            merge_attempts: series.histogram(&MERGE_ATTEMPTS),
            merge_conflicts: series.counter(&MERGE_CONFLICTS),
            over_limit: series.counters(&OVER_LIMIT),
            live: series.gauge(&LIVE),
            series,
        }
    }

    /// The labels of this store's series.
    pub(crate) fn series(&self) -> &Series {
        &self.series
    }

    #[allow(clippy::cast_precision_loss, reason = "a few hundred at most")]
    pub(crate) fn record_find_batch(&self, calls: usize) {
        self.batch_sizes[BatchVerb::Find as usize].record(calls as f64);
    }

    #[allow(clippy::cast_precision_loss, reason = "a few hundred at most")]
    pub(crate) fn record_save_batch(&self, calls: usize) {
        self.batch_sizes[BatchVerb::Bulk as usize].record(calls as f64);
    }

    pub(crate) fn record(&self, verb: Verb, outcome: Outcome, took: Duration) {
        self.durations[verb as usize].record(took);
        let ended = OperationOutcome::from(outcome);
        self.operations[verb as usize][ended as usize].increment(1);
        if ended == OperationOutcome::Duplicate {
            self.retries(Retry::IdTaken).increment(1);
        }
    }

    /// Counts a save of a request scope.
    pub(crate) fn record_merge(&self, result: MergeResult, attempts: u32, conflicts: u64) {
        self.merges[result as usize].increment(1);
        self.merge_attempts.record(f64::from(attempts));
        self.merge_conflicts.increment(conflicts);
    }

    pub(crate) fn retries(&self, cause: Retry) -> &Counter {
        &self.retries[cause as usize]
    }

    pub(crate) fn over_limit(&self, outcome: OverLimit) -> &Counter {
        &self.over_limit[outcome as usize]
    }

    /// This store's part of the gauge of live sessions.
    pub(crate) fn live(&self) -> Portion {
        Portion::new(self.live.clone(), 0)
    }
}
