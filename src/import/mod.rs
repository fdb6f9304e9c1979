//! Takes over the sessions that another store has written, so that an upgrade logs nobody out.
//!
//! ```no_run
//! use tower_sessions_moka_mongodb_store::mongodb::bson::Document;
//! use tower_sessions_moka_mongodb_store::{MongoStore, import, mongodb};
//!
//! # async fn example() -> Result<(), Box<dyn std::error::Error>> {
//! let client = mongodb::Client::with_uri_str("mongodb://localhost").await?;
//! let old = client.database("app").collection::<Document>("sessions");
//! let mongo = MongoStore::connect("mongodb://localhost/app").await?;
//! let told = import::tower_sessions_mongodb_store(&old)
//!     .into(&mongo)
//!     .on_progress(|progress| println!("{} read", progress.read))
//!     .run()
//!     .await?;
//! println!("{} sessions were taken over, {} could not be read", told.imported, told.unreadable);
//! # Ok(())
//! # }
//! ```
//!
//! # When
//!
//! After the last instance of the old app has stopped, and before the first of the new one starts: the
//! old one would go on writing sessions that were taken over already, and a user whose session is
//! still to come would get a new one. Each instance of the new one may run it before it serves. Both
//! apps may use the same collection (both call it `sessions` if nobody says otherwise).
//!
//! The browser must find its cookie again: give the new layer the name that the old one had
//! (`with_name`; it once was `tower.sid`), the same path and domain, and its key if it was signed or
//! private.
//!
//! # What it may be relied on for
//!
//! - Each session keeps its id. It is the one way in which an id comes into a store that was not drawn
//!   by it: tower-sessions drew it, on a server of yours.
//! - A session that is in the store already is never overwritten.
//! - It may be interrupted at any point and run again, as often as one likes, and two may overlap, as of
//!   two instances that both import when they start. What was taken over once is not taken over again:
//!   a session that was ended here since does not rise from the old collection. A `run` that was
//!   dropped goes on to the end of its page.
//! - It is stored as the store would store it: with its [`owner`](crate::MongoStoreBuilder::owner), and
//!   encrypted if the store encrypts. Its expiry stays what it was, whatever `ttl` is.
//!
//! For that, each page goes through four steps.
//!
//! 1. The sessions are stored, but are not live yet: they have arrived. Each arrival has a `rev` that no
//!    other one ever has. Where another run's is in the way, that one counts.
//! 2. The old documents are marked with the `rev` of their arrival (`imported`), unless they have a mark.
//! 3. The arrivals whose `rev` is the mark are made live, and others removed.
//! 4. The old documents are removed, unless [they are to be kept](Import::keep_source).
//!
//! So nothing rises, wherever a run stalls and whatever another one does meanwhile. A mark never
//! changes, so for each old document there is one arrival that may become live. It was stored once, so
//! it becomes live once: after that, and after its end, nothing has its `rev` and is not live. What a
//! slower run stores after that end has another `rev`, and is removed by that run. If that one does not
//! come to it, it stays a session that is not live until its expiry, and a complete run after that
//! removes it.
//!
//! Nor is anything lost. A mark is set after its arrival was stored, and an arrival is removed only when
//! the mark is seen to be another one, or its old document to be gone. And that one goes last, after the
//! arrival of the mark was made live. So between any two steps, either the old document is there without
//! a mark, for any run to begin with, or the arrival of its mark is there, for any run to make live, or
//! the session has been live.

#[cfg(any(test, fuzzing))]
pub(crate) mod fuzzing;
mod values;

use std::collections::BTreeMap;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::str::FromStr;

use bson::spec::ElementType;
use bson::{Document, RawBsonRef, RawDocument};
use mongodb::Collection;
use serde::Deserialize;
use serde::de::IgnoredAny;
use tokio_util::sync::CancellationToken;
use tower_sessions_core::session::Id;

use crate::error::{Error, ErrorKind, Result};
use crate::import::values::Values;
use crate::mongo::MongoStore;
use crate::mongo::ops::import::{Claim, ImportSteps};
use crate::session::Data;
use crate::session::id::RawId;
use crate::session::id::SessionKey;
use crate::telemetry::spans;
use crate::time::WallTime;

/// The sessions that tower-sessions-mongodb-store 0.11 has written to `collection`.
pub fn tower_sessions_mongodb_store<T: Send + Sync>(collection: &Collection<T>) -> Source {
    Source { documents: collection.clone_with_type() }
}

/// A collection that sessions are to be taken from.
#[derive(Clone)]
#[must_use = "an import does nothing until it is run"]
pub struct Source {
    documents: Collection<Document>,
}

impl Source {
    /// Says which store is to have them.
    pub fn into_store(self, store: &MongoStore) -> Import {
        Import {
            source: self.documents,
            store: store.clone(),
            keeps_source: false,
            on_progress: Box::new(|_| ()),
        }
    }
}

impl fmt::Debug for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let namespace = self.documents.namespace().to_string();
        f.debug_struct("Source").field("namespace", &namespace).finish()
    }
}

