//! Every option of the persistence tier.

mod connecting;

use std::fmt;
use std::net::Ipv4Addr;
use std::sync::Arc;
use std::time::Duration;

use bson::{Document, doc};
use mongodb::Collection;
use mongodb::options::{
    Acknowledgment, CollectionOptions, ReadConcern, SelectionCriteria, WriteConcern,
};
use tokio::runtime::Handle;

use super::codec::Form;
use super::connection::Connection;
use super::{ExpiredRemoval, Inner, MongoStore, Sessions, expiry};
use crate::backend::RevSource;
use crate::clock::Clock;
use crate::dispatch::{Dispatch, Limits};
use crate::error::{Error, Result};
use crate::metrics::{MongoMetrics, Outcome, Verb};
use crate::tasks::Tasks;

/// The operation timeout when none is given.
const OPERATION_TIMEOUT: Duration = Duration::from_secs(5);
/// How many reads, and how many saves, are sent side by side when no number is given.
const IN_FLIGHT: u32 = 4;
/// How many loads, and how many saves, may wait when no number is given.
const WAITING: u32 = 10_000;

/// Sessions expire, and the server measures time, in whole milliseconds.
const SHORTEST: Duration = Duration::from_millis(1);
/// The server takes its time limits as 32-bit numbers of milliseconds.
const LONGEST: Duration = Duration::from_millis(i32::MAX as u64);

