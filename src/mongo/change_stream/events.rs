//! `EventSource`: the change stream behind [`Events`](crate::Events). It reports inserts and touches too, which the
//! [invalidation stream](crate::mongo::change_stream::invalidations) leaves out.

use std::collections::VecDeque;
use std::time::Duration;

use bson::spec::BinarySubtype;
use bson::{Bson, Document, doc};
use tokio::time::sleep;

use crate::error::{Error, Result};
use crate::invalidation::source::Fault;
use crate::mongo::MongoStore;
pub(crate) use crate::mongo::change_stream::cursor::ResumeToken;
use crate::mongo::change_stream::cursor::{Cursor, PinnedServer, StreamReply, TERMINAL_EVENTS};
use crate::mongo::collection::SessionCollection;
use crate::mongo::schema;
use crate::session::id::SessionKey;
use crate::session::revision::Rev;
use crate::time::WallTime;

/// Opens streams of the events of one collection.
#[derive(Clone)]
pub(crate) struct EventSource(SessionCollection);

/// An open stream of events.
pub(crate) struct EventStream {
    cursor: Cursor,
    poll_interval: Duration,
    /// The events of the last reply that `next` has not returned yet.
    events: VecDeque<Document>,
    /// The position after all of `events`, if the server reported one.
    after: Option<ResumeToken>,
    /// The position after the last event that `next` returned.
    resume_token: Option<ResumeToken>,
    /// Whether the last reply contained an event.
    was_busy: bool,
}

/// The pause before the next request after a reply that contained events: the next reply then carries more. It also
/// helps a process that ends right after its last write: a command that is sent while the runtime ends may make
/// the driver panic.
const BATCH_DEBOUNCE: Duration = Duration::from_millis(5);

/// What happened to a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ChangeKind {
    Created,
    Changed,
    /// Only its expiry was extended.
    Touched,
    Removed,
}

/// One change of a session.
#[derive(Clone, Copy, Debug)]
pub(crate) struct SessionChange {
    pub(crate) key: SessionKey,
    pub(crate) kind: ChangeKind,
    pub(crate) at: WallTime,
    /// The mark of the write. `None` for a removal, a touch and an edit by hand.
    pub(crate) rev: Option<Rev>,
    /// When the session expires, if the change contains it.
    pub(crate) expires: Option<WallTime>,
}

impl MongoStore {
    /// Fails with [`Config`](crate::ErrorKind::Config) if the pool has no connection to spare for a second
    /// change stream.
    pub(crate) fn check_pool_for_events(&self) -> Result<()> {
        if matches!(self.inner.pool_size, Some(1 | 2)) {
            return Err(Error::config(
                "`max_pool_size` is below 3, and the streams of changes and of events keep a \
                 connection each: give at least 3",
            ));
        }
        Ok(())
    }

    pub(crate) fn event_source(&self) -> EventSource {
        EventSource(self.inner.collection.clone())
    }
}

impl EventSource {
    /// Opens a stream after a position, or from now on. The server waits at most `poll_interval` for events.
    pub(crate) async fn open(
        &self,
        after: Option<ResumeToken>,
        poll_interval: Duration,
    ) -> Result<EventStream, Fault> {
        let (cursor, reply) =
            self.0.clone().open_stream(after.clone(), pipeline(), self.0.closed.clone()).await?;
        let events = VecDeque::new();
        let mut stream = EventStream {
            cursor,
            poll_interval,
            events,
            after: None,
            resume_token: after,
            was_busy: false,
        };
        stream.buffer(reply);
        if stream.resume_token.is_none() {
            // Some servers send no token in the first reply. The second one has it.
            stream.fetch(Duration::from_millis(1)).await?;
        }
        Ok(stream)
    }

    /// Whether the server answers `hello`.
    pub(crate) async fn is_answering(&self) -> bool {
        let database = self.0.database();
        let hello = database.run_command(doc! { "hello": 1 });
        hello.selection_criteria(PinnedServer::primary_or_router().criteria()).await.is_ok()
    }
}

