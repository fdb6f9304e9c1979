//! Operations that walk over many sessions: listing them, and removing them page by page.

use std::fmt;
use std::pin::Pin;
use std::task::{Context, Poll};

use bson::{Bson, Document, RawDocument, RawDocumentBuf, doc};
use futures_core::Stream;
use mongodb::{ClientSession, SessionCursor};
use tokio::sync::mpsc;

use crate::error::{Error, Result};
use crate::mongo::LiveSession;
use crate::mongo::collection::SessionCollection;
use crate::mongo::error;
use crate::mongo::ops::query::and;
use crate::mongo::schema;
use crate::mongo::schema::keys_after;
use crate::runtime::Tasks;
use crate::telemetry::metrics::{Outcome, Verb};

/// How many sessions one page of a removal has, so that each command stays short and small.
pub(crate) const PAGE: u32 = 1_000;

/// How many sessions a list reads ahead.
const CHANNEL_CAPACITY: u32 = 64;

/// A stream of the live sessions, from [`MongoStore::all`](crate::MongoStore::all).
///
/// A session that cannot be read is a [`Decode`](crate::ErrorKind::Decode) error in its place, and
/// the stream goes on; any other error ends it. It ends without an error only when it is complete.
#[must_use = "streams do nothing unless polled"]
pub struct LiveSessions {
    received: mpsc::Receiver<Step>,
    ended: bool,
}

impl LiveSessions {
    /// A list that is nothing but this error.
    pub(crate) fn failed(error: Error) -> Self {
        let (sender, received) = mpsc::channel(1);
        // There is room for one.
        drop(sender.try_send(Step::Ended(Err(error))));
        Self { received, ended: false }
    }
}

/// Which of the live sessions to list, and in which order.
pub(crate) struct ListQuery {
    pub(crate) wanted: Option<Document>,
    pub(crate) order: Option<Document>,
}

impl ListQuery {
    pub(crate) fn all() -> Self {
        Self { wanted: None, order: None }
    }
}

/// What the task that reads sends. One that ends without a word was cut off.
enum Step {
    Session(Result<LiveSession>),
    Ended(Result<()>),
}

impl Stream for LiveSessions {
    type Item = Result<LiveSession>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if self.ended {
            return Poll::Ready(None);
        }
        let step = std::task::ready!(self.received.poll_recv(context));
        if let Some(Step::Session(session)) = step {
            return Poll::Ready(Some(session));
        }
        self.ended = true;
        Poll::Ready(match step {
            Some(Step::Ended(Ok(()))) => None,
            Some(Step::Ended(Err(error))) => Some(Err(error)),
            _ => Some(Err(Error::cut_off())),
        })
    }
}

impl fmt::Debug for LiveSessions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LiveSessions").finish_non_exhaustive()
    }
}

impl SessionCollection {
    pub(crate) fn list(&self, tasks: &Tasks, listing: ListQuery) -> LiveSessions {
        let (sender, received) = mpsc::channel(CHANNEL_CAPACITY as usize);
        if !tasks.is_closed() {
            let sessions = self.clone();
            let closed = tasks.closed().clone();
            let client_closed = tasks.client_closed().clone();
            tasks.spawn(async move {
                tokio::select! {
                    () = closed.cancelled() => {}
                    () = sender.closed() => {}
                    () = async {
                        // A list that nobody polls must not hold what the app's client waits for.
                        let sends = sessions.send_all(&sender, listing);
                        let ended = client_closed.run_until_cancelled(sends).await;
                        let ended = ended.unwrap_or_else(|| Err(Error::client_closed()));
                        drop(sender.send(Step::Ended(ended)).await);
                    } => {}
                }
            });
        }
        LiveSessions { received, ended: false }
    }

    pub(crate) async fn open(
        &self,
        listing: ListQuery,
    ) -> Result<(ClientSession, SessionCursor<RawDocumentBuf>)> {
        let documents = self.documents.clone_with_type::<RawDocumentBuf>();
        let mut live = doc! { "expires": { "$gt": schema::date(self.clock.wall()) } };
        if let Some(wanted) = listing.wanted {
            live = and(wanted, live);
        }
        // No time limit for the server: it would count for all batches together.
        let mut find = documents.find(live).batch_size(CHANNEL_CAPACITY);
        if let Some(order) = listing.order {
            find = find.sort(order);
        }
        self.within(async {
            let timer = self.timer(Verb::List);
            let found = async {
                let mut session = self.causal().await?;
                let cursor = find.session(&mut session).await?;
                Ok((session, cursor))
            };
            match found.await {
                Ok(found) => timer.finish(Outcome::Ok, Ok(found)),
                Err(error) => timer.fail("list the sessions", &error),
            }
        })
        .await
    }

