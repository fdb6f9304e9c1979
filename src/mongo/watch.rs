//! The change stream that a cache follows.
//!
//! What is vouched for by a batch depends on knowing which server was asked, when, and after what;
//! and the first empty answer of the driver's own stream comes without asking the server. So this is a
//! [cursor](super::cursor) of plain commands.

use std::time::Duration;

use bson::{Bson, Document, doc};

use super::cursor::{Cursor, ENDS, Handed, Server, Token, fault, unreadable};
use super::{Sessions, document};
use crate::backend::{Asked, Batch, Change, Changes, Fault, Opened, Rev, ServerTime};
use crate::key::SessionKey;

/// How the changes of one collection are asked for.
#[derive(Clone)]
pub(crate) struct Watch {
    sessions: Sessions,
    /// How long the server waits for changes before it sends an empty batch.
    pace: Duration,
}

impl Changes for Watch {
    type Stream = Cursor;
    type Position = Token;

    fn open(&self, after: Option<Token>) -> Opened<Cursor, Token> {
        Box::pin(self.clone().noting(self.clone().opens(after), Sign::OfTrouble))
    }

    fn more(&self, stream: Cursor) -> Opened<Cursor, Token> {
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

    async fn opens(self, after: Option<Token>) -> Result<(Cursor, Batch<Token>), Fault> {
        let is_new = after.is_none();
        let (stream, handed) = self.sessions.clone().open_stream(after, stages()).await?;
        // The first batch is what was there already: empty, it says nothing of what was to come.
        let batch = self.read(handed, Waited::No);
        if is_new {
            // What changed before the stream begins is never reported, so no read from here on may
            // be from before it: what a majority has may be older than what the stream begins with.
            self.asks_the_time().await?;
        }
        Ok((stream, batch))
    }

    async fn goes_on(self, mut stream: Cursor) -> Result<(Cursor, Batch<Token>), Fault> {
        let handed = stream.more(self.pace).await?;
        let is_router = stream.server().is_router();
        let waited = if is_router { Waited::OnARouter } else { Waited::OnOneServer };
        let mut batch = self.read(handed, waited);
        batch.ended |= stream.is_closed();
        Ok((stream, batch))
    }

    /// The time of the newest change on the primary, were it by a write that nobody has heard of
    /// yet: whatever was acknowledged before this was asked lies at that time or before it. Later
    /// reads are no older than that.
    async fn asks_the_time(&self) -> Result<ServerTime, Fault> {
        let server = Server::primary_or_router();
        let criteria = server.criteria();
        let database = self.sessions.database();
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
        let time = reply.get_timestamp("operationTime").map_err(|_| unreadable())?.into();
        self.sessions.seen.advance(time);
        Ok(time)
    }

    fn read(&self, handed: Handed, waited: Waited) -> Batch<Token> {
        let Handed { events, after } = handed;
        let (mut changes, mut ended, mut last) = (Vec::with_capacity(events.len()), false, None);
        for event in &events {
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
        let of_last = || events.last()?.get_document("_id").ok().cloned();
        let position = after.or_else(of_last);
        let at = position.as_ref().and_then(time_in);
        let (reached, complete) = vouched_for(at, last, events.is_empty(), waited);
        Batch { changes, ended, position, reached, complete }
    }
}

/// What instances need to hear, as small as it can be: no insertion, since nobody can
/// have cached it, no touch, which changes `expires` and `updated` alone, and nothing that was
/// encrypted anew, since that is what it was.
fn stages() -> [Document; 2] {
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
    [doc! { "$match": wanted }, doc! { "$project": kept }]
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

#[cfg(test)]
mod tests;
