//! The walk that encrypts with the newest key what was stored otherwise.
//!
//! What a session holds stays the same, so nothing is told to anybody: `rev` stays, and the change
//! stream leaves such an update out, which it knows by the field `reencrypted`. A walk that emptied
//! the caches of all instances would cost a read for each session in them.
//!
//! Each update is under the condition that `rev` and `data` are what was read. A save that comes in
//! between has another `rev`, and an operator's change another `data`: were that overwritten, unseen by
//! the stream, caches would go on with it for ever. Data that is too large to be a condition is
//! reported instead.

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
use crate::mongo::schema;
use crate::telemetry::metrics::{Outcome, Verb};

/// How many sessions one page has, and how many bytes of data, unless it is one session.
const PAGE: u32 = 500;
const PAGE_BYTES: usize = 2 << 20;

/// How many bytes of statements one command has, unless it is one statement: JSON text may be several
/// times as large as the document that it is made of.
const COMMAND_BYTES: usize = 4 << 20;

/// Documents above that are not sent along as a condition: a command holds 16 MiB.
const SINGLE_WRITE_BYTES: usize = 512 << 10;

/// How often a page is read anew since sessions of it were saved meanwhile.
const MAX_ATTEMPTS: u32 = 8;

/// A walk that encrypts sessions with the newest key, from [`MongoStore::reencrypt`]: a stream of how
/// far it has come, an item for each page, which goes no further than it is polled.
///
/// It ends without an error only when it is complete; an error ends it.
#[must_use = "streams do nothing unless polled"]
pub struct Reencryption {
    received: mpsc::Receiver<Step>,
    ended: bool,
}

/// How far a [`Reencryption`] has come.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct Reencrypted {
    /// Sessions that were encrypted with the newest key.
    pub done: u64,
    /// Sessions for which there was nothing to do: encrypted with it before, or ended meanwhile.
    pub skipped: u64,
    /// Sessions that could not be read, or not be written; they are as they were.
    pub failed: u64,
    /// About how many are left.
    pub remaining: u64,
    /// Why the last one of those failed. It names a key by its id, and no session.
    pub last_failure: Option<Error>,
}

/// What the task that walks sends. One that ends without a word was cut off.
enum Step {
    Page(Reencrypted),
    Ended(Result<()>),
}

impl MongoStore {
    /// Encrypts with the newest key what is not: plain sessions, and those of older keys. It begins
    /// at once, and goes on as its stream is polled.
    ///
    /// Works along the keys, in pages of at most 500 sessions and about 2 MiB, each read and written
    /// under the operation timeout. Requests go on meanwhile: a session that is saved at the same
    /// moment keeps what was saved. Nothing else of a session changes, and
    /// no cache loses it, unless it is larger than half a MiB. What
    /// cannot be read (a key that is missing, a document that was altered) is counted and left as
    /// it is. After an error, or on another day, call it again: what is done is passed over.
    ///
    /// Complete it is for good only if every instance encrypts with the newest key by then: one that
    /// has an older key for its newest, or none, writes with that.
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
    /// [`Timeout`](ErrorKind::Timeout), [`Connection`](ErrorKind::Connection) and what else the server
    /// answers.
    ///
    /// # Cancel safety
    ///
    /// Once the stream is dropped, it ends with the page that it is at.
    pub fn reencrypt(&self) -> Reencryption {
        let (sender, received) = mpsc::channel(1);
        let (sessions, tasks) = (self.inner.collection.clone(), self.tasks());
        if !tasks.is_closed() {
            tasks.spawn(async move {
                let ended = sessions.walk(&sender).await;
                sessions.send_step(&sender, Step::Ended(ended)).await;
            });
        }
        Reencryption { received, ended: false }
    }
}

impl Reencryption {
    /// Goes to the end, and answers with how it went.
    ///
    /// # Errors
    ///
    /// As [`MongoStore::reencrypt`].
    ///
    /// # Cancel safety
    ///
    /// Dropped, it ends with the page that it is at.
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
        if self.ended {
            return Poll::Ready(None);
        }
        let step = std::task::ready!(self.received.poll_recv(context));
        if let Some(Step::Page(progress)) = step {
            return Poll::Ready(Some(Ok(progress)));
        }
        self.ended = true;
        Poll::Ready(match step {
            Some(Step::Ended(Ok(()))) => None,
            Some(Step::Ended(Err(error))) => Some(Err(error)),
            _ => Some(Err(Error::cut_off())),
        })
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
    /// Whether it was taken. Nobody waits for a stream that is held and not polled, when the store is
    /// shut down.
    async fn send_step(&self, sender: &mpsc::Sender<Step>, step: Step) -> bool {
        tokio::select! {
            () = self.closed.cancelled() => false,
            sent = sender.send(step) => sent.is_ok(),
        }
    }

