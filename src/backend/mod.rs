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
use std::sync::Arc;

use tokio::sync::oneshot;

use crate::error::{Error, ErrorKind, Result};
use crate::request_scope::changes::{OnConflict, Saved, ScopedSave};
use crate::session::id::{RawId, SessionKey};
use crate::session::revision::Rev;
use crate::session::{Data, Session};
use crate::time::WallTime;

/// A call to the persistence tier, ready to run in a task.
pub(crate) type Call<T> = Pin<Box<dyn Future<Output = Result<T>> + Send>>;

/// A session to be inserted.
#[derive(Clone, Copy)]
pub(crate) struct NewSession<'a> {
    pub(crate) key: SessionKey,
    pub(crate) rev: Rev,
    pub(crate) data: &'a Data,
    pub(crate) expires: WallTime,
    /// When the session began, if it only gets a new id.
    pub(crate) created: Option<WallTime>,
}

/// Is called with the keys of sessions that are about to be deleted. If they are deleted, the function that it
/// returned is called. Otherwise that function is dropped.
pub(crate) type BeginDelete = Arc<dyn Fn(&[SessionKey]) -> Box<dyn FnOnce() + Send> + Send + Sync>;

/// For a caller that has no entries of sessions.
pub(crate) fn nothing_to_evict() -> BeginDelete {
    Arc::new(|_| Box::new(|| ()))
}

/// What a merge returns: what was stored, or `None` if there is no live session.
pub(crate) type MergeAnswer = Result<Option<Saved>>;

/// What a merge has waited for.
pub(crate) enum MergeTurn<P> {
    /// Its turn.
    Comes(P),
    /// Another merge has carried it out.
    IsOver(MergeAnswer),
}

/// A merge, ready to run in a task.
pub(crate) type MergeCall = Pin<Box<dyn Future<Output = MergeOutcome> + Send>>;

/// What became of merges that were sent together.
pub(crate) struct MergeOutcome {
    /// What was sent for all of them. `None` if nothing was.
    pub(crate) sent: Option<MergeAnswer>,
    /// The answer of the merge that had the turn.
    pub(crate) own: MergeAnswer,
    /// The answers of the merges that have joined it.
    pub(crate) joined: Vec<(oneshot::Sender<MergeAnswer>, MergeAnswer)>,
}

impl MergeOutcome {
    /// Answers the merges that have joined, and returns the answer of the one that had the turn. Call it once the
    /// cache has what was stored, since each caller may load the session next.
    pub(crate) fn answer(self) -> MergeAnswer {
        for (joined, answer) in self.joined {
            // Fails if that call has ended, at its deadline.
            let _ = joined.send(answer);
        }
        self.own
    }
}

/// The persistence tier.
pub(crate) trait Backend: Clone + Send + Sync + 'static {
    /// The right to send a touch: it keeps the order among the saves of one session.
    type TouchPermit: Send + 'static;
    /// The right to send merges.
    type MergePermit: Send + 'static;

    /// Stores a new session and returns the stored expiry. `None` if the key is taken.
    ///
    /// If its owner has too many sessions then, the backend may delete some. It calls `begin_evict` before that.
    fn insert(&self, new: NewSession<'_>, begin_evict: BeginDelete) -> Call<Option<WallTime>>;

    /// An insert has ended after its deadline, so nobody knows the id of its session.
    fn discard_late_insert(&self, key: SessionKey);

    /// Replaces the data and the expiry of a live session, and returns the stored expiry. `None` if
    /// there is no live session. Never creates one.
    fn replace(
        &self,
        key: SessionKey,
        rev: Rev,
        data: &Data,
        expires: WallTime,
    ) -> Call<Option<WallTime>>;

    /// Stores the changes of one or more requests in a live session, under this rev. Never creates one, and never
    /// overwrites a change of another request.
    fn merge(&self, permit: Self::MergePermit, key: SessionKey, rev: Rev) -> MergeCall;

    /// Waits for the earlier saves of the session. Of the merges that wait one after the other, the first one
    /// carries out all.
    fn acquire_merge(
        &self,
        key: SessionKey,
        save: ScopedSave,
    ) -> Call<MergeTurn<Self::MergePermit>>;

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
