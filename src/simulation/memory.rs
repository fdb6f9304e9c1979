//! The memory of the cache: compact entries, expired sessions, and steps of the wall clock.

use std::time::Duration;

use metrics_util::debugging::{DebugValue, DebuggingRecorder};
use tokio_util::sync::CancellationToken;

use crate::cache::{CacheConfig, Coherence, Lookup};
use crate::session::Session;
use crate::session::id::RawId;
use crate::simulation::types::data;
use crate::simulation::world::{World, cache_config};

impl World {
    fn compact() -> Self {
        Self::with(&CacheConfig { compact: true, ..cache_config() })
    }

    /// Stores a session that expires after `time`.
    fn stored_for(&self, time: Duration) -> RawId {
        let id = RawId::random();
        let expires = self.clock.wall().after(time);
        self.mongo.put(id.key(), Some(Session::new(data(1), expires)));
        id
    }
}

#[tokio::test(start_paused = true)]
async fn a_compact_entry_has_the_data_that_was_read_or_saved() {
    let world = World::compact();
    let id = world.stored(1);
    assert_eq!(world.load(id).await, Some(1));
    let made = world.mongo.made();
    assert_eq!(world.load(id).await, Some(1));
    world.save(id, 2).await.unwrap();
    assert_eq!(world.load(id).await, Some(2));
    assert_eq!(world.mongo.made(), made + 1, "only the save was sent");
    world.delete(id).await;
    assert_eq!(world.load(id).await, None);
}

#[tokio::test(start_paused = true)]
async fn a_sweep_removes_and_counts_expired_sessions_only() {
    let recorder = DebuggingRecorder::new();
    let world = metrics::with_local_recorder(&recorder, World::new);
    let short = world.stored_for(Duration::from_secs(2));
    let long = world.stored(1);
    world.load(short).await;
    world.load(long).await;
    let cache = &world.tiers.cache;
    tokio::time::advance(Duration::from_secs(1)).await;
    cache.sweep_expired(|| false);
    assert_eq!(cache.entries().0, 2);
    tokio::time::advance(Duration::from_secs(1)).await;
    cache.sweep_expired(|| true);
    assert_eq!(cache.entries().0, 2, "the sweep was stopped");
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
async fn a_sweep_keeps_a_session_that_is_prolonged_during_the_sweep() {
    let world = World::new();
    let id = world.stored_for(Duration::from_secs(1));
    world.load(id).await;
    tokio::time::advance(Duration::from_secs(1)).await;
    let cache = &world.tiers.cache;
    // The sweep calls this after it has seen an expired entry and before it removes the entry.
    let prolong = || {
        let session = Session::new(data(2), world.in_an_hour());
        cache.begin(id.key()).publish(session);
        false
    };
    cache.sweep_expired(prolong);
    let made = world.mongo.made();
    assert_eq!(world.load(id).await, Some(2));
    assert_eq!(world.mongo.made(), made);
}

#[tokio::test(start_paused = true)]
async fn the_sweeper_removes_expired_sessions_by_itself() {
    let world = World::new();
    world.load(world.stored_for(Duration::from_secs(1))).await;
    let ends = CancellationToken::new();
    let sweeper = tokio::spawn(world.tiers.cache.clone().run_sweeper(ends.clone()));
    for _ in 0..1_000 {
        tokio::time::sleep(Duration::from_secs(1)).await;
        if world.tiers.cache.entries().0 == 0 {
            break;
        }
    }
    assert_eq!(world.tiers.cache.entries().0, 0);
    ends.cancel();
    sweeper.await.unwrap();
}

/// Whether the cache returns the session without a read.
fn is_served(world: &World, id: RawId) -> bool {
    matches!(world.tiers.cache.get(id.key()), Lookup::Hit(_))
}

#[tokio::test(start_paused = true)]
async fn a_session_that_expires_by_a_step_of_the_wall_clock_is_served_for_a_second_at_most() {
    let world = World::with(&CacheConfig { coherence: Coherence::SoleWriter, ..cache_config() });
    let ends = CancellationToken::new();
    let sweeper = tokio::spawn(world.tiers.cache.clone().run_sweeper(ends.clone()));
    let short = world.stored_for(Duration::from_secs(3_600));
    let long = world.stored_for(Duration::from_secs(86_400));
    for id in [short, long] {
        world.load(id).await;
        assert!(is_served(&world, id));
    }
    // The step of the clock may come at any point of the sweeper's second.
    tokio::time::sleep(Duration::from_millis(12_340)).await;
    world.clock.step_wall(time::Duration::hours(2));
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert!(!is_served(&world, short), "it has expired by the wall clock");
    assert!(is_served(&world, long));
    // After a step back, the session is live again, and expires when the wall clock reaches its expiry.
    world.clock.step_wall(time::Duration::hours(-3));
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert!(is_served(&world, long));
    tokio::time::sleep(Duration::from_secs(86_400)).await;
    assert!(is_served(&world, long), "an hour is left");
    tokio::time::sleep(Duration::from_secs(3_600)).await;
    assert!(!is_served(&world, long));
    ends.cancel();
    sweeper.await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn an_insert_makes_the_cache_notice_a_step_of_the_wall_clock() {
    let world = World::with(&CacheConfig { coherence: Coherence::SoleWriter, ..cache_config() });
    let short = world.stored_for(Duration::from_secs(3_600));
    let long = RawId::random();
    world.load(short).await;
    world.clock.step_wall(time::Duration::hours(2));
    assert!(is_served(&world, short), "nothing has read the wall clock yet");
    world.mongo.put(long.key(), Some(Session::new(data(1), world.in_an_hour())));
    world.load(long).await;
    assert!(!is_served(&world, short));
}

/// tower-sessions boxes the future of each load. A hit must not pay for the memory that a miss needs.
#[tokio::test]
async fn the_future_of_a_load_is_small_until_it_misses() {
    let world = World::new();
    let size = size_of_val(&world.tiers.load(RawId::random()));
    assert!(size <= 160, "{size}");
}

#[tokio::test]
async fn a_purged_cache_is_empty_whatever_its_size_was() {
    let world = World::with(&CacheConfig { max_bytes: 1 << 30, ..cache_config() });
    let cache = &world.tiers.cache;
    for id in 0..20_000 {
        let session = Session::new(data(1), world.in_an_hour());
        cache.begin(RawId(id).key()).publish(session);
    }
    assert!(cache.stats().entries > 10_000);
    cache.purge();
    let left = cache.stats();
    assert_eq!((left.entries, left.bytes), (0, 0));
}
