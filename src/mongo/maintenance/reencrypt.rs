//! `reencrypt`: encrypts every session with the newest key, page by page.
//!
//! The data of a session stays the same, so no cache has to read it again. The update keeps `rev` and sets the
//! field `reencrypted`, by which the change stream leaves it out. Otherwise a re-encryption would empty the
//! caches of all instances, at the cost of a read for each session.
//!
//! Each update has the condition that `rev` and `data` are what was read. A save in between changes `rev`, and
//! an operator's change by hand changes `data`. If the update overwrote such a change, the stream would not
//! report it, and caches would serve the old data for good. Data that is too large to be sent as a condition is
//! written without the field `reencrypted`, so that the stream reports the update.

use std::fmt;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use bson::{Bson, Document, RawDocument, RawDocumentBuf, doc};
use futures_core::Stream;
use tokio::sync::mpsc;

use crate::error::{Error, ErrorKind, Result};
use crate::mongo::MongoStore;
use crate::mongo::codec::{self, DataFormat, Keys};
use crate::mongo::collection::SessionCollection;
use crate::mongo::ops::batch;
use crate::mongo::ops::scan::{KeyScan, PageOptions};
use crate::mongo::schema;
use crate::mongo::task_stream::{Step, TaskStream};
use crate::telemetry::metrics::{Outcome, Verb};

/// The most sessions in a page.
const PAGE: u32 = 500;
/// The most bytes of data in a page, unless it has a single session.
const PAGE_BYTES: usize = 2 << 20;

/// The most bytes of statements in a command, unless it is a single statement. JSON text may be several times as
/// large as the document that it is made from.
const COMMAND_BYTES: usize = 4 << 20;

/// The largest document whose data is sent along as a condition: a command holds 16 MiB.
const SINGLE_WRITE_BYTES: usize = 512 << 10;

/// How often the sessions of a page are read again because they were saved in between.
const MAX_ATTEMPTS: u32 = 8;

/// A running re-encryption, from [`MongoStore::reencrypt`]: a stream of its progress, with an item for each
/// page. It does not work ahead of what is polled, but for one page.
///
/// The stream ends without an error only when the re-encryption is complete. An error ends it.
#[must_use = "streams do nothing unless polled"]
pub struct Reencryption(TaskStream<Reencrypted>);

/// The progress of a [`Reencryption`].
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct Reencrypted {
    /// Sessions that were encrypted with the newest key.
    pub done: u64,
    /// Sessions for which there was nothing to do: already encrypted with the newest key, or ended in between.
    pub skipped: u64,
    /// Sessions that could not be read or not be written. They are unchanged.
    pub failed: u64,
    /// The approximate number of sessions that are left.
    pub remaining: u64,
    /// Why the last of the failed sessions failed. The error names a key by its id, and no session.
    pub last_failure: Option<Error>,
}

impl MongoStore {
    /// Encrypts every session with the newest key: plain sessions, and sessions that an older key encrypts.
    /// The work begins at once, and continues as the stream is polled.
    ///
    /// The store works in pages of at most 500 sessions and about 2 MiB. Reading and writing a page has the
    /// operation timeout for each command. Requests are served meanwhile: a session that is saved at the same
    /// moment keeps what was saved. Only the stored form of the data changes. Caches keep their entries, except
    /// those of sessions larger than half a MiB.
    ///
    /// A session that cannot be read (its key is missing, or its document was altered) is counted as failed and
    /// left unchanged. You may call this again at any time, for example after an error: sessions that are done
    /// are skipped.
    ///
    /// The result lasts only if every instance encrypts with the newest key by then. An instance that has an
    /// older key as its newest, or no key, writes sessions in its own way.
    ///
    /// ```no_run
    /// # async fn walk(store: tower_sessions_moka_mongodb_store::MongoStore)
    /// #     -> tower_sessions_moka_mongodb_store::Result<()> {
    /// let walked = store.reencrypt().finish().await?;
    /// println!("{} sessions encrypted, {} could not be", walked.done, walked.failed);
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// In the stream: [`Config`](ErrorKind::Config) if the store has no keys;
    /// [`Timeout`](ErrorKind::Timeout), [`Connection`](ErrorKind::Connection), or any other error of the server.
    ///
    /// # Cancel safety
    ///
    /// Dropping the stream stops the re-encryption after the current page.
    pub fn reencrypt(&self) -> Reencryption {
        let (sender, stream) = TaskStream::channel(1);
        let sessions = self.inner.collection.clone();
        let tasks = self.tasks();
        if !tasks.is_closed() {
            tasks.spawn(async move {
                let result = sessions.reencrypt_all(&sender).await;
                sessions.send_step(&sender, Step::Ended(result)).await;
            });
        }
        Reencryption(stream)
    }
}

