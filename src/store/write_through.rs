//! [`WriteThrough`]: the verbs over cache and database, and the order in which each is asked and changed.
//!
//! Each verb follows one pattern: take a [`FillGuard`] from the cache, run the call to the database in a
//! task of its own, and finish with the guard. If the call ends in any other way, dropping the guard
//! removes the entry.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use tokio_util::sync::DropGuard;

use crate::backend::delete_pages::{DeletePages, delete_pages};
use crate::backend::{self, Backend, Call};
use crate::cache::{Cache, FillGuard, Leader, Lookup};
use crate::error::{Error, ErrorKind, Result};
use crate::runtime::Tasks;
use crate::session::id::{RawId, SessionKey};
use crate::session::revision::RevSource;
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

/// Whether a touch was sent to the database.
enum TouchSent {
    Yes,
    No,
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
    pub(crate) async fn create(&self, data: &Data, expires: WallTime) -> Result<RawId> {
        backend::create(|id| self.insert(id.key(), data, expires)).await
    }

    /// Stores a new session, and returns whether it did: not if the key is taken.
    async fn insert(&self, key: SessionKey, data: &Data, expires: WallTime) -> Result<bool> {
        // Not `begin_write`: the change stream does not report insertions, so there is no own write to
        // recognise.
        let guard = self.cache.begin(key);
        let insert = self.backend.insert(key, self.revs.next(), data, expires);
        self.run_insert(guard, key, insert, data, || ()).await
    }

    /// Runs `insert`, which stores the new session of `key`, and publishes its entry. Runs `late` if the call
    /// ends after its deadline.
    pub(crate) async fn run_insert(
        &self,
        guard: FillGuard,
        key: SessionKey,
        insert: Call<Option<WallTime>>,
        data: &Data,
        late: impl FnOnce() + Send + 'static,
    ) -> Result<bool> {
        let data = data.clone();
        let cache_when_late = self.cache.clone();
        let end = move |outcome: Result<Option<WallTime>>| {
            let stored = outcome?;
            if let Some(expires) = stored {
                guard.publish(Session { data, expires });
            }
            Ok(stored.is_some())
        };
        let late = move || {
            cache_when_late.evict(key);
            late();
        };
        self.tasks.run(insert, end, late).await
    }

    pub(crate) async fn save(&self, id: RawId, data: &Data, expires: WallTime) -> Result<()> {
        let key = id.key();
        match self.as_touch(key, data, expires) {
            Touch::Needless => {
                self.cache.count_skipped_touch();
                Ok(())
            }
            Touch::Due(permit, expires) => self.touch(permit, key, expires).await,
            Touch::FullReplace => self.replace(key, data, expires).await,
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
        if self.touch_policy.is_needless(entry.expires(), expires) {
            return Touch::Needless;
        }
        let permit = self.backend.acquire_touch(key);
        permit.map_or(Touch::FullReplace, |permit| Touch::Due(permit, expires))
    }

    async fn touch(
        &self,
        permit: Call<B::TouchPermit>,
        key: SessionKey,
        expires: WallTime,
    ) -> Result<()> {
        let backend = self.backend.clone();
        let cache = self.cache.clone();
        let touch_policy = self.touch_policy.clone();
        let touch = async move {
            let permit = permit.await?;
            // The guard is taken before the entry is looked up. So the touch extends that very entry,
            // unless something changes from here on.
            let guard = cache.begin_touch(key);
            let found = cache.peek(key);
            if found.as_ref().is_some_and(|it| touch_policy.is_needless(it.expires(), expires)) {
                guard.release();
                cache.count_skipped_touch();
                return Ok(TouchSent::No);
            }
            match (backend.touch(permit, key, expires).await, found) {
                // The database keeps the later expiry.
                (Ok(Some(expires)), Some(entry)) => {
                    guard.prolong(&entry, expires.max(entry.expires()));
                }
                (Ok(None), _) => guard.evict(Invalidation::Gone),
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
            Ok(TouchSent::Yes)
        };
        let is_evidence = |outcome: &Result<TouchSent>| !matches!(outcome, Ok(TouchSent::No));
        self.tasks.run_observed(is_evidence, touch, |outcome| outcome.map(drop), || ()).await
    }

    async fn replace(&self, key: SessionKey, data: &Data, expires: WallTime) -> Result<()> {
        let cache = self.cache.clone();
        let rev = self.revs.next();
        let guard = cache.begin_write(key, rev);
        let replace = self.backend.replace(key, rev, data, expires);
        let data = data.clone();
        let late_guard = LateGuard::default();
        let late_guard_at_end = late_guard.clone();
        let end = move |outcome: Result<Option<WallTime>>| {
            late_guard_at_end.take_if_late(&cache, key, &outcome);
            match outcome {
                Ok(Some(expires)) => guard.publish(Session { data, expires }),
                Ok(None) => guard.evict(Invalidation::Gone),
                Err(error) => {
                    if error.was_not_carried_out() {
                        guard.release();
                    }
                    return Err(error);
                }
            }
            Ok(())
        };
        self.tasks.run(replace, end, move || drop(late_guard)).await
    }

    pub(crate) async fn load(&self, id: RawId) -> Result<Option<Session>> {
        if self.tasks.is_shut_down() {
            return Err(Error::closed());
        }
        let key = id.key();
        match self.cache.get(key) {
            Lookup::Hit(entry) => entry.session().map(Some),
            Lookup::Absent => Ok(None),
            Lookup::Grace(entry) => {
                self.cache.probe(key, |leader| self.read(key, leader, Duration::ZERO));
                entry.session().map(Some)
            }
            // Boxed, since each hit pays for the size of this future.
            Lookup::Miss | Lookup::Expired => Box::pin(self.fill(key)).await,
        }
    }

    async fn fill(&self, key: SessionKey) -> Result<Option<Session>> {
        let read = |leader, waited| self.read(key, leader, waited);
        self.cache.fill(key, read).await?.map(|entry| entry.session()).transpose()
    }

    /// Starts the read of a flight. Its first caller has `waited` already.
    fn read(&self, key: SessionKey, leader: Leader, waited: Duration) {
        let time_left = self.tasks.timeout().saturating_sub(waited);
        let find = self.backend.find(key);
        self.tasks.start_for(time_left, find, |found| leader.complete(found), || ());
    }

    pub(crate) async fn delete(&self, id: RawId) -> Result<()> {
        let key = id.key();
        self.remove(key, || self.backend.remove(key)).await
    }

    /// Carries out `remove`, which may remove the session of `key`, and removes the entry.
    pub(crate) async fn remove<T: Send + 'static, F>(
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

/// Takes a fill guard for each session that is about to be deleted. The returned function removes their entries
/// once the sessions are gone. Dropping it removes them too.
pub(crate) fn begin_deletes(cache: &Cache, keys: &[SessionKey]) -> impl FnOnce() + Send + use<> {
    let guards: Vec<_> = keys.iter().map(|key| cache.begin(*key)).collect();
    || guards.into_iter().for_each(|guard| guard.evict(Invalidation::Delete))
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
