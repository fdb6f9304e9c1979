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
mod lifetime;
mod maintenance;
pub(crate) mod ops;
mod owner_field;
mod schema;
mod server_errors;
mod task_stream;
mod timer;
mod types;

use std::fmt;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use mongodb::Collection;
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::backend::{self, Backend, MergeTurn, NewSession};
use crate::batching::Batcher;
use crate::error::{Error, Result};
use crate::health::Health;
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
pub use crate::mongo::ops::session_limit::OnLimit;
pub use crate::mongo::types::{LiveSession, StoredSession};
use crate::request_scope::changes::{OnConflict, ScopedSave};
use crate::request_scope::{self, ScopedStore};
use crate::runtime::Tasks;
use crate::session::id::{RawId, SessionKey};
use crate::session::revision::{Rev, RevSource};
use crate::session::snapshot::Snapshot;
use crate::session::{Data, Session};
use crate::telemetry::metrics::MongoMetrics;
use crate::telemetry::spans;
use crate::time::WallTime;

/// A session store in a MongoDB collection: a complete store by itself, and the lower tier of
/// [`CachedMongoStore`](crate::CachedMongoStore).
///
/// It is cheap to clone. Clones share connections and background tasks, which end with
/// [`shutdown`](Self::shutdown) or with the last clone.
///
/// # Contract of the verbs
///
/// - `create` takes a random id and ignores the id of the record, so a client cannot choose an id. If the id
///   exists already, it tries another one, up to eight times. It keeps an owner within
///   [`max_sessions_per_owner`](MongoStoreBuilder::max_sessions_per_owner), if that is set.
/// - `save` changes a session that exists and is live. It never creates one, so a slow request cannot bring back
///   a session that was deleted by a log-out. Such a save returns `Ok`, logs a warning and is counted in
///   `session_store_saves_dropped_total`.
/// - `load` returns `None` only if MongoDB has no live session of this id. An outage is an error.
/// - `delete` of a session that does not exist returns `Ok`.
///
/// A session whose stored `expires` is missing or not a date is not live. No store writes such a session.
///
/// - `load` and `save` return the same [`Decode`](crate::ErrorKind::Decode) error, and the save stores nothing.
/// - `contains` and `length` do not count it, and lists leave it out.
/// - `delete` removes it.
/// - One exception: if `expires` is a list of dates, MongoDB compares each of them. Then `length` counts the session,
///   and a list has a `Decode` error in its place.
///
/// Each verb is one round trip under the operation timeout
/// ([5 s by default](MongoStoreBuilder::operation_timeout)). A save needs a second one in two cases: its session
/// has expired, or another save of the same batch was not carried out. In the scope of a
/// [`RequestScopeLayer`](crate::RequestScopeLayer), a save stores only what its request has changed. It needs two
/// more each time that it finds the session changed by another request. Reads go to the primary with read concern
/// `majority`. Writes have the write concern of the connection, or `majority` if the connection has none.
///
/// # Cancel safety
///
/// Every call to the database runs in a task of its own, so dropping the future of a method leaves nothing half
/// done. A write that has begun runs to completion, and the next save of the same session through this store or
/// a clone is sent after it. If the caller of `create` is dropped, a session may remain until it expires whose
/// id nobody knows.
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
    /// Whether the store made the client, and so closes it.
    owns_client: bool,
    /// The most connections that the client opens to one server; `None` if that is unknown.
    pool_size: Option<u32>,
    _stops_background_tasks: DropGuard,
}

/// The operations of single sessions, sent alone or in batches.
pub(crate) type MongoBackend = Batcher<SessionCollection>;

impl ScopedStore for MongoStore {
    async fn insert(
        &self,
        data: &Data,
        expires: WallTime,
        created: Option<WallTime>,
    ) -> Result<(RawId, Option<Snapshot>)> {
        let rev = self.inner.revs.next();
        let id = self.insert_session(rev, data, expires, created).await?;
        let created = created.or_else(|| Some(self.inner.collection.clock.wall()));
        let session = Session { data: data.clone(), expires, rev: Some(rev), created };
        Ok((id, Some(session.into())))
    }

