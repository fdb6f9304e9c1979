//! The store that most users take, and its options.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use mongodb::Collection;

use crate::backend::RevSource;
use crate::cache::{Cache, EvictionPolicy, Limits};
use crate::clock::Clock;
use crate::error::{Error, Result};
use crate::follow::{self, Follower};
use crate::key::SessionKey;
use crate::metrics::StreamMetrics;
use crate::mongo::{LiveSessions, MongoStore, StoredSession};
use crate::record::{Data, RawId, Session, WallTime};
use crate::tiers::Tiers;

/// A write-through cache in front of a [`MongoStore`]: sessions are read at memory speed and live in
/// MongoDB.
///
/// # The guarantee
///
/// - Nothing is in the cache that MongoDB has not acknowledged. Every write goes to MongoDB
///   first; one that fails, times out or is cancelled leaves no entry.
/// - After `delete` or [`clear`](Self::clear) has returned, no later `load` here returns the
///   session; after `save` has returned, a later `load` returns that version or a newer one. A slow
///   read that overlaps either leaves nothing behind.
/// - What other instances change, and whoever edits the collection, is followed through a
///   [change stream](https://www.mongodb.com/docs/manual/changeStreams/), as a rule within
///   milliseconds. And whatever happens (a stalled stream, a paused server, a network that is cut in
///   one direction, this machine asleep), no session is served as it was more than
///   [`max_staleness`](CachedMongoStoreBuilder::max_staleness) before it was asked for. (What is
///   *saved* within that time may be based on the older state: the last save wins.)
/// - The saves of one session through this store are carried out in the order in which they were
///   called, those of callers that have gone included.
/// - However many requests ask for a session that is not cached, MongoDB is asked once.
///
/// A change stream needs a replica set or a sharded cluster. On a standalone server there is none:
/// one warning is logged, and each session is read anew once it is `max_staleness` old.
///
/// Cheap to clone; clones share the cache.
///
/// # Cancel safety
///
/// As for [`MongoStore`]: a write that was begun is carried out, and the cache is left as the
/// database is.
#[derive(Clone)]
pub struct CachedMongoStore {
    tiers: Arc<Tiers<MongoStore>>,
}

/// Builds a [`CachedMongoStore`]. Setters never fail; [`build`](Self::build) checks everything.
#[derive(Clone, Debug)]
#[must_use = "a builder does nothing until it is built"]
pub struct CachedMongoStoreBuilder {
    mongo: MongoStore,
    limits: Limits,
    follows: bool,
}

impl CachedMongoStore {
    /// Connects to `uri` with all defaults of both tiers.
    ///
    /// # Errors
    ///
    /// As [`MongoStoreBuilder::build`](crate::MongoStoreBuilder::build).
    ///
    /// # Cancel safety
    ///
    /// As [`MongoStore::connect`].
    pub async fn connect(uri: impl Into<String>) -> Result<Self> {
        Self::builder(MongoStore::connect(uri).await?).build().await
    }

    /// Connects to the URI in the environment variable `MONGODB_URI`, with all defaults.
    ///
    /// # Errors
    ///
    /// As [`MongoStore::from_env`].
    ///
    /// # Cancel safety
    ///
    /// As [`MongoStore::connect`].
    pub async fn from_env() -> Result<Self> {
        Self::builder(MongoStore::from_env().await?).build().await
    }

    /// A builder of a cache in front of `mongo`. Change sessions through the cached store from then
    /// on: what is written through `mongo` itself is like a write of another instance.
    pub fn builder(mongo: MongoStore) -> CachedMongoStoreBuilder {
        CachedMongoStoreBuilder {
            mongo,
            follows: true,
            limits: Limits {
                max_bytes: 64 << 20,
                max_entries: None,
                max_absent: 10_000,
                policy: EvictionPolicy::Lru,
                max_staleness: Duration::from_secs(5),
                exclusive: false,
                outage_grace: Duration::ZERO,
                compact: false,
            },
        }
    }

    /// How many live sessions there are; see [`MongoStore::length`].
    ///
    /// # Errors
    ///
    /// As [`MongoStore::length`].
    ///
    /// # Cancel safety
    ///
    /// May be dropped at any time.
    pub async fn length(&self) -> Result<u64> {
        self.tiers.backend.length().await
    }

