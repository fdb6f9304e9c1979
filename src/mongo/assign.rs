//! Stores the owners of sessions that were written without.

use bson::{Binary, Document, RawBsonRef, RawDocument, RawDocumentBuf, doc};

use super::owner::panicked;
use super::{Sessions, document};
use crate::error::{ErrorKind, Result};
use crate::metrics::{Outcome, Verb};

impl Sessions {
    /// Gives each live session the owner that its data tells.
    pub(super) async fn assign_owners(self) -> Result<u64> {
        self.has_owners()?;
        let (mut assigned, mut left) = (0, 0_u64);
        let mut panics = 0_u64;
        let (mut session, mut cursor) = self.open(super::Listing::all()).await?;
        while let Some(found) = self.next(&mut cursor, &mut session).await? {
            match self.correction(&found) {
                Ok(None) => {}
                Ok(Some(change)) => assigned += self.assign(&found, change).await?,
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

    /// What makes the stored owner of a session the one that its data tells, if it is not.
    fn correction(&self, found: &RawDocument) -> Result<Option<Document>> {
        let session = document::session(found, &self.form)?;
        let owner = match &self.owner {
            Some(owner_of) => owner_of.derive(&session.data)?,
            None => None,
        };
        if let Some(owner) = &owner {
            owner.fits()?;
        }
        let stored = found.get("owner").ok().flatten();
        Ok(match (stored, owner) {
            (None | Some(RawBsonRef::Null), None) => None,
            (Some(_), None) => Some(doc! { "$unset": { "owner": "" } }),
            (Some(RawBsonRef::String(stored)), Some(owner)) if stored == owner.as_str() => None,
            (_, Some(owner)) => Some(doc! { "$set": { "owner": owner.as_str() } }),
        })
    }

    /// Whoever writes the session meanwhile stores its owner as well, and a new `rev`.
    async fn assign(&self, found: &RawDocument, change: Document) -> Result<u64> {
        let Some(key) = document::key(found) else { return Ok(0) };
        let mut unchanged = doc! { "_id": document::id(key) };
        let rev = found
            .get_binary("rev")
            .map(|rev| Binary { subtype: rev.subtype, bytes: rev.bytes.to_vec() });
        match rev {
            Ok(rev) => unchanged.insert("rev", rev),
            Err(_) => unchanged.insert("rev", doc! { "$exists": false }),
        };
        self.within(async {
            let timer = self.timer(Verb::Replace);
            let documents = self.documents.clone_with_type::<RawDocumentBuf>();
            let assigned = async {
                let mut session = self.causal().await?;
                let assigned = documents.update_one(unchanged, change).session(&mut session).await;
                self.seen.returns(session, assigned)
            };
            match assigned.await {
                Ok(done) => timer.ends(Outcome::Ok, Ok(done.modified_count)),
                Err(error) => timer.fails("store the owner of a session", &error),
            }
        })
        .await
    }
}
