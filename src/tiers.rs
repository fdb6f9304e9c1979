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
use crate::removals::{Removals, UnderWay};
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
    pub(crate) removals: Removals,
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
                    ticket.release();
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
        // Of a write that goes on past its deadline: a ticket until it has ended, and nothing is
        // cached any more that was read before. Its lane may be free before that.
        let late = Arc::new(OnceLock::new());
        let doubt = Arc::clone(&late);
        let end = move |outcome: Result<Option<WallTime>>| {
            cache.note(&outcome);
            match outcome {
                Ok(Some(expires)) => drop(ticket.publish(Session { data, expires })),
                Ok(None) => ticket.forget(Void::Gone),
                Err(error) => {
                    if error.was_not_sent() {
                        ticket.release();
                    } else if error.kind() == ErrorKind::Timeout {
                        drop(doubt.set(cache.ticket(key)));
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
        let held = Held::of(&[key], &cache, &self.removals);
        let noted = cache.clone();
        let end = move |outcome: Result<T>| {
            noted.note(&outcome);
            held.forget(if outcome.is_ok() { Void::Delete } else { Void::Doubt });
            outcome
        };
        self.tasks.run(remove(), end, move || cache.forget(key)).await
    }

    pub(crate) async fn clear(&self) -> Result<u64> {
        let clears = ClearOnDrop { cache: self.cache.clone(), _under_way: self.removals.begins() };
        let cleared = self.tasks.run_paged(self.backend.clear(), move |outcome| {
            drop(clears);
            outcome
        });
        cleared.await
    }
}

/// What a removal holds, from before it until nothing that it removes is cached any more.
pub(crate) struct Held {
    tickets: Vec<Ticket>,
    // Let go last.
    _under_way: UnderWay,
}

impl Held {
    pub(crate) fn of(keys: &[SessionKey], cache: &Cache, removals: &Removals) -> Self {
        let under_way = removals.begins();
        let tickets = keys.iter().map(|key| cache.ticket(*key)).collect();
        Self { tickets, _under_way: under_way }
    }

    pub(crate) fn forget(self, cause: Void) {
        self.tickets.into_iter().for_each(|ticket| ticket.forget(cause));
    }
}

/// Empties the cache however the operation ends, were it with its runtime.
struct ClearOnDrop {
    cache: Cache,
    // Let go last.
    _under_way: UnderWay,
}

impl Drop for ClearOnDrop {
    fn drop(&mut self) {
        self.cache.clear();
        self.cache.was_emptied(Void::Clear);
    }
}
