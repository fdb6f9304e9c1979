//! The one error type, and what it becomes at the edge.

use std::error::Error as StdError;
use std::fmt;
use std::sync::Arc;

/// What went wrong, with a [kind](Error::kind) to act on.
///
/// No message holds an id, session data or a credential. Cloning is cheap.
#[derive(Clone)]
pub struct Error(Arc<Inner>);

struct Inner {
    kind: ErrorKind,
    message: String,
    /// Of the kind [`Overloaded`](ErrorKind::Overloaded) alone: who is.
    overloaded: Overloaded,
}

/// Who had too much to do to take a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Overloaded {
    /// This store: more calls wait than may.
    Here,
    /// MongoDB, which turned the call away before it began.
    TurnedAway,
    /// MongoDB, which may have begun to carry the call out.
    Interrupted,
}

/// The kinds of [`Error`], by what to do about them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// An option is missing, malformed or contradicts another one. The message says which.
    Config,
    /// No server was reached: down, unreachable, or the network failed on the way.
    Connection,
    /// There is too much to do. Try again later: a web server answers with 503.
    ///
    /// Either more calls wait for MongoDB than
    /// [`max_queued_calls`](crate::MongoStoreBuilder::max_queued_calls) allows, or 256 saves of one session, and
    /// nothing was sent. Or MongoDB says that it is overloaded and refuses the call
    /// ([8.2 and later](https://www.mongodb.com/docs/manual/reference/error-codes/): error 462 and its
    /// like). The driver has then repeated the call twice. No other session leaves the cache for that;
    /// after a delete, or a save that may have begun, this one is read again.
    Overloaded,
    /// MongoDB did not answer within the operation timeout. A write may or may not have happened.
    Timeout,
    /// The server refused the user name, the password or the mechanism.
    Authentication,
    /// The user may not do this on the server. The message names the missing right.
    Permission,
    /// The expiry index is missing or stands with other options. The message says how to mend it.
    Index,
    /// The session cannot be stored: it is too large or too deep.
    /// Nothing was sent.
    Encode,
    /// What is stored is not a session that this version can read. The message says what was found.
    Decode,
    /// The server answered with an error, of which the message holds the code and its name, or with
    /// something that the driver could make nothing of.
    Server,
    /// The store, the runtime it was built on, or the client that was handed to it has been shut
    /// down.
    Closed,
    /// A function that the app gave to the store panicked, or the MongoDB driver did. The message
    /// says which. What else the call had to do was done, as far as that goes.
    Panic,
}

impl Error {
    pub(crate) fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self(Arc::new(Inner { kind, message: message.into(), overloaded: Overloaded::Here }))
    }

    /// MongoDB is overloaded and refused a call; `turned_away` says that it was not carried out.
    pub(crate) fn server_overloaded(message: impl Into<String>, turned_away: bool) -> Self {
        let overloaded = if turned_away { Overloaded::TurnedAway } else { Overloaded::Interrupted };
        Self(Arc::new(Inner { kind: ErrorKind::Overloaded, message: message.into(), overloaded }))
    }

    pub(crate) fn config(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Config, message)
    }

    pub(crate) fn closed() -> Self {
        Self::new(ErrorKind::Closed, "the session store has been shut down")
    }

    /// The driver refuses every command, since its client was shut down. The store does that to its
    /// own client alone, and sends nothing afterwards.
    pub(crate) fn client_closed() -> Self {
        Self::new(
            ErrorKind::Closed,
            "the app has shut down the MongoDB client that it handed to this store: shut down the \
             store first, and the client after it",
        )
    }

    /// A panic in a task of the store: the driver's, or a fault of this crate.
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

    /// Whether the database cannot serve anybody at present, rather than refuse this one call: it does
    /// not answer, or is overloaded.
    pub(crate) fn is_outage(&self) -> bool {
        matches!(self.0.kind, ErrorKind::Connection | ErrorKind::Timeout)
            || self.is_server_overload()
    }

    /// Whether the database answers that it is overloaded.
    pub(crate) fn is_server_overload(&self) -> bool {
        self.0.kind == ErrorKind::Overloaded && self.0.overloaded != Overloaded::Here
    }

    /// Whether nothing was carried out: the database was not asked, or turned the call away.
    pub(crate) fn was_not_carried_out(&self) -> bool {
        match self.0.kind {
            ErrorKind::Encode => true,
            ErrorKind::Overloaded => self.0.overloaded != Overloaded::Interrupted,
            _ => false,
        }
    }

    /// This error, as that of a call of which an earlier step was carried out.
    pub(crate) fn of_a_later_step(&self) -> Self {
        if self.is_server_overload() {
            return Self::server_overloaded(self.0.message.clone(), false);
        }
        self.clone()
    }

    /// Whether it says nothing of how the database is: it arose here.
    pub(crate) fn is_ours(&self) -> bool {
        match self.0.kind {
            ErrorKind::Encode | ErrorKind::Config | ErrorKind::Closed | ErrorKind::Panic => true,
            ErrorKind::Overloaded => self.0.overloaded == Overloaded::Here,
            _ => false,
        }
    }

    /// The kind of error, to act on.
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

/// The kind and the message as it is: a `main` that returns the error shows this, and a command in it
/// must stay one that can be copied.
impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}: {}", self.0.kind, self.0.message)
    }
}

/// Without a `source`: what the driver and the server say may quote documents and credentials, so
/// what is worth knowing of it is in the message.
impl StdError for Error {}

/// A result with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;
