//! `World`: one store over a database that a test controls call by call. The hand-written races use it.

use std::sync::Arc;
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::availability::Availability;
use crate::cache::{Cache, CacheConfig, Coherence, EvictionPolicy};
use crate::error::Result;
use crate::runtime::Tasks;
use crate::session::Session;
use crate::session::id::RawId;
use crate::session::revision::RevSource;
use crate::simulation::backend::FakeBackend;
use crate::simulation::operation::Operation;
use crate::simulation::types::{data, version};
use crate::store::write_through::{TouchPolicy, WriteThrough};
use crate::telemetry::metrics::Series;
use crate::time::{Clock, WallTime};

pub(crate) const TIMEOUT: Duration = Duration::from_secs(5);
pub(crate) const MAX_STALENESS: Duration = Duration::from_secs(5);
/// More turns of tokio's scheduler than any operation takes.
const MAX_TURNS: usize = 10_000;

/// One store and its database. Tests clone it into tasks.
#[derive(Clone)]
pub(crate) struct World {
    pub(crate) tiers: Arc<WriteThrough<FakeBackend>>,
    pub(crate) mongo: FakeBackend,
    pub(crate) clock: Clock,
}

/// A load that runs in a task. It returns the version of the session.
pub(crate) type Loading = JoinHandle<Result<Option<u64>>>;

impl World {
    pub(crate) fn new() -> Self {
        Self::with_max_staleness(MAX_STALENESS)
    }

    pub(crate) fn with_max_staleness(max_staleness: Duration) -> Self {
        Self::with(&CacheConfig { max_staleness, ..cache_config() })
    }

    pub(crate) fn with(config: &CacheConfig) -> Self {
        let clock = Clock::tokio();
        let mongo = FakeBackend::alone(clock.clone());
        let availability = Availability::new(clock.clone());
        let tiers = WriteThrough {
            backend: mongo.clone(),
            cache: Cache::new(config, clock.clone(), availability.clone(), &Series::default()),
            tasks: Tasks::new(Handle::current(), TIMEOUT, availability),
            revs: RevSource::new(),
            touch_policy: TouchPolicy { after: Duration::ZERO, clock: clock.clone() },
            _stops_listener: CancellationToken::new().drop_guard(),
        };
        Self { tiers: tiers.into(), mongo, clock }
    }

    pub(crate) fn in_an_hour(&self) -> WallTime {
        self.clock.wall().after(Duration::from_secs(3_600))
    }

    /// Stores a session as another instance does: the cache does not have it.
    pub(crate) fn stored(&self, version: u64) -> RawId {
        let id = RawId::random();
        self.mongo.put(id.key(), Some(Session::new(data(version), self.in_an_hour())));
        id
    }

    /// Starts a load and waits until its read has arrived at the database.
    pub(crate) async fn cold_load(&self, id: RawId) -> (Loading, usize) {
        let load = self.spawn_load(id);
        let call = self.mongo.arrival(|op| matches!(op, Operation::Find(_))).await;
        (load, call)
    }

    pub(crate) fn spawn_load(&self, id: RawId) -> Loading {
        let tiers = self.tiers.clone();
        tokio::spawn(async move { Ok(tiers.load(id).await?.map(|session| version(&session.data))) })
    }

    pub(crate) fn spawn_save(&self, id: RawId, version: u64) -> JoinHandle<Result<()>> {
        let tiers = self.tiers.clone();
        let expires = self.in_an_hour();
        tokio::spawn(async move { tiers.save(id, &data(version), expires).await })
    }

    /// Loads. The database answers at once.
    pub(crate) async fn load(&self, id: RawId) -> Option<u64> {
        let load = self.spawn_load(id);
        self.answer_while(load).await.unwrap()
    }

    pub(crate) async fn save(&self, id: RawId, version: u64) -> Result<()> {
        let save = self.spawn_save(id, version);
        self.answer_while(save).await
    }

    pub(crate) async fn delete(&self, id: RawId) {
        let tiers = self.tiers.clone();
        let delete = tokio::spawn(async move { tiers.delete(id).await });
        self.answer_while(delete).await.unwrap();
    }

    pub(crate) async fn clear(&self) -> u64 {
        let tiers = self.tiers.clone();
        let clear = tokio::spawn(async move { tiers.clear().await });
        self.answer_while(clear).await.unwrap()
    }

    /// Serves the calls that arrive while `task` runs. Calls that waited before keep waiting.
    pub(crate) async fn answer_while<T>(&self, mut task: JoinHandle<T>) -> T {
        let before: Vec<_> = self.mongo.waiting().into_iter().map(|(call, _)| call).collect();
        for _ in 0..MAX_TURNS {
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
        panic!("the task waits for a call that began before it")
    }
}

pub(crate) fn cache_config() -> CacheConfig {
    CacheConfig {
        max_bytes: 1 << 20,
        max_entries: None,
        max_absent_ids: 100,
        policy: EvictionPolicy::Lru,
        max_staleness: MAX_STALENESS,
        coherence: Coherence::ChangeStream,
        outage_grace: Duration::ZERO,
        compact: false,
    }
}
