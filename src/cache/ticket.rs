//! What an operation on a session holds from its beginning to its end: the right to leave an entry.

use std::time::Duration;

use tokio::sync::watch;

use super::entry::{Entry, Times};
use super::freshness::Stamp;
use super::outage::Probe;
use super::{A_CENTURY, Absent, Answer, Cache};
use crate::backend::Rev;
use crate::clock::Moment;
use crate::error::Result;
use crate::record::{Session, WallTime};

/// The right to leave an entry, if nothing else finishes first. Dropped unused, it removes the
/// entry: an operation of which the end is not known must leave none.
#[derive(Debug)]
pub(crate) struct Ticket {
    cache: Cache,
    stamp: Option<Stamp>,
    read_at: Moment,
    writes: Option<Rev>,
}

impl Cache {
    /// A ticket of an operation whose stamp was taken at `read_at` or later.
    pub(super) fn ticket_of(&self, stamp: Stamp, read_at: Moment) -> Ticket {
        Ticket { cache: self.clone(), stamp: Some(stamp), read_at, writes: None }
    }
}

impl Ticket {
    pub(super) fn writing(mut self, rev: Rev) -> Self {
        self.writes = Some(rev);
        self
    }

    pub(super) fn generation(&self) -> Option<u64> {
        self.stamp.as_ref().map(Stamp::generation)
    }

    /// Leaves `session` in the cache if the ticket is current, and removes the entry if it is not.
    pub(crate) fn publish(self, session: Session) -> Option<Entry> {
        let read_at = self.read_at;
        self.leave(session, read_at)
    }

    /// Leaves `entry` with another expiry, on the same terms. It was looked up under this ticket;
    /// what it knows of the session's data grows no younger.
    pub(crate) fn prolong(self, entry: &Entry, expires: WallTime) {
        // One that cannot be read is removed with the ticket.
        let Ok(session) = entry.session() else { return };
        self.leave(Session { expires, ..session }, entry.times().read_at);
    }

    fn leave(mut self, session: Session, read_at: Moment) -> Option<Entry> {
        let mut stamp = self.stamp.take()?;
        let shared = &self.cache.0;
        if let Some(generation) = self.writes.and_then(|rev| shared.echoes.landed(rev)) {
            stamp.landed(generation);
        }
        // One less: the wall clock has left out a part of a millisecond, and an entry must not live
        // longer than its session by that.
        let left = session.expires.millis().saturating_sub(shared.clock.wall().millis() + 1);
        let left = Duration::from_millis(u64::try_from(left).unwrap_or(0)).min(A_CENTURY);
        let expires_at = shared.clock.now().after(left);
        let times = Times { epoch: stamp.epoch(), read_at, expires_at };
        let entry = Entry::new(session, times);
        let placed = if shared.compact { entry.compacted() } else { entry.clone() };
        let (key, weight) = (stamp.key(), placed.weight());
        // What has expired on the way is an answer to those who asked before, and none for later:
        // it may have been prolonged meanwhile.
        let admitted = shared.bound.admits(weight) && !left.is_zero();
        shared.freshness.finish(stamp, |current| {
            if current && admitted {
                shared.account.add(weight);
                shared.absent.invalidate(&key);
                shared.sessions.insert(key, placed);
            } else {
                shared.remove(key);
            }
        });
        if let Some(rev) = self.writes.take() {
            shared.echoes.acknowledges(rev);
        }
        if shared.bound.is_large(weight) {
            shared.sessions.run_pending_tasks();
        }
        Some(entry)
    }

    /// Remembers, if the ticket is current, that the database does not know the key.
    fn publish_absence(mut self) {
        let Some(stamp) = self.stamp.take() else { return };
        let shared = &self.cache.0;
        let (key, absent) = (stamp.key(), Absent { epoch: stamp.epoch(), read_at: self.read_at });
        shared.freshness.finish(stamp, |current| {
            shared.remove(key);
            if current {
                shared.absent.insert(key, absent);
            }
        });
    }

    /// Removes the entry: the session is gone, or nobody knows how it stands.
    pub(crate) fn forget(self) {
        drop(self);
    }

    /// Leaves everything as it is: nothing was learned, and no data was written.
    pub(crate) fn release(mut self) {
        if let Some(stamp) = self.stamp.take() {
            self.cache.0.freshness.release(stamp);
        }
    }

    fn remove(&self, stamp: Stamp) {
        let (shared, key) = (&self.cache.0, stamp.key());
        shared.freshness.finish(stamp, |_| shared.remove(key));
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        if let Some(rev) = self.writes.take() {
            self.cache.0.echoes.doubts(rev);
        }
        if let Some(stamp) = self.stamp.take() {
            self.remove(stamp);
        }
    }
}

/// The end of a shared read: what it found goes to the cache and to all who wait.
#[derive(Debug)]
pub(crate) struct Landing {
    ticket: Ticket,
    lands: watch::Sender<Answer>,
    probe: Option<Probe>,
}

impl Landing {
    pub(super) fn new(ticket: Ticket, lands: watch::Sender<Answer>) -> Self {
        Self { ticket, lands, probe: None }
    }

    pub(super) fn holding(mut self, probe: Probe) -> Self {
        self.probe = Some(probe);
        self
    }

    pub(crate) fn land(self, found: Result<Option<Session>>) {
        self.ticket.cache.note(&found);
        let answer = match found {
            Ok(Some(session)) => Ok(self.ticket.publish(session)),
            Ok(None) => {
                self.ticket.publish_absence();
                Ok(None)
            }
            // What is cached stays, for as long as its lease or the grace lasts.
            Err(error) if error.is_outage() || error.was_not_sent() => {
                self.ticket.release();
                Err(error)
            }
            Err(error) => {
                self.ticket.forget();
                Err(error)
            }
        };
        self.lands.send_replace(Some(answer));
        drop(self.probe);
    }
}
