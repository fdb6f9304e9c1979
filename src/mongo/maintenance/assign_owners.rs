//! `assign_owners`: stores the owner of each session that was written without it.

use bson::{Bson, RawBsonRef, RawDocument, RawDocumentBuf, doc};

use crate::error::{ErrorKind, Result};
use crate::mongo::collection::SessionCollection;
use crate::mongo::owner_field::panicked;
use crate::mongo::schema;
use crate::session::owner::Owner;
use crate::session::revision::{Rev, RevSource};
use crate::telemetry::metrics::{Outcome, Verb};

/// The change that makes the stored owner the one that the session's data has.
struct Correction {
    owner: Option<Owner>,
    /// The condition that the session was not saved since it was read.
    same_rev: Bson,
}

impl SessionCollection {
    /// Gives each live session the owner that its data has. `revs` belongs to the calling store: its
    /// [events](crate::CachedMongoStore::events) recognize the store's own changes by their `rev`.
    pub(crate) async fn assign_owners(self, revs: RevSource) -> Result<u64> {
        self.require_owner_option()?;
        let mut assigned = 0;
        let mut left = 0_u64;
        let mut panics = 0_u64;
        let (mut session, mut cursor) = self.open(crate::mongo::ListQuery::all()).await?;
        while let Some(found) = self.next(&mut cursor, &mut session).await? {
            match self.correction(&found) {
                Ok(None) => {}
                Ok(Some(change)) => assigned += self.assign(&found, change, revs.next()).await?,
                Err(error) if matches!(error.kind(), ErrorKind::Decode | ErrorKind::Encode) => {
                    left += 1;
                }
                Err(error) if error.kind() == ErrorKind::Panic => panics += 1,
                Err(error) => return Err(error),
            }
        }
        if left > 0 {
            tracing::warn!(
                left,
                "sessions that cannot be read, or whose owner is too long, were left as they are"
            );
        }
        if panics > 0 {
            return Err(panicked(&format!("{panics} sessions, which were left as they are")));
        }
        Ok(assigned)
    }

    /// `None` if the stored owner is already the right one.
    fn correction(&self, found: &RawDocument) -> Result<Option<Correction>> {
        let session = schema::session(found, &self.format)?;
        let owner = match &self.owner {
            Some(owner_of) => owner_of.derive(&session.data)?,
            None => None,
        };
        if let Some(owner) = &owner {
            owner.check_length()?;
        }
        let stored = found.get("owner").ok().flatten();
        let is_right = match (stored, &owner) {
            (None | Some(RawBsonRef::Null), None) => true,
            (Some(RawBsonRef::String(stored)), Some(owner)) => stored == owner.as_str(),
            _ => false,
        };
        if is_right {
            return Ok(None);
        }
        // Another program may have written a `rev` of any type.
        Ok(Some(Correction { owner, same_rev: schema::unchanged(found, "rev")? }))
    }

    /// Stores the owner, unless the session was saved meanwhile: that save stored the owner itself, and a new `rev`.
    async fn assign(&self, found: &RawDocument, change: Correction, new: Rev) -> Result<u64> {
        let Some(key) = schema::key(found) else { return Ok(0) };
        let unchanged = doc! { "_id": schema::id(key), "rev": change.same_rev };
        let rev = schema::binary(new.as_bytes());
        let change = if let Some(owner) = change.owner {
            doc! { "$set": { "owner": owner.as_str(), "rev": rev } }
        } else {
            doc! { "$set": { "rev": rev }, "$unset": { "owner": "" } }
        };
        self.within(async {
            let timer = self.timer(Verb::Replace);
            let documents = self.documents.clone_with_type::<RawDocumentBuf>();
            let assigned = async {
                let mut session = self.causal_session().await?;
                let assigned = documents.update_one(unchanged, change).session(&mut session).await;
                self.causal.check_in(session, assigned)
            };
            match assigned.await {
                Ok(done) => timer.finish(Outcome::Ok, Ok(done.modified_count)),
                Err(error) => timer.fail("store the owner of a session", &error),
            }
        })
        .await
    }
}
