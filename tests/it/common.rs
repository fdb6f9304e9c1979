//! What the tests share: a server, stores on databases of their own, and counters of their commands
//! and metrics.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use metrics_util::debugging::{DebugValue, DebuggingRecorder, Snapshotter};
use mongodb::Collection;
use mongodb::bson::{DateTime, doc};
use mongodb::event::EventHandler;
use mongodb::event::command::CommandEvent;
use mongodb::options::ClientOptions;
use time::OffsetDateTime;
use tower_sessions::SessionStore;
use tower_sessions::session::{Id, Record};
use tower_sessions_moka_mongodb_store::{
    CachedMongoStore, LiveSessions, MongoStore, Result, StoredSession, mongodb,
};

pub(crate) use session_test_support::PATIENCE;

pub(crate) use crate::proxy::uri;

/// Longer than any test runs.
pub(crate) const FOREVER: Duration = Duration::from_secs(3_600);

pub(crate) async fn mongo() -> MongoStore {
    patient(uri()).await
}

/// A store whose calls do not time out on a slow machine.
pub(crate) async fn patient(uri: impl Into<String>) -> MongoStore {
    MongoStore::builder().uri(uri).operation_timeout(PATIENCE).build().await.unwrap()
}

pub(crate) async fn cached() -> CachedMongoStore {
    cache_of(&mongo().await).await
}

/// A cache whose entries do not expire by age during a test.
pub(crate) async fn cache_of(mongo: &MongoStore) -> CachedMongoStore {
    CachedMongoStore::builder(mongo.clone()).max_staleness(FOREVER).build().await.unwrap()
}

/// Another instance of the app: a store on the same collection, with its own connections.
pub(crate) async fn other_instance(uri: &str) -> MongoStore {
    MongoStore::connect(uri).await.unwrap()
}

/// What both of our stores have beyond the contract.
pub(crate) trait Store: SessionStore + Clone {
    async fn length(&self) -> Result<u64>;
    async fn estimated_length(&self) -> Result<u64>;
    async fn contains(&self, id: Id) -> Result<bool>;
    async fn clear(&self) -> Result<u64>;
    async fn shutdown(&self);
    fn all(&self) -> LiveSessions;
    fn collection(&self) -> Collection<StoredSession>;

    /// The number of documents, live or not.
    async fn documents(&self) -> u64 {
        self.collection().count_documents(doc! {}).await.unwrap()
    }

    /// Another instance of the app, with the client of this one.
    async fn another(&self) -> MongoStore {
        let client = self.collection().client().clone();
        let namespace = self.collection().namespace();
        let builder = MongoStore::builder().client(client).database(namespace.db);
        builder.collection(namespace.coll).build().await.unwrap()
    }

    /// Moves the expiry of every session into the past. The store does not notice.
    async fn expire_all(&self) {
        let past = doc! { "$set": { "expires": DateTime::from_millis(1_000) } };
        self.collection().update_many(doc! {}, past).await.unwrap();
    }
}

macro_rules! impl_store {
    ($($store:ident)*) => { $(
        impl Store for $store {
            async fn length(&self) -> Result<u64> {
                $store::length(self).await
            }
            async fn estimated_length(&self) -> Result<u64> {
                $store::estimated_length(self).await
            }
            async fn contains(&self, id: Id) -> Result<bool> {
                $store::contains(self, id).await
            }
            async fn clear(&self) -> Result<u64> {
                $store::clear(self).await
            }
            async fn shutdown(&self) {
                $store::shutdown(self).await;
            }
            fn all(&self) -> LiveSessions {
                $store::all(self)
            }
            fn collection(&self) -> Collection<StoredSession> {
                $store::collection(self)
            }
        }
    )* };
}

impl_store!(MongoStore CachedMongoStore);

