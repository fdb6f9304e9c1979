//! The two tiers together: the order in which they are asked and changed.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use tokio_util::sync::DropGuard;

use crate::cache::{Cache, FillGuard, Leader, Lookup};
use crate::error::{Error, ErrorKind, Result};
use crate::runtime::Tasks;
use crate::session::id::RawId;
use crate::session::id::SessionKey;
use crate::session::revision::RevSource;
use crate::session::{Data, Session};
use crate::store::backend::{Backend, Call, MAX_ID_ATTEMPTS, no_free_id};
use crate::store::delete_pages::{DeletePages, delete_pages};
use crate::telemetry::metrics::Invalidation;
use crate::time::Clock;
use crate::time::WallTime;

/// A save that changes no data.
enum Touch<B: Backend> {
    /// It is none.
    FullReplace,
    /// What is stored ends about as late.
    Needless,
    /// The expiry alone is to be stored.
    Due(Call<B::TouchPermit>, WallTime),
}

/// Whether the database was asked for anything.
enum TouchSent {
    Yes,
    No,
}

/// When it is worth it to store nothing but a later expiry.
#[derive(Clone, Debug)]
pub(crate) struct TouchPolicy {
    pub(crate) after: Duration,
    pub(crate) clock: Clock,
}

impl TouchPolicy {
    /// Whether a session that ends at `stored` need not be prolonged to `expires`.
    fn is_needless(&self, stored: WallTime, expires: WallTime) -> bool {
        let left = expires.since(self.clock.wall());
        expires.since(stored) < self.after.min(left / MAX_LIFETIME_LOSS)
    }
}

