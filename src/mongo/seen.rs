//! How far this store has seen the database go, so that no read goes back behind it.
//!
//! After a failover a new primary may not know for moments that the newest changes are those of a
//! majority, and its reads leave them out. A read in a causally consistent session
//! [waits](https://www.mongodb.com/docs/manual/core/causal-consistency-read-write-concerns/) until
//! they are in it: those that this store has made, and those that it has heard of (I1 to I3).

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bson::Timestamp;
use mongodb::{Client, ClientSession};

use crate::backend::ServerTime;

/// The latest time of the database that is known here. Clones share it.
#[derive(Clone, Debug, Default)]
pub(super) struct Seen(Arc<AtomicU64>);

impl Seen {
    pub(super) fn advance(&self, to: ServerTime) {
        self.0.fetch_max(to.0, Ordering::AcqRel);
    }

    /// A session whose reads are at least as new as what has been seen.
    pub(super) async fn session(&self, client: &Client) -> mongodb::error::Result<ClientSession> {
        let mut session = self.blank(client).await?;
        let seen = self.0.load(Ordering::Acquire);
        if seen != 0 {
            #[allow(clippy::cast_possible_truncation, reason = "the halves are taken apart")]
            let (time, increment) = ((seen >> 32) as u32, seen as u32);
            session.advance_operation_time(Timestamp { time, increment });
        }
        Ok(session)
    }

    /// A session that knows of nothing yet, to [learn](Self::learn) from.
    #[allow(clippy::unused_self, reason = "what is learned goes here")]
    pub(super) async fn blank(&self, client: &Client) -> mongodb::error::Result<ClientSession> {
        client.start_session().causal_consistency(true).await
    }

    /// Takes note of what an operation in `session` has brought about.
    pub(super) fn learn(&self, session: &ClientSession) {
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
        let seen = Seen::default();
        seen.advance(late);
        seen.advance(early);
        assert_eq!(seen.0.load(Ordering::Acquire), late.0);
    }
}