    /// About how many live sessions there are, at a cost that does not grow with them; see
    /// [`MongoStore::estimated_length`].
    ///
    /// # Errors
    ///
    /// As [`MongoStore::length`].
    ///
    /// # Cancel safety
    ///
    /// May be dropped at any time.
    pub async fn estimated_length(&self) -> Result<u64> {
        self.tiers.backend.estimated_length().await
    }

    /// Whether MongoDB holds a live session with this id; the cache is not asked.
    ///
    /// # Errors
    ///
    /// As [`MongoStore::length`].
    ///
    /// # Cancel safety
    ///
    /// May be dropped at any time.
    pub async fn contains(&self, id: impl Into<SessionKey> + Send) -> Result<bool> {
        self.tiers.backend.contains(id).await
    }

    /// A stream of the live sessions, without their ids; see [`MongoStore::all`].
    pub fn all(&self) -> LiveSessions {
        self.tiers.backend.all()
    }

    /// Removes every session from MongoDB, then empties the cache, and answers with how many were
    /// removed; see [`MongoStore::clear`].
    ///
    /// # Errors
    ///
    /// As [`MongoStore::length`]; some sessions may have been removed, and the cache is empty.
    ///
    /// # Cancel safety
    ///
    /// Once begun it goes on to its end, cache included, though the future is dropped.
    pub async fn clear(&self) -> Result<u64> {
        self.tiers.clear().await
    }

    /// The collection itself; see [`MongoStore::collection`].
    #[must_use]
    pub fn collection(&self) -> Collection<StoredSession> {
        self.tiers.backend.collection()
    }

    /// Creates the expiry index if it is missing; see [`MongoStore::ensure_indexes`].
    ///
    /// # Errors
    ///
    /// As [`MongoStore::ensure_indexes`].
    ///
    /// # Cancel safety
    ///
    /// As [`MongoStore::ensure_indexes`].
    pub async fn ensure_indexes(&self) -> Result<()> {
        self.tiers.backend.ensure_indexes().await
    }

    /// Ends background tasks, closes the connections and empties the cache; see
    /// [`MongoStore::shutdown`].
    ///
    /// # Cancel safety
    ///
    /// As [`MongoStore::shutdown`].
    pub async fn shutdown(&self) {
        self.tiers.backend.shutdown().await;
        self.tiers.cache.clear();
    }

    pub(crate) async fn create_session(&self, data: &Data, expires: WallTime) -> Result<RawId> {
        self.tiers.create(data, expires).await
    }

    pub(crate) async fn save_session(
        &self,
        id: RawId,
        data: &Data,
        expires: WallTime,
    ) -> Result<()> {
        self.tiers.save(id, data, expires).await
    }

    pub(crate) async fn load_session(&self, id: RawId) -> Result<Option<Session>> {
        self.tiers.load(id).await
    }

    pub(crate) async fn delete_session(&self, id: RawId) -> Result<()> {
        self.tiers.delete(id).await
    }

    pub(crate) async fn remove_expired(&self) -> Result<()> {
        self.tiers.backend.remove_expired().await
    }
}

impl CachedMongoStoreBuilder {
    /// How much heap the cached sessions may take, in bytes. Default 64 MiB. Zero caches nothing.
    /// An entry weighs what its record takes on the heap, which is many times its JSON where that is
    /// nested.
    pub fn max_bytes(mut self, bytes: u64) -> Self {
        self.limits.max_bytes = bytes;
        self
    }

    /// How many sessions may be cached, besides the bound in bytes. Default: as many as fit. At
    /// least 1. The share of the bytes that so many sessions have each is set aside for each one, so
    /// a few that are larger than their share leave room for fewer.
    pub fn max_entries(mut self, entries: u64) -> Self {
        self.limits.max_entries = Some(entries);
        self
    }

    /// How many ids that do not exist are remembered, for `max_staleness` each, so that a flood of invented ids is answered from memory and evicts no session.
    /// Default 10,000, beside the bound in bytes. Zero remembers none.
    pub fn max_absent(mut self, ids: u64) -> Self {
        self.limits.max_absent = ids;
        self
    }

    /// How old the state of a session may be that is served from the cache, and so how long a
    /// log-out on another instance may go unseen here if MongoDB cannot tell of it. Default 5 s.
    /// Zero asks MongoDB each time.
    ///
    /// While the change stream runs, this cache knows up to when it has heard of every change, and
    /// sessions are served for as long as that moment is no further back than this: a session that
    /// nobody changes is read once. About ten times within this bound, and twice a second at least, it
    /// asks MongoDB how far it is, which costs a `ping` and an empty batch of the stream.
    ///
    /// A request that waits for its own slow read of MongoDB gets a state as old as that wait, which
    /// the operation timeout bounds.
    pub fn max_staleness(mut self, bound: Duration) -> Self {
        self.limits.max_staleness = bound;
        self
    }

