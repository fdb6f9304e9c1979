//! Every option of the persistence tier.

mod connection;
mod encryption;

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

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
use crate::mongo::maintenance::live_count;
use crate::mongo::owner_field::OwnerFn;
use crate::mongo::{ExpiredRemoval, Inner, MongoStore};
use crate::runtime::Tasks;
use crate::session::revision::RevSource;
use crate::telemetry::metrics::{MongoMetrics, Series};
use crate::time::Clock;

/// The operation timeout when none is given.
const OPERATION_TIMEOUT: Duration = Duration::from_secs(5);

/// Sessions expire, and the server measures time, in whole milliseconds.
pub(crate) const MIN_DURATION: Duration = Duration::from_millis(1);
/// The server takes its time limits as 32-bit numbers of milliseconds.
pub(crate) const MAX_DURATION: Duration = Duration::from_millis(i32::MAX as u64);

/// The collection when none is given.
const DEFAULT_COLLECTION: &str = "sessions";

/// Builds a [`MongoStore`]. Setters never fail; [`build`](Self::build) checks everything at once.
///
/// Give the connection as one of: a [`uri`](Self::uri), its parts ([`host`](Self::host),
/// [`port`](Self::port), …), an existing [`client`](Self::client),
/// [`database_handle`](Self::database_handle) or [`collection_handle`](Self::collection_handle).
/// With none of them it is `127.0.0.1:27017`.
#[derive(Clone, Default)]
#[must_use = "a builder does nothing until it is built"]
pub struct MongoStoreBuilder {
    connection: Connection,
    ttl: Option<Duration>,
    removal: ExpiredRemoval,
    form: DataFormat,
    pub(crate) owner: Option<OwnerFn>,
    #[cfg(feature = "encryption")]
    keys: Option<crate::mongo::Keys>,
    leave_indexes_alone: bool,
    max_in_flight: Option<u32>,
    max_waiting: Option<u32>,
    name: Option<String>,
    count_every: Option<Duration>,
}

impl MongoStoreBuilder {
    /// A fixed lifetime: each write lets the session live for so long, whatever the cookie's expiry
    /// is. At least 1 ms, and cut to whole milliseconds; no session lives past the year 9999.
    /// Default: the cookie's expiry, which is two weeks when it has none.
    pub fn ttl(mut self, ttl: Duration) -> Self {
        self.ttl = Some(ttl);
        self
    }

    /// Whether data is stored as a document that MongoDB can query, and not as JSON text. Default no:
    /// a text is faster to write and to read. Both are read in any case.
    ///
    /// Whole numbers are Int64, or Decimal128 above `i64::MAX`; other numbers are Double. With the feature
    /// `arbitrary_precision` of `serde_json`, a number that none of these gives back to the last character
    /// is a Decimal128 (`1.10`, `1e+5`, up to 34 digits), or else a Binary of the subtype 128 that holds its
    /// text. Such a Binary is no number to a query.
    pub fn queryable(mut self, queryable: bool) -> Self {
        self.form = if queryable { DataFormat::Native } else { DataFormat::Text };
        self
    }

    /// Who removes expired sessions. Default [`ExpiredRemoval::TtlIndex`].
    pub fn expired_removal(mut self, removal: ExpiredRemoval) -> Self {
        self.removal = removal;
        self
    }

    /// Whether [`build`](Self::build) creates the indexes that are missing, and checks those that are
    /// there. Default yes: then they are also created again, within a minute, if the collection, the
    /// database or an index is dropped while the store runs.
    pub fn create_indexes(mut self, create: bool) -> Self {
        self.leave_indexes_alone = !create;
        self
    }

    /// How long any operation may take before it fails with
    /// [`Timeout`](crate::ErrorKind::Timeout). 1 ms to 2,147,483,647 ms (24 days); default 5 s.
    ///
    /// A client that is made here has its connect timeout set to the same and its server selection
    /// timeout to nine tenths of it, unless the URI gives them: so a server that is down is a
    /// [`Connection`](crate::ErrorKind::Connection) error.
    pub fn operation_timeout(mut self, timeout: Duration) -> Self {
        self.connection.operation_timeout = Some(timeout);
        self
    }

    /// How many reads are sent to MongoDB side by side, and apart from them how many saves. At
    /// least 1; default 4. What comes while so many are under way, or larger ones, leaves together with
    /// others, as one command, once as many wait, or one of them has ended, or 5 ms have passed: that is several times as fast
    /// where the server has enough to do, and up to so much later where it has not. A server
    /// with many cores, or far away, takes more.
    pub fn max_commands_in_flight(mut self, commands: u32) -> Self {
        self.max_in_flight = Some(commands);
        self
    }

