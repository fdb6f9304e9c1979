//! `SessionCollection`: the MongoDB collection, and what each operation on it needs.
//!
//! The operations are in `ops/`, `maintenance/`, `indexes/` and `connect/probe.rs`, one `impl` block for each
//! group. This file has what they share: the deadline, the timer and the causally consistent driver session.

use std::sync::Arc;
use std::time::Duration;

use bson::Document;
use mongodb::{ClientSession, Collection};
use tokio_util::sync::CancellationToken;

use crate::error::Result;
use crate::mongo::causal::CausalSessions;
use crate::mongo::codec::DataFormat;
use crate::mongo::lifetime::AbsoluteLifetime;
use crate::mongo::owner_field::OwnerFn;
use crate::mongo::timer::Timer;
use crate::request_scope::changes::OnConflict;
use crate::runtime::Tasks;
use crate::telemetry::metrics::{MongoMetrics, Verb};
use crate::telemetry::spans;
use crate::time::Clock;

/// The collection, with the options of its store. Each operation gets a clone, which is cheap: the operation
/// runs in a task of its own.
#[derive(Clone)]
pub(crate) struct SessionCollection {
    pub(crate) documents: Collection<Document>,
    /// The operation timeout.
    pub(crate) timeout: Duration,
    /// The fixed lifetime of a session; `None`: the cookie's expiry counts.
    pub(crate) ttl: Option<Duration>,
    pub(crate) lifetime: AbsoluteLifetime,
    pub(crate) format: DataFormat,
    pub(crate) owner: Option<OwnerFn>,
    pub(crate) on_conflict: Option<OnConflict>,
    pub(crate) clock: Clock,
    pub(crate) metrics: Arc<MongoMetrics>,
    pub(crate) causal: CausalSessions,
    pub(crate) tasks: Tasks,
    /// Cancelled when the store is shut down.
    pub(crate) closed: CancellationToken,
}

impl SessionCollection {
    /// Runs one step of a longer operation under the operation timeout. Refuses it if the store is closed.
    pub(crate) async fn within<T>(&self, step: impl Future<Output = Result<T>>) -> Result<T> {
        if let Some(refusal) = self.tasks.refusal() {
            return Err(refusal);
        }
        tokio::time::timeout(self.timeout, step)
            .await
            .unwrap_or_else(|_| Err(crate::runtime::timed_out(self.timeout)))
    }

    /// Starts the timer of an operation that sends the usual command of its verb.
    pub(crate) fn timer(&self, verb: Verb) -> Timer {
        self.timer_of(verb, spans::command(verb))
    }

    /// Starts the timer of an operation that sends another command.
    pub(crate) fn timer_of(&self, verb: Verb, command: &'static str) -> Timer {
        Timer::start(self, verb, command)
    }

    /// Takes a driver session for one operation, whose reads include every change that this store knows of.
    pub(crate) async fn causal_session(&self) -> mongodb::error::Result<ClientSession> {
        self.causal.check_out(self.documents.client()).await
    }
}
