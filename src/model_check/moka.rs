//! The part of moka that the cache uses, by moka's names: a map, here of one key, that anyone reads
//! without a lock. Who is not told by some other way that a value was replaced may still see it.
//!
//! It evicts nothing of its own accord. [`invalidate_all`](sync::Cache::invalidate_all) does
//! nothing: moka's works by timestamps, so what is left to the epochs is the most it could be.

pub(crate) mod notification {
    #[allow(dead_code, reason = "nobody is told of a removal")]
    pub(crate) enum RemovalCause {
        Size,
        Expired,
        Explicit,
        Replaced,
    }
}

pub(crate) mod policy {
    pub(crate) struct EvictionPolicy;

    impl EvictionPolicy {
        pub(crate) fn lru() -> Self {
            Self
        }

        pub(crate) fn tiny_lfu() -> Self {
            Self
        }
    }
}

#[allow(dead_code, clippy::unused_self, reason = "the signatures are moka's")]
pub(crate) mod sync {
    use std::marker::PhantomData;
    use std::sync::{Arc, Mutex, PoisonError};
    use std::time::Duration;

    use super::notification::RemovalCause;
    use super::policy::EvictionPolicy;
    use crate::sync::{AtomicU64, Ordering};

    #[derive(Debug)]
    pub(crate) struct Cache<K, V, S> {
        /// All that was ever there, and how much of it there was at the latest change: that is what
        /// loom sees.
        values: Mutex<Vec<Option<V>>>,
        changes: AtomicU64,
        _types: PhantomData<(K, S)>,
    }

    pub(crate) struct Builder<K, V>(PhantomData<(K, V)>);

    impl<K, V> Cache<K, V, std::hash::RandomState> {
        pub(crate) fn builder() -> Builder<K, V> {
            Builder(PhantomData)
        }
    }

    impl<K, V: Clone, S> Cache<K, V, S> {
        pub(crate) fn get(&self, _: &K) -> Option<V> {
            let change = self.changes.load(Ordering::Acquire).checked_sub(1)?;
            let values = self.values.lock().unwrap_or_else(PoisonError::into_inner);
            values.get(usize::try_from(change).ok()?)?.clone()
        }

        pub(crate) fn insert(&self, _: K, value: V) {
            drop(self.change(Some(value)));
        }

        pub(crate) fn invalidate(&self, _: &K) {
            drop(self.change(None));
        }

        pub(crate) fn remove(&self, _: &K) -> Option<V> {
            self.change(None)
        }

        /// Answers with the value before.
        fn change(&self, value: Option<V>) -> Option<V> {
            // Nobody else runs between this and the end: only what is loom's is a step.
            let change = self.changes.fetch_add(1, Ordering::AcqRel);
            let mut values = self.values.lock().unwrap_or_else(PoisonError::into_inner);
            assert_eq!(u64::try_from(values.len()), Ok(change));
            let before = values.last().cloned().flatten();
            values.push(value);
            before
        }

        pub(crate) fn invalidate_all(&self) {}

        pub(crate) fn run_pending_tasks(&self) {}

        pub(crate) fn entry_count(&self) -> u64 {
            0
        }

        pub(crate) fn weighted_size(&self) -> u64 {
            0
        }
    }

    impl<K, V, S> IntoIterator for &Cache<K, V, S> {
        type Item = (Arc<K>, V);
        type IntoIter = std::iter::Empty<Self::Item>;

        fn into_iter(self) -> Self::IntoIter {
            std::iter::empty()
        }
    }

    impl<K, V> Builder<K, V> {
        pub(crate) fn max_capacity(self, _: u64) -> Self {
            self
        }

        pub(crate) fn weigher(self, _: impl Fn(&K, &V) -> u32) -> Self {
            self
        }

        pub(crate) fn eviction_policy(self, _: EvictionPolicy) -> Self {
            self
        }

        pub(crate) fn time_to_live(self, _: Duration) -> Self {
            self
        }

        pub(crate) fn eviction_listener(self, _: impl Fn(Arc<K>, V, RemovalCause)) -> Self {
            self
        }

        pub(crate) fn build_with_hasher<S>(self, _: S) -> Cache<K, V, S> {
            let (values, changes) = (Mutex::default(), AtomicU64::new(0));
            Cache { values, changes, _types: PhantomData }
        }
    }
}
