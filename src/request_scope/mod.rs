//! The request scope: what one request has loaded, so that its saves store only what it changed.
//!
//! [`RequestScopeLayer`] opens a scope around each request. The stores record in it what they load and
//! store. Outside of a scope, every function here does nothing, at the cost of one look at a task-local.
//!
//! - A save compares the session with the state that the request loaded ([`Base`]), and applies its [changes] to
//!   the newest state.
//! - A session that somebody else has ended stays ended: its data is not stored under a new id.

pub(crate) mod changes;
mod layer;

use std::sync::Arc;

use crate::error::Result;
use crate::request_scope::changes::{Base, OnConflict, ScopedSave};
pub use crate::request_scope::layer::{RequestScope, RequestScopeLayer, in_request_scope};
use crate::session::id::{RawId, SessionKey};
use crate::session::snapshot::Snapshot;
use crate::session::{Data, Session};
use crate::sync::{Mutex, lock};
use crate::time::WallTime;

tokio::task_local! {
    static SCOPE: Scope;
}

/// What one request has loaded and stored. Clones share it.
#[derive(Clone, Default)]
struct Scope(Arc<Mutex<Records>>);

/// A request has few sessions, as a rule one. So these are lists.
#[derive(Default)]
struct Records {
    /// The first one by itself, so that a request with one session needs no list.
    first: Option<(SessionKey, Base)>,
    others: Vec<(SessionKey, Base)>,
    /// The sessions that this request loaded, and that have ended since.
    ended: Vec<EndedSession>,
    /// Ids that the app got from us or saved, and that have no session.
    ids_without_session: Vec<RawId>,
}

struct EndedSession {
    key: SessionKey,
    base: Base,
    /// What this request has deleted. `None` if somebody else has ended the session, or if that is unknown.
    taken: Option<Snapshot>,
    /// How often this request has deleted it.
    deletes: u32,
}

fn with<R>(act: impl FnOnce(&mut Records) -> R) -> Option<R> {
    SCOPE.try_with(|scope| act(&mut lock(&scope.0))).ok()
}

/// Whether the caller runs in a scope.
pub(crate) fn is_active() -> bool {
    SCOPE.try_with(|_| ()).is_ok()
}

/// Records what a load has returned. If the caller is not in a scope, `snapshot` is not called.
#[inline]
pub(crate) fn record_loaded(key: SessionKey, snapshot: impl FnOnce() -> Option<Snapshot>) {
    with(|records| match snapshot() {
        Some(snapshot) => records.set(key, Some(Base::loaded(snapshot))),
        // If the request had loaded it before, it has ended since.
        None => drop(records.end(key)),
    });
}

/// What the verbs below ask of a store. Both stores implement it, outside of any scope.
pub(crate) trait ScopedStore: Sync {
    /// Stores a new session under a random id. `created` is set for the new id of an old session.
    fn insert(
        &self,
        data: &Data,
        expires: WallTime,
        created: Option<WallTime>,
    ) -> impl Future<Output = Result<(RawId, Option<Snapshot>)>> + Send;

    /// Replaces all data of a session, and returns whether there is a live one.
    fn replace(
        &self,
        key: SessionKey,
        data: &Data,
        expires: WallTime,
    ) -> impl Future<Output = Result<bool>> + Send;

    /// Stores what a request has changed. The flag says whether others had changed something too. `None` if there
    /// is no live session.
    fn merge(
        &self,
        key: SessionKey,
        save: ScopedSave,
    ) -> impl Future<Output = Result<Option<(Option<Snapshot>, bool)>>> + Send;

    /// Prolongs a session, and returns whether there is a live one.
    fn touch(
        &self,
        key: SessionKey,
        expires: WallTime,
    ) -> impl Future<Output = Result<bool>> + Send;

    /// Removes a session and returns it; see [`Backend::take`](crate::backend::Backend::take).
    fn take(&self, key: SessionKey) -> impl Future<Output = Result<Option<Session>>> + Send;

    /// Removes a session.
    fn remove(&self, key: SessionKey) -> impl Future<Output = Result<()>> + Send;

    /// Whether both data have the same owner.
    fn have_same_owner(&self, one: &Data, other: &Data) -> Result<bool>;

    /// The expiry that is stored for this one.
    fn expiry(&self, expires: WallTime) -> WallTime;

    /// The app's function for values that two requests have changed.
    fn on_conflict(&self) -> Option<OnConflict>;

    /// Logs and counts a save that stores nothing, since its session has ended.
    fn record_dropped_save(&self);
}

/// Stores a new session in a scope. `record_id` is the id in the app's record.
///
/// `cycle_id` deletes a session and then creates it again under another id. The new session gets the changes of
/// the request, on top of the state in which the old one was deleted. If somebody else had ended the old one,
/// nothing is stored: the request may have been signed out. The id that it gets has no session.
pub(crate) async fn create(
    store: &impl ScopedStore,
    record_id: RawId,
    data: &Data,
    expires: WallTime,
) -> Result<RawId> {
    let expires = store.expiry(expires);
    let ((id, stored), is_merged) = match creation(record_id, data, expires) {
        Creation::New => (store.insert(data, expires, None).await?, false),
        Creation::Renewal(save) => {
            let taken = save.expected();
            let merged = save.apply(taken, store.on_conflict().as_ref())?;
            // A log-in begins a session of its own.
            let is_same = store.have_same_owner(taken.data.data()?.as_ref(), &merged.data)?;
            let created = taken.created.filter(|_| is_same);
            let inserted = store.insert(&merged.data, merged.expires, created).await?;
            (inserted, merged.keeps_others)
        }
        Creation::OfEnded => {
            store.record_dropped_save();
            let id = RawId::random();
            record_dropped(id);
            return Ok(id);
        }
    };
    record_stored(id.key(), data, expires, stored, is_merged);
    Ok(id)
}

