//! [`CachedMongoStore`]: a write-through cache in front of MongoDB.

mod builder;
mod events;
mod owners;
mod warm_up;
pub(crate) mod write_through;

use std::fmt;
use std::sync::Arc;

use mongodb::Collection;

use crate::error::Result;
use crate::health::Health;
use crate::mongo::{LiveSessions, MongoBackend, MongoStore, StoredSession};
use crate::session::id::{RawId, SessionKey};
use crate::session::{Data, Session};
pub use crate::store::builder::CachedMongoStoreBuilder;
pub use crate::store::events::{Event, EventKind, Events, SessionEvent};
pub use crate::store::warm_up::{WarmUp, WarmUpLimit, Warmed};
use crate::store::write_through::WriteThrough;
use crate::telemetry::metrics::StreamState;
use crate::telemetry::spans;
use crate::time::WallTime;

/// A session store with a write-through cache in front of a [`MongoStore`]. Sessions live in MongoDB, and
/// most reads are answered from memory.
///
/// Do not wrap it in the `CachingSessionStore` of tower-sessions. This store is the cache already. A
/// second cache above it would serve sessions after a log-out, because nothing would invalidate it.
///
/// # Contract of the verbs
///
/// As for [`MongoStore`](MongoStore#contract-of-the-verbs). In particular `create` ignores the id in the
/// record and takes a random one, and `save` never creates a session: a save of a session that was deleted
/// or has expired is dropped.
///
/// # The guarantee
///
/// - The cache holds nothing that MongoDB has not acknowledged. Every write goes to MongoDB first. A
///   write that fails, times out or is cancelled leaves no entry.
/// - After `delete` or [`clear`](Self::clear) has returned `Ok`, no later `load` on this instance returns
///   the session. After `save` has returned `Ok`, a later `load` on this instance returns that version or
///   a newer one. A slow read that overlaps one of these calls leaves nothing in the cache.
/// - A [change stream](https://www.mongodb.com/docs/manual/changeStreams/) reports what other instances
///   change, and what is edited by hand, usually within milliseconds.
/// - No `load` returns a session as it was more than
///   [`max_staleness`](CachedMongoStoreBuilder::max_staleness) before the call. A stalled stream, a paused server, a
///   network that is cut in one direction, or the sleep of this machine does not change that. Exceptions:
///   [`outage_grace`](CachedMongoStoreBuilder::outage_grace) and
///   [`Coherence::SoleWriter`](crate::Coherence::SoleWriter), if you choose them, and a primary that is
///   cut off from its replica set but not from this instance, until it steps down (10 s by default).
/// - The saves of one session through this store are carried out in the order of the calls. That includes
///   saves whose callers have gone away.
/// - Concurrent loads of one session that is not cached are one read of MongoDB.
///
/// A request may base what it *saves* on a state as old as `max_staleness`. A save stores all data, so the last
/// save wins. In the scope of a [`RequestScopeLayer`](crate::RequestScopeLayer), a save stores only what its request
/// has changed, and keeps what others have stored.
///
/// A change stream needs a replica set or a sharded cluster. If the server has none, or refuses one three
/// times in a row, the store logs one warning with the reason. It then reads each session again once it is
/// `max_staleness` old.
///
/// Cheap to clone. Clones share the cache.
///
/// # Cancel safety
///
/// As for [`MongoStore`]: a write that has begun is carried out, and the cache then agrees with the
/// database.
#[derive(Clone)]
pub struct CachedMongoStore {
    tiers: Arc<WriteThrough<MongoBackend>>,
    mongo: MongoStore,
    stream: Option<StreamState>,
    events: Arc<events::EventBroadcaster>,
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

    /// Returns a builder of a cache in front of `mongo`. From then on, change sessions through the cached
    /// store only: a write through `mongo` itself is like a write by another instance.
    pub fn builder(mongo: MongoStore) -> CachedMongoStoreBuilder {
        CachedMongoStoreBuilder::new(mongo)
    }

    /// Returns the number of live sessions; see [`MongoStore::length`].
    ///
    /// # Errors
    ///
    /// As [`MongoStore::length`].
    ///
    /// # Cancel safety
    ///
    /// May be dropped at any time.
    pub async fn length(&self) -> Result<u64> {
        self.mongo.length().await
    }

    /// Returns about how many live sessions there are, at a cost that does not grow with them; see
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
        self.mongo.estimated_length().await
    }

    /// Whether MongoDB holds a live session with this id. Does not ask the cache.
    ///
    /// # Errors
    ///
    /// As [`MongoStore::length`].
    ///
    /// # Cancel safety
    ///
    /// May be dropped at any time.
    pub async fn contains(&self, id: impl Into<SessionKey> + Send) -> Result<bool> {
        self.mongo.contains(id).await
    }

    /// Returns a stream of the live sessions, without their ids; see [`MongoStore::all`].
    pub fn all(&self) -> LiveSessions {
        self.mongo.all()
    }

    /// Removes every session from MongoDB, then empties the cache, and returns the number of removed
    /// sessions; see [`MongoStore::clear`].
    ///
    /// # Errors
    ///
    /// As [`MongoStore::length`]. Some sessions may have been removed. The cache is empty.
    ///
    /// # Cancel safety
    ///
    /// Once begun it runs to completion, cache included, even if the future is dropped.
    pub async fn clear(&self) -> Result<u64> {
        spans::verb!("session_store.clear", self.tiers.clear())
    }

    /// Returns the collection itself; see [`MongoStore::collection`].
    #[must_use]
    pub fn collection(&self) -> Collection<StoredSession> {
        self.mongo.collection()
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
    #[doc(alias = "migrate")]
    pub async fn ensure_indexes(&self) -> Result<()> {
        self.mongo.ensure_indexes().await
    }

    /// Returns a snapshot of the store's state. No I/O, so a probe may call it as often as it likes.
    ///
    /// With a change stream, the state of MongoDB is at most half a second old, since the store sends
    /// checkpoints at least twice a second; see [`MongoStore::health`].
    #[must_use]
    pub fn health(&self) -> Health {
        self.mongo.health().with_cache(&self.tiers.cache.stats(), self.stream.as_ref())
    }

    /// Ends the background tasks, closes the connections and empties the cache; see
    /// [`MongoStore::shutdown`].
    ///
    /// # Cancel safety
    ///
    /// As [`MongoStore::shutdown`].
    pub async fn shutdown(&self) {
        self.mongo.shutdown().await;
        self.tiers.cache.purge();
    }

    pub(crate) async fn create_session(
        &self,
        record_id: RawId,
        data: &Data,
        expires: WallTime,
    ) -> Result<RawId> {
        self.tiers.create(record_id, data, expires).await
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
        self.mongo.remove_expired().await
    }
}

impl fmt::Debug for CachedMongoStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CachedMongoStore").field("mongo", &self.mongo).finish_non_exhaustive()
    }
}
