//! `CacheConfig`: the cache's settings, as the builder of the store got them.

use std::time::Duration;

/// The rule by which a full cache evicts an entry.
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

/// How the cache learns that a cached session is out of date.
///
/// | choice | how a change by another instance gets here | cost | when to choose it |
/// |---|---|---|---|
/// | [`ChangeStream`](Self::ChangeStream) | MongoDB reports it, as a rule within milliseconds. While the stream is behind, no session is served longer than [`max_staleness`] | one connection, and a few small commands a second. MongoDB sends each change to each instance | the default. It needs a replica set or a sharded cluster |
/// | [`TimeBound`](Self::TimeBound) | the session is read again once it is [`max_staleness`] old | one read of each active session for each `max_staleness` and instance | many instances, and too many changes to send each one to every instance |
/// | [`SoleWriter`](Self::SoleWriter) | it does not: there must be none | nothing | an app of one instance, now and always |
///
/// [`max_staleness`]: crate::CachedMongoStoreBuilder::max_staleness
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Coherence {
    /// A [change stream](https://www.mongodb.com/docs/manual/changeStreams/) invalidates what other
    /// instances change. On a server that has no change streams the store logs one warning and works
    /// as with [`TimeBound`](Self::TimeBound).
    #[default]
    ChangeStream,
    /// No change stream. A cached session is served for at most `max_staleness` after it was read.
    TimeBound,
    /// This store and its clones are the only ones that change these sessions: no other instance
    /// writes, and nobody edits the collection. So the store opens no change stream for its cache,
    /// and cached sessions have no age bound. `max_staleness` bounds only for how long the store
    /// remembers that an id does not exist.
    ///
    /// If there is a second writer after all, a log-out there goes unseen here until the session
    /// expires. The same is true of a write of this store that timed out, if the server carries it
    /// out after this store has read the session again.
    SoleWriter,
}

/// The settings of a cache.
#[derive(Clone, Debug)]
pub(crate) struct CacheConfig {
    pub(crate) max_bytes: u64,
    pub(crate) max_entries: Option<u64>,
    pub(crate) max_absent_ids: u64,
    pub(crate) policy: EvictionPolicy,
    pub(crate) max_staleness: Duration,
    pub(crate) coherence: Coherence,
    pub(crate) outage_grace: Duration,
    /// Whether entries are kept in the compact form.
    pub(crate) compact: bool,
}
