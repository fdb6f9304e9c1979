//! The operations on one session, and on their number.

use bson::{Document, RawDocument, RawDocumentBuf, doc};
use mongodb::ClientSession;
use mongodb::options::Hint;
use mongodb::results::UpdateResult;

use crate::backend::Call;
use crate::batching::Commands;
use crate::error::Result;
use crate::mongo::collection::SessionCollection;
use crate::mongo::error;
use crate::mongo::ops::query::and;
use crate::mongo::owner_field::OwnerUpdate;
use crate::mongo::schema;
use crate::session::id::SessionKey;
use crate::session::revision::Rev;
use crate::session::{Data, Session};
use crate::telemetry::metrics::{Outcome, Verb};
use crate::time::WallTime;

/// A change of one session, ready to be sent.
#[derive(Debug)]
pub(crate) struct Update {
    key: SessionKey,
    expires: WallTime,
    change: Change,
    /// Of its data, about.
    bytes: usize,
}

#[derive(Debug)]
enum Change {
    /// To these fields.
    Replace(Document, OwnerUpdate, Rev),
    Touch(Document),
}

/// What is known of an update that was sent.
#[derive(Debug)]
pub(crate) struct SentUpdate {
    pub(crate) key: SessionKey,
    pub(crate) expires: WallTime,
    /// Under which it has stored its data, unless it is a touch.
    rev: Option<Rev>,
}

impl Update {
    /// The filter, and the one stage of the update, to be sent now.
    pub(crate) fn into_query(self, now: WallTime) -> (SentUpdate, Document, Document) {
        let Self { key, expires, change, .. } = self;
        let (rev, filter, stage) = match change {
            Change::Replace(fields, owned, rev) => {
                let stage = schema::replace_update(fields, owned, now);
                (Some(rev), doc! { "_id": schema::id(key) }, stage)
            }
            Change::Touch(stage) => (None, live(key, now), stage),
        };
        (SentUpdate { key, expires, rev }, filter, stage)
    }
}

impl SentUpdate {
    fn verb(&self) -> Verb {
        if self.rev.is_some() { Verb::Replace } else { Verb::Touch }
    }

    /// Whether what is stored under this `rev` may be what this has stored.
    pub(crate) fn is_of(&self, rev: &[u8]) -> bool {
        self.rev.is_none_or(|ours| ours.as_bytes() == rev)
    }

    /// Whether the session was there and live.
    fn is_done(&self, result: &UpdateResult) -> bool {
        // The `rev` of a replacement is new, so there is always something to modify.
        if self.rev.is_some() { result.modified_count > 0 } else { result.matched_count > 0 }
    }

    /// Whether the answer says that no document has this key. A touch asks for a live session, so its
    /// answer does not say why there was none.
    fn is_missing(&self, result: &UpdateResult) -> bool {
        self.rev.is_some() && result.matched_count == 0
    }
}

/// What finds a session that has not expired. A query would take a list of dates for each date in it.
fn live(key: SessionKey, now: WallTime) -> Document {
    let not_expired = doc! { "$gt": schema::date(now), "$not": { "$type": "array" } };
    doc! { "_id": schema::id(key), "expires": not_expired }
}

impl Commands for SessionCollection {
    type Update = Update;

    fn insert(
        &self,
        key: SessionKey,
        rev: Rev,
        data: &Data,
        expires: WallTime,
    ) -> Call<Option<WallTime>> {
        let sessions = self.clone();
        let expires = self.expiry(expires);
        let now = sessions.clock.wall();
        let document = schema::insert_document(key, rev, (data, &sessions.format), expires, now)
            .and_then(|mut document| self.add_owner(data, &mut document).map(|_| document));
        Box::pin(async move {
            let document = document?;
            let timer = sessions.timer(Verb::Insert);
            let inserted = async {
                let mut session = sessions.causal().await?;
                let inserted = sessions.documents.insert_one(document).session(&mut session).await;
                sessions.causal.check_in(session, inserted)
            };
            match inserted.await {
                Ok(_) => timer.finish(Outcome::Ok, Ok(Some(expires))),
                Err(error) if error::is_duplicate(&error) => {
                    timer.finish(Outcome::Duplicate, Ok(None))
                }
                Err(error) => timer.fail("create a session", &error),
            }
        })
    }

