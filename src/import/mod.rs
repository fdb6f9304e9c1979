//! Imports the sessions that another store has written, so that an upgrade logs nobody out.
//!
//! ```no_run
//! use tower_sessions_moka_mongodb_store::mongodb::bson::Document;
//! use tower_sessions_moka_mongodb_store::{MongoStore, import, mongodb};
//!
//! # async fn example() -> Result<(), Box<dyn std::error::Error>> {
//! let client = mongodb::Client::with_uri_str("mongodb://localhost").await?;
//! let old = client.database("app").collection::<Document>("sessions");
//! let mongo = MongoStore::connect("mongodb://localhost/app").await?;
//! let result = import::tower_sessions_mongodb_store(&old)
//!     .into_store(&mongo)
//!     .on_progress(|progress| println!("{} read", progress.read))
//!     .run()
//!     .await?;
//! println!("{} sessions were imported, {} could not be read", result.imported, result.unreadable);
//! # Ok(())
//! # }
//! ```
//!
//! # When to run it
//!
//! Run it after the last instance of the old app has stopped, and before the first instance of the new app
//! starts. Otherwise the old app changes sessions that were imported already, and a user whose session was
//! not imported yet gets a new one. Each instance of the new app may run it before it takes requests. Both
//! apps may use the same collection. Both call it `sessions` by default.
//!
//! The browser must send the old cookie to the new app. So give the new layer the cookie name of the old
//! one (`with_name`; older versions used `tower.sid`), the same path and domain, and the same key if the
//! cookie was signed or private.
//!
//! # What it guarantees
//!
//! - Each session keeps its id. This is the only way in which the store takes an id that it did not make
//!   itself. tower-sessions made it, on one of your servers.
//! - It never overwrites a session that is in the store already.
//! - You may interrupt it at any point and run it again, as often as you like. Two runs may overlap, for
//!   example if two instances import when they start.
//! - It imports each session at most once. A session that was deleted in the new store does not come back
//!   from the old collection.
//! - It stores a session as the store stores any other: with its
//!   [`owner`](crate::MongoStoreBuilder::owner), and encrypted if the store encrypts. The expiry stays as
//!   it was, whatever `ttl` is.
//!
//! # How it works
//!
//! Each page of up to 500 old documents goes through four steps.
//!
//! | step | what it does |
//! |---|---|
//! | 1. stage | stores the sessions, but not live yet. Each staged session has a `rev` that no other one ever has. If another run has staged the session, that one counts |
//! | 2. claim | writes that `rev` into the old document (`imported`), unless the old document has a claim already |
//! | 3. activate | makes a staged session live if its `rev` is the claim, and otherwise discards it |
//! | 4. remove | removes the old documents, unless you [keep them](Import::keep_source) |
//!
//! *No session is imported twice.* A claim never changes, so only one staged session of each old document
//! can become live. That one is staged once, so it becomes live once. After it was deleted, no staged
//! session has its `rev`. If a slower run stages the session again after that, its `rev` differs from the
//! claim, and the run discards it. If the run stops before that, the staged session stays without ever
//! being live. The next complete run after its expiry removes it.
//!
//! *No session is lost.* A claim is written only after its session was staged. A staged session is discarded
//! only if the claim has another `rev`, or the old document is gone. The old document is removed last, after
//! the claimed session was made live. So at any moment one of these is true:
//!
//! - The old document has no claim. Any run can begin with it.
//! - The claimed session is staged. Any run can make it live.
//! - The session has been live.

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
use crate::session::id::{RawId, SessionKey};
use crate::telemetry::spans;
use crate::time::WallTime;

/// Imports the sessions that tower-sessions-mongodb-store 0.11 has written to `collection`.
pub fn tower_sessions_mongodb_store<T: Send + Sync>(collection: &Collection<T>) -> Source {
    Source { documents: collection.clone_with_type() }
}

/// The collection to import from.
#[derive(Clone)]
#[must_use = "an import does nothing until it is run"]
pub struct Source {
    documents: Collection<Document>,
}

