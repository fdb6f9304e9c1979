//! Ends the sessions that a filter finds, page by page, and one by its handle.

use bson::{Bson, Document, RawDocumentBuf, doc};

use crate::backend::delete_pages::{DeletePage, DeletePages};
use crate::error::Result;
use crate::mongo::collection::SessionCollection;
use crate::mongo::ops::list::id_of;
use crate::mongo::ops::query::and;
use crate::mongo::schema;
use crate::mongo::schema::keys_after;
use crate::session::id::SessionKey;
use crate::session::owner::Owner;
use crate::telemetry::metrics::{Outcome, Verb};

/// Which sessions are to be ended.
#[derive(Clone, Debug)]
pub(crate) struct DeleteSelection {
    /// Asked once to find them and again to remove them: they may have changed in between.
    pub(crate) filter: Document,
    pub(crate) kept: Option<SessionKey>,
    /// What has expired is left to whoever removes the expired ones.
    pub(crate) live_alone: bool,
}

/// A walk along the keys, which no write changes. It ends however fast new sessions come.
pub(crate) struct DeleteCursor {
    sessions: SessionCollection,
    removal: DeleteSelection,
    /// The last key of the page before.
    after: Option<Bson>,
}

impl DeletePages for DeleteCursor {
    async fn next(&mut self) -> Result<Option<DeletePage>> {
        let mut walk = keys_after(self.after.take());
        if let Some(kept) = self.removal.kept {
            walk.insert("$ne", schema::id(kept));
        }
        let wanted = self.sessions.selected(&self.removal, doc! { "_id": walk });
        let fields = doc! { "_id": 1, "expires": 1 };
        let found = self.sessions.page(Verb::List, wanted, doc! { "_id": 1 }, fields).await?;
        self.after = found.last().and_then(|last| id_of(last));
        if self.after.is_none() {
            return Ok(None);
        }
        let mut page = DeletePage::default();
        for found in &found {
            // Another program's document has an `_id` of another length, and is passed by.
            if let Some(key) = schema::key(found) {
                let live = schema::is_live(found, self.sessions.clock.wall()).unwrap_or(false);
                if live { &mut page.live } else { &mut page.expired }.push(key);
            }
        }
        Ok(Some(page))
    }

    async fn remove(&self, keys: &[SessionKey]) -> Result<u64> {
        if keys.is_empty() {
            return Ok(0);
        }
        let ids: Vec<Bson> = keys.iter().map(|key| schema::id(*key).into()).collect();
        let wanted = self.sessions.selected(&self.removal, doc! { "_id": { "$in": ids } });
        self.sessions.remove_page(Verb::Remove, wanted).await
    }
}

impl SessionCollection {
    pub(crate) fn pages(&self, removal: DeleteSelection) -> DeleteCursor {
        DeleteCursor { sessions: self.clone(), removal, after: None }
    }

    fn selected(&self, removal: &DeleteSelection, ids: Document) -> Document {
        let wanted = and(ids, removal.filter.clone());
        if !removal.live_alone {
            return wanted;
        }
        and(wanted, doc! { "expires": { "$gt": schema::date(self.clock.wall()) } })
    }

    /// Ends one session, if it is of this owner where one is given. Whether there was a live one.
    pub(crate) async fn revoke(self, key: SessionKey, owner: Option<Owner>) -> Result<bool> {
        let timer = self.timer_of(Verb::Remove, "findAndModify");
        let mut filter = doc! { "_id": schema::id(key) };
        if let Some(owner) = owner {
            filter.insert("owner", owner.as_str());
        }
        let removed = async {
            let mut session = self.causal().await?;
            let documents = self.documents.clone_with_type::<RawDocumentBuf>();
            let remove = documents.find_one_and_delete(filter);
            let removed = remove.projection(doc! { "expires": 1 }).session(&mut session).await;
            self.causal.check_in(session, removed)
        };
        match removed.await {
            Ok(removed) => {
                let now = self.clock.wall();
                let live = removed.is_some_and(|it| schema::is_live(&it, now).unwrap_or(false));
                timer.finish(Outcome::Ok, Ok(live))
            }
            Err(error) => timer.fail("end a session", &error),
        }
    }
}
