//! Sessions that come from another store, under the ids that they had there: the steps of an
//! [import](crate::import) that need the collection.
//!
//! A session arrives in two steps, between which it is not live: it has no `expires`, so no load, no
//! list and no TTL index takes it for one. A load of it is an error and no absence. The second step
//! changes this one document and no other, so it is done or not done, and it finds nothing if the
//! session was ended, or taken in, before.

use std::collections::HashSet;

use bson::{Bson, Document, RawDocumentBuf, doc};
use mongodb::Collection;
use mongodb::error::{ErrorKind as Driver, InsertManyError};

use super::document::ARRIVED;
use super::{MongoStore, Sessions, checks, document, failure};
use crate::error::{Error, ErrorKind, Result};
use crate::key::SessionKey;
use crate::metrics::{Outcome, Verb};
use crate::record::{Data, WallTime};
use crate::tasks::Tasks;

/// The field of the source's documents that says that they were taken over.
const TAKEN: &str = "imported";

/// How many documents of the source are worked on at a time, and about how many bytes.
const PAGE: u32 = 500;
const PAGE_BYTES: usize = 8 << 20;

/// A collection that sessions come from, and the store that they go to.
pub(crate) struct Takeover {
    source: Collection<Document>,
    store: MongoStore,
}

impl Takeover {
    /// # Errors
    ///
    /// [`Config`](ErrorKind::Config) if the source's writes are not acknowledged: what is taken over
    /// must be known to be.
    pub(crate) fn new(source: &Collection<Document>, store: MongoStore) -> Result<Self> {
        Ok(Self { source: checks::with_concerns(source)?, store })
    }

    pub(crate) fn tasks(&self) -> &Tasks {
        self.store.tasks()
    }

    pub(crate) fn now(&self) -> WallTime {
        self.sessions().clock.wall()
    }

    fn sessions(&self) -> &Sessions {
        &self.store.inner.sessions
    }

    /// The next documents of the source that have a text for an `_id`, in its order.
    pub(crate) async fn page(&self, after: &str) -> Result<Vec<RawDocumentBuf>> {
        let sessions = self.sessions();
        let documents = self.source.clone_with_type::<RawDocumentBuf>();
        let read = async {
            // Comparisons in a query stay within one type.
            let find = documents.find(doc! { "_id": { "$gt": after } }).sort(doc! { "_id": 1 });
            let find = find.limit(PAGE.into()).batch_size(PAGE).max_time(sessions.timeout);
            let (mut cursor, mut page, mut bytes) = (find.await?, Vec::new(), 0);
            while bytes < PAGE_BYTES && cursor.advance().await? {
                let found = cursor.current().to_owned();
                bytes += found.as_bytes().len();
                page.push(found);
            }
            Ok(page)
        };
        let read = async { read.await.map_err(|error| failed("read the old sessions", &error)) };
        sessions.within(read).await
    }

    /// How many documents of the source have an `_id` that is neither a text nor a binary, as ours are.
    pub(crate) async fn foreign(&self) -> Result<u64> {
        let sessions = self.sessions();
        let filter = doc! { "_id": { "$not": { "$type": ["string", "binData"] } } };
        let count = self.source.count_documents(filter).max_time(sessions.timeout);
        let count = async { count.await.map_err(|error| failed("count the old sessions", &error)) };
        sessions.within(count).await
    }

    /// Whether a document of the source was marked by [`mark`](Self::mark).
    pub(crate) fn is_marked(document: &bson::RawDocument) -> bool {
        document.get(TAKEN).is_ok_and(|mark| mark.is_some())
    }

    /// Marks documents of the source, once what was in them [has arrived](Self::arrive).
    pub(crate) async fn mark(&self, ids: &[String]) -> Result<()> {
        let mark = doc! { "$set": { TAKEN: document::date(self.now()) } };
        let mark = self.source.update_many(doc! { "_id": { "$in": ids } }, mark);
        let mark = async { mark.await.map_err(|error| failed("mark the old sessions", &error)) };
        self.sessions().within(mark).await.map(drop)
    }

    /// Removes documents from the source.
    pub(crate) async fn remove(&self, ids: &[String]) -> Result<()> {
        let remove = self.source.delete_many(doc! { "_id": { "$in": ids } });
        let remove =
            async { remove.await.map_err(|error| failed("remove the old sessions", &error)) };
        self.sessions().within(remove).await.map(drop)
    }