/// An import that is ready to be run.
#[must_use = "an import does nothing until it is run"]
pub struct Import {
    source: Collection<Document>,
    store: MongoStore,
    keeps_source: bool,
    on_progress: Box<dyn FnMut(&Progress) + Send>,
}

/// How far an import is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Progress {
    /// Documents of the old collection that were looked at.
    pub read: u64,
    /// Sessions that this run has made live in the store.
    pub imported: u64,
    /// Sessions that had expired. They are left where they are.
    pub expired: u64,
    /// Sessions that the store had already, or once had: an earlier run took them over.
    pub already_there: u64,
    /// Documents that are not sessions as the old store wrote them. They are left where they are.
    pub unreadable: u64,
    /// Why, and how many for each reason. No reason quotes what was found.
    pub reasons: BTreeMap<&'static str, u64>,
}

impl Import {
    /// Leaves the old documents in their collection, each with a field `imported`. Default: they are
    /// removed once they were taken over.
    ///
    /// So the old app can be started again, if the new one is not what it should be. What it saves from
    /// then on keeps the mark, and is not imported by another run.
    pub fn keep_source(mut self) -> Self {
        self.keeps_source = true;
        self
    }

    /// Has `tell` called after each page of up to 500 documents. It should return soon, since the
    /// import waits for it.
    pub fn on_progress(mut self, tell: impl FnMut(&Progress) + Send + 'static) -> Self {
        self.on_progress = Box::new(tell);
        self
    }

    /// Takes the sessions over. Each step has the operation timeout of the store; the whole has no
    /// bound.
    ///
    /// # Errors
    ///
    /// What the server answers, [`Closed`](ErrorKind::Closed) once the store is shut down, and
    /// [`Panic`](ErrorKind::Panic) if [`on_progress`](Self::on_progress) panics. A run after that goes on
    /// where this one ended.
    ///
    /// # Cancel safety
    ///
    /// May be dropped at any time: it ends after its present page.
    pub async fn run(self) -> Result<Progress> {
        let abandoned = CancellationToken::new();
        let _with_the_caller = abandoned.clone().drop_guard();
        let takeover = ImportSteps::new(&self.source, self.store)?;
        let tasks = takeover.tasks().clone();
        let walk = ImportRun {
            takeover,
            keeps_source: self.keeps_source,
            on_progress: self.on_progress,
            progress: Progress::default(),
        };
        // An error may come from the source, which may be another MongoDB. The commands to the store's own MongoDB
        // are observed one by one.
        let is_telling = |_: &Result<Progress>| false;
        let run = tasks.run_paged_observed(is_telling, walk.run(abandoned), |outcome| outcome);
        let run = Box::pin(run);
        spans::verb!("session_store.import", run)
    }
}

impl fmt::Debug for Import {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Import")
            .field("source", &self.source.namespace().to_string())
            .field("store", &self.store)
            .field("keeps_source", &self.keeps_source)
            .finish_non_exhaustive()
    }
}

/// An import under way.
struct ImportRun {
    takeover: ImportSteps,
    keeps_source: bool,
    on_progress: Box<dyn FnMut(&Progress) + Send>,
    progress: Progress,
}

impl ImportRun {
    async fn run(mut self, abandoned: CancellationToken) -> Result<Progress> {
        let mut after = String::new();
        loop {
            let page = self.takeover.page(&after).await?;
            let Some(last) = page.last().and_then(|last| text_id(last)) else { break };
            last.clone_into(&mut after);
            self.take(&page).await?;
            self.report_progress()?;
            if abandoned.is_cancelled() {
                return Ok(self.progress);
            }
        }
        if let Err(error) = self.takeover.discard_expired().await {
            // Nothing that is live, or is to be, waits for it.
            tracing::warn!(%error, "sessions that had expired on their way were not removed");
        }
        let foreign = self.takeover.foreign().await?;
        self.progress.read += foreign;
        self.skip("its `_id` is no text", foreign);
        for (reason, count) in &self.progress.reasons {
            tracing::warn!(count, reason, "documents were not imported as sessions");
        }
        Ok(self.progress)
    }

    fn report_progress(&mut self) -> Result<()> {
        let told = catch_unwind(AssertUnwindSafe(|| (self.on_progress)(&self.progress)));
        told.map_err(|_| {
            Error::new(
                ErrorKind::Panic,
                "the `on_progress` function panicked, and the import ended after that page: run it \
                 again to go on. The app's panic hook has the panic's message",
            )
        })
    }

