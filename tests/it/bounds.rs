//! The bounds of the cache: how stale an entry may get, and how large the cache may get.

use std::time::{Duration, Instant};

use futures::StreamExt;
use tower_sessions::SessionStore;
use tower_sessions::session::Id;
use tower_sessions_moka_mongodb_store::{CachedMongoStore, EvictionPolicy};

use crate::common::{
    Commands, FOREVER, Meters, cache_of, create, eventually, mongo, other_instance, record, uri,
};

#[tokio::test]
async fn another_instance_sees_a_delete_within_the_bound() {
    const BOUND: Duration = Duration::from_millis(100);
    let uri = uri();
    let here = cache_of(&other_instance(&uri).await).await;
    let there = CachedMongoStore::builder(other_instance(&uri).await).max_staleness(BOUND);
    let there = there.build().await.unwrap();
    for _ in 0..5 {
        let record = create(&here).await;
        assert!(there.load(&record.id).await.unwrap().is_some());
        here.delete(&record.id).await.unwrap();
        let deleted = Instant::now();
        eventually("the other instance sees it", async || {
            let asked = Instant::now();
            let seen = there.load(&record.id).await.unwrap().is_some();
            assert!(!seen || asked - deleted <= BOUND, "served {:?} later", asked - deleted);
            !seen
        })
        .await;
    }
}

#[tokio::test]
async fn another_instance_sees_a_change_within_the_bound_and_never_goes_back() {
    const BOUND: Duration = Duration::from_millis(50);
    let uri = uri();
    let here = cache_of(&other_instance(&uri).await).await;
    let there = CachedMongoStore::builder(other_instance(&uri).await).max_staleness(BOUND);
    let there = there.build().await.unwrap();
    let mut record = create(&here).await;
    let mut seen = 0;
    for version in 1..=30_u64 {
        record.data.insert("version".to_owned(), version.into());
        here.save(&record).await.unwrap();
        let saved = Instant::now();
        eventually("the other instance sees it", async || {
            let asked = Instant::now();
            let loaded = there.load(&record.id).await.unwrap().unwrap();
            let now = loaded.data.get("version").and_then(serde_json::Value::as_u64).unwrap_or(0);
            assert!(now >= seen, "{now} after {seen}");
            assert!(now == version || asked - saved <= BOUND);
            seen = now;
            now == version
        })
        .await;
    }
}

#[tokio::test]
async fn max_staleness_of_zero_reads_on_every_load() {
    let commands = Commands::default();
    let store = CachedMongoStore::builder(commands.mongo(&uri()).await);
    let store = store.max_staleness(Duration::ZERO).build().await.unwrap();
    let record = create(&store).await;
    for finds in 1..4 {
        // An entry that is read within the same nanosecond would be young enough.
        tokio::time::sleep(Duration::from_millis(1)).await;
        assert!(store.load(&record.id).await.unwrap().is_some());
        assert_eq!(commands.sent("find"), finds);
    }
}

#[tokio::test]
async fn cache_keeps_to_max_bytes_under_ten_thousand_sessions() {
    const LIMIT: f64 = 1_048_576.0;
    for policy in [EvictionPolicy::Lru, EvictionPolicy::TinyLfu] {
        let mongo = mongo().await;
        let (meters, guard) = Meters::install();
        let store = CachedMongoStore::builder(mongo).max_bytes(1 << 20).eviction_policy(policy);
        let store = store.max_staleness(FOREVER).build().await.unwrap();
        drop(guard);
        assert!((meters.value("session_store_cache_limit_bytes") - LIMIT).abs() < 1.0);
        futures::stream::iter(0..10_000)
            .for_each_concurrent(64, |made| {
                let store = &store;
                let meters = &meters;
                async move {
                    create(store).await;
                    if made % 500 == 499 {
                        // moka does its maintenance after several writes, not after each one.
                        let bytes = meters.value("session_store_cache_bytes");
                        assert!(bytes < 2.0 * LIMIT, "{bytes}");
                    }
                }
            })
            .await;
        eventually("moka has done its maintenance", async || {
            store.load(&Id::default()).await.unwrap();
            meters.value("session_store_cache_bytes") <= LIMIT
        })
        .await;
        let entries = meters.value("session_store_cache_entries");
        assert!(entries > 100.0 && entries < 2_000.0, "{entries}");
        assert!(meters.value("session_store_cache_evictions_total{cause=size}") > 8_000.0);
        assert_eq!(store.length().await.unwrap(), 10_000, "in the database they all are");
    }
}

#[tokio::test]
async fn cache_keeps_to_max_entries() {
    let mongo = mongo().await;
    let (meters, guard) = Meters::install();
    let store = CachedMongoStore::builder(mongo).max_entries(10).max_staleness(FOREVER);
    let store = store.build().await.unwrap();
    drop(guard);
    for _ in 0..100 {
        create(&store).await;
    }
    eventually("moka has done its maintenance", async || {
        store.load(&Id::default()).await.unwrap();
        meters.value("session_store_cache_entries") <= 10.0
    })
    .await;
    assert!(meters.value("session_store_cache_entries") >= 5.0);
}

#[tokio::test]
async fn flood_of_invented_ids_evicts_no_session() {
    let commands = Commands::default();
    let store = CachedMongoStore::builder(commands.mongo(&uri()).await);
    let store = store.max_bytes(256 << 10).max_absent_ids(100).max_staleness(FOREVER);
    let store = store.build().await.unwrap();
    let mut records = Vec::new();
    for _ in 0..50 {
        records.push(create(&store).await);
    }
    futures::stream::iter(0..3_000)
        .for_each_concurrent(64, |_| async {
            assert_eq!(store.load(&Id::default()).await.unwrap(), None);
        })
        .await;
    let before = commands.sent("find");
    for record in &records {
        assert!(store.load(&record.id).await.unwrap().is_some());
    }
    assert_eq!(commands.sent("find"), before, "all are still cached");
}

#[tokio::test]
async fn absent_id_is_read_once() {
    let commands = Commands::default();
    let store = cache_of(&commands.mongo(&uri()).await).await;
    let id = record().id;
    for _ in 0..10 {
        assert_eq!(store.load(&id).await.unwrap(), None);
    }
    assert_eq!(commands.sent("find"), 1);
}

#[tokio::test]
async fn store_with_max_bytes_of_zero_caches_nothing_and_works() {
    let commands = Commands::default();
    let store =
        CachedMongoStore::builder(commands.mongo(&uri()).await).max_bytes(0).max_absent_ids(0);
    let store = store.build().await.unwrap();
    let record = create(&store).await;
    for _ in 0..20 {
        assert_eq!(store.load(&record.id).await.unwrap().unwrap().data, record.data);
        assert_eq!(store.load(&Id::default()).await.unwrap(), None);
    }
    store.delete(&record.id).await.unwrap();
    assert_eq!(store.load(&record.id).await.unwrap(), None);
    assert!(commands.sent("find") > 20);
}
