//! The metrics: what they count, under which names.

use std::time::Duration;

use tower_sessions::SessionStore;
use tower_sessions::session::Id;
use tower_sessions_moka_mongodb_store::mongodb::bson::doc;
use tower_sessions_moka_mongodb_store::{CachedMongoStore, MongoStore};

use crate::common::{FOREVER, Meters, PATIENCE, create, eventually, uri};
use crate::proxy::Proxy;

const HITS: &str = "session_store_loads_total{result=hit}";
const MISSES: &str = "session_store_loads_total{result=miss}";
const ABSENT: &str = "session_store_loads_total{result=absent}";
const SHARED: &str = "session_store_loads_total{result=coalesced}";
const ENTRIES: &str = "session_store_cache_entries";
const BYTES: &str = "session_store_cache_bytes";
const DROPPED: &str = "session_store_saves_dropped_total";
const FOR_SIZE: &str = "session_store_cache_evictions_total{cause=size}";

/// Both tiers, with metrics of their own.
async fn metered(uri: &str) -> (Meters, MongoStore, CachedMongoStore) {
    let (meters, guard) = Meters::install();
    let mongo = MongoStore::builder().uri(uri).operation_timeout(PATIENCE).build().await.unwrap();
    let cached = CachedMongoStore::builder(mongo.clone()).max_staleness(FOREVER);
    let cached = cached.build().await.unwrap();
    drop(guard);
    (meters, mongo, cached)
}

/// Compares counts, which are whole.
#[track_caller]
pub(crate) fn assert_count(meters: &Meters, name: &str, expected: u32) {
    let value = meters.value(name);
    assert!((value - f64::from(expected)).abs() < 0.5, "{name} is {value} and not {expected}");
}

pub(crate) fn operations(verb: &str, outcome: &str) -> String {
    format!("session_store_mongo_operations_total{{verb={verb},outcome={outcome}}}")
}

fn durations(verb: &str) -> String {
    format!("session_store_mongo_operation_duration_seconds{{verb={verb}}}")
}

#[tokio::test]
async fn loads_are_counted_by_their_result() {
    let (meters, mongo, store) = metered(&uri()).await;
    let (warm, cold) = (create(&store).await, create(&mongo).await);
    store.load(&warm.id).await.unwrap();
    store.load(&warm.id).await.unwrap();
    assert_count(&meters, HITS, 2);
    store.load(&cold.id).await.unwrap();
    assert_count(&meters, MISSES, 1);
    store.load(&cold.id).await.unwrap();
    assert_count(&meters, HITS, 3);
    let id = Id::default();
    store.load(&id).await.unwrap();
    assert_count(&meters, MISSES, 2);
    store.load(&id).await.unwrap();
    assert_count(&meters, ABSENT, 1);
    assert_count(&meters, HITS, 3);
    assert_count(&meters, SHARED, 0);
}

#[tokio::test]
async fn loads_that_wait_for_anothers_read_are_counted_as_shared() {
    let proxy = Proxy::start().await;
    let (meters, mongo, store) = metered(proxy.uri()).await;
    let record = create(&mongo).await;
    let mut held = proxy.hold("find");
    let loads = futures::future::join_all((0..5).map(|_| store.load(&record.id)));
    let mut loads = Box::pin(loads);
    assert!(futures::poll!(&mut loads).is_pending());
    held.reached().await;
    held.deliver();
    assert!(loads.await.into_iter().all(|loaded| loaded.unwrap().is_some()));
    assert_count(&meters, MISSES, 1);
    assert_count(&meters, SHARED, 4);
}

#[tokio::test]
async fn every_operation_is_counted_and_timed_by_its_verb() {
    let (meters, mongo, store) = metered(&uri()).await;
    let record = create(&store).await;
    store.save(&record).await.unwrap();
    mongo.save(&record).await.unwrap();
    mongo.load(&record.id).await.unwrap();
    store.length().await.unwrap();
    store.contains(record.id).await.unwrap();
    store.delete(&record.id).await.unwrap();
    let again = create(&store).await;
    store.clear().await.unwrap();
    assert!(mongo.load(&again.id).await.unwrap().is_none());
    for (verb, count) in
        [("insert", 2), ("replace", 1), ("touch", 1), ("find", 3), ("remove", 1), ("count", 1)]
    {
        assert_count(&meters, &operations(verb, "ok"), count);
        assert_count(&meters, &durations(verb), count);
    }
    for verb in ["clear", "index"] {
        assert!(meters.value(&operations(verb, "ok")) >= 1.0, "{verb}");
        assert!(meters.value(&durations(verb)) >= 1.0, "{verb}");
    }
    for outcome in ["timeout", "unreachable", "error", "duplicate"] {
        for verb in ["insert", "replace", "find", "remove", "clear", "count", "list", "index"] {
            assert_count(&meters, &operations(verb, outcome), 0);
        }
    }
}

