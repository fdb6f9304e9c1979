//! Many operations in one command: what [`Dispatch`](crate::dispatch::Dispatch) sends while the
//! server is busy.
//!
//! Saves go as one `update` of many statements. The server's `bulkWrite` would tell how each ended,
//! but took a quarter longer, and servers before 8.0 do not have it. Of an `update` the answer is the
//! number of sessions modified: as a rule all of them. Otherwise a look at what is live tells which
//! were gone, since no id is ever used again.

use std::collections::HashMap;

use bson::{Bson, Document, RawDocumentBuf, doc};

use super::operations::Update;
use super::{Sessions, document, failure};
use crate::error::{Error, ErrorKind, Result};
use crate::key::SessionKey;
use crate::metrics::{Outcome, Verb};
use crate::record::{Session, WallTime};

type Saved = Result<Option<WallTime>>;

impl Sessions {
    /// Reads the sessions of different keys by one `find`.
    pub(super) async fn find_many(
        self,
        keys: Vec<SessionKey>,
    ) -> Result<Vec<Result<Option<Session>>>> {
        let timer = self.timer(Verb::Find);
        self.metrics.finds_together(keys.len());
        match self.find_documents(&keys, None).await {
            Ok(mut found) => timer.ends(
                Outcome::Ok,
                Ok(keys
                    .iter()
                    .map(|key| found.remove(key).map_or(Ok(None), |found| self.read(&found)))
                    .collect()),
            ),
            Err(error) => timer.fails("load sessions", &error),
        }
    }

    pub(super) async fn find_documents(
        &self,
        keys: &[SessionKey],
        fields: Option<Document>,
    ) -> mongodb::error::Result<HashMap<SessionKey, RawDocumentBuf>> {
        let ids: Vec<Bson> = keys.iter().map(|key| document::id(*key).into()).collect();
        let documents = self.documents.clone_with_type::<RawDocumentBuf>();
        let mut session = self.causal().await?;
        // One more than there are, so that the first batch is seen to be the last.
        let batch = u32::try_from(keys.len()).unwrap_or(u32::MAX).saturating_add(1);
        let find = documents.find(doc! { "_id": { "$in": ids } }).batch_size(batch);
        let find = match fields {
            Some(fields) => find.projection(fields),
            None => find,
        };
        let mut cursor = find.max_time(self.timeout).session(&mut session).await?;
        let mut found = HashMap::with_capacity(keys.len());
        while cursor.advance(&mut session).await? {
            let document = cursor.current();
            if let Some(key) = document::key(document) {
                found.insert(key, document.to_owned());
            }
        }
        self.seen.learn(&session);
        Ok(found)
    }

    /// Sends updates of different sessions as one command.
    ///
    /// If that fails as a whole, all are in doubt, and it is not sent again: carried out a second
    /// time, a save could come over another one that was acknowledged in between.
    pub(super) async fn update_many(self, updates: Vec<Update>) -> Result<Vec<Saved>> {
        let timer = self.timer(Verb::Bulk);
        self.metrics.writes_together(updates.len());
        match self.write(&updates).await {
            Ok(reply) => {
                drop(timer.ends(Outcome::Ok, Ok(())));
                Ok(self.outcomes(&updates, &reply).await)
            }
            Err(error) => timer.fails("save sessions", &error),
        }
    }

    async fn write(&self, updates: &[Update]) -> mongodb::error::Result<Document> {
        // Of what was seen the server need not be told: with that, the driver adds a read concern,
        // which is not for a write.
        let mut session = self.seen.blank(self.documents.client()).await?;
        let (namespace, now) = (self.documents.namespace(), self.clock.wall());
        let statements = updates.iter().map(|update| {
            let (filter, stage) = update.query(now);
            doc! { "q": filter, "u": [stage] }
        });
        let mut command = doc! {
            "update": namespace.coll,
            "updates": statements.collect::<Vec<_>>(),
            "ordered": false,
        };
        if let Some(concern) = self.documents.write_concern() {
            command.insert("writeConcern", bson::serialize_to_bson(concern)?);
        }
        let database = self.documents.client().database(&namespace.db);
        let reply = database.run_command(command).session(&mut session).await;
        self.seen.learn(&session);
        reply
    }

    async fn outcomes(&self, updates: &[Update], reply: &Document) -> Vec<Saved> {
        if let Ok(concern) = reply.get_document("writeConcernError") {
            // Nothing is acknowledged where the write concern was not met.
            return updates.iter().map(|_| Err(refused(concern))).collect();
        }
        let mut refusals = HashMap::new();
        for error in reply.get_array("writeErrors").into_iter().flatten() {
            if let Some(error) = error.as_document()
                && let Some(index) = number(error, "index")
            {
                refusals.insert(index, refused(error));
            }
        }
        let all = number(reply, "nModified") == Some(updates.len());
        let live = if all { Ok(HashMap::new()) } else { self.live_among(updates).await };
        let outcome = |(index, update): (usize, &Update)| match refusals.remove(&index) {
            Some(refusal) => Err(refusal),
            None if all => Ok(Some(update.expires)),
            None => match live.as_ref().map_err(Error::clone)?.get(&update.key) {
                Some(rev) if update.is_of(rev) => Ok(Some(update.expires)),
                // Overwritten since; or it had expired, and was prolonged by a touch that came late.
                // Either way this is not what is stored.
                Some(_) => Ok(None),
                None => Ok(self.stored(false, update.expires)),
            },
        };
        updates.iter().enumerate().map(outcome).collect()
    }

    /// Which of the sessions are there and have not expired, and the `rev` of each.
    async fn live_among(&self, updates: &[Update]) -> Result<HashMap<SessionKey, Vec<u8>>> {
        let timer = self.timer(Verb::Find);
        let keys: Vec<_> = updates.iter().map(|update| update.key).collect();
        match self.find_documents(&keys, Some(doc! { "expires": 1, "rev": 1 })).await {
            Ok(found) => {
                let now = self.clock.wall();
                let live = found.into_iter().filter(|(_, it)| document::expires_after(it, now));
                let live = live.map(|(key, it)| (key, document::rev(&it).to_vec()));
                timer.ends(Outcome::Ok, Ok(live.collect()))
            }
            Err(error) => timer.fails("see which sessions were saved", &error),
        }
    }
}

/// What became of an update that the server reports in this document.
fn refused(error: &Document) -> Error {
    match number(error, "code") {
        Some(code) => failure::refused("save a session", i32::try_from(code).unwrap_or_default()),
        None => Error::new(ErrorKind::Server, "MongoDB refused to save a session"),
    }
}

/// A whole number of any width.
fn number(document: &Document, field: &str) -> Option<usize> {
    let number = match document.get(field)? {
        Bson::Int32(number) => i64::from(*number),
        Bson::Int64(number) => *number,
        Bson::Double(number) if number.fract() == 0.0 => {
            #[allow(clippy::cast_possible_truncation, reason = "a small whole number")]
            let whole = *number as i64;
            whole
        }
        _ => return None,
    };
    usize::try_from(number).ok()
}