    /// How many loads may be under way or wait for MongoDB at a time, and apart from them how many
    /// saves; creates and deletes do not count. At least 1; default 10,000. What comes beyond that is an [`Overloaded`](crate::ErrorKind::Overloaded)
    /// error at once, with nothing sent: a server that stands still must not fill this process's
    /// memory with calls.
    pub fn max_queued_calls(mut self, calls: u32) -> Self {
        self.max_waiting = Some(calls);
        self
    }

    /// The name of this store in its metrics, whose series carry it as the label `store`. Not empty.
    /// Default: none, and no such label, which is enough for an app that has one store.
    ///
    /// Stores of the same name, or without one, add up in the same series, but for the lag and
    /// `max_staleness`, of which the one told last is seen.
    pub fn name(mut self, name: impl Into<String>) -> Self {
        self.name = Some(name.into());
        self
    }

    /// How often the live sessions are counted, as [`length`](MongoStore::length) does, for the metric
    /// `session_store_live_sessions`. More than zero. Default: never.
    ///
    /// Each instance of the app counts, and what a count costs MongoDB grows with the number of
    /// sessions: a minute is often enough for a graph. A count that fails leaves the figure as it was.
    pub fn count_every(mut self, interval: Duration) -> Self {
        self.count_every = Some(interval);
        self
    }

    /// Connects, creates the expiry index if it is missing, and checks that the server is new enough
    /// (MongoDB 4.4.2) and that this user may read and write. The check writes nothing: it asks for a
    /// save of a session that nobody has.
    ///
    /// # Errors
    ///
    /// [`Config`](crate::ErrorKind::Config) for options that are malformed or contradict each
    /// other, or outside of a tokio runtime with time and I/O enabled;
    /// [`Connection`](crate::ErrorKind::Connection),
    /// [`Authentication`](crate::ErrorKind::Authentication) or
    /// [`Timeout`](crate::ErrorKind::Timeout) if the server cannot be used;
    /// [`Permission`](crate::ErrorKind::Permission) for a user who may not read and write;
    /// [`Server`](crate::ErrorKind::Server) for a server that is too old;
    /// [`Index`](crate::ErrorKind::Index) and [`Permission`](crate::ErrorKind::Permission) as
    /// [`MongoStore::ensure_indexes`]. Each says what to change, and none holds the password.
    ///
    /// # Cancel safety
    ///
    /// May be dropped; the index may have been created.
    pub async fn build(self) -> Result<MongoStore> {
        let runtime = runtime().await?;
        if self.ttl.is_some_and(|ttl| ttl < MIN_DURATION) {
            return Err(Error::config("`ttl` must be at least 1 ms"));
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
        let series = series(self.name.as_deref())?;
        let timeout = self.connection.operation_timeout.unwrap_or(OPERATION_TIMEOUT);
        if !(MIN_DURATION..=MAX_DURATION).contains(&timeout) {
            return Err(Error::config(
                "`operation_timeout` must be at least 1 ms and at most 2,147,483,647 ms",
            ));
        }
        let limits = limits(self.max_in_flight, self.max_waiting)?;
        let form = self.form()?;
        let connection = self.connection;
        let connects = async move { connection.collection(DEFAULT_COLLECTION, timeout).await };
        // In a task: this may be polled elsewhere after its first step. It ends if the call is dropped.
        let connects = AbortOnDropHandle::new(runtime.spawn(connects));
        let (documents, own_pool) = connects.await.unwrap_or_else(|_| Err(Error::cut_off()))?;
        let owns_client = own_pool.is_some();
        let pool_size = own_pool.or_else(|| client_state::pool_size(documents.client()));
        let tasks = Tasks::new(runtime, timeout, Availability::new(Clock::system()));
        client_state::watch_client(documents.client().clone(), !owns_client, &tasks);
        let ends_with_the_store = tasks.closed().clone().drop_guard();
        let sessions = SessionCollection {
            documents: with_concerns(&documents)?,
            timeout,
            ttl: self.ttl,
            format: form,
            owner: self.owner,
            clock: Clock::system(),
            metrics: Arc::new(MongoMetrics::new(series)),
            causal: crate::mongo::causal::CausalSessions::new(owns_client),
            tasks: tasks.clone(),
            closed: tasks.closed().clone(),
        };
        let store = MongoStore {
            inner: Arc::new(Inner {
                batcher: Batcher::new(sessions.clone(), &tasks, limits),
                collection: sessions.clone(),
                tasks,
                revs: RevSource::new(),
                removal: self.removal,
                owns_client,
                pool_size,
                _stops_background_tasks: ends_with_the_store,
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
            .field("expired_removal", &self.removal)
            .finish_non_exhaustive()
    }
}

/// How the series of a store of this name are labelled.
pub(crate) fn series(name: Option<&str>) -> Result<Series> {
    if name == Some("") {
        return Err(Error::config("`name` is empty: leave it out, or give the store a name"));
    }
    Ok(Series::of(name))
}
