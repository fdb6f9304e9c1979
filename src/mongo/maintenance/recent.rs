//! The reads of a warm-up, which do not go through the batch queue that requests use.

use std::time::Duration;

use bson::{Bson, RawDocumentBuf, doc};
use tokio::time::timeout;

use crate::error::{Error, ErrorKind, Result};
use crate::mongo::MongoStore;
use crate::mongo::builder::{MAX_DURATION, MIN_DURATION};
use crate::mongo::schema;
use crate::session::Session;
use crate::session::id::SessionKey;
use crate::telemetry::metrics::{Outcome, Verb};

impl MongoStore {
    /// Returns the keys of the most recently written live sessions, the latest first; `None` if that takes longer
    /// than `within`.
    pub(crate) async fn newest(
        &self,
        sessions: u64,
        within: Duration,
    ) -> Result<Option<Vec<SessionKey>>> {
        let this = &self.inner.collection;
        let live = doc! {
            "expires": { "$gt": schema::date(this.clock.wall()) },
            "_id": schema::keys_after(None),
        };
        // The projection comes before the sort, so that the server sorts small documents.
        let stages = [
            doc! { "$match": live },
            doc! { "$project": { "updated": 1 } },
            doc! { "$sort": { "updated": -1 } },
            doc! { "$limit": i64::try_from(sessions.max(1)).unwrap_or(i64::MAX) },
            doc! { "$project": { "_id": 1 } },
        ];
        let within = within.clamp(MIN_DURATION, MAX_DURATION);
        let timer = this.timer_of(Verb::List, "aggregate").with_timeout(Duration::MAX);
        let read = async {
            let aggregate = this.documents.aggregate(stages).with_type::<RawDocumentBuf>();
            let mut cursor = aggregate.allow_disk_use(true).max_time(within).await?;
            let mut keys = Vec::new();
            while cursor.advance().await? {
                keys.extend(schema::key(cursor.current()));
            }
            Ok(keys)
        };
        let Some(found) = this.closed.run_until_cancelled(timeout(within, read)).await else {
            return Err(Error::closed());
        };
        match found {
            Ok(Ok(keys)) => timer.finish(Outcome::Ok, Ok(Some(keys))),
            Ok(Err(error)) => match timer.fail("find the sessions written last", &error) {
                Err(error) if error.kind() == ErrorKind::Timeout => Ok(None),
                failed => failed,
            },
            Err(_) => {
                timer.finish_unanswered(Outcome::Ok);
                Ok(None)
            }
        }
    }

    /// Reads the sessions of these keys by one command, under the operation timeout. Calls `each` with every session
    /// that is live and can be read, and with its size in MongoDB in bytes, until `each` returns `false`.
    pub(crate) async fn read_each(
        &self,
        keys: &[SessionKey],
        mut each: impl FnMut(SessionKey, Session, u64) -> bool,
    ) -> Result<()> {
        let this = &self.inner.collection;
        let ids: Vec<Bson> = keys.iter().map(|key| schema::id(*key).into()).collect();
        let documents = this.documents.clone_with_type::<RawDocumentBuf>();
        this.within(async {
            let timer = this.timer(Verb::Find);
            let read = async {
                let mut session = this.causal_session().await?;
                let find = documents.find(doc! { "_id": { "$in": ids } }).max_time(this.timeout);
                let mut cursor = find.session(&mut session).await?;
                while cursor.advance(&mut session).await? {
                    let found = cursor.current();
                    // A session that cannot be read is skipped. Its next load returns the error.
                    let live = this.read(found).ok().flatten();
                    let bytes = u64::try_from(found.as_bytes().len()).unwrap_or(u64::MAX);
                    if let (Some(key), Some(live)) = (schema::key(found), live)
                        && !each(key, live, bytes)
                    {
                        break;
                    }
                }
                this.causal.observe(&session);
                Ok(())
            };
            match read.await {
                Ok(()) => timer.finish(Outcome::Ok, Ok(())),
                Err(error) => timer.fail("read the sessions written last", &error),
            }
        })
        .await
    }
}
