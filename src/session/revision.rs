//! Revisions: marks that tell whose write a change event reports.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use crate::session::id::SessionKey;

/// A mark that is new on every write that other instances must hear of: the first 12 bytes name the
/// writing store, the last 4 count.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Rev([u8; 16]);

impl Rev {
    pub(crate) fn as_bytes(&self) -> &[u8; 16] {
        &self.0
    }

    /// The name of the store that wrote.
    pub(crate) fn store(&self) -> &[u8] {
        &self.0[..12]
    }

    /// `None` for bytes that are no rev: whoever wrote them was no store.
    pub(crate) fn from_bytes(bytes: &[u8]) -> Option<Self> {
        bytes.try_into().ok().map(Self)
    }
}

/// A change of one session, as the change stream reports it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Change {
    pub(crate) key: SessionKey,
    /// `None` if no store made the change.
    pub(crate) rev: Option<Rev>,
}

/// Makes the revs of one store. Each store has its own: a cache must not take the writes of another
/// store in the same process for its own. Clones share the count.
#[derive(Clone, Debug)]
pub(crate) struct RevSource {
    store: [u8; 12],
    next: Arc<AtomicU32>,
}

impl RevSource {
    pub(crate) fn new() -> Self {
        // A fresh id is 16 bytes from a generator that the system seeds; unlike the id, a digest of
        // it may be stored.
        let random = SessionKey::of(tower_sessions_core::session::Id::default().0);
        let mut store = [0; 12];
        store.copy_from_slice(&random.as_bytes()[..12]);
        Self { store, next: Arc::default() }
    }

    /// What [`Rev::store`] of its revs is.
    pub(crate) fn store(&self) -> [u8; 12] {
        self.store
    }

    pub(crate) fn next(&self) -> Rev {
        let count = self.next.fetch_add(1, Ordering::Relaxed);
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
