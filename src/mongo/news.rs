//! What happens to all sessions, as the database reports it: for [`events`](crate::Events), which want
//! what the [stream of a cache](super::watch) leaves out.
//!
//! Asked for by plain commands too: when the driver resumes a stream by itself and the command for that
//! has to be sent again, the second one has no resume token (mongodb 3.9.1), and what came in
//! between is lost without a word.

use std::collections::VecDeque;
use std::time::Duration;

use bson::spec::ElementType;
use bson::{Document, RawBsonRef, RawDocument, RawDocumentBuf, doc};
use mongodb::{ClientSession, Database};
use tokio::runtime::Handle;
use tokio::time::timeout;

use super::watch::{ENDS, Server, fault};
use super::{MongoStore, Sessions, document};
use crate::backend::{Fault, Rev};
use crate::error::{Error, Result};
use crate::key::SessionKey;
use crate::record::WallTime;

/// The collection that streams are opened on.
#[derive(Clone)]
pub(crate) struct NewsSource(Sessions);

/// An open stream of reports: a cursor on one server.
pub(crate) struct News {
    source: NewsSource,
    session: ClientSession,
    server: Server,
    cursor: i64,
    pace: Duration,
    /// What was handed over and not told yet.
    events: VecDeque<RawDocumentBuf>,
    /// After all of them.
    after: Option<Place>,
    /// After what was told.
    place: Option<Place>,
}

/// From where a stream can go on: a resume token, as the server gave it.
pub(crate) type Place = Document;

/// What became of a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum What {
    Created,
    Changed,
    /// It is to last longer, and nothing else.
    Prolonged,
    Removed,
}

/// A report of one change.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Report {
    pub(crate) key: SessionKey,
    pub(crate) what: What,
    pub(crate) at: WallTime,
    /// Who wrote it, if a store did that others hear of.
    pub(crate) rev: Option<Rev>,
    /// When the session ends, if the change has told.
    pub(crate) expires: Option<WallTime>,
}

impl MongoStore {
    /// # Errors
    ///
    /// [`Config`](crate::ErrorKind::Config) if the pool has no connection to spare.
    pub(crate) fn has_room_for_news(&self) -> Result<()> {
        if matches!(self.inner.own_pool, Some(1 | 2)) {
            return Err(Error::config(
                "`max_pool_size` is below 3, and the streams of changes and of events keep a \
                 connection each: give at least 3",
            ));
        }
        Ok(())
    }

    pub(crate) fn news(&self) -> NewsSource {
        NewsSource(self.inner.sessions.clone())
    }
}

impl NewsSource {
    /// Opens a stream: after a place, or else from now on. The server waits `pace` for reports.
    pub(crate) async fn open(&self, after: Option<Place>, pace: Duration) -> Result<News, Fault> {
        let client = self.0.documents.client();
        let session = client.start_session().causal_consistency(false).await;
        let mut session = session.map_err(|error| fault(&error))?;
        let server = Server::primary_or_router();
        let opens = after
            .as_ref()
            .map_or_else(Document::new, |after| doc! { "resumeAfter": after.clone() });
        let [matches, projects] = pipeline();
        let database = self.database();
        let asks = database.run_command(doc! {
            "aggregate": self.0.documents.name(),
            "pipeline": [doc! { "$changeStream": opens }, matches, projects],
            "cursor": {},
            "readConcern": { "level": "majority" },
        });
        let reply = asks.session(&mut session).selection_criteria(server.criteria()).await;
        let reply = reply.map_err(|error| fault(&error))?;
        let mut news = News {
            source: self.clone(),
            session,
            server,
            cursor: 0,
            pace,
            events: VecDeque::new(),
            after: None,
            place: after,
        };
        news.takes(&reply, "firstBatch").ok_or(Fault::Refused)?;
        if news.place.is_none() {
            // A server whose first answer has no token has one in the next.
            news.asks(Duration::from_millis(1)).await?;
        }
        Ok(news)
    }

    /// Whether the server answers other questions.
    pub(crate) async fn answers(&self) -> bool {
        let database = self.database();
        let hello = database.run_command(doc! { "hello": 1 });
        hello.selection_criteria(Server::primary_or_router().criteria()).await.is_ok()
    }

    fn database(&self) -> Database {
        let documents = &self.0.documents;
        documents.client().database(&documents.namespace().db)
    }
}

impl News {
    /// The next report; `None` if there was none worth telling for the length of the pace.
    pub(crate) async fn next(&mut self) -> Result<Option<Report>, Fault> {
        if self.events.is_empty() {
            self.asks(self.pace).await?;
        }
        let Some(event) = self.events.pop_front() else {
            return if self.cursor == 0 { Err(Fault::Ended) } else { Ok(None) };
        };
        if ENDS.contains(&text(&event, "op")) {
            return Err(Fault::Ended);
        }
        self.place = match event.get_document("_id") {
            Ok(token) => Document::try_from(token).ok(),
            Err(_) => None,
        };
        if self.events.is_empty() && self.after.is_some() {
            self.place.clone_from(&self.after);
        }
        Ok(report(&event))
    }