    fn replacement(
        &self,
        key: SessionKey,
        rev: Rev,
        data: &Data,
        expires: WallTime,
    ) -> Result<Update> {
        let expires = self.expiry(expires);
        let (mut fields, bytes) =
            schema::replacement_fields(key, rev, (data, &self.format), expires, self.clock.wall())?;
        let owned = self.add_owner(data, &mut fields)?;
        Ok(Update { key, expires, change: Change::Replace(fields, owned, rev), bytes })
    }

    fn touch(&self, key: SessionKey, expires: WallTime) -> Update {
        let change = Change::Touch(schema::touch_update(expires, self.clock.wall()));
        Update { key, expires, change, bytes: 64 }
    }

    fn bytes(update: &Update) -> usize {
        update.bytes
    }

    fn update(&self, update: Update) -> Call<Option<WallTime>> {
        let sessions = self.clone();
        Box::pin(async move {
            let (sent, filter, stage) = update.into_query(sessions.clock.wall());
            let timer = sessions.timer(sent.verb());
            let updated = async {
                let mut session = sessions.causal().await?;
                let change = sessions.documents.update_one(filter, vec![stage]);
                let changed = change.session(&mut session).await;
                sessions.causal.check_in(session, changed)
            };
            let done = match updated.await {
                Ok(done) => timer.finish(Outcome::Ok, Ok(done))?,
                Err(error) => return timer.fail("save a session", &error),
            };
            if sent.is_done(&done) {
                return Ok(Some(sent.expires));
            }
            if sent.is_missing(&done) {
                return Ok(sessions.drop_save());
            }
            // In a box of its own: few updates come here.
            let found = Box::pin(sessions.look_at(std::slice::from_ref(&sent))).await;
            match found.map_err(|error| error.of_a_later_step())?.remove(&sent.key) {
                Some(Err(unreadable)) => Err(unreadable),
                // It had expired. If it is live now, a touch that came late has prolonged it.
                Some(Ok(_)) | None => Ok(sessions.drop_save()),
            }
        })
    }

    fn update_all(&self, updates: Vec<Update>) -> Call<Vec<Result<Option<WallTime>>>> {
        Box::pin(self.clone().update_many(updates))
    }

    fn find(&self, key: SessionKey) -> Call<Option<Session>> {
        let sessions = self.clone();
        Box::pin(async move {
            let timer = sessions.timer(Verb::Find);
            let found = async {
                let mut session = sessions.causal().await?;
                let documents = sessions.documents.clone_with_type::<RawDocumentBuf>();
                let find = documents.find_one(doc! { "_id": schema::id(key) });
                let found = find.max_time(sessions.timeout).session(&mut session).await;
                sessions.causal.check_in(session, found)
            };
            match found.await {
                Ok(found) => {
                    let found = found.map_or(Ok(None), |found| sessions.read(&found));
                    timer.finish(Outcome::from(&found), found)
                }
                Err(error) => timer.fail("load a session", &error),
            }
        })
    }

    fn find_all(&self, keys: Vec<SessionKey>) -> Call<Vec<Result<Option<Session>>>> {
        Box::pin(self.clone().find_many(keys))
    }

    fn remove(&self, key: SessionKey) -> Call<()> {
        let sessions = self.clone();
        Box::pin(async move {
            let timer = sessions.timer(Verb::Remove);
            let removed = async {
                let mut session = sessions.causal().await?;
                let remove = sessions.documents.delete_one(doc! { "_id": schema::id(key) });
                let removed = remove.session(&mut session).await;
                sessions.causal.check_in(session, removed)
            };
            match removed.await {
                Ok(_) => timer.finish(Outcome::Ok, Ok(())),
                Err(error) => timer.fail("delete a session", &error),
            }
        })
    }