    /// Whether to follow the changes of other instances through a change stream. Default yes.
    /// Without it each session is read anew once it is `max_staleness` old: for a fleet whose changes
    /// are too many to be told to every instance.
    pub fn change_stream(mut self, follow: bool) -> Self {
        self.follows = follow;
        self
    }

    /// Declares that this store and its clones are the only ones to change these sessions: one
    /// instance of the app, and nobody who edits the collection. Then what is cached needs no bound
    /// on its age and no change stream, and `max_staleness` only says how long an id that does not
    /// exist is remembered.
    ///
    /// With a second writer a log-out there goes unseen here until the session expires.
    pub fn exclusive(mut self) -> Self {
        self.limits.exclusive = true;
        self
    }

    /// How much longer than [`max_staleness`](Self::max_staleness) a cached session may be served
    /// while MongoDB does not answer. Default zero: then a load is an error, once a session is
    /// older than that.
    ///
    /// The choice is between a log-out elsewhere that goes unseen for so long, and users who are
    /// turned away while the database is down. The first load that fails waits for its error up to
    /// the operation timeout; from then on, until MongoDB answers again, sessions within the grace
    /// are served at once. A session that is known to be gone, or of which a write here ended in
    /// doubt, is never served. Each one served is counted in `session_store_grace_served_total`.
    pub fn outage_grace(mut self, grace: Duration) -> Self {
        self.limits.outage_grace = grace;
        self
    }

    /// Whether cached sessions are kept packed, each in one block, and unpacked at each load. Default
    /// no. A session of five small objects takes 590 bytes instead of 4,700, so that many more fit into
    /// the same bytes, and a hit takes about 1.4 times as long.
    pub fn compact(mut self, packed: bool) -> Self {
        self.limits.compact = packed;
        self
    }

    /// Which entry goes when the cache is full. Default [`EvictionPolicy::Lru`].
    pub fn eviction_policy(mut self, policy: EvictionPolicy) -> Self {
        self.limits.policy = policy;
        self
    }

    /// Builds the store, and begins to follow the changes that other instances make.
    ///
    /// Waits for the change stream to be open, for at most the operation timeout; if it is not open
    /// by then, the store starts without and goes on trying.
    ///
    /// # Errors
    ///
    /// [`Config`](crate::ErrorKind::Config) for options that make no sense, alone or together.
    ///
    /// # Cancel safety
    ///
    /// May be dropped at any time.
    pub async fn build(self) -> Result<CachedMongoStore> {
        let limits = &self.limits;
        if limits.max_entries == Some(0) {
            return Err(Error::config(
                "`max_entries` is zero, which caches nothing: leave it out, or use the MongoStore \
                 by itself",
            ));
        }
        if limits.exclusive && !limits.outage_grace.is_zero() {
            return Err(Error::config(
                "`outage_grace` was given to an `exclusive` store, which serves what it has cached \
                 without a bound: leave it out",
            ));
        }
        let clock = Clock::system();
        let cache = Cache::new(limits, clock.clone());
        let tasks = self.mongo.tasks().clone();
        let ends = tasks.closed().child_token();
        // Where nothing is served from the cache, or nobody else changes it, nobody needs to tell.
        if self.follows && !limits.exclusive && !limits.max_staleness.is_zero() {
            let pace = follow::pace(limits.max_staleness);
            let follower = Follower {
                changes: self.mongo.watch(pace)?,
                cache: cache.clone(),
                clock,
                pace,
                timeout: tasks.timeout(),
                metrics: StreamMetrics::new(),
                chance: fastrand::Rng::new(),
            };
            let opened = follower.start(&tasks, ends.clone());
            drop(tokio::time::timeout(tasks.timeout(), opened).await);
        }
        tasks.spawn(cache.clone().tidy(ends.clone()));
        let tiers = Tiers {
            backend: self.mongo,
            cache,
            tasks,
            revs: RevSource::new(),
            _ends_following: ends.drop_guard(),
        };
        Ok(CachedMongoStore { tiers: Arc::new(tiers) })
    }
}

impl fmt::Debug for CachedMongoStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CachedMongoStore")
            .field("mongo", &self.tiers.backend)
            .finish_non_exhaustive()
    }
}
