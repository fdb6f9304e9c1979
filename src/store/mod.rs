//! The store that most users take.

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
use crate::session::id::RawId;
use crate::session::id::SessionKey;
use crate::session::{Data, Session};
pub use crate::store::builder::CachedMongoStoreBuilder;
pub use crate::store::events::{Event, EventKind, Events, SessionEvent};
pub use crate::store::warm_up::{WarmUp, WarmUpLimit, Warmed};
use crate::store::write_through::WriteThrough;
use crate::telemetry::metrics::StreamState;
use crate::telemetry::spans;
use crate::time::WallTime;

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
///   *saved* within that time may be based on the older state: the last save wins.) Three exceptions:
///   [`outage_grace`](CachedMongoStoreBuilder::outage_grace) and
///   [`Coherence::SoleWriter`](crate::Coherence::SoleWriter), if you choose them, and a primary that is cut
///   off from its set but not from this instance, until it steps down (10 s by default).
/// - The saves of one session through this store are carried out in the order in which they were
///   called, those of callers that have gone included.
/// - However many requests ask for a session that is not cached, MongoDB is asked once.
///
/// A change stream needs a replica set or a sharded cluster. On a standalone server there is none, nor on
/// one that refuses it three times in a row: one warning is logged with the reason, and each session is
/// read anew once it is `max_staleness` old.
///
/// Cheap to clone; clones share the cache.
///
/// # Cancel safety
///
/// As for [`MongoStore`]: a write that was begun is carried out, and the cache is left as the
/// database is.
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

    /// A builder of a cache in front of `mongo`. Change sessions through the cached store from then
    /// on: what is written through `mongo` itself is like a write of another instance.
    pub fn builder(mongo: MongoStore) -> CachedMongoStoreBuilder {
        CachedMongoStoreBuilder::new(mongo)
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
        self.mongo.length().await
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
        self.mongo.estimated_length().await
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
        self.mongo.contains(id).await
    }

    /// A stream of the live sessions, without their ids; see [`MongoStore::all`].
    pub fn all(&self) -> LiveSessions {
        self.mongo.all()
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
        spans::verb!("session_store.clear", self.tiers.clear())
    }

    /// The collection itself; see [`MongoStore::collection`].
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
    pub async fn ensure_indexes(&self) -> Result<()> {
        self.mongo.ensure_indexes().await
    }

    /// How the store is, as far as it knows without asking: no I/O, so for any probe, however often.
    /// With a change stream it knows MongoDB's state about as often as the stream's fences are
    /// answered, twice a second at least; see [`MongoStore::health`].
    #[must_use]
    pub fn health(&self) -> Health {
        self.mongo.health().with_cache(&self.tiers.cache.stats(), self.stream.as_ref())
    }

    /// Ends background tasks, closes the connections and empties the cache; see
    /// [`MongoStore::shutdown`].
    ///
    /// # Cancel safety
    ///
    /// As [`MongoStore::shutdown`].
    pub async fn shutdown(&self) {
        self.mongo.shutdown().await;
        self.tiers.cache.purge();
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
        self.mongo.remove_expired().await
    }
}

impl fmt::Debug for CachedMongoStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CachedMongoStore").field("mongo", &self.mongo).finish_non_exhaustive()
    }
}
