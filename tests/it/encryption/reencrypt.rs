//! `reencrypt` beside everything that may happen at the same time.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use futures::StreamExt;
use mongodb::bson::{DateTime, Document, doc};
use serde_json::json;
use tower_sessions::SessionStore;
use tower_sessions::session::Record;
use tower_sessions_moka_mongodb_store::{ErrorKind, Keys, MongoStore, Reencrypted, mongodb};

use super::{by_key, key, key_of, secret, stored, with_keys};
use crate::common::{
    Commands, FOREVER, Meters, PATIENCE, cache_of, create, eventually, patient, uri,
};
use crate::proxy::Proxy;

const OTHER: &str = "session_store_stream_events_total{origin=other}";

fn newest() -> Keys {
    Keys::new(2, key(2)).and_old(1, key(1))
}

async fn many(store: &MongoStore, count: usize) -> Vec<Record> {
    futures::stream::iter(0..count).map(|_| create(store)).buffer_unordered(32).collect().await
}

async fn walked(store: &MongoStore) -> Reencrypted {
    store.reencrypt().finish().await.unwrap()
}

#[tokio::test]
async fn reencryption_moves_every_readable_session_to_the_newest_key() {
    let uri = uri();
    let plain = patient(&uri).await;
    let queryable = MongoStore::builder().uri(&uri).queryable(true).build().await.unwrap();
    let old = with_keys(&uri, Keys::new(1, key(1))).await;
    let store = with_keys(&uri, newest()).await;
    let mut records = many(&plain, 300).await;
    records.extend(many(&queryable, 300).await);
    records.extend(many(&old, 600).await);
    records.extend(many(&store, 100).await);
    let foreign = with_keys(&uri, Keys::new(9, key(9))).await;
    let unreadable = secret(&foreign).await;
    let expired = create(&plain).await;
    let past = doc! { "$set": { "expires": DateTime::from_millis(1_000) } };
    store.collection().update_one(by_key(&expired), past).await.unwrap();
    let before = stored(&store, &records[0]).await;

    // A walk that is interrupted can be continued later.
    let mut walk = store.reencrypt();
    let first = walk.next().await.unwrap().unwrap();
    assert!(first.done > 0 && first.done <= 500 && first.remaining >= 700, "{first:?}");
    drop(walk);
    let mut walk = store.reencrypt();
    let mut last = Reencrypted::default();
    let mut pages = 0;
    while let Some(page) = walk.next().await {
        let page = page.unwrap();
        assert!(page.remaining <= 1_302 && page.done >= last.done);
        (last, pages) = (page, pages + 1);
    }
    assert!(pages >= 3, "{pages} pages");
    assert!(walk.next().await.is_none());
    assert!(last.done <= 1_200 - first.done, "{last:?}");
    assert!(last.skipped >= 100 + first.done, "{last:?}");
    assert_eq!((last.failed, last.remaining), (1, 0), "{last:?}");
    let why = last.last_failure.unwrap();
    assert_eq!(why.kind(), ErrorKind::Decode);
    assert!(why.to_string().contains("key 9"), "{why}");

    let only = with_keys(&uri, Keys::new(2, key(2)).require_encrypted()).await;
    for record in &records {
        assert_eq!(only.load(&record.id).await.unwrap().unwrap().data, record.data);
    }
    let after = stored(&store, &records[0]).await;
    assert_eq!((&after.rev, after.updated), (&before.rev, before.updated));
    assert_eq!((after.expires, after.created), (before.expires, before.created));
    assert_eq!(foreign.load(&unreadable.id).await.unwrap().unwrap().data, unreadable.data);
    assert_eq!(
        key_of(&stored(&store, &expired).await),
        None,
        "an expired session is not encrypted again"
    );
    let again = walked(&store).await;
    assert_eq!((again.done, again.skipped, again.failed), (0, 1_300, 1));
}

