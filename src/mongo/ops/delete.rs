//! The operations that remove many sessions page by page, and the one that ends a session by its handle.

use bson::{Bson, Document, RawDocumentBuf, doc};

use crate::backend::delete_pages::{DeletePage, DeletePages};
use crate::error::Result;
use crate::mongo::collection::SessionCollection;
use crate::mongo::ops::query::and;
use crate::mongo::ops::scan::{KeyScan, PageOptions};
use crate::mongo::schema;
use crate::session::id::SessionKey;
use crate::session::owner::Owner;
use crate::telemetry::metrics::{Outcome, Verb};

/// The sessions to delete.
#[derive(Clone, Debug)]
pub(crate) struct DeleteSelection {
    /// MongoDB evaluates the filter twice: to find the sessions, and again to remove them. A session may
    /// change in between.
    pub(crate) filter: Document,
    /// The one session that stays.
    pub(crate) kept: Option<SessionKey>,
    /// Whether to skip sessions that have expired.
    pub(crate) only_live: bool,
}

/// The pages of sessions to end, in the order of their keys.
pub(crate) struct DeleteCursor {
    sessions: SessionCollection,
    selection: DeleteSelection,
    scan: KeyScan,
}

impl DeletePages for DeleteCursor {
    async fn next(&mut self) -> Result<Option<DeletePage>> {
        let sessions = &self.sessions;
        let selection = &self.selection;
        let found = self.scan.next_page(|mut ids| {
            if let Some(kept) = selection.kept {
                ids.insert("$ne", schema::id(kept));
            }
            sessions.selected(selection, doc! { "_id": ids })
        });
        let found = found.await?;
        if found.is_empty() {
            return Ok(None);
        }
        let mut page = DeletePage::default();
        for found in &found {
            // A document of another program has an `_id` of another length.
            let Some(key) = schema::key(found) else { continue };
            let is_live = schema::is_live(found, sessions.clock.wall()).unwrap_or(false);
            if is_live { &mut page.live } else { &mut page.expired }.push(key);
        }
        Ok(Some(page))
    }

    async fn remove(&self, keys: &[SessionKey]) -> Result<u64> {
        if keys.is_empty() {
            return Ok(0);
        }
        let ids: Vec<Bson> = keys.iter().map(|key| schema::id(*key).into()).collect();
        let wanted = self.sessions.selected(&self.selection, doc! { "_id": { "$in": ids } });
        self.sessions.remove_page(Verb::Remove, wanted).await
    }
}

impl SessionCollection {
    pub(crate) fn delete_cursor(&self, selection: DeleteSelection) -> DeleteCursor {
        let options = PageOptions::to_delete(Verb::List, doc! { "_id": 1, "expires": 1 });
        DeleteCursor { sessions: self.clone(), selection, scan: KeyScan::new(self, options) }
    }

    fn selected(&self, selection: &DeleteSelection, ids: Document) -> Document {
        let wanted = and(ids, selection.filter.clone());
        if !selection.only_live {
            return wanted;
        }
        and(wanted, doc! { "expires": { "$gt": schema::date(self.clock.wall()) } })
    }

    /// Removes every session that is in the collection when the call begins.
    pub(crate) async fn remove_all(self) -> Result<u64> {
        let options = PageOptions::to_delete(Verb::Clear, doc! { "_id": 1 });
        let mut scan = KeyScan::new(&self, options);
        let mut removed = 0;
        loop {
            let page = scan.next_page(|ids| doc! { "_id": ids }).await?;
            if page.is_empty() {
                return Ok(removed);
            }
            let filter = doc! { "_id": { "$in": session_ids(&page) } };
            removed += self.remove_page(Verb::Clear, filter).await?;
        }
    }

    /// Removes the sessions that have expired, the longest expired first.
    pub(crate) async fn remove_expired(self) -> Result<u64> {
        let expired = doc! { "$lte": schema::date(self.clock.wall()) };
        let options = PageOptions::to_delete(Verb::Expire, doc! { "_id": 1 });
        let mut removed = 0;
        loop {
            let filter = doc! { "expires": expired.clone(), "_id": schema::keys_after(None) };
            let page = self.read_page(filter, doc! { "expires": 1 }, &options).await?;
            // The filter repeats the expiry: a session may have been prolonged since the page was read.
            let filter = doc! { "_id": { "$in": session_ids(&page) }, "expires": expired.clone() };
            let gone = self.remove_page(Verb::Expire, filter).await?;
            // Nothing was removed: either no session is left, or the next page would be this one again.
            if gone == 0 {
                return Ok(removed);
            }
            removed += gone;
        }
    }

    async fn remove_page(&self, verb: Verb, filter: Document) -> Result<u64> {
        self.within(self.remove_matching(verb, filter)).await
    }

    /// Removes the sessions that match a filter, and returns their number. The caller keeps to the operation
    /// timeout.
    pub(crate) async fn remove_matching(&self, verb: Verb, filter: Document) -> Result<u64> {
        let timer = self.timer(verb);
        let removed = async {
            let mut session = self.causal_session().await?;
            let removed = self.documents.delete_many(filter).session(&mut session).await;
            self.causal.observe(&session);
            removed
        };
        match removed.await {
            Ok(done) => timer.finish(Outcome::Ok, Ok(done.deleted_count)),
            Err(error) => timer.fail("remove sessions", &error),
        }
    }

    /// Deletes one session, if it belongs to this owner where one is given. Returns whether a live session was
    /// removed.
    pub(crate) async fn revoke(self, key: SessionKey, owner: Option<Owner>) -> Result<bool> {
        let timer = self.timer_of(Verb::Remove, "findAndModify");
        let mut filter = doc! { "_id": schema::id(key) };
        if let Some(owner) = owner {
            filter.insert("owner", owner.as_str());
        }
        let removed = async {
            let mut session = self.causal_session().await?;
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

/// The `_id`s in a page that are keys of sessions. Some servers do not order binaries by their length, so a
/// page may have a document of another program.
fn session_ids(page: &[RawDocumentBuf]) -> Vec<Bson> {
    let keys = page.iter().filter_map(|found| schema::key(found));
    keys.map(|key| schema::id(key).into()).collect()
}