    async fn walk(&self, sender: &mpsc::Sender<Step>) -> Result<()> {
        let DataFormat::Encrypted(keys) = &self.format else {
            return Err(Error::config(
                "there is no key to encrypt with: give the builder `encryption`",
            ));
        };
        let (mut progress, mut after) = (Reencrypted::default(), None);
        let mut seen = 0;
        let total = self.number_of_documents().await?;
        loop {
            let place = schema::keys_after(after.take());
            // What has expired is as good as gone.
            let live = doc! { "$gt": schema::date(self.clock.wall()) };
            let page = self.read_page(doc! { "_id": place, "expires": live }, PAGE_BYTES).await?;
            let Some(last) = page.last() else {
                progress.remaining = 0;
                self.send_step(sender, Step::Page(progress)).await;
                return Ok(());
            };
            after = Some(value(last, "_id"));
            seen += page.len() as u64;
            let before = progress.done + progress.failed;
            let of_page = page.len() as u64;
            self.reencrypt_page(page, keys, &mut progress).await?;
            progress.skipped += of_page.saturating_sub(progress.done + progress.failed - before);
            progress.remaining = total.saturating_sub(seen);
            if !self.send_step(sender, Step::Page(progress.clone())).await {
                return if self.closed.is_cancelled() { Err(Error::closed()) } else { Ok(()) };
            }
        }
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

    /// Documents of at most `most` bytes together, unless it is one.
    async fn read_page(&self, filter: Document, most: usize) -> Result<Vec<RawDocumentBuf>> {
        self.within(async {
            let timer = self.timer(Verb::List);
            let documents = self.documents.clone_with_type::<RawDocumentBuf>();
            let find = documents.find(filter).sort(doc! { "_id": 1 }).limit(PAGE.into());
            let fields = doc! { "format": 1, "data": 1, "rev": 1 };
            let find = find.projection(fields).batch_size(PAGE).max_time(self.timeout);
            let (mut page, mut bytes) = (Vec::new(), 0);
            let read = async {
                let mut session = self.causal().await?;
                let mut cursor = find.session(&mut session).await?;
                while cursor.advance(&mut session).await? {
                    let found = cursor.current();
                    bytes += found.as_bytes().len();
                    if bytes > most && !page.is_empty() {
                        break;
                    }
                    page.push(found.to_owned());
                }
                self.causal.observe(&session);
                Ok(())
            };
            match read.await {
                Ok(()) => timer.finish(Outcome::Ok, Ok(page)),
                Err(error) => timer.fail("read the sessions to encrypt", &error),
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
        let mut left = self.rewrite(&page, keys, progress).await?;
        drop(page);
        for round in 1..=MAX_ATTEMPTS {
            // They were saved or have ended meanwhile, by whomever and with whichever key. They may have
            // grown, so they are read by pages again.
            let (ids, mut after, mut read) = (std::mem::take(&mut left), None, 0);
            while read < ids.len() {
                let mut place = doc! { "$in": ids.clone() };
                place.extend(after.take().map(|last| ("$gt".to_owned(), last)));
                let page = self.read_page(doc! { "_id": place }, PAGE_BYTES).await?;
                let Some(last) = page.last() else { break };
                after = Some(value(last, "_id"));
                read += page.len();
                if round < MAX_ATTEMPTS {
                    left.extend(self.rewrite(&page, keys, progress).await?);
                    continue;
                }
                for found in &page {
                    if !matches!(self.statement(found, keys), Ok(None)) {
                        progress.record_failure(Error::new(
                            ErrorKind::Overloaded,
                            "the session was saved again and again while it was to be encrypted anew",
                        ));
                    }
                }
            }
        }
        Ok(())
    }

    /// Writes what was read, encrypted anew; answers with those that may have changed since.
    async fn rewrite(
        &self,
        page: &[RawDocumentBuf],
        keys: &Arc<Keys>,
        progress: &mut Reencrypted,
    ) -> Result<Vec<Bson>> {
        let (mut statements, mut ids, mut bytes) = (Vec::new(), Vec::new(), 0);
        let mut left = Vec::new();
        for found in page {
            match self.statement(found, keys) {
                Ok(Some((statement, size))) => {
                    if bytes + size > COMMAND_BYTES && !statements.is_empty() {
                        let (sent, of) =
                            (std::mem::take(&mut statements), std::mem::take(&mut ids));
                        left.extend(self.write_page(sent, of, progress).await?);
                        bytes = 0;
                    }
                    statements.push(statement);
                    ids.push(value(found, "_id"));
                    bytes += size;
                }
                Ok(None) => {}
                Err(error) => progress.record_failure(error),
            }
        }
        if !statements.is_empty() {
            left.extend(self.write_page(statements, ids, progress).await?);
        }
        Ok(left)
    }

    /// The statement that encrypts a session anew, and about how many bytes it has; `None` if there is
    /// nothing to do.
    fn statement(
        &self,
        found: &RawDocument,
        keys: &Arc<Keys>,
    ) -> Result<Option<(Document, usize)>> {
        let (stored, id) = schema::stored_data(found)?;
        let Some(data) = codec::reencode(stored, keys, id)? else { return Ok(None) };
        let mut bytes = if let Bson::Binary(data) = &data { data.bytes.len() } else { 0 };
        let [field, mark] = schema::REENCRYPT_FIELDS;
        let mut filter =
            doc! { "_id": value(found, "_id"), "rev": schema::unchanged(found, "rev")? };
        let mut fields = doc! { field: data };
        if found.as_bytes().len() <= SINGLE_WRITE_BYTES {
            bytes += found.as_bytes().len();
            filter.insert(field, doc! { "$eq": value(found, field) });
            fields.insert(mark, schema::date(self.clock.wall()));
        }
        // A large one has no mark, so caches hear of it, and of what it may have overwritten.
        Ok(Some((doc! { "q": filter, "u": { "$set": fields } }, bytes)))
    }

    /// Sends the statements for these sessions as one command; answers with the sessions that may have
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
        let places = ids.into_iter().enumerate();
        Ok(places.filter(|(at, _)| !refusals.contains(at)).map(|(_, id)| id).collect())
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

/// A field's value; null, which a query takes for a missing field too, if it has none.
fn value(document: &RawDocument, field: &str) -> Bson {
    let value = document.get(field).ok().flatten();
    value.and_then(|value| Bson::try_from(value).ok()).unwrap_or(Bson::Null)
}
