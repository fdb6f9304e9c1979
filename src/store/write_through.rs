//! [`WriteThrough`]: the verbs over cache and database, and the order in which each is asked and changed.
//!
//! Each verb follows one pattern: take a [`FillGuard`] from the cache, run the call to the database in a
//! task of its own, and finish with the guard. If the call ends in any other way, dropping the guard
//! removes the entry.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use tokio_util::sync::DropGuard;

use crate::backend::delete_pages::{DeletePages, delete_pages};
use crate::backend::{self, Backend, BeginDelete, Call, MergeAnswer, MergeTurn, NewSession};
use crate::cache::{Cache, Entry, FillGuard, Leader, Lookup};
use crate::error::{Error, ErrorKind, Result};
use crate::request_scope::changes::{OnConflict, ScopedSave};
use crate::request_scope::{self, ScopedStore};
use crate::runtime::Tasks;
use crate::session::id::{RawId, SessionKey};
use crate::session::revision::RevSource;
use crate::session::snapshot::Snapshot;
use crate::session::{Data, Session};
use crate::telemetry::metrics::Invalidation;
use crate::time::{Clock, WallTime};

/// What a save has to send.
enum Touch<B: Backend> {
    /// Not a touch: send a full replace.
    FullReplace,
    /// Nothing: the stored expiry is late enough.
    Needless,
    /// This expiry alone, once the permit is there.
    Due(Call<B::TouchPermit>, WallTime),
}

/// What became of a touch.
enum TouchEnd {
    Stored,
    /// There is no live session.
    Gone,
    /// The stored expiry was late enough, so nothing was sent.
    NotSent,
}

/// Decides when a save that only extends the expiry is worth a command.
#[derive(Clone, Debug)]
pub(crate) struct TouchPolicy {
    pub(crate) after: Duration,
    pub(crate) clock: Clock,
}

impl TouchPolicy {
    /// Whether a session that expires at `stored` can do without the later expiry `expires`.
    fn is_needless(&self, stored: WallTime, expires: WallTime) -> bool {
        let left = expires.since(self.clock.wall());
        expires.since(stored) < self.after.min(left / MAX_LIFETIME_LOSS)
    }
}

/// A session that is in use must not expire because its touches were skipped. So it loses at most one
/// part in this number of its lifetime.
const MAX_LIFETIME_LOSS: u32 = 10;

/// The verbs over both tiers, for any backend.
pub(crate) struct WriteThrough<B> {
    pub(crate) backend: B,
    pub(crate) cache: Cache,
    pub(crate) tasks: Tasks,
    pub(crate) revs: RevSource,
    pub(crate) touch_policy: TouchPolicy,
    pub(crate) _stops_listener: DropGuard,
}

impl<B: Backend> WriteThrough<B> {
    /// `record_id` is the id in the app's record. The store takes a random one.
    pub(crate) async fn create(
        &self,
        record_id: RawId,
        data: &Data,
        expires: WallTime,
    ) -> Result<RawId> {
        if request_scope::is_active() {
            return Box::pin(request_scope::create(self, record_id, data, expires)).await;
        }
        Ok(self.insert_any(data, expires, None).await?.0)
    }

    async fn insert_any(
        &self,
        data: &Data,
        expires: WallTime,
        created: Option<WallTime>,
    ) -> Result<(RawId, Option<Entry>)> {
        backend::create(|id| self.insert_one(id.key(), data, expires, created)).await
    }

    /// Stores a new session. `None` if the key is taken.
    async fn insert_one(
        &self,
        key: SessionKey,
        data: &Data,
        expires: WallTime,
        created: Option<WallTime>,
    ) -> Result<Option<Option<Entry>>> {
        // Not `begin_write`: the change stream does not report insertions, so there is no own write to
        // recognise.
        let guard = self.cache.begin(key);
        let rev = self.revs.next();
        let new = NewSession { key, rev, data, expires, created };
        let insert = self.backend.insert(new, self.begin_evict());
        let created = created.or_else(|| Some(self.touch_policy.clock.wall()));
        let data = data.clone();
        let cache_when_late = self.cache.clone();
        let end = move |outcome: Result<Option<WallTime>>| {
            let stored = outcome?;
            let publish =
                |expires| guard.publish(Session { data, expires, rev: Some(rev), created });
            Ok(stored.map(publish))
        };
        let backend = self.backend.clone();
        let late = move || {
            cache_when_late.evict(key);
            backend.discard_late_insert(key);
        };
        self.tasks.run(insert, end, late).await
    }

    /// What removes the entries of the sessions that an insert evicts, as a sign-out does. If the new session is one
    /// of them, its version is outdated by then, so its entry is not inserted.
    fn begin_evict(&self) -> BeginDelete {
        let cache = self.cache.clone();
        Arc::new(move |keys| Box::new(begin_deletes(&cache, keys)))
    }

