//! Entries that nobody has asked for yet.

use super::ticket::Ticket;
use super::{Cache, Lookup};
use crate::key::SessionKey;
use crate::record::Session;

/// How many reads moka takes note of before it drops some.
const NOTED: usize = 64;

/// The right to leave an entry that nobody has asked for, if nobody else works on its key until then.
/// Dropped unused, it leaves all as it is.
#[derive(Debug)]
pub(crate) struct Offer(Option<Ticket>);

impl Cache {
    /// An offer of what a read will find that is about to begin; none if somebody works on the key, or
    /// it is cached.
    pub(crate) fn offer(&self, key: SessionKey) -> Option<Offer> {
        if !matches!(self.look(key), Lookup::Miss | Lookup::Lapsed) {
            return None;
        }
        let now = self.0.clock.now();
        let stamp = self.0.freshness.stamp_if_idle(key)?;
        Some(Offer(Some(self.ticket_of(stamp, now))))
    }

    /// How much more the cache may hold until it holds `most`, or is full.
    pub(crate) fn room(&self, most: u64) -> u64 {
        let shared = &self.0;
        shared.sessions.run_pending_tasks();
        most.min(shared.bound.capacity).saturating_sub(shared.sessions.weighted_size())
    }

    /// How much it may hold.
    pub(crate) fn capacity(&self) -> u64 {
        self.0.bound.capacity
    }

    /// Makes the first of these those that were used last, as if each had been asked for in turn.
    pub(crate) fn rank(&self, newest_first: &[SessionKey]) {
        // What was just inserted is in no order yet: moka looks at the reads before the writes.
        self.0.sessions.run_pending_tasks();
        for keys in newest_first.rchunks(NOTED) {
            for key in keys.iter().rev() {
                self.0.sessions.get(key);
            }
            self.0.sessions.run_pending_tasks();
        }
    }
}

impl Offer {
    /// Leaves `session` in the cache if it takes no more than `room`, and nobody else has had anything
    /// to do with it meanwhile. Answers with what it takes; an error if there is no room for it.
    pub(crate) fn take(mut self, session: Session, room: u64) -> Result<Option<u64>, NoRoom> {
        match self.0.take() {
            Some(ticket) => ticket.settle(session, room),
            None => Ok(None),
        }
    }
}

impl Drop for Offer {
    fn drop(&mut self) {
        if let Some(ticket) = self.0.take() {
            ticket.release();
        }
    }
}

/// What was offered would have displaced others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct NoRoom;
