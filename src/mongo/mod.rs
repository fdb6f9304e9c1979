//! The persistence tier: sessions in a MongoDB collection.

mod builder;
mod causal;
pub(crate) mod change_stream;
pub(crate) mod codec;
mod collection;
mod connect;
mod error;
mod filter;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzzing;
mod indexes;
mod maintenance;
pub(crate) mod ops;
mod owner_field;
mod schema;
mod server_errors;
mod timer;
mod types;

use std::fmt;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use mongodb::Collection;
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::batching::Batcher;
use crate::error::{Error, Result};
pub use crate::mongo::builder::MongoStoreBuilder;
pub(crate) use crate::mongo::builder::series;
use crate::mongo::change_stream::invalidations::InvalidationStream;
#[cfg(feature = "encryption")]
pub use crate::mongo::codec::{Key, Keys};
use crate::mongo::collection::SessionCollection;
pub use crate::mongo::indexes::expiry::ExpiredRemoval;
#[cfg(feature = "encryption")]
pub use crate::mongo::maintenance::reencrypt::{Reencrypted, Reencryption};
pub(crate) use crate::mongo::ops::delete::DeleteSelection;
use crate::mongo::ops::list::ListQuery;
pub use crate::mongo::ops::list::LiveSessions;
pub use crate::mongo::ops::query::{data_equals, data_path, owner_equals};
pub use crate::mongo::types::{LiveSession, StoredSession};
use crate::runtime::Tasks;
use crate::session::id::RawId;
use crate::session::id::SessionKey;
use crate::session::revision::RevSource;
use crate::session::{Data, Session};
use crate::store::backend::{Backend, MAX_ID_ATTEMPTS, no_free_id};
use crate::store::health::Health;
use crate::telemetry::metrics::MongoMetrics;
use crate::telemetry::spans;
use crate::time::WallTime;

/// Sessions in a MongoDB collection: a complete store by itself, and the lower tier of
/// [`CachedMongoStore`](crate::CachedMongoStore).
///
/// Cheap to clone; clones share connections and background tasks, which end with
/// [`shutdown`](Self::shutdown) or with the last clone.
///
/// # What its verbs do
///
/// - `create` draws a fresh id, whatever id the record has: no client chooses an id. A collision
///   draws again, eight times at most.
/// - `save` changes a session that exists and is live, and never creates one: a log-out that
///   overtakes a slow request stays a log-out. Such a save is `Ok`, is logged as a warning and
///   counted in `session_store_saves_dropped_total`.
/// - `load` answers `None` only when the database says so; an outage is an error.
/// - `delete` of a session that is not there is `Ok`.
/// - A session whose stored `expires` is missing or not a date is not live: no store writes that. Its `load` and
///   its `save` are the same [`Decode`](crate::ErrorKind::Decode) error, and the save stores nothing. `contains`
///   and `length` do not count it, and lists leave it out. `delete` removes it. (MongoDB finds a list of dates by the
///   dates in it, so `length` counts that session, and in a list it is a `Decode` error in its place.)
///
/// Each is one round trip under the operation timeout
/// ([5 s by default](MongoStoreBuilder::operation_timeout)). A second one looks at what is stored if a save
/// found that its session has expired, and if one of the saves that left together was not carried out. Reads go to the primary with read concern
/// `majority`; writes have the write concern that the connection gives, `majority` if it gives none.
///
/// # Cancel safety
///
/// Every call to the database runs in a task of its own. Dropping the future of any method leaves
/// nothing half done: a write that was begun is carried out, and the next save of the same session
/// through this store or a clone of it is sent after it, not before. A `create` whose caller has
/// gone may leave a session that nobody has the id of, until it expires.
#[derive(Clone)]
pub struct MongoStore {
    inner: Arc<Inner>,
}

struct Inner {
    collection: SessionCollection,
    batcher: MongoBackend,
    tasks: Tasks,
    revs: RevSource,
    removal: ExpiredRemoval,
    /// Whether the client was made here and is to be closed here.
    owns_client: bool,
    /// How many connections the client may have to a server, if that is known.
    pool_size: Option<u32>,
    _stops_background_tasks: DropGuard,
}

/// The operations on the collection, sent as they are best sent.
pub(crate) type MongoBackend = Batcher<SessionCollection>;

impl MongoStore {
    /// A builder with every option of the connection and of expiry.
    pub fn builder() -> MongoStoreBuilder {
        MongoStoreBuilder::default()
    }

    /// Connects to `uri` with the defaults of [`builder`](Self::builder).
    ///
    /// # Errors
    ///
    /// As [`MongoStoreBuilder::build`].
    ///
    /// # Cancel safety
    ///
    /// A dropped call leaves no connection behind; the index may have been created.
    pub async fn connect(uri: impl Into<String>) -> Result<Self> {
        Self::builder().uri(uri).build().await
    }

