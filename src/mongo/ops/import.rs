//! The steps of an [import](crate::import) that read and write collections. An imported session keeps its id.
//!
//! A session is imported in two steps: `stage` inserts it, and `activate` makes it live. In between it has no
//! `expires`, so it is not in a list, and the TTL index does not remove it. Loading it is an error, and not `None`.
//!
//! `activate` changes a single document, so it happens fully or not at all. It matches the document by its `rev`,
//! which is also the claim on the old document by then. So it matches nothing if the session was ended or activated
//! before. The [module of the import](crate::import) says why.

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

/// The field of a source document with the claim on it.
const CLAIM_FIELD: &str = "imported";

/// The most documents of the source in a page, and the approximate most bytes.
const PAGE: u32 = 500;
const PAGE_BYTES: usize = 8 << 20;

/// What a claim tries to do, for an error message.
const CLAIM: &str = "claim the old sessions";

/// The claims on documents of the source, by their `_id`.
pub(crate) type Claims = HashMap<String, Vec<u8>>;

/// The `rev` of each session that exists.
pub(crate) type Revs = HashMap<SessionKey, Vec<u8>>;

/// The claim on a document of the source.
pub(crate) enum Claim<'a> {
    /// The `rev` of the only staged session that may become live for this document.
    Rev(&'a [u8]),
    /// The field has a value of another program.
    Foreign,
}

/// The collection that sessions come from, and the store that they go to.
pub(crate) struct ImportSteps {
    source: Collection<Document>,
    store: MongoStore,
}

impl ImportSteps {
    /// # Errors
    ///
    /// [`Config`](ErrorKind::Config) if writes to the source are not acknowledged: an import must know whether a
    /// claim is stored.
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

    /// Reads the next documents of the source whose `_id` is a text, in the order of their `_id`.
    pub(crate) async fn page(&self, after: &str) -> Result<Vec<RawDocumentBuf>> {
        let sessions = self.sessions();
        let documents = self.source.clone_with_type::<RawDocumentBuf>();
        let read = async {
            // A comparison in a query matches only values of one type.
            let find = documents.find(doc! { "_id": { "$gt": after } }).sort(doc! { "_id": 1 });
            let find = find.limit(PAGE.into()).batch_size(PAGE).max_time(sessions.timeout);
            let mut cursor = find.await?;
            let mut page = Vec::new();
            let mut bytes = 0;
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

    /// Counts the documents of the source whose `_id` is neither a text nor a binary, as that of this store's
    /// sessions is.
    pub(crate) async fn foreign(&self) -> Result<u64> {
        let sessions = self.sessions();
        let filter = doc! { "_id": { "$not": { "$type": ["string", "binData"] } } };
        let count = self.source.count_documents(filter).max_time(sessions.timeout);
        let count = async { count.await.map_err(|error| failed("count the old sessions", &error)) };
        sessions.within(count).await
    }

    /// Reads the claim on a document of the source; `None` if it has none yet.
    pub(crate) fn claim_on(document: &RawDocument) -> Option<Claim<'_>> {
        match document.get(CLAIM_FIELD) {
            Ok(None) => None,
            Ok(Some(RawBsonRef::Binary(rev))) => Some(Claim::Rev(rev.bytes)),
            Ok(Some(_)) | Err(_) => Some(Claim::Foreign),
        }
    }

    /// Claims documents of the source for the staged sessions with these revs, unless they are claimed already.
    /// Returns the claims that the documents have from now on. A document that is gone has no claim.
    pub(crate) async fn claim(&self, ids: &[(String, Option<Vec<u8>>)]) -> Result<Claims> {
        let ours = ids.iter().filter_map(|(id, rev)| Some((id.clone(), rev.clone()?)));
        let ours: Claims = ours.collect();
        let statements: Vec<_> = ours
            .iter()
            .map(|(id, rev)| {
                let claim = doc! { "$set": { CLAIM_FIELD: schema::binary(rev) } };
                doc! { "q": { "_id": id, CLAIM_FIELD: { "$exists": false } }, "u": claim }
            })
            .collect();
        let sent = statements.len();
        let claimed = async {
            // With a causally consistent session, the read below includes the claims of another run that prevented
            // ours.
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
            let claims = self.read_claims(&ids, &mut session).await;
            claims.map_err(|error| failed("read the claims of the old sessions", &error))?
        };
        self.sessions().within(claimed).await
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
        let mut claims = Claims::with_capacity(ids.len());
        while cursor.advance(session).await? {
            let found = cursor.current();
            let (Ok(id), Some(Claim::Rev(rev))) = (found.get_str("_id"), Self::claim_on(found))
            else {
                return Ok(Err(Error::new(
                    ErrorKind::Server,
                    "a session could not be imported: another session has its key, or a session with its \
                     key was ended just now. Run the import again. If it fails again, check whether the \
                     sessions collection has a unique index beside the one on _id",
                )));
            };
            claims.insert(id.to_owned(), rev.to_vec());
        }
        Ok(Ok(claims))
    }

    /// Removes claimed documents from the source.
    pub(crate) async fn remove(&self, ids: &[String]) -> Result<()> {
        let claimed = doc! { "_id": { "$in": ids }, CLAIM_FIELD: { "$exists": true } };
        let remove = self.source.delete_many(claimed);
        let remove =
            async { remove.await.map_err(|error| failed("remove the old sessions", &error)) };
        self.sessions().within(remove).await.map(drop)
    }

    /// Returns the document of a session that is not live yet, or the reason why the session cannot be stored. It
    /// keeps its expiry: an import does not prolong a session.
    ///
    /// # Errors
    ///
    /// An error that would fail any session, such as a failed encryption.
    pub(crate) fn staged_document(
        &self,
        key: SessionKey,
        data: &Data,
        expires: WallTime,
    ) -> Result<std::result::Result<Document, &'static str>> {
        let rev = self.store.inner.revs.next();
        let sessions = self.sessions();
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

    /// Inserts sessions that are not live yet. A session that exists already, live or not, stays unchanged. Returns
    /// the `rev` of each session that exists then.
    pub(crate) async fn stage(&self, documents: Vec<Document>) -> Result<Revs> {
        if documents.is_empty() {
            return Ok(Revs::new());
        }
        let sessions = self.sessions();
        sessions
            .within(async {
                let timer = sessions.timer(Verb::Insert);
                let inserted = async {
                    let mut session = sessions.causal_session().await?;
                    let insert = sessions.documents.insert_many(&documents).ordered(false);
                    let inserted = insert.session(&mut session).await;
                    sessions.causal.observe(&session);
                    inserted.map(drop)
                };
                let mut revs: Revs = documents.iter().filter_map(key_and_rev).collect();
                match inserted.await {
                    Ok(()) => timer.finish(Outcome::Ok, Ok(revs)),
                    Err(error) => match duplicate_positions(&error) {
                        Some(positions) => {
                            // Another run has staged these. This is no collision of ids, so it counts as a success.
                            let _ = timer.finish(Outcome::Ok, Ok(()));
                            let theirs = positions.filter_map(|at| key_and_rev(documents.get(at)?));
                            let keys: Vec<_> = theirs.map(|(key, _)| key).collect();
                            revs.retain(|key, _| !keys.contains(key));
                            revs.extend(self.revs_of(&keys).await?);
                            Ok(revs)
                        }
                        None => timer.fail("import sessions", &error),
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

    /// Makes the sessions live that are staged with these revs, and returns their number. A session that was ended
    /// meanwhile stays ended, and one that is live already stays unchanged.
    pub(crate) async fn activate(&self, sessions: &[(SessionKey, Vec<u8>)]) -> Result<u64> {
        if sessions.is_empty() {
            return Ok(0);
        }
        let filter = staged(sessions);
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
                    let update = sessions.documents.update_many(filter, stages);
                    let updated = update.session(&mut session).await;
                    sessions.causal.observe(&session);
                    updated
                };
                match updated.await {
                    Ok(done) => timer.finish(Outcome::Ok, Ok(done.modified_count)),
                    Err(error) => timer.fail("import sessions", &error),
                }
            })
            .await
    }

    /// Removes the sessions that are staged with these revs. They will never become live.
    pub(crate) async fn discard(&self, stale: &[(SessionKey, Vec<u8>)]) -> Result<()> {
        if stale.is_empty() {
            return Ok(());
        }
        self.discard_matching(staged(stale)).await
    }

    /// Removes the staged sessions that have expired.
    pub(crate) async fn discard_expired(&self) -> Result<()> {
        // The condition on `expires` makes MongoDB use its index, which has documents without `expires` as null.
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
                    Err(error) => timer.fail("remove the sessions that were not imported", &error),
                }
            })
            .await
    }
}

