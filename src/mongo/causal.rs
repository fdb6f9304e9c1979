//! How far this store has seen the database go, so that no read goes back behind it.
//!
//! After a failover a new primary may not know for moments that the newest changes are those of a
//! majority, and its reads leave them out. A read in a causally consistent session
//! [waits](https://www.mongodb.com/docs/manual/core/causal-consistency-read-write-concerns/) until
//! they are in it: those that this store has made, and those that it has heard of (I1 to I3).

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bson::Timestamp;
use mongodb::{Client, ClientSession};

use crate::invalidation::source::ServerTime;
use crate::sync::{Mutex, lock};

/// More sessions than are in use at a time, as a rule.
const MAX_POOLED: usize = 32;
/// The server forgets a session after 30 minutes.
const MAX_IDLE: Duration = Duration::from_secs(60);

/// The latest time of the database that is known here. Clones share it.
#[derive(Clone)]
pub(crate) struct CausalSessions(Arc<Shared>);

struct Shared {
    time: AtomicU64,
    /// Whether sessions are used again. Not those of a client that the app handed in: the app may shut
    /// it down at any time, and `Client::shutdown` waits for every session that is kept.
    pools: bool,
    /// Sessions to be used again, each with when it was used last. The driver starts a task for each
    /// session, which costs more than what such a session is needed for.
    idle: Mutex<Vec<(ClientSession, Instant)>>,
}

impl CausalSessions {
    pub(crate) fn new(pools: bool) -> Self {
        Self(Arc::new(Shared { time: AtomicU64::new(0), pools, idle: Mutex::default() }))
    }

    pub(crate) fn advance(&self, to: ServerTime) {
        self.0.time.fetch_max(to.0, Ordering::AcqRel);
    }

    /// A session whose reads are at least as new as what has been seen.
    pub(crate) async fn check_out(&self, client: &Client) -> mongodb::error::Result<ClientSession> {
        let kept = lock(&self.0.idle).pop().filter(|(_, used)| used.elapsed() < MAX_IDLE);
        let mut session = match kept {
            Some((session, _)) => session,
            None => Self::new_session(client).await?,
        };
        let seen = self.0.time.load(Ordering::Acquire);
        if seen != 0 {
            #[allow(clippy::cast_possible_truncation, reason = "the halves are taken apart")]
            let (time, increment) = ((seen >> 32) as u32, seen as u32);
            session.advance_operation_time(Timestamp { time, increment });
        }
        Ok(session)
    }

    /// Takes note of what an operation in `session` has brought about, and keeps the session if that
    /// went well and sessions are used again.
    pub(crate) fn check_in<T>(
        &self,
        session: ClientSession,
        outcome: mongodb::error::Result<T>,
    ) -> mongodb::error::Result<T> {
        self.observe(&session);
        if outcome.is_ok() && self.0.pools {
            let mut idle = lock(&self.0.idle);
            if idle.len() < MAX_POOLED {
                idle.push((session, Instant::now()));
            }
        }
        outcome
    }

    /// Lets go of the sessions that are kept: the client is about to be closed.
    pub(crate) fn clear(&self) {
        let sessions = std::mem::take(&mut *lock(&self.0.idle));
        drop(sessions);
    }

    /// A session that knows of nothing yet, to [learn](Self::observe) from.
    pub(crate) async fn new_session(client: &Client) -> mongodb::error::Result<ClientSession> {
        client.start_session().causal_consistency(true).await
    }

    /// Takes note of what an operation in `session` has brought about.
    pub(crate) fn observe(&self, session: &ClientSession) {
        if let Some(at) = session.operation_time() {
            self.advance(ServerTime::from(at));
        }
    }
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
