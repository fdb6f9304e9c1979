//! Races between a store and its batcher: the batch queues and the write queues.

use std::time::Duration;

use tokio::runtime::Handle;
use tokio::time::{advance, sleep};
use tokio_util::sync::CancellationToken;

use crate::availability::Availability;
use crate::batching::{BatchLimits, Batcher};
use crate::cache::{Cache, CacheConfig};
use crate::error::{ErrorKind, Result};
use crate::request_scope::changes::OnConflict;
use crate::runtime::Tasks;
use crate::session::Session;
use crate::session::id::RawId;
use crate::session::revision::RevSource;
use crate::simulation::backend::FakeBackend;
use crate::simulation::operation::Operation;
use crate::simulation::types::{data, version};
use crate::simulation::world::{MAX_STALENESS, TIMEOUT, cache_config};
use crate::store::write_through::{TouchPolicy, WriteThrough};
use crate::telemetry::metrics::Series;
use crate::time::{Clock, WallTime};

/// A store over a real batcher whose queues have room for a few calls, and its database.
#[derive(Clone)]
pub(crate) struct Queued {
    pub(crate) tiers: std::sync::Arc<WriteThrough<Batcher<FakeBackend>>>,
    pub(crate) mongo: FakeBackend,
    clock: Clock,
}

type Call<T> = tokio::task::JoinHandle<Result<T>>;

impl Queued {
    pub(crate) fn with(max_calls: usize, touch_after: Duration, outage_grace: Duration) -> Self {
        let clock = Clock::tokio();
        Self::over(FakeBackend::alone(clock), max_calls, touch_after, outage_grace)
    }

    /// An app that has an `on_conflict`.
    pub(crate) fn resolving(on_conflict: OnConflict) -> Self {
        let mongo = FakeBackend::alone(Clock::tokio()).with_on_conflict(on_conflict);
        Self::over(mongo, 100, Duration::ZERO, Duration::ZERO)
    }

    fn over(
        mongo: FakeBackend,
        max_calls: usize,
        touch_after: Duration,
        outage_grace: Duration,
    ) -> Self {
        let clock = mongo.wire.clock.clone();
        let config = CacheConfig { outage_grace, ..cache_config() };
        let availability = Availability::new(clock.clone());
        let tasks = Tasks::new(Handle::current(), TIMEOUT, availability.clone());
        let tiers = WriteThrough {
            backend: Batcher::new(
                mongo.clone(),
                &tasks,
                BatchLimits::of(1, max_calls),
                fastrand::Rng::with_seed(0),
            ),
            cache: Cache::new(&config, clock.clone(), availability, &Series::default()),
            tasks,
            revs: RevSource::new(),
            touch_policy: TouchPolicy { after: touch_after, clock: clock.clone() },
            _stops_listener: CancellationToken::new().drop_guard(),
        };
        Self { tiers: tiers.into(), mongo, clock }
    }

    /// Stores a session and loads it into the cache.
    async fn cached(&self, version: u64) -> RawId {
        let id = RawId::random();
        let session = Session::new(data(version), self.in_an_hour());
        self.mongo.put(id.key(), Some(session));
        let load = self.load(id);
        self.serve(is_find).await;
        assert_eq!(load.await.unwrap().unwrap(), Some(version));
        id
    }

    pub(crate) fn in_an_hour(&self) -> WallTime {
        self.clock.wall().after(Duration::from_secs(3_600))
    }

    fn load(&self, id: RawId) -> Call<Option<u64>> {
        let tiers = self.tiers.clone();
        tokio::spawn(async move { Ok(tiers.load(id).await?.map(|session| version(&session.data))) })
    }

    pub(crate) fn save(&self, id: RawId, version: u64) -> Call<()> {
        let tiers = self.tiers.clone();
        let expires = self.in_an_hour();
        tokio::spawn(async move { tiers.save(id, &data(version), expires).await })
    }

    pub(crate) async fn serve(&self, which: impl Fn(&Operation) -> bool) {
        let call = self.mongo.arrival(which).await;
        self.mongo.serve(call);
    }

    fn stored(&self, id: RawId) -> Option<u64> {
        self.mongo.stored(id.key()).map(|session| version(&session.data))
    }
}

pub(crate) fn is_find(operation: &Operation) -> bool {
    matches!(operation, Operation::Find(_))
}

pub(crate) fn is_replace(operation: &Operation) -> bool {
    matches!(operation, Operation::Replace(..))
}

#[tokio::test(start_paused = true)]
async fn saves_that_wait_in_a_write_queue_count_as_queued_calls() {
    let world = Queued::with(2, Duration::ZERO, Duration::ZERO);
    let id = world.cached(1).await;
    let first = world.save(id, 2);
    let second = world.save(id, 3);
    let call = world.mongo.arrival(is_replace).await;
    let error = world.save(id, 4).await.unwrap().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Overloaded);
    world.mongo.serve(call);
    first.await.unwrap().unwrap();
    world.serve(is_replace).await;
    second.await.unwrap().unwrap();
    assert_eq!(world.stored(id), Some(3));
    assert_eq!(world.tiers.backend.load(), [0; 4]);
}

