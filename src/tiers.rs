//! The two tiers together: the order in which they are asked and changed.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use tokio_util::sync::DropGuard;

use crate::backend::{Backend, Call, DRAWS, RevSource, no_free_id};
use crate::cache::{Cache, Landing, Lookup, Ticket};
use crate::clock::Clock;
use crate::error::{Error, ErrorKind, Result};
use crate::key::SessionKey;
use crate::metrics::Void;
use crate::record::{Data, RawId, Session, WallTime};
use crate::removals::{Pages, remove_pages};
use crate::tasks::Tasks;

/// A save that changes no data.
enum Touch<B: Backend> {
    /// It is none.
    No,
    /// What is stored ends about as late.
    Needless,
    /// The expiry alone is to be stored.
    Due(Call<B::Place>, WallTime),
}

/// Whether the database was asked for anything.
enum Asked {
    Yes,
    No,
}

/// When it is worth it to store nothing but a later expiry.
#[derive(Clone, Debug)]
pub(crate) struct Touching {
    pub(crate) after: Duration,
    pub(crate) clock: Clock,
}

impl Touching {
    /// Whether a session that ends at `stored` need not be prolonged to `expires`.
    fn is_needless(&self, stored: WallTime, expires: WallTime) -> bool {
        let left = expires.since(self.clock.wall());
        expires.since(stored) < self.after.min(left / SHARE)
    }
}

/// A session that is in use must not expire for want of a touch: it loses no more than this part of
/// its lifetime.
const SHARE: u32 = 10;

/// The verbs over both tiers, for any backend.
pub(crate) struct Tiers<B> {
    pub(crate) backend: B,
    pub(crate) cache: Cache,
    pub(crate) tasks: Tasks,
    pub(crate) revs: RevSource,
    pub(crate) touching: Touching,
    pub(crate) _ends_following: DropGuard,
}

impl<B: Backend> Tiers<B> {
    pub(crate) async fn create(&self, data: &Data, expires: WallTime) -> Result<RawId> {
        for _ in 0..DRAWS {
            let id = RawId::draw();
            // No rev: the database does not report insertions.
            let ticket = self.cache.ticket(id.key());
            let insert = self.backend.insert(id.key(), self.revs.next(), data, expires);
            let data = data.clone();
            let (cache, key) = (self.cache.clone(), id.key());
            let noted = cache.clone();
            let end = move |outcome: Result<Option<WallTime>>| {
                noted.note(&outcome);
                let inserted = outcome?;
                if let Some(expires) = inserted {
                    ticket.publish(Session { data, expires });
                }
                Ok(inserted.is_some())
            };
            if self.tasks.run(insert, end, move || cache.forget(key)).await? {
                return Ok(id);
            }
        }
        Err(no_free_id())
    }

    pub(crate) async fn save(&self, id: RawId, data: &Data, expires: WallTime) -> Result<()> {
        let key = id.key();
        match self.as_touch(key, data, expires) {
            Touch::Needless => {
                self.cache.skips_touch();
                Ok(())
            }
            Touch::Due(turn, expires) => self.touch(turn, key, expires).await,
            Touch::No => self.replace(key, data, expires).await,
        }
    }

    /// What a save comes down to if what is cached has the same data already. It is ordered before
    /// whatever else changes the session by then, here or elsewhere.
    fn as_touch(&self, key: SessionKey, data: &Data, expires: WallTime) -> Touch<B> {
        // In this order. A save that was called before and has left its lane is on its way to the
        // cache; once it is done there, what it stored is what is seen here.
        if self.tasks.is_shut_down() || !self.backend.is_settled(key) || !self.cache.is_settled(key)
        {
            return Touch::No;
        }
        let Some(entry) = self.cache.peek(key) else { return Touch::No };
        let expires = self.backend.expiry(expires);
        // Others must hear of a session that is to end sooner.
        if expires < entry.expires() || !entry.holds(data) {
            return Touch::No;
        }
        if self.touching.is_needless(entry.expires(), expires) {
            return Touch::Needless;
        }
        self.backend.turn_to_touch(key).map_or(Touch::No, |turn| Touch::Due(turn, expires))
    }

