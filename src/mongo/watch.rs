//! The change stream of the sessions' collection, asked for by plain commands.
//!
//! The driver's own change stream resumes behind one's back, and its first empty answer comes
//! without asking the server. What is vouched for by a batch depends on knowing which server was
//! asked, when, and after what; so `aggregate` and `getMore` are sent here, in one session, to one
//! server.

use std::sync::Arc;
use std::time::Duration;

use bson::{Bson, Document, doc};
use mongodb::options::{SelectionCriteria, ServerAddress};
use mongodb::{ClientSession, Database, ServerInfo, ServerType};
use tokio::runtime::Handle;
use tokio::time::timeout;

use super::{Sessions, document, failure};
use crate::backend::{Asked, Batch, Change, Changes, Fault, Opened, Rev, ServerTime};
use crate::key::SessionKey;
use crate::sync::{Mutex, lock};

/// How the changes of one collection are asked for.
#[derive(Clone)]
pub(crate) struct Watch {
    sessions: Sessions,
    /// How long the server waits for changes before it sends an empty batch.
    pace: Duration,
}

/// An open stream: a cursor on one server.
pub(crate) struct Stream {
    watch: Watch,
    session: ClientSession,
    cursor: i64,
    server: Server,
}

impl Drop for Stream {
    /// Closes the cursor, which the server would keep for minutes: as far as that goes, and in
    /// nobody's way.
    fn drop(&mut self) {
        let Ok(runtime) = Handle::try_current() else { return };
        if self.cursor == 0 {
            return;
        }
        let (watch, cursor, criteria) = (self.watch.clone(), self.cursor, self.server.criteria());
        runtime.spawn(async move {
            let name = watch.sessions.documents.name();
            let kill = doc! { "killCursors": name, "cursors": [cursor] };
            let database = watch.database();
            let kills = database.run_command(kill).selection_criteria(criteria);
            drop(timeout(watch.sessions.timeout, kills.into_future()).await);
        });
    }
}

/// A resume token, as the server gave it.
type Token = Document;

impl Changes for Watch {
    type Stream = Stream;
    type Position = Token;

    fn open(&self, after: Option<Token>) -> Opened<Stream, Token> {
        Box::pin(self.clone().noting(self.clone().opens(after), Sign::OfTrouble))
    }

    fn more(&self, stream: Stream) -> Opened<Stream, Token> {
        Box::pin(self.clone().noting(self.clone().goes_on(stream), Sign::OfTrouble))
    }

    fn fence(&self) -> Asked<ServerTime> {
        let (watch, asks) = (self.clone(), self.clone());
        Box::pin(watch.noting(async move { asks.asks_the_time().await }, Sign::OfLife))
    }
}

impl Watch {
    pub(super) fn new(sessions: Sessions, pace: Duration) -> Self {
        Self { sessions, pace }
    }

    /// Takes note of what a call tells of the database: whether it answers.
    async fn noting<T>(
        self,
        call: impl Future<Output = Result<T, Fault>>,
        sign: Sign,
    ) -> Result<T, Fault> {
        let question = self.sessions.metrics.asks(self.sessions.timeout);
        let outcome = call.await;
        question.ends(match outcome {
            Ok(_) => (sign == Sign::OfLife).then_some(true),
            Err(Fault::Passing) => Some(false),
            Err(_) => None,
        });
        outcome
    }

    async fn opens(self, after: Option<Token>) -> Result<(Stream, Batch<Token>), Fault> {
        let client = self.sessions.documents.client();
        let session = client.start_session().causal_consistency(false).await;
        let mut session = session.map_err(|error| fault(&error))?;
        let server = Server::primary_or_router();
        let database = self.database();
        let is_new = after.is_none();
        let asks = database.run_command(self.aggregate(after));
        let reply = asks.session(&mut session).selection_criteria(server.criteria()).await;
        let reply = reply.map_err(|error| fault(&error))?;
        // The first batch is what was there already: empty, it says nothing of what was to come.
        let (cursor, batch) = self.read(&reply, "firstBatch", None).ok_or(Fault::Refused)?;
        let stream = Stream { watch: self.clone(), session, cursor, server };
        if is_new {
            // What changed before the stream begins is never reported, so no read from here on may
            // be from before it: what a majority has may be older than what the stream begins with.
            self.asks_the_time().await?;
        }
        Ok((stream, batch))
    }

    async fn goes_on(self, mut stream: Stream) -> Result<(Stream, Batch<Token>), Fault> {
        let database = self.database();
        let asks = database.run_command(doc! {
            "getMore": stream.cursor,
            "collection": self.sessions.documents.name(),
            "maxTimeMS": i64::try_from(self.pace.as_millis()).unwrap_or(i64::MAX),
        });
        let criteria = stream.server.criteria();
        let reply = asks.session(&mut stream.session).selection_criteria(criteria).await;
        let reply = reply.map_err(|error| fault(&error))?;
        let read = self.read(&reply, "nextBatch", Some(&stream.server));
        let (cursor, mut batch) = read.ok_or(Fault::Refused)?;
        // A cursor that the server has closed brings nothing any more.
        batch.ended |= cursor == 0;
        stream.cursor = cursor;
        Ok((stream, batch))
    }

