//! The operations that list live sessions, as a stream.

use std::fmt;
use std::pin::Pin;
use std::task::{Context, Poll};

use bson::{Document, RawDocumentBuf, doc};
use futures_core::Stream;
use mongodb::{ClientSession, SessionCursor};
use tokio::sync::mpsc;

use crate::error::{Error, Result};
use crate::mongo::LiveSession;
use crate::mongo::collection::SessionCollection;
use crate::mongo::error;
use crate::mongo::ops::query::and;
use crate::mongo::schema;
use crate::mongo::task_stream::{Step, TaskStream};
use crate::runtime::Tasks;
use crate::telemetry::metrics::{Outcome, Verb};
use crate::time::WallTime;

/// The number of sessions that a list reads ahead.
const CHANNEL_CAPACITY: u32 = 64;

/// A stream of the live sessions, from [`MongoStore::all`](crate::MongoStore::all).
///
/// A session that cannot be read is a [`Decode`](crate::ErrorKind::Decode) error in its place, and the
/// stream goes on. Any other error ends the stream. The stream ends without an error only when it is
/// complete.
#[must_use = "streams do nothing unless polled"]
pub struct LiveSessions(TaskStream<LiveSession>);

impl LiveSessions {
    /// A list whose only item is this error.
    pub(crate) fn failed(error: Error) -> Self {
        Self(TaskStream::failed(error))
    }
}

impl Stream for LiveSessions {
    type Item = Result<LiveSession>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        Pin::new(&mut self.0).poll_next(context)
    }
}

impl fmt::Debug for LiveSessions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LiveSessions").finish_non_exhaustive()
    }
}

/// The live sessions to list, and their order.
pub(crate) struct ListQuery {
    pub(crate) wanted: Option<Document>,
    pub(crate) order: Option<Document>,
}

impl ListQuery {
    pub(crate) fn all() -> Self {
        Self { wanted: None, order: None }
    }
}

impl SessionCollection {
    /// Starts a task that reads the sessions, and returns their stream.
    pub(crate) fn list(&self, tasks: &Tasks, query: ListQuery) -> LiveSessions {
        let (sender, stream) = TaskStream::channel(CHANNEL_CAPACITY as usize);
        if !tasks.is_closed() {
            let sessions = self.clone();
            let closed = tasks.closed().clone();
            let client_closed = tasks.client_closed().clone();
            tasks.spawn(async move {
                tokio::select! {
                    () = closed.cancelled() => {}
                    () = sender.closed() => {}
                    () = async {
                        // The driver session of a list that nobody polls must not keep the app's
                        // `Client::shutdown` waiting.
                        let sends = sessions.send_all(&sender, query);
                        let result = client_closed.run_until_cancelled(sends).await;
                        let result = result.unwrap_or_else(|| Err(Error::client_closed()));
                        let _ = sender.send(Step::Ended(result)).await;
                    } => {}
                }
            });
        }
        LiveSessions(stream)
    }

    /// Opens a cursor over live sessions.
    pub(crate) async fn open(
        &self,
        query: ListQuery,
    ) -> Result<(ClientSession, SessionCursor<RawDocumentBuf>)> {
        let documents = self.documents.clone_with_type::<RawDocumentBuf>();
        let mut live = doc! { "expires": { "$gt": schema::date(self.clock.wall()) } };
        if let Some(wanted) = query.wanted {
            live = and(wanted, live);
        }
        // The server gets no time limit: it would count for all batches together.
        let mut find = documents.find(live).batch_size(CHANNEL_CAPACITY);
        if let Some(order) = query.order {
            find = find.sort(order);
        }
        self.within(async {
            let timer = self.timer(Verb::List);
            let found = async {
                let mut session = self.causal_session().await?;
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

    async fn send_all(
        &self,
        sender: &mpsc::Sender<Step<LiveSession>>,
        query: ListQuery,
    ) -> Result<()> {
        let (mut session, mut cursor) = self.open(query).await?;
        while let Some(found) = self.next(&mut cursor, &mut session).await? {
            let mut live = schema::live_session(&found, &self.format);
            if let Ok(live) = &mut live {
                let created = Some(WallTime::from_datetime(live.created));
                let expires = WallTime::from_datetime(live.expires);
                let expires = self.lifetime.cap(expires, created).unwrap_or(expires);
                // The session may have expired while the list waited for its consumer.
                if expires <= self.clock.wall() {
                    continue;
                }
                live.expires = expires.to_datetime().unwrap_or(live.expires);
            }
            if sender.send(Step::Item(live)).await.is_err() {
                break;
            }
        }
        Ok(())
    }

    /// Reads the next document of a list that is a session. Documents of other programs are skipped.
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
            if next.as_deref().is_none_or(|found| schema::key(found).is_some()) {
                return Ok(next);
            }
        }
    }
}
