//! Sessions that come from another store, under the ids that they had there: the steps of an
//! [import](crate::import) that need the collection.
//!
//! A session arrives in two steps, between which it is not live: it has no `expires`, so no load, no
//! list and no TTL index takes it for one. A load of it is an error and no absence. The second step
//! changes this one document and no other, so it is done or not done, and it finds nothing if the
//! session was ended, or taken in, before. It finds it by its `rev`, which the old document has for a
//! mark by then: why, see [there](crate::import).

use std::collections::HashMap;

use bson::{Bson, Document, RawBsonRef, RawDocument, RawDocumentBuf, doc};
use mongodb::error::{ErrorKind as Driver, InsertManyError};
use mongodb::{ClientSession, Collection};

use crate::error::{Error, ErrorKind, Result};
use crate::mongo::MongoStore;
use crate::mongo::causal::CausalSessions;
use crate::mongo::collection::SessionCollection;
use crate::mongo::connect::validate;
use crate::mongo::error;
use crate::mongo::ops::batch;
use crate::mongo::schema;
use crate::mongo::schema::IMPORTING;
use crate::mongo::server_errors::DUPLICATE_KEY;
use crate::runtime::Tasks;
use crate::session::Data;
use crate::session::id::SessionKey;
use crate::telemetry::metrics::{Outcome, Verb};
use crate::time::WallTime;

/// The field of the source's documents that says that they were taken over.
const CLAIM_FIELD: &str = "imported";

/// How many documents of the source are worked on at a time, and about how many bytes.
const PAGE: u32 = 500;
const PAGE_BYTES: usize = 8 << 20;

const CLAIM: &str = "mark the old sessions";

/// The marks on documents of the source, by their `_id`.
pub(crate) type Claims = HashMap<String, Vec<u8>>;

/// The `rev` of each session that is there.
pub(crate) type Revs = HashMap<SessionKey, Vec<u8>>;

/// What stands on a document of the source.
pub(crate) enum Claim<'a> {
    Rev(&'a [u8]),
    /// It is none of ours.
    Foreign,
}

/// A collection that sessions come from, and the store that they go to.
pub(crate) struct ImportSteps {
    source: Collection<Document>,
    store: MongoStore,
}

impl ImportSteps {
    /// # Errors
    ///
    /// [`Config`](ErrorKind::Config) if the source's writes are not acknowledged: what is taken over
    /// must be known to be.
    pub(crate) fn new(source: &Collection<Document>, store: MongoStore) -> Result<Self> {
        Ok(Self { source: validate::with_concerns(source)?, store })
    }

    pub(crate) fn tasks(&self) -> &Tasks {
        self.store.tasks()
    }

    pub(crate) fn now(&self) -> WallTime {
        self.sessions().clock.wall()
    }

    fn sessions(&self) -> &SessionCollection {
        &self.store.inner.collection
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

    /// The mark on a document of the source: the `rev` of the one arrival that may become live for it.
    /// `None` if there is none yet.
    pub(crate) fn claim_on(document: &RawDocument) -> Option<Claim<'_>> {
        match document.get(CLAIM_FIELD) {
            Ok(None) => None,
            Ok(Some(RawBsonRef::Binary(rev))) => Some(Claim::Rev(rev.bytes)),
            Ok(Some(_)) | Err(_) => Some(Claim::Foreign),
        }
    }

    /// Marks documents of the source with the arrivals that were found for them, unless they are marked
    /// already, and answers with the marks that they have from now on. One that is gone has none.
    pub(crate) async fn claim(&self, ids: &[(String, Option<Vec<u8>>)]) -> Result<Claims> {
        let ours = ids.iter().filter_map(|(id, rev)| Some((id.clone(), rev.clone()?)));
        let ours: Claims = ours.collect();
        let statements: Vec<_> = ours
            .iter()
            .map(|(id, rev)| {
                let mark = doc! { "$set": { CLAIM_FIELD: schema::binary(rev) } };
                doc! { "q": { "_id": id, CLAIM_FIELD: { "$exists": false } }, "u": mark }
            })
            .collect();
        let sent = statements.len();
        let marked = async {
            // So that what is read is no older than the marks of another run that were in the way.
            let start = CausalSessions::new_session(self.source.client()).await;
            let mut session = start.map_err(|error| failed(CLAIM, &error))?;
            let reply = match sent {
                0 => Document::new(),
                _ => batch::update(&self.source, statements, &mut session)
                    .await
                    .map_err(|error| failed(CLAIM, &error))?,
            };
            if let Some(refusal) = refusal(&reply) {
                return Err(refusal);
            }
            if sent == ids.len() && batch::number(&reply, "nModified") == Some(sent) {
                return Ok(ours);
            }
            let ids: Vec<_> = ids.iter().map(|(id, _)| id.as_str()).collect();
            let marks = self.read_claims(&ids, &mut session).await;
            marks.map_err(|error| failed("read the marks of the old sessions", &error))?
        };
        self.sessions().within(marked).await
    }