impl Reencryption {
    /// Runs to completion, and returns the final progress.
    ///
    /// # Errors
    ///
    /// As [`MongoStore::reencrypt`].
    ///
    /// # Cancel safety
    ///
    /// Dropping the future stops the re-encryption after the current page.
    pub async fn finish(mut self) -> Result<Reencrypted> {
        let mut last = Reencrypted::default();
        while let Some(page) = std::future::poll_fn(|cx| Pin::new(&mut self).poll_next(cx)).await {
            last = page?;
        }
        Ok(last)
    }
}

impl Stream for Reencryption {
    type Item = Result<Reencrypted>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        Pin::new(&mut self.0).poll_next(context)
    }
}

impl fmt::Debug for Reencryption {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Reencryption").finish_non_exhaustive()
    }
}

impl Reencrypted {
    fn record_failure(&mut self, error: Error) {
        self.failed += 1;
        self.last_failure = Some(error);
    }
}

impl SessionCollection {
    /// Sends a step to the stream. Returns whether the stream took it: a stream that is held and not polled
    /// must not keep `shutdown` waiting.
    async fn send_step(
        &self,
        sender: &mpsc::Sender<Step<Reencrypted>>,
        step: Step<Reencrypted>,
    ) -> bool {
        tokio::select! {
            () = self.closed.cancelled() => false,
            sent = sender.send(step) => sent.is_ok(),
        }
    }

    async fn reencrypt_all(&self, sender: &mpsc::Sender<Step<Reencrypted>>) -> Result<()> {
        let DataFormat::Encrypted(keys) = &self.format else {
            return Err(Error::config(
                "there is no key to encrypt with: give the builder `encryption`",
            ));
        };
        let mut progress = Reencrypted::default();
        let mut scan = self.reencryption_scan();
        let mut seen = 0;
        let total = self.number_of_documents().await?;
        loop {
            // A session that has expired is left to its removal.
            let live = doc! { "$gt": schema::date(self.clock.wall()) };
            let page = scan.next_page(|ids| doc! { "_id": ids, "expires": live }).await?;
            if page.is_empty() {
                progress.remaining = 0;
                self.send_step(sender, Step::Item(Ok(progress))).await;
                return Ok(());
            }
            let page_size = page.len() as u64;
            let before = progress.done + progress.failed;
            self.reencrypt_page(page, keys, &mut progress).await?;
            seen += page_size;
            progress.skipped += page_size.saturating_sub(progress.done + progress.failed - before);
            progress.remaining = total.saturating_sub(seen);
            if !self.send_step(sender, Step::Item(Ok(progress.clone()))).await {
                return if self.closed.is_cancelled() { Err(Error::closed()) } else { Ok(()) };
            }
        }
    }

    fn reencryption_scan(&self) -> KeyScan {
        let options = PageOptions {
            verb: Verb::List,
            doing: "read the sessions to encrypt",
            fields: doc! { "format": 1, "data": 1, "rev": 1 },
            limit: PAGE,
            max_bytes: PAGE_BYTES,
        };
        KeyScan::new(self, options)
    }

    async fn number_of_documents(&self) -> Result<u64> {
        self.within(async {
            let timer = self.timer(Verb::Count);
            match self.documents.estimated_document_count().max_time(self.timeout).await {
                Ok(count) => timer.finish(Outcome::Ok, Ok(count)),
                Err(error) => timer.fail("count the sessions", &error),
            }
        })
        .await
    }

    async fn reencrypt_page(
        &self,
        page: Vec<RawDocumentBuf>,
        keys: &Arc<Keys>,
        progress: &mut Reencrypted,
    ) -> Result<()> {
        let mut changed = self.rewrite(&page, keys, progress).await?;
        drop(page);
        for attempt in 1..=MAX_ATTEMPTS {
            // These were saved or removed since they were read, by any store with any key. They may have
            // grown, so they are read in pages again.
            let ids = std::mem::take(&mut changed);
            let mut scan = self.reencryption_scan();
            let mut read = 0;
            while read < ids.len() {
                let page = scan.next_page(|mut range| {
                    range.insert("$in", ids.clone());
                    doc! { "_id": range }
                });
                let page = page.await?;
                if page.is_empty() {
                    break;
                }
                read += page.len();
                if attempt < MAX_ATTEMPTS {
                    changed.extend(self.rewrite(&page, keys, progress).await?);
                    continue;
                }
                for found in &page {
                    if !matches!(self.statement(found, keys), Ok(None)) {
                        progress.record_failure(Error::new(
                            ErrorKind::Overloaded,
                            "the session was saved again each time before it could be encrypted",
                        ));
                    }
                }
            }
        }
        Ok(())
    }