    /// Connects to the URI in the environment variable `MONGODB_URI`.
    ///
    /// # Errors
    ///
    /// [`Config`](crate::ErrorKind::Config) if it is not set, otherwise as
    /// [`MongoStoreBuilder::build`].
    ///
    /// # Cancel safety
    ///
    /// As [`connect`](Self::connect).
    pub async fn from_env() -> Result<Self> {
        Self::builder().uri_from_env().build().await
    }

    /// How many live sessions there are, counted by MongoDB through the index on `expires`. The
    /// cost grows with the number; for a figure on every page see
    /// [`estimated_length`](Self::estimated_length).
    ///
    /// Documents of other programs in the same collection are not counted: a second command counts them
    /// through the index on `_id`, and they are subtracted.
    ///
    /// # Errors
    ///
    /// [`Timeout`](crate::ErrorKind::Timeout), [`Connection`](crate::ErrorKind::Connection) and
    /// what else the server answers.
    ///
    /// # Cancel safety
    ///
    /// May be dropped at any time.
    pub async fn length(&self) -> Result<u64> {
        spans::verb!("session_store.length", self.run(self.inner.collection.clone().count()))
    }

    /// About how many live sessions there are: the number in the collection's metadata less the
    /// expired ones that have not been removed yet, and less the documents of other programs. Given
    /// the index on `expires`, its cost grows with those two, and not with the live sessions. After an
    /// unclean shutdown of the server, and on a sharded cluster with orphaned documents, the metadata
    /// may be off.
    ///
    /// # Errors
    ///
    /// As [`length`](Self::length).
    ///
    /// # Cancel safety
    ///
    /// May be dropped at any time.
    pub async fn estimated_length(&self) -> Result<u64> {
        let estimate = self.run(self.inner.collection.clone().estimate());
        spans::verb!("session_store.estimated_length", estimate)
    }

    /// Whether a live session has this id.
    ///
    /// # Errors
    ///
    /// As [`length`](Self::length).
    ///
    /// # Cancel safety
    ///
    /// May be dropped at any time.
    pub async fn contains(&self, id: impl Into<SessionKey> + Send) -> Result<bool> {
        let contains = self.run(self.inner.collection.clone().contains(id.into()));
        spans::verb!("session_store.contains", contains)
    }

    /// A stream of the live sessions, in no particular order and without their ids. Holds 64
    /// sessions at most in memory; each batch is read under the operation timeout. Sessions that
    /// are created or ended meanwhile may be in it or not. Documents of other programs are left out.
    ///
    /// Dropping the stream ends the query. Holding it does not keep the store open.
    pub fn all(&self) -> LiveSessions {
        self.inner.collection.list(&self.inner.tasks, ListQuery::all())
    }

    /// Removes every session and answers with how many those were. Those that are created
    /// meanwhile may stay. Indexes stay, as does the collection itself, and so does a document that
    /// another program keeps there under an `_id` that is no binary of 32 bytes.
    ///
    /// Works in pages of 1,000 sessions, each under the operation timeout.
    ///
    /// # Errors
    ///
    /// As [`length`](Self::length); some sessions may have been removed by then.
    ///
    /// # Cancel safety
    ///
    /// Once begun it goes on to its end though the future is dropped.
    pub async fn clear(&self) -> Result<u64> {
        let clear = self.inner.tasks.run_paged(self.backend().clear(), |outcome| outcome);
        spans::verb!("session_store.clear", clear)
    }

    /// The collection itself, typed with what is stored, for queries of your own. Caches hear of any
    /// change that is made to it, but for one that touches `expires` and `updated` alone, which is how
    /// a session is prolonged, or `data` and `reencrypted` alone, which is how it is encrypted anew.
    #[must_use]
    pub fn collection(&self) -> Collection<StoredSession> {
        self.inner.collection.documents.clone_with_type()
    }

    /// Creates the expiry index if it is missing, and where [`owner`](MongoStoreBuilder::owner) is
    /// given the one on the owner. [`build`](MongoStoreBuilder::build) does so unless
    /// [told otherwise](MongoStoreBuilder::create_indexes), and so does a background task once a minute,
    /// which looks whether the collection or an index was dropped.
    ///
    /// # Errors
    ///
    /// [`Index`](crate::ErrorKind::Index) if one of them stands with other options, with
    /// the command that mends it; [`Permission`](crate::ErrorKind::Permission) if the user may not
    /// create it.
    ///
    /// # Cancel safety
    ///
    /// The index may be created though the future is dropped.
    pub async fn ensure_indexes(&self) -> Result<()> {
        let sessions = self.inner.collection.clone();
        let ensured = async {
            let expiry = indexes::expiry::ensure_index(sessions.clone(), self.inner.removal);
            let ensured = self
                .run(expiry)
                .await
                .map_err(|it| indexes::expiry::build_timed_out(&it, "expires"));
            let cost = "expired sessions may stay, and counting them may be slow";
            ensured.inspect_err(|error| spans::warn_index_problem(error, cost))?;
            if sessions.owner.is_none() {
                return Ok(());
            }
            let owner = indexes::owner::ensure_index(sessions);
            let ensured =
                self.run(owner).await.map_err(|it| indexes::expiry::build_timed_out(&it, "owner"));
            let cost = "listing and ending the sessions of an owner may be slow";
            ensured.inspect_err(|error| spans::warn_index_problem(error, cost))
        };
        spans::verb!("session_store.ensure_indexes", ensured)
    }