    pub(crate) async fn save(&self, id: RawId, data: &Data, expires: WallTime) -> Result<()> {
        if request_scope::is_active() {
            return Box::pin(request_scope::save(self, id, data, expires)).await;
        }
        let key = id.key();
        match self.as_touch(key, data, expires) {
            Touch::Needless => {
                self.cache.count_skipped_touch();
                Ok(())
            }
            Touch::Due(permit, expires) => self.send_touch(permit, key, expires).await.map(drop),
            Touch::FullReplace => self.replace_all(key, data, expires).await.map(drop),
        }
    }

    /// Reduces a save to a touch if the cache has the same data already.
    ///
    /// The save then counts as carried out before every change that is not in the cache yet, whether it
    /// is made here or by another instance.
    fn as_touch(&self, key: SessionKey, data: &Data, expires: WallTime) -> Touch<B> {
        // The order of these checks matters. An earlier save that has left the write queue is on its way
        // to the cache. Once the cache has no pending write, it holds what that save stored.
        if self.tasks.is_shut_down()
            || self.backend.has_pending_write(key)
            || self.cache.has_pending_write(key)
        {
            return Touch::FullReplace;
        }
        let Some(entry) = self.cache.peek(key) else { return Touch::FullReplace };
        let expires = self.backend.expiry(expires);
        // The change stream does not report touches, and other instances must learn of an earlier expiry.
        if expires < entry.expires() || !entry.has_data(data) {
            return Touch::FullReplace;
        }
        if is_needless(&self.backend, &self.touch_policy, &entry, expires) {
            return Touch::Needless;
        }
        let permit = self.backend.acquire_touch_of_cached(key);
        permit.map_or(Touch::FullReplace, |permit| Touch::Due(permit, expires))
    }

    /// Sends a touch, and returns whether there is a live session.
    async fn send_touch(
        &self,
        permit: Call<B::TouchPermit>,
        key: SessionKey,
        expires: WallTime,
    ) -> Result<bool> {
        let backend = self.backend.clone();
        let cache = self.cache.clone();
        let touch_policy = self.touch_policy.clone();
        let touch = async move {
            let permit = permit.await?;
            // The guard is taken before the entry is looked up. So the touch extends that very entry,
            // unless something changes from here on.
            let guard = cache.begin_touch(key);
            let found = cache.peek(key);
            let is_needless = |it: &Entry| is_needless(&backend, &touch_policy, it, expires);
            if found.as_ref().is_some_and(is_needless) {
                guard.release();
                cache.count_skipped_touch();
                return Ok(TouchEnd::NotSent);
            }
            match (backend.touch(permit, key, expires).await, found) {
                // The database keeps the later expiry.
                (Ok(Some(expires)), Some(entry)) => {
                    match backend.cap(expires.max(entry.expires()), entry.created()) {
                        Some(expires) => guard.prolong(&entry, expires),
                        None => guard.evict(Invalidation::Unfit),
                    }
                }
                (Ok(None), _) => {
                    guard.evict(Invalidation::Gone);
                    return Ok(TouchEnd::Gone);
                }
                (Ok(Some(_)), None) => guard.release(),
                (Err(error), _) => {
                    // The stored session cannot be decoded, so it is not the one in the cache. Or there was none,
                    // and only the read after the touch failed.
                    if error.kind() == ErrorKind::Decode || error.has_found_nothing() {
                        guard.evict(Invalidation::UnknownOutcome);
                    } else {
                        guard.release();
                    }
                    return Err(error);
                }
            }
            Ok(TouchEnd::Stored)
        };
        let is_evidence = |outcome: &Result<TouchEnd>| !matches!(outcome, Ok(TouchEnd::NotSent));
        let end = |outcome: Result<TouchEnd>| Ok(!matches!(outcome?, TouchEnd::Gone));
        self.tasks.run_observed(is_evidence, touch, end, || ()).await
    }

    /// Replaces all data of a session, and returns whether there is a live one.
    async fn replace_all(&self, key: SessionKey, data: &Data, expires: WallTime) -> Result<bool> {
        let rev = self.revs.next();
        let created = self.cache.peek(key).and_then(|entry| entry.created());
        let guard = self.cache.begin_write(key, rev);
        let replace = self.backend.replace(key, rev, data, expires);
        let data = data.clone();
        let cache = self.cache.clone();
        let backend = self.backend.clone();
        let late_guard = LateGuard::default();
        let late_guard_at_end = late_guard.clone();
        let end = move |outcome: Result<Option<WallTime>>| {
            late_guard_at_end.take_if_late(&cache, key, &outcome);
            match outcome {
                Ok(Some(expires)) => {
                    let session = Session { data, expires, rev: Some(rev), created };
                    publish_stored(&backend, guard, session);
                    Ok(true)
                }
                Ok(None) => {
                    guard.evict(Invalidation::Gone);
                    Ok(false)
                }
                Err(error) => {
                    if error.was_not_carried_out() {
                        guard.release();
                    }
                    Err(error)
                }
            }
        };
        self.tasks.run(replace, end, move || drop(late_guard)).await
    }

