//! One instance changes a session, and the other instances stop serving the old state. The age of
//! entries does not help here: each cache may keep its entries for an hour, unless a test says
//! otherwise.

mod causal;
mod elections;
mod faults;
mod watermark;

use std::time::{Duration, Instant};

use mongodb::bson::spec::BinarySubtype;
use mongodb::bson::{Binary, DateTime, Document, doc};
use serde_json::json;
use tower_sessions::SessionStore;
use tower_sessions::session::Record;
use tower_sessions_moka_mongodb_store::{
    CachedMongoStore, CachedMongoStoreBuilder, Coherence, MongoStore, SessionKey, mongodb,
};

use crate::common::{Commands, FOREVER, Meters, PATIENCE, cache_of, create, eventually, uri};
use crate::proxy::Proxy;

const OWN: &str = "session_store_stream_events_total{origin=own}";
const OTHER: &str = "session_store_stream_events_total{origin=other}";
const OWN_WRITE: &str = "session_store_cache_invalidations_total{cause=own_write}";
const OPEN: &str = "session_store_stream_open";
const EMPTIED: &str = "session_store_cache_invalidations_total{cause=gap}";
const RESUMES: &str = "session_store_stream_resumes_total";

async fn builder(uri: &str) -> CachedMongoStoreBuilder {
    let mongo = MongoStore::builder().uri(uri).operation_timeout(PATIENCE).build().await.unwrap();
    CachedMongoStore::builder(mongo).max_staleness(FOREVER)
}

async fn instance(uri: &str) -> CachedMongoStore {
    builder(uri).await.build().await.unwrap()
}

async fn metered(uri: &str) -> (Meters, CachedMongoStore) {
    let builder = builder(uri).await;
    let (meters, _guard) = Meters::install();
    (meters, builder.build().await.unwrap())
}

async fn load(store: &CachedMongoStore, record: &Record) -> Option<Record> {
    SessionStore::load(store, &record.id).await.unwrap()
}

/// Waits until `store` serves the session in this state.
async fn wait_until_sees(store: &CachedMongoStore, record: &Record, state: Option<&Record>) {
    let data = state.map(|record| &record.data);
    eventually("it reaches the other instance", async || {
        load(store, record).await.as_ref().map(|record| &record.data) == data
    })
    .await;
}

async fn wait_until_at_least(meters: &Meters, name: &str, count: f64) {
    eventually(&format!("{name} is {count}"), async || meters.value(name) >= count).await;
    assert!((meters.value(name) - count).abs() < 0.5, "{name} is {}", meters.value(name));
}

fn changed(record: &Record) -> Record {
    let mut record = record.clone();
    record.data.insert("changed".to_owned(), json!(crate::common::serial()));
    record
}

fn by_key(record: &Record) -> Document {
    let bytes = SessionKey::from(record.id).as_bytes().to_vec();
    doc! { "_id": Binary { subtype: BinarySubtype::Generic, bytes } }
}

#[tokio::test]
async fn save_and_log_out_reach_the_other_instance() {
    let uri = uri();
    let one = instance(&uri).await;
    let other = instance(&uri).await;
    let record = create(&one).await;
    wait_until_sees(&other, &record, Some(&record)).await;
    let saved = changed(&record);
    one.save(&saved).await.unwrap();
    wait_until_sees(&other, &record, Some(&saved)).await;
    one.delete(&record.id).await.unwrap();
    wait_until_sees(&other, &record, None).await;
}

#[tokio::test]
async fn a_clear_reaches_the_other_instance() {
    let uri = uri();
    let one = instance(&uri).await;
    let other = instance(&uri).await;
    let records = [create(&one).await, create(&one).await, create(&one).await];
    for record in &records {
        wait_until_sees(&other, record, Some(record)).await;
    }
    assert_eq!(one.clear().await.unwrap(), 3);
    for record in &records {
        wait_until_sees(&other, record, None).await;
    }
}

#[tokio::test]
async fn own_save_in_the_stream_evicts_nothing() {
    let proxy = Proxy::start().await;
    let commands = Commands::default();
    let mongo = commands.mongo(proxy.uri()).await;
    let (meters, guard) = Meters::install();
    let store = cache_of(&mongo).await;
    drop(guard);
    let record = create(&store).await;
    let finds = commands.sent("find");

    // The stream reports nothing until the save has been answered.
    let mut stream = proxy.hold("getMore");
    stream.reached().await;
    let saved = changed(&record);
    store.save(&saved).await.unwrap();
    stream.deliver();
    wait_until_at_least(&meters, OWN, 1.0).await;
    assert!(meters.value(OTHER).abs() < 0.5);
    assert_eq!(load(&store, &record).await.unwrap().data, saved.data);
    assert_eq!(commands.sent("find"), finds, "served from the cache");

    // The reply is held until the stream has reported the save.
    let mut answer = proxy.hold("update");
    let saved = changed(&record);
    let save = tokio::spawn({
        let store = store.clone();
        let saved = saved.clone();
        async move { store.save(&saved).await }
    });
    answer.reached().await;
    wait_until_at_least(&meters, OWN, 2.0).await;
    assert!((meters.value(OWN_WRITE) - 1.0).abs() < 0.5 && meters.value(OTHER).abs() < 0.5);
    answer.deliver();
    save.await.unwrap().unwrap();
    assert_eq!(load(&store, &record).await.unwrap().data, saved.data);
    assert_eq!(commands.sent("find"), finds, "the answer has left an entry");

    for _ in 0..50 {
        let saved = changed(&record);
        store.save(&saved).await.unwrap();
        assert_eq!(load(&store, &record).await.unwrap().data, saved.data);
    }
    assert_eq!(commands.sent("find"), finds, "whichever comes first");
}

