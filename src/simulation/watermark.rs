//! Races between the change stream and checkpoints: what an empty batch proves, and what it does not prove.

use std::sync::Arc;
use std::time::Duration;

use crate::invalidation::source::Fault;
use crate::invalidation::{self, InvalidationListener};
use crate::session::Session;
use crate::simulation::backend::FakeBackend;
use crate::simulation::chance::Chance;
use crate::simulation::operation::Operation;
use crate::simulation::types::{FaultConfig, data};
use crate::simulation::wire::Wire;
use crate::simulation::world::{MAX_STALENESS, TIMEOUT, World};
use crate::telemetry::metrics::{Counter, Series, StreamMetrics};

fn is_open(operation: &Operation) -> bool {
    matches!(operation, Operation::Open(_))
}

fn is_get_more(operation: &Operation) -> bool {
    matches!(operation, Operation::GetMore(_))
}

fn is_primary_time(operation: &Operation) -> bool {
    matches!(operation, Operation::PrimaryTime)
}

impl World {
    /// A store with a change stream of a replica set, which has MongoDB's resume tokens.
    fn with_stream() -> Self {
        Self::with_tokens(true)
    }

    /// `have_times`: the resume tokens contain a time, as MongoDB's do.
    fn with_tokens(have_times: bool) -> Self {
        let poll_interval = invalidation::poll_interval(MAX_STALENESS);
        let faults = FaultConfig {
            streams: true,
            tokens_have_times: have_times,
            poll_interval,
            ..FaultConfig::default()
        };
        let mut world = Self::new();
        let wire = Wire::new(world.clock.clone(), Chance::of(0), faults);
        let mongo = FakeBackend::new(wire, 0);
        let tiers = Arc::get_mut(&mut world.tiers).unwrap();
        tiers.backend = mongo.clone();
        let listener = InvalidationListener {
            source: mongo.clone(),
            cache: tiers.cache.clone(),
            clock: world.clock.clone(),
            poll_interval,
            timeout: TIMEOUT,
            metrics: StreamMetrics::new(&Series::default(), Counter::noop(), world.clock.clone()),
            rng: fastrand::Rng::with_seed(1),
        };
        drop(listener.start(&tiers.tasks, tiers.tasks.closed().child_token()));
        world.mongo = mongo;
        world
    }

    /// Serves the next call of this kind.
    async fn serve_next(&self, wanted: fn(&Operation) -> bool) {
        let call = self.mongo.arrival(wanted).await;
        self.mongo.serve(call);
    }

    /// From now on, the database answers every call at once.
    fn serve_all(&self) {
        self.mongo.wire.state().faults.recovered = true;
        for call in self.mongo.wire.waiting() {
            self.mongo.serve(call);
        }
    }

    /// The age of the moment up to which the cache has received all changes.
    fn lag(&self) -> Duration {
        self.clock.now().since(self.tiers.cache.synced_through())
    }
}

/// ```text
/// store                         MongoDB
/// aggregate ------------------> newest entry: T. First token: T + 1, a time that no entry has
/// getMore --------------------> empty, the token is still T + 1
///           (the reply is held)
///                               another instance changes the session: its entry is T + 1
/// hello ----------------------> T + 1
///      <----------------------- the checkpoint is answered
///      <----------------------- the reply to getMore, which was sent before the change
/// getMore --------------------> (no reply)
/// ```
///
/// The empty batch must not prove T + 1 itself. Otherwise it would confirm the checkpoint, and the entry would be
/// served until `max_staleness` after the checkpoint.
async fn check_that_the_first_token_does_not_confirm_a_checkpoint_of_its_time(resumed: bool) {
    let world = World::with_stream();
    let id = world.stored(1);
    world.serve_next(is_open).await;
    if resumed {
        let more = world.mongo.arrival(is_get_more).await;
        world.mongo.fail(more);
        world.serve_next(is_open).await;
    }
    world.serve_next(is_primary_time).await;
    assert_eq!(world.load(id).await, Some(1));

    let more = world.mongo.arrival(is_get_more).await;
    world.mongo.apply(more);
    let changed_at = world.clock.now();
    world.mongo.put(id.key(), Some(Session::new(data(2), world.in_an_hour())));
    world.serve_next(is_primary_time).await;
    let answered_at = world.clock.now();
    assert!(answered_at > changed_at);
    // The listener takes the answer to the checkpoint first.
    tokio::task::yield_now().await;
    world.mongo.answer(more);
    world.mongo.arrival(is_get_more).await;

    let waited = world.clock.now().since(changed_at);
    tokio::time::advance(MAX_STALENESS.checked_sub(waited).unwrap()).await;
    assert_eq!(world.load(id).await, Some(1), "the bound has not passed yet");
    tokio::time::advance(Duration::from_millis(1)).await;
    assert_eq!(world.load(id).await, Some(2), "served past the bound");
}

