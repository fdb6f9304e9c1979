//! The operations on many sessions in one command, which the [`Batcher`](crate::batching::Batcher) sends while
//! MongoDB is busy.
//!
//! Many saves are one `update` command with many statements. Its reply has the number of modified sessions, which as
//! a rule is all of them. If it is not, the store reads which sessions are gone, have another `rev`, or cannot be
//! read. The command `bulkWrite` would report each statement, but it took a quarter longer, and servers before 8.0
//! do not have it.

use std::collections::{HashMap, HashSet};
use std::future::poll_fn;
use std::pin::Pin;

use bson::{Bson, Document, RawDocument, doc};
use futures_core::Stream;
use mongodb::{ClientSession, Collection};

use crate::batching::Updated;
use crate::error::{Error, ErrorKind, Result};
use crate::mongo::causal::CausalSessions;
use crate::mongo::collection::SessionCollection;
use crate::mongo::error;
use crate::mongo::ops::read_write::{SentUpdate, Update};
use crate::mongo::schema;
use crate::mongo::server_errors::IMMUTABLE_FIELD;
use crate::session::Session;
use crate::session::id::SessionKey;
use crate::telemetry::metrics::{Outcome, Verb};

type SaveResult = Result<Updated>;

impl SessionCollection {
    /// Reads the sessions of different keys by one `find`.
    pub(crate) async fn find_many(
        self,
        keys: Vec<SessionKey>,
    ) -> Result<Vec<Result<Option<Session>>>> {
        let timer = self.timer(Verb::Find);
        self.metrics.record_find_batch(keys.len());
        // Each document is read inside the reply. Copies of a hundred documents would leave holes in memory
        // between the cache entries that are made from them.
        match self.find_documents(&keys, None, |found| self.read(found)).await {
            Ok(mut found) => {
                let read = keys.iter().map(|key| found.remove(key).unwrap_or(Ok(None)));
                let read: Vec<_> = read.collect();
                // A session that cannot be read is counted as if it had been loaded alone.
                let outcome =
                    read.iter().find(|read| read.is_err()).map_or(Outcome::Ok, Outcome::from);
                timer.finish(outcome, Ok(read))
            }
            Err(error) => timer.fail("load sessions", &error),
        }
    }

    /// Applies `read` to each document of these keys that exists.
    pub(crate) async fn find_documents<T>(
        &self,
        keys: &[SessionKey],
        fields: Option<Document>,
        read: impl Fn(&RawDocument) -> T,
    ) -> mongodb::error::Result<HashMap<SessionKey, T>> {
        let ids: Vec<Bson> = keys.iter().map(|key| schema::id(*key).into()).collect();
        let mut session = self.causal_session().await?;
        // One more than the number of keys, so that the server closes the cursor with the first batch.
        let batch = u32::try_from(keys.len()).unwrap_or(u32::MAX).saturating_add(1);
        let find = self.documents.find(doc! { "_id": { "$in": ids } }).batch_size(batch);
        let find = match fields {
            Some(fields) => find.projection(fields),
            None => find,
        };
        let mut cursor = find.max_time(self.timeout).session(&mut session).batch().await?;
        let mut found = HashMap::with_capacity(keys.len());
        let mut batches = cursor.stream(&mut session);
        while let Some(batch) = poll_fn(|cx| Pin::new(&mut batches).poll_next(cx)).await {
            for document in batch?.doc_slices()? {
                let Some(document) = document?.as_document() else { continue };
                if let Some(key) = schema::key(document) {
                    found.insert(key, read(document));
                }
            }
        }
        drop(batches);
        drop(cursor);
        self.causal.check_in(session, Ok(found))
    }

    /// Sends updates of different sessions as one command.
    ///
    /// If the command fails as a whole, the outcome of each update is unknown. The store does not send it again: a
    /// second execution could overwrite a save that was acknowledged in between. One repetition is safe: the driver
    /// sends a batch again that an overloaded server rejected, because the server did not execute it.
    pub(crate) async fn update_many(self, updates: Vec<Update>) -> Result<Vec<SaveResult>> {
        let timer = self.timer(Verb::Bulk).with_calls(updates.len());
        self.metrics.record_save_batch(updates.len());
        let now = self.clock.wall();
        let query = |update: Update| {
            let (sent, filter, stage) = update.into_query(now, self.lifetime);
            (sent, doc! { "q": filter, "u": [stage] })
        };
        let (sent, statements): (Vec<_>, Vec<_>) = updates.into_iter().map(query).unzip();
        match self.write(statements).await {
            Ok(reply) => {
                let reply = BatchReply::of(&reply, &sent);
                let _ = timer.finish(reply.outcome(), Ok(()));
                Ok(self.outcomes(&sent, reply).await)
            }
            Err(error) => timer.fail("save sessions", &error),
        }
    }

