//! The bounds of a cache, as they were asked for.

use std::time::Duration;

/// Which entry goes when the cache is full.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum EvictionPolicy {
    /// The least recently used. The default: a session that was just made is the one most likely
    /// to be asked for next.
    #[default]
    Lru,
    /// A new entry must have been asked for more often than those it would displace
    /// ([TinyLFU](https://arxiv.org/abs/1512.00727)). For loads in which few sessions get most of
    /// the requests.
    TinyLfu,
}

/// The bounds of a cache.
#[derive(Clone, Debug)]
pub(crate) struct CacheConfig {
    pub(crate) max_bytes: u64,
    pub(crate) max_entries: Option<u64>,
    pub(crate) max_absent_ids: u64,
    pub(crate) policy: EvictionPolicy,
    pub(crate) max_staleness: Duration,
    /// Nobody else changes these sessions, so `max_staleness` bounds only what is known to be absent.
    pub(crate) exclusive: bool,
    pub(crate) outage_grace: Duration,
    /// Entries are kept packed.
    pub(crate) compact: bool,
}
