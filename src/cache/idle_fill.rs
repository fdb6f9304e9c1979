//! `IdleFill`: inserts entries that no load has asked for yet, for the warm-up.

use crate::cache::fill_guard::FillGuard;
use crate::cache::{Cache, Lookup};
use crate::session::Session;
use crate::session::id::SessionKey;

/// How many reads moka buffers before it drops some of them.
const READ_BUFFER: usize = 64;

/// The right to insert an entry if no other operation on its key is in progress by then. Dropping it
/// changes nothing.
#[derive(Debug)]
pub(crate) struct IdleFill(Option<FillGuard>);

impl Cache {
    /// Begins a read that no load has asked for. `None` if another operation on the key is in progress, or
    /// the key is cached.
    pub(crate) fn begin_idle_fill(&self, key: SessionKey) -> Option<IdleFill> {
        if !matches!(self.look_up(key), Lookup::Miss | Lookup::Expired) {
            return None;
        }
        let now = self.0.clock.now();
        let version = self.0.versions.take_version_if_idle(key)?;
        Some(IdleFill(Some(self.fill_guard(version, now))))
    }

    /// The weight that can be added until the cache weighs `limit` or is full.
    pub(crate) fn room(&self, limit: u64) -> u64 {
        let shared = &self.0;
        shared.sessions.run_pending_tasks();
        limit.min(shared.capacity.capacity).saturating_sub(shared.sessions.weighted_size())
    }

    /// The weight at which the cache is full.
    pub(crate) fn capacity(&self) -> u64 {
        self.0.capacity.capacity
    }

    /// Makes the first of these keys the most recently used one, the second the next, and so on.
    pub(crate) fn rank(&self, newest_first: &[SessionKey]) {
        // moka applies the buffered reads before the buffered inserts. So apply the inserts now:
        // otherwise the reads would be of entries that moka does not order yet.
        self.0.sessions.run_pending_tasks();
        for keys in newest_first.rchunks(READ_BUFFER) {
            for key in keys.iter().rev() {
                self.0.sessions.get(key);
            }
            self.0.sessions.run_pending_tasks();
        }
    }
}

impl IdleFill {
    /// Inserts an entry of `session` if it weighs at most `room` and no other operation on its key was in
    /// progress since the read began. Returns the weight of an inserted entry.
    pub(crate) fn publish(mut self, session: Session, room: u64) -> Result<Option<u64>, NoRoom> {
        match self.0.take() {
            Some(guard) => guard.publish_if_idle(session, room),
            None => Ok(None),
        }
    }
}

impl Drop for IdleFill {
    fn drop(&mut self) {
        if let Some(guard) = self.0.take() {
            guard.release();
        }
    }
}

/// The entry would have made the cache evict others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct NoRoom;