/// Runs the same tests on both of our stores: `name_of_the_test = function;`.
macro_rules! on_both_tiers {
    ($($name:ident = $test:ident;)*) => {
        mod uncached {
            $(#[tokio::test] async fn $name() { super::$test(crate::common::mongo().await).await; })*
        }
        mod cached {
            $(#[tokio::test] async fn $name() { super::$test(crate::common::cached().await).await; })*
        }
    };
}
pub(crate) use on_both_tiers;

/// Creates a session and returns its record.
pub(crate) async fn create(store: &impl SessionStore) -> Record {
    let mut record = record();
    store.create(&mut record).await.unwrap();
    record
}

/// A record with some data, under an id that no store has issued.
pub(crate) fn record() -> Record {
    let data = HashMap::from([("name".to_owned(), serde_json::json!({ "serial": serial() }))]);
    Record { id: Id::default(), data, expiry_date: in_the_future() }
}

pub(crate) fn in_the_future() -> OffsetDateTime {
    OffsetDateTime::now_utc() + time::Duration::minutes(30)
}

pub(crate) fn in_the_past() -> OffsetDateTime {
    OffsetDateTime::now_utc() - time::Duration::minutes(30)
}

/// Polls `is_so` until it returns true. Fails after `PATIENCE`.
pub(crate) async fn eventually(what: &str, mut is_so: impl AsyncFnMut() -> bool) {
    let start = Instant::now();
    while !is_so().await {
        assert!(start.elapsed() < PATIENCE, "not within {PATIENCE:?}: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// All texts of an error and its sources: `Display`, `Debug` and pretty `Debug`.
pub(crate) fn everything_said_by(error: &dyn std::error::Error) -> String {
    let mut said = String::new();
    let mut next = Some(error);
    while let Some(error) = next {
        said.extend([error.to_string(), format!("\n{error:?}\n{error:#?}\n")]);
        next = error.source();
    }
    said
}

/// Collects everything that is logged.
#[derive(Clone, Default)]
pub(crate) struct Log(Arc<Mutex<Vec<u8>>>);

impl Log {
    pub(crate) fn subscriber(&self) -> impl tracing::Subscriber + use<> {
        let log = self.clone();
        tracing_subscriber::fmt()
            .with_max_level(tracing::Level::TRACE)
            .with_ansi(false)
            .with_span_events(tracing_subscriber::fmt::format::FmtSpan::FULL)
            .with_writer(move || log.clone())
            .finish()
    }

    /// Takes what was logged since the last call.
    pub(crate) fn take(&self) -> String {
        String::from_utf8(std::mem::take(&mut *self.0.lock().unwrap())).unwrap()
    }
}

impl std::io::Write for Log {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// Counts the commands that a client sends, by name.
#[derive(Clone, Default)]
pub(crate) struct Commands(Arc<Mutex<HashMap<String, usize>>>);

impl Commands {
    pub(crate) fn sent(&self, name: &str) -> usize {
        self.0.lock().unwrap().get(name).copied().unwrap_or(0)
    }

    /// The number of commands, without those of the connection and the change stream.
    pub(crate) fn all(&self) -> usize {
        let counts = self.0.lock().unwrap();
        let follows = ["hello", "getMore", "killCursors"];
        let verbs = counts.iter().filter(|(name, _)| !follows.contains(&name.as_str()));
        verbs.map(|(_, count)| count).sum()
    }

    /// A client whose commands are counted.
    pub(crate) async fn client(&self, uri: &str) -> mongodb::Client {
        let mut options = ClientOptions::parse(uri).await.unwrap();
        let counts = self.clone();
        options.command_event_handler = Some(EventHandler::callback(move |event| {
            if let CommandEvent::Started(event) = event {
                *counts.0.lock().unwrap().entry(event.command_name).or_default() += 1;
            }
        }));
        mongodb::Client::with_options(options).unwrap()
    }

    /// A store whose commands are counted.
    pub(crate) async fn mongo(&self, uri: &str) -> MongoStore {
        let store = MongoStore::builder().client(self.client(uri).await).build().await.unwrap();
        // Do not count the commands of `build`.
        self.0.lock().unwrap().clear();
        store
    }
}

/// The metrics of the stores that are built while the guard is held.
pub(crate) struct Meters {
    snapshotter: Snapshotter,
    // A snapshot sets every metric back to zero, gauges too. So the values are added up here.
    values: Mutex<HashMap<String, f64>>,
}

impl Meters {
    pub(crate) fn install() -> (Self, metrics::LocalRecorderGuard<'static>) {
        let recorder = Box::leak(Box::new(DebuggingRecorder::new()));
        let meters = Self { snapshotter: recorder.snapshotter(), values: Mutex::default() };
        (meters, metrics::set_default_local_recorder(recorder))
    }

    /// The value of a counter or gauge, or how many values a histogram recorded:
    /// `name{label=value,…}`.
    pub(crate) fn value(&self, name: &str) -> f64 {
        self.read().get(name).copied().unwrap_or(0.0)
    }

    pub(crate) fn names(&self) -> Vec<String> {
        self.read().keys().cloned().collect()
    }

    fn read(&self) -> HashMap<String, f64> {
        let mut values = self.values.lock().unwrap();
        for (key, _, _, value) in self.snapshotter.snapshot().into_vec() {
            let (_, key) = key.into_parts();
            let labels: Vec<_> =
                key.labels().map(|label| format!("{}={}", label.key(), label.value())).collect();
            let name = if labels.is_empty() {
                key.name().to_owned()
            } else {
                format!("{}{{{}}}", key.name(), labels.join(","))
            };
            *values.entry(name).or_default() += match value {
                #[allow(clippy::cast_precision_loss, reason = "tests count little")]
                DebugValue::Counter(count) => count as f64,
                DebugValue::Gauge(value) => value.into_inner(),
                #[allow(clippy::cast_precision_loss, reason = "tests count little")]
                DebugValue::Histogram(values) => values.len() as f64,
            };
        }
        values.clone()
    }
}

/// A number that is new on each call, to tell sessions apart.
pub(crate) fn serial() -> usize {
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    NEXT.fetch_add(1, Ordering::Relaxed)
}