impl EventStream {
    /// The next change. `None` if none came within the poll interval, or the next event is not about a session.
    pub(crate) async fn next(&mut self) -> Result<Option<SessionChange>, Fault> {
        if self.events.is_empty() {
            self.fetch(self.poll_interval).await?;
        }
        let Some(event) = self.events.pop_front() else {
            return if self.cursor.is_closed() { Err(Fault::Ended) } else { Ok(None) };
        };
        if TERMINAL_EVENTS.contains(&text(&event, "op")) {
            return Err(Fault::Ended);
        }
        self.resume_token = event.get_document("_id").ok().cloned();
        if self.events.is_empty() && self.after.is_some() {
            self.resume_token.clone_from(&self.after);
        }
        Ok(session_change(&event))
    }

    pub(crate) fn resume_token(&self) -> Option<ResumeToken> {
        self.resume_token.clone()
    }

    async fn fetch(&mut self, wait: Duration) -> Result<(), Fault> {
        if self.cursor.is_closed() {
            return Err(Fault::Ended);
        }
        if self.was_busy {
            sleep(BATCH_DEBOUNCE).await;
        }
        let reply = self.cursor.next_reply(wait).await?;
        self.buffer(reply);
        Ok(())
    }

    fn buffer(&mut self, reply: StreamReply) {
        self.was_busy = !reply.events.is_empty();
        self.events.extend(reply.events);
        self.after = reply.after;
        if self.events.is_empty() && self.after.is_some() {
            self.resume_token.clone_from(&self.after);
        }
    }
}

/// The stages that keep of each change only what [`session_change`] reads.
fn pipeline() -> [Document; 2] {
    let updated = "$updateDescription.updatedFields";
    let wanted = ["insert", "update", "replace", "delete"].into_iter().chain(TERMINAL_EVENTS);
    let one_of = |field: &str| doc! { "$ifNull": [format!("{updated}.{field}"), format!("$fullDocument.{field}")] };
    [
        doc! { "$match": { "operationType": { "$in": wanted.collect::<Vec<_>>() } } },
        doc! { "$project": {
            "op": "$operationType",
            "key": "$documentKey._id",
            "at": "$clusterTime",
            "rev": one_of("rev"),
            "expires": one_of("expires"),
            "removed": "$updateDescription.removedFields",
            "cut": "$updateDescription.truncatedArrays",
            "changed": { "$map": {
                "input": { "$objectToArray": { "$ifNull": [updated, {}] } },
                "in": "$$this.k",
            } },
        } },
    ]
}

/// The change that an event reports. `None` if it is not about a session, or about one that is still being imported,
/// or if the session was only encrypted again.
pub(crate) fn session_change(event: &Document) -> Option<SessionChange> {
    let Some(Bson::Binary(key)) = event.get("key") else { return None };
    if key.subtype != BinarySubtype::Generic {
        return None;
    }
    let key = SessionKey::from_bytes(&key.bytes)?;
    let expires = event.get_datetime("expires").ok();
    let expires = expires.map(|at| WallTime::from_millis(at.timestamp_millis()));
    let removed = texts(event, "removed");
    let kind = match text(event, "op") {
        "insert" | "replace" if expires.is_none() => return None,
        "insert" => ChangeKind::Created,
        "replace" => ChangeKind::Changed,
        "delete" => ChangeKind::Removed,
        _ if removed.contains(&schema::IMPORTING) => ChangeKind::Created,
        _ => {
            let changed = texts(event, "changed");
            let is_whole = event.get_array("cut").ok().is_none_or(Vec::is_empty);
            // The update changed the second field, and at most the first one beside it.
            let alone = |fields: [&str; 2]| {
                removed.is_empty()
                    && is_whole
                    && changed.contains(&fields[1])
                    && changed.iter().all(|field| fields.contains(field))
            };
            if alone(schema::REENCRYPT_FIELDS) {
                return None;
            }
            if alone(schema::TOUCH_FIELDS) { ChangeKind::Touched } else { ChangeKind::Changed }
        }
    };
    let at = event.get_timestamp("at").ok()?;
    let at = WallTime::from_millis(i64::from(at.time) * 1_000);
    let rev = event.get_binary_generic("rev").ok().and_then(|rev| Rev::from_bytes(rev));
    Some(SessionChange { key, kind, at, rev, expires })
}

fn text<'a>(event: &'a Document, field: &str) -> &'a str {
    event.get_str(field).unwrap_or_default()
}

fn texts<'a>(event: &'a Document, field: &str) -> Vec<&'a str> {
    let Ok(texts) = event.get_array(field) else { return Vec::new() };
    texts.iter().filter_map(Bson::as_str).collect()
}
