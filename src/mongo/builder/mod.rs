//! `MongoStoreBuilder`: the options of a [`MongoStore`], and its construction.

mod connection;
mod encryption;

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use serde_json::Value;
use tokio_util::task::AbortOnDropHandle;

use crate::availability::Availability;
use crate::batching::Batcher;
use crate::error::{Error, Result};
use crate::mongo::codec::DataFormat;
use crate::mongo::collection::SessionCollection;
use crate::mongo::connect::Connection;
use crate::mongo::connect::client_state;
use crate::mongo::connect::validate::{limits, runtime, with_concerns};
use crate::mongo::indexes;
use crate::mongo::indexes::expiry;
use crate::mongo::lifetime::AbsoluteLifetime;
use crate::mongo::maintenance::live_count;
use crate::mongo::ops::session_limit::SessionLimit;
use crate::mongo::owner_field::OwnerFn;
use crate::mongo::{ExpiredRemoval, Inner, MongoStore};
use crate::request_scope::changes::OnConflict;
use crate::runtime::Tasks;
use crate::session::revision::RevSource;
use crate::telemetry::metrics::{MongoMetrics, Series};
use crate::time::Clock;

/// The operation timeout when none is given.
const OPERATION_TIMEOUT: Duration = Duration::from_secs(5);

/// The unit in which sessions expire and the server measures time.
pub(crate) const MIN_DURATION: Duration = Duration::from_millis(1);
/// The longest time limit that the server takes: a 32-bit number of milliseconds.
pub(crate) const MAX_DURATION: Duration = Duration::from_millis(i32::MAX as u64);

/// The collection when none is given.
const DEFAULT_COLLECTION: &str = "sessions";

/// Builds a [`MongoStore`]. Setters never fail. [`build`](Self::build) checks all options.
///
/// Give the connection in one of these ways. Default: `127.0.0.1:27017`.
///
/// - a [`uri`](Self::uri)
/// - its parts: [`host`](Self::host), [`port`](Self::port) and so on
/// - an existing [`client`](Self::client), [`database_handle`](Self::database_handle) or
///   [`collection_handle`](Self::collection_handle)
#[derive(Clone, Default)]
#[must_use = "a builder does nothing until it is built"]
pub struct MongoStoreBuilder {
    connection: Connection,
    ttl: Option<Duration>,
    absolute_lifetime: Option<Duration>,
    removal: ExpiredRemoval,
    format: DataFormat,
    pub(crate) owner: Option<OwnerFn>,
    on_conflict: Option<OnConflict>,
    pub(crate) session_limit: Option<SessionLimit>,
    #[cfg(feature = "encryption")]
    keys: Option<crate::mongo::Keys>,
    leave_indexes_alone: bool,
    max_commands_in_flight: Option<u32>,
    max_queued_calls: Option<u32>,
    name: Option<String>,
    count_every: Option<Duration>,
}

impl MongoStoreBuilder {
    /// A fixed lifetime: after each write the session lives for this long, whatever the expiry of the cookie is. At
    /// least 1 ms; fractions of a millisecond are cut off. No session lives past the year 9999. Default: the expiry of
    /// the cookie, which is two weeks if the cookie has none.
    #[doc(alias = "maxAge")]
    #[doc(alias = "max_age")]
    pub fn ttl(mut self, ttl: Duration) -> Self {
        self.ttl = Some(ttl);
        self
    }

