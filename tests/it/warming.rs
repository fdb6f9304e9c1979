//! The warm-up: a cache that is filled before the first load, on the real server.

use std::time::{Duration, Instant};

use mongodb::bson::{Binary, DateTime, Document, doc, spec::BinarySubtype};
use serde_json::json;
use tower_sessions::SessionStore;
use tower_sessions::session::Record;
use tower_sessions_moka_mongodb_store::{
    CachedMongoStore, Coherence, ErrorKind, MongoStore, SessionKey, WarmUpLimit, mongodb,
};

use crate::common::{
    Commands, FOREVER, Meters, PATIENCE, Store, cache_of, create, eventually, mongo,
    other_instance, record, uri,
};
use crate::proxy::Proxy;

fn id(record: &Record) -> Binary {
    let bytes = SessionKey::from(record.id).as_bytes().to_vec();
    Binary { subtype: BinarySubtype::Generic, bytes }
}

/// Sessions. The first one was written last.
async fn sessions(store: &impl Store, count: i64) -> Vec<Record> {
    let documents = store.collection().clone_with_type::<Document>();
    let mut records = Vec::new();
    for age in 0..count {
        let record = create(store).await;
        let updated = DateTime::from_millis(DateTime::now().timestamp_millis() - age * 1_000);
        let updated = doc! { "$set": { "updated": updated } };
        documents.update_one(doc! { "_id": id(&record) }, updated).await.unwrap();
        records.push(record);
    }
    records
}

#[tokio::test]
async fn warm_cache_answers_without_a_command() {
    let uri = uri();
    let other = other_instance(&uri).await;
    let records = sessions(&other, 130).await;
    let documents = other.collection().clone_with_type::<Document>();
    // One session has expired, and one cannot be read.
    let past = doc! { "$set": { "expires": DateTime::from_millis(1_000) } };
    documents.update_one(doc! { "_id": id(&records[3]) }, past).await.unwrap();
    let broken = doc! { "$set": { "data": 5 } };
    documents.update_one(doc! { "_id": id(&records[4]) }, broken).await.unwrap();

    for compact in [false, true] {
        let commands = Commands::default();
        let store = CachedMongoStore::builder(commands.mongo(&uri).await).compact(compact);
        let store = store.max_staleness(FOREVER).build().await.unwrap();
        let before = commands.sent("find");
        let warmed = store.warm(120).await.unwrap();
        assert_eq!((warmed.sessions, warmed.limit), (119, WarmUpLimit::Sessions));
        assert!(warmed.bytes > 119 * 300, "{warmed:?}");
        assert_eq!(commands.sent("find") - before, 2, "by pages");
        let before = commands.sent("find");
        for record in
            records[..121].iter().filter(|it| ![3, 4].map(|n| records[n].id).contains(&it.id))
        {
            let found = store.load(&record.id).await.unwrap().unwrap();
            assert_eq!(found.data, record.data);
        }
        assert_eq!(commands.sent("find"), before);
        assert!(store.load(&records[121].id).await.unwrap().is_some());
        assert_eq!(commands.sent("find"), before + 1, "the rest is read");
        // Entries that are already in the cache are left alone.
        let again = store.warm(120).await.unwrap();
        assert_eq!((again.sessions, again.bytes), (0, 0));
        assert_eq!(store.warm(0).await.unwrap().sessions, 0);
    }
}