    async fn replace(&self, key: SessionKey, data: &Data, expires: WallTime) -> Result<bool> {
        let replace = self.backend().replace(key, self.inner.revs.next(), data, expires);
        Ok(self.run(replace).await?.is_some())
    }

    async fn merge(
        &self,
        key: SessionKey,
        save: ScopedSave,
    ) -> Result<Option<(Option<Snapshot>, bool)>> {
        let backend = self.backend().clone();
        let turn = backend.acquire_merge(key, save);
        let revs = self.inner.revs.clone();
        let merge = async move {
            match turn.await? {
                MergeTurn::Comes(permit) => backend.merge(permit, key, revs.next()).await.answer(),
                MergeTurn::IsOver(answer) => answer,
            }
        };
        let saved = self.run(merge).await?;
        Ok(saved.map(|saved| (Some(saved.snapshot()), saved.is_merged)))
    }

    async fn touch(&self, key: SessionKey, expires: WallTime) -> Result<bool> {
        let backend = self.backend().clone();
        let permit = backend.acquire_touch(key);
        let touch = async move { backend.touch(permit.await?, key, expires).await };
        Ok(self.run(touch).await?.is_some())
    }

    async fn take(&self, key: SessionKey) -> Result<Option<Session>> {
        self.run(self.backend().take(key)).await
    }

    async fn remove(&self, key: SessionKey) -> Result<()> {
        self.run(self.backend().remove(key)).await
    }

    fn expiry(&self, expires: WallTime) -> WallTime {
        self.backend().expiry(expires)
    }

    fn have_same_owner(&self, one: &Data, other: &Data) -> Result<bool> {
        self.backend().have_same_owner(one, other)
    }

    fn on_conflict(&self) -> Option<OnConflict> {
        self.inner.collection.on_conflict.clone()
    }

    fn record_dropped_save(&self) {
        self.inner.collection.drop_save();
    }
}

impl MongoStore {
    /// Returns a builder, which has every option of the connection and of the collection.
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
    /// Dropping the future closes the connections. The index may have been created.
    pub async fn connect(uri: impl Into<String>) -> Result<Self> {
        Self::builder().uri(uri).build().await
    }

    /// Connects to the URI in the environment variable `MONGODB_URI`.
    ///
    /// # Errors
    ///
    /// [`Config`](crate::ErrorKind::Config) if the variable is not set; otherwise as
    /// [`MongoStoreBuilder::build`].
    ///
    /// # Cancel safety
    ///
    /// As [`connect`](Self::connect).
    pub async fn from_env() -> Result<Self> {
        Self::builder().uri_from_env().build().await
    }

    /// Counts the live sessions. MongoDB counts them through the index on `expires`, so the cost grows with
    /// their number. For a number on every page, use [`estimated_length`](Self::estimated_length).
    ///
    /// Documents of other programs in the same collection do not count: a second command counts them through
    /// the index on `_id`, and the store subtracts them.
    ///
    /// # Errors
    ///
    /// [`Timeout`](crate::ErrorKind::Timeout), [`Connection`](crate::ErrorKind::Connection), or any other error of
    /// the server.
    ///
    /// # Cancel safety
    ///
    /// May be dropped at any time.
    pub async fn length(&self) -> Result<u64> {
        spans::verb!("session_store.length", self.run(self.inner.collection.clone().count()))
    }

    /// Estimates the number of live sessions: the number of documents in the collection's metadata, minus the
    /// expired sessions that have not been removed yet, minus the documents of other programs.
    ///
    /// With the index on `expires`, the cost grows with what is subtracted, not with the live sessions. The
    /// metadata may be wrong after an unclean shutdown of the server, and on a sharded cluster with orphaned
    /// documents.
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

