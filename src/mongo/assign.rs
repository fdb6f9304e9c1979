//! Stores the owners of sessions that were written without.

use bson::{Binary, RawDocument, RawDocumentBuf, doc};

use super::{Sessions, document};
use crate::error::{ErrorKind, Result};
use crate::metrics::{Outcome, Verb};
use crate::owner::Owner;

impl Sessions {
    /// Gives each live session the owner that its data tells.
    pub(super) async fn assign_owners(self) -> Result<u64> {
        self.has_owners()?;
        let (mut assigned, mut left) = (0, 0_u64);
        let (mut session, mut cursor) = self.open(super::Listing::all()).await?;
        while let Some(found) = self.next(&mut cursor, &mut session).await? {
            match self.mismatch(&found) {
                Ok(None) => {}
                Ok(Some(owner)) => assigned += self.assign(&found, owner).await?,
                Err(error) if matches!(error.kind(), ErrorKind::Decode | ErrorKind::Encode) => {
                    left += 1
                }
                Err(error) => return Err(error),
            }
        }
        if left > 0 {
            tracing::warn!(
                left,
                "sessions that cannot be read, or whose owner is too long, were left as they are"
            );
        }
        Ok(assigned)
    }

    /// The owner of a session, if it is not the one that is stored.
    fn mismatch(&self, found: &RawDocument) -> Result<Option<Option<Owner>>> {
        let session = document::session(found)?;
        let owner = self.owner.as_ref().and_then(|owner_of| owner_of.derive(&session.data));
        if let Some(owner) = &owner {
            owner.fits()?;
        }
        let is_stored = match (found.get_str("owner"), &owner) {
            (Ok(stored), Some(owner)) => stored == owner.as_str(),
            (Err(_), None) => !matches!(found.get("owner"), Ok(Some(_))),
            _ => false,
        };
        Ok((!is_stored).then_some(owner))
    }

    /// Whoever writes the session meanwhile stores its owner as well, and a new `rev`.
    async fn assign(&self, found: &RawDocument, owner: Option<Owner>) -> Result<u64> {
        let Some(key) = document::key(found) else { return Ok(0) };
        let mut unchanged = doc! { "_id": document::id(key) };
        let rev = found
            .get_binary("rev")
            .map(|rev| Binary { subtype: rev.subtype, bytes: rev.bytes.to_vec() });
        match rev {
            Ok(rev) => unchanged.insert("rev", rev),
            Err(_) => unchanged.insert("rev", doc! { "$exists": false }),
        };
        let change = match owner {
            Some(owner) => doc! { "$set": { "owner": owner.as_str() } },
            None => doc! { "$unset": { "owner": "" } },
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
