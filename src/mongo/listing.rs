//! Operations that walk over many sessions: listing them, and removing them page by page.

use std::fmt;
use std::pin::Pin;
use std::task::{Context, Poll};

use bson::{Document, RawDocumentBuf, doc};
use futures_core::Stream;
use mongodb::Cursor;
use tokio::sync::mpsc;

use super::{LiveSession, Sessions, document, failure};
use crate::error::{Error, Result};
use crate::metrics::{Outcome, Verb};
use crate::tasks::Tasks;

/// How many sessions one page of a removal has, so that each command stays short and small.
const PAGE: u32 = 1_000;

/// How many sessions a list reads ahead.
const AHEAD: u32 = 64;

/// A stream of the live sessions, from [`MongoStore::all`](crate::MongoStore::all).
///
/// A session that cannot be read is a [`Decode`](crate::ErrorKind::Decode) error in its place, and
/// the stream goes on; any other error ends it. It ends without an error only when it is complete.
#[must_use = "streams do nothing unless polled"]
pub struct LiveSessions {
    received: mpsc::Receiver<Step>,
    ended: bool,
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

impl Sessions {
    pub(super) fn list(&self, tasks: &Tasks) -> LiveSessions {
        let (sender, received) = mpsc::channel(AHEAD as usize);
        if !tasks.is_closed() {
            let (sessions, closed) = (self.clone(), tasks.closed().clone());
            tasks.spawn(async move {
                tokio::select! {
                    () = closed.cancelled() => {}
                    () = sender.closed() => {}
                    () = async {
                        let ended = sessions.send_all(&sender).await;
                        drop(sender.send(Step::Ended(ended)).await);
                    } => {}
                }
            });
        }
        LiveSessions { received, ended: false }
    }

    async fn send_all(&self, sender: &mpsc::Sender<Step>) -> Result<()> {
        let documents = self.documents.clone_with_type::<RawDocumentBuf>();
        let live = doc! { "expires": { "$gt": document::date(self.clock.wall()) } };
        let mut cursor = self
            .within(async {
                let timer = self.timer(Verb::List);
                // No time limit for the server: it would count for all batches together.
                match documents.find(live).batch_size(AHEAD).await {
                    Ok(cursor) => timer.ends(Outcome::Ok, Ok(cursor)),
                    Err(error) => timer.fails("list the sessions", &error),
                }
            })
            .await?;
        while let Some(found) = self.next(&mut cursor).await? {
            let now = self.clock.wall().to_datetime();
            let session = document::live_session(&found);
            if session.as_ref().is_ok_and(|session| now.is_some_and(|now| session.expires <= now)) {
                continue;
            }
            if sender.send(Step::Session(session)).await.is_err() {
                break;
            }
        }
        Ok(())
    }

    async fn next(&self, cursor: &mut Cursor<RawDocumentBuf>) -> Result<Option<RawDocumentBuf>> {
        self.within(async {
            match cursor.advance().await {
                Ok(true) => Ok(Some(cursor.current().to_owned())),
                Ok(false) => Ok(None),
                Err(error) => Err(failure::failure("list the sessions", &error)),
            }
        })
        .await
    }

    /// Removes every session that stands in the collection when this begins. One walk along the
    /// keys, which ends however fast new sessions come.
    pub(super) async fn remove_all(self) -> Result<u64> {
        let (mut removed, mut after) = (0, None);
        loop {
            // Comparisons in a query stay within one type, and keys are binary: what another
            // program keeps here under other types is not ours to remove.
            let first = || doc! { "_id": { "$type": "binData" } };
            let filter = after.take().map_or_else(first, |last| doc! { "_id": { "$gt": last } });
            let page = self.page(Verb::Clear, filter, doc! { "_id": 1 }).await?;
            let Some(last) = page.last().cloned() else { return Ok(removed) };
            removed += self.remove_page(Verb::Clear, doc! { "_id": { "$in": page } }).await?;
            after = Some(last);
        }
    }

    /// Removes what has expired.
    pub(super) async fn remove_expired(self) -> Result<u64> {
        let expired = doc! { "$lte": document::date(self.clock.wall()) };
        let mut removed = 0;
        loop {
            let filter = doc! { "expires": expired.clone() };
            let page = self.page(Verb::Expire, filter, doc! { "expires": 1 }).await?;
            // The expiry is asked for again: a session may have been prolonged meanwhile.
            let filter = doc! { "_id": { "$in": page }, "expires": expired.clone() };
            let gone = self.remove_page(Verb::Expire, filter).await?;
            // None at all: all is done, or the next page would be this one again.
            if gone == 0 {
                return Ok(removed);
            }
            removed += gone;
        }
    }

    async fn page(&self, verb: Verb, filter: Document, order: Document) -> Result<Vec<bson::Bson>> {
        self.within(async {
            let timer = self.timer(verb);
            let find = self.documents.find(filter).sort(order).limit(PAGE.into());
            let find = find.projection(doc! { "_id": 1 }).batch_size(PAGE).max_time(self.timeout);
            let mut keys = Vec::new();
            let read = async {
                let mut session = self.causal().await?;
                let mut cursor = find.session(&mut session).await?;
                while cursor.advance(&mut session).await? {
                    let mut found = cursor.deserialize_current()?;
                    keys.extend(found.remove("_id"));
                }
                self.seen.learn(&session);
                Ok(())
            };
            match read.await {
                Ok(()) => timer.ends(Outcome::Ok, Ok(keys)),
                Err(error) => timer.fails("find the sessions to remove", &error),
            }
        })
        .await
    }

    async fn remove_page(&self, verb: Verb, filter: Document) -> Result<u64> {
        self.within(async {
            let timer = self.timer(verb);
            let removed = async {
                let mut session = self.causal().await?;
                let removed = self.documents.delete_many(filter).session(&mut session).await;
                self.seen.learn(&session);
                removed
            };
            match removed.await {
                Ok(done) => timer.ends(Outcome::Ok, Ok(done.deleted_count)),
                Err(error) => timer.fails("remove sessions", &error),
            }
        })
        .await
    }

    /// One step of a longer operation, under the operation timeout, if the store is still open.
    pub(super) async fn within<T>(&self, step: impl Future<Output = Result<T>>) -> Result<T> {
        if self.closed.is_cancelled() {
            return Err(Error::closed());
        }
        tokio::time::timeout(self.timeout, step)
            .await
            .unwrap_or_else(|_| Err(crate::tasks::timed_out(self.timeout)))
    }
}