/// Saves a session in a scope.
pub(crate) async fn save(
    store: &impl ScopedStore,
    id: RawId,
    data: &Data,
    expires: WallTime,
) -> Result<()> {
    let key = id.key();
    let expires = store.expiry(expires);
    let Some(base) = with(|records| records.base(key).cloned()).flatten() else {
        // The request has not loaded it. It called `Session::clear` first, for example.
        if !store.replace(key, data, expires).await? {
            record_dropped(id);
        }
        return Ok(());
    };
    if base.is_touch(data, expires)? {
        if store.touch(key, expires).await? {
            record_touched(key, expires);
        } else {
            record_dropped(id);
        }
        return Ok(());
    }
    match store.merge(key, ScopedSave::new(base, data, expires)).await? {
        Some((stored, is_merged)) => record_stored(key, data, expires, stored, is_merged),
        None => record_dropped(id),
    }
    Ok(())
}

/// Deletes a session in a scope.
pub(crate) async fn delete(store: &impl ScopedStore, id: RawId) -> Result<()> {
    let key = id.key();
    // Until the delete has succeeded, nothing is known of the session. So it counts as ended by somebody else.
    if with(|records| records.end_by_delete(key)) == Some(true) {
        let taken = store.take(key).await?;
        record_taken(key, taken);
        return Ok(());
    }
    store.remove(key).await
}

/// What a `create` of a request does.
enum Creation {
    /// It stores a session that has nothing to do with an earlier one.
    New,
    /// It gives another id to a session that this request has deleted, in the state that the save expects.
    Renewal(Box<ScopedSave>),
    /// It would give another id to a session that somebody else has ended.
    OfEnded,
}

fn creation(record_id: RawId, data: &Data, expires: WallTime) -> Creation {
    let find = |records: &mut Records| {
        // A session that this request has not deleted is not being renewed.
        let mut deleted = records.ended.iter().rev().filter(|it| it.deletes > 0);
        let ended = deleted.find(|it| it.base.shares_a_key(data))?;
        // `flush` leaves the id in the record, and `cycle_id` puts a random one there. A `cycle_id` after a
        // `flush` deletes the session once more. After `flush`, the data is new.
        let is_after_flush = ended.key == record_id.key() || ended.deletes > 1;
        let taken = match &ended.taken {
            Some(_) if is_after_flush => return None,
            Some(taken) => taken,
            // The app may have copied a value, such as the user, into the new session.
            None if is_after_flush && !ended.base.shares_a_value(data) => return None,
            None => return Some(Creation::OfEnded),
        };
        let save = ScopedSave::new(ended.base.clone(), data, expires);
        Some(Creation::Renewal(Box::new(save.with_newer(Some(taken.clone())))))
    };
    with(find).flatten().unwrap_or(Creation::New)
}

/// Records what was stored of a session that the app holds with this data and this expiry. If `is_merged`, other
/// data was stored.
fn record_stored(
    key: SessionKey,
    data: &Data,
    expires: WallTime,
    stored: Option<Snapshot>,
    is_merged: bool,
) {
    with(|records| {
        let differing = || Arc::new(data.clone()) as _;
        let base = stored.map(|it| Base::saved(it, expires, is_merged.then(differing)));
        records.set(key, base);
    });
}

fn record_touched(key: SessionKey, expires: WallTime) {
    with(|records| {
        if let Some(base) = records.base(key) {
            base.seen_expires = expires;
            base.stored.expires = expires.max(base.stored.expires);
        }
    });
}

/// Records that a save found no session.
fn record_dropped(id: RawId) {
    with(|records| {
        records.end(id.key());
        records.ids_without_session.push(id);
    });
}

fn record_taken(key: SessionKey, taken: Option<Session>) {
    with(|records| {
        if let Some(ended) = records.ended.iter_mut().rev().find(|it| it.key == key) {
            ended.taken = taken.map(Snapshot::from);
        }
    });
}

impl Records {
    fn base(&mut self, key: SessionKey) -> Option<&mut Base> {
        let mut bases = self.first.iter_mut().chain(&mut self.others);
        bases.find(|(it, _)| *it == key).map(|(_, base)| base)
    }

    /// Moves the base of a session to the sessions that have ended. Returns whether it had one.
    fn end(&mut self, key: SessionKey) -> bool {
        let Some(base) = self.remove(key) else { return false };
        self.ended.push(EndedSession { key, base, taken: None, deletes: 0 });
        true
    }

    /// Records that this request deletes a session. Returns whether the session had a base.
    fn end_by_delete(&mut self, key: SessionKey) -> bool {
        let had_base = self.end(key);
        if let Some(ended) = self.ended.iter_mut().rev().find(|it| it.key == key) {
            ended.deletes += 1;
        }
        had_base
    }

    /// Sets the base of a session.
    fn set(&mut self, key: SessionKey, base: Option<Base>) {
        let Some(base) = base else {
            self.remove(key);
            return;
        };
        if let Some(earlier) = self.base(key) {
            *earlier = base;
        } else if self.first.is_none() {
            self.first = Some((key, base));
        } else {
            self.others.push((key, base));
        }
    }

    fn remove(&mut self, key: SessionKey) -> Option<Base> {
        let removed = if self.first.as_ref().is_some_and(|(it, _)| *it == key) {
            self.first.take()
        } else {
            let place = self.others.iter().position(|(it, _)| *it == key)?;
            Some(self.others.swap_remove(place))
        };
        removed.map(|(_, base)| base)
    }
}
