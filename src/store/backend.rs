//! The seam between the two tiers: what the cached store asks of its persistence.
//!
//! Futures are `'static` and own what they need, since each runs in a task of its own. Encoding
//! happens before a future is returned, so an unstorable session is an error before anything is
//! sent.

use std::future::Future;
use std::pin::Pin;

use crate::error::{Error, ErrorKind, Result};
use crate::session::id::SessionKey;
use crate::session::revision::Rev;
use crate::session::{Data, Session};
use crate::time::WallTime;

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

/// Where sessions live. Private: [`Batcher`](crate::batching::Batcher) to MongoDB, and a simulated
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

    /// Whether a call of this instance may still change the data of the session. Counts a call whose
    /// caller has given up.
    fn has_pending_write(&self, key: SessionKey) -> bool;

    /// What a session that is saved now with this expiry is stored with.
    fn expiry(&self, expires: WallTime) -> WallTime;

    /// Finds a session that is live by the wall clock. `None` means that the database said so.
    fn find(&self, key: SessionKey) -> Call<Option<Session>>;

    /// Removes a session, if there is one.
    fn remove(&self, key: SessionKey) -> Call<()>;

    /// Removes every session that stood there when the call began; answers with how many.
    fn clear(&self) -> Call<u64>;
}
