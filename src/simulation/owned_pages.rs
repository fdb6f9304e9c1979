//! `OwnedPages`: pages along the sessions of one owner in the simulated database, as a sign-out reads them.

use std::sync::{Arc, Mutex};

use crate::backend::delete_pages::{DeletePage, DeletePages};
use crate::error::Result;
use crate::session::id::SessionKey;
use crate::simulation::backend::FakeBackend;
use crate::simulation::operation::{Operation, Outcome};
use crate::simulation::types::Floors;

pub(crate) struct OwnedPages {
    mongo: FakeBackend,
    owner: u64,
    after: Option<usize>,
    /// Shared, because the store consumes the pages while the fleet needs to know how far they got.
    reached: Arc<Mutex<Reached>>,
}

/// What a sign-out has found and removed so far.
#[derive(Default)]
pub(crate) struct Reached {
    /// What writes of this store had stored when a page was found, while their answers were still on the way.
    pub(crate) pending: Floors,
    /// The rank of each session on a page, once its removal was answered or has failed.
    pub(crate) removed: Floors,
}

impl OwnedPages {
    pub(crate) fn new(mongo: FakeBackend, owner: u64) -> Self {
        Self { mongo, owner, after: None, reached: Arc::default() }
    }

    pub(crate) fn reached(&self) -> Arc<Mutex<Reached>> {
        Arc::clone(&self.reached)
    }
}

impl DeletePages for OwnedPages {
    async fn next(&mut self) -> Result<Option<DeletePage>> {
        let find = Operation::FindOwned(self.owner, self.after);
        let found = self.mongo.call(find, |outcome| match outcome {
            Outcome::Owned(page) => Some(page),
            _ => None,
        });
        let found = found.await?;
        self.reached.lock().unwrap().pending.extend(found.pending);
        let Some((last, ..)) = found.sessions.last() else { return Ok(None) };
        self.after = Some(*last);
        let mut page = DeletePage::default();
        for (_, key, live) in found.sessions {
            if live { &mut page.live } else { &mut page.expired }.push(key);
        }
        Ok(Some(page))
    }

    async fn remove(&self, keys: &[SessionKey]) -> Result<u64> {
        if keys.is_empty() {
            return Ok(0);
        }
        let remove = Operation::RemoveOwned(keys.to_vec(), self.owner);
        let removed = self.mongo.call(remove, |outcome| match outcome {
            Outcome::RemovedOwned(count, ranks) => Some((count, ranks)),
            _ => None,
        });
        match removed.await {
            Ok((count, ranks)) => {
                self.reached.lock().unwrap().removed.extend(ranks);
                Ok(count)
            }
            Err(error) => {
                let ranks = self.mongo.ranks(keys);
                self.reached.lock().unwrap().removed.extend(ranks);
                Err(error)
            }
        }
    }
}