    /// The longest time that a session may live, however often it is used: an absolute session timeout. At least
    /// 1 ms. Default: none.
    ///
    /// A session counts from its stored `created`. After that time no store with this option serves or prolongs it.
    /// In a [request scope](crate::RequestScopeLayer), a session that gets a new id by `cycle_id` keeps its
    /// `created`. So a visitor cannot extend the session in that way. A log-in begins a new lifetime if it changes the
    /// owner, and the store knows the [`owner`](Self::owner). If the same user authenticates again, call `flush`
    /// before the log-in. Without a request scope, each `cycle_id` sets a new `created`.
    ///
    /// Give the same limit to all instances. Sessions that were stored without it, or with a longer one, end in time
    /// too. Until their next save, [`length`](crate::MongoStore::length) counts them by their stored expiry. A
    /// session whose `created` is missing or not a date is not live. No store writes such a session.
    ///
    /// `created` comes from the clock of the instance that created the session. The cookie may live longer: the
    /// browser then sends the id of a session that does not exist.
    ///
    /// # Errors
    ///
    /// [`build`](Self::build) returns [`Config`](crate::ErrorKind::Config) for less than 1 ms.
    #[doc(alias = "absolute timeout")]
    pub fn absolute_lifetime(mut self, limit: Duration) -> Self {
        self.absolute_lifetime = Some(limit);
        self
    }

    /// Whether to store data as a document that MongoDB can query. Default no: the store writes JSON text, which is
    /// faster to write and to read. Every store reads both.
    ///
    /// Whole numbers are Int64, or Decimal128 above `i64::MAX`. Other numbers are Double. With the feature
    /// `arbitrary_precision` of `serde_json`, a number is kept to the last character. If none of these types does so,
    /// the number is a Decimal128 (`1.10`, `1e+5`, up to 34 digits), or otherwise a Binary of the subtype 128 with
    /// its text, which a query does not treat as a number.
    pub fn queryable(mut self, queryable: bool) -> Self {
        self.format = if queryable { DataFormat::Native } else { DataFormat::Text };
        self
    }

    /// The function that merges a value that two requests have changed. It takes effect in a
    /// [request scope](crate::RequestScopeLayer). Default: none, and the later save wins.
    ///
    /// A request saves, and another one has changed the same key since this one loaded the session. The function
    /// then gets the key and three values. A value is `None` if that state does not have the key:
    ///
    /// - `base`: the value that this request has loaded, or has saved last,
    /// - `theirs`: the value that is stored now,
    /// - `ours`: the value that this request saves.
    ///
    /// It returns the value to store, or `None` to remove the key. It is called even if `theirs` and `ours` are
    /// equal: two requests that both count from 5 to 6 make 7. It may be called several times for one save, with
    /// newer values of `theirs`, so it must not change anything else. For all keys and values that it does not
    /// expect, it returns `ours.cloned()`.
    ///
    /// ```
    /// # use tower_sessions_moka_mongodb_store::MongoStore;
    /// use serde_json::Value;
    ///
    /// let builder = MongoStore::builder().on_conflict(|key, base, theirs, ours| {
    ///     let count = |value: Option<&Value>| value.map_or(Some(0), Value::as_u64);
    ///     match (key, count(base), count(theirs), count(ours)) {
    ///         // Both have counted: add what this request has counted.
    ///         ("views", Some(base), Some(theirs), Some(ours)) => {
    ///             Some(theirs.saturating_add(ours.saturating_sub(base)).into())
    ///         }
    ///         _ => ours.cloned(),
    ///     }
    /// });
    /// # drop(builder);
    /// ```
    ///
    /// If the function panics, that save fails with [`Panic`](crate::ErrorKind::Panic), and stores nothing.
    pub fn on_conflict<F>(mut self, merge: F) -> Self
    where
        F: Fn(&str, Option<&Value>, Option<&Value>, Option<&Value>) -> Option<Value>
            + Send
            + Sync
            + 'static,
    {
        self.on_conflict = Some(OnConflict(Arc::new(merge)));
        self
    }

    /// The choice of what removes expired sessions. Default [`ExpiredRemoval::TtlIndex`].
    #[doc(alias = "continuously_delete_expired")]
    pub fn expired_removal(mut self, removal: ExpiredRemoval) -> Self {
        self.removal = removal;
        self
    }

    /// Whether [`build`](Self::build) creates missing indexes and checks existing ones. Default yes. If the
    /// collection, the database or an index is dropped while the store runs, a background task then creates the
    /// indexes again within a minute.
    pub fn create_indexes(mut self, create: bool) -> Self {
        self.leave_indexes_alone = !create;
        self
    }

