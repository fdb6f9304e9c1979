//! `CacheConfig`: the cache's settings, as the builder of the store got them.

use std::time::Duration;

/// Which entry the cache evicts when it is full.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum EvictionPolicy {
    /// Evicts the least recently used entry. The default, since a new session is the one most likely to
    /// be loaded next.
    #[default]
    Lru,
    /// Admits a new entry only if it was loaded more often than the entries that it would displace
    /// ([TinyLFU](https://arxiv.org/abs/1512.00727)). Choose it if a few sessions get most of the
    /// requests.
    TinyLfu,
}

/// The settings of a cache.
#[derive(Clone, Debug)]
pub(crate) struct CacheConfig {
    pub(crate) max_bytes: u64,
    pub(crate) max_entries: Option<u64>,
    pub(crate) max_absent_ids: u64,
    pub(crate) policy: EvictionPolicy,
    pub(crate) max_staleness: Duration,
    /// This store is the only one that changes the sessions. So `max_staleness` bounds only the absent
    /// ids.
    pub(crate) exclusive: bool,
    pub(crate) outage_grace: Duration,
    /// Entries are kept in the compact form.
    pub(crate) compact: bool,
}
