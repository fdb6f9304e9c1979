//! `Timer`: measures, counts and traces one operation on MongoDB.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::availability::Availability;
use crate::error::{ErrorKind, Result};
use crate::mongo::collection::SessionCollection;
use crate::mongo::error;
use crate::mongo::server_errors::DUPLICATE_KEY;
use crate::telemetry::metrics::{MongoMetrics, Outcome, Verb};
use crate::telemetry::spans::Command;

/// The timer of one operation, which ends with [`finish`](Self::finish) or [`fail`](Self::fail).
///
/// An operation that is dropped before, or that succeeds after its deadline, counts as timed out: its caller
/// got that error.
pub(crate) struct Timer {
    metrics: Arc<MongoMetrics>,
    availability: Availability,
    verb: Verb,
    started_at: Instant,
    timeout: Duration,
    running: bool,
    command: Command,
}

impl Timer {
    pub(crate) fn start(sessions: &SessionCollection, verb: Verb, command: &'static str) -> Self {
        Self {
            metrics: sessions.metrics.clone(),
            availability: sessions.tasks.availability().clone(),
            verb,
            started_at: Instant::now(),
            timeout: sessions.timeout,
            running: true,
            command: Command::new(command, &sessions.documents),
        }
    }

    /// Notes that the command carries this number of calls.
    pub(crate) fn with_calls(self, calls: usize) -> Self {
        self.command.set_batch_size(calls);
        self
    }

    /// Gives the operation a timeout of its own.
    pub(crate) fn with_timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    /// Ends the timer of an operation whose outcome is known, and returns its result.
    pub(crate) fn finish<T>(mut self, outcome: Outcome, result: Result<T>) -> Result<T> {
        self.record(outcome, None);
        result
    }

    /// Ends the timer of an operation that its caller has given up before the operation timeout. It got no answer,
    /// and that says nothing about the server.
    pub(crate) fn finish_unanswered(mut self, outcome: Outcome) {
        self.record_metrics(outcome, None);
    }

    /// Ends the timer of an operation that the driver failed. `doing` says what was tried, as in "load a session".
    pub(crate) fn fail<T>(mut self, doing: &str, error: &mongodb::error::Error) -> Result<T> {
        let code = error::code(error);
        let error = error::to_error(doing, error);
        self.record(Outcome::Failed(error.kind()), code);
        Err(error)
    }

    fn record(&mut self, outcome: Outcome, code: Option<i32>) {
        let (outcome, elapsed) = self.record_metrics(outcome, code);
        self.report_availability(outcome, elapsed);
    }

    fn record_metrics(&mut self, outcome: Outcome, code: Option<i32>) -> (Outcome, Duration) {
        self.running = false;
        let elapsed = self.started_at.elapsed();
        let outcome = match outcome {
            Outcome::Ok | Outcome::Duplicate | Outcome::Changed if elapsed >= self.timeout => {
                Outcome::Failed(ErrorKind::Timeout)
            }
            outcome => outcome,
        };
        match outcome {
            Outcome::Ok | Outcome::Changed => {}
            Outcome::Duplicate => {
                self.command.set_error(ErrorKind::Server, Some(DUPLICATE_KEY));
            }
            Outcome::Failed(kind) => self.command.set_error(kind, code),
        }
        self.metrics.record(self.verb, outcome, elapsed);
        (outcome, elapsed)
    }

    fn report_availability(&self, outcome: Outcome, elapsed: Duration) {
        match outcome {
            Outcome::Failed(ErrorKind::Timeout | ErrorKind::Connection) => {
                self.availability.observe_silence(self.availability.now().before(elapsed));
            }
            // The command was not sent, or its task was ended.
            Outcome::Failed(
                ErrorKind::Config | ErrorKind::Encode | ErrorKind::Closed | ErrorKind::Panic,
            ) => {}
            Outcome::Ok | Outcome::Duplicate | Outcome::Changed | Outcome::Failed(_) => {
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
