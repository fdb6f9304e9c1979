//! The operations on one session: insert, replace, touch, find, remove.

use bson::{Document, RawDocument, RawDocumentBuf, doc};
use mongodb::results::UpdateResult;

use crate::backend::{BeginDelete, Call, NewSession};
use crate::batching::{Commands, Condition, MergeEnd, NewExpiry, Updated};
use crate::error::Result;
use crate::mongo::collection::SessionCollection;
use crate::mongo::error;
use crate::mongo::lifetime::AbsoluteLifetime;
use crate::mongo::ops::batch::Stored;
use crate::mongo::owner_field::OwnerUpdate;
use crate::mongo::schema;
use crate::request_scope::changes::OnConflict;
use crate::session::id::SessionKey;
use crate::session::revision::Rev;
use crate::session::{Data, Session};
use crate::telemetry::metrics::{MergeResult, Outcome, Verb};
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
    Replace(Document, OwnerUpdate, Rev, Condition, NewExpiry),
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
    pub(crate) condition: Condition,
}

impl Update {
    /// Returns the filter and the only stage of the update, as of `now`.
    pub(crate) fn into_query(
        self,
        now: WallTime,
        lifetime: AbsoluteLifetime,
    ) -> (SentUpdate, Document, Document) {
        let Self { key, expires, change, .. } = self;
        let (rev, condition, filter, stage) = match change {
            Change::Replace(fields, owned, rev, condition, expires) => {
                let stage =
                    schema::replace_update(fields, owned, now, condition, expires, lifetime);
                (Some(rev), condition, doc! { "_id": schema::id(key) }, stage)
            }
            Change::Touch(stage) => (None, Condition::IsLive, live(key, now, lifetime), stage),
        };
        (SentUpdate { key, expires, rev, condition }, filter, stage)
    }
}

impl SentUpdate {
    #[cfg(test)]
    pub(crate) fn new(key: SessionKey, expires: WallTime, rev: Rev, condition: Condition) -> Self {
        Self { key, expires, rev: Some(rev), condition }
    }

    pub(crate) fn has_condition(&self) -> bool {
        self.condition != Condition::IsLive
    }

    fn verb(&self) -> Verb {
        if self.rev.is_some() { Verb::Replace } else { Verb::Touch }
    }