#[tokio::test]
async fn failures_are_counted_by_their_outcome() {
    let (meters, mongo, _) = metered(&uri()).await;
    let record = create(&mongo).await;
    let newer = doc! { "$set": { "format": 2 } };
    mongo.collection().update_many(doc! {}, newer).await.unwrap();
    mongo.load(&record.id).await.unwrap_err();
    assert_count(&meters, &operations("find", "error"), 1);

    let unique = doc! { "createIndexes": "sessions", "indexes": [
    { "key": { "rev": 1 }, "name": "one", "unique": true, "partialFilterExpression": {} },
    { "key": { "format": 1 }, "name": "other", "unique": true }] };
    mongo.clear().await.unwrap();
    let sessions = mongo.collection();
    let database = sessions.client().database(&sessions.namespace().db);
    database.run_command(unique).await.unwrap();
    create(&mongo).await;
    mongo.create(&mut crate::common::record()).await.unwrap_err();
    assert!(meters.value(&operations("insert", "duplicate")) >= 2.0, "each draw is one");
    assert!(meters.value("session_store_mongo_retries_total{cause=id_taken}") >= 2.0);

    let proxy = Proxy::start().await;
    let (meters, guard) = Meters::install();
    let short = Duration::from_millis(300);
    let slow = MongoStore::builder().uri(proxy.uri()).operation_timeout(short).build().await;
    drop(guard);
    let held = proxy.hold("find");
    slow.unwrap().load(&record.id).await.unwrap_err();
    eventually("it is counted", async || {
        meters.value(&operations("find", "timeout")) > 0.5 && meters.value(&durations("find")) > 0.5
    })
    .await;
    drop(held);
}

#[tokio::test]
async fn saves_of_what_is_gone_are_counted() {
    let (meters, mongo, store) = metered(&uri()).await;
    let record = create(&store).await;
    store.save(&record).await.unwrap();
    assert_count(&meters, DROPPED, 0);
    store.delete(&record.id).await.unwrap();
    store.save(&record).await.unwrap();
    assert_count(&meters, DROPPED, 1);
    mongo.save(&record).await.unwrap();
    assert_count(&meters, DROPPED, 2);
    assert_count(&meters, &operations("touch", "ok"), 1);
    assert_count(&meters, &operations("replace", "ok"), 2);
}

#[tokio::test]
async fn the_gauges_go_up_and_come_back_to_zero() {
    let (meters, _, store) = metered(&uri()).await;
    assert_count(&meters, ENTRIES, 0);
    assert_count(&meters, BYTES, 0);
    let mut records = Vec::new();
    for count in 1..=20 {
        records.push(create(&store).await);
        assert_count(&meters, ENTRIES, count);
    }
    let full = meters.value(BYTES);
    assert!(full > 20.0 * 400.0 && full < 20.0 * 20_000.0, "{full}");
    // Another version takes the place of the one before, and a removed one gives its place back.
    records[0].data.insert("more".to_owned(), "x".repeat(10_000).into());
    store.save(&records[0]).await.unwrap();
    store.delete(&records[1].id).await.unwrap();
    eventually("one is replaced and one removed", async || {
        tidy(&store).await;
        (meters.value(ENTRIES) - 19.0).abs() < 0.5
    })
    .await;
    let bytes = meters.value(BYTES);
    assert!(bytes > full + 7_000.0 && bytes < full + 11_000.0, "{full} {bytes}");
    assert_eq!(store.clear().await.unwrap(), 19);
    eventually("all are gone", async || {
        tidy(&store).await;
        meters.value(ENTRIES).abs() < 0.5 && meters.value(BYTES).abs() < 0.5
    })
    .await;
    assert_count(&meters, FOR_SIZE, 0);
}

#[tokio::test]
async fn what_is_let_go_for_size_is_counted_so() {
    let mongo = MongoStore::connect(uri()).await.unwrap();
    let (meters, guard) = Meters::install();
    let small = CachedMongoStore::builder(mongo).max_entries(5).build().await.unwrap();
    drop(guard);
    for _ in 0..50 {
        create(&small).await;
    }
    eventually("the rest is let go", async || {
        tidy(&small).await;
        meters.value(FOR_SIZE) >= 45.0
    })
    .await;
}

#[tokio::test]
async fn no_metric_has_an_id_or_a_database_in_its_labels() {
    let uri = uri();
    let (meters, _, store) = metered(&uri).await;
    let record = create(&store).await;
    store.load(&record.id).await.unwrap();
    store.delete(&record.id).await.unwrap();
    let names = meters.names();
    assert!(names.len() > 10, "{names:?}");
    let database = store.collection().namespace().db;
    for name in names {
        assert!(name.starts_with("session_store_"), "{name}");
        assert!(!name.contains(&record.id.to_string()) && !name.contains(&database), "{name}");
    }
}

/// moka looks after what was removed and what has expired when it is used.
async fn tidy(store: &CachedMongoStore) {
    let gone = create(store).await;
    store.delete(&gone.id).await.unwrap();
}