/// A session that is in use must not expire for want of a touch: it loses no more than this part of
/// its lifetime.
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
        for _ in 0..MAX_ID_ATTEMPTS {
            let id = RawId::random();
            // No rev: the database does not report insertions.
            let ticket = self.cache.begin(id.key());
            let insert = self.backend.insert(id.key(), self.revs.next(), data, expires);
            let data = data.clone();
            let (cache, key) = (self.cache.clone(), id.key());
            let end = move |outcome: Result<Option<WallTime>>| {
                let inserted = outcome?;
                if let Some(expires) = inserted {
                    ticket.publish(Session { data, expires });
                }
                Ok(inserted.is_some())
            };
            if self.tasks.run(insert, end, move || cache.evict(key)).await? {
                return Ok(id);
            }
        }
        Err(no_free_id())
    }

    pub(crate) async fn save(&self, id: RawId, data: &Data, expires: WallTime) -> Result<()> {
        let key = id.key();
        match self.as_touch(key, data, expires) {
            Touch::Needless => {
                self.cache.count_skipped_touch();
                Ok(())
            }
            Touch::Due(turn, expires) => self.touch(turn, key, expires).await,
            Touch::FullReplace => self.replace(key, data, expires).await,
        }
    }

    /// What a save comes down to if what is cached has the same data already. It is ordered before
    /// whatever else changes the session by then, here or elsewhere.
    fn as_touch(&self, key: SessionKey, data: &Data, expires: WallTime) -> Touch<B> {
        // In this order. A save that was called before and has left its lane is on its way to the
        // cache; once it is done there, what it stored is what is seen here.
        if self.tasks.is_shut_down() || !self.backend.is_settled(key) || !self.cache.is_settled(key)
        {
            return Touch::FullReplace;
        }
        let Some(entry) = self.cache.peek(key) else { return Touch::FullReplace };
        let expires = self.backend.expiry(expires);
        // Others must hear of a session that is to end sooner.
        if expires < entry.expires() || !entry.has_data(data) {
            return Touch::FullReplace;
        }
        if self.touch_policy.is_needless(entry.expires(), expires) {
            return Touch::Needless;
        }
        self.backend.acquire_touch(key).map_or(Touch::FullReplace, |turn| Touch::Due(turn, expires))
    }

    async fn touch(
        &self,
        turn: Call<B::TouchPermit>,
        key: SessionKey,
        expires: WallTime,
    ) -> Result<()> {
        let (backend, cache, touching) =
            (self.backend.clone(), self.cache.clone(), self.touch_policy.clone());
        let touch = async move {
            let place = turn.await?;
            // The ticket comes before the look: what is found is what the touch prolongs, unless
            // something changes from here on.
            let ticket = cache.begin_touch(key);
            let found = cache.peek(key);
            if found.as_ref().is_some_and(|it| touching.is_needless(it.expires(), expires)) {
                ticket.release();
                cache.count_skipped_touch();
                return Ok(TouchSent::No);
            }
            match (backend.touch(place, key, expires).await, found) {
                // The later one is what is stored.
                (Ok(Some(expires)), Some(entry)) => {
                    ticket.prolong(&entry, expires.max(entry.expires()));
                }
                (Ok(None), _) => ticket.evict(Invalidation::Gone),
                (Ok(Some(_)), None) => ticket.release(),
                (Err(error), _) => {
                    // What is stored is another state than what is cached, and one that cannot be read.
                    if error.kind() == ErrorKind::Decode {
                        ticket.evict(Invalidation::UnknownOutcome);
                    } else {
                        ticket.release();
                    }
                    return Err(error);
                }
            }
            Ok(TouchSent::Yes)
        };
        let is_telling = |outcome: &Result<TouchSent>| !matches!(outcome, Ok(TouchSent::No));
        self.tasks.run_observed(is_telling, touch, |outcome| outcome.map(drop), || ()).await
    }

    async fn replace(&self, key: SessionKey, data: &Data, expires: WallTime) -> Result<()> {
        let (cache, rev) = (self.cache.clone(), self.revs.next());
        let ticket = cache.begin_write(key, rev);
        let replace = self.backend.replace(key, rev, data, expires);
        let data = data.clone();
        // Its lane may be free before the write has ended.
        let late = LateGuard::default();
        let doubt = late.clone();
        let end = move |outcome: Result<Option<WallTime>>| {
            doubt.take_if_late(&cache, key, &outcome);
            match outcome {
                Ok(Some(expires)) => drop(ticket.publish(Session { data, expires })),
                Ok(None) => ticket.evict(Invalidation::Gone),
                Err(error) => {
                    if error.was_not_carried_out() {
                        ticket.release();
                    }
                    return Err(error);
                }
            }
            Ok(())
        };
        self.tasks.run(replace, end, move || drop(late)).await
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
                self.cache.probe(key, |landing| self.read(key, landing, Duration::ZERO));
                entry.session().map(Some)
            }
            // In a box of its own: the caller's is made for each hit too.
            Lookup::Miss | Lookup::Expired => Box::pin(self.fill(key)).await,
        }
    }

    async fn fill(&self, key: SessionKey) -> Result<Option<Session>> {
        let read = |landing, waited| self.read(key, landing, waited);
        self.cache.fill(key, read).await?.map(|entry| entry.session()).transpose()
    }

    /// Starts a read for a load that has `next_number` already.
    fn read(&self, key: SessionKey, landing: Leader, waited: Duration) {
        let patience = self.tasks.timeout().saturating_sub(waited);
        self.tasks.start_for(
            patience,
            self.backend.find(key),
            |found| landing.complete(found),
            || (),
        );
    }

    pub(crate) async fn delete(&self, id: RawId) -> Result<()> {
        let key = id.key();
        self.remove(key, || self.backend.remove(key)).await
    }

    /// Begins and carries out `remove`, which may remove the session of `key`.
    pub(crate) async fn remove<T: Send + 'static, F>(
        &self,
        key: SessionKey,
        remove: impl FnOnce() -> F,
    ) -> Result<T>
    where
        F: Future<Output = Result<T>> + Send + 'static,
    {
        let cache = self.cache.clone();
        let ticket = cache.begin(key);
        let late = LateGuard::default();
        let doubt = late.clone();
        let end = move |outcome: Result<T>| {
            doubt.take_if_late(&cache, key, &outcome);
            ticket.evict(if outcome.is_ok() {
                Invalidation::Delete
            } else {
                Invalidation::UnknownOutcome
            });
            outcome
        };
        self.tasks.run(remove(), end, move || drop(late)).await
    }

    /// Ends the sessions that these pages find; answers with how many live ones those were.
    ///
    /// No later load here returns one that was ended, nor one as it was before a write from here took it
    /// out of what the pages find. Where that write has been answered, the cache has what it stored. Where
    /// it has not, the walk does not find the session, and the cache may still have it as it was before:
    /// so it is forgotten.
    pub(crate) async fn delete_pages(&self, pages: impl DeletePages) -> Result<u64> {
        let cache = self.cache.clone();
        let removal = async move {
            let hold = |keys: &[SessionKey]| {
                let tickets: Vec<_> = keys.iter().map(|key| cache.begin(*key)).collect();
                || tickets.into_iter().for_each(|ticket| ticket.evict(Invalidation::Delete))
            };
            let removed = delete_pages(pages, hold).await;
            // After the last page was read: what a write changes later on was found there.
            cache.evict_pending_writes();
            removed
        };
        self.tasks.run_paged(removal, |outcome| outcome).await
    }

    pub(crate) async fn clear(&self) -> Result<u64> {
        let clearing = self.cache.begin_clear();
        let cleared = self.tasks.run_paged(self.backend.clear(), move |outcome| {
            drop(clearing);
            outcome
        });
        cleared.await
    }
}

/// A ticket for a write that goes on past its deadline. It is held until the write has ended. Until then
/// the write counts as [pending](Cache::evict_pending_writes); when it ends, whatever was read before is
/// removed from the cache.
#[derive(Clone, Default)]
struct LateGuard(Arc<OnceLock<FillGuard>>);

impl LateGuard {
    /// To be called while the write's own ticket is still there.
    fn take_if_late<T>(&self, cache: &Cache, key: SessionKey, outcome: &Result<T>) {
        if outcome.as_ref().is_err_and(|error| error.kind() == ErrorKind::Timeout) {
            drop(self.0.set(cache.begin(key)));
        }
    }
}
