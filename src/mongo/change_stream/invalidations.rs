//! `InvalidationStream`: the change stream that keeps a cache true.
//!
//! What a batch proves depends on which server was asked, and when. The driver's own stream hides both, and its
//! first empty batch comes without a question to the server. So this stream is a
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

/// Opens and reads the change stream of one collection.
#[derive(Clone)]
pub(crate) struct InvalidationStream {
    sessions: SessionCollection,
    /// How long the server waits for changes before it sends an empty batch.
    poll_interval: Duration,
    /// Cancelled when the changes are no longer needed.
    ends: CancellationToken,
}

/// An open stream, and the reader of its replies.
pub(crate) struct OpenStream {
    cursor: Cursor,
    reader: InvalidationReader,
}

impl ChangeSource for InvalidationStream {
    type Stream = OpenStream;
    type Position = ResumeToken;

    fn open(&self, after: Option<ResumeToken>) -> StreamCall<OpenStream, ResumeToken> {
        Box::pin(self.clone().open_stream(after))
    }

    fn next_batch(&self, stream: OpenStream) -> StreamCall<OpenStream, ResumeToken> {
        Box::pin(self.clone().read_next(stream))
    }

    fn primary_time(&self) -> SourceCall<PrimaryTime> {
        let this = self.clone();
        Box::pin(async move { this.read_primary_time().await })
    }
}

impl InvalidationStream {
    pub(crate) fn new(
        sessions: SessionCollection,
        poll_interval: Duration,
        ends: CancellationToken,
    ) -> Self {
        Self { sessions, poll_interval, ends }
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
            // The stream does not report changes from before it begins, so no later read may return a state from
            // before them. A majority may still have one: the stream can begin later than what a majority has.
            self.read_primary_time().await?;
        }
        Ok((OpenStream { cursor, reader }, batch))
    }

    async fn read_next(
        self,
        mut stream: OpenStream,
    ) -> Result<(OpenStream, Batch<ResumeToken>), Fault> {
        let reply = stream.cursor.next_reply(self.poll_interval).await?;
        let mut batch = self.read(&mut stream.reader, reply);
        batch.ended |= stream.cursor.is_closed();
        Ok((stream, batch))
    }

    /// The time of the newest change on the primary. Every write that was acknowledged before this call is at
    /// that time or earlier. Later reads of this store return no older state.
    async fn read_primary_time(&self) -> Result<PrimaryTime, Fault> {
        self.sessions.check_client_open()?;
        let server = PinnedServer::primary_or_router();
        let criteria = server.criteria();
        let database = self.sessions.database();
        // Every reply has the time of the newest oplog entry. This one also says whether the member was still
        // the primary just before that, which the driver may not have noticed yet.
        let hello = database.run_command(doc! { "hello": 1 }).selection_criteria(criteria);
        let mut reply = hello.await.map_err(|error| fault(&error))?;
        if !reply.get_bool("isWritablePrimary").unwrap_or(false) {
            return Err(Fault::Passing);
        }
        if server.is_router() {
            // A router answers `hello` by itself. It sends this query to every shard, which finds nothing in its
            // index, and the reply has the latest of the shards' times.
            let find = database.run_command(doc! {
                "find": self.sessions.documents.name(),
                "filter": { "expires": bson::DateTime::MIN },
                "limit": 1,
                "readConcern": { "level": "local" },
            });
            let criteria = server.criteria();
            reply = find.selection_criteria(criteria).await.map_err(|error| fault(&error))?;
        }
        let time = reply.get_timestamp("operationTime").map_err(|_| unreadable())?.into();
        self.sessions.causal.advance(time);
        Ok(PrimaryTime { time, visible_on: visible_on(&reply, time, server.source()) })
    }

    fn read(&self, reader: &mut InvalidationReader, reply: StreamReply) -> Batch<ResumeToken> {
        let StreamReading { batch, newest_change } = reader.read(reply);
        if let Some(newest_change) = newest_change {
            // A later read must not return a state from before a change that was reported.
            self.sessions.causal.advance(newest_change);
        }
        batch
    }
}

/// The primary that sent this reply to `hello`, if its change stream can see every change up to `time`, its newest
/// oplog entry. A stream sees the changes that a majority has.
fn visible_on(reply: &Document, time: ServerTime, source: StreamSource) -> Option<ServerId> {
    let StreamSource::Member(primary) = source else { return None };
    let majority = || reply.get_document("lastWrite").ok()?.get_document("majorityOpTime").ok();
    match majority() {
        Some(majority) => {
            let at = majority.get_timestamp("ts").ok()?;
            (ServerTime::from(at) >= time).then_some(primary)
        }
        // This server does not report what a majority has.
        None => Some(primary),
    }
}

/// The stages that select the changes that can invalidate an entry, and keep only what the reader needs.
///
/// They leave out:
///
/// - inserts: no instance can have cached the session;
/// - touches, which change `expires` and `updated` alone;
/// - re-encryption, which changes `data` and `reencrypted` alone, and does not change what the data says.
fn pipeline() -> [Document; 2] {
    let changed = doc! { "$map": {
        "input": { "$objectToArray": { "$ifNull": ["$updateDescription.updatedFields", {}] } },
        "in": "$$this.k",
    } };
    // The update changed the second field, and at most the first one beside it.
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
    // `_id`, the resume token, stays too: about 200 bytes on the test server.
    let kept = doc! {
        "key": "$documentKey._id",
        "rev": "$updateDescription.updatedFields.rev",
        "at": "$clusterTime",
        "ends": { "$in": ["$operationType", TERMINAL_EVENTS.to_vec()] },
    };
    [doc! { "$match": wanted }, doc! { "$project": kept }]
}

#[cfg(test)]
mod tests {
    use bson::Timestamp;

    use super::*;

    #[test]
    fn a_primary_can_show_its_newest_entry_once_a_majority_has_it() {
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
        // One server does not report it, the other in another form.
        assert_eq!(visible_on(&doc! {}, time, member()), Some(one.clone()));
        let other = doc! { "lastWrite": { "majorityOpTime": { "ts": 9 } } };
        assert_eq!(visible_on(&other, time, member()), None);
    }
}