    /// Sends statements as one `update`.
    pub(crate) async fn write(
        &self,
        statements: Vec<Document>,
    ) -> mongodb::error::Result<Document> {
        // The driver session only serves to observe the time of the write. The driver (3.9.1) adds no
        // `afterClusterTime` to a `run_command`, so a session from the pool would not help.
        let mut session = CausalSessions::new_session(self.documents.client()).await?;
        let reply = update(&self.documents, statements, &mut session).await;
        self.causal.observe(&session);
        reply
    }

    async fn outcomes(&self, sent: &[SentUpdate], mut reply: BatchReply) -> Vec<SaveResult> {
        if let Some(concern) = reply.concern {
            // The write concern failed, so no save is acknowledged.
            return sent.iter().map(|_| Err(concern.clone())).collect();
        }
        let mut found = if reply.all { Ok(HashMap::new()) } else { self.look_at(sent).await };
        let mut outcomes = Vec::with_capacity(sent.len());
        for (index, sent) in sent.iter().enumerate() {
            outcomes.push(match (reply.refusals.remove(&index), &mut found) {
                (Some(refusal), _) => Err(refusal),
                (None, _) if reply.changed.contains(&index) => Ok(Updated::Changed),
                (None, _) if reply.all => Ok(Updated::Stored(sent.expires)),
                // The save may be stored: only the read after it failed.
                (None, Err(error)) => Err(error.of_a_later_step()),
                (None, Ok(found)) => match found.remove(&sent.key) {
                    Some(Ok(Stored::Live { rev })) => Ok(sent.judge(&rev)),
                    Some(Ok(Stored::Expired)) | None => Ok(self.drop_save()),
                    Some(Err(unreadable)) => Err(unreadable),
                },
            });
        }
        outcomes
    }

    /// Reads what is stored of the sessions of these updates. A session that does not exist is not in the map. If the
    /// expiry of a session is not a date, the error is the same as that of a load.
    pub(crate) async fn look_at(
        &self,
        sent: &[SentUpdate],
    ) -> Result<HashMap<SessionKey, Result<Stored>>> {
        let timer = self.timer(Verb::Find);
        let keys: Vec<_> = sent.iter().map(|sent| sent.key).collect();
        let fields = doc! { "expires": 1, "rev": 1 };
        let now = self.clock.wall();
        let read = |found: &RawDocument| {
            if schema::is_live(found, now)? {
                return Ok(Stored::Live { rev: schema::rev(found).to_vec() });
            }
            Ok(Stored::Expired)
        };
        match self.find_documents(&keys, Some(fields), read).await {
            Ok(found) => timer.finish(Outcome::Ok, Ok(found)),
            Err(error) => timer.fail("see which sessions were saved", &error),
        }
    }
}

/// What is stored of a session after an update that may not have changed it.
pub(crate) enum Stored {
    Live { rev: Vec<u8> },
    Expired,
}

/// Sends statements as one `update` to a collection, with its write concern.
pub(crate) async fn update(
    documents: &Collection<Document>,
    statements: Vec<Document>,
    session: &mut ClientSession,
) -> mongodb::error::Result<Document> {
    let namespace = documents.namespace();
    let mut command = doc! { "update": namespace.coll, "updates": statements, "ordered": false };
    if let Some(concern) = documents.write_concern() {
        command.insert("writeConcern", bson::serialize_to_bson(concern)?);
    }
    documents.client().database(&namespace.db).run_command(command).session(session).await
}

/// The reply to an `update` with many statements.
#[derive(Debug)]
struct BatchReply {
    /// The error of a write concern that failed.
    concern: Option<Error>,
    /// The error of each statement that was refused, by its index.
    refusals: HashMap<usize, Error>,
    /// The statements whose session did not meet their condition.
    changed: HashSet<usize>,
    /// Whether each other statement has modified its session.
    all: bool,
}

impl BatchReply {
    fn of(reply: &Document, sent: &[SentUpdate]) -> Self {
        let mut refusals = HashMap::new();
        let mut changed = HashSet::new();
        for error in reply.get_array("writeErrors").into_iter().flatten() {
            let Some(error) = error.as_document() else { continue };
            let Some(index) = number(error, "index") else { continue };
            let has_condition = sent.get(index).is_some_and(SentUpdate::has_condition);
            if has_condition && number(error, "code") == usize::try_from(IMMUTABLE_FIELD).ok() {
                changed.insert(index);
            } else {
                refusals.insert(index, refused(error));
            }
        }
        let carried_out = sent.len().saturating_sub(refusals.len() + changed.len());
        Self {
            concern: reply.get_document("writeConcernError").ok().map(unacknowledged),
            all: number(reply, "nModified") == Some(carried_out),
            refusals,
            changed,
        }
    }

    fn outcome(&self) -> Outcome {
        let failed = self.concern.as_ref().or_else(|| self.refusals.values().next());
        failed.map_or(Outcome::Ok, |error| Outcome::Failed(error.kind()))
    }
}

/// The error of a statement, from the server's report about it.
pub(crate) fn refused(error: &Document) -> Error {
    of_code(error, error::refused)
}

/// The error of statements that were executed, but whose write concern failed.
pub(crate) fn unacknowledged(error: &Document) -> Error {
    of_code(error, error::unacknowledged)
}