#[tokio::test]
async fn warm_up_displaces_nothing_and_keeps_to_max_bytes() {
    let (meters, _guard) = Meters::install();
    let evicted = || meters.value("session_store_cache_evictions_total{cause=size}");
    let mongo = mongo().await;
    let records = sessions(&mongo, 120).await;
    let build = async || {
        let store = CachedMongoStore::builder(mongo.clone()).max_staleness(FOREVER);
        store.max_bytes(64 << 10).build().await.unwrap()
    };
    let store = build().await;
    // The oldest session is in use.
    let used = records.last().unwrap();
    store.load(&used.id).await.unwrap();
    let first = store.warm(1_000).max_bytes(8 << 10).await.unwrap();
    assert_eq!(first.limit, WarmUpLimit::Bytes);
    assert!(first.sessions > 2 && first.bytes <= 8 << 10, "{first:?}");
    let held = meters.value("session_store_cache_bytes");
    assert!(held <= f64::from(8 << 10), "{held} with the session that was cached before");
    let second = store.warm(1_000).await.unwrap();
    assert_eq!(second.limit, WarmUpLimit::Bytes);
    let held = meters.value("session_store_cache_bytes");
    assert!((0.8..0.9).contains(&(held / f64::from(64 << 10))), "{held}");
    assert!(evicted().abs() < f64::EPSILON, "{}", evicted());
    let third = store.warm(1_000).max_bytes(u64::MAX).await.unwrap();
    assert_eq!(third.limit, WarmUpLimit::Bytes, "never more than the cache may hold");
    assert!(evicted().abs() < f64::EPSILON, "{}", evicted());
    // The latest sessions stay when others are loaded: the cache is full now.
    let fresh = build().await;
    let warmed = fresh.warm(1_000).max_bytes(u64::MAX).await.unwrap().sessions;
    assert!((31..120).contains(&warmed), "{warmed}");
    for _ in 0..20 {
        create(&fresh).await;
    }
    let before = meters.value("session_store_loads_total{result=hit}");
    for record in &records[..10] {
        fresh.load(&record.id).await.unwrap();
    }
    let hits = meters.value("session_store_loads_total{result=hit}") - before;
    assert!((hits - 10.0).abs() < f64::EPSILON, "{hits}");
}

#[tokio::test]
async fn warm_up_keeps_the_latest_sessions_of_a_page_that_does_not_fit() {
    let uri = uri();
    let mongo = other_instance(&uri).await;
    let documents = mongo.collection().clone_with_type::<Document>();
    let mut newest_first = Vec::new();
    for age in (0..60).rev() {
        let mut record = record();
        record.data.insert("much".to_owned(), json!("x".repeat(4_000)));
        mongo.create(&mut record).await.unwrap();
        let updated = DateTime::from_millis(DateTime::now().timestamp_millis() - age * 1_000);
        let updated = doc! { "$set": { "updated": updated } };
        documents.update_one(doc! { "_id": id(&record) }, updated).await.unwrap();
        newest_first.insert(0, record);
    }
    for compact in [false, true] {
        let commands = Commands::default();
        let store = CachedMongoStore::builder(commands.mongo(&uri).await).compact(compact);
        let store = store.max_staleness(FOREVER).build().await.unwrap();
        let warmed = store.warm(60).max_bytes(64 << 10).await.unwrap();
        assert_eq!(warmed.limit, WarmUpLimit::Bytes);
        let kept = usize::try_from(warmed.sessions).unwrap();
        assert!((10..20).contains(&kept), "{warmed:?}");
        let before = commands.sent("find");
        assert!(before < 15, "{before} reads");
        for record in &newest_first[..kept] {
            assert!(store.load(&record.id).await.unwrap().is_some());
        }
        assert_eq!(commands.sent("find"), before, "each of the latest {kept} is cached");
    }
}

#[tokio::test]
async fn warm_up_keeps_to_its_time_limit() {
    let proxy = Proxy::start().await;
    sessions(&other_instance(proxy.direct()).await, 3).await;
    let store = cache_of(&other_instance(proxy.uri()).await).await;
    let none = store.warm(10).within(Duration::ZERO).await.unwrap();
    assert_eq!((none.sessions, none.limit), (0, WarmUpLimit::Time));
    let held = proxy.hold("aggregate");
    let none = store.warm(10).within(Duration::from_millis(300)).await.unwrap();
    assert_eq!((none.sessions, none.limit), (0, WarmUpLimit::Time));
    drop(held);
    assert_eq!(store.warm(10).await.unwrap().sessions, 3);
    store.shutdown().await;
    assert_eq!(store.warm(10).await.unwrap_err().kind(), ErrorKind::Closed);
}

/// A warm-up of two sessions whose read is held.
async fn held_up() -> (
    CachedMongoStore,
    Vec<Record>,
    crate::proxy::HeldReply,
    tokio::task::JoinHandle<tower_sessions_moka_mongodb_store::Result<u64>>,
) {
    let proxy = Proxy::start().await;
    let records = sessions(&other_instance(proxy.direct()).await, 2).await;
    let store = cache_of(&other_instance(proxy.uri()).await).await;
    let mut held = proxy.hold("find");
    let warm = tokio::spawn({
        let store = store.clone();
        async move { store.warm(10).await.map(|warmed| warmed.sessions) }
    });
    held.reached().await;
    (store, records, held, warm)
}