#[tokio::test(start_paused = true)]
async fn an_empty_batch_with_the_first_token_does_not_confirm_a_checkpoint_of_its_time() {
    check_that_the_first_token_does_not_confirm_a_checkpoint_of_its_time(false).await;
}

#[tokio::test(start_paused = true)]
async fn an_empty_batch_after_a_resume_does_not_confirm_a_checkpoint_of_its_time() {
    check_that_the_first_token_does_not_confirm_a_checkpoint_of_its_time(true).await;
}

/// ```text
/// store                         member A                        member B
/// aggregate ------------------> feeds the stream
///                               is no longer primary            is elected
///                                                               another instance changes the session
/// hello ------------------------------------------------------> its newest entry
///      <------------------------------------------------------- the checkpoint is answered
/// getMore --------------------> empty: A has not replicated the change
///      <----------------------- requested after the checkpoint was answered
/// getMore --------------------> (no reply)
/// ```
#[tokio::test(start_paused = true)]
async fn an_empty_batch_of_a_former_primary_does_not_confirm_a_checkpoint_of_its_successor() {
    for have_times in [true, false] {
        let world = World::with_tokens(have_times);
        let id = world.stored(1);
        world.serve_next(is_open).await;
        world.serve_next(is_primary_time).await;
        world.serve_next(is_get_more).await;
        assert_eq!(world.load(id).await, Some(1));

        let before = world.mongo.arrival(is_get_more).await;
        world.mongo.wire.state().database.oplog.elect();
        let changed_at = world.clock.now();
        world.mongo.put(id.key(), Some(Session::new(data(2), world.in_an_hour())));
        world.serve_next(is_primary_time).await;
        tokio::task::yield_now().await;
        world.mongo.serve(before);
        let after = world.mongo.arrival(is_get_more).await;
        assert_ne!(after, before);
        world.mongo.serve(after);
        world.mongo.arrival(is_get_more).await;

        let waited = world.clock.now().since(changed_at);
        let left = MAX_STALENESS.checked_sub(waited).unwrap() + Duration::from_millis(1);
        tokio::time::advance(left).await;
        assert_eq!(world.load(id).await, Some(2), "served past the bound, times: {have_times}");
    }
}

/// The newest entry of the oplog is a touch, which no stream reports. It has the time of the first token. Every
/// checkpoint is answered with that time, and no token is later.
#[tokio::test(start_paused = true)]
async fn the_lease_is_renewed_on_an_idle_replica_set() {
    for resumed in [false, true] {
        let world = World::with_stream();
        let id = world.stored(1);
        world.serve_next(is_open).await;
        world.mongo.wire.state().database.touch(id.key(), world.in_an_hour());
        world.serve_all();
        tokio::time::sleep(MAX_STALENESS).await;
        if resumed {
            world.mongo.wire.state().streams.break_off(0, Fault::Passing);
        }
        for _ in 0..100 {
            tokio::time::sleep(Duration::from_millis(500)).await;
            assert!(world.lag() < MAX_STALENESS, "{:?}, resumed: {resumed}", world.lag());
        }
    }
}