    pub(crate) fn place(&self) -> Option<Place> {
        self.place.clone()
    }

    async fn asks(&mut self, wait: Duration) -> Result<(), Fault> {
        if self.cursor == 0 {
            return Err(Fault::Ended);
        }
        let database = self.source.database();
        let asks = database.run_command(doc! {
            "getMore": self.cursor,
            "collection": self.source.0.documents.name(),
            "maxTimeMS": i64::try_from(wait.as_millis()).unwrap_or(i64::MAX),
        });
        let criteria = self.server.criteria();
        let reply = asks.session(&mut self.session).selection_criteria(criteria).await;
        let reply = reply.map_err(|error| fault(&error))?;
        self.takes(&reply, "nextBatch").ok_or(Fault::Refused)
    }

    /// Reads a batch; `None` if this is no answer to such a question.
    fn takes(&mut self, reply: &Document, batch: &str) -> Option<()> {
        let cursor = reply.get_document("cursor").ok()?;
        for event in cursor.get_array(batch).ok()? {
            self.events.push_back(RawDocumentBuf::try_from(event.as_document()?).ok()?);
        }
        self.after = cursor.get_document("postBatchResumeToken").ok().cloned();
        if self.events.is_empty() && self.after.is_some() {
            self.place.clone_from(&self.after);
        }
        self.cursor = cursor.get_i64("id").ok()?;
        Some(())
    }
}

impl Drop for News {
    /// Closes the cursor, which the server would keep for minutes.
    fn drop(&mut self) {
        let Ok(runtime) = Handle::try_current() else { return };
        if self.cursor == 0 {
            return;
        }
        let (source, cursor, criteria) = (self.source.clone(), self.cursor, self.server.criteria());
        runtime.spawn(async move {
            let kill = doc! { "killCursors": source.0.documents.name(), "cursors": [cursor] };
            let database = source.database();
            let kills = database.run_command(kill).selection_criteria(criteria);
            drop(timeout(source.0.timeout, kills.into_future()).await);
        });
    }
}

/// No more of each change than is told of.
fn pipeline() -> [Document; 2] {
    let updated = "$updateDescription.updatedFields";
    let wanted = ["insert", "update", "replace", "delete"].into_iter().chain(ENDS);
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

/// `None` for what is not about a session, or about one that is not live yet.
fn report(event: &RawDocument) -> Option<Report> {
    let Ok(Some(RawBsonRef::Binary(key))) = event.get("key") else { return None };
    let key = SessionKey::from_bytes(key.bytes)?;
    let expires = event.get_datetime("expires").ok();
    let expires = expires.map(|at| WallTime::from_millis(at.timestamp_millis()));
    let removed = texts(event, "removed");
    let what = match text(event, "op") {
        "insert" | "replace" if expires.is_none() => return None,
        "insert" => What::Created,
        "replace" => What::Changed,
        "delete" => What::Removed,
        _ if removed.contains(&document::ARRIVED) => What::Created,
        _ => {
            let changed = texts(event, "changed");
            let is_whole = is_empty(event, "cut");
            let alone = |fields: [&str; 2]| {
                removed.is_empty()
                    && is_whole
                    && changed.contains(&fields[1])
                    && changed.iter().all(|field| fields.contains(field))
            };
            if alone(document::REENCRYPTED) {
                return None;
            }
            if alone(document::TOUCHED) { What::Prolonged } else { What::Changed }
        }
    };
    let at = event.get_timestamp("at").ok()?;
    let at = WallTime::from_millis(i64::from(at.time) * 1_000);
    let rev = event.get_binary("rev").ok().and_then(|rev| Rev::from_bytes(rev.bytes));
    Some(Report { key, what, at, rev, expires })
}

fn text<'a>(event: &'a RawDocument, field: &str) -> &'a str {
    event.get_str(field).unwrap_or_default()
}

fn texts<'a>(event: &'a RawDocument, field: &str) -> Vec<&'a str> {
    let Ok(texts) = event.get_array(field) else { return Vec::new() };
    texts.into_iter().filter_map(|text| text.ok()?.as_str()).collect()
}

/// Whether a field is no array with something in it.
fn is_empty(event: &RawDocument, field: &str) -> bool {
    match event.get(field) {
        Ok(Some(value)) if value.element_type() == ElementType::Array => {
            value.as_array().is_none_or(bson::RawArray::is_empty)
        }
        _ => true,
    }
}
