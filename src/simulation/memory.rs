//! What is held, in which form, and when it is given back.

use std::time::Duration;

use metrics_util::debugging::{DebugValue, DebuggingRecorder};

use super::*;

impl World {
    fn compact() -> Self {
        Self::with(Limits { compact: true, ..limits() })
    }

    fn ends_in(&self, time: Duration) -> RawId {
        let (id, expires) = (RawId::draw(), self.clock.wall().after(time));
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
    cache.remove_ended(|| false);
    assert_eq!(cache.entries().0, 2);
    tokio::time::advance(Duration::from_secs(1)).await;
    cache.remove_ended(|| true);
    assert_eq!(cache.entries().0, 2, "it was told to stop");
    cache.remove_ended(|| false);
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
        cache.ticket(id.key()).publish(session);
        false
    };
    cache.remove_ended(prolongs);
    let made = world.mongo.made();
    assert_eq!(world.load(id).await, Some(2));
    assert_eq!(world.mongo.made(), made);
}

#[tokio::test(start_paused = true)]
async fn they_are_given_back_without_being_asked_for() {
    let world = World::new();
    world.load(world.ends_in(Duration::from_secs(1))).await;
    let ends = CancellationToken::new();
    let tidy = tokio::spawn(world.tiers.cache.clone().tidy(ends.clone()));
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

/// It is boxed for each hit, which must not pay for the room that a miss needs.
#[tokio::test]
async fn a_load_is_small_until_it_misses() {
    let world = World::new();
    let size = size_of_val(&world.tiers.load(RawId::draw()));
    assert!(size <= 160, "{size}");
}

#[tokio::test]
async fn a_cache_that_is_emptied_for_good_holds_nothing_however_large_it_was() {
    let world = World::with(Limits { max_bytes: 1 << 30, ..limits() });
    let cache = &world.tiers.cache;
    for id in 0..20_000 {
        let session = Session { data: data(1), expires: world.in_an_hour() };
        cache.ticket(RawId(id).key()).publish(session);
    }
    assert!(cache.standing().entries > 10_000);
    cache.empty();
    let left = cache.standing();
    assert_eq!((left.entries, left.bytes), (0, 0));
}