    /// The time of the newest change on the primary, were it by a write that nobody has heard of
    /// yet: whatever was acknowledged before this was asked lies at that time or before it. Later
    /// reads are no older than that.
    async fn asks_the_time(&self) -> Result<ServerTime, Fault> {
        let server = Server::primary_or_router();
        let criteria = server.criteria();
        let database = self.database();
        // Like every reply, this one has the time of the newest entry of the oplog, and it says of
        // the member, as of a moment before that, whether it is the primary still: the driver may
        // not have noticed yet that it is not.
        let asks = database.run_command(doc! { "hello": 1 }).selection_criteria(criteria);
        let mut reply = asks.await.map_err(|error| fault(&error))?;
        if !reply.get_bool("isWritablePrimary").unwrap_or(false) {
            return Err(Fault::Passing);
        }
        if server.is_router() {
            // A router answers by itself. This question goes to every shard, finds nothing in the
            // index, and the answer has the latest of their times.
            let asks = database.run_command(doc! {
                "find": self.sessions.documents.name(),
                "filter": { "expires": bson::DateTime::MIN },
                "limit": 1,
                "readConcern": { "level": "local" },
            });
            let criteria = server.criteria();
            reply = asks.selection_criteria(criteria).await.map_err(|error| fault(&error))?;
        }
        let time = reply.get_timestamp("operationTime").map_err(|_| Fault::Refused)?.into();
        self.sessions.seen.advance(time);
        Ok(time)
    }

    fn database(&self) -> Database {
        let documents = &self.sessions.documents;
        documents.client().database(&documents.namespace().db)
    }

    /// Asks for what instances need to hear, as small as it can be: no insertion, since nobody can
    /// have cached it, no touch, which changes `expires` and `updated` alone, and nothing that was
    /// encrypted anew, since that is what it was.
    fn aggregate(&self, after: Option<Token>) -> Document {
        let changed = doc! { "$map": {
            "input": { "$objectToArray": { "$ifNull": ["$updateDescription.updatedFields", {}] } },
            "in": "$$this.k",
        } };
        // No more than these fields, and the second one.
        let alone = |fields: [&str; 2]| {
            doc! { "$and": [
                { "$setIsSubset": [changed.clone(), fields.to_vec()] },
                { "$in": [fields[1], changed.clone()] },
            ] }
        };
        let wanted = doc! { "$or": [
            { "operationType": { "$in": ["delete", "replace"] } },
            { "operationType": { "$in": ENDS.to_vec() } },
            { "operationType": "update", "$or": [
                { "updateDescription.updatedFields.rev": { "$exists": true } },
                { "updateDescription.removedFields.0": { "$exists": true } },
                { "updateDescription.truncatedArrays.0": { "$exists": true } },
                { "$expr": { "$not": [{ "$or": [
                    alone(document::TOUCHED),
                    alone(document::REENCRYPTED),
                ] }] } },
            ] },
        ] };
        // Beside `_id`, the resume token, which must stay: some 200 bytes on the test server.
        let kept = doc! {
            "key": "$documentKey._id",
            "rev": "$updateDescription.updatedFields.rev",
            "at": "$clusterTime",
            "ends": { "$in": ["$operationType", ENDS.to_vec()] },
        };
        let opens = after.map_or_else(Document::new, |after| doc! { "resumeAfter": after });
        doc! {
            "aggregate": self.sessions.documents.name(),
            "pipeline": [{ "$changeStream": opens }, { "$match": wanted }, { "$project": kept }],
            "cursor": {},
            "readConcern": { "level": "majority" },
        }
    }

    /// Reads a batch; `asked` is the server that was asked for it and could wait for changes. `None`
    /// if this is no answer to such a question.
    fn read(
        &self,
        reply: &Document,
        batch: &str,
        asked: Option<&Server>,
    ) -> Option<(i64, Batch<Token>)> {
        let cursor = reply.get_document("cursor").ok()?;
        let events = cursor.get_array(batch).ok()?;
        let (mut changes, mut ended, mut last) = (Vec::with_capacity(events.len()), false, None);
        for event in events {
            let event = event.as_document()?;
            if let Ok(at) = event.get_timestamp("at") {
                last = last.max(Some(ServerTime::from(at)));
            }
            ended |= event.get_bool("ends").unwrap_or(false);
            changes.extend(change(event));
        }
        if let Some(last) = last {
            // A later read must not go back behind what has been heard.
            self.sessions.seen.advance(last);
        }
        let position = cursor.get_document("postBatchResumeToken").ok();
        let position = position.or_else(|| events.last()?.as_document()?.get_document("_id").ok());
        let waited = match asked {
            Some(server) if server.is_router() => Waited::OnARouter,
            Some(_) => Waited::OnOneServer,
            None => Waited::No,
        };
        let (reached, complete) =
            vouched_for(position.and_then(time_in), last, events.is_empty(), waited);
        let cursor = cursor.get_i64("id").ok()?;
        Some((cursor, Batch { changes, ended, position: position.cloned(), reached, complete }))
    }
}

