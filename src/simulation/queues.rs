//! What could be lost between a store and the queues and lanes that its calls go through.

use std::time::Duration;

use tokio::time::{advance, sleep};

use crate::availability::Availability;
use crate::batching::{self, Batcher};
use crate::error::{ErrorKind, Result};
use crate::simulation::operation::Operation;
use crate::simulation::*;

/// A store over queues with room for so many calls, and its database.
#[derive(Clone)]
struct Queued {
    tiers: std::sync::Arc<WriteThrough<Batcher<FakeBackend>>>,
    mongo: FakeBackend,
    clock: Clock,
}

type Call<T> = tokio::task::JoinHandle<Result<T>>;

impl Queued {
    fn with(calls: usize, touch_after: Duration, outage_grace: Duration) -> Self {
        let clock = Clock::tokio();
        let mongo = FakeBackend::alone(clock.clone());
        let limits = CacheConfig {
            max_bytes: 1 << 20,
            max_entries: None,
            max_absent_ids: 100,
            policy: EvictionPolicy::Lru,
            max_staleness: MAX_STALENESS,
            exclusive: false,
            outage_grace,
            compact: false,
        };
        let availability = Availability::new(clock.clone());
        let tasks = Tasks::new(Handle::current(), TIMEOUT, availability.clone());
        let limits_of_queues = batching::BatchLimits::of(1, calls);
        let tiers = WriteThrough {
            backend: Batcher::new(mongo.clone(), &tasks, limits_of_queues),
            cache: Cache::new(&limits, clock.clone(), availability, &Series::default()),
            tasks,
            revs: RevSource::new(),
            touch_policy: TouchPolicy { after: touch_after, clock: clock.clone() },
            _stops_listener: CancellationToken::new().drop_guard(),
        };
        Self { tiers: tiers.into(), mongo, clock }
    }

    /// A session that is stored, and held by the cache.
    async fn cached(&self, version: u64) -> RawId {
        let id = RawId::random();
        let session = Session { data: data(version), expires: self.in_an_hour() };
        self.mongo.put(id.key(), Some(session));
        let load = self.load(id);
        self.serve(is_find).await;
        assert_eq!(load.await.unwrap().unwrap(), Some(version));
        id
    }

    fn in_an_hour(&self) -> WallTime {
        self.clock.wall().after(Duration::from_secs(3_600))
    }

    fn load(&self, id: RawId) -> Call<Option<u64>> {
        let tiers = self.tiers.clone();
        tokio::spawn(async move { Ok(tiers.load(id).await?.map(|session| version(&session.data))) })
    }

    fn save(&self, id: RawId, version: u64) -> Call<()> {
        let (tiers, expires) = (self.tiers.clone(), self.in_an_hour());
        tokio::spawn(async move { tiers.save(id, &data(version), expires).await })
    }

    async fn serve(&self, which: impl Fn(&Operation) -> bool) {
        let call = self.mongo.arrival(which).await;
        self.mongo.serve(call);
    }

    fn stored(&self, id: RawId) -> Option<u64> {
        self.mongo.stored(id.key()).map(|session| version(&session.data))
    }
}

fn is_find(operation: &Operation) -> bool {
    matches!(operation, Operation::Find(_))
}

fn is_replace(operation: &Operation) -> bool {
    matches!(operation, Operation::Replace(..))
}

#[tokio::test(start_paused = true)]
async fn saves_that_wait_for_those_before_them_take_up_room() {
    let world = Queued::with(2, Duration::ZERO, Duration::ZERO);
    let id = world.cached(1).await;
    let (first, second) = (world.save(id, 2), world.save(id, 3));
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
async fn a_save_that_finds_no_room_leaves_what_is_cached() {
    let world = Queued::with(1, Duration::ZERO, Duration::ZERO);
    let (id, other) = (world.cached(1).await, world.cached(2).await);
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
async fn a_call_that_finds_no_room_does_not_end_an_outage() {
    let world = Queued::with(1, Duration::ZERO, 10 * MAX_STALENESS);
    let (id, other) = (world.cached(1).await, world.cached(2).await);
    let given_up = world.save(other, 3);
    assert_eq!(given_up.await.unwrap().unwrap_err().kind(), ErrorKind::Timeout);
    advance(Duration::from_secs(1)).await;
    assert_eq!(world.load(id).await.unwrap().unwrap(), Some(1), "in its grace");
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
    let lapsed = world.cached(2).await;
    sleep(Duration::from_secs(4)).await;
    let id = world.cached(1).await;
    sleep(Duration::from_secs(2)).await;
    let (touch, needless) = (world.save(id, 1), world.save(id, 1));
    let call = world.mongo.arrival(|op| matches!(op, Operation::Touch(..))).await;
    let load = world.load(RawId::random());
    let find = world.mongo.arrival(is_find).await;
    // The outage begins between the ends of the two.
    world.mongo.serve(call);
    world.mongo.fail(find);
    touch.await.unwrap().unwrap();
    needless.await.unwrap().unwrap();
    assert_eq!(load.await.unwrap().unwrap_err().kind(), ErrorKind::Connection);
    let began = tokio::time::Instant::now();
    assert_eq!(world.load(lapsed).await.unwrap().unwrap(), Some(2));
    assert_eq!(began.elapsed(), Duration::ZERO, "in its grace");
}

/// Between the end of a command of several saves and those of the calls that wait for it, others
/// run.
#[tokio::test(start_paused = true)]
async fn a_save_of_what_was_there_before_one_that_landed_late_is_no_touch() {
    for turns in 0..8 {
        let world = Queued::with(100, Duration::from_secs(60), Duration::ZERO);
        let (id, other) = (world.cached(1).await, world.cached(2).await);
        let blocks = world.save(world.cached(3).await, 9);
        let blocking = world.mongo.arrival(is_replace).await;
        let (late, beside) = (world.save(id, 7), world.save(other, 8));
        sleep(TIMEOUT).await;
        for save in [blocks, late, beside] {
            assert_eq!(save.await.unwrap().unwrap_err().kind(), ErrorKind::Timeout);
        }
        // It has not landed yet.
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
        assert_eq!(world.stored(id), Some(1), "the last save wins, {turns} turns after");
    }
}