    /// How long an operation may take before it fails with [`Timeout`](crate::ErrorKind::Timeout). 1 ms to
    /// 2,147,483,647 ms (24 days). Default 5 s.
    ///
    /// If the store makes the client, the connect timeout of the client is the same, and its server selection timeout
    /// is nine tenths of it, unless the URI has others. So a server that is down gives a
    /// [`Connection`](crate::ErrorKind::Connection) error.
    pub fn operation_timeout(mut self, timeout: Duration) -> Self {
        self.connection.operation_timeout = Some(timeout);
        self
    }

    /// How many read commands may run on MongoDB at a time, and separately how many save commands. At least 1.
    /// Default 4.
    ///
    /// A call is queued if that many commands run, or if the running commands carry several calls each. The queue is
    /// sent as one command when it has as many calls as a running command carries, when a running command ends, or
    /// after 5 ms. This is several times as fast if the server is busy. If it is not, a call may be up to 5 ms
    /// slower. For a server with many cores or a long round trip, give more.
    pub fn max_commands_in_flight(mut self, commands: u32) -> Self {
        self.max_commands_in_flight = Some(commands);
        self
    }

    /// How many loads may run or be queued at a time, and separately how many saves. Creates and deletes do not
    /// count. At least 1. Default 10,000.
    ///
    /// A call beyond that number fails at once with [`Overloaded`](crate::ErrorKind::Overloaded), and nothing is
    /// sent: calls to a server that hangs must not fill the memory of this process.
    pub fn max_queued_calls(mut self, calls: u32) -> Self {
        self.max_queued_calls = Some(calls);
        self
    }

    /// The name of this store in its metrics: the value of the label `store`. Not empty. Default: none, and the
    /// series have no such label. An app with one store needs no name.
    ///
    /// Stores with the same name, or without one, add up in the same series. Two gauges show the last reported value
    /// instead: the lag and `max_staleness`.
    pub fn name(mut self, name: impl Into<String>) -> Self {
        self.name = Some(name.into());
        self
    }

    /// How often the store counts the live sessions, as [`length`](MongoStore::length) does, for the metric
    /// `session_store_live_sessions`. More than zero. Default: never.
    ///
    /// Each instance of the app counts, and the cost for MongoDB grows with the number of sessions. A minute is often
    /// enough for a graph. If a count fails, the metric keeps its value.
    pub fn count_every(mut self, interval: Duration) -> Self {
        self.count_every = Some(interval);
        self
    }

