//! The part of moka that the cache uses, under moka's names. It is a map of one key.
//!
//! A read takes no lock, as in moka. So a thread may still read a replaced value, until something synchronises it with
//! the thread that replaced the value.
//!
//! The map never evicts by itself, and [`invalidate_all`](sync::Cache::invalidate_all) does nothing. moka's
//! `invalidate_all` compares timestamps and may miss entries, so the model leaves all of the work to the epochs.

pub(crate) mod notification {
    #[allow(dead_code, reason = "the model has no eviction listener")]
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
        /// All values so far, `None` for a removal. A std lock, because reading a value must not be a step.
        values: Mutex<Vec<Option<V>>>,
        /// The number of values. loom sees this atomic, and decides which value a thread reads.
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
            let _ = self.change(Some(value));
        }

        pub(crate) fn invalidate(&self, _: &K) {
            let _ = self.change(None);
        }

        pub(crate) fn remove(&self, _: &K) -> Option<V> {
            self.change(None)
        }

        /// Returns the value before the change.
        fn change(&self, value: Option<V>) -> Option<V> {
            // No other thread runs from here to the end, because only loom's types make steps.
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
            Cache { values: Mutex::default(), changes: AtomicU64::new(0), _types: PhantomData }
        }
    }
}