    /// The document of a session that is not live yet. Its expiry is the one that it had: an import
    /// is no use of a session.
    pub(crate) fn arrival(
        &self,
        key: SessionKey,
        data: &Data,
        expires: WallTime,
    ) -> Result<Document> {
        let (rev, sessions) = (self.store.inner.revs.next(), self.sessions());
        let form = (data, &sessions.form);
        let mut document = document::insertion(key, rev, form, expires, self.now())?;
        sessions.own(data, &mut document)?;
        document.remove("expires");
        document.insert(ARRIVED, document::date(expires));
        Ok(document)
    }

    /// Stores sessions that are not live yet. Those that are there already, live or not, stay as
    /// they are.
    pub(crate) async fn arrive(&self, arrivals: Vec<Document>) -> Result<()> {
        if arrivals.is_empty() {
            return Ok(());
        }
        let sessions = self.sessions();
        sessions
            .within(async {
                let timer = sessions.timer(Verb::Insert);
                let inserted = async {
                    let mut session = sessions.causal().await?;
                    let insert = sessions.documents.insert_many(&arrivals).ordered(false);
                    let inserted = insert.session(&mut session).await;
                    sessions.seen.learn(&session);
                    inserted.map(drop)
                };
                match inserted.await {
                    Ok(()) => timer.ends(Outcome::Ok, Ok(())),
                    Err(error) => match in_the_way(&error) {
                        Some(places) => {
                            // Those from an earlier run, as it should be: no id was drawn twice.
                            drop(timer.ends(Outcome::Ok, Ok(())));
                            self.are_there(places.filter_map(|at| arrivals.get(at))).await
                        }
                        None => timer.fails("take sessions over", &error),
                    },
                }
            })
            .await
    }

    /// Makes sure that it was sessions that were in the way of others with the same key: the source
    /// is to be removed next.
    async fn are_there(&self, arrivals: impl Iterator<Item = &Document>) -> Result<()> {
        let sessions = self.sessions();
        let keys: HashSet<SessionKey> = arrivals
            .filter_map(|it| SessionKey::from_bytes(it.get_binary_generic("_id").ok()?))
            .collect();
        let timer = sessions.timer(Verb::Find);
        let keys: Vec<_> = keys.into_iter().collect();
        match sessions.find_documents(&keys, Some(doc! { "_id": 1 }), |_| ()).await {
            Ok(found) if found.len() == keys.len() => timer.ends(Outcome::Ok, Ok(())),
            Ok(_) => timer.ends(
                Outcome::Ok,
                Err(Error::new(
                    ErrorKind::Server,
                    "a session could not be taken over, since another one had its key, or one that \
                     was ended just now: run the import again, and if it ends with this again, see \
                     whether there is a unique index on the sessions collection beside the one on \
                     _id",
                )),
            ),
            Err(error) => timer.fails("look for sessions", &error),
        }
    }

    /// Makes the sessions live that have arrived; answers with how many those were. One that was
    /// ended meanwhile stays ended, and one that is live already stays as it is.
    pub(crate) async fn admit(&self, keys: &[SessionKey]) -> Result<u64> {
        if keys.is_empty() {
            return Ok(0);
        }
        let sessions = self.sessions();
        let ids: Vec<Bson> = keys.iter().map(|key| document::id(*key).into()).collect();
        let arrived = doc! { "_id": { "$in": ids }, ARRIVED: { "$exists": true } };
        let stages =
            vec![doc! { "$set": { "expires": format!("${ARRIVED}") } }, doc! { "$unset": ARRIVED }];
        sessions
            .within(async {
                let timer = sessions.timer(Verb::Replace);
                let updated = async {
                    let mut session = sessions.causal().await?;
                    let update = sessions.documents.update_many(arrived, stages);
                    let updated = update.session(&mut session).await;
                    sessions.seen.learn(&session);
                    updated
                };
                match updated.await {
                    Ok(done) => timer.ends(Outcome::Ok, Ok(done.modified_count)),
                    Err(error) => timer.fails("take sessions over", &error),
                }
            })
            .await
    }
}

/// Which of the documents were not inserted, if that is all that went wrong, since others had their
/// keys.
fn in_the_way(error: &mongodb::error::Error) -> Option<impl Iterator<Item = usize>> {
    let Driver::InsertMany(InsertManyError { write_errors, write_concern_error, .. }) =
        &*error.kind
    else {
        return None;
    };
    let errors = write_errors.as_ref().filter(|_| write_concern_error.is_none())?;
    let all = errors.iter().all(|error| error.code == failure::DUPLICATE_KEY);
    all.then(|| errors.iter().map(|error| error.index).collect::<Vec<_>>().into_iter())
}

fn failed(doing: &str, error: &mongodb::error::Error) -> Error {
    failure::failure(doing, error)
}