#[tokio::test]
async fn reencryption_evicts_no_entry() {
    let uri = uri();
    let commands = Commands::default();
    let plain = patient(&uri).await;
    let record = secret(&plain).await;
    let client = commands.client(&uri).await;
    let mongo = MongoStore::builder().client(client).encryption(newest()).build().await.unwrap();
    let (meters, guard) = Meters::install();
    let cached = cache_of(&mongo).await;
    drop(guard);
    assert!(cached.load(&record.id).await.unwrap().is_some());
    let finds = commands.sent("find");
    let old = with_keys(&uri, Keys::new(1, key(1))).await;
    let store = with_keys(&uri, newest()).await;
    for walk in [&old, &store] {
        assert_eq!(walked(walk).await.done, 1);
    }
    assert_eq!(key_of(&stored(&store, &record).await), Some(2));

    // A change that an operator makes by hand is also reported, and comes after the walk's change.
    let by_hand = doc! { "$set": { "data": "{\"by\":\"hand\"}" } };
    let sessions = store.collection().clone_with_type::<Document>();
    let other = create(&plain).await;
    sessions.update_one(by_key(&other), by_hand.clone()).await.unwrap();
    eventually("the stream has reported it", async || meters.value(OTHER) > 0.5).await;
    assert!((meters.value(OTHER) - 1.0).abs() < 0.5, "{}", meters.value(OTHER));
    assert_eq!(cached.load(&record.id).await.unwrap().unwrap().data, record.data);
    assert_eq!(commands.sent("find"), finds, "served from the cache");
    sessions.update_one(by_key(&record), by_hand).await.unwrap();
    eventually("the change is seen", async || {
        cached.load(&record.id).await.unwrap().unwrap().data.contains_key("by")
    })
    .await;
}

#[tokio::test]
async fn large_sessions_are_reencrypted_and_their_entries_invalidated() {
    let uri = uri();
    let plain = patient(&uri).await;
    let mut records = many(&plain, 10).await;
    // One session exceeds the size of a page, and one exceeds the size of a condition.
    for bytes in [400 << 10, 600 << 10, 1_200 << 10] {
        let mut record = crate::common::record();
        record.data.insert("large".to_owned(), json!("x".repeat(bytes)));
        plain.create(&mut record).await.unwrap();
        records.push(record);
    }
    let (meters, guard) = Meters::install();
    let cached = cache_of(&plain).await;
    drop(guard);
    let store = with_keys(&uri, newest()).await;
    let mut pages = store.reencrypt().collect::<Vec<_>>().await;
    assert!(pages.len() >= 3, "{pages:?}");
    let walked = pages.pop().unwrap().unwrap();
    assert_eq!((walked.done, walked.failed), (13, 0), "{walked:?}");
    for record in &records {
        assert!(store.load(&record.id).await.unwrap().unwrap().data == record.data);
    }
    eventually("the two largest are reported", async || meters.value(OTHER) > 1.5).await;
    assert!((meters.value(OTHER) - 2.0).abs() < 0.5, "{}", meters.value(OTHER));
    drop(cached);
}

#[tokio::test]
async fn reencryption_does_not_overwrite_a_later_change() {
    let proxy = Proxy::start().await;
    let plain = patient(proxy.direct()).await;
    let mut saved = secret(&plain).await;
    let by_hand = secret(&plain).await;
    let gone = secret(&plain).await;
    let still = secret(&plain).await;
    let store = with_keys(proxy.uri(), newest()).await;
    let mut page = proxy.hold("find");
    let walk = tokio::spawn({
        let store = store.clone();
        async move { walked(&store).await }
    });
    page.reached().await;
    saved.data.insert("saved".to_owned(), json!("since"));
    plain.save(&saved).await.unwrap();
    let change = doc! { "$set": { "data": "{\"by\":\"hand\"}" } };
    plain.collection().update_one(by_key(&by_hand), change).await.unwrap();
    plain.delete(&gone.id).await.unwrap();
    page.deliver();
    let walked = walk.await.unwrap();
    // A session that was written in between is encrypted in its turn.
    assert_eq!((walked.done, walked.skipped, walked.failed), (3, 1, 0), "{walked:?}");
    assert_eq!(store.load(&saved.id).await.unwrap().unwrap().data, saved.data);
    assert_eq!(store.load(&still.id).await.unwrap().unwrap().data, still.data);
    let edited = store.load(&by_hand.id).await.unwrap().unwrap();
    assert_eq!(edited.data["by"], json!("hand"));
    assert!(store.load(&gone.id).await.unwrap().is_none(), "it came back");
    for record in [&saved, &by_hand, &still] {
        assert_eq!(key_of(&stored(&plain, record).await), Some(2));
    }
}

#[tokio::test]
async fn reencryption_splits_commands_when_sessions_grew_after_the_read() {
    let proxy = Proxy::start().await;
    let plain = patient(proxy.direct()).await;
    let mut records = many(&plain, 10).await;
    let store = with_keys(proxy.uri(), newest()).await;
    let mut page = proxy.hold("find");
    let walk = tokio::spawn({
        let store = store.clone();
        async move { walked(&store).await }
    });
    page.reached().await;
    for record in &mut records {
        // The document is sent twice: as the condition and as the new data.
        record.data.insert("large".to_owned(), json!("x".repeat(500 << 10)));
        plain.save(record).await.unwrap();
    }
    let mut late = proxy.hold("update");
    let mut again = proxy.hold("update");
    page.deliver();
    assert_eq!(late.reached().await, 10);
    late.deliver();
    assert!(again.reached().await <= 4);
    again.deliver();
    let walked = walk.await.unwrap();
    assert_eq!((walked.done, walked.skipped, walked.failed), (10, 0, 0), "{walked:?}");
    for record in &records {
        assert!(store.load(&record.id).await.unwrap().unwrap().data == record.data);
        assert_eq!(key_of(&stored(&plain, record).await), Some(2));
    }
}