    fn clear(&self) -> Call<u64> {
        Box::pin(self.clone().remove_all())
    }

    fn expiry(&self, expires: WallTime) -> WallTime {
        self.ttl.map_or(expires, |ttl| self.clock.wall().after(ttl))
    }
}

impl SessionCollection {
    /// Reports an update that found no live session. Its answer: nothing is stored.
    pub(crate) fn drop_save(&self) -> Option<WallTime> {
        self.metrics.saves_dropped.increment(1);
        tracing::warn!(
            "a save was dropped, since its session was deleted or has expired meanwhile"
        );
        None
    }

    /// The session in a document, if it has not expired.
    pub(crate) fn read(&self, document: &RawDocument) -> Result<Option<Session>> {
        let session = schema::session(document, &self.format)?;
        Ok((session.expires > self.clock.wall()).then_some(session))
    }

    /// A session for one operation, whose reads are as new as anything that was seen.
    pub(crate) async fn causal(&self) -> mongodb::error::Result<ClientSession> {
        self.causal.check_out(self.documents.client()).await
    }

    pub(crate) async fn contains(self, key: SessionKey) -> Result<bool> {
        let timer = self.timer(Verb::Find);
        let found = async {
            let mut session = self.causal().await?;
            let live = live(key, self.clock.wall());
            let find = self.documents.find_one(live).projection(doc! { "_id": 1 });
            let found = find.max_time(self.timeout).session(&mut session).await;
            self.causal.check_in(session, found)
        };
        match found.await {
            Ok(found) => timer.finish(Outcome::Ok, Ok(found.is_some())),
            Err(error) => timer.fail("look for a session", &error),
        }
    }

    pub(crate) async fn count(self) -> Result<u64> {
        let timer = self.timer(Verb::Count);
        let live = || doc! { "expires": { "$gt": schema::date(self.clock.wall()) } };
        let counted = async {
            let mut session = self.causal().await?;
            let count = self.documents.count_documents(live()).max_time(self.timeout);
            let all = count.session(&mut session).await;
            let foreign = match all {
                Ok(_) => self.count_foreign(live()).session(&mut session).await,
                Err(_) => Ok(0),
            };
            self.causal.observe(&session);
            Ok(all?.saturating_sub(foreign?))
        };
        match counted.await {
            Ok(count) => timer.finish(Outcome::Ok, Ok(count)),
            Err(error) => timer.fail("count the sessions", &error),
        }
    }

    pub(crate) async fn estimate(self) -> Result<u64> {
        let timer = self.timer_of(Verb::Count, "count");
        let ended = doc! { "$lte": schema::date(self.clock.wall()) };
        let expired = self.documents.count_documents(doc! { "expires": ended.clone() });
        // Those of them that have expired are subtracted with the sessions that have.
        let foreign = self.count_foreign(doc! { "expires": { "$not": ended } });
        let (all, expired, foreign) = tokio::join!(
            self.documents.estimated_document_count().max_time(self.timeout).into_future(),
            expired.max_time(self.timeout).into_future(),
            foreign.into_future(),
        );
        match all.and_then(|all| Ok(all.saturating_sub(expired?).saturating_sub(foreign?))) {
            Ok(count) => timer.finish(Outcome::Ok, Ok(count)),
            Err(error) => timer.fail("estimate the number of sessions", &error),
        }
    }

    /// Counts the documents of other programs that a filter finds, through the index on `_id`.
    fn count_foreign(&self, filter: Document) -> mongodb::action::CountDocuments<'_> {
        let foreign = self.documents.count_documents(and(schema::foreign_filter(), filter));
        foreign.hint(Hint::Keys(doc! { "_id": 1 })).max_time(self.timeout)
    }
}
