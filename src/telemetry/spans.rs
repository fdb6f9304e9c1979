//! The spans of calls and of commands, all at level debug.
//!
//! - Each call of a verb has a span, such as `session_store.load`.
//! - Each command to MongoDB has a span below that of its call. Its name and fields follow OpenTelemetry's
//!   [conventions](https://opentelemetry.io/docs/specs/semconv/database/mongodb/); tracing-opentelemetry reads
//!   the fields `otel.*`.
//! - A command that carries several calls belongs to none of them, so its span is a root.
//!
//! No function here gets an id or session data, so no span can show any.

use std::future::Future;

use bson::Document;
use mongodb::Collection;
use tracing::field::Empty;
use tracing::level_filters::LevelFilter;
use tracing::{Instrument, Span, debug_span};

use crate::error::{ErrorKind, Result};
use crate::telemetry::metrics::Verb;

/// Awaits a call of a verb, in a span of its own if a subscriber takes spans at debug. Otherwise a hit pays one
/// load and one comparison, and its future grows by nothing.
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

/// Whether a subscriber takes spans at debug.
#[inline]
pub(crate) fn is_on() -> bool {
    LevelFilter::current() >= LevelFilter::DEBUG
}

/// Runs a call in a span, and records an error on the span.
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
        // The arguments are evaluated only if the span is enabled.
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

    /// Records how many calls the command carries, if it is a batch.
    pub(crate) fn set_batch_size(&self, calls: usize) {
        if calls > 1 {
            self.0.record("db.operation.batch.size", calls);
        }
    }

    /// Records an error, by the server's code if the error is the server's.
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

/// The command that carries out most of a verb.
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
        ErrorKind::Conflict => "conflict",
        ErrorKind::Decode => "decode",
        ErrorKind::Server => "server",
        ErrorKind::TooManySessions => "too_many_sessions",
        ErrorKind::Closed => "closed",
        ErrorKind::Panic => "panic",
    }
}
