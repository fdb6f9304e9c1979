//! [`Backend`]: what the stores ask of their persistence tier.
//!
//! [`Batcher`](crate::batching::Batcher) implements it over MongoDB, and the simulation over a
//! simulated database.
//!
//! Futures are `'static` and own what they need, since each one runs in a task of its own. A method
//! encodes the session before it returns its future. So a session that cannot be stored is an error
//! before anything is sent.

pub(crate) mod delete_pages;

use std::future::Future;
use std::pin::Pin;

use crate::error::{Error, ErrorKind, Result};
use crate::request_scope::changes::{OnConflict, Saved, ScopedSave};
use crate::session::id::{RawId, SessionKey};
use crate::session::revision::Rev;
use crate::session::{Data, Session};
use crate::time::WallTime;

/// A call to the persistence tier, ready to run in a task.
pub(crate) type Call<T> = Pin<Box<dyn Future<Output = Result<T>> + Send>>;

/// The persistence tier.
pub(crate) trait Backend: Clone + Send + Sync + 'static {
    /// The right to send a touch: it keeps the order among the saves of one session.
    type TouchPermit: Send + 'static;

    /// Stores a new session and returns the stored expiry. `None` if the key is taken. `created` is set for
    /// the new id of a session that exists already.
    fn insert(
        &self,
        key: SessionKey,
        rev: Rev,
        data: &Data,
        expires: WallTime,
        created: Option<WallTime>,
    ) -> Call<Option<WallTime>>;

    /// Replaces the data and the expiry of a live session, and returns the stored expiry. `None` if
    /// there is no live session. Never creates one.
    fn replace(
        &self,
        key: SessionKey,
        rev: Rev,
        data: &Data,
        expires: WallTime,
    ) -> Call<Option<WallTime>>;

    /// Stores the changes of a request in a live session, and returns what is then stored. `None` if there
    /// is no live session. Never creates one, and never overwrites a change of another request.
    fn merge(&self, key: SessionKey, rev: Rev, save: ScopedSave) -> Call<Option<Saved>>;

    /// Waits for the earlier saves of the session, and then gives the right to
    /// [`touch`](Self::touch) it.
    fn acquire_touch(&self, key: SessionKey) -> Call<Self::TouchPermit>;

    /// As [`acquire_touch`](Self::acquire_touch). `None` if an earlier save may change the session's data:
    /// the touch would then extend a state that is not the one in the cache.
    fn acquire_touch_of_cached(&self, key: SessionKey) -> Option<Call<Self::TouchPermit>>;

    /// Stores another expiry of a live session, and returns the stored one. `None` if there is no live
    /// session. Other instances are not notified.
    fn touch(
        &self,
        permit: Self::TouchPermit,
        key: SessionKey,
        expires: WallTime,
    ) -> Call<Option<WallTime>>;

    /// Whether a save that was called here may still change the data of the session. Its caller may
    /// have given up on it.
    fn has_pending_write(&self, key: SessionKey) -> bool;

    /// The expiry that would be stored for a session that is saved now with this one.
    fn expiry(&self, expires: WallTime) -> WallTime;

    /// Finds a session that is live by the wall clock. `None` only if the database has none.
    fn find(&self, key: SessionKey) -> Call<Option<Session>>;

    /// Removes a session, if there is one.
    fn remove(&self, key: SessionKey) -> Call<()>;

    /// Removes a session, and returns it. `None` if there was no live one, or if it cannot be read.
    fn take(&self, key: SessionKey) -> Call<Option<Session>>;

    /// The expiry of a session that would expire at `expires` if its lifetime had no limit. `None` if the limit
    /// cannot be kept, since nobody knows when the session was created.
    fn cap(&self, expires: WallTime, created: Option<WallTime>) -> Option<WallTime>;

    /// Whether both data have the same owner.
    fn have_same_owner(&self, one: &Data, other: &Data) -> Result<bool>;

    /// The app's function for values that two requests have changed.
    fn on_conflict(&self) -> Option<OnConflict>;

    /// Counts a save that is not sent, since its session has ended.
    fn record_dropped_save(&self);

    /// Removes every session that exists when the call begins, and returns their number.
    fn clear(&self) -> Call<u64>;
}

/// How many random ids `create` tries while the tried one is taken.
const MAX_ID_ATTEMPTS: usize = 8;

/// Creates a session under a random id. `insert` stores it, and returns `None` if the id is taken.
pub(crate) async fn create<T, F>(mut insert: impl FnMut(RawId) -> F) -> Result<(RawId, T)>
where
    F: Future<Output = Result<Option<T>>>,
{
    for _ in 0..MAX_ID_ATTEMPTS {
        let id = RawId::random();
        if let Some(inserted) = insert(id).await? {
            return Ok((id, inserted));
        }
    }
    // Two random ids of 128 bits are never the same. So something else rejects the documents.
    Err(Error::new(
        ErrorKind::Server,
        format!(
            "{MAX_ID_ATTEMPTS} fresh ids in a row met a duplicate key: is there a unique index on the \
             sessions collection beside the one on _id?"
        ),
    ))
}