#[tokio::test]
async fn events_report_every_change_except_a_longer_expiry() {
    let uri = uri();
    let one = instance(&uri).await;
    let (meters, other) = metered(&uri).await;
    let record = create(&one).await;
    wait_until_sees(&other, &record, Some(&record)).await;
    let sessions = one.collection().clone_with_type::<Document>();
    let date = || DateTime::from_millis(4_000_000_000_000);
    let touch = doc! { "$set": { "expires": date(), "updated": date() } };
    sessions.update_one(by_key(&record), touch).await.unwrap();
    let by_hand = [
        doc! { "$set": { "data": { "name": "by hand" } } },
        doc! { "$unset": { "data.name": 1 } },
        doc! { "$set": { "expires": DateTime::from_millis(4_000_000_000_001) } },
        doc! { "$set": { "expires": date(), "updated": DateTime::now(), "data.more": 1 } },
    ];
    let mut reported = 0.0;
    for change in by_hand {
        sessions.update_one(by_key(&record), change).await.unwrap();
        reported += 1.0;
        wait_until_at_least(&meters, OTHER, reported).await;
    }
    assert!(load(&other, &record).await.unwrap().data.contains_key("more"));
    sessions
        .update_one(by_key(&record), doc! { "$set": { "expires": DateTime::from_millis(1) } })
        .await
        .unwrap();
    wait_until_sees(&other, &record, None).await;
}

#[tokio::test]
async fn dropped_collection_empties_the_caches_and_they_continue() {
    let uri = uri();
    let one = instance(&uri).await;
    let (meters, other) = metered(&uri).await;
    let record = create(&one).await;
    wait_until_sees(&other, &record, Some(&record)).await;
    one.collection().drop().await.unwrap();
    wait_until_sees(&other, &record, None).await;
    wait_until_sees(&one, &record, None).await;
    eventually("a new stream is open", async || meters.value(EMPTIED) >= 2.0).await;
    assert!(meters.value("session_store_stream_gaps_total{cause=collection_gone}") > 0.5);
    let record = create(&one).await;
    wait_until_sees(&other, &record, Some(&record)).await;
    one.delete(&record.id).await.unwrap();
    wait_until_sees(&other, &record, None).await;
}

#[tokio::test]
async fn a_stream_ends_with_its_store() {
    let uri = uri();
    let (meters, store) = metered(&uri).await;
    wait_until_at_least(&meters, OPEN, 1.0).await;
    let clone = store.clone();
    drop(store);
    create(&clone).await;
    wait_until_at_least(&meters, OPEN, 1.0).await;
    drop(clone);
    eventually("the last clone ends it", async || meters.value(OPEN).abs() < 0.5).await;

    let (meters, store) = metered(&uri).await;
    wait_until_at_least(&meters, OPEN, 1.0).await;
    store.shutdown().await;
    assert!(meters.value(OPEN).abs() < 0.5);
}

#[tokio::test]
async fn stream_that_is_given_up_leaves_no_cursor() {
    let uri = uri();
    let commands = Commands::default();
    let mongo = commands.mongo(&uri).await;
    let store = cache_of(&mongo).await;
    assert_eq!(commands.sent("killCursors"), 0);
    drop(store);
    eventually("it is closed", async || commands.sent("killCursors") == 1).await;
}

#[tokio::test]
async fn store_without_change_stream_opens_none_and_sends_no_checkpoint() {
    let uri = uri();
    let commands = Commands::default();
    let cached = CachedMongoStore::builder(commands.mongo(&uri).await);
    for builder in [
        cached.clone().max_staleness(Duration::ZERO).coherence(Coherence::SoleWriter),
        cached.clone().max_staleness(FOREVER).coherence(Coherence::SoleWriter),
        cached.max_staleness(FOREVER).coherence(Coherence::TimeBound),
    ] {
        let store = builder.build().await.unwrap();
        let record = create(&store).await;
        assert_eq!(load(&store, &record).await.unwrap().data, record.data);
        for command in ["aggregate", "getMore", "hello", "ping", "find"] {
            assert_eq!(commands.sent(command), 0, "{command}");
        }
    }
}

#[tokio::test]
async fn lease_is_renewed_under_constant_reports() {
    const BOUND: Duration = Duration::from_millis(500);

    let uri = uri();
    let commands = Commands::default();
    let (meters, guard) = Meters::install();
    let mongo = commands.mongo(&uri).await;
    let builder = CachedMongoStore::builder(mongo).max_staleness(BOUND);
    let store = builder.build().await.unwrap();
    drop(guard);
    let record = create(&store).await;
    let busy = create(&store).await;
    let flood = tokio::spawn({
        let sessions = store.collection().clone_with_type::<Document>();
        let busy = by_key(&busy);
        async move {
            for n in 0_i64.. {
                let change = doc! { "$set": { "data": { "n": n } } };
                sessions.update_one(busy.clone(), change).await.unwrap();
            }
        }
    });
    let mut finds = commands.sent("find");
    let mut read = Instant::now();
    eventually("a session is served long after it was read", async || {
        assert!(load(&store, &record).await.is_some());
        if commands.sent("find") > finds {
            finds = commands.sent("find");
            read = Instant::now();
        }
        read.elapsed() > 4 * BOUND && meters.value(OTHER) > 100.0
    })
    .await;
    assert!(!flood.is_finished());
    flood.abort();
}
