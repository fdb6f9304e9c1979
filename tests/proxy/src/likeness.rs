//! Changes the test server's replies to those of MongoDB, where they concern change streams.
//!
//! | | the test server | MongoDB, and through the proxy |
//! |---|---|---|
//! | a token | a BSON document in hexadecimal digits | a key string that begins with the time |
//! | the first token of a new stream | the time of its clock | the newest entry's time and one tick
//! more |
//! | the token of an empty batch | the time of its clock | the time of the newest *examined* entry,
//! once that is later than the last token |
//! | `operationTime` of `hello` | a tick of its own | the newest entry's |
//! | a command with `afterClusterTime` | a tick of its own | no tick |
//!
//! MongoDB's rules are those of `getStartTimeForNewStream` in
//! [document_source_change_stream.cpp](https://github.com/mongodb/mongo/blob/master/src/mongo/db/pipeline/document_source_change_stream.cpp)
//! and of `_latestOplogTimestamp` in
//! [plan_executor_pipeline.cpp](https://github.com/mongodb/mongo/blob/master/src/mongo/db/pipeline/plan_executor_pipeline.cpp).

use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bson::{Bson, DateTime, Document, doc};

use crate::message::{AFTER_CLUSTER_TIME, Message, number};
use crate::oplog::{Connection, Oplog, operation_time};
use crate::token::{Own, Time, own_in, time_of, timestamp};

/// Rewrites requests and replies. Clones share what they know of the server.
#[derive(Clone, Debug)]
pub(crate) struct Likeness {
    oplog: Oplog,
    known: Arc<Mutex<Known>>,
}

#[derive(Debug)]
struct Known {
    /// The server's last reply to a `hello`, of any connection.
    hello: Document,
    /// The last token of each open change stream, by the id of its cursor.
    tokens: HashMap<i64, Document>,
}

/// How to rewrite the reply to a request.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Rewrite {
    /// The request was a `hello` of the application. The server received a `ping` instead.
    Hello,
    /// The same for a `hello` by which a driver begins a connection or first contacts the server.
    Handshake { legacy: bool },
    /// The request opens a change stream, after this token or from now on.
    Opens(Option<Document>),
    /// The request is a `getMore` of this cursor.
    More(i64),
    /// The reply stays, but the proxy learns from this `hello`.
    Learn,
}

