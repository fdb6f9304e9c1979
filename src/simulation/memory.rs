//! What is held, in which form, and when it is given back.

use std::time::Duration;

use metrics_util::debugging::{DebugValue, DebuggingRecorder};

use crate::cache::Lookup;
use crate::simulation::*;

impl World {
    fn compact() -> Self {
        Self::with(CacheConfig { compact: true, ..limits() })
    }

    fn ends_in(&self, time: Duration) -> RawId {
        let (id, expires) = (RawId::random(), self.clock.wall().after(time));
        self.mongo.put(id.key(), Some(Session { data: data(1), expires }));
        id
    }
}

#[tokio::test(start_paused = true)]
async fn a_session_that_is_kept_packed_is_the_one_that_was_read_and_the_one_that_was_saved() {
    let world = World::compact();
    let id = world.stored(1);
    assert_eq!(world.load(id).await, Some(1));
    let made = world.mongo.made();
    assert_eq!(world.load(id).await, Some(1));
    world.save(id, 2).await.unwrap();
    assert_eq!(world.load(id).await, Some(2));
    assert_eq!(world.mongo.made(), made + 1, "the save alone");
    world.delete(id).await;
    assert_eq!(world.load(id).await, None);
}

#[tokio::test(start_paused = true)]
async fn sessions_that_have_ended_are_given_back_and_counted_and_no_others() {
    let recorder = DebuggingRecorder::new();
    let world = metrics::with_local_recorder(&recorder, World::new);
    let (short, long) = (world.ends_in(Duration::from_secs(2)), world.stored(1));
    world.load(short).await;
    world.load(long).await;
    let cache = &world.tiers.cache;
    tokio::time::advance(Duration::from_secs(1)).await;
    cache.sweep_expired(|| false);
    assert_eq!(cache.entries().0, 2);
    tokio::time::advance(Duration::from_secs(1)).await;
    cache.sweep_expired(|| true);
    assert_eq!(cache.entries().0, 2, "it was told to stop");
    cache.sweep_expired(|| false);
    assert_eq!(cache.entries().0, 1);
    let made = world.mongo.made();
    assert_eq!(world.load(long).await, Some(1));
    assert_eq!(world.mongo.made(), made);

    let snapshot = recorder.snapshotter().snapshot().into_vec();
    let value = |name, cause| {
        let mut found = snapshot.iter().filter(|(key, ..)| {
            let key = key.key();
            key.name() == name && key.labels().all(|label| label.value() == cause)
        });
        found.next().map(|(.., value)| value)
    };
    let evictions = value("session_store_cache_evictions_total", "expired");
    assert_eq!(evictions, Some(&DebugValue::Counter(1)));
    let entries = value("session_store_cache_entries", "");
    assert_eq!(entries, Some(&DebugValue::Gauge(1.0.into())));
}

#[tokio::test(start_paused = true)]
async fn a_session_that_is_prolonged_while_it_is_found_to_have_ended_stays() {
    let world = World::new();
    let id = world.ends_in(Duration::from_secs(1));
    world.load(id).await;
    tokio::time::advance(Duration::from_secs(1)).await;
    let cache = &world.tiers.cache;
    // Asked between the look at an entry and its removal.
    let prolongs = || {
        let session = Session { data: data(2), expires: world.in_an_hour() };
        cache.begin(id.key()).publish(session);
        false
    };
    cache.sweep_expired(prolongs);
    let made = world.mongo.made();
    assert_eq!(world.load(id).await, Some(2));
    assert_eq!(world.mongo.made(), made);
}

#[tokio::test(start_paused = true)]
async fn they_are_given_back_without_being_asked_for() {
    let world = World::new();
    world.load(world.ends_in(Duration::from_secs(1))).await;
    let ends = CancellationToken::new();
    let tidy = tokio::spawn(world.tiers.cache.clone().run_sweeper(ends.clone()));
    for _ in 0..1_000 {
        tokio::time::sleep(Duration::from_secs(1)).await;
        if world.tiers.cache.entries().0 == 0 {
            break;
        }
    }
    assert_eq!(world.tiers.cache.entries().0, 0);
    ends.cancel();
    tidy.await.unwrap();
}

/// Whether the cache answers with a session of this key.
fn is_served(world: &World, id: RawId) -> bool {
    matches!(world.tiers.cache.get(id.key()), Lookup::Hit(_))
}

#[tokio::test(start_paused = true)]
async fn a_session_that_a_step_of_the_wall_clock_ends_is_served_for_a_second_at_most() {
    let world = World::with(CacheConfig { coherence: Coherence::SoleWriter, ..limits() });
    let ends = CancellationToken::new();
    let tidy = tokio::spawn(world.tiers.cache.clone().run_sweeper(ends.clone()));
    let short = world.ends_in(Duration::from_secs(3_600));
    let long = world.ends_in(Duration::from_secs(86_400));
    for id in [short, long] {
        world.load(id).await;
        assert!(is_served(&world, id));
    }
    // At any point of the second.
    tokio::time::sleep(Duration::from_millis(12_340)).await;
    world.clock.step_wall(time::Duration::hours(2));
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert!(!is_served(&world, short), "it has expired by the wall clock");
    assert!(is_served(&world, long));
    // Stepped back, it is what MongoDB says again, and ends when the wall clock comes to its expiry.
    world.clock.step_wall(time::Duration::hours(-3));
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert!(is_served(&world, long));
    tokio::time::sleep(Duration::from_secs(86_400)).await;
    assert!(is_served(&world, long), "an hour is left");
    tokio::time::sleep(Duration::from_secs(3_600)).await;
    assert!(!is_served(&world, long));
    ends.cancel();
    tidy.await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn an_entry_that_is_placed_tells_the_whole_cache_of_a_step_of_the_wall_clock() {
    let world = World::with(CacheConfig { coherence: Coherence::SoleWriter, ..limits() });
    let (short, long) = (world.ends_in(Duration::from_secs(3_600)), RawId::random());
    world.load(short).await;
    world.clock.step_wall(time::Duration::hours(2));
    assert!(is_served(&world, short), "nobody has looked at the wall clock yet");
    world.mongo.put(long.key(), Some(Session { data: data(1), expires: world.in_an_hour() }));
    world.load(long).await;
    assert!(!is_served(&world, short));
}

/// It is boxed for each hit, which must not pay for the room that a miss needs.
#[tokio::test]
async fn a_load_is_small_until_it_misses() {
    let world = World::new();
    let size = size_of_val(&world.tiers.load(RawId::random()));
    assert!(size <= 160, "{size}");
}

#[tokio::test]
async fn a_cache_that_is_emptied_for_good_holds_nothing_however_large_it_was() {
    let world = World::with(CacheConfig { max_bytes: 1 << 30, ..limits() });
    let cache = &world.tiers.cache;
    for id in 0..20_000 {
        let session = Session { data: data(1), expires: world.in_an_hour() };
        cache.begin(RawId(id).key()).publish(session);
    }
    assert!(cache.stats().entries > 10_000);
    cache.purge();
    let left = cache.stats();
    assert_eq!((left.entries, left.bytes), (0, 0));
}