fn of_code(error: &Document, judge: impl Fn(&str, i32) -> Error) -> Error {
    match number(error, "code") {
        Some(code) => judge("save a session", i32::try_from(code).unwrap_or_default()),
        None => Error::new(ErrorKind::Server, "MongoDB refused to save a session"),
    }
}

/// Reads a whole number of any BSON type.
pub(crate) fn number(document: &Document, field: &str) -> Option<usize> {
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::batching::Condition;
    use crate::session::revision::RevSource;
    use crate::time::WallTime;

    fn sent(conditions: &[Condition]) -> Vec<SentUpdate> {
        let revs = RevSource::new();
        let at = WallTime::from_millis(1);
        let key = SessionKey::of;
        let sent = conditions.iter().zip(1..);
        sent.map(|(condition, id)| SentUpdate::new(key(id), at, revs.next(), *condition)).collect()
    }

    #[test]
    fn all_are_saved_if_the_modified_count_is_the_sent_count() {
        let sent = sent(&[Condition::IsLive; 2]);
        for modified in [Bson::Int32(2), Bson::Int64(2), Bson::Double(2.0)] {
            let parsed = BatchReply::of(&doc! { "ok": 1, "n": 2, "nModified": modified }, &sent);
            assert!(parsed.all && parsed.refusals.is_empty() && parsed.concern.is_none());
            assert!(matches!(parsed.outcome(), Outcome::Ok));
        }
        for modified in [Bson::Int32(1), Bson::Double(1.5), Bson::Int32(-2), Bson::Null] {
            assert!(!BatchReply::of(&doc! { "ok": 1, "n": 2, "nModified": modified }, &sent).all);
        }
        assert!(!BatchReply::of(&doc! { "ok": 1 }, &sent).all);
    }

    #[test]
    fn refusals_are_kept_by_index_and_without_the_servers_text() {
        let reply = doc! { "n": 1, "nModified": 1, "writeErrors": [
            { "index": 0, "code": 11000, "errmsg": "dup key: 4111" },
            { "index": 2_i64, "code": 13, "errmsg": "4111" },
        ] };
        let parsed = BatchReply::of(&reply, &sent(&[Condition::IsLive; 3]));
        let mut places: Vec<_> = parsed.refusals.keys().copied().collect();
        places.sort_unstable();
        assert_eq!(places, [0, 2]);
        assert_eq!(parsed.refusals[&2].kind(), ErrorKind::Permission);
        assert!(parsed.refusals.values().all(|error| !error.to_string().contains("4111")));
        assert!(matches!(parsed.outcome(), Outcome::Failed(_)));
        assert!(parsed.all, "the third statement has modified its session");
    }

    #[test]
    fn error_66_says_that_a_condition_was_not_met_and_is_a_refusal_without_a_condition() {
        let reply = doc! { "n": 1, "nModified": 1, "writeErrors": [
            { "index": 0, "code": 66, "errmsg": "" }, { "index": 1, "code": 66, "errmsg": "" },
        ] };
        let conditions = [Condition::HasRev(None), Condition::IsLive, Condition::HasRev(None)];
        let parsed = BatchReply::of(&reply, &sent(&conditions));
        assert!(parsed.all);
        assert_eq!(parsed.changed, HashSet::from([0]));
        assert_eq!(parsed.refusals.keys().collect::<Vec<_>>(), [&1]);
    }

    #[test]
    fn an_update_that_was_not_refused_is_judged_by_the_stored_rev() {
        let revs = RevSource::new();
        let ours = revs.next();
        let expected = revs.next();
        let other = revs.next();
        let at = WallTime::from_millis(1);
        let judge = |condition, stored: &[u8]| {
            SentUpdate::new(SessionKey::of(1), at, ours, condition).judge(stored)
        };
        let is_live = Condition::IsLive;
        assert_eq!(judge(is_live, ours.as_bytes()), Updated::Stored(at));
        assert_eq!(judge(is_live, other.as_bytes()), Updated::Gone);
        let has_rev = Condition::HasRev(Some(expected));
        assert_eq!(judge(has_rev, ours.as_bytes()), Updated::Stored(at));
        assert_eq!(judge(has_rev, expected.as_bytes()), Updated::Changed, "it was not carried out");
        assert_eq!(judge(has_rev, other.as_bytes()), Updated::Stored(at), "overwritten since");
        for strange in [&b""[..], b"by hand"] {
            assert_eq!(
                judge(Condition::HasRev(None), strange),
                Updated::Changed,
                "it was not carried out"
            );
        }
    }

    #[test]
    fn a_failed_write_concern_is_an_error_even_if_all_were_modified() {
        let reply = doc! {
            "n": 2, "nModified": 2, "writeConcernError": { "code": 64, "errmsg": "timed out" },
        };
        let parsed = BatchReply::of(&reply, &sent(&[Condition::IsLive; 2]));
        assert!(parsed.all && parsed.concern.is_some());
        assert!(matches!(parsed.outcome(), Outcome::Failed(_)));
    }
}