    async fn read_claims(
        &self,
        ids: &[&str],
        session: &mut ClientSession,
    ) -> mongodb::error::Result<Result<Claims>> {
        let documents = self.source.clone_with_type::<RawDocumentBuf>();
        let find =
            documents.find(doc! { "_id": { "$in": ids } }).projection(doc! { CLAIM_FIELD: 1 });
        let find = find.batch_size(PAGE).max_time(self.sessions().timeout);
        let mut cursor = find.session(&mut *session).await?;
        let mut marks = Claims::with_capacity(ids.len());
        while cursor.advance(session).await? {
            let found = cursor.current();
            let (Ok(id), Some(Claim::Rev(rev))) = (found.get_str("_id"), Self::claim_on(found))
            else {
                return Ok(Err(Error::new(
                    ErrorKind::Server,
                    "a session could not be taken over, since another one had its key, or one that \
                     was ended just now: run the import again, and if it ends with this again, see \
                     whether there is a unique index on the sessions collection beside the one on \
                     _id",
                )));
            };
            marks.insert(id.to_owned(), rev.to_vec());
        }
        Ok(Ok(marks))
    }

    /// Removes marked documents from the source.
    pub(crate) async fn remove(&self, ids: &[String]) -> Result<()> {
        let marked = doc! { "_id": { "$in": ids }, CLAIM_FIELD: { "$exists": true } };
        let remove = self.source.delete_many(marked);
        let remove =
            async { remove.await.map_err(|error| failed("remove the old sessions", &error)) };
        self.sessions().within(remove).await.map(drop)
    }

    /// The document of a session that is not live yet, or why it cannot be stored. Its expiry is the one
    /// that it had: an import is no use of a session.
    ///
    /// # Errors
    ///
    /// What would befall any session, as an encryption that fails.
    pub(crate) fn staged_document(
        &self,
        key: SessionKey,
        data: &Data,
        expires: WallTime,
    ) -> Result<std::result::Result<Document, &'static str>> {
        let (rev, sessions) = (self.store.inner.revs.next(), self.sessions());
        let mut document = match schema::insert_document(
            key,
            rev,
            (data, &sessions.format),
            expires,
            self.now(),
        ) {
            Ok(document) => document,
            Err(error) if error.kind() == ErrorKind::Encode && !sessions.format.holds(data) => {
                return Ok(Err("its data is larger or deeper than what can be stored"));
            }
            Err(error) => return Err(error),
        };
        match sessions.add_owner(data, &mut document) {
            Ok(_) => {}
            Err(error) if error.kind() == ErrorKind::Encode => {
                return Ok(Err("its owner is longer than what can be stored"));
            }
            Err(error) if error.kind() == ErrorKind::Panic => {
                return Ok(Err("the `owner` function panicked on its data"));
            }
            Err(error) => return Err(error),
        }
        document.remove("expires");
        document.insert(IMPORTING, schema::date(expires));
        Ok(Ok(document))
    }

    /// Stores sessions that are not live yet. Those that are there already, live or not, stay as
    /// they are. Answers with the `rev` of each that is there then.
    pub(crate) async fn stage(&self, arrivals: Vec<Document>) -> Result<Revs> {
        if arrivals.is_empty() {
            return Ok(Revs::new());
        }
        let sessions = self.sessions();
        sessions
            .within(async {
                let timer = sessions.timer(Verb::Insert);
                let inserted = async {
                    let mut session = sessions.causal_session().await?;
                    let insert = sessions.documents.insert_many(&arrivals).ordered(false);
                    let inserted = insert.session(&mut session).await;
                    sessions.causal.observe(&session);
                    inserted.map(drop)
                };
                let mut revs: Revs = arrivals.iter().filter_map(key_and_rev).collect();
                match inserted.await {
                    Ok(()) => timer.finish(Outcome::Ok, Ok(revs)),
                    Err(error) => match duplicate_positions(&error) {
                        Some(places) => {
                            // Those from another run, as it should be: no id was drawn twice.
                            drop(timer.finish(Outcome::Ok, Ok(())));
                            let theirs = places.filter_map(|at| key_and_rev(arrivals.get(at)?));
                            let keys: Vec<_> = theirs.map(|(key, _)| key).collect();
                            revs.retain(|key, _| !keys.contains(key));
                            revs.extend(self.revs_of(&keys).await?);
                            Ok(revs)
                        }
                        None => timer.fail("take sessions over", &error),
                    },
                }
            })
            .await
    }

    async fn revs_of(&self, keys: &[SessionKey]) -> Result<Revs> {
        let sessions = self.sessions();
        let timer = sessions.timer(Verb::Find);
        let rev = |found: &RawDocument| schema::rev(found).to_vec();
        match sessions.find_documents(keys, Some(doc! { "rev": 1 }), rev).await {
            Ok(found) => timer.finish(Outcome::Ok, Ok(found)),
            Err(error) => timer.fail("look for sessions", &error),
        }
    }

    /// Makes the sessions live that have arrived under these revs; answers with how many those were.
    /// One that was ended meanwhile stays ended, and one that is live already stays as it is.
    pub(crate) async fn activate(&self, sessions: &[(SessionKey, Vec<u8>)]) -> Result<u64> {
        if sessions.is_empty() {
            return Ok(0);
        }
        let arrived = staged(sessions);
        let stages = vec![
            doc! { "$set": { "expires": format!("${IMPORTING}") } },
            doc! { "$unset": IMPORTING },
        ];
        let sessions = self.sessions();
        sessions
            .within(async {
                let timer = sessions.timer(Verb::Replace);
                let updated = async {
                    let mut session = sessions.causal_session().await?;
                    let update = sessions.documents.update_many(arrived, stages);
                    let updated = update.session(&mut session).await;
                    sessions.causal.observe(&session);
                    updated
                };
                match updated.await {
                    Ok(done) => timer.finish(Outcome::Ok, Ok(done.modified_count)),
                    Err(error) => timer.fail("take sessions over", &error),
                }
            })
            .await
    }

    /// Removes what has arrived under these revs and is not live: it is never to be.
    pub(crate) async fn discard(&self, stale: &[(SessionKey, Vec<u8>)]) -> Result<()> {
        if stale.is_empty() {
            return Ok(());
        }
        self.discard_matching(staged(stale)).await
    }

    /// Removes what has arrived and was not made live while it might have been.
    pub(crate) async fn discard_expired(&self) -> Result<()> {
        // By the index on `expires`, in which they stand as those without.
        let now = schema::date(self.now());
        self.discard_matching(doc! { "expires": Bson::Null, IMPORTING: { "$lte": now } }).await
    }

    async fn discard_matching(&self, filter: Document) -> Result<()> {
        let sessions = self.sessions();
        sessions
            .within(async {
                let timer = sessions.timer(Verb::Remove);
                let removed = async {
                    let mut session = sessions.causal_session().await?;
                    let removed =
                        sessions.documents.delete_many(filter).session(&mut session).await;
                    sessions.causal.observe(&session);
                    removed
                };
                match removed.await {
                    Ok(_) => timer.finish(Outcome::Ok, Ok(())),
                    Err(error) => timer.fail("remove what was not taken over", &error),
                }
            })
            .await
    }
}

