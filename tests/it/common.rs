//! What the tests share: a server, stores on a database of their own, and counters of what they do.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use metrics_util::debugging::{DebugValue, DebuggingRecorder, Snapshotter};
use mongodb::event::EventHandler;
use mongodb::event::command::CommandEvent;
use mongodb::options::ClientOptions;
use session_test_server::fresh_database;
use time::OffsetDateTime;
use tower_sessions::session::{Id, Record};
use tower_sessions_moka_mongodb_store::{CachedMongoStore, MongoStore, mongodb};

/// Longer than anything takes on a slow machine: what is not so by then never will be.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Long enough that no test sees the end of it.
pub const FOREVER: Duration = Duration::from_secs(3_600);

/// A URI with a database of its own, on the server that all tests of this process share.
pub fn uri() -> String {
    session_test_server::shared().expect("a server to test on").uri_for(&fresh_database())
}

pub async fn mongo() -> MongoStore {
    MongoStore::connect(uri()).await.unwrap()
}

pub async fn cached() -> CachedMongoStore {
    cache_of(&mongo().await).await
}

/// A cache that keeps what it has: no test waits for an entry to grow old.
pub async fn cache_of(mongo: &MongoStore) -> CachedMongoStore {
    CachedMongoStore::builder(mongo.clone()).max_staleness(FOREVER).build().await.unwrap()
}

/// Another instance of the app: a store on the same collection, with connections of its own.
pub async fn other_instance(uri: &str) -> MongoStore {
    MongoStore::connect(uri).await.unwrap()
}

/// A record with some data, under an id that no store has given out.
pub fn record() -> Record {
    let data = HashMap::from([("name".to_owned(), serde_json::json!({ "serial": serial() }))]);
    Record { id: Id::default(), data, expiry_date: in_the_future() }
}

pub fn in_the_future() -> OffsetDateTime {
    OffsetDateTime::now_utc() + time::Duration::minutes(30)
}

pub fn in_the_past() -> OffsetDateTime {
    OffsetDateTime::now_utc() - time::Duration::minutes(30)
}

/// Asks again and again until it is so.
pub async fn eventually(what: &str, mut is_so: impl AsyncFnMut() -> bool) {
    let start = Instant::now();
    while !is_so().await {
        assert!(start.elapsed() < PATIENCE, "not within {PATIENCE:?}: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// All that an error says in any way.
pub fn everything_said_by(error: &dyn std::error::Error) -> String {
    let mut said = String::new();
    let mut next = Some(error);
    while let Some(error) = next {
        said += &format!("{error}\n{error:?}\n{error:#?}\n");
        next = error.source();
    }
    said
}

/// Counts the commands that a client sends, by name.
#[derive(Clone, Default)]
pub struct Commands(Arc<Mutex<HashMap<String, usize>>>);

impl Commands {
    pub fn sent(&self, name: &str) -> usize {
        self.0.lock().unwrap().get(name).copied().unwrap_or(0)
    }

    pub fn all(&self) -> usize {
        self.0.lock().unwrap().values().sum()
    }

    /// A client that counts into this.
    pub async fn client(&self, uri: &str) -> mongodb::Client {
        let mut options = ClientOptions::parse(uri).await.unwrap();
        let counts = self.clone();
        options.command_event_handler = Some(EventHandler::callback(move |event| {
            if let CommandEvent::Started(event) = event {
                *counts.0.lock().unwrap().entry(event.command_name).or_default() += 1;
            }
        }));
        mongodb::Client::with_options(options).unwrap()
    }

    /// A store whose commands are counted into this.
    pub async fn mongo(&self, uri: &str) -> MongoStore {
        MongoStore::builder().client(self.client(uri).await).build().await.unwrap()
    }
}

/// The metrics of the stores that are built while the guard is held.
pub struct Meters {
    snapshotter: Snapshotter,
    // A snapshot sets everything back to zero, gauges too: what is added up here is the value.
    values: Mutex<HashMap<String, f64>>,
}

impl Meters {
    pub fn install() -> (Self, metrics::LocalRecorderGuard<'static>) {
        let recorder = Box::leak(Box::new(DebuggingRecorder::new()));
        let meters = Self { snapshotter: recorder.snapshotter(), values: Mutex::default() };
        (meters, metrics::set_default_local_recorder(recorder))
    }

    /// The value of a counter or gauge, or how many values a histogram took: `name{label=value,…}`.
    pub fn value(&self, name: &str) -> f64 {
        self.read().get(name).copied().unwrap_or(0.0)
    }

    pub fn names(&self) -> Vec<String> {
        self.read().keys().cloned().collect()
    }

    fn read(&self) -> HashMap<String, f64> {
        let mut values = self.values.lock().unwrap();
        for (key, _, _, value) in self.snapshotter.snapshot().into_vec() {
            let (_, key) = key.into_parts();
            let labels: Vec<_> =
                key.labels().map(|label| format!("{}={}", label.key(), label.value())).collect();
            let name = match labels.is_empty() {
                true => key.name().to_owned(),
                false => format!("{}{{{}}}", key.name(), labels.join(",")),
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
pub fn serial() -> usize {
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    NEXT.fetch_add(1, Ordering::Relaxed)
}