    /// Judges an update that the server has not refused, by the `rev` that its live session has now.
    pub(crate) fn judge(&self, rev: &[u8]) -> Updated {
        let is = |it: Option<Rev>| it.is_some_and(|it| it.as_bytes() == rev);
        match self.condition {
            _ if self.rev.is_none() || is(self.rev) => Updated::Stored(self.expires),
            // Another save overwrote it; or the session had expired, and a touch that arrived late prolonged it.
            // In both cases this save is not what is stored.
            Condition::IsLive => Updated::Gone,
            // The session still has the `rev` of before, so the update was not carried out. The server should have
            // refused it.
            Condition::HasRev(expected) if expected == Rev::from_bytes(rev) => Updated::Changed,
            // It was carried out, since it met its condition. Another save has overwritten it.
            Condition::HasRev(_) => Updated::Stored(self.expires),
        }
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
fn live(key: SessionKey, now: WallTime, lifetime: AbsoluteLifetime) -> Document {
    let not_expired = doc! { "$gt": schema::date(now), "$not": { "$type": "array" } };
    let mut live = doc! { "_id": schema::id(key), "expires": not_expired };
    lifetime.add_condition(&mut live, now);
    live
}

impl From<MergeEnd> for MergeResult {
    fn from(end: MergeEnd) -> Self {
        match end {
            MergeEnd::Unchanged => Self::Unchanged,
            MergeEnd::Merged => Self::Merged,
            MergeEnd::Gone => Self::Gone,
            MergeEnd::Failed => Self::Failed,
        }
    }
}

impl Commands for SessionCollection {
    type Update = Update;

    fn insert(&self, new: NewSession<'_>, begin_evict: BeginDelete) -> Call<Option<WallTime>> {
        let now = self.clock.wall();
        let expires = self.expiry(new.expires);
        let expires = self.lifetime.cap(expires, new.created.or(Some(now))).unwrap_or(expires);
        let key = new.key;
        let document = self.new_document(&NewSession { expires, ..new });
        let sessions = self.clone();
        if let Some(limit) = self.session_limit {
            return Box::pin(async move {
                sessions.insert_within_limit(limit, key, document?, expires, begin_evict).await
            });
        }
        Box::pin(async move { sessions.insert_document(document?, expires).await })
    }

    fn discard_late_insert(&self, key: SessionKey) {
        if self.session_limit.is_some() {
            self.remove_later(key);
        }
    }

    fn replacement(
        &self,
        key: SessionKey,
        rev: Rev,
        data: &Data,
        expiry: NewExpiry,
        condition: Condition,
    ) -> Result<Update> {
        let expires = self.expiry(expiry.time());
        let (mut fields, bytes) =
            schema::replacement_fields(key, rev, (data, &self.format), expires, self.clock.wall())?;
        let owned = self.add_owner(data, &mut fields)?;
        let change = Change::Replace(fields, owned, rev, condition, expiry);
        Ok(Update { key, expires, change, bytes })
    }

    fn touch(&self, key: SessionKey, expires: WallTime) -> Update {
        let change = Change::Touch(schema::touch_update(expires, self.clock.wall(), self.lifetime));
        Update { key, expires, change, bytes: 64 }
    }

    fn bytes(update: &Update) -> usize {
        update.bytes
    }

    fn update(&self, update: Update) -> Call<Updated> {
        let sessions = self.clone();
        Box::pin(async move {
            let (sent, filter, stage) = update.into_query(sessions.clock.wall(), sessions.lifetime);
            let timer = sessions.timer(sent.verb());
            let updated = async {
                let mut session = sessions.causal_session().await?;
                let change = sessions.documents.update_one(filter, vec![stage]);
                let changed = change.session(&mut session).await;
                sessions.causal.check_in(session, changed)
            };
            let done = match updated.await {
                Ok(done) => timer.finish(Outcome::Ok, Ok(done))?,
                Err(error) if sent.has_condition() && error::is_changed(&error) => {
                    return timer.finish(Outcome::Changed, Ok(Updated::Changed));
                }
                Err(error) => return timer.fail("save a session", &error),
            };
            if sent.is_done(&done) {
                return Ok(Updated::Stored(sent.expires));
            }
            if sent.is_missing(&done) {
                return Ok(sessions.drop_save());
            }
            // Boxed, because it is large and few updates come here.
            let found = Box::pin(sessions.look_at(std::slice::from_ref(&sent))).await;
            match found.map_err(|error| error.after_nothing_was_found())?.remove(&sent.key) {
                Some(Err(unreadable)) => Err(unreadable),
                // The server should have refused the update.
                Some(Ok(Stored::Live { .. })) if sent.has_condition() => Ok(Updated::Changed),
                Some(Ok(_)) | None => Ok(sessions.drop_save()),
            }
        })
    }

    fn update_all(&self, updates: Vec<Update>) -> Call<Vec<Result<Updated>>> {
        Box::pin(self.clone().update_many(updates))
    }

    fn on_conflict(&self) -> Option<&OnConflict> {
        self.on_conflict.as_ref()
    }

    fn cap(&self, expires: WallTime, created: Option<WallTime>) -> Option<WallTime> {
        self.lifetime.cap(expires, created)
    }

    fn have_same_owner(&self, one: &Data, other: &Data) -> Result<bool> {
        let Some(owner_of) = &self.owner else { return Ok(true) };
        Ok(owner_of.derive(one)? == owner_of.derive(other)?)
    }

    fn record_merge(&self, end: MergeEnd, attempts: u32, conflicts: u64) {
        self.metrics.record_merge(end.into(), attempts, conflicts);
    }

    fn record_dropped_save(&self) {
        self.drop_save();
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

    fn take(&self, key: SessionKey) -> Call<Option<Session>> {
        let sessions = self.clone();
        Box::pin(async move {
            let timer = sessions.timer_of(Verb::Remove, "findAndModify");
            let taken = async {
                let mut session = sessions.causal_session().await?;
                let documents = sessions.documents.clone_with_type::<RawDocumentBuf>();
                let take = documents.find_one_and_delete(doc! { "_id": schema::id(key) });
                let taken = take.session(&mut session).await;
                sessions.causal.check_in(session, taken)
            };
            match taken.await {
                // The session is removed, even if it could not be read.
                Ok(taken) => {
                    let taken = taken.and_then(|taken| sessions.read(&taken).ok().flatten());
                    timer.finish(Outcome::Ok, Ok(taken))
                }
                Err(error) => timer.fail("delete a session", &error),
            }
        })
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
    fn new_document(&self, new: &NewSession<'_>) -> Result<Document> {
        let data = (new.data, &self.format);
        let now = self.clock.wall();
        let mut document = schema::insert_document(new.key, new.rev, data, new.expires, now)?;
        if let Some(created) = new.created {
            document.insert("created", schema::date(created));
        }
        self.add_owner(new.data, &mut document)?;
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
    pub(crate) fn drop_save(&self) -> Updated {
        self.metrics.saves_dropped.increment(1);
        tracing::warn!(
            "a save was dropped, since its session was deleted or has expired meanwhile"
        );
        Updated::Gone
    }

    /// Reads the session in a document; `None` if it has expired.
    pub(crate) fn read(&self, document: &RawDocument) -> Result<Option<Session>> {
        let mut session = schema::session(document, &self.format)?;
        let Some(expires) = self.lifetime.cap(session.expires, session.created) else {
            return Ok(None);
        };
        session.expires = expires;
        Ok((expires > self.clock.wall()).then_some(session))
    }

    pub(crate) async fn contains(self, key: SessionKey) -> Result<bool> {
        let timer = self.timer(Verb::Find);
        let found = async {
            let mut session = self.causal_session().await?;
            let live = live(key, self.clock.wall(), self.lifetime);
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
