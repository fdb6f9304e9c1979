//! The seam below the listener: a source of change events, and how it fails.

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;

use crate::error::Result;
use crate::session::revision::Change;

/// How the database tells of its changes, in the order in which it made them. Private:
/// [`InvalidationStream`](crate::mongo::InvalidationStream), and a simulated one in tests.
///
/// Nothing here waits longer than a moment on purpose: [`more`](Self::more) comes back empty after
/// the pace of the follower. Each call may be dropped.
pub(crate) trait ChangeSource: Send + Sync + 'static {
    /// An open stream.
    type Stream: Send;
    /// A place in the history of changes, from which a stream can go on.
    type Position: Clone + Send;

    /// Opens a stream: from `after` on, or else from now on. What comes with it is the first batch.
    fn open(&self, after: Option<Self::Position>) -> StreamCall<Self::Stream, Self::Position>;

    /// Waits for what comes next, for so long as an empty batch may take.
    fn next_batch(&self, stream: Self::Stream) -> StreamCall<Self::Stream, Self::Position>;

    /// Asks the primary for the time of its newest write.
    fn primary_time(&self) -> SourceCall<PrimaryTime>;
}

/// A question about changes, ready to be polled.
pub(crate) type SourceCall<T> = Pin<Box<dyn Future<Output = Result<T, Fault>> + Send>>;

/// A stream, and what it has handed over.
pub(crate) type StreamCall<S, P> = SourceCall<(S, Batch<P>)>;

/// Why a stream broke off.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    /// The network, a server that is down or has stepped down: go on from the last position.
    Passing,
    /// The server is overloaded and takes no question now: go on from the last position, later.
    Overloaded,
    /// The server needs longer than it may take to get to the position.
    TooSlow,
    /// The server refuses to, with an error of its own. If it goes on refusing, the position is at fault,
    /// or, without one, the server has no change streams.
    Refused(Refusal),
    /// What lies between the last position and now cannot be told any more.
    Lost,
    /// The sessions as a whole are no longer those that were watched: dropped or renamed.
    Ended,
    /// The client was shut down, and sends nothing any more.
    Closed,
    /// This server has no change streams, or the user may not open one. The text says which.
    Unsupported(&'static str),
}

/// The error with which the server refuses a stream.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Refusal {
    /// `None`: what it answered cannot be read.
    pub(crate) code: Option<i32>,
    pub(crate) name: String,
    /// What the code means to a stream without a position, if more is known than the name says.
    pub(crate) hint: Option<&'static str>,
}

impl Refusal {
    /// Why there is no stream where the server goes on refusing one that has no position.
    pub(crate) fn reason(&self) -> String {
        let hint = self.hint.map_or_else(String::new, |hint| format!(". {hint}"));
        format!("this MongoDB server opens no change stream, and answers with {self}{hint}")
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.code {
            None => f.write_str("something that cannot be read"),
            Some(code) if self.name.is_empty() => write!(f, "error {code}"),
            Some(code) => write!(f, "error {code} ({})", self.name),
        }
    }
}

/// The database's own clock, which orders its changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct ServerTime(pub(crate) u64);

/// Names a member of the replica set.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ServerId(pub(crate) Arc<str>);

/// What the primary answers when it is asked for its time.
#[derive(Clone, Debug)]
pub(crate) struct PrimaryTime {
    /// Every change that was made before the primary was asked is at this time or earlier.
    pub(crate) time: ServerTime,
    /// The member on which every change up to that time can be seen, by each scan that begins after the
    /// answer. Other members may not have replicated those changes yet.
    pub(crate) visible_on: Option<ServerId>,
}

/// What a stream hands over at a time.
#[derive(Clone, Debug)]
pub(crate) struct Batch<P> {
    pub(crate) changes: Vec<Change>,
    /// It ends with this: the sessions as a whole were dropped or renamed.
    pub(crate) ended: bool,
    /// Where to go on from, after this batch.
    pub(crate) position: Option<P>,
    /// With this batch, every change *before* this time has been handed over.
    pub(crate) reached: Option<ServerTime>,
    /// With this batch, every change that this member could see when the batch was asked for has been
    /// handed over.
    pub(crate) complete_on: Option<ServerId>,
}