    pub(crate) async fn load(&self, id: RawId) -> Result<Option<Session>> {
        if self.tasks.is_shut_down() {
            return Err(Error::closed());
        }
        let key = id.key();
        let found = match self.cache.get(key) {
            Lookup::Hit(entry) => return loaded(key, &entry).map(Some),
            Lookup::Grace(entry) => {
                self.cache.probe(key, |leader| self.read(key, leader, Duration::ZERO));
                return loaded(key, &entry).map(Some);
            }
            Lookup::Absent => None,
            // Boxed, since each hit pays for the size of this future.
            Lookup::Miss | Lookup::Expired => Box::pin(self.fill(key)).await?,
        };
        let Some(entry) = found else {
            request_scope::record_loaded(key, || None);
            return Ok(None);
        };
        loaded(key, &entry).map(Some)
    }

    async fn fill(&self, key: SessionKey) -> Result<Option<Entry>> {
        self.cache.fill(key, |leader, waited| self.read(key, leader, waited)).await
    }

    /// Starts the read of a flight. Its first caller has `waited` already.
    fn read(&self, key: SessionKey, leader: Leader, waited: Duration) {
        let time_left = self.tasks.timeout().saturating_sub(waited);
        let find = self.backend.find(key);
        self.tasks.start_for(time_left, find, |found| leader.complete(found), || ());
    }

    pub(crate) async fn delete(&self, id: RawId) -> Result<()> {
        if request_scope::is_active() {
            return Box::pin(request_scope::delete(self, id)).await;
        }
        let key = id.key();
        self.remove_by(key, || self.backend.remove(key)).await
    }

    /// Carries out `remove`, which may remove the session of `key`, and removes the entry.
    pub(crate) async fn remove_by<T: Send + 'static, F>(
        &self,
        key: SessionKey,
        remove: impl FnOnce() -> F,
    ) -> Result<T>
    where
        F: Future<Output = Result<T>> + Send + 'static,
    {
        let cache = self.cache.clone();
        let guard = cache.begin(key);
        let late_guard = LateGuard::default();
        let late_guard_at_end = late_guard.clone();
        let end = move |outcome: Result<T>| {
            late_guard_at_end.take_if_late(&cache, key, &outcome);
            guard.evict(if outcome.is_ok() {
                Invalidation::Delete
            } else {
                Invalidation::UnknownOutcome
            });
            outcome
        };
        self.tasks.run(remove(), end, move || drop(late_guard)).await
    }

    /// Deletes the sessions that these pages find, and returns the number of live ones.
    ///
    /// After that, no load here returns a session that was deleted, and none returns the earlier state of a
    /// session that a write from here took out of what the pages find:
    ///
    /// - If MongoDB has acknowledged that write, the cache has what it stored.
    /// - If it has not, the pages do not find the session, and the cache may have the earlier state. So
    ///   the entry is removed.
    pub(crate) async fn delete_pages(&self, pages: impl DeletePages) -> Result<u64> {
        let cache = self.cache.clone();
        let delete = async move {
            let deleted = delete_pages(pages, |keys| begin_deletes(&cache, keys)).await;
            // After the last page was read: a write that changes its session later did not hide it from
            // the pages.
            cache.evict_pending_writes();
            deleted
        };
        self.tasks.run_paged(delete, |outcome| outcome).await
    }

    pub(crate) async fn clear(&self) -> Result<u64> {
        // Dropping it empties the cache, in the task, however the call ends.
        let clearing = self.cache.begin_clear();
        let end = move |outcome| {
            drop(clearing);
            outcome
        };
        self.tasks.run_paged(self.backend.clear(), end).await
    }
}

impl<B: Backend> ScopedStore for WriteThrough<B> {
    async fn insert(
        &self,
        data: &Data,
        expires: WallTime,
        created: Option<WallTime>,
    ) -> Result<(RawId, Option<Snapshot>)> {
        let (id, entry) = self.insert_any(data, expires, created).await?;
        Ok((id, entry.map(|entry| entry.snapshot())))
    }

    async fn replace(&self, key: SessionKey, data: &Data, expires: WallTime) -> Result<bool> {
        self.replace_all(key, data, expires).await
    }