    async fn send_all(&self, sender: &mpsc::Sender<Step>, listing: ListQuery) -> Result<()> {
        let (mut session, mut cursor) = self.open(listing).await?;
        while let Some(found) = self.next(&mut cursor, &mut session).await? {
            let now = self.clock.wall().to_datetime();
            let session = schema::live_session(&found, &self.format);
            if session.as_ref().is_ok_and(|session| now.is_some_and(|now| session.expires <= now)) {
                continue;
            }
            if sender.send(Step::Session(session)).await.is_err() {
                break;
            }
        }
        Ok(())
    }

    pub(crate) async fn next(
        &self,
        cursor: &mut SessionCursor<RawDocumentBuf>,
        session: &mut ClientSession,
    ) -> Result<Option<RawDocumentBuf>> {
        loop {
            let next = self.within(async {
                match cursor.advance(session).await {
                    Ok(true) => Ok(Some(cursor.current().to_owned())),
                    Ok(false) => Ok(None),
                    Err(error) => Err(error::to_error("list the sessions", &error)),
                }
            });
            let next = next.await?;
            // Another program's document is passed by.
            if next.as_deref().is_none_or(|found| schema::key(found).is_some()) {
                return Ok(next);
            }
        }
    }

    /// Removes every session that stands in the collection when this begins. One walk along the
    /// keys, which ends however fast new sessions come.
    pub(crate) async fn remove_all(self) -> Result<u64> {
        let (mut removed, mut after) = (0, None);
        loop {
            let filter = doc! { "_id": keys_after(after.take()) };
            let page = self.page(Verb::Clear, filter, doc! { "_id": 1 }, doc! { "_id": 1 }).await?;
            after = page.last().and_then(|last| id_of(last));
            if after.is_none() {
                return Ok(removed);
            }
            removed +=
                self.remove_page(Verb::Clear, doc! { "_id": { "$in": keys(&page) } }).await?;
        }
    }

    /// Removes what has expired.
    pub(crate) async fn remove_expired(self) -> Result<u64> {
        let expired = doc! { "$lte": schema::date(self.clock.wall()) };
        let mut removed = 0;
        loop {
            let filter = doc! { "expires": expired.clone(), "_id": keys_after(None) };
            let order = doc! { "expires": 1 };
            let page = self.page(Verb::Expire, filter, order, doc! { "_id": 1 }).await?;
            // The expiry is asked for again: a session may have been prolonged meanwhile.
            let filter = doc! { "_id": { "$in": keys(&page) }, "expires": expired.clone() };
            let gone = self.remove_page(Verb::Expire, filter).await?;
            // None at all: all is done, or the next page would be this one again.
            if gone == 0 {
                return Ok(removed);
            }
            removed += gone;
        }
    }

    /// These fields of the first documents that a filter finds.
    pub(crate) async fn page(
        &self,
        verb: Verb,
        filter: Document,
        order: Document,
        fields: Document,
    ) -> Result<Vec<RawDocumentBuf>> {
        self.within(async {
            let timer = self.timer_of(verb, "find");
            let documents = self.documents.clone_with_type::<RawDocumentBuf>();
            let find = documents.find(filter).sort(order).limit(PAGE.into());
            let find = find.projection(fields).batch_size(PAGE).max_time(self.timeout);
            let read = async {
                let (mut page, mut session) = (Vec::new(), self.causal().await?);
                let mut cursor = find.session(&mut session).await?;
                while cursor.advance(&mut session).await? {
                    page.push(cursor.current().to_owned());
                }
                self.causal.observe(&session);
                Ok(page)
            };
            match read.await {
                Ok(page) => timer.finish(Outcome::Ok, Ok(page)),
                Err(error) => timer.fail("find the sessions to remove", &error),
            }
        })
        .await
    }

    pub(crate) async fn remove_page(&self, verb: Verb, filter: Document) -> Result<u64> {
        self.within(async {
            let timer = self.timer(verb);
            let removed = async {
                let mut session = self.causal().await?;
                let removed = self.documents.delete_many(filter).session(&mut session).await;
                self.causal.observe(&session);
                removed
            };
            match removed.await {
                Ok(done) => timer.finish(Outcome::Ok, Ok(done.deleted_count)),
                Err(error) => timer.fail("remove sessions", &error),
            }
        })
        .await
    }

    /// One step of a longer operation, under the operation timeout, if the store is still open.
    pub(crate) async fn within<T>(&self, step: impl Future<Output = Result<T>>) -> Result<T> {
        if let Some(refusal) = self.tasks.refusal() {
            return Err(refusal);
        }
        tokio::time::timeout(self.timeout, step)
            .await
            .unwrap_or_else(|_| Err(crate::runtime::timed_out(self.timeout)))
    }
}

pub(crate) fn id_of(found: &RawDocument) -> Option<Bson> {
    found.get("_id").ok()??.try_into().ok()
}

/// The keys of the sessions among these. Not every server orders binaries by length, so that a page may
/// hold a document of another program.
fn keys(page: &[RawDocumentBuf]) -> Vec<Bson> {
    let keys = page.iter().filter_map(|found| schema::key(found));
    keys.map(|key| schema::id(key).into()).collect()
}