#[tokio::test(start_paused = true)]
async fn a_refused_save_leaves_the_cached_entry() {
    let world = Queued::with(1, Duration::ZERO, Duration::ZERO);
    let id = world.cached(1).await;
    let other = world.cached(2).await;
    let save = world.save(other, 3);
    let call = world.mongo.arrival(is_replace).await;
    let made = world.mongo.made();
    for unchanged in [false, true] {
        let error = world.save(id, if unchanged { 1 } else { 4 }).await.unwrap().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Overloaded);
        assert_eq!(world.load(id).await.unwrap().unwrap(), Some(1));
    }
    assert_eq!(world.mongo.made(), made, "nothing was sent");
    world.mongo.serve(call);
    save.await.unwrap().unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_refused_call_does_not_end_an_outage() {
    let world = Queued::with(1, Duration::ZERO, 10 * MAX_STALENESS);
    let id = world.cached(1).await;
    let other = world.cached(2).await;
    let given_up = world.save(other, 3);
    assert_eq!(given_up.await.unwrap().unwrap_err().kind(), ErrorKind::Timeout);
    advance(Duration::from_secs(1)).await;
    assert_eq!(world.load(id).await.unwrap().unwrap(), Some(1), "served under the grace");
    let error = world.save(other, 4).await.unwrap().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Overloaded);
    let made = world.mongo.made();
    let began = tokio::time::Instant::now();
    assert_eq!(world.load(id).await.unwrap().unwrap(), Some(1));
    assert_eq!((began.elapsed(), world.mongo.made()), (Duration::ZERO, made));
}

#[tokio::test(start_paused = true)]
async fn a_touch_that_is_not_sent_does_not_end_an_outage() {
    let world = Queued::with(10, Duration::from_secs(1), 10 * MAX_STALENESS);
    let stale = world.cached(2).await;
    sleep(Duration::from_secs(4)).await;
    let id = world.cached(1).await;
    sleep(Duration::from_secs(2)).await;
    let touch = world.save(id, 1);
    let needless = world.save(id, 1);
    let call = world.mongo.arrival(|op| matches!(op, Operation::Touch(..))).await;
    let load = world.load(RawId::random());
    let find = world.mongo.arrival(is_find).await;
    // The outage begins after the touch has ended and before the needless touch does.
    world.mongo.serve(call);
    world.mongo.fail(find);
    touch.await.unwrap().unwrap();
    needless.await.unwrap().unwrap();
    assert_eq!(load.await.unwrap().unwrap_err().kind(), ErrorKind::Connection);
    let began = tokio::time::Instant::now();
    assert_eq!(world.load(stale).await.unwrap().unwrap(), Some(2));
    assert_eq!(began.elapsed(), Duration::ZERO, "served under the grace");
}

/// A batch of saves ends before the calls that wait for it do. Other operations run in between, for `turns` turns of
/// the scheduler.
///
/// ```text
/// app                             database
/// save 7 -> timeout
///                                 save 7 is still on the way
/// load ------------------------>  1
///                                 save 7 is stored
/// save 1: the entry has 1, but a touch would leave 7 stored
/// ```
#[tokio::test(start_paused = true)]
async fn a_save_of_older_data_after_a_late_save_is_not_reduced_to_a_touch() {
    for turns in 0..8 {
        let world = Queued::with(100, Duration::from_secs(60), Duration::ZERO);
        let id = world.cached(1).await;
        let other = world.cached(2).await;
        let blocks = world.save(world.cached(3).await, 9);
        let blocking = world.mongo.arrival(is_replace).await;
        let late = world.save(id, 7);
        let beside = world.save(other, 8);
        sleep(TIMEOUT).await;
        for save in [blocks, late, beside] {
            assert_eq!(save.await.unwrap().unwrap_err().kind(), ErrorKind::Timeout);
        }
        // The database has not carried out the save of 7 yet.
        let load = world.load(id);
        world.serve(is_find).await;
        assert_eq!(load.await.unwrap().unwrap(), Some(1));
        let calls: Vec<_> = world.mongo.waiting().into_iter().map(|(call, _)| call).collect();
        assert_eq!(calls.len(), 3);
        calls.iter().filter(|call| **call != blocking).for_each(|call| world.mongo.serve(*call));
        for _ in 0..turns {
            tokio::task::yield_now().await;
        }
        let mut save = world.save(id, 1);
        while !save.is_finished() {
            tokio::task::yield_now().await;
            world.mongo.waiting().iter().for_each(|(call, _)| world.mongo.serve(*call));
            if tokio::time::timeout(Duration::from_millis(10), &mut save).await.is_ok() {
                break;
            }
        }
        assert_eq!(world.stored(id), Some(1), "the last save wins, {turns} turns later");
    }
}
