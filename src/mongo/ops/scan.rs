//! `KeyScan`: reads many sessions page by page, in the order of their keys.
//!
//! No write changes the key of a session, so a scan meets each session once. It ends however fast new
//! sessions are created, because each page starts after the last key of the page before.

use bson::{Bson, Document, RawDocumentBuf, doc};

use crate::error::Result;
use crate::mongo::collection::SessionCollection;
use crate::mongo::schema;
use crate::telemetry::metrics::{Outcome, Verb};

/// The number of sessions in a page whose sessions are to be removed. Each command stays short and small.
pub(crate) const DELETE_PAGE: u32 = 1_000;

/// How a page is read, whichever documents are in it.
#[derive(Clone)]
pub(crate) struct PageOptions {
    /// The verb that the metrics count the page under.
    pub(crate) verb: Verb,
    /// What the store tries to do, for an error message.
    pub(crate) doing: &'static str,
    /// The fields to read.
    pub(crate) fields: Document,
    /// The most documents in a page.
    pub(crate) limit: u32,
    /// The most bytes in a page, unless its first document alone is larger.
    pub(crate) max_bytes: usize,
}

impl PageOptions {
    /// A page of sessions that are to be removed.
    pub(crate) fn to_delete(verb: Verb, fields: Document) -> Self {
        Self {
            verb,
            doing: "find the sessions to remove",
            fields,
            limit: DELETE_PAGE,
            max_bytes: usize::MAX,
        }
    }
}

/// A position in the order of the keys.
pub(crate) struct KeyScan {
    sessions: SessionCollection,
    options: PageOptions,
    /// The last key of the page before; `None` before the first page.
    after: Option<Bson>,
}

impl KeyScan {
    pub(crate) fn new(sessions: &SessionCollection, options: PageOptions) -> Self {
        Self { sessions: sessions.clone(), options, after: None }
    }

    /// Reads the next page; it is empty at the end. `filter` gets the condition on `_id` that the page has,
    /// and returns the whole filter.
    pub(crate) async fn next_page(
        &mut self,
        filter: impl FnOnce(Document) -> Document,
    ) -> Result<Vec<RawDocumentBuf>> {
        let filter = filter(schema::keys_after(self.after.take()));
        let page = self.sessions.read_page(filter, doc! { "_id": 1 }, &self.options).await?;
        self.after = page.last().map(|last| schema::value(last, "_id"));
        Ok(page)
    }
}

impl SessionCollection {
    /// Reads the first documents that match a filter.
    pub(crate) async fn read_page(
        &self,
        filter: Document,
        order: Document,
        options: &PageOptions,
    ) -> Result<Vec<RawDocumentBuf>> {
        self.within(async {
            let timer = self.timer_of(options.verb, "find");
            let documents = self.documents.clone_with_type::<RawDocumentBuf>();
            let find = documents.find(filter).sort(order).projection(options.fields.clone());
            let find = find.limit(options.limit.into()).batch_size(options.limit);
            let find = find.max_time(self.timeout);
            let read = async {
                let mut page = Vec::new();
                let mut bytes = 0_usize;
                let mut session = self.causal_session().await?;
                let mut cursor = find.session(&mut session).await?;
                while cursor.advance(&mut session).await? {
                    let found = cursor.current();
                    bytes = bytes.saturating_add(found.as_bytes().len());
                    if bytes > options.max_bytes && !page.is_empty() {
                        break;
                    }
                    page.push(found.to_owned());
                }
                self.causal.observe(&session);
                Ok(page)
            };
            match read.await {
                Ok(page) => timer.finish(Outcome::Ok, Ok(page)),
                Err(error) => timer.fail(options.doing, &error),
            }
        })
        .await
    }
}