/// What finds those of these arrivals that are not live. A `rev` is of one session alone, so that the
/// keys and the revs need not be told in pairs.
fn staged(sessions: &[(SessionKey, Vec<u8>)]) -> Document {
    let ids: Vec<Bson> = sessions.iter().map(|(key, _)| schema::id(*key).into()).collect();
    let revs: Vec<Bson> = sessions.iter().map(|(_, rev)| schema::binary(rev).into()).collect();
    doc! { "_id": { "$in": ids }, IMPORTING: { "$exists": true }, "rev": { "$in": revs } }
}

fn key_and_rev(arrival: &Document) -> Option<(SessionKey, Vec<u8>)> {
    let key = SessionKey::from_bytes(arrival.get_binary_generic("_id").ok()?)?;
    Some((key, arrival.get_binary_generic("rev").ok()?.clone()))
}

/// What went wrong with the marks, if anything did.
fn refusal(reply: &Document) -> Option<Error> {
    let errors = reply.get_array("writeErrors").into_iter().flatten().filter_map(Bson::as_document);
    let error = reply.get_document("writeConcernError").ok().into_iter().chain(errors).next()?;
    let code = batch::number(error, "code").and_then(|code| i32::try_from(code).ok());
    Some(error::refused(CLAIM, code.unwrap_or_default()))
}

/// Which of the documents were not inserted, if that is all that went wrong, since others had their
/// keys.
fn duplicate_positions(error: &mongodb::error::Error) -> Option<impl Iterator<Item = usize>> {
    let Driver::InsertMany(InsertManyError { write_errors, write_concern_error, .. }) =
        &*error.kind
    else {
        return None;
    };
    let errors = write_errors.as_ref().filter(|_| write_concern_error.is_none())?;
    let all = errors.iter().all(|error| error.code == DUPLICATE_KEY);
    all.then(|| errors.iter().map(|error| error.index).collect::<Vec<_>>().into_iter())
}

fn failed(doing: &str, error: &mongodb::error::Error) -> Error {
    error::to_error(doing, error)
}