/// What a call can tell of whether the database answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Sign {
    /// Only a primary answers it.
    OfLife,
    /// Its failure alone: a deposed primary goes on feeding a stream.
    OfTrouble,
}

/// Whether a batch was waited for on the server's side, and where.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Waited {
    No,
    OnOneServer,
    OnARouter,
}

/// Up to which time all changes have been handed over, and whether all from before the question have:
/// by a batch whose resume token holds the time `at`, and whose last change is that of `last`.
fn vouched_for(
    at: Option<ServerTime>,
    last: Option<ServerTime>,
    empty: bool,
    waited: Waited,
) -> (Option<ServerTime>, bool) {
    match at {
        // On one server, an empty batch has left none behind; through a router, changes at this very
        // time may still come from another shard.
        Some(at) if empty && waited == Waited::OnOneServer => {
            (Some(ServerTime(at.0.saturating_add(1))), false)
        }
        Some(at) => (Some(at.min(last.unwrap_or(at))), false),
        None if empty && waited == Waited::OnOneServer => (None, true),
        None => (last, false),
    }
}

/// The reports with which a stream ends.
pub(super) const ENDS: [&str; 4] = ["drop", "rename", "dropDatabase", "invalidate"];

/// The session that a report is about. A key of another form is not one of ours.
fn change(event: &Document) -> Option<Change> {
    let Bson::Binary(key) = event.get("key")? else {
        return None;
    };
    let rev = event.get_binary_generic("rev").ok().and_then(|rev| Rev::from_bytes(rev));
    Some(Change { key: SessionKey::from_bytes(&key.bytes)?, rev })
}

/// The time in a resume token, for a server that writes them as
/// [MongoDB does](https://github.com/mongodb/mongo/blob/master/src/mongo/db/pipeline/README-change-streams.md):
/// a hexadecimal key string that begins with a timestamp, its type 0x82 first. `None` for another
/// server's tokens.
fn time_in(token: &Token) -> Option<ServerTime> {
    let text = token.get_str("_data").ok()?.get(..18)?;
    let time = text.strip_prefix("82")?;
    u64::from_str_radix(time, 16).ok().map(ServerTime)
}

/// The one server that a stream or a question goes to: the first that is fit for it.
#[derive(Clone, Default)]
pub(super) struct Server(Arc<Mutex<Option<(ServerAddress, ServerType)>>>);

impl Server {
    pub(super) fn primary_or_router() -> Self {
        Self::default()
    }

    pub(super) fn criteria(&self) -> SelectionCriteria {
        let this = self.clone();
        SelectionCriteria::Predicate(Arc::new(move |server| this.is(server)))
    }

    fn is(&self, server: &ServerInfo<'_>) -> bool {
        use ServerType::{LoadBalancer, Mongos, RsPrimary, Standalone};

        let kind = server.server_type();
        let mut chosen = lock(&self.0);
        match &*chosen {
            Some((address, _)) => address == server.address(),
            None if matches!(kind, RsPrimary | Mongos | Standalone | LoadBalancer) => {
                *chosen = Some((server.address().clone(), kind));
                true
            }
            None => false,
        }
    }

    fn is_router(&self) -> bool {
        lock(&self.0)
            .as_ref()
            .is_some_and(|(_, kind)| matches!(kind, ServerType::Mongos | ServerType::LoadBalancer))
    }
}

/// What a driver's error means for a stream.
pub(super) fn fault(error: &mongodb::error::Error) -> Fault {
    failure::code(error).map_or(Fault::Passing, fault_of)
}

fn fault_of(code: i32) -> Fault {
    match code {
        // CappedPositionLost, InvalidResumeToken, ChangeStreamFatalError, ChangeStreamHistoryLost.
        136 | 260 | 280 | 286 => Fault::Lost,
        // "The $changeStream stage is only supported on replica sets", IllegalOperation,
        // CommandNotFound, "Unrecognized pipeline stage name".
        40573 | 20 | 59 | 40324 => Fault::Unsupported(
            "this MongoDB server has no change streams (a replica set has them, one of a single \
             member too: start mongod with --replSet and run rs.initiate())",
        ),
        13 => Fault::Unsupported(
            "the MongoDB user may not open a change stream (grant it the role `readWrite`, or \
             `changeStream` and `find` on the collection)",
        ),
        code if PASSING.contains(&code) => Fault::Passing,
        _ => Fault::Refused,
    }
}

/// The errors after which the
/// [specification of change streams](https://github.com/mongodb/specifications/blob/master/source/change-streams/change-streams.md#resumable-error)
/// has a driver resume, and the authentication that a new primary may ask for.
const PASSING: [i32; 22] = [
    6, 7, 18, 43, 63, 89, 91, 133, 150, 189, 234, 237, 262, 9001, 10107, 11600, 11602, 13388,
    13435, 13436, 50, 334,
];

#[cfg(test)]
mod tests;
