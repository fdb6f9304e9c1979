//! The seam between the two tiers: what the cached store asks of its persistence.
//!
//! Futures are `'static` and own what they need, since each runs in a task of its own. Encoding
//! happens before a future is returned, so an unstorable session is an error before anything is
//! sent.

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use crate::error::{Error, ErrorKind, Result};
use crate::key::SessionKey;
use crate::record::{Data, Session, WallTime};

/// How often `create` draws a new id when the drawn one is taken.
pub(crate) const MAX_ID_ATTEMPTS: usize = 8;

/// What `create` answers when every id that it drew was taken.
pub(crate) fn no_free_id() -> Error {
    Error::new(
        ErrorKind::Server,
        format!(
            "{MAX_ID_ATTEMPTS} fresh ids in a row met a duplicate key: is there a unique index on the \
             sessions collection beside the one on _id?"
        ),
    )
}

/// A call to the persistence tier, ready to run in a task.
pub(crate) type Call<T> = Pin<Box<dyn Future<Output = Result<T>> + Send>>;

/// Where sessions live. Private: [`Batcher`](crate::dispatch::Batcher) to MongoDB, and a simulated
/// database in tests.
pub(crate) trait Backend: Clone + Send + Sync + 'static {
    /// A place in the order of the saves of one session.
    type TouchPermit: Send + 'static;

    /// Stores a new session; `None` if another one holds the key. Answers with the stored expiry.
    fn insert(
        &self,
        key: SessionKey,
        rev: Rev,
        data: &Data,
        expires: WallTime,
    ) -> Call<Option<WallTime>>;

    /// Replaces the data and expiry of a live session; `None` if there is none. Never creates one.
    fn replace(
        &self,
        key: SessionKey,
        rev: Rev,
        data: &Data,
        expires: WallTime,
    ) -> Call<Option<WallTime>>;

    /// Waits for the saves of the session that were called before, to [`touch`](Self::touch) it.
    /// `None` if one of them may change its data: a touch would not be ordered with it.
    fn acquire_touch(&self, key: SessionKey) -> Option<Call<Self::TouchPermit>>;

    /// Prolongs a live session, of which no other instance is told; `None` if there is none.
    fn touch(
        &self,
        place: Self::TouchPermit,
        key: SessionKey,
        expires: WallTime,
    ) -> Call<Option<WallTime>>;

    /// Whether no call from here, given up or not, may yet change the data of the session.
    fn is_settled(&self, key: SessionKey) -> bool;

    /// What a session that is saved now with this expiry is stored with.
    fn expiry(&self, expires: WallTime) -> WallTime;

    /// Finds a session that is live by the wall clock. `None` means that the database said so.
    fn find(&self, key: SessionKey) -> Call<Option<Session>>;

    /// Removes a session, if there is one.
    fn remove(&self, key: SessionKey) -> Call<()>;

    /// Removes every session that stood there when the call began; answers with how many.
    fn clear(&self) -> Call<u64>;
}

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

/// A session has changed.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Change {
    pub(crate) key: SessionKey,
    /// The mark of the write, if it was a write of a store.
    pub(crate) rev: Option<Rev>,
}

/// A mark that is new on every write that other instances must hear of: the first 12 bytes name the
/// writing store, the last 4 count.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Rev([u8; 16]);

impl Rev {
    pub(crate) fn as_bytes(&self) -> &[u8; 16] {
        &self.0
    }

    /// The name of the store that wrote.
    pub(crate) fn store(&self) -> &[u8] {
        &self.0[..12]
    }

    /// `None` for bytes that are no rev: whoever wrote them was no store.
    pub(crate) fn from_bytes(bytes: &[u8]) -> Option<Self> {
        bytes.try_into().ok().map(Self)
    }
}

/// Makes the revs of one store. Each store has its own: a cache must not take the writes of another
/// store in the same process for its own. Clones share the count.
#[derive(Clone, Debug)]
pub(crate) struct RevSource {
    store: [u8; 12],
    next: Arc<AtomicU32>,
}

impl RevSource {
    pub(crate) fn new() -> Self {
        // A fresh id is 16 bytes from a generator that the system seeds; unlike the id, a digest of
        // it may be stored.
        let random = SessionKey::of(tower_sessions_core::session::Id::default().0);
        let mut store = [0; 12];
        store.copy_from_slice(&random.as_bytes()[..12]);
        Self { store, next: Arc::default() }
    }

    /// What [`Rev::store`] of its revs is.
    pub(crate) fn store(&self) -> [u8; 12] {
        self.store
    }

    pub(crate) fn next(&self) -> Rev {
        let count = self.next.fetch_add(1, Ordering::Relaxed);
        let mut rev = [0; 16];
        rev[..12].copy_from_slice(&self.store);
        rev[12..].copy_from_slice(&count.to_be_bytes());
        Rev(rev)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn revs_name_their_store_and_count() {
        let (one, other) = (RevSource::new(), RevSource::new());
        let (a, b, c) = (one.next(), one.next(), other.next());
        assert_eq!(a.0[..12], b.0[..12]);
        assert_ne!(a.0[..12], c.0[..12]);
        assert_eq!((&a.0[12..], &b.0[12..]), (&[0, 0, 0, 0][..], &[0, 0, 0, 1][..]));
    }
}
