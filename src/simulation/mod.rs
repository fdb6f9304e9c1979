//! The real store over a database that tests control call by call, on paused time.

mod backend;
mod chance;
mod database;
mod fault_plan;
mod fleet;
mod memory;
mod operation;
mod oplog;
mod oracle;
mod pending_calls;
mod queues;
mod races;
mod recovery;
mod scheduler;
mod seeds;
mod sign_out;
mod stream;
mod trace;
mod traced_backend;
mod walk;
mod watermark;
mod wire;

use std::time::Duration;

use serde_json::json;
use tokio::runtime::Handle;
use tokio_util::sync::CancellationToken;

use crate::availability::Availability;
use crate::cache::{Cache, CacheConfig, EvictionPolicy};
use crate::runtime::Tasks;
use crate::session::id::RawId;
use crate::session::revision::RevSource;
use crate::session::{Data, Session};
use crate::simulation::backend::FakeBackend;
use crate::simulation::operation::Operation;
use crate::store::write_through::{TouchPolicy, WriteThrough};
use crate::telemetry::metrics::Series;
use crate::time::Clock;
use crate::time::WallTime;

const TIMEOUT: Duration = Duration::from_secs(5);
const MAX_STALENESS: Duration = Duration::from_secs(5);
/// More turns of the scheduler than any one verb takes.
const TURNS: usize = 10_000;

/// One store, with the database behind it in hand. Cheap to clone into tasks.
#[derive(Clone)]
struct World {
    tiers: std::sync::Arc<WriteThrough<FakeBackend>>,
    mongo: FakeBackend,
    clock: Clock,
}

impl World {
    fn new() -> Self {
        Self::with_max_staleness(MAX_STALENESS)
    }

    fn with_max_staleness(max_staleness: Duration) -> Self {
        Self::with(CacheConfig { max_staleness, ..limits() })
    }

    #[allow(clippy::needless_pass_by_value, reason = "made for it")]
    fn with(limits: CacheConfig) -> Self {
        let clock = Clock::tokio();
        let mongo = FakeBackend::alone(clock.clone());
        let availability = Availability::new(clock.clone());
        let tiers = WriteThrough {
            backend: mongo.clone(),
            cache: Cache::new(&limits, clock.clone(), availability.clone(), &Series::default()),
            tasks: Tasks::new(Handle::current(), TIMEOUT, availability),
            revs: RevSource::new(),
            touch_policy: TouchPolicy { after: Duration::ZERO, clock: clock.clone() },
            _stops_listener: CancellationToken::new().drop_guard(),
        };
        Self { tiers: tiers.into(), mongo, clock }
    }

    fn in_an_hour(&self) -> WallTime {
        self.clock.wall().after(Duration::from_secs(3600))
    }

    /// A session that another instance has stored: not in the cache.
    fn stored(&self, version: u64) -> RawId {
        let id = RawId::random();
        self.mongo.put(id.key(), Some(Session { data: data(version), expires: self.in_an_hour() }));
        id
    }

    /// Starts a load and waits until its read has arrived at the database.
    async fn cold_load(&self, id: RawId) -> (Loading, usize) {
        let load = self.spawn_load(id);
        let call = self.mongo.arrival(|op| matches!(op, Operation::Find(_))).await;
        (load, call)
    }

    fn spawn_load(&self, id: RawId) -> Loading {
        let tiers = self.tiers.clone();
        tokio::spawn(async move { Ok(tiers.load(id).await?.map(|session| version(&session.data))) })
    }

    /// Loads, with the database answering at once.
    async fn load(&self, id: RawId) -> Option<u64> {
        let load = self.spawn_load(id);
        self.answer_while(load).await.unwrap()
    }

    async fn save(&self, id: RawId, version: u64) -> crate::Result<()> {
        let (tiers, expires) = (self.tiers.clone(), self.in_an_hour());
        let save = tokio::spawn(async move { tiers.save(id, &data(version), expires).await });
        self.answer_while(save).await
    }

    async fn delete(&self, id: RawId) {
        let tiers = self.tiers.clone();
        let delete = tokio::spawn(async move { tiers.delete(id).await });
        self.answer_while(delete).await.unwrap();
    }

    async fn clear(&self) -> u64 {
        let tiers = self.tiers.clone();
        let clear = tokio::spawn(async move { tiers.clear().await });
        self.answer_while(clear).await.unwrap()
    }

    /// Serves the calls that come while `task` runs, and only those.
    async fn answer_while<T>(&self, mut task: tokio::task::JoinHandle<T>) -> T {
        let before: Vec<_> = self.mongo.waiting().into_iter().map(|(call, _)| call).collect();
        for _ in 0..TURNS {
            tokio::select! {
                biased;
                done = &mut task => return done.unwrap(),
                () = tokio::task::yield_now() => {
                    for (call, _) in self.mongo.waiting() {
                        if !before.contains(&call) {
                            self.mongo.serve(call);
                        }
                    }
                }
            }
        }
        panic!("it waits for something that is not a call of its own")
    }
}

type Loading = tokio::task::JoinHandle<crate::Result<Option<u64>>>;

fn limits() -> CacheConfig {
    CacheConfig {
        max_bytes: 1 << 20,
        max_entries: None,
        max_absent_ids: 100,
        policy: EvictionPolicy::Lru,
        max_staleness: MAX_STALENESS,
        exclusive: false,
        outage_grace: Duration::ZERO,
        compact: false,
    }
}

fn data(version: u64) -> Data {
    Data::from([("version".to_owned(), json!(version))])
}

fn version(data: &Data) -> u64 {
    data["version"].as_u64().unwrap()
}
