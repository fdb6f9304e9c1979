//! Entries that nobody has asked for yet.

use crate::cache::fill_guard::FillGuard;
use crate::cache::{Cache, Lookup};
use crate::session::Session;
use crate::session::id::SessionKey;

/// How many reads moka takes note of before it drops some.
const READ_BUFFER: usize = 64;

/// The right to leave an entry that nobody has asked for, if nobody else works on its key until then.
/// Dropped unused, it leaves all as it is.
#[derive(Debug)]
pub(crate) struct IdleFill(Option<FillGuard>);

impl Cache {
    /// An offer of what a read will find that is about to begin; none if somebody works on the key, or
    /// it is cached.
    pub(crate) fn begin_idle_fill(&self, key: SessionKey) -> Option<IdleFill> {
        if !matches!(self.look(key), Lookup::Miss | Lookup::Expired) {
            return None;
        }
        let now = self.0.clock.now();
        let stamp = self.0.versions.take_version_if_idle(key)?;
        Some(IdleFill(Some(self.fill_guard(stamp, now))))
    }

    /// How much more the cache may hold until it holds `most`, or is full.
    pub(crate) fn room(&self, most: u64) -> u64 {
        let shared = &self.0;
        shared.sessions.run_pending_tasks();
        most.min(shared.capacity.capacity).saturating_sub(shared.sessions.weighted_size())
    }

    /// How much it may hold.
    pub(crate) fn capacity(&self) -> u64 {
        self.0.capacity.capacity
    }

    /// Makes the first of these those that were used last, as if each had been asked for in turn.
    pub(crate) fn rank(&self, newest_first: &[SessionKey]) {
        // What was just inserted is in no order yet: moka looks at the reads before the writes.
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
    /// Leaves `session` in the cache if it takes no more than `room`, and nobody else has had anything
    /// to do with it meanwhile. Answers with what it takes; an error if there is no room for it.
    pub(crate) fn publish(mut self, session: Session, room: u64) -> Result<Option<u64>, NoRoom> {
        match self.0.take() {
            Some(ticket) => ticket.publish_if_idle(session, room),
            None => Ok(None),
        }
    }
}

impl Drop for IdleFill {
    fn drop(&mut self) {
        if let Some(ticket) = self.0.take() {
            ticket.release();
        }
    }
}

/// What was offered would have displaced others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct NoRoom;
