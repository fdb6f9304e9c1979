//! `CausalSessions`: the driver sessions of the operations, and the latest time of the database that they know.
//!
//! For a moment after a failover, the new primary may not know that a majority has the newest changes, and its
//! reads leave them out. A read in a causally consistent session
//! [waits](https://www.mongodb.com/docs/manual/core/causal-consistency-read-write-concerns/) until it includes
//! them: the changes that this store has made, and those that the change stream has reported to it (I1 to I3).

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bson::Timestamp;
use mongodb::{Client, ClientSession};

use crate::invalidation::source::ServerTime;
use crate::sync::{Mutex, lock};

/// The most idle driver sessions that are kept. As a rule, fewer are in use at a time.
const MAX_POOLED: usize = 32;
/// How long an idle driver session may be used again. The server forgets one after 30 minutes.
const MAX_IDLE: Duration = Duration::from_secs(60);

/// A pool of causally consistent driver sessions. Clones share it.
#[derive(Clone)]
pub(crate) struct CausalSessions(Arc<Shared>);

struct Shared {
    /// The latest [`ServerTime`] that this store knows. An atomic, because each operation reads and raises it.
    time: AtomicU64,
    /// Whether driver sessions are used again. They are not if the app handed in the client: the app may shut
    /// it down at any time, and `Client::shutdown` waits for every driver session that is kept.
    is_pooled: bool,
    /// Driver sessions to be used again, each with the time of its last use. The driver starts a task for each
    /// session, which costs more than the rest of it. Never locked across an `await`.
    idle: Mutex<Vec<(ClientSession, Instant)>>,
}

impl CausalSessions {
    pub(crate) fn new(is_pooled: bool) -> Self {
        Self(Arc::new(Shared { time: AtomicU64::new(0), is_pooled, idle: Mutex::default() }))
    }

    /// Raises the latest known time.
    pub(crate) fn advance(&self, to: ServerTime) {
        self.0.time.fetch_max(to.0, Ordering::AcqRel);
    }

    /// Takes a driver session whose reads are at least as new as the latest known time.
    pub(crate) async fn check_out(&self, client: &Client) -> mongodb::error::Result<ClientSession> {
        let kept = lock(&self.0.idle).pop().filter(|(_, used)| used.elapsed() < MAX_IDLE);
        let mut session = match kept {
            Some((session, _)) => session,
            None => Self::new_session(client).await?,
        };
        let seen = self.0.time.load(Ordering::Acquire);
        if seen != 0 {
            session.advance_operation_time(timestamp(seen));
        }
        Ok(session)
    }

    /// Observes the time of an operation, and keeps its driver session if the operation succeeded.
    pub(crate) fn check_in<T>(
        &self,
        session: ClientSession,
        outcome: mongodb::error::Result<T>,
    ) -> mongodb::error::Result<T> {
        self.observe(&session);
        if outcome.is_ok() && self.0.is_pooled {
            let mut idle = lock(&self.0.idle);
            if idle.len() < MAX_POOLED {
                idle.push((session, Instant::now()));
            }
        }
        outcome
    }

    /// Drops the idle driver sessions, before the client is closed.
    pub(crate) fn clear(&self) {
        let sessions = std::mem::take(&mut *lock(&self.0.idle));
        // Dropped after the lock is released.
        drop(sessions);
    }

    /// Starts a driver session that has no time yet.
    pub(crate) async fn new_session(client: &Client) -> mongodb::error::Result<ClientSession> {
        client.start_session().causal_consistency(true).await
    }

    /// Raises the latest known time to that of the last operation in `session`.
    pub(crate) fn observe(&self, session: &ClientSession) {
        if let Some(at) = session.operation_time() {
            self.advance(ServerTime::from(at));
        }
    }
}

/// The timestamp from which [`ServerTime::from`] makes this number.
#[allow(clippy::cast_possible_truncation, reason = "the halves are taken apart")]
fn timestamp(time: u64) -> Timestamp {
    Timestamp { time: (time >> 32) as u32, increment: time as u32 }
}

impl From<Timestamp> for ServerTime {
    fn from(at: Timestamp) -> Self {
        Self(u64::from(at.time) << 32 | u64::from(at.increment))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_ordered_by_seconds_first_and_never_go_back() {
        let early = ServerTime::from(Timestamp { time: 1, increment: u32::MAX });
        let late = ServerTime::from(Timestamp { time: 2, increment: 0 });
        assert!(early < late);
        let seen = CausalSessions::new(true);
        seen.advance(late);
        seen.advance(early);
        assert_eq!(seen.0.time.load(Ordering::Acquire), late.0);
    }
}