    /// Returns whether a live session has this id.
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

    /// Returns a stream of the live sessions, in no particular order and without their ids.
    ///
    /// The stream holds at most 64 sessions in memory, and reads each batch under the operation timeout. A
    /// session that is created or ended meanwhile may or may not be in it. Documents of other programs are left
    /// out. Dropping the stream ends the query. Holding it does not keep the store open.
    pub fn all(&self) -> LiveSessions {
        self.inner.collection.list(&self.inner.tasks, ListQuery::all())
    }

    /// Removes every session, and returns their number.
    ///
    /// Sessions that are created meanwhile may remain. The collection and its indexes remain, and so do
    /// documents of other programs, whose `_id` is not a binary of 32 bytes. The store works in pages of 1,000
    /// sessions, each under the operation timeout.
    ///
    /// # Errors
    ///
    /// As [`length`](Self::length). Some sessions may have been removed by then.
    ///
    /// # Cancel safety
    ///
    /// Once the call has begun, it runs to completion, even if the future is dropped.
    pub async fn clear(&self) -> Result<u64> {
        let clear = self.inner.tasks.run_paged(self.backend().clear(), |outcome| outcome);
        spans::verb!("session_store.clear", clear)
    }

    /// Returns the collection itself, typed with the stored document, for queries of your own.
    ///
    /// The change stream reports a change that you make here to all caches, with two exceptions: a change of
    /// `expires` and `updated` alone, and a change of `data` and `reencrypted` alone. The store itself makes
    /// the first to prolong a session, and the second to encrypt a session again.
    #[must_use]
    pub fn collection(&self) -> Collection<StoredSession> {
        self.inner.collection.documents.clone_with_type()
    }

    /// Creates the index on `expires` if it is missing, and the index on the owner if the store was built with
    /// [`owner`](MongoStoreBuilder::owner).
    ///
    /// [`build`](MongoStoreBuilder::build) does the same. So does a background task once a minute, in case the
    /// collection or an index was dropped. [`create_indexes(false)`](MongoStoreBuilder::create_indexes) switches
    /// both off.
    ///
    /// # Errors
    ///
    /// [`Index`](crate::ErrorKind::Index) if an index exists with options that do not fit; the message has the
    /// command that mends it. [`Permission`](crate::ErrorKind::Permission) if the user may not create an index.
    ///
    /// # Cancel safety
    ///
    /// The index may be created even if the future is dropped.
    #[doc(alias = "migrate")]
    pub async fn ensure_indexes(&self) -> Result<()> {
        spans::verb!("session_store.ensure_indexes", self.ensure_both_indexes())
    }

    /// Returns a snapshot of the store's state. No I/O, so a probe may call this as often as it likes.
    ///
    /// The state of MongoDB is the outcome of the latest operations. So if nobody uses the store, the
    /// snapshot is as old as its last use.
    #[must_use]
    pub fn health(&self) -> Health {
        Health::new(
            self.inner.tasks.refusal().is_none(),
            self.inner.tasks.availability().responsiveness(),
        )
    }

    /// Ends the background tasks, waits for running operations and closes the connections, unless the app
    /// handed in the client. Call it after the graceful shutdown of the web server.
    ///
    /// If MongoDB does not answer, this takes up to twice the operation timeout. A call of many pages, such as
    /// [`clear`](Self::clear), ends after its current page. Later operations are
    /// [`Closed`](crate::ErrorKind::Closed) errors.
    ///
    /// # Cancel safety
    ///
    /// The store refuses new operations from the first poll on. Call this again to wait for the rest.
    pub async fn shutdown(&self) {
        self.inner.tasks.shutdown().await;
        self.inner.collection.causal.clear();
        if self.inner.owns_client {
            let client = self.inner.collection.documents.client().clone();
            // The driver waits for its monitors, and they may wait for a server that does not answer. So this
            // gets the timeout too.
            self.inner.tasks.finish(client.shutdown().immediate(true).into_future()).await;
        }
    }

