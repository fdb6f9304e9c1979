//! The change stream that a cache follows.
//!
//! What is vouched for by a batch depends on knowing which server was asked, when, and after what;
//! and the first empty answer of the driver's own stream comes without asking the server. So this is a
//! [cursor](crate::mongo::change_stream::cursor) of plain commands.

use std::time::Duration;

use bson::{Document, doc};
use tokio_util::sync::CancellationToken;

use crate::invalidation::source::{
    Batch, ChangeSource, Fault, PrimaryTime, ServerId, ServerTime, SourceCall, StreamCall,
};
use crate::invalidation::watermark::StreamSource;
use crate::mongo::change_stream::cursor::{
    Cursor, PinnedServer, ResumeToken, StreamReply, TERMINAL_EVENTS, fault, unreadable,
};
use crate::mongo::change_stream::reader::{InvalidationReader, StreamReading};
use crate::mongo::collection::SessionCollection;
use crate::mongo::schema;

/// How the changes of one collection are asked for.
#[derive(Clone)]
pub(crate) struct InvalidationStream {
    sessions: SessionCollection,
    /// How long the server waits for changes before it sends an empty batch.
    pace: Duration,
    /// Cancelled once nobody needs the changes any more.
    ends: CancellationToken,
}

/// An open stream, and what reads its replies.
pub(crate) struct OpenStream {
    cursor: Cursor,
    reader: InvalidationReader,
}

impl ChangeSource for InvalidationStream {
    type Stream = OpenStream;
    type Position = ResumeToken;

    fn open(&self, after: Option<ResumeToken>) -> StreamCall<OpenStream, ResumeToken> {
        Box::pin(self.clone().observe(self.clone().open_stream(after), Liveness::FailureOnly))
    }

    fn next_batch(&self, stream: OpenStream) -> StreamCall<OpenStream, ResumeToken> {
        Box::pin(self.clone().observe(self.clone().read_next(stream), Liveness::FailureOnly))
    }

    fn primary_time(&self) -> SourceCall<PrimaryTime> {
        let (watch, asks) = (self.clone(), self.clone());
        Box::pin(watch.observe(async move { asks.read_primary_time().await }, Liveness::Both))
    }
}

impl InvalidationStream {
    pub(crate) fn new(
        sessions: SessionCollection,
        pace: Duration,
        ends: CancellationToken,
    ) -> Self {
        Self { sessions, pace, ends }
    }

    /// Takes note of what a call tells of the database: whether it answers.
    async fn observe<T>(
        self,
        call: impl Future<Output = Result<T, Fault>>,
        sign: Liveness,
    ) -> Result<T, Fault> {
        let question = self.sessions.metrics.asks(self.sessions.timeout);
        let outcome = call.await;
        question.ends(match outcome {
            Ok(_) => (sign == Liveness::Both).then_some(true),
            Err(Fault::Passing) => Some(false),
            Err(_) => None,
        });
        outcome
    }

    async fn open_stream(
        self,
        after: Option<ResumeToken>,
    ) -> Result<(OpenStream, Batch<ResumeToken>), Fault> {
        let is_new = after.is_none();
        let (cursor, reply) =
            self.sessions.clone().open_stream(after, pipeline(), self.ends.clone()).await?;
        let mut reader = InvalidationReader::new(cursor.server().source());
        let batch = self.read(&mut reader, reply);
        if is_new {
            // What changed before the stream begins is never reported, so no read from here on may
            // be from before it: what a majority has may be older than what the stream begins with.
            self.read_primary_time().await?;
        }
        Ok((OpenStream { cursor, reader }, batch))
    }

    async fn read_next(
        self,
        mut stream: OpenStream,
    ) -> Result<(OpenStream, Batch<ResumeToken>), Fault> {
        let reply = stream.cursor.next_reply(self.pace).await?;
        let mut batch = self.read(&mut stream.reader, reply);
        batch.ended |= stream.cursor.is_closed();
        Ok((stream, batch))
    }