    async fn take(&mut self, page: &[bson::RawDocumentBuf]) -> Result<()> {
        let Page { mut settled, fresh, arrivals } = self.sort(page)?;
        let revs = self.takeover.stage(arrivals).await?;
        let mut stale = Vec::new();
        if !fresh.is_empty() {
            let found = |(id, key): &(String, SessionKey)| (id.clone(), revs.get(key).cloned());
            let found: Vec<_> = fresh.iter().map(found).collect();
            let mut marks = self.takeover.claim(&found).await?;
            for ((id, key), (_, found)) in fresh.into_iter().zip(found) {
                let mark = marks.remove(&id);
                // Another run was faster, and has had the session live; it may have been ended since.
                stale.extend(found.filter(|rev| mark.as_ref() != Some(rev)).map(|rev| (key, rev)));
                settled.push(Resolved { id, key, mark });
            }
        }
        self.takeover.discard(&stale).await?;
        let marked = settled.iter().filter_map(|it| Some((it.key, it.mark.clone()?)));
        let imported = self.takeover.activate(&marked.collect::<Vec<_>>()).await?;
        self.progress.imported += imported;
        let all = u64::try_from(settled.len()).unwrap_or(u64::MAX);
        self.progress.already_there += all.saturating_sub(imported);
        let marked = settled.into_iter().filter(|it| it.mark.is_some());
        let ids: Vec<_> = marked.map(|it| it.id).collect();
        if !self.keeps_source && !ids.is_empty() {
            self.takeover.remove(&ids).await?;
        }
        Ok(())
    }

    /// Sees what there is to do with each document.
    fn sort(&mut self, page: &[bson::RawDocumentBuf]) -> Result<Page> {
        let (now, mut sorted) = (self.takeover.now(), Page::default());
        for document in page {
            self.progress.read += 1;
            let old = match read(document) {
                Ok(old) => old,
                Err(reason) => {
                    self.skip(reason, 1);
                    continue;
                }
            };
            match ImportSteps::claim_on(document) {
                // The mark comes after the arrival, whatever has become of either since.
                Some(Claim::Rev(mark)) => {
                    let mark = Some(mark.to_vec());
                    sorted.settled.push(Resolved { id: old.id, key: old.key, mark });
                }
                Some(Claim::Foreign) => self.skip("its `imported` is no mark of an import", 1),
                None if old.expires <= now => self.progress.expired += 1,
                None => match self.takeover.staged_document(old.key, &old.data, old.expires)? {
                    Ok(arrival) => {
                        sorted.arrivals.push(arrival);
                        sorted.fresh.push((old.id, old.key));
                    }
                    Err(reason) => self.skip(reason, 1),
                },
            }
        }
        Ok(sorted)
    }

    fn skip(&mut self, reason: &'static str, count: u64) {
        if count > 0 {
            self.progress.unreadable += count;
            *self.progress.reasons.entry(reason).or_default() += count;
        }
    }
}

/// What there is to do with the documents of a page.
#[derive(Default)]
struct Page {
    settled: Vec<Resolved>,
    /// Those without a mark, in the order of their arrivals.
    fresh: Vec<(String, SessionKey)>,
    arrivals: Vec<Document>,
}

/// An old document of which it is known what may become live for it.
struct Resolved {
    id: String,
    key: SessionKey,
    /// Its mark; none if the document is gone.
    mark: Option<Vec<u8>>,
}

/// A session as tower-sessions-mongodb-store 0.11 keeps it:
/// `{ _id: "the id as in the cookie", data: Binary(MessagePack), expireAt: Date }`.
struct LegacySession {
    id: String,
    key: SessionKey,
    data: Data,
    expires: WallTime,
}

/// What stands in `data`: tower-sessions' record, an array of its fields. Its expiry is the one of
/// `expireAt`, in its own words.
#[derive(Deserialize)]
struct Record(i128, Values, #[allow(dead_code, reason = "it has to be there")] IgnoredAny);

/// The record's array and the map in it come on top of what a session's data may have.
const MAX_DEPTH: usize = 128;

fn read(document: &RawDocument) -> std::result::Result<LegacySession, &'static str> {
    let id = text_id(document).ok_or("its `_id` is no text")?;
    let RawId(number) = Id::from_str(id).map(|id| RawId(id.0)).map_err(|_| "its `_id` is no id")?;
    let data = match document.get("data") {
        Ok(Some(RawBsonRef::Binary(data))) => data.bytes,
        _ => return Err("it has no `data`, or one of another type"),
    };
    let expires = match document.get("expireAt") {
        Ok(Some(RawBsonRef::DateTime(at))) => WallTime::from_millis(at.timestamp_millis()),
        _ => return Err("it has no `expireAt`, or one of another type"),
    };
    let mut decoder = rmp_serde::Deserializer::from_read_ref(data);
    decoder.set_max_depth(MAX_DEPTH);
    let Record(recorded, Values(data), _) = Record::deserialize(&mut decoder)
        .map_err(|_| "its `data` is no record of tower-sessions")?;
    // Under which of the two ids would a browser find it?
    if recorded != number {
        return Err("its record has another id than it has itself");
    }
    Ok(LegacySession { id: id.to_owned(), key: RawId(number).key(), data, expires })
}

fn text_id(document: &RawDocument) -> Option<&str> {
    match document.get("_id") {
        Ok(Some(id)) if id.element_type() == ElementType::String => id.as_str(),
        _ => None,
    }
}