    async fn touch(&self, turn: Call<B::Place>, key: SessionKey, expires: WallTime) -> Result<()> {
        let (backend, cache, touching) =
            (self.backend.clone(), self.cache.clone(), self.touching.clone());
        let noted = cache.clone();
        let touch = async move {
            let place = turn.await?;
            // The ticket comes before the look: what is found is what the touch prolongs, unless
            // something changes from here on.
            let ticket = cache.ticket_to_touch(key);
            let found = cache.peek(key);
            if found.as_ref().is_some_and(|it| touching.is_needless(it.expires(), expires)) {
                ticket.release();
                cache.skips_touch();
                return Ok(Asked::No);
            }
            match (backend.touch(place, key, expires).await, found) {
                // The later one is what is stored.
                (Ok(Some(expires)), Some(entry)) => {
                    ticket.prolong(&entry, expires.max(entry.expires()));
                }
                (Ok(None), _) => ticket.forget(Void::Gone),
                (Ok(Some(_)), None) => ticket.release(),
                (Err(error), _) => {
                    // What is stored is another state than what is cached, and one that cannot be read.
                    if error.kind() == ErrorKind::Decode {
                        ticket.forget(Void::Doubt);
                    } else {
                        ticket.release();
                    }
                    return Err(error);
                }
            }
            Ok(Asked::Yes)
        };
        let end = move |outcome| {
            if !matches!(outcome, Ok(Asked::No)) {
                noted.note(&outcome);
            }
            outcome.map(drop)
        };
        self.tasks.run(touch, end, || ()).await
    }

    async fn replace(&self, key: SessionKey, data: &Data, expires: WallTime) -> Result<()> {
        let (cache, rev) = (self.cache.clone(), self.revs.next());
        let ticket = cache.ticket_for(key, rev);
        let replace = self.backend.replace(key, rev, data, expires);
        let data = data.clone();
        // Its lane may be free before the write has ended.
        let late = LateTicket::default();
        let doubt = late.clone();
        let end = move |outcome: Result<Option<WallTime>>| {
            cache.note(&outcome);
            doubt.take_if_late(&cache, key, &outcome);
            match outcome {
                Ok(Some(expires)) => drop(ticket.publish(Session { data, expires })),
                Ok(None) => ticket.forget(Void::Gone),
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
            Lookup::Miss | Lookup::Lapsed => Box::pin(self.fill(key)).await,
        }
    }

    async fn fill(&self, key: SessionKey) -> Result<Option<Session>> {
        let read = |landing, waited| self.read(key, landing, waited);
        self.cache.fill(key, read).await?.map(|entry| entry.session()).transpose()
    }

    /// Starts a read for a load that has `waited` already.
    fn read(&self, key: SessionKey, landing: Landing, waited: Duration) {
        let patience = self.tasks.timeout().saturating_sub(waited);
        self.tasks.start_for(patience, self.backend.find(key), |found| landing.land(found), || ());
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
        let ticket = cache.ticket(key);
        let late = LateTicket::default();
        let doubt = late.clone();
        let end = move |outcome: Result<T>| {
            cache.note(&outcome);
            doubt.take_if_late(&cache, key, &outcome);
            ticket.forget(if outcome.is_ok() { Void::Delete } else { Void::Doubt });
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
    pub(crate) async fn remove_found(&self, pages: impl Pages) -> Result<u64> {
        let cache = self.cache.clone();
        let noted = cache.clone();
        let removal = async move {
            let hold = |keys: &[SessionKey]| {
                let tickets: Vec<_> = keys.iter().map(|key| cache.ticket(*key)).collect();
                || tickets.into_iter().for_each(|ticket| ticket.forget(Void::Delete))
            };
            let removed = remove_pages(pages, hold).await;
            // After the last page was read: what a write changes later on was found there.
            cache.forget_pending_writes();
            removed
        };
        let end = move |outcome| {
            noted.note(&outcome);
            outcome
        };
        self.tasks.run_paged(removal, end).await
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
/// the write counts as [pending](Cache::forget_pending_writes); when it ends, whatever was read before is
/// removed from the cache.
#[derive(Clone, Default)]
struct LateTicket(Arc<OnceLock<Ticket>>);

impl LateTicket {
    /// To be called while the write's own ticket is still there.
    fn take_if_late<T>(&self, cache: &Cache, key: SessionKey, outcome: &Result<T>) {
        if outcome.as_ref().is_err_and(|error| error.kind() == ErrorKind::Timeout) {
            drop(self.0.set(cache.ticket(key)));
        }
    }
}
