//! What happens to all sessions, as the database reports it: for [`events`](crate::Events), which want
//! what the [stream of a cache](super::watch) leaves out.
//!
//! Nothing is vouched for by this stream, so it can be the driver's own, which resumes by itself.

use std::time::Duration;

use bson::spec::ElementType;
use bson::{Document, RawBsonRef, RawDocument, RawDocumentBuf, doc};
use mongodb::change_stream::ChangeStream;
use mongodb::change_stream::event::ResumeToken;

use super::watch::{ENDS, fault};
use super::{MongoStore, Sessions, document};
use crate::backend::{Fault, Rev};
use crate::error::{Error, Result};
use crate::key::SessionKey;
use crate::record::WallTime;

/// The collection that streams are opened on.
pub(crate) struct NewsSource(Sessions);

/// An open stream of reports.
pub(crate) struct News(ChangeStream<RawDocumentBuf>);

/// From where a stream can go on.
pub(crate) type Place = ResumeToken;

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
        let watch = self.0.documents.watch().pipeline(pipeline()).resume_after(after);
        let stream = watch.max_await_time(pace).await.map_err(|error| fault(&error))?;
        Ok(News(stream.with_type()))
    }
}

impl News {
    /// The next report; `None` if there was none worth telling for the length of the pace.
    pub(crate) async fn next(&mut self) -> Result<Option<Report>, Fault> {
        let event = self.0.next_if_any().await.map_err(|error| fault(&error))?;
        if event.as_ref().is_some_and(|event| ENDS.contains(&text(event, "op"))) {
            return Err(Fault::Ended);
        }
        if event.is_none() && !self.0.is_alive() {
            return Err(Fault::Ended);
        }
        Ok(event.as_deref().and_then(report))
    }

    pub(crate) fn place(&self) -> Option<Place> {
        self.0.resume_token()
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
            let cut = texts(event, "cut").is_empty() && is_empty(event, "cut");
            let touched = changed.iter().all(|field| document::TOUCHED.contains(field));
            let touched = touched && removed.is_empty() && cut;
            if touched && changed.contains(&document::TOUCHED[1]) {
                What::Prolonged
            } else {
                What::Changed
            }
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