impl Source {
    /// Chooses the store to import into.
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

/// An import, ready to [`run`](Self::run).
#[must_use = "an import does nothing until it is run"]
pub struct Import {
    source: Collection<Document>,
    store: MongoStore,
    keeps_source: bool,
    on_progress: Box<dyn FnMut(&Progress) + Send>,
}

/// How far an import is, and what it has done so far.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Progress {
    /// Documents of the old collection that it has read.
    pub read: u64,
    /// Sessions that this run has imported.
    pub imported: u64,
    /// Sessions that had expired. They stay in the old collection.
    pub expired: u64,
    /// Sessions that the store has already, or once had: an earlier or a concurrent run has imported them.
    pub already_there: u64,
    /// Documents that are not sessions in the form of the old store. They stay in the old collection.
    pub unreadable: u64,
    /// The number of unreadable documents for each reason. No reason quotes the document.
    pub reasons: BTreeMap<&'static str, u64>,
}

impl Import {
    /// Keeps the old documents, each with a field `imported`. Default: an imported document is removed.
    ///
    /// So you can go back to the old app if the new one fails. A session that the old app saves then keeps
    /// the field, so another run does not import it again.
    pub fn keep_source(mut self) -> Self {
        self.keeps_source = true;
        self
    }

    /// Calls `report` after each page of up to 500 documents. The import waits for it, so it should return
    /// soon.
    pub fn on_progress(mut self, report: impl FnMut(&Progress) + Send + 'static) -> Self {
        self.on_progress = Box::new(report);
        self
    }

