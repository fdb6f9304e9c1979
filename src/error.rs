//! [`Error`]: the one error type of the crate.

use std::error::Error as StdError;
use std::fmt;
use std::sync::Arc;

/// The error of every call, with a [kind](Error::kind) to act on.
///
/// No message holds an id, session data or a credential. Cloning is cheap.
#[derive(Clone)]
pub struct Error(Arc<Inner>);

struct Inner {
    kind: ErrorKind,
    message: String,
    /// Only meaningful for the kind [`Overloaded`](ErrorKind::Overloaded).
    overloaded: Overloaded,
    /// Whether the call had found no live session before it failed.
    found_nothing: bool,
}

/// The side that was overloaded, and whether the call may have been carried out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Overloaded {
    /// This store: its queue is full. Nothing was sent.
    OwnQueue,
    /// MongoDB rejected the call before it began.
    Rejected,
    /// MongoDB interrupted the call. It may have carried it out.
    Interrupted,
}

/// The kinds of [`Error`], by what to do about them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// An option is missing, malformed, or contradicts another one. The message names it.
    Config,
    /// No server was reached, or the connection broke. A write whose connection broke may or may not have
    /// happened.
    Connection,
    /// There are too many calls. Try again later: a web server responds with 503. Either:
    ///
    /// - This store's queue is full, and nothing was sent. It is full at
    ///   [`max_queued_calls`](crate::MongoStoreBuilder::max_queued_calls) calls, or at 256 waiting saves
    ///   of one session.
    /// - MongoDB is overloaded and rejects the call
    ///   ([8.2 and later](https://www.mongodb.com/docs/manual/reference/error-codes/): error 462 and
    ///   similar). The driver has repeated the call twice by then. The session leaves the cache only after
    ///   a delete, or after a save that may have begun. Other sessions stay.
    Overloaded,
    /// MongoDB did not answer within the operation timeout. A write may or may not have happened.
    Timeout,
    /// The server refused the user name, the password or the mechanism.
    Authentication,
    /// The user lacks a right on the server. The message names it.
    Permission,
    /// An index is missing, or exists with other options. The message says how to repair it.
    Index,
    /// The session cannot be stored: it is too large or too deeply nested. Nothing was sent.
    Encode,
    /// The stored document is not a session that this version can read. The message says what was found.
    Decode,
    /// A save in a [request scope](crate::RequestScopeLayer) was not stored, because the session changed again
    /// before each of its attempts.
    Conflict,
    /// The server answered with an error, or with something that the driver cannot read. The message has
    /// the error's code and name.
    Server,
    /// The owner of the new session has as many live sessions as
    /// [`max_sessions_per_owner`](crate::MongoStoreBuilder::max_sessions_per_owner) allows, and
    /// [`OnLimit::Refuse`](crate::OnLimit::Refuse) is set. Nothing is stored. Let the user end a session.
    TooManySessions,
    /// The store was shut down, or the runtime that it was built on, or the client that the app handed to
    /// it.
    Closed,
    /// A function that the app gave to the store panicked, or the MongoDB driver did. The message says
    /// which. The store finished the rest of the call as far as it could.
    Panic,
}

impl Error {
    pub(crate) fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self::with_overload(kind, message, Overloaded::OwnQueue)
    }

    /// MongoDB is overloaded and rejected a call. `was_rejected`: it has not carried the call out.
    pub(crate) fn server_overloaded(message: impl Into<String>, was_rejected: bool) -> Self {
        let overloaded = if was_rejected { Overloaded::Rejected } else { Overloaded::Interrupted };
        Self::with_overload(ErrorKind::Overloaded, message, overloaded)
    }

    fn with_overload(kind: ErrorKind, message: impl Into<String>, overloaded: Overloaded) -> Self {
        Self(Arc::new(Inner { kind, message: message.into(), overloaded, found_nothing: false }))
    }

    pub(crate) fn config(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Config, message)
    }

    pub(crate) fn closed() -> Self {
        Self::new(ErrorKind::Closed, "the session store has been shut down")
    }

    /// The driver refuses every command, since the app has shut down its client. (The store shuts down
    /// only its own client, and sends nothing afterwards.)
    pub(crate) fn client_closed() -> Self {
        Self::new(
            ErrorKind::Closed,
            "the app has shut down the MongoDB client that it handed to this store: shut down the \
             store first, and the client after it",
        )
    }

    /// A panic in a task of the store, of the driver or of this crate.
    pub(crate) fn panicked() -> Self {
        Self::new(
            ErrorKind::Panic,
            "a panic in the MongoDB driver or in this crate ended the operation: the app's panic hook \
             has its message, standard error if no other hook is set",
        )
    }

    pub(crate) fn cut_off() -> Self {
        Self::new(ErrorKind::Closed, "the operation was cut off: its task or its runtime ended")
    }

    /// Whether the error says that the database cannot serve any caller now: it does not answer, or it is
    /// overloaded.
    pub(crate) fn is_outage(&self) -> bool {
        matches!(self.0.kind, ErrorKind::Connection | ErrorKind::Timeout)
            || self.is_server_overload()
    }

    /// Whether the database has answered that it is overloaded.
    pub(crate) fn is_server_overload(&self) -> bool {
        self.0.kind == ErrorKind::Overloaded && self.0.overloaded != Overloaded::OwnQueue
    }

    /// Whether the call was certainly not carried out: it was not sent, or the database rejected it before
    /// it began.
    pub(crate) fn was_not_carried_out(&self) -> bool {
        match self.0.kind {
            ErrorKind::Encode => true,
            ErrorKind::Overloaded => self.0.overloaded != Overloaded::Interrupted,
            _ => false,
        }
    }

    /// Returns this error for a call that has carried out an earlier step: so the call as a whole may have
    /// changed something.
    pub(crate) fn of_a_later_step(&self) -> Self {
        if self.is_server_overload() {
            return Self::server_overloaded(self.0.message.clone(), false);
        }
        self.clone()
    }

    /// Returns this error for a call whose first step has found no live session.
    pub(crate) fn after_nothing_was_found(&self) -> Self {
        let error = self.of_a_later_step();
        let Inner { kind, overloaded, .. } = *error.0;
        let message = error.0.message.clone();
        Self(Arc::new(Inner { kind, message, overloaded, found_nothing: true }))
    }

    /// Whether the call had found no live session before it failed.
    pub(crate) fn has_found_nothing(&self) -> bool {
        self.0.found_nothing
    }

    /// Whether the error arose in this process, so that it says nothing about the database.
    pub(crate) fn is_ours(&self) -> bool {
        match self.0.kind {
            ErrorKind::Encode | ErrorKind::Config | ErrorKind::Closed | ErrorKind::Panic => true,
            ErrorKind::Overloaded => self.0.overloaded == Overloaded::OwnQueue,
            _ => false,
        }
    }

    /// Returns the kind of the error, to act on.
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        self.0.kind
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.message)
    }
}

/// Shows the kind and the message without quotes or escapes: a `main` that returns the error prints this,
/// and a command in the message must stay one that can be copied.
impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}: {}", self.0.kind, self.0.message)
    }
}

/// There is no `source`: an error of the driver or of the server may quote documents and credentials. The
/// message has what is safe to show.
impl StdError for Error {}

/// A result with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;
