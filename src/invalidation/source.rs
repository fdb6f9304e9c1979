//! The seam below the listener: a source of change events, and how it fails.

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;

use crate::error::Result;
use crate::session::revision::Change;

/// A source of the database's changes, in the order in which the database made them. There are two:
/// [`InvalidationStream`](crate::mongo::change_stream::invalidations::InvalidationStream), and a simulated one in
/// tests.
///
/// No call waits long: [`next_batch`](Self::next_batch) returns an empty batch after the listener's poll interval.
/// Each call may be dropped.
pub(crate) trait ChangeSource: Send + Sync + 'static {
    /// An open stream.
    type Stream: Send;
    /// A position in the history of changes, from which a stream can be resumed.
    type Position: Clone + Send;

    /// Opens a stream after a position, or from now on. Returns it with its first batch.
    fn open(&self, after: Option<Self::Position>) -> StreamCall<Self::Stream, Self::Position>;

    /// Waits for the next batch, which is empty if no change comes within the poll interval.
    fn next_batch(&self, stream: Self::Stream) -> StreamCall<Self::Stream, Self::Position>;

    /// Asks the primary for the time of its newest write.
    fn primary_time(&self) -> SourceCall<PrimaryTime>;
}

/// A call of a source, ready to be polled.
pub(crate) type SourceCall<T> = Pin<Box<dyn Future<Output = Result<T, Fault>> + Send>>;

/// A call that returns an open stream and a batch.
pub(crate) type StreamCall<S, P> = SourceCall<(S, Batch<P>)>;

/// Why a stream broke off.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    /// The network failed, or the server is down or has stepped down: resume from the last position.
    Passing,
    /// The server is overloaded: resume from the last position, later.
    Overloaded,
    /// The server needs longer than the timeout to reach the position.
    TooSlow,
    /// The server refuses the stream with another error. If it keeps refusing, the position is at fault. Without
    /// a position, it means that the server has no change streams.
    Refused(Refusal),
    /// The server no longer has the changes after the last position.
    Lost,
    /// The collection was dropped or renamed.
    Ended,
    /// The client was shut down, and sends nothing more.
    Closed,
    /// This server has no change streams, or the user may not open one. The text says which.
    Unsupported(&'static str),
}

/// The error with which the server refuses a stream.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Refusal {
    /// `None`: the reply cannot be read.
    pub(crate) code: Option<i32>,
    pub(crate) name: String,
    /// What the code means for a stream without a position, where the name does not say it.
    pub(crate) hint: Option<&'static str>,
}

impl Refusal {
    /// Why there is no stream, if the server keeps refusing one without a position.
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

/// A time on the database's own clock, which orders its changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct ServerTime(pub(crate) u64);

/// Names a member of the replica set.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ServerId(pub(crate) Arc<str>);

/// The primary's reply to a request for its time.
#[derive(Clone, Debug)]
pub(crate) struct PrimaryTime {
    /// Every change that was made before the request is at this time or earlier.
    pub(crate) time: ServerTime,
    /// The member whose change stream sees every change up to that time, if it scans its oplog after this reply.
    /// Other members may not have replicated those changes yet.
    pub(crate) visible_on: Option<ServerId>,
}

/// What a stream delivers at a time.
#[derive(Clone, Debug)]
pub(crate) struct Batch<P> {
    pub(crate) changes: Vec<Change>,
    /// Whether the stream ends with this batch, because the collection was dropped or renamed.
    pub(crate) ended: bool,
    /// The position after this batch.
    pub(crate) position: Option<P>,
    /// With this batch, every change *before* this time has been delivered.
    pub(crate) reached: Option<ServerTime>,
    /// With this batch, every change that this member could see when the batch was requested has been delivered.
    pub(crate) complete_on: Option<ServerId>,
}