    async fn ensure_both_indexes(&self) -> Result<()> {
        let sessions = self.inner.collection.clone();
        let expiry = indexes::expiry::ensure_index(sessions.clone(), self.inner.removal);
        let result = self.run(expiry).await;
        let cost = "expired sessions may stay, and counting them may be slow";
        result
            .map_err(|error| indexes::build_timed_out(&error, "expires"))
            .inspect_err(|error| indexes::warn_of_problem(error, cost))?;
        if sessions.owner.is_none() {
            return Ok(());
        }
        let result = self.run(indexes::owner::ensure_index(sessions)).await;
        let cost = "listing and ending the sessions of an owner may be slow";
        result
            .map_err(|error| indexes::build_timed_out(&error, "owner"))
            .inspect_err(|error| indexes::warn_of_problem(error, cost))
    }

    /// `record_id` is the id in the app's record. The store takes a random one.
    pub(crate) async fn create_session(
        &self,
        record_id: RawId,
        data: &Data,
        expires: WallTime,
    ) -> Result<RawId> {
        if request_scope::is_active() {
            return Box::pin(request_scope::create(self, record_id, data, expires)).await;
        }
        self.insert_session(self.inner.revs.next(), data, expires, None).await
    }

    pub(crate) async fn save_session(
        &self,
        id: RawId,
        data: &Data,
        expires: WallTime,
    ) -> Result<()> {
        if request_scope::is_active() {
            return Box::pin(request_scope::save(self, id, data, expires)).await;
        }
        let replace = self.backend().replace(id.key(), self.inner.revs.next(), data, expires);
        self.run(replace).await.map(drop)
    }

    pub(crate) async fn load_session(&self, id: RawId) -> Result<Option<Session>> {
        let key = id.key();
        let found = self.run(self.backend().find(key)).await?;
        request_scope::record_loaded(key, || found.clone().map(Snapshot::from));
        Ok(found)
    }

    pub(crate) async fn delete_session(&self, id: RawId) -> Result<()> {
        if request_scope::is_active() {
            return Box::pin(request_scope::delete(self, id)).await;
        }
        self.run(self.backend().remove(id.key())).await
    }

    async fn insert_session(
        &self,
        rev: Rev,
        data: &Data,
        expires: WallTime,
        created: Option<WallTime>,
    ) -> Result<RawId> {
        let insert = |id: RawId| {
            let key = id.key();
            let new = NewSession { key, rev, data, expires, created };
            let insert = self.backend().insert(new, backend::nothing_to_evict());
            let backend = self.backend().clone();
            let late = move || backend.discard_late_insert(key);
            self.inner.tasks.run(insert, |outcome| outcome, late)
        };
        Ok(backend::create(insert).await?.0)
    }

    pub(crate) async fn remove_expired(&self) -> Result<()> {
        let remove = self.inner.collection.clone().remove_expired();
        self.inner.tasks.run_paged(remove, |outcome| outcome).await.map(drop)
    }

    /// Opens the stream of invalidations, which ends when `ends` is cancelled. If nothing changes, it returns an
    /// empty batch after `poll_interval`.
    pub(crate) fn invalidation_stream(
        &self,
        poll_interval: Duration,
        ends: CancellationToken,
    ) -> Result<InvalidationStream> {
        if self.inner.pool_size == Some(1) {
            return Err(Error::config(
                "`max_pool_size` is 1, and the change stream of a cached store keeps a connection \
                 for itself: give at least 2, or build the cached store with Coherence::TimeBound",
            ));
        }
        Ok(InvalidationStream::new(self.inner.collection.clone(), poll_interval, ends))
    }

    /// The verbs of single sessions, for the cache in front of this store.
    pub(crate) fn backend(&self) -> &MongoBackend {
        &self.inner.batcher
    }

    /// The collection, for calls that end many sessions.
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