    /// Imports the sessions. Each step has the operation timeout of the store. The whole run has no time
    /// limit.
    ///
    /// # Errors
    ///
    /// - The errors of the server.
    /// - [`Closed`](ErrorKind::Closed) once the store is shut down.
    /// - [`Panic`](ErrorKind::Panic) if [`on_progress`](Self::on_progress) panics.
    ///
    /// After an error, another run continues where this one ended.
    ///
    /// # Cancel safety
    ///
    /// May be dropped at any time. It then ends after its current page.
    pub async fn run(self) -> Result<Progress> {
        let cancelled = CancellationToken::new();
        // Cancels the run, which has a task of its own, when the caller drops this future.
        let _cancel_guard = cancelled.clone().drop_guard();
        let steps = ImportSteps::new(&self.source, self.store)?;
        let tasks = steps.tasks().clone();
        let run = ImportRun {
            steps,
            keeps_source: self.keeps_source,
            on_progress: self.on_progress,
            progress: Progress::default(),
        };
        // An error may come from the source, which may be another MongoDB. The commands to the store's own MongoDB
        // are observed one by one.
        let is_evidence = |_: &Result<Progress>| false;
        let run = tasks.run_paged_observed(is_evidence, run.run(cancelled), |outcome| outcome);
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

/// A running import.
struct ImportRun {
    steps: ImportSteps,
    keeps_source: bool,
    on_progress: Box<dyn FnMut(&Progress) + Send>,
    progress: Progress,
}

impl ImportRun {
    async fn run(mut self, cancelled: CancellationToken) -> Result<Progress> {
        let mut after = String::new();
        loop {
            let page = self.steps.page(&after).await?;
            let Some(last) = page.last().and_then(|last| text_id(last)) else { break };
            last.clone_into(&mut after);
            self.import_page(&page).await?;
            self.report_progress()?;
            if cancelled.is_cancelled() {
                return Ok(self.progress);
            }
        }
        if let Err(error) = self.steps.discard_expired().await {
            // No error of the run: these sessions are not live and will never be.
            tracing::warn!(%error, "staged sessions that have expired were not removed");
        }
        let foreign = self.steps.foreign().await?;
        self.progress.read += foreign;
        self.skip("its `_id` is no text", foreign);
        for (reason, count) in &self.progress.reasons {
            tracing::warn!(count, reason, "documents were not imported as sessions");
        }
        Ok(self.progress)
    }

    fn report_progress(&mut self) -> Result<()> {
        let outcome = catch_unwind(AssertUnwindSafe(|| (self.on_progress)(&self.progress)));
        outcome.map_err(|_| {
            Error::new(
                ErrorKind::Panic,
                "the `on_progress` function panicked, and the import ended after that page: run it \
                 again to go on. The app's panic hook has the panic's message",
            )
        })
    }

    async fn import_page(&mut self, page: &[bson::RawDocumentBuf]) -> Result<()> {
        let Page { mut claimed, unclaimed, staged } = self.sort(page)?;
        let revs = self.steps.stage(staged).await?;
        let mut stale = Vec::new();
        if !unclaimed.is_empty() {
            let staged_rev =
                |(id, key): &(String, SessionKey)| (id.clone(), revs.get(key).cloned());
            let staged_revs: Vec<_> = unclaimed.iter().map(staged_rev).collect();
            let mut claims = self.steps.claim(&staged_revs).await?;
            for ((id, key), (_, rev)) in unclaimed.into_iter().zip(staged_revs) {
                let claim = claims.remove(&id);
                // Another run was faster and has imported the session. It may have been deleted since.
                stale.extend(rev.filter(|rev| claim.as_ref() != Some(rev)).map(|rev| (key, rev)));
                claimed.push(Claimed { id, key, claim });
            }
        }
        self.steps.discard(&stale).await?;
        let claims = claimed.iter().filter_map(|old| Some((old.key, old.claim.clone()?)));
        let imported = self.steps.activate(&claims.collect::<Vec<_>>()).await?;
        self.progress.imported += imported;
        let all = u64::try_from(claimed.len()).unwrap_or(u64::MAX);
        self.progress.already_there += all.saturating_sub(imported);
        let still_there = claimed.into_iter().filter(|old| old.claim.is_some());
        let ids: Vec<_> = still_there.map(|old| old.id).collect();
        if !self.keeps_source && !ids.is_empty() {
            self.steps.remove(&ids).await?;
        }
        Ok(())
    }

    /// Decides what to do with each document, and counts those that are not imported.
    fn sort(&mut self, page: &[bson::RawDocumentBuf]) -> Result<Page> {
        let now = self.steps.now();
        let mut sorted = Page::default();
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
                // Even if it has expired: an earlier run has staged it before it wrote the claim.
                Some(Claim::Rev(rev)) => {
                    let claim = Some(rev.to_vec());
                    sorted.claimed.push(Claimed { id: old.id, key: old.key, claim });
                }
                Some(Claim::Foreign) => self.skip("its `imported` is no mark of an import", 1),
                None if old.expires <= now => self.progress.expired += 1,
                None => match self.steps.staged_document(old.key, &old.data, old.expires)? {
                    Ok(staged) => {
                        sorted.staged.push(staged);
                        sorted.unclaimed.push((old.id, old.key));
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

/// The documents of a page that are imported.
#[derive(Default)]
struct Page {
    claimed: Vec<Claimed>,
    /// Documents without a claim, in the order of `staged`.
    unclaimed: Vec<(String, SessionKey)>,
    /// The documents to store for them.
    staged: Vec<Document>,
}

/// An old document whose claim is known.
struct Claimed {
    id: String,
    key: SessionKey,
    /// `None` if the document is gone.
    claim: Option<Vec<u8>>,
}

/// A session as tower-sessions-mongodb-store 0.11 stores it:
/// `{ _id: "the id as in the cookie", data: Binary(MessagePack), expireAt: Date }`.
struct LegacySession {
    id: String,
    key: SessionKey,
    data: Data,
    expires: WallTime,
}

/// The record of tower-sessions in `data`: an array of its id, its data and its expiry. The expiry is also
/// in `expireAt`, and is read from there.
#[derive(Deserialize)]
struct Record(i128, Values, #[allow(dead_code, reason = "it must be present")] IgnoredAny);

/// The most levels of a record: more than those of a session's data, its array and its map together.
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
    // Nobody knows which of the two ids the browser has.
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