#[tokio::test]
async fn reencryption_splits_commands_when_documents_grow_as_text() {
    let proxy = Proxy::start().await;
    let builder = MongoStore::builder().uri(proxy.direct()).operation_timeout(PATIENCE);
    let queryable = builder.queryable(true).build().await.unwrap();
    for _ in 0..6 {
        let mut record = crate::common::record();
        // Each character is one byte in BSON and six bytes in JSON.
        record.data.insert("large".to_owned(), json!("\u{1}".repeat(200 << 10)));
        queryable.create(&mut record).await.unwrap();
    }
    let store = with_keys(proxy.uri(), newest()).await;
    let mut write = proxy.hold("update");
    let walk = tokio::spawn(async move { walked(&store).await });
    assert!(write.reached().await <= 3);
    write.deliver();
    let walked = walk.await.unwrap();
    assert_eq!((walked.done, walked.failed), (6, 0), "{walked:?}");
}

/// Two instances have different newest keys. Each one reencrypts what the other has written, while
/// requests use both.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn key_rotation_under_load_loses_nothing() {
    const SAVERS: usize = 8;
    const OF_EACH: usize = 12;

    let uri = uri();
    let plain = patient(&uri).await;
    let before = with_keys(&uri, Keys::new(1, key(1)).and_old(2, key(2))).await;
    let after = with_keys(&uri, newest()).await;
    let stores = [cache_of(&before).await, cache_of(&after).await];
    let stop = AtomicBool::new(false);
    let saves = AtomicU64::new(0);
    let apps = futures::future::join_all((0..SAVERS).map(async |saver| {
        let mut records = many(&plain, OF_EACH).await;
        let mut at = saver;
        while !stop.load(Ordering::Relaxed) {
            at += 1;
            let record = &mut records[at % OF_EACH];
            record.data.insert("version".to_owned(), json!(at));
            stores[at / OF_EACH % 2].save(record).await.unwrap();
            saves.fetch_add(1, Ordering::Relaxed);
        }
        records
    }));
    let rotation = async {
        let mut done = (0, 0);
        while done.0 < 500 || done.1 < 500 || saves.load(Ordering::Relaxed) < 2_000 {
            let (one, other) = tokio::join!(walked(&before), walked(&after));
            for failure in [&one, &other].map(|walk| &walk.last_failure).into_iter().flatten() {
                // Its changes may have come too late every time. Nothing else may fail.
                assert_eq!(failure.kind(), ErrorKind::Overloaded, "{failure}");
            }
            done = (done.0 + one.done, done.1 + other.done);
        }
        stop.store(true, Ordering::Relaxed);
    };
    let load = async { tokio::join!(apps, rotation).0 };
    let records = tokio::time::timeout(FOREVER, load).await.unwrap();

    // From here on there is only one key.
    let last = walked(&after).await;
    assert_eq!((last.failed, last.remaining), (0, 0), "{last:?}");
    let only = with_keys(&uri, Keys::new(2, key(2)).require_encrypted()).await;
    for record in records.iter().flatten() {
        assert_eq!(key_of(&stored(&only, record).await), Some(2));
        assert_eq!(only.load(&record.id).await.unwrap().unwrap().data, record.data);
        for store in &stores {
            eventually("the caches have it", async || {
                store.load(&record.id).await.unwrap().unwrap().data == record.data
            })
            .await;
        }
    }
}

#[tokio::test]
async fn reencryption_without_a_key_or_a_store_is_an_error() {
    let uri = uri();
    let plain = patient(&uri).await;
    let error = plain.reencrypt().finish().await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Config, "{error}");
    let store = with_keys(&uri, newest()).await;
    many(&store, 3).await;
    // A walk that is held and not polled does not delay the shutdown.
    let held = store.reencrypt();
    tokio::time::timeout(Duration::from_secs(60), store.shutdown()).await.unwrap();
    assert_eq!(store.reencrypt().finish().await.unwrap_err().kind(), ErrorKind::Closed);
    drop(held);
}
