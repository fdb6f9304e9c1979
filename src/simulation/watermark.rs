//! Races of the change stream against fences: what an empty batch proves, and what it does not.

use std::time::Duration;

use crate::telemetry::metrics::Counter;

use crate::invalidation::{self, InvalidationListener};
use crate::simulation::operation::Operation;
use crate::simulation::wire::{Manners, Wire};
use crate::simulation::*;
use crate::telemetry::metrics::StreamMetrics;

fn is_open(operation: &Operation) -> bool {
    matches!(operation, Operation::Open(_))
}

fn is_more(operation: &Operation) -> bool {
    matches!(operation, Operation::More(_))
}

fn is_fence(operation: &Operation) -> bool {
    matches!(operation, Operation::Fence)
}

impl World {
    /// A store that follows the changes of a replica set with MongoDB's tokens.
    fn following() -> Self {
        Self::following_tokens(true)
    }

    /// `have_times`: the resume tokens hold a time, as MongoDB's do.
    fn following_tokens(have_times: bool) -> Self {
        let pace = invalidation::poll_interval(MAX_STALENESS);
        let manners =
            Manners { streams: true, tokens_have_times: have_times, pace, ..Manners::default() };
        let mut world = Self::new();
        let wire = Wire::new(world.clock.clone(), chance::Chance::of(0), manners);
        let mongo = FakeBackend::new(wire, 0);
        let tiers = std::sync::Arc::get_mut(&mut world.tiers).unwrap();
        tiers.backend = mongo.clone();
        let follower = InvalidationListener {
            source: mongo.clone(),
            cache: tiers.cache.clone(),
            clock: world.clock.clone(),
            poll_interval: pace,
            timeout: TIMEOUT,
            metrics: StreamMetrics::new(&Series::default(), Counter::noop(), world.clock.clone()),
            rng: fastrand::Rng::with_seed(1),
        };
        drop(follower.start(&tiers.tasks, tiers.tasks.closed().child_token()));
        world.mongo = mongo;
        world
    }

    /// Serves the next call of this kind.
    async fn serve_next(&self, wanted: fn(&Operation) -> bool) {
        let call = self.mongo.arrival(wanted).await;
        self.mongo.serve(call);
    }

    /// From now on, the database answers everything at once.
    fn serve_all(&self) {
        self.mongo.wire.state().manners.healed = true;
        for call in self.mongo.wire.waiting() {
            self.mongo.serve(call);
        }
    }

    /// How long ago the moment is up to which the cache has heard of all changes.
    fn lag(&self) -> Duration {
        self.clock.now().since(self.tiers.cache.synced_through())
    }
}

/// ```text
/// store                         MongoDB
/// aggregate ------------------> newest entry: T. First token: T + 1, a time of which there is no entry
/// getMore --------------------> empty, the token is still T + 1
///           (the reply is held)
///                               another instance changes the session: its entry is T + 1
/// hello ----------------------> T + 1
///      <----------------------- the fence is answered
///      <----------------------- the reply to getMore, which has not seen the change
/// getMore --------------------> (no reply any more)
/// ```
///
/// Were the empty batch taken as proof of all up to and with T + 1, it would pass the fence, and the entry
/// would be served until `max_staleness` after the fence.
async fn the_opening_token_does_not_pass_a_fence_of_its_time(resumed: bool) {
    let world = World::following();
    let id = world.stored(1);
    world.serve_next(is_open).await;
    if resumed {
        let more = world.mongo.arrival(is_more).await;
        world.mongo.fail(more);
        world.serve_next(is_open).await;
    }
    world.serve_next(is_fence).await;
    assert_eq!(world.load(id).await, Some(1));

    let more = world.mongo.arrival(is_more).await;
    world.mongo.apply(more);
    let changed_at = world.clock.now();
    world.mongo.put(id.key(), Some(Session { data: data(2), expires: world.in_an_hour() }));
    world.serve_next(is_fence).await;
    let fenced_at = world.clock.now();
    assert!(fenced_at > changed_at);
    // The follower takes the answer of the fence first.
    tokio::task::yield_now().await;
    world.mongo.answer(more);
    world.mongo.arrival(is_more).await;

    let waited = world.clock.now().since(changed_at);
    tokio::time::advance(MAX_STALENESS.checked_sub(waited).unwrap()).await;
    assert_eq!(world.load(id).await, Some(1), "the bound is not over yet");
    tokio::time::advance(Duration::from_millis(1)).await;
    assert_eq!(world.load(id).await, Some(2), "served past the bound");
}

#[tokio::test(start_paused = true)]
async fn an_empty_batch_that_repeats_the_opening_token_does_not_pass_a_fence_of_its_time() {
    the_opening_token_does_not_pass_a_fence_of_its_time(false).await;
}

#[tokio::test(start_paused = true)]
async fn nor_does_it_after_the_stream_was_resumed_from_that_token() {
    the_opening_token_does_not_pass_a_fence_of_its_time(true).await;
}

/// ```text
/// store                         member A                        member B
/// aggregate ------------------> feeds the stream
///                               is primary no more              is elected
///                                                               another instance changes the session
/// hello ------------------------------------------------------> its newest entry
///      <------------------------------------------------------- the fence is answered
/// getMore --------------------> empty: A has not replicated the change
///      <----------------------- asked for after the fence was answered
/// getMore --------------------> (no reply any more)
/// ```
#[tokio::test(start_paused = true)]
async fn an_empty_batch_of_a_deposed_primary_does_not_pass_the_fence_of_its_successor() {
    for have_times in [true, false] {
        let world = World::following_tokens(have_times);
        let id = world.stored(1);
        world.serve_next(is_open).await;
        world.serve_next(is_fence).await;
        world.serve_next(is_more).await;
        assert_eq!(world.load(id).await, Some(1));

        let before = world.mongo.arrival(is_more).await;
        world.mongo.wire.state().database.oplog.elect();
        let changed_at = world.clock.now();
        world.mongo.put(id.key(), Some(Session { data: data(2), expires: world.in_an_hour() }));
        world.serve_next(is_fence).await;
        tokio::task::yield_now().await;
        world.mongo.serve(before);
        let after = world.mongo.arrival(is_more).await;
        assert_ne!(after, before);
        world.mongo.serve(after);
        world.mongo.arrival(is_more).await;

        let waited = world.clock.now().since(changed_at);
        let left = MAX_STALENESS.checked_sub(waited).unwrap() + Duration::from_millis(1);
        tokio::time::advance(left).await;
        assert_eq!(world.load(id).await, Some(2), "served past the bound, times: {have_times}");
    }
}

/// The newest entry of the oplog has the very time of the opening token, and nothing reports it: a touch. Every
/// fence is answered with that time, and no token goes past it.
#[tokio::test(start_paused = true)]
async fn on_an_idle_replica_set_the_lease_is_renewed() {
    for resumed in [false, true] {
        let world = World::following();
        let id = world.stored(1);
        world.serve_next(is_open).await;
        world.mongo.wire.state().database.touch(id.key(), world.in_an_hour());
        world.serve_all();
        tokio::time::sleep(MAX_STALENESS).await;
        if resumed {
            world.mongo.wire.state().streams[0] = Some(crate::invalidation::source::Fault::Passing);
        }
        for _ in 0..100 {
            tokio::time::sleep(Duration::from_millis(500)).await;
            assert!(world.lag() < MAX_STALENESS, "{:?}, resumed: {resumed}", world.lag());
        }
    }
}
