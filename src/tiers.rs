//! The two tiers together: the order in which they are asked and changed.

use std::time::Duration;

use tokio_util::sync::DropGuard;

use crate::backend::{Backend, RevSource};
use crate::cache::{Cache, Landing, Lookup};
use crate::error::{Error, Result};
use crate::mongo::no_free_id;
use crate::record::{Data, RawId, Session, WallTime};
use crate::tasks::Tasks;

/// The verbs over both tiers, for any backend.
pub(crate) struct Tiers<B> {
    pub(crate) backend: B,
    pub(crate) cache: Cache,
    pub(crate) tasks: Tasks,
    pub(crate) revs: RevSource,
    pub(crate) _ends_following: DropGuard,
}

impl<B: Backend> Tiers<B> {
    pub(crate) async fn create(&self, data: &Data, expires: WallTime) -> Result<RawId> {
        for _ in 0..crate::mongo::DRAWS {
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
        let (cache, key, rev) = (self.cache.clone(), id.key(), self.revs.next());
        let ticket = cache.ticket_for(key, rev);
        let replace = self.backend.replace(key, rev, data, expires);
        let data = data.clone();
        let noted = cache.clone();
        let end = move |outcome: Result<Option<WallTime>>| {
            noted.note(&outcome);
            match outcome? {
                Some(expires) => drop(ticket.publish(Session { data, expires })),
                None => ticket.forget(),
            }
            Ok(())
        };
        self.tasks.run(replace, end, move || cache.forget(key)).await
    }

    pub(crate) async fn load(&self, id: RawId) -> Result<Option<Session>> {
        if self.tasks.is_closed() {
            return Err(Error::closed());
        }
        let key = id.key();
        let read = |landing: Landing, waited: Duration| {
            let patience = self.tasks.timeout().saturating_sub(waited);
            let lands = |found| landing.land(found);
            self.tasks.start_for(patience, self.backend.find(key), lands, || ());
        };
        match self.cache.get(key) {
            Lookup::Hit(entry) => return entry.session().map(Some),
            Lookup::Absent => return Ok(None),
            Lookup::Grace(entry) => {
                self.cache.probe(key, |landing| read(landing, Duration::ZERO));
                return entry.session().map(Some);
            }
            Lookup::Miss | Lookup::Lapsed => {}
        }
        self.cache.fill(key, read).await?.map(|entry| entry.session()).transpose()
    }

    pub(crate) async fn delete(&self, id: RawId) -> Result<()> {
        let (cache, key) = (self.cache.clone(), id.key());
        let ticket = cache.ticket(key);
        let noted = cache.clone();
        let end = move |outcome| {
            noted.note(&outcome);
            ticket.forget();
            outcome
        };
        self.tasks.run(self.backend.remove(key), end, move || cache.forget(key)).await
    }

    pub(crate) async fn clear(&self) -> Result<u64> {
        let clears = ClearOnDrop(self.cache.clone());
        let cleared = self.tasks.run_paged(self.backend.clear(), move |outcome| {
            drop(clears);
            outcome
        });
        cleared.await
    }
}

/// Empties the cache however the operation ends, were it with its runtime.
struct ClearOnDrop(Cache);

impl Drop for ClearOnDrop {
    fn drop(&mut self) {
        self.0.clear();
    }
}