    /// The time of the newest change on the primary, were it by a write that nobody has heard of
    /// yet: whatever was acknowledged before this was asked lies at that time or before it. Later
    /// reads are no older than that.
    async fn read_primary_time(&self) -> Result<PrimaryTime, Fault> {
        self.sessions.check_client_open()?;
        let server = PinnedServer::primary_or_router();
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
        self.sessions.causal.advance(time);
        Ok(PrimaryTime { time, visible_on: visible_on(&reply, time, server.source()) })
    }

    fn read(&self, reader: &mut InvalidationReader, reply: StreamReply) -> Batch<ResumeToken> {
        let StreamReading { batch, newest_change } = reader.read(reply);
        if let Some(newest_change) = newest_change {
            // A later read must not go back behind what has been heard.
            self.sessions.causal.advance(newest_change);
        }
        batch
    }
}

/// The member on which every scan from now on sees all up to `time`, the newest entry of the primary that
/// has answered to `hello`. A stream sees the changes that a majority has.
fn visible_on(reply: &Document, time: ServerTime, source: StreamSource) -> Option<ServerId> {
    let StreamSource::Member(primary) = source else { return None };
    let majority = || reply.get_document("lastWrite").ok()?.get_document("majorityOpTime").ok();
    match majority() {
        Some(majority) => {
            let at = majority.get_timestamp("ts").ok()?;
            (ServerTime::from(at) >= time).then_some(primary)
        }
        // A server that does not say how far a majority is.
        None => Some(primary),
    }
}

/// What instances need to hear, as small as it can be: no insertion, since nobody can
/// have cached it, no touch, which changes `expires` and `updated` alone, and nothing that was
/// encrypted anew, since that is what it was.
fn pipeline() -> [Document; 2] {
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
        { "operationType": { "$in": TERMINAL_EVENTS.to_vec() } },
        { "operationType": "update", "$or": [
            { "updateDescription.updatedFields.rev": { "$exists": true } },
            { "updateDescription.removedFields.0": { "$exists": true } },
            { "updateDescription.truncatedArrays.0": { "$exists": true } },
            { "$expr": { "$not": [{ "$or": [
                alone(schema::TOUCH_FIELDS),
                alone(schema::REENCRYPT_FIELDS),
            ] }] } },
        ] },
    ] };
    // Beside `_id`, the resume token, which must stay: some 200 bytes on the test server.
    let kept = doc! {
        "key": "$documentKey._id",
        "rev": "$updateDescription.updatedFields.rev",
        "at": "$clusterTime",
        "ends": { "$in": ["$operationType", TERMINAL_EVENTS.to_vec()] },
    };
    [doc! { "$match": wanted }, doc! { "$project": kept }]
}

/// What a call can tell of whether the database answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Liveness {
    /// Only a primary answers it.
    Both,
    /// Its failure alone: a deposed primary goes on feeding a stream.
    FailureOnly,
}

#[cfg(test)]
mod tests {
    use bson::Timestamp;

    use super::*;

    #[test]
    fn a_primary_vouches_for_its_own_scans_once_a_majority_has_its_newest_entry() {
        let one = ServerId("one:27017".into());
        let member = || StreamSource::Member(one.clone());
        let time = ServerTime::from(Timestamp { time: 9, increment: 2 });
        let hello = |increment| {
            let ts = Timestamp { time: 9, increment };
            doc! { "isWritablePrimary": true, "lastWrite": { "majorityOpTime": { "ts": ts, "t": 1 } } }
        };
        assert_eq!(visible_on(&hello(1), time, member()), None);
        assert_eq!(visible_on(&hello(2), time, member()), Some(one.clone()));
        assert_eq!(visible_on(&hello(3), time, member()), Some(one.clone()));
        assert_eq!(visible_on(&hello(3), time, StreamSource::Router), None);
        // A server that does not say it, and one that says it in another form.
        assert_eq!(visible_on(&doc! {}, time, member()), Some(one.clone()));
        let other = doc! { "lastWrite": { "majorityOpTime": { "ts": 9 } } };
        assert_eq!(visible_on(&other, time, member()), None);
    }
}
