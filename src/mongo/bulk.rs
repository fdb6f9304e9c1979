//! Many operations in one command: what [`Dispatch`](crate::dispatch::Dispatch) sends while the
//! server is busy.

use std::collections::HashMap;
use std::sync::atomic::Ordering;

use bson::{Bson, RawDocumentBuf, doc};
use mongodb::error::{Error as DriverError, ErrorKind as Driver, PartialBulkWriteResult};
use mongodb::options::{UpdateOneModel, WriteModel};
use mongodb::results::UpdateResult;
use tokio::task::JoinSet;

use super::operations::Update;
use super::{Sessions, document, failure};
use crate::dispatch::Commands;
use crate::error::{Error, ErrorKind, Result};
use crate::key::SessionKey;
use crate::metrics::{Outcome, Verb};
use crate::record::{Session, WallTime};

/// The server's code for a command that it does not have.
const COMMAND_NOT_FOUND: i32 = 59;

type Saved = Result<Option<WallTime>>;

impl Sessions {
    /// Reads the sessions of different keys by one `find`.
    pub(super) async fn find_many(
        self,
        keys: Vec<SessionKey>,
    ) -> Result<Vec<Result<Option<Session>>>> {
        let timer = self.timer(Verb::Find);
        self.metrics.finds_together(keys.len());
        match self.find_documents(&keys).await {
            Ok(mut found) => timer.ends(
                Outcome::Ok,
                Ok(keys
                    .iter()
                    .map(|key| found.remove(key).map_or(Ok(None), |found| self.read(&found)))
                    .collect()),
            ),
            Err(error) => timer.fails("load sessions", &error),
        }
    }

    async fn find_documents(
        &self,
        keys: &[SessionKey],
    ) -> mongodb::error::Result<HashMap<SessionKey, RawDocumentBuf>> {
        let ids: Vec<Bson> = keys.iter().map(|key| document::id(*key).into()).collect();
        let documents = self.documents.clone_with_type::<RawDocumentBuf>();
        let mut session = self.causal().await?;
        // One more than there are, so that the first batch is seen to be the last.
        let batch = u32::try_from(keys.len()).unwrap_or(u32::MAX).saturating_add(1);
        let find = documents.find(doc! { "_id": { "$in": ids } }).batch_size(batch);
        let mut cursor = find.max_time(self.timeout).session(&mut session).await?;
        let mut found = HashMap::with_capacity(keys.len());
        while cursor.advance(&mut session).await? {
            let document = cursor.current();
            if let Some(key) = document::key(document) {
                found.insert(key, document.to_owned());
            }
        }
        self.seen.learn(&session);
        Ok(found)
    }

    /// Sends updates of different sessions as one `bulkWrite`, or each by itself to a server older
    /// than 8.0, which has none.
    pub(super) async fn bulk(self, updates: Vec<Update>) -> Result<Vec<Saved>> {
        if self.no_bulk.load(Ordering::Relaxed) {
            return Ok(self.one_by_one(updates).await);
        }
        let timer = self.timer(Verb::Bulk);
        let expiries: Vec<_> = updates.iter().map(|update| update.expires).collect();
        match self.write(&updates).await {
            Ok(results) => {
                self.metrics.writes_together(updates.len());
                timer.ends(Outcome::Ok, Ok(self.outcomes(&expiries, &results, |_| no_word())))
            }
            Err(error) if is_unknown(&error) => {
                self.no_bulk.store(true, Ordering::Relaxed);
                tracing::debug!("the server has no bulkWrite, so saves are sent one by one");
                drop(timer.ends(Outcome::Ok, Ok(())));
                Ok(self.one_by_one(updates).await)
            }
            Err(error) => {
                self.metrics.writes_together(updates.len());
                let failed = timer.fails("save sessions", &error);
                let Driver::BulkWrite(partly) = &*error.kind else { return failed };
                let none = HashMap::new();
                let results = match &partly.partial_result {
                    // Nothing is acknowledged where the write concern was not met.
                    Some(PartialBulkWriteResult::Verbose(result))
                        if partly.write_concern_errors.is_empty() =>
                    {
                        &result.update_results
                    }
                    _ => &none,
                };
                let why = failed.err().unwrap_or_else(no_word);
                Ok(self.outcomes(&expiries, results, |index| {
                    partly.write_errors.get(&index).map_or_else(
                        || why.clone(),
                        |write| failure::refused("save a session", write.code),
                    )
                }))
            }
        }
    }

    async fn write(
        &self,
        updates: &[Update],
    ) -> mongodb::error::Result<HashMap<usize, UpdateResult>> {
        // Of what was seen the server need not be told: with that, the driver adds a read concern,
        // which not every server takes here.
        let mut session = self.seen.blank(self.documents.client()).await?;
        let namespace = self.documents.namespace();
        let models = updates.iter().map(|update| {
            let model = UpdateOneModel::builder().namespace(namespace.clone());
            let model = model.filter(self.live(update.key)).update(update.document.clone());
            WriteModel::UpdateOne(model.build())
        });
        let writes = self.documents.client().bulk_write(models).ordered(false).verbose_results();
        let writes = match self.documents.write_concern() {
            Some(concern) => writes.write_concern(concern.clone()),
            None => writes,
        };
        let written = writes.session(&mut session).await;
        self.seen.learn(&session);
        Ok(written?.update_results)
    }

    fn outcomes(
        &self,
        expiries: &[WallTime],
        results: &HashMap<usize, UpdateResult>,
        failed: impl Fn(usize) -> Error,
    ) -> Vec<Saved> {
        let saved = expiries.iter().enumerate().map(|(index, expires)| match results.get(&index) {
            Some(result) => Ok(self.stored(result.matched_count > 0, *expires)),
            None => Err(failed(index)),
        });
        saved.collect()
    }

    async fn one_by_one(self, updates: Vec<Update>) -> Vec<Saved> {
        let mut saved: Vec<Saved> = updates.iter().map(|_| Err(Error::cut_off())).collect();
        let mut tasks = JoinSet::new();
        for (index, update) in updates.into_iter().enumerate() {
            let update = self.update(update);
            tasks.spawn(async move { (index, update.await) });
        }
        while let Some(done) = tasks.join_next().await {
            if let Ok((index, outcome)) = done {
                saved[index] = outcome;
            }
        }
        saved
    }
}

/// Whether the server does not have this command, in which case nothing was done.
fn is_unknown(error: &DriverError) -> bool {
    matches!(&*error.kind, Driver::IncompatibleServer { .. })
        || failure::code(error) == Some(COMMAND_NOT_FOUND)
}

fn no_word() -> Error {
    Error::new(ErrorKind::Server, "MongoDB did not tell how the save of a session ended")
}