    async fn merge(
        &self,
        key: SessionKey,
        save: ScopedSave,
    ) -> Result<Option<(Option<Snapshot>, bool)>> {
        let cached = self.cache.peek(key).map(|entry| entry.snapshot());
        let turn = self.backend.acquire_merge(key, save.with_newer(cached));
        let backend = self.backend.clone();
        let cache = self.cache.clone();
        let revs = self.revs.clone();
        let merge = async move {
            let permit = match turn.await? {
                MergeTurn::Comes(permit) => permit,
                MergeTurn::IsOver(answer) => return answer,
            };
            let rev = revs.next();
            let guard = cache.begin_write(key, rev);
            let outcome = backend.merge(permit, key, rev).await;
            match &outcome.sent {
                Some(Ok(Some(saved))) => publish_stored(&backend, guard, saved.session()),
                Some(Ok(None)) => guard.evict(Invalidation::Gone),
                Some(Err(_)) | None => {
                    let sent = outcome.sent.as_ref().unwrap_or(&outcome.own);
                    if sent.as_ref().is_err_and(Error::was_not_carried_out) {
                        guard.release();
                    }
                }
            }
            outcome.answer()
        };
        let cache = self.cache.clone();
        // A merge that has timed out may be carried out later, by itself or by another one.
        let end = move |answer: MergeAnswer| {
            if answer.as_ref().is_err_and(|error| error.kind() == ErrorKind::Timeout) {
                cache.evict(key);
            }
            answer
        };
        let saved = self.tasks.run(merge, end, || ()).await?;
        Ok(saved.map(|saved| (Some(saved.snapshot()), saved.is_merged)))
    }

    async fn touch(&self, key: SessionKey, expires: WallTime) -> Result<bool> {
        let cached = self.cache.peek(key).filter(|_| !self.tasks.is_shut_down());
        let is_needless = |it| is_needless(&self.backend, &self.touch_policy, &it, expires);
        if cached.is_some_and(is_needless) {
            self.cache.count_skipped_touch();
            return Ok(true);
        }
        self.send_touch(self.backend.acquire_touch(key), key, expires).await
    }

    async fn take(&self, key: SessionKey) -> Result<Option<Session>> {
        self.remove_by(key, || self.backend.take(key)).await
    }

    async fn remove(&self, key: SessionKey) -> Result<()> {
        self.remove_by(key, || self.backend.remove(key)).await
    }

    fn expiry(&self, expires: WallTime) -> WallTime {
        self.backend.expiry(expires)
    }

    fn have_same_owner(&self, one: &Data, other: &Data) -> Result<bool> {
        self.backend.have_same_owner(one, other)
    }

    fn on_conflict(&self) -> Option<OnConflict> {
        self.backend.on_conflict()
    }

    fn record_dropped_save(&self) {
        self.backend.record_dropped_save();
    }
}

/// Whether the session of an entry can do without a later expiry. No expiry is later than its absolute lifetime.
fn is_needless(
    backend: &impl Backend,
    touch_policy: &TouchPolicy,
    entry: &Entry,
    expires: WallTime,
) -> bool {
    let capped = backend.cap(expires, entry.created()).unwrap_or(expires);
    touch_policy.is_needless(entry.expires(), capped)
}

/// Caches what a write has stored, unless it is unknown when that expires.
fn publish_stored(backend: &impl Backend, guard: FillGuard, session: Session) {
    match backend.cap(session.expires, session.created) {
        Some(expires) => drop(guard.publish(Session { expires, ..session })),
        None => guard.evict(Invalidation::Unfit),
    }
}

/// Takes a fill guard for each session that is about to be deleted. The returned function removes their entries
/// once the sessions are gone. Dropping it removes them too.
fn begin_deletes(cache: &Cache, keys: &[SessionKey]) -> impl FnOnce() + Send + use<> {
    let guards: Vec<_> = keys.iter().map(|key| cache.begin(*key)).collect();
    || guards.into_iter().for_each(|guard| guard.evict(Invalidation::Delete))
}

/// A copy of a session that a load has found.
fn loaded(key: SessionKey, entry: &Entry) -> Result<Session> {
    request_scope::record_loaded(key, || Some(entry.snapshot()));
    entry.session()
}

/// A second fill guard of a write that runs on past its deadline. Dropping it, when the write has ended,
/// removes what was read meanwhile. Until then the write counts as
/// [pending](Cache::evict_pending_writes).
#[derive(Clone, Default)]
struct LateGuard(Arc<OnceLock<FillGuard>>);

impl LateGuard {
    /// Call this before the write's own guard is finished, so that the write never looks ended between
    /// the two.
    fn take_if_late<T>(&self, cache: &Cache, key: SessionKey, outcome: &Result<T>) {
        if outcome.as_ref().is_err_and(|error| error.kind() == ErrorKind::Timeout) {
            let _ = self.0.set(cache.begin(key));
        }
    }
}
