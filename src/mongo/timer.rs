//! Times, counts and traces the operations on MongoDB.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::availability::Availability;
use crate::error::{ErrorKind, Result};
use crate::mongo::collection::SessionCollection;
use crate::mongo::error;
use crate::mongo::server_errors::DUPLICATE_KEY;
use crate::telemetry::metrics::{MongoMetrics, Outcome, Verb};
use crate::telemetry::spans::{self, Command};

/// Times one operation. One that is dropped, or succeeds past the deadline, counts as timed out,
/// which is what its caller was told.
pub(crate) struct Timer {
    metrics: Arc<MongoMetrics>,
    availability: Availability,
    verb: Verb,
    start: Instant,
    timeout: Duration,
    running: bool,
    command: Command,
}

impl SessionCollection {
    pub(crate) fn timer(&self, verb: Verb) -> Timer {
        self.timer_of(verb, spans::command(verb))
    }

    /// Of a command that is not the one by which the verb is known.
    pub(crate) fn timer_of(&self, verb: Verb, command: &'static str) -> Timer {
        Timer {
            metrics: self.metrics.clone(),
            availability: self.tasks.availability().clone(),
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
    pub(crate) fn with_calls(self, calls: usize) -> Self {
        self.command.set_batch_size(calls);
        self
    }

    /// Of one that may take longer than an operation.
    pub(crate) fn with_timeout(mut self, patience: Duration) -> Self {
        self.timeout = patience;
        self
    }

    pub(crate) fn finish<T>(mut self, outcome: Outcome, result: Result<T>) -> Result<T> {
        self.record(outcome, None);
        result
    }

    pub(crate) fn fail<T>(mut self, doing: &str, error: &mongodb::error::Error) -> Result<T> {
        let (code, error) = (error::code(error), error::to_error(doing, error));
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
        self.report_availability(outcome, took);
    }

    fn report_availability(&self, outcome: Outcome, took: Duration) {
        match outcome {
            Outcome::Failed(ErrorKind::Timeout | ErrorKind::Connection) => {
                self.availability.observe_silence(self.availability.now().before(took));
            }
            // The command was not sent, or its task was ended.
            Outcome::Failed(
                ErrorKind::Config | ErrorKind::Encode | ErrorKind::Closed | ErrorKind::Panic,
            ) => {}
            Outcome::Ok | Outcome::Duplicate | Outcome::Failed(_) => {
                self.availability.observe_answer();
            }
        }
    }
}

impl Drop for Timer {
    fn drop(&mut self) {
        if self.running {
            self.record(Outcome::Failed(ErrorKind::Timeout), None);
        }
    }
}