    /// Encrypts and writes the sessions of a page. Returns the ids of those that may have changed since they
    /// were read.
    async fn rewrite(
        &self,
        page: &[RawDocumentBuf],
        keys: &Arc<Keys>,
        progress: &mut Reencrypted,
    ) -> Result<Vec<Bson>> {
        let mut statements = Vec::new();
        let mut ids = Vec::new();
        let mut bytes = 0;
        let mut changed = Vec::new();
        for found in page {
            match self.statement(found, keys) {
                Ok(Some((statement, size))) => {
                    if bytes + size > COMMAND_BYTES && !statements.is_empty() {
                        let sent = std::mem::take(&mut statements);
                        let sent_ids = std::mem::take(&mut ids);
                        changed.extend(self.write_page(sent, sent_ids, progress).await?);
                        bytes = 0;
                    }
                    statements.push(statement);
                    ids.push(schema::value(found, "_id"));
                    bytes += size;
                }
                Ok(None) => {}
                Err(error) => progress.record_failure(error),
            }
        }
        if !statements.is_empty() {
            changed.extend(self.write_page(statements, ids, progress).await?);
        }
        Ok(changed)
    }

    /// Returns the statement that encrypts a session with the newest key, and its approximate size in bytes; `None`
    /// if the newest key already encrypts the session.
    fn statement(
        &self,
        found: &RawDocument,
        keys: &Arc<Keys>,
    ) -> Result<Option<(Document, usize)>> {
        let (stored, id) = schema::stored_data(found)?;
        let Some(data) = codec::reencode(stored, keys, id)? else { return Ok(None) };
        let mut bytes = if let Bson::Binary(data) = &data { data.bytes.len() } else { 0 };
        let [field, marker] = schema::REENCRYPT_FIELDS;
        let mut filter =
            doc! { "_id": schema::value(found, "_id"), "rev": schema::unchanged(found, "rev")? };
        let mut fields = doc! { field: data };
        if found.as_bytes().len() <= SINGLE_WRITE_BYTES {
            bytes += found.as_bytes().len();
            filter.insert(field, doc! { "$eq": schema::value(found, field) });
            fields.insert(marker, schema::date(self.clock.wall()));
        }
        // A large session gets no marker. So the change stream reports this write, and the caches read again
        // what it may have overwritten.
        Ok(Some((doc! { "q": filter, "u": { "$set": fields } }, bytes)))
    }

    /// Sends the statements for these sessions as one command. Returns the ids of the sessions that may have
    /// changed since they were read.
    async fn write_page(
        &self,
        statements: Vec<Document>,
        ids: Vec<Bson>,
        progress: &mut Reencrypted,
    ) -> Result<Vec<Bson>> {
        let reply = self.send_page(statements).await?;
        let modified = batch::number(&reply, "nModified").unwrap_or(0);
        progress.done += modified as u64;
        if modified == ids.len() {
            return Ok(Vec::new());
        }
        let mut refusals = Vec::new();
        for error in reply.get_array("writeErrors").into_iter().flatten() {
            let Some(error) = error.as_document() else { continue };
            refusals.extend(batch::number(error, "index"));
            progress.record_failure(batch::refused(error));
        }
        let changed = ids.into_iter().enumerate().filter(|(index, _)| !refusals.contains(index));
        Ok(changed.map(|(_, id)| id).collect())
    }

    async fn send_page(&self, statements: Vec<Document>) -> Result<Document> {
        self.within(async {
            let timer = self.timer(Verb::Bulk);
            match self.write(statements).await {
                Ok(reply) => match reply.get_document("writeConcernError") {
                    Ok(concern) => {
                        let failed = batch::unacknowledged(concern);
                        timer.finish(Outcome::Failed(failed.kind()), Err(failed))
                    }
                    Err(_) => timer.finish(Outcome::Ok, Ok(reply)),
                },
                Err(error) => timer.fail("store the sessions that were encrypted", &error),
            }
        })
        .await
    }
}