    /// Connects, creates the index on `expires` if it is missing, and checks that the server is new enough
    /// (MongoDB 4.4.2) and that this user may read and write. The check writes nothing: it sends a save for a key
    /// that no session has.
    ///
    /// # Errors
    ///
    /// Each error says what to change, and none has the password in it.
    ///
    /// | kind | cause |
    /// |---|---|
    /// | [`Config`](crate::ErrorKind::Config) | an option is malformed, two options contradict each other, or the call is outside of a tokio runtime with time and I/O enabled |
    /// | [`Connection`](crate::ErrorKind::Connection), [`Authentication`](crate::ErrorKind::Authentication), [`Timeout`](crate::ErrorKind::Timeout) | the server cannot be used |
    /// | [`Permission`](crate::ErrorKind::Permission) | the user may not read, write or create an index |
    /// | [`Server`](crate::ErrorKind::Server) | the server is too old |
    /// | [`Index`](crate::ErrorKind::Index) | as [`MongoStore::ensure_indexes`] |
    ///
    /// # Cancel safety
    ///
    /// The future may be dropped. The index may have been created.
    pub async fn build(self) -> Result<MongoStore> {
        let runtime = runtime().await?;
        if self.ttl.is_some_and(|ttl| ttl < MIN_DURATION) {
            return Err(Error::config("`ttl` must be at least 1 ms"));
        }
        if self.absolute_lifetime.is_some_and(|limit| limit < MIN_DURATION) {
            return Err(Error::config("`absolute_lifetime` must be at least 1 ms"));
        }
        if let ExpiredRemoval::Sweep(every) = self.removal
            && every.is_zero()
        {
            return Err(Error::config(
                "ExpiredRemoval::Sweep needs an interval above zero; for none at all take \
                 ExpiredRemoval::Off",
            ));
        }
        if self.count_every.is_some_and(|every| every.is_zero()) {
            return Err(Error::config(
                "`count_every` needs an interval above zero; leave it out to count nothing",
            ));
        }
        if let Some(limit) = self.session_limit {
            limit.check(self.owner.is_some())?;
        }
        let series = series(self.name.as_deref())?;
        let timeout = self.connection.operation_timeout.unwrap_or(OPERATION_TIMEOUT);
        if !(MIN_DURATION..=MAX_DURATION).contains(&timeout) {
            return Err(Error::config(
                "`operation_timeout` must be at least 1 ms and at most 2,147,483,647 ms",
            ));
        }
        let limits = limits(self.max_commands_in_flight, self.max_queued_calls)?;
        let format = self.data_format()?;
        let connection = self.connection;
        let connects = async move { connection.collection(DEFAULT_COLLECTION, timeout).await };
        // The connection is made in a task on this runtime, because another executor may poll the call after its
        // first step. The task ends if the call is dropped.
        let connects = AbortOnDropHandle::new(runtime.spawn(connects));
        let (documents, own_pool) = connects.await.unwrap_or_else(|_| Err(Error::cut_off()))?;
        let owns_client = own_pool.is_some();
        let pool_size = own_pool.or_else(|| client_state::pool_size(documents.client()));
        let tasks = Tasks::new(runtime, timeout, Availability::new(Clock::system()));
        client_state::watch_client(documents.client().clone(), !owns_client, &tasks);
        let stops_background_tasks = tasks.closed().clone().drop_guard();
        let sessions = SessionCollection {
            documents: with_concerns(&documents)?,
            timeout,
            ttl: self.ttl,
            lifetime: AbsoluteLifetime(self.absolute_lifetime),
            format,
            owner: self.owner,
            on_conflict: self.on_conflict,
            session_limit: self.session_limit,
            clock: Clock::system(),
            metrics: Arc::new(MongoMetrics::new(series)),
            causal: crate::mongo::causal::CausalSessions::new(owns_client),
            tasks: tasks.clone(),
            closed: tasks.closed().clone(),
        };
        let store = MongoStore {
            inner: Arc::new(Inner {
                batcher: Batcher::new(sessions.clone(), &tasks, limits, fastrand::Rng::new()),
                collection: sessions.clone(),
                tasks,
                revs: RevSource::new(),
                removal: self.removal,
                owns_client,
                pool_size,
                _stops_background_tasks: stops_background_tasks,
            }),
        };
        if self.leave_indexes_alone {
            store.run(sessions.clone().probe()).await?;
        } else {
            store.ensure_indexes().await?;
            store.run(sessions.clone().probe()).await?;
            indexes::start(&sessions, self.removal, &store.inner.tasks);
        }
        if let Some(every) = self.count_every {
            live_count::count_periodically(sessions.clone(), every, &store.inner.tasks);
        }
        if let ExpiredRemoval::Sweep(every) = self.removal {
            expiry::sweep(sessions, every, &store.inner.tasks);
        }
        Ok(store)
    }
}

impl fmt::Debug for MongoStoreBuilder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MongoStoreBuilder")
            .field("ttl", &self.ttl)
            .field("absolute_lifetime", &self.absolute_lifetime)
            .field("expired_removal", &self.removal)
            .finish_non_exhaustive()
    }
}

/// The labels of the series of a store with this name.
pub(crate) fn series(name: Option<&str>) -> Result<Series> {
    if name == Some("") {
        return Err(Error::config("`name` is empty: leave it out, or give the store a name"));
    }
    Ok(Series::of(name))
}