    /// How the store is, as far as it knows without asking: no I/O, so for any probe, however often.
    ///
    /// MongoDB is known by the operations that were sent anyway: a store that nobody uses knows as
    /// much as when it was last used.
    #[must_use]
    pub fn health(&self) -> Health {
        Health::new(
            self.inner.tasks.refusal().is_none(),
            self.inner.tasks.availability().responsiveness(),
        )
    }

    /// Ends the background tasks, waits for the operations under way and closes the connections,
    /// unless the client was handed in. Takes up to twice the operation timeout if the server does
    /// not answer; a call of many pages, such as [`clear`](Self::clear), ends after its present one. Operations after it are
    /// [`Closed`](crate::ErrorKind::Closed) errors. Call it after the server's graceful shutdown.
    ///
    /// # Cancel safety
    ///
    /// New operations are refused from the first poll on; call it again to wait for the rest.
    pub async fn shutdown(&self) {
        self.inner.tasks.shutdown().await;
        self.inner.collection.causal.clear();
        if self.inner.owns_client {
            let client = self.inner.collection.documents.client().clone();
            // The driver waits for its monitors, which wait for a server that may not answer; so this
            // has the timeout for its bound.
            self.inner.tasks.finish(client.shutdown().immediate(true).into_future()).await;
        }
    }

    pub(crate) async fn create_session(&self, data: &Data, expires: WallTime) -> Result<RawId> {
        for _ in 0..MAX_ID_ATTEMPTS {
            let id = RawId::random();
            let insert = self.backend().insert(id.key(), self.inner.revs.next(), data, expires);
            if self.run(insert).await?.is_some() {
                return Ok(id);
            }
        }
        Err(no_free_id())
    }

    pub(crate) async fn save_session(
        &self,
        id: RawId,
        data: &Data,
        expires: WallTime,
    ) -> Result<()> {
        let replace = self.backend().replace(id.key(), self.inner.revs.next(), data, expires);
        self.run(replace).await.map(drop)
    }

    pub(crate) async fn load_session(&self, id: RawId) -> Result<Option<Session>> {
        self.run(self.backend().find(id.key())).await
    }

    pub(crate) async fn delete_session(&self, id: RawId) -> Result<()> {
        self.run(self.backend().remove(id.key())).await
    }

    pub(crate) async fn remove_expired(&self) -> Result<()> {
        let expire = self.inner.collection.clone().remove_expired();
        self.inner.tasks.run_paged(expire, |outcome| outcome).await.map(drop)
    }

    /// The changes of the collection, until `ends` is cancelled; an empty batch comes after `pace`.
    pub(crate) fn invalidation_stream(
        &self,
        pace: Duration,
        ends: CancellationToken,
    ) -> Result<InvalidationStream> {
        if self.inner.pool_size == Some(1) {
            return Err(Error::config(
                "`max_pool_size` is 1, and the change stream of a cached store keeps a connection \
                 for itself: give at least 2, or build the cached store with change_stream(false)",
            ));
        }
        Ok(InvalidationStream::new(self.inner.collection.clone(), pace, ends))
    }

    /// What a cache in front of this asks.
    pub(crate) fn backend(&self) -> &MongoBackend {
        &self.inner.batcher
    }

    /// The collection, for what ends many sessions at a time.
    pub(crate) fn session_collection(&self) -> &SessionCollection {
        &self.inner.collection
    }

    pub(crate) fn tasks(&self) -> &Tasks {
        &self.inner.tasks
    }

    pub(crate) fn metrics(&self) -> &MongoMetrics {
        &self.inner.collection.metrics
    }

    async fn run<T: Send + 'static>(
        &self,
        call: impl Future<Output = Result<T>> + Send + 'static,
    ) -> Result<T> {
        self.inner.tasks.run(call, |outcome| outcome, || ()).await
    }
}

impl fmt::Debug for MongoStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MongoStore")
            .field("namespace", &self.inner.collection.documents.namespace().to_string())
            .finish_non_exhaustive()
    }
}
