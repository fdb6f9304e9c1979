//! `Rev`: the revision of a session, by which a store recognises its own writes in the change stream.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use crate::session::id::SessionKey;

/// A mark that each insert and each replace of a session renews. The first 12 bytes name the store that
/// wrote it, the last 4 count the writes of that store.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Rev([u8; 16]);

impl Rev {
    pub(crate) fn as_bytes(&self) -> &[u8; 16] {
        &self.0
    }

    /// The 12 bytes that name the store.
    pub(crate) fn store(&self) -> &[u8] {
        &self.0[..12]
    }

    /// `None` unless there are 16 bytes. No store writes another number of them.
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

/// Makes the revs of one store. Clones share the count.
///
/// Each store has its own source. Otherwise two stores in one process would mistake each other's writes for
/// their own.
#[derive(Clone, Debug)]
pub(crate) struct RevSource {
    store: [u8; 12],
    next: Arc<AtomicU32>,
}

impl RevSource {
    pub(crate) fn new() -> Self {
        // A new id is random. Its digest is stored in every session, and the id cannot be computed from it.
        let random = SessionKey::of(tower_sessions_core::session::Id::default().0);
        let mut store = [0; 12];
        store.copy_from_slice(&random.as_bytes()[..12]);
        Self { store, next: Arc::default() }
    }

    /// The [store](Rev::store) of its revs.
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
        let source = RevSource::new();
        let first = source.next();
        let second = source.next();
        let foreign = RevSource::new().next();
        assert_eq!(first.0[..12], second.0[..12]);
        assert_ne!(first.0[..12], foreign.0[..12]);
        assert_eq!(first.0[12..], [0, 0, 0, 0]);
        assert_eq!(second.0[12..], [0, 0, 0, 1]);
    }
}