/// The collection when none is given.
const COLLECTION: &str = "sessions";

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
    form: Form,
    leave_indexes_alone: bool,
    max_in_flight: Option<u32>,
    max_waiting: Option<u32>,
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
    pub fn queryable(mut self, queryable: bool) -> Self {
        self.form = if queryable { Form::Native } else { Form::Text };
        self
    }

    /// Who removes expired sessions. Default [`ExpiredRemoval::TtlIndex`].
    pub fn expired_removal(mut self, removal: ExpiredRemoval) -> Self {
        self.removal = removal;
        self
    }

    /// Whether [`build`](Self::build) creates the index that is missing, and checks the one that is
    /// there. Default yes.
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
    /// least 1; default 4. What comes while so many are under way leaves together with others,
    /// as one command, once one of them has ended or 5 ms have passed: that is several times as fast
    /// where the server has enough to do, and up to so much later where it has not. A server
    /// with many cores, or far away, takes more.
    pub fn max_in_flight(mut self, commands: u32) -> Self {
        self.max_in_flight = Some(commands);
        self
    }

    /// How many loads may wait for MongoDB at a time, and apart from them how many saves. At least 1;
    /// default 10,000. What comes beyond that is an [`Overloaded`](crate::ErrorKind::Overloaded)
    /// error at once, with nothing sent: a server that stands still must not fill this process's
    /// memory with calls.
    pub fn max_waiting(mut self, calls: u32) -> Self {
        self.max_waiting = Some(calls);
        self
    }

    /// Connects, looks whether the server answers, and creates the expiry index if it is missing.
    ///
    /// # Errors
    ///
    /// [`Config`](crate::ErrorKind::Config) for options that are malformed or contradict each
    /// other, or outside of a tokio runtime with time and I/O enabled;
    /// [`Connection`](crate::ErrorKind::Connection),
    /// [`Authentication`](crate::ErrorKind::Authentication) or
    /// [`Timeout`](crate::ErrorKind::Timeout) if the server cannot be used;
    /// [`Index`](crate::ErrorKind::Index) and [`Permission`](crate::ErrorKind::Permission) as
    /// [`MongoStore::ensure_indexes`]. Each says what to change, and none holds the password.
    ///
    /// # Cancel safety
    ///
    /// May be dropped; the index may have been created.
    pub async fn build(self) -> Result<MongoStore> {
        let runtime = runtime().await?;
        if self.ttl.is_some_and(|ttl| ttl < SHORTEST) {
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
        let timeout = self.connection.operation_timeout.unwrap_or(OPERATION_TIMEOUT);
        if !(SHORTEST..=LONGEST).contains(&timeout) {
            return Err(Error::config(
                "`operation_timeout` must be at least 1 ms and at most 2,147,483,647 ms",
            ));
        }
        let limits = limits(self.max_in_flight, self.max_waiting)?;
        let (documents, own_pool) = self.connection.collection(COLLECTION, timeout).await?;
        let tasks = Tasks::new(runtime, timeout);
        let ends_with_the_store = tasks.closed().clone().drop_guard();
        let sessions = Sessions {
            documents: with_concerns(&documents)?,
            timeout,
            ttl: self.ttl,
            form: self.form,
            clock: Clock::system(),
            metrics: Arc::new(MongoMetrics::new()),
            seen: super::seen::Seen::default(),
            closed: tasks.closed().clone(),
        };
        let store = MongoStore {
            inner: Arc::new(Inner {
                dispatch: Dispatch::new(sessions.clone(), &tasks, limits),
                sessions: sessions.clone(),
                tasks,
                revs: RevSource::new(),
                removal: self.removal,
                own_pool,
                _ends_background_tasks: ends_with_the_store,
            }),
        };
        if self.leave_indexes_alone {
            store.run(ping(sessions.clone())).await?;
        } else {
            store.ensure_indexes().await?;
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

fn limits(in_flight: Option<u32>, waiting: Option<u32>) -> Result<Limits> {
    let (in_flight, waiting) = (in_flight.unwrap_or(IN_FLIGHT), waiting.unwrap_or(WAITING));
    for (option, value) in [("max_in_flight", in_flight), ("max_waiting", waiting)] {
        if value == 0 {
            return Err(Error::config(format!(
                "`{option}` is zero, which lets no call through: give at least 1"
            )));
        }
    }
    let number = |value| usize::try_from(value).unwrap_or(usize::MAX);
    Ok(Limits::of(number(in_flight), number(waiting)))
}

/// The runtime that calls will run on, once it has shown that it has what the driver needs. One
/// without a timer or without I/O panics at their first use, so that happens in a task.
async fn runtime() -> Result<Handle> {
    let runtime = Handle::try_current().map_err(|_| {
        Error::config(
            "a session store is built inside of a tokio runtime: call build().await from \
             #[tokio::main], or enter a runtime first",
        )
    })?;
    let probe = runtime.spawn(async {
        tokio::time::sleep(Duration::ZERO).await;
        // Whether there is a socket to be had does not matter here.
        drop(tokio::net::UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await);
    });
    match probe.await {
        Ok(()) => Ok(runtime),
        Err(error) if error.is_panic() => Err(Error::config(
            "the tokio runtime has no timer or no I/O, and a session store needs both: call \
             enable_all() on the tokio::runtime::Builder",
        )),
        Err(_) => Err(Error::closed()),
    }
}

/// Reads must not go back behind what was acknowledged, and writes must be acknowledged.
pub(super) fn with_concerns(documents: &Collection<Document>) -> Result<Collection<Document>> {
    let majority = || WriteConcern::builder().w(Acknowledgment::Majority).build();
    let mut writes = documents.write_concern().cloned().unwrap_or_else(majority);
    if writes.w.is_none() {
        writes.w = Some(Acknowledgment::Majority);
    }
    if writes.w == Some(Acknowledgment::Nodes(0)) {
        return Err(Error::config(
            "write concern w=0 does not tell whether a session was stored: take w=majority, or \
             leave it out",
        ));
    }
    let options = CollectionOptions::builder()
        .selection_criteria(SelectionCriteria::ReadPreference(
            mongodb::options::ReadPreference::Primary,
        ))
        .read_concern(ReadConcern::majority())
        .write_concern(writes)
        .build();
    let namespace = documents.namespace();
    let database = documents.client().database(&namespace.db);
    Ok(database.collection_with_options(&namespace.coll, options))
}

async fn ping(sessions: Sessions) -> Result<()> {
    let timer = sessions.timer(Verb::Ping);
    let database = sessions.documents.client().database(&sessions.documents.namespace().db);
    match database.run_command(doc! { "ping": 1 }).await {
        Ok(_) => timer.ends(Outcome::Ok, Ok(())),
        Err(error) => timer.fails("connect", &error),
    }
}