impl Likeness {
    /// `None` for a server that needs no rewriting: it has MongoDB's own tokens, or no change
    /// streams.
    pub(crate) async fn of(server: SocketAddr) -> io::Result<Option<Self>> {
        let Some(oplog) = Oplog::follow(server).await? else { return Ok(None) };
        let mut connection = Connection::open(server).await?;
        let hello = connection.ask(doc! { "hello": 1, "$db": "admin" }).await?;
        let known = Arc::new(Mutex::new(Known { hello, tokens: HashMap::new() }));
        Ok(Some(Self { oplog, known }))
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether a command of this name may have to be rewritten.
    pub(crate) fn concerns(name: &str, request: &Message) -> bool {
        ["hello", "isMaster", "ismaster", "aggregate", "getMore", "killCursors"].contains(&name)
            || request.waits_for_a_time()
    }

    /// How to rewrite the reply to this command. Changes the command itself as needed.
    pub(crate) fn request(&self, command: &mut Document) -> Option<Rewrite> {
        let name = command.keys().next()?.clone();
        if let Ok(concern) = command.get_document_mut("readConcern") {
            // A single server need not wait for the time, and this field alone would advance its
            // clock.
            concern.remove(AFTER_CLUSTER_TIME);
        }
        match &*name {
            // The driver's own `hello`s have no session.
            "hello" if command.contains_key("lsid") => {
                let rest = std::mem::take(command);
                command.insert("ping", 1);
                command.extend(rest.into_iter().filter(|(key, _)| key != "hello"));
                Some(Rewrite::Hello)
            }
            "hello" | "isMaster" | "ismaster" => {
                if ONLY_THE_SERVER_ANSWERS.iter().any(|field| command.contains_key(field)) {
                    return Some(Rewrite::Learn);
                }
                *command = doc! { "ping": 1, "$db": "admin" };
                Some(Rewrite::Handshake { legacy: name != "hello" })
            }
            "aggregate" => {
                let stages = command.get_array_mut("pipeline").ok()?;
                let first = stages.first_mut()?.as_document_mut()?;
                let stream = first.get_document_mut("$changeStream").ok()?;
                if stream.contains_key("startAtOperationTime") {
                    return None;
                }
                let Some(field) =
                    ["resumeAfter", "startAfter"].into_iter().find(|it| stream.contains_key(it))
                else {
                    return Some(Rewrite::Opens(None));
                };
                // The server judges a token of another form.
                let after = stream.get_document(field).ok()?.clone();
                stream.insert(field, own_in(&after)?);
                Some(Rewrite::Opens(Some(after)))
            }
            "getMore" => {
                let cursor = number(command.get("getMore"))?;
                self.known().tokens.contains_key(&cursor).then_some(Rewrite::More(cursor))
            }
            "killCursors" => {
                let mut known = self.known();
                for cursor in command.get_array("cursors").ok()? {
                    number(Some(cursor)).and_then(|cursor| known.tokens.remove(&cursor));
                }
                None
            }
            _ => None,
        }
    }

    /// Rewrites the reply.
    pub(crate) async fn reply(&self, rewrite: &Rewrite, reply: &mut Document) -> io::Result<()> {
        if number(reply.get("ok")) != Some(1) {
            return Ok(());
        }
        match rewrite {
            Rewrite::Learn => self.known().hello = learned(reply.clone()),
            Rewrite::Hello => {
                let applied = self.oplog.applied(operation_time(reply).unwrap_or_default()).await?;
                self.hello(reply, Some(applied));
            }
            Rewrite::Handshake { legacy } => {
                self.hello(reply, None);
                reply.insert("helloOk", true);
                if *legacy {
                    let is_primary = reply.get_bool("isWritablePrimary").unwrap_or(false);
                    reply.insert("ismaster", is_primary);
                    reply.remove("isWritablePrimary");
                }
            }
            Rewrite::Opens(after) => {
                // Before that, the proxy does not know the time of the entry at which the stream
                // begins.
                self.oplog.applied(operation_time(reply).unwrap_or_default()).await?;
                let last = after.clone();
                self.stream(reply, "firstBatch", last);
            }
            Rewrite::More(cursor) => {
                let last = self.known().tokens.get(cursor).cloned();
                self.stream(reply, "nextBatch", last);
                let is_open = reply
                    .get_document("cursor")
                    .is_ok_and(|it| it.get_i64("id").is_ok_and(|id| id != 0));
                if !is_open {
                    self.known().tokens.remove(cursor);
                }
            }
        }
        Ok(())
    }

    /// Turns the reply to a `ping` into one to a `hello`. `applied` is the time of the newest
    /// entry, if the reply should contain it.
    fn hello(&self, reply: &mut Document, applied: Option<Time>) {
        let time = applied.or_else(|| operation_time(reply)).unwrap_or_default();
        let time = Bson::Timestamp(timestamp(time));
        let mut hello = self.known().hello.clone();
        hello.insert("localTime", DateTime::now());
        if let Ok(written) = hello.get_document_mut("lastWrite") {
            for field in ["opTime", "majorityOpTime"] {
                if let Ok(at) = written.get_document_mut(field) {
                    at.insert("ts", time.clone());
                }
            }
        }
        if let Some(cluster_time) = reply.remove("$clusterTime") {
            hello.insert("$clusterTime", cluster_time);
        }
        hello.insert("operationTime", time);
        *reply = hello;
    }

    /// Rewrites the tokens of a batch. `last` is the token before the batch, `None` for a new
    /// stream.
    fn stream(&self, reply: &mut Document, batch: &str, last: Option<Document>) {
        let Ok(cursor) = reply.get_document_mut("cursor") else { return };
        let mut of_last_event = None;
        for event in cursor.get_array_mut(batch).into_iter().flatten() {
            let Some(event) = event.as_document_mut() else { continue };
            if let Some(own) = event.get_document("_id").ok().and_then(Own::read) {
                let token = own.at(own.time);
                event.insert("_id", token.clone());
                of_last_event = Some(token);
            }
        }
        let own = cursor.get_document("postBatchResumeToken").ok().and_then(Own::read);
        let Some(own) = own else { return };
        let token = if own.is_of_an_event() && of_last_event.is_some() {
            own.at(own.time)
        } else {
            let examined = self.oplog.time_at(own.position);
            after_batch(&own, examined, of_last_event.or(last))
        };
        cursor.insert("postBatchResumeToken", token.clone());
        if let Some(id) = number(cursor.get("id")).filter(|id| *id != 0) {
            self.known().tokens.insert(id, token);
        }
    }
}

/// A `hello` with one of these fields is for the server itself: it waits for a change, or logs in.
const ONLY_THE_SERVER_ANSWERS: [&str; 4] =
    ["topologyVersion", "compression", "saslSupportedMechs", "speculativeAuthenticate"];

/// The reply to a `hello`, learned from the reply to one or to its predecessor `isMaster`.
fn learned(mut reply: Document) -> Document {
    // Fields that only the reply on a new connection contains.
    for field in ["helloOk", "compression", "saslSupportedMechs", "speculativeAuthenticate"] {
        reply.remove(field);
    }
    if let Some(is_primary) = reply.remove("ismaster") {
        reply.insert("isWritablePrimary", is_primary);
    }
    reply
}

/// The token after a batch. `own` is the server's token. `examined` is the time of the newest entry
/// up to there. `last` is the token before it, `None` for a new stream.
fn after_batch(own: &Own, examined: Option<Time>, last: Option<Document>) -> Document {
    match last {
        // One tick after the newest entry, although there may be no entry of that time yet.
        None => own.at(examined.unwrap_or(own.time).saturating_add(1)),
        // It advances only past what was examined.
        Some(last) => match examined {
            Some(examined) if Some(examined) > time_of(&last) => own.at(examined),
            _ => last,
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::token::made_by_hand;

    /// The oplog's entries are at the positions 5 and 8. These are their times, whatever the test
    /// server's clock shows.
    const FIRST: Time = 0x63C1_E0A4_0000_0002;
    const SECOND: Time = 0x63C1_E0A4_0000_0006;
    /// The clock, which ticks at each `hello`.
    const CLOCK: Time = 0x63C1_E0A4_0000_0009;

    fn likeness() -> Likeness {
        let oplog = Oplog::made_by_hand(&[(5, FIRST), (8, SECOND)]);
        let known = Known { hello: doc! {}, tokens: HashMap::new() };
        Likeness { oplog, known: Arc::new(Mutex::new(known)) }
    }

    /// The token of an empty batch after which the test server has examined all up to `position`.
    fn mark(position: i64) -> Document {
        made_by_hand(position, CLOCK, "", "")
    }

    fn batch(field: &str, events: Vec<Document>, token: Document) -> Document {
        doc! {
            "cursor": { field: events, "postBatchResumeToken": token, "id": 3_i64, "ns": "app.sessions" },
            "ok": 1.0,
        }
    }

    fn begins(token: &Document) -> String {
        token.get_str("_data").unwrap()[..18].to_owned()
    }

    /// The token after a batch of the stream, rewritten.
    fn token(likeness: &Likeness, field: &str, mut reply: Document) -> Document {
        let last = likeness.known().tokens.get(&3).cloned();
        likeness.stream(&mut reply, field, last);
        let cursor = reply.get_document("cursor").unwrap();
        cursor.get_document("postBatchResumeToken").unwrap().clone()
    }

    #[test]
    fn new_stream_begins_one_tick_ahead_and_advances_only_past_examined_entries() {
        let likeness = likeness();
        let first = token(&likeness, "firstBatch", batch("firstBatch", vec![], mark(5)));
        assert_eq!(begins(&first), "8263C1E0A400000003", "the entry's time and one tick");
        // If nothing is new, the token stays the same, even if the clock has advanced.
        let second = token(&likeness, "nextBatch", batch("nextBatch", vec![], mark(5)));
        assert_eq!(second, first);
        let third = token(&likeness, "nextBatch", batch("nextBatch", vec![], mark(7)));
        assert_eq!(third, first, "an examined position without an entry is no later time");
        let fourth = token(&likeness, "nextBatch", batch("nextBatch", vec![], mark(8)));
        assert_eq!(begins(&fourth), "8263C1E0A400000006", "of the entry that was filtered out");
        assert_eq!(own_in(&fourth), Some(mark(8)));
    }

    #[test]
    fn first_token_stays_if_the_next_entry_has_its_time() {
        let oplog = Oplog::made_by_hand(&[(5, FIRST), (6, FIRST + 1)]);
        let likeness = Likeness { oplog, ..likeness() };
        let first = token(&likeness, "firstBatch", batch("firstBatch", vec![], mark(5)));
        let second = token(&likeness, "nextBatch", batch("nextBatch", vec![], mark(6)));
        assert_eq!(second, first, "it moves only past a greater time");
    }

    #[test]
    fn events_have_their_own_times_and_the_batch_has_the_last() {
        let likeness = likeness();
        let event = |position, time| {
            let id = made_by_hand(position, time, "app.sessions", "key");
            doc! { "_id": id, "rev": 1 }
        };
        let last = made_by_hand(8, SECOND, "app.sessions", "key");
        let mut reply = batch("nextBatch", vec![event(5, FIRST), event(8, SECOND)], last.clone());
        likeness.stream(&mut reply, "nextBatch", Some(doc! { "_data": "8200000000000000" }));
        let cursor = reply.get_document("cursor").unwrap();
        let events = cursor.get_array("nextBatch").unwrap();
        let ids = events.iter().map(|event| event.as_document().unwrap().get_document("_id"));
        let ids: Vec<_> = ids.map(|id| id.unwrap().clone()).collect();
        assert_eq!(begins(&ids[0]), "8263C1E0A400000002");
        assert_eq!(begins(&ids[1]), "8263C1E0A400000006");
        assert_eq!(cursor.get_document("postBatchResumeToken").unwrap(), &ids[1]);
        assert_eq!(events[1].as_document().unwrap().get_i32("rev").unwrap(), 1, "all else stays");
        assert_eq!(likeness.known().tokens.get(&3), Some(&ids[1]));
        // The test server sends the same token again, or a mark, if nothing came since.
        for own in [last, mark(8)] {
            assert_eq!(token(&likeness, "nextBatch", batch("nextBatch", vec![], own)), ids[1]);
        }
    }

    #[test]
    fn stream_resumes_with_the_servers_own_token() {
        let likeness = likeness();
        let own = mark(5);
        let given = Own::read(&own).unwrap().at(FIRST + 1);
        let mut command = doc! {
            "aggregate": "sessions",
            "pipeline": [{ "$changeStream": { "resumeAfter": given.clone() } }, { "$match": {} }],
        };
        let rewrite = likeness.request(&mut command);
        assert_eq!(rewrite, Some(Rewrite::Opens(Some(given.clone()))));
        let wanted = doc! {
            "aggregate": "sessions",
            "pipeline": [{ "$changeStream": { "resumeAfter": own.clone() } }, { "$match": {} }],
        };
        assert_eq!(command, wanted);
        let mut reply = batch("firstBatch", vec![], own);
        likeness.stream(&mut reply, "firstBatch", Some(given.clone()));
        let cursor = reply.get_document("cursor").unwrap();
        assert_eq!(cursor.get_document("postBatchResumeToken").unwrap(), &given);
    }

    #[test]
    fn hello_ticks_the_clock_only_if_the_server_must_answer_it() {
        let likeness = likeness();
        let mut asked = doc! { "hello": 1, "lsid": { "id": 1 }, "$db": "app" };
        assert_eq!(likeness.request(&mut asked), Some(Rewrite::Hello));
        assert_eq!(asked, doc! { "ping": 1, "lsid": { "id": 1 }, "$db": "app" });
        let mut handshake = doc! { "isMaster": 1, "helloOk": true, "client": {}, "$db": "admin" };
        let rewrite = likeness.request(&mut handshake);
        assert_eq!(rewrite, Some(Rewrite::Handshake { legacy: true }));
        assert_eq!(handshake, doc! { "ping": 1, "$db": "admin" });
        let mut waits = doc! { "hello": 1, "topologyVersion": {}, "maxAwaitTimeMS": 10_000 };
        let before = waits.clone();
        assert_eq!(likeness.request(&mut waits), Some(Rewrite::Learn));
        assert_eq!(waits, before);
        let reply = learned(doc! { "ismaster": true, "helloOk": true, "setName": "rs0" });
        assert_eq!(reply, doc! { "setName": "rs0", "isWritablePrimary": true });
        let after = doc! { "level": "majority", "afterClusterTime": timestamp(FIRST) };
        let mut waits = doc! { "find": "sessions", "readConcern": after };
        assert!(Likeness::concerns("find", &Message::reply(0, &waits).unwrap()));
        assert_eq!(likeness.request(&mut waits), None);
        assert_eq!(waits, doc! { "find": "sessions", "readConcern": { "level": "majority" } });
        assert!(!Likeness::concerns("find", &Message::reply(0, &waits).unwrap()));
        let mut other = doc! { "aggregate": "sessions", "pipeline": [{ "$match": {} }] };
        assert_eq!(likeness.request(&mut other), None);
    }
}
