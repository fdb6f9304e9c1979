//! The seam between the two tiers: what the cached store asks of its persistence.
//!
//! Futures are `'static` and own what they need, since each runs in a task of its own. Encoding
//! happens before a future is returned, so an unstorable session is an error before anything is
//! sent.

use std::future::Future;
use std::pin::Pin;

use crate::error::Result;
use crate::key::SessionKey;
use crate::record::{Data, Session, WallTime};

/// A call to the persistence tier, ready to run in a task.
pub(crate) type Call<T> = Pin<Box<dyn Future<Output = Result<T>> + Send>>;

/// Where sessions live. Private: [`MongoStore`](crate::MongoStore), and a simulated one in tests.
pub(crate) trait Backend: Send + Sync + 'static {
    /// Stores a new session; `None` if another one holds the key. Answers with the stored expiry.
    fn insert(
        &self,
        key: SessionKey,
        rev: Rev,
        data: &Data,
        expires: WallTime,
    ) -> Call<Option<WallTime>>;

    /// Replaces the data and expiry of a live session; `None` if there is none. Never creates one.
    fn replace(
        &self,
        key: SessionKey,
        rev: Rev,
        data: &Data,
        expires: WallTime,
    ) -> Call<Option<WallTime>>;

    /// Finds a session that is live by the wall clock. `None` means that the database said so.
    fn find(&self, key: SessionKey) -> Call<Option<Session>>;

    /// Removes a session, if there is one.
    fn remove(&self, key: SessionKey) -> Call<()>;

    /// Removes every session that stood there when the call began; answers with how many.
    fn clear(&self) -> Call<u64>;
}

/// A mark that is new on every write that other instances must hear of: the first 12 bytes name the
/// writing store, the last 4 count.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Rev([u8; 16]);

impl Rev {
    pub(crate) fn as_bytes(&self) -> &[u8; 16] {
        &self.0
    }
}

/// Makes the revs of one store. Each store has its own: a cache must not take the writes of another
/// store in the same process for its own.
#[derive(Debug)]
pub(crate) struct RevSource {
    store: [u8; 12],
    next: std::sync::atomic::AtomicU32,
}

impl RevSource {
    pub(crate) fn new() -> Self {
        // A fresh id is 16 bytes from a generator that the system seeds; unlike the id, a digest of
        // it may be stored.
        let random = SessionKey::of(tower_sessions_core::session::Id::default().0);
        let mut store = [0; 12];
        store.copy_from_slice(&random.as_bytes()[..12]);
        Self { store, next: 0.into() }
    }

    pub(crate) fn next(&self) -> Rev {
        let count = self.next.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let mut rev = [0; 16];
        rev[..12].copy_from_slice(&self.store);
        rev[12..].copy_from_slice(&count.to_be_bytes());
        Rev(rev)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn revs_name_their_store_and_count() {
        let (one, other) = (RevSource::new(), RevSource::new());
        let (a, b, c) = (one.next(), one.next(), other.next());
        assert_eq!(a.0[..12], b.0[..12]);
        assert_ne!(a.0[..12], c.0[..12]);
        assert_eq!((&a.0[12..], &b.0[12..]), (&[0, 0, 0, 0][..], &[0, 0, 0, 1][..]));
    }
}
