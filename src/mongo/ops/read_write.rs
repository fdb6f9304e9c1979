//! The operations on one session: insert, replace, touch, find, remove.

use bson::{Document, RawDocument, RawDocumentBuf, doc};
use mongodb::results::UpdateResult;

use crate::backend::Call;
use crate::batching::Commands;
use crate::error::Result;
use crate::mongo::collection::SessionCollection;
use crate::mongo::error;
use crate::mongo::owner_field::OwnerUpdate;
use crate::mongo::schema;
use crate::session::id::SessionKey;
use crate::session::revision::Rev;
use crate::session::{Data, Session};
use crate::telemetry::metrics::{Outcome, Verb};
use crate::time::WallTime;

/// A save of one session, ready to be sent.
#[derive(Debug)]
pub(crate) struct Update {
    key: SessionKey,
    expires: WallTime,
    change: Change,
    /// The approximate size of the data.
    bytes: usize,
}

#[derive(Debug)]
enum Change {
    /// Stores these fields, under a new rev.
    Replace(Document, OwnerUpdate, Rev),
    /// Prolongs the session, by this update.
    Touch(Document),
}

/// What the store remembers of an update that it sent, to judge the reply.
#[derive(Debug)]
pub(crate) struct SentUpdate {
    pub(crate) key: SessionKey,
    pub(crate) expires: WallTime,
    /// The rev that the update stores; `None` for a touch.
    rev: Option<Rev>,
}

impl Update {
    /// Returns the filter and the only stage of the update, as of `now`.
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

    /// Whether this update may have stored what has this `rev`.
    pub(crate) fn may_have_stored(&self, rev: &[u8]) -> bool {
        self.rev.is_none_or(|ours| ours.as_bytes() == rev)
    }

    /// Whether the session was there and live.
    fn is_done(&self, result: &UpdateResult) -> bool {
        // A replacement has a new `rev`, so it always modifies a live session.
        if self.rev.is_some() { result.modified_count > 0 } else { result.matched_count > 0 }
    }

    /// Whether the reply says that no document has this key. The filter of a touch also has the expiry, so its reply
    /// does not say why nothing matched.
    fn is_missing(&self, result: &UpdateResult) -> bool {
        self.rev.is_some() && result.matched_count == 0
    }
}

/// Matches the session of this key if it has not expired. A query compares each date in a list of dates, so arrays
/// are excluded.
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
        let document = self.new_document(key, rev, data, expires);
        Box::pin(async move { sessions.insert_document(document?, expires).await })
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
                let mut session = sessions.causal_session().await?;
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
            // Boxed, because it is large and few updates come here.
            let found = Box::pin(sessions.look_at(std::slice::from_ref(&sent))).await;
            match found.map_err(|error| error.after_nothing_was_found())?.remove(&sent.key) {
                Some(Err(unreadable)) => Err(unreadable),
                // The session had expired. If it is live now, a touch that arrived late has prolonged it.
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
                let mut session = sessions.causal_session().await?;
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
                let mut session = sessions.causal_session().await?;
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
    /// Makes the document of a new session, with its owner.
    pub(crate) fn new_document(
        &self,
        key: SessionKey,
        rev: Rev,
        data: &Data,
        expires: WallTime,
    ) -> Result<Document> {
        let now = self.clock.wall();
        let mut document = schema::insert_document(key, rev, (data, &self.format), expires, now)?;
        self.add_owner(data, &mut document)?;
        Ok(document)
    }

    /// Stores the document of a new session that expires at `expires`. `None` if the key is taken.
    pub(crate) async fn insert_document(
        &self,
        document: Document,
        expires: WallTime,
    ) -> Result<Option<WallTime>> {
        let timer = self.timer(Verb::Insert);
        let inserted = async {
            let mut session = self.causal_session().await?;
            let inserted = self.documents.insert_one(document).session(&mut session).await;
            self.causal.check_in(session, inserted)
        };
        match inserted.await {
            Ok(_) => timer.finish(Outcome::Ok, Ok(Some(expires))),
            Err(error) if error::is_duplicate(&error) => timer.finish(Outcome::Duplicate, Ok(None)),
            Err(error) => timer.fail("create a session", &error),
        }
    }

    /// Logs and counts an update that found no live session. Returns its result: nothing is stored.
    pub(crate) fn drop_save(&self) -> Option<WallTime> {
        self.metrics.saves_dropped.increment(1);
        tracing::warn!(
            "a save was dropped, since its session was deleted or has expired meanwhile"
        );
        None
    }

    /// Reads the session in a document; `None` if it has expired.
    pub(crate) fn read(&self, document: &RawDocument) -> Result<Option<Session>> {
        let session = schema::session(document, &self.format)?;
        Ok((session.expires > self.clock.wall()).then_some(session))
    }

    pub(crate) async fn contains(self, key: SessionKey) -> Result<bool> {
        let timer = self.timer(Verb::Find);
        let found = async {
            let mut session = self.causal_session().await?;
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
}
