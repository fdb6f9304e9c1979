//! What a trace shows of a call, and what an operator must hear of.
//!
//! All spans are at debug. A verb has one, `session_store.load` say; a command to MongoDB has one, below
//! that of the call which it is for, named and described as OpenTelemetry's
//! [conventions](https://opentelemetry.io/docs/specs/semconv/database/mongodb/) have it (`otel.*` is
//! what tracing-opentelemetry reads). A command that carries many calls is nobody's in particular, so
//! its span is a root. Nothing here is given an id or session data, so nothing can show any.

use std::future::Future;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use bson::Document;
use mongodb::Collection;
use tracing::field::Empty;
use tracing::level_filters::LevelFilter;
use tracing::{Instrument, Span, debug_span};

use crate::error::{Error, ErrorKind, Result};
use crate::telemetry::metrics::Verb;

/// Awaits a call of a verb in a span of its own, if somebody may want to see it. A hit must not pay for
/// what nobody looks at: that is one load and one comparison, and a future no larger than before.
macro_rules! verb {
    ($name:literal, $call:expr) => {
        if $crate::telemetry::spans::is_on() {
            let span = tracing::debug_span!(
                $name,
                "error.type" = tracing::field::Empty,
                otel.status_code = tracing::field::Empty,
            );
            Box::pin($crate::telemetry::spans::in_span(span, $call)).await
        } else {
            $call.await
        }
    };
}
pub(crate) use verb;

/// Whether any subscriber takes spans at debug.
#[inline]
pub(crate) fn is_on() -> bool {
    LevelFilter::current() >= LevelFilter::DEBUG
}

/// Runs a call in a span, and tells the span if it fails.
pub(crate) async fn in_span<T>(span: Span, call: impl Future<Output = Result<T>>) -> Result<T> {
    let outcome = call.instrument(span.clone()).await;
    if let Err(error) = &outcome {
        span.record("error.type", kind(error.kind()));
        span.record("otel.status_code", "ERROR");
    }
    outcome
}

/// The span of one command to MongoDB.
#[derive(Debug)]
pub(crate) struct Command(Span);

impl Command {
    pub(crate) fn new(name: &'static str, on: &Collection<Document>) -> Self {
        // Arguments are evaluated only if somebody looks.
        Self(debug_span!(
            "mongodb",
            otel.kind = "client",
            otel.name = format_args!("{name} {}", on.name()),
            otel.status_code = Empty,
            db.system.name = "mongodb",
            db.namespace = on.namespace().db,
            db.collection.name = on.name(),
            db.operation.name = name,
            db.operation.batch.size = Empty,
            db.response.status_code = Empty,
            "error.type" = Empty,
        ))
    }

    /// It carries so many calls, if it is more than one.
    pub(crate) fn set_batch_size(&self, calls: usize) {
        if calls > 1 {
            self.0.record("db.operation.batch.size", calls);
        }
    }

    /// It failed: by the server's code, if it is the server that said so.
    pub(crate) fn set_error(&self, error: ErrorKind, code: Option<i32>) {
        if self.0.is_disabled() {
            return;
        }
        self.0.record("otel.status_code", "ERROR");
        if let Some(code) = code {
            let code = code.to_string();
            self.0.record("db.response.status_code", &*code).record("error.type", &*code);
        } else {
            self.0.record("error.type", kind(error));
        }
    }
}

/// The command by which MongoDB does most of a verb.
pub(crate) const fn command(verb: Verb) -> &'static str {
    match verb {
        Verb::Insert => "insert",
        Verb::Replace | Verb::Touch | Verb::Bulk => "update",
        Verb::Find | Verb::List => "find",
        Verb::Remove | Verb::Clear | Verb::Expire => "delete",
        Verb::Count => "aggregate",
        Verb::Index => "createIndexes",
        Verb::Ping => "ping",
    }
}

const fn kind(error: ErrorKind) -> &'static str {
    match error {
        ErrorKind::Config => "config",
        ErrorKind::Connection => "connection",
        ErrorKind::Overloaded => "overloaded",
        ErrorKind::Timeout => "timeout",
        ErrorKind::Authentication => "authentication",
        ErrorKind::Permission => "permission",
        ErrorKind::Index => "index",
        ErrorKind::Encode => "encode",
        ErrorKind::Decode => "decode",
        ErrorKind::Server => "server",
        ErrorKind::Closed => "closed",
        ErrorKind::Panic => "panic",
    }
}

/// Says of an index that it is not as it should be, and what that costs.
pub(crate) fn warn_index_problem(error: &Error, cost: &str) {
    if matches!(error.kind(), ErrorKind::Index | ErrorKind::Permission) {
        tracing::warn!(%error, "{cost}");
    }
}

/// Whether MongoDB answered the last call, to say once that an outage begins and once that it ends.
#[derive(Debug, Default)]
pub(crate) struct Answers {
    /// [`silent_since`](Self::silent_since) is something: looked at after every call.
    is_silent: AtomicBool,
    silent_since: Mutex<Option<Instant>>,
    /// When it was said last that MongoDB is overloaded.
    overload_said: Mutex<Option<Instant>>,
}

/// How often it is said that MongoDB is overloaded. It refuses some calls and takes others then, so that
/// neither a beginning nor an end can be told from one call.
const OVERLOAD_SAID_EVERY: Duration = Duration::from_secs(60);

impl Answers {
    /// Takes note of how a call ended.
    pub(crate) fn note<T>(&self, outcome: &Result<T>) {
        let error = outcome.as_ref().err();
        // It arose here, and tells nothing of MongoDB.
        if error.is_some_and(Error::is_ours) {
            return;
        }
        if let Some(error) = error.filter(|error| error.is_server_overload()) {
            return self.note_overload(error);
        }
        let outage = error.filter(|error| error.is_outage());
        if self.is_silent.load(Ordering::Relaxed) == outage.is_some() {
            return;
        }
        let mut since = self.silent_since.lock().unwrap_or_else(PoisonError::into_inner);
        match (outage, *since) {
            (Some(error), None) => {
                *since = Some(Instant::now());
                tracing::warn!(%error, "an outage begins: MongoDB does not answer");
            }
            (None, Some(begun)) => {
                *since = None;
                let seconds = begun.elapsed().as_secs_f64();
                tracing::warn!(seconds, "the outage has ended: MongoDB answers again");
            }
            _ => {}
        }
        self.is_silent.store(since.is_some(), Ordering::Relaxed);
    }

    fn note_overload(&self, error: &Error) {
        let mut said = self.overload_said.lock().unwrap_or_else(PoisonError::into_inner);
        if said.is_none_or(|at| at.elapsed() >= OVERLOAD_SAID_EVERY) {
            *said = Some(Instant::now());
            tracing::warn!(%error, "MongoDB is overloaded and refuses calls");
        }
    }
}
