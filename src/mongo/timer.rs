//! Times, counts and traces the operations on MongoDB.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::server_errors::DUPLICATE_KEY;
use super::{SessionCollection, failure};
use crate::error::{ErrorKind, Result};
use crate::metrics::{MongoMetrics, Outcome, Verb};
use crate::trace::{self, Command};

/// Times one operation. One that is dropped, or succeeds past the deadline, counts as timed out,
/// which is what its caller was told.
pub(super) struct Timer {
    metrics: Arc<MongoMetrics>,
    verb: Verb,
    start: Instant,
    timeout: Duration,
    running: bool,
    command: Command,
}

impl SessionCollection {
    pub(super) fn timer(&self, verb: Verb) -> Timer {
        self.timer_of(verb, trace::command(verb))
    }

    /// Of a command that is not the one by which the verb is known.
    pub(super) fn timer_of(&self, verb: Verb, command: &'static str) -> Timer {
        Timer {
            metrics: self.metrics.clone(),
            verb,
            start: Instant::now(),
            timeout: self.timeout,
            running: true,
            command: Command::new(command, &self.documents),
        }
    }
}

impl Timer {
    /// Of a command that carries so many calls.
    pub(super) fn with_calls(self, calls: usize) -> Self {
        self.command.set_batch_size(calls);
        self
    }

    /// Of one that may take longer than an operation.
    pub(super) fn with_timeout(mut self, patience: Duration) -> Self {
        self.timeout = patience;
        self
    }

    pub(super) fn finish<T>(mut self, outcome: Outcome, result: Result<T>) -> Result<T> {
        self.record(outcome, None);
        result
    }

    pub(super) fn fail<T>(mut self, doing: &str, error: &mongodb::error::Error) -> Result<T> {
        let (code, error) = (failure::code(error), failure::to_error(doing, error));
        self.record(Outcome::Failed(error.kind()), code);
        Err(error)
    }

    fn record(&mut self, outcome: Outcome, code: Option<i32>) {
        self.running = false;
        let took = self.start.elapsed();
        let outcome = match outcome {
            Outcome::Ok | Outcome::Duplicate if took >= self.timeout => {
                Outcome::Failed(ErrorKind::Timeout)
            }
            outcome => outcome,
        };
        match outcome {
            Outcome::Ok => {}
            Outcome::Duplicate => {
                self.command.set_error(ErrorKind::Server, Some(DUPLICATE_KEY));
            }
            Outcome::Failed(kind) => self.command.set_error(kind, code),
        }
        self.metrics.record(self.verb, outcome, took);
    }
}

impl Drop for Timer {
    fn drop(&mut self) {
        if self.running {
            self.record(Outcome::Failed(ErrorKind::Timeout), None);
        }
    }
}
