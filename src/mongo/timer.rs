//! Times and counts the operations on MongoDB.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::failure;
use crate::error::{ErrorKind, Result};
use crate::metrics::{MongoMetrics, Outcome, Verb};

/// Times one operation. One that is dropped, or succeeds past the deadline, counts as timed out,
/// which is what its caller was told.
pub(super) struct Timer {
    metrics: Arc<MongoMetrics>,
    verb: Verb,
    start: Instant,
    timeout: Duration,
    running: bool,
}

impl Timer {
    pub(super) fn start(metrics: Arc<MongoMetrics>, verb: Verb, timeout: Duration) -> Self {
        Self { metrics, verb, start: Instant::now(), timeout, running: true }
    }

    pub(super) fn ends<T>(mut self, outcome: Outcome, result: Result<T>) -> Result<T> {
        self.record(outcome);
        result
    }

    pub(super) fn fails<T>(mut self, doing: &str, error: &mongodb::error::Error) -> Result<T> {
        let error = failure::failure(doing, error);
        self.record(Outcome::Failed(error.kind()));
        Err(error)
    }

    fn record(&mut self, outcome: Outcome) {
        self.running = false;
        let took = self.start.elapsed();
        let outcome = match outcome {
            Outcome::Ok | Outcome::Duplicate if took >= self.timeout => {
                Outcome::Failed(ErrorKind::Timeout)
            }
            outcome => outcome,
        };
        self.metrics.record(self.verb, outcome, took);
    }
}

impl Drop for Timer {
    fn drop(&mut self) {
        if self.running {
            self.record(Outcome::Failed(ErrorKind::Timeout));
        }
    }
}
