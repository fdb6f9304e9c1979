//! The operations on one session, and on their number.

use bson::{RawDocumentBuf, doc};
use mongodb::ClientSession;

use super::timer::Timer;
use super::{MongoStore, Sessions, document, failure};
use crate::backend::{Backend, Call, Rev};
use crate::error::Result;
use crate::key::SessionKey;
use crate::metrics::{Outcome, Verb};
use crate::record::{Data, Session, WallTime};

impl Backend for MongoStore {
    fn insert(
        &self,
        key: SessionKey,
        rev: Rev,
        data: &Data,
        expires: WallTime,
    ) -> Call<Option<WallTime>> {
        let sessions = self.inner.sessions.clone();
        let (now, expires) = sessions.times(expires);
        let document = document::insertion(key, rev, data, expires, now);
        Box::pin(async move {
            let document = document?;
            let timer = sessions.timer(Verb::Insert);
            let inserted = async {
                let mut session = sessions.causal().await?;
                let inserted = sessions.documents.insert_one(document).session(&mut session).await;
                sessions.seen.learn(&session);
                inserted
            };
            match inserted.await {
                Ok(_) => timer.ends(Outcome::Ok, Ok(Some(expires))),
                Err(error) if failure::is_duplicate(&error) => {
                    timer.ends(Outcome::Duplicate, Ok(None))
                }
                Err(error) => timer.fails("create a session", &error),
            }
        })
    }

    fn replace(
        &self,
        key: SessionKey,
        rev: Rev,
        data: &Data,
        expires: WallTime,
    ) -> Call<Option<WallTime>> {
        let sessions = self.inner.sessions.clone();
        let (now, expires) = sessions.times(expires);
        let update = document::replacement(rev, data, expires, now);
        let mut place = sessions.lanes.enter(key);
        Box::pin(async move {
            let update = update?;
            place.turn(sessions.timeout).await?;
            let now = sessions.clock.wall();
            let timer = sessions.timer(Verb::Replace);
            let filter =
                doc! { "_id": document::id(key), "expires": { "$gt": document::date(now) } };
            let updated = async {
                let mut session = sessions.causal().await?;
                let update = sessions.documents.update_one(filter, update);
                let updated = update.session(&mut session).await;
                sessions.seen.learn(&session);
                updated
            };
            match updated.await {
                Ok(done) if done.matched_count > 0 => timer.ends(Outcome::Ok, Ok(Some(expires))),
                Ok(_) => {
                    sessions.metrics.saves_dropped.increment(1);
                    tracing::warn!(
                        "a save was dropped, since its session was deleted or has expired meanwhile"
                    );
                    timer.ends(Outcome::Ok, Ok(None))
                }
                Err(error) => timer.fails("save a session", &error),
            }
        })
    }

    fn find(&self, key: SessionKey) -> Call<Option<Session>> {
        let sessions = self.inner.sessions.clone();
        Box::pin(async move {
            let timer = sessions.timer(Verb::Find);
            let found = async {
                let mut session = sessions.causal().await?;
                let documents = sessions.documents.clone_with_type::<RawDocumentBuf>();
                let find = documents.find_one(doc! { "_id": document::id(key) });
                let found = find.max_time(sessions.timeout).session(&mut session).await;
                sessions.seen.learn(&session);
                found
            };
            match found.await {
                Ok(found) => {
                    let found = found.map(|found| document::session(&found)).transpose();
                    let now = sessions.clock.wall();
                    timer.ends(
                        Outcome::from(&found),
                        found.map(|found| found.filter(|session| session.expires > now)),
                    )
                }
                Err(error) => timer.fails("load a session", &error),
            }
        })
    }

    fn remove(&self, key: SessionKey) -> Call<()> {
        let sessions = self.inner.sessions.clone();
        Box::pin(async move {
            let timer = sessions.timer(Verb::Remove);
            let removed = async {
                let mut session = sessions.causal().await?;
                let remove = sessions.documents.delete_one(doc! { "_id": document::id(key) });
                let removed = remove.session(&mut session).await;
                sessions.seen.learn(&session);
                removed
            };
            match removed.await {
                Ok(_) => timer.ends(Outcome::Ok, Ok(())),
                Err(error) => timer.fails("delete a session", &error),
            }
        })
    }

    fn clear(&self) -> Call<u64> {
        Box::pin(self.inner.sessions.clone().remove_all())
    }
}

impl Sessions {
    /// Now, and when a session written now ends.
    fn times(&self, expires: WallTime) -> (WallTime, WallTime) {
        let now = self.clock.wall();
        (now, self.ttl.map_or(expires, |ttl| now.after(ttl)))
    }

    /// A session for one operation, whose reads are as new as anything that was seen.
    pub(super) async fn causal(&self) -> mongodb::error::Result<ClientSession> {
        self.seen.session(self.documents.client()).await
    }

    pub(super) fn timer(&self, verb: Verb) -> Timer {
        Timer::start(self.metrics.clone(), verb, self.timeout)
    }

    pub(super) async fn contains(self, key: SessionKey) -> Result<bool> {
        let timer = self.timer(Verb::Find);
        let filter = doc! { "_id": document::id(key), "expires": { "$gt": document::date(self.clock.wall()) } };
        let find = self.documents.find_one(filter).projection(doc! { "_id": 1 });
        match find.max_time(self.timeout).await {
            Ok(found) => timer.ends(Outcome::Ok, Ok(found.is_some())),
            Err(error) => timer.fails("look for a session", &error),
        }
    }

    pub(super) async fn count(self) -> Result<u64> {
        let timer = self.timer(Verb::Count);
        let live = doc! { "expires": { "$gt": document::date(self.clock.wall()) } };
        match self.documents.count_documents(live).max_time(self.timeout).await {
            Ok(count) => timer.ends(Outcome::Ok, Ok(count)),
            Err(error) => timer.fails("count the sessions", &error),
        }
    }

    pub(super) async fn estimate(self) -> Result<u64> {
        let timer = self.timer(Verb::Count);
        let expired = doc! { "expires": { "$lte": document::date(self.clock.wall()) } };
        let (all, expired) = tokio::join!(
            self.documents.estimated_document_count().max_time(self.timeout).into_future(),
            self.documents.count_documents(expired).max_time(self.timeout).into_future(),
        );
        match all.and_then(|all| Ok(all.saturating_sub(expired?))) {
            Ok(count) => timer.ends(Outcome::Ok, Ok(count)),
            Err(error) => timer.fails("estimate the number of sessions", &error),
        }
    }
}