#[tokio::test]
async fn reencryption_never_undoes_a_delete_or_a_save() {
    let (store, records, held, warm) = held_up().await;
    store.delete(&records[0].id).await.unwrap();
    let mut changed = records[1].clone();
    changed.data.insert("more".to_owned(), json!(1));
    store.save(&changed).await.unwrap();
    held.deliver();
    assert_eq!(warm.await.unwrap().unwrap(), 0);
    assert_eq!(store.load(&records[0].id).await.unwrap(), None);
    let found = store.load(&changed.id).await.unwrap().unwrap();
    assert_eq!(found.data, changed.data);
}

#[tokio::test]
async fn reencryption_never_undoes_a_clear() {
    let (store, records, held, warm) = held_up().await;
    assert_eq!(store.clear().await.unwrap(), 2);
    held.deliver();
    assert_eq!(warm.await.unwrap().unwrap(), 0);
    for record in records {
        assert_eq!(store.load(&record.id).await.unwrap(), None);
    }
}

#[tokio::test]
async fn change_of_another_instance_during_a_warm_up_leaves_no_entry() {
    let (store, records, held, warm) = held_up().await;
    let other = store.another().await;
    other.delete(&records[0].id).await.unwrap();
    // If this change has been reported, the other one has been reported too.
    let probe = create(&store).await;
    let mut changed = probe.clone();
    changed.data.insert("more".to_owned(), json!(1));
    other.save(&changed).await.unwrap();
    eventually("the change is reported", async || {
        store.load(&probe.id).await.unwrap().unwrap().data == changed.data
    })
    .await;
    held.deliver();
    assert_eq!(warm.await.unwrap().unwrap(), 1);
    assert_eq!(store.load(&records[0].id).await.unwrap(), None);
}

#[tokio::test]
async fn request_does_not_wait_for_a_warm_up() {
    let (store, records, held, warm) = held_up().await;
    let load = tokio::time::timeout(PATIENCE, store.load(&records[0].id)).await.unwrap();
    assert_eq!(load.unwrap().unwrap().data, records[0].data);
    // Dropping the warm-up has no effect on others either.
    warm.abort();
    assert!(warm.await.unwrap_err().is_cancelled());
    held.deliver();
    for record in &records {
        assert!(store.load(&record.id).await.unwrap().is_some());
    }
}

#[tokio::test]
async fn warm_up_accepts_any_limit_of_time_and_number() {
    let store = cache_of(&mongo().await).await;
    create(&store).await;
    let month = Duration::from_secs(30 * 24 * 3_600);
    for within in [month, Duration::from_secs(u64::MAX), Duration::MAX] {
        store.warm(10).within(within).await.unwrap();
    }
    // MongoDB accepts no limit as large as this one, so the store may report that.
    if let Err(error) = store.warm(u64::MAX).await {
        panic!("u64::MAX: {error}");
    }
}

#[tokio::test]
async fn shutdown_does_not_wait_for_a_warm_up() {
    let proxy = Proxy::start().await;
    let mongo = MongoStore::builder().uri(proxy.uri()).operation_timeout(Duration::from_secs(1));
    let store = cache_of(&mongo.build().await.unwrap()).await;
    create(&store).await;
    let mut held = proxy.hold("aggregate");
    let warm = tokio::spawn({
        let store = store.clone();
        async move { store.warm(10).within(Duration::from_secs(25)).await }
    });
    held.reached().await;
    let began = Instant::now();
    store.shutdown().await;
    assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());
    warm.abort();
}

#[tokio::test]
async fn warm_up_that_reaches_its_time_limit_leaves_the_health_serving() {
    let proxy = Proxy::start().await;
    let mongo = other_instance(proxy.uri()).await;
    let store =
        CachedMongoStore::builder(mongo).coherence(Coherence::TimeBound).build().await.unwrap();
    create(&store).await;
    assert!(store.health().is_serving());
    let held = proxy.hold("aggregate");
    let warmed = store.warm(10).within(Duration::from_millis(300)).await;
    assert!(warmed.is_ok_and(|warmed| warmed.limit == WarmUpLimit::Time));
    drop(held);
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert!(store.health().is_serving(), "no call follows, so nothing would correct it");
}