/// Matches the staged sessions with these keys and revs. A `rev` belongs to one session only, so the filter needs no
/// pairs.
fn staged(sessions: &[(SessionKey, Vec<u8>)]) -> Document {
    let ids: Vec<Bson> = sessions.iter().map(|(key, _)| schema::id(*key).into()).collect();
    let revs: Vec<Bson> = sessions.iter().map(|(_, rev)| schema::binary(rev).into()).collect();
    doc! { "_id": { "$in": ids }, IMPORTING: { "$exists": true }, "rev": { "$in": revs } }
}

fn key_and_rev(document: &Document) -> Option<(SessionKey, Vec<u8>)> {
    let key = SessionKey::from_bytes(document.get_binary_generic("_id").ok()?)?;
    Some((key, document.get_binary_generic("rev").ok()?.clone()))
}

/// The first error in the reply to the claims, if there is one.
fn refusal(reply: &Document) -> Option<Error> {
    let errors = reply.get_array("writeErrors").into_iter().flatten().filter_map(Bson::as_document);
    let error = reply.get_document("writeConcernError").ok().into_iter().chain(errors).next()?;
    let code = batch::number(error, "code").and_then(|code| i32::try_from(code).ok());
    Some(error::refused(CLAIM, code.unwrap_or_default()))
}

/// The positions of the documents that were not inserted because their keys exist; `None` if anything else failed.
fn duplicate_positions(error: &mongodb::error::Error) -> Option<impl Iterator<Item = usize>> {
    let Driver::InsertMany(InsertManyError { write_errors, write_concern_error, .. }) =
        &*error.kind
    else {
        return None;
    };
    let errors = write_errors.as_ref().filter(|_| write_concern_error.is_none())?;
    let are_duplicates = errors.iter().all(|error| error.code == DUPLICATE_KEY);
    are_duplicates.then(|| errors.iter().map(|error| error.index).collect::<Vec<_>>().into_iter())
}

fn failed(doing: &str, error: &mongodb::error::Error) -> Error {
    error::to_error(doing, error)
}
