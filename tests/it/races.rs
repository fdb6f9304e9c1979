//! Calls that overlap in the order that the test chooses: the invariants I1 to I6 of
//! `ARCHITECTURE.md`.

use std::time::Duration;

use serde_json::json;
use tower_sessions::session::Record;
use tower_sessions::{SessionStore, session_store};
use tower_sessions_moka_mongodb_store::{CachedMongoStore, ErrorKind, MongoStore};

use crate::common::{Commands, FOREVER, PATIENCE, cache_of, create, eventually, other_instance};
use crate::proxy::Proxy;

/// A session that the store behind the proxy has not cached yet.
async fn cold() -> (Proxy, CachedMongoStore, MongoStore, Record) {
    let proxy = Proxy::start().await;
    let other = other_instance(proxy.direct()).await;
    let record = create(&other).await;
    let store = MongoStore::builder().uri(proxy.uri()).operation_timeout(PATIENCE);
    let store = cache_of(&store.build().await.unwrap()).await;
    (proxy, store, other, record)
}

fn changed(record: &Record) -> Record {
    let mut record = record.clone();
    record.data.insert("changed".to_owned(), json!(true));
    record
}

async fn load(store: &CachedMongoStore, record: &Record) -> Option<Record> {
    let store = store.clone();
    let id = record.id;
    tokio::spawn(async move { SessionStore::load(&store, &id).await.unwrap() }).await.unwrap()
}

#[tokio::test]
async fn slow_load_that_overlaps_a_delete_leaves_no_entry() {
    let (proxy, store, _, record) = cold().await;
    let mut held = proxy.hold("find");
    let slow = tokio::spawn({
        let store = store.clone();
        let record = record.clone();
        async move { load(&store, &record).await }
    });
    held.reached().await;
    SessionStore::delete(&store, &record.id).await.unwrap();
    assert_eq!(load(&store, &record).await, None, "a later load does not join the old flight");
    held.deliver();
    assert!(slow.await.unwrap().is_some(), "it began before the delete");
    assert_eq!(load(&store, &record).await, None);
}

#[tokio::test]
async fn slow_load_that_overlaps_a_clear_leaves_no_entry() {
    let (proxy, store, _, record) = cold().await;
    let mut held = proxy.hold("find");
    let slow = tokio::spawn({
        let store = store.clone();
        let record = record.clone();
        async move { load(&store, &record).await }
    });
    held.reached().await;
    assert_eq!(store.clear().await.unwrap(), 1);
    assert_eq!(load(&store, &record).await, None);
    held.deliver();
    assert!(slow.await.unwrap().is_some());
    assert_eq!(load(&store, &record).await, None);
}

#[tokio::test]
async fn slow_load_that_overlaps_a_save_does_not_hide_it() {
    let (proxy, store, _, record) = cold().await;
    let mut held = proxy.hold("find");
    let slow = tokio::spawn({
        let store = store.clone();
        let record = record.clone();
        async move { load(&store, &record).await }
    });
    held.reached().await;
    SessionStore::save(&store, &changed(&record)).await.unwrap();
    assert_eq!(load(&store, &record).await.unwrap().data, changed(&record).data);
    held.deliver();
    assert_eq!(slow.await.unwrap().unwrap().data, record.data, "it was read before");
    assert_eq!(load(&store, &record).await.unwrap().data, changed(&record).data);
}

#[tokio::test]
async fn slow_save_overtaken_by_a_delete_leaves_no_entry() {
    let (proxy, store, _, record) = cold().await;
    assert!(load(&store, &record).await.is_some());
    let mut held = proxy.hold("update");
    let slow = tokio::spawn({
        let store = store.clone();
        let record = changed(&record);
        async move { SessionStore::save(&store, &record).await.unwrap() }
    });
    held.reached().await;
    SessionStore::delete(&store, &record.id).await.unwrap();
    held.deliver();
    slow.await.unwrap();
    assert_eq!(load(&store, &record).await, None);
}

#[tokio::test]
async fn second_save_waits_for_the_reply_to_the_first() {
    let (proxy, store, other, record) = cold().await;
    assert!(load(&store, &record).await.is_some());
    let save = |version: &'static str| {
        let store = store.clone();
        let mut record = record.clone();
        record.data.insert("changed".to_owned(), json!(version));
        tokio::spawn(async move { SessionStore::save(&store, &record).await.unwrap() })
    };
    let mut first_held = proxy.hold("update");
    let first = save("first");
    first_held.reached().await;
    let mut second_held = proxy.hold("update");
    let second = save("second");
    let unsent = tokio::time::timeout(Duration::from_millis(200), second_held.reached()).await;
    assert!(unsent.is_err(), "it was sent though the first may still be running");
    first_held.deliver();
    first.await.unwrap();
    second_held.reached().await;
    second_held.deliver();
    second.await.unwrap();
    let stored = SessionStore::load(&other, &record.id).await.unwrap().unwrap();
    assert_eq!(stored.data["changed"], json!("second"));
    assert_eq!(load(&store, &record).await.unwrap().data, stored.data);
}

#[tokio::test]
async fn session_is_absent_once_a_slow_delete_has_returned() {
    let (proxy, store, _, record) = cold().await;
    assert!(load(&store, &record).await.is_some());
    let mut held = proxy.hold("delete");
    let slow = tokio::spawn({
        let store = store.clone();
        let id = record.id;
        async move { SessionStore::delete(&store, &id).await.unwrap() }
    });
    held.reached().await;
    load(&store, &record).await;
    held.deliver();
    slow.await.unwrap();
    assert_eq!(load(&store, &record).await, None);
}

#[tokio::test]
async fn write_with_a_late_reply_times_out_and_leaves_no_entry() {
    let (proxy, _, other, record) = cold().await;
    let commands = Commands::default();
    let short = Duration::from_millis(300);
    let client = commands.client(proxy.uri()).await;
    // With this short timeout a slow machine may need several attempts, here and below.
    let mongo = loop {
        let builder = MongoStore::builder().client(client.clone()).operation_timeout(short);
        match builder.build().await {
            Ok(mongo) => break mongo,
            Err(error) => assert_eq!(error.kind(), ErrorKind::Timeout, "{error}"),
        }
    };
    let store = CachedMongoStore::builder(mongo).max_staleness(FOREVER);
    let store = store.build().await.unwrap();
    eventually("the session is cached", async || {
        matches!(SessionStore::load(&store, &record.id).await, Ok(Some(_)))
    })
    .await;
    let mut held = proxy.hold("update");
    let error = SessionStore::save(&store, &changed(&record)).await.unwrap_err();
    assert!(matches!(&error, session_store::Error::Backend(_)), "{error:?}");
    assert!(error.to_string().contains("300ms"), "{error}");
    held.reached().await;
    let finds = commands.sent("find");
    eventually("a find is sent", async || SessionStore::load(&store, &record.id).await.is_ok())
        .await;
    assert!(commands.sent("find") > finds, "nothing was cached");
    held.deliver();
    let stored = SessionStore::load(&other, &record.id).await.unwrap().unwrap();
    assert_eq!(stored.data, changed(&record).data);
    assert_eq!(load(&store, &record).await.unwrap().data, stored.data);
}

#[tokio::test]
async fn write_with_a_broken_connection_leaves_the_stored_state() {
    for command in ["update", "delete"] {
        let (proxy, store, other, record) = cold().await;
        assert!(load(&store, &record).await.is_some());
        let mut held = proxy.hold(command);
        let write = tokio::spawn({
            let store = store.clone();
            let record = changed(&record);
            async move {
                match command {
                    "update" => SessionStore::save(&store, &record).await,
                    _ => SessionStore::delete(&store, &record.id).await,
                }
            }
        });
        held.reached().await;
        held.cut();
        // The driver may have retried it with success. Then the result is `Ok`.
        let _ = write.await.unwrap();
        let stored = SessionStore::load(&other, &record.id).await.unwrap();
        let seen = load(&store, &record).await;
        assert_eq!(seen.map(|seen| seen.data), stored.map(|stored| stored.data), "{command}");
    }
}

#[tokio::test]
async fn load_that_is_dropped_does_not_end_the_read_for_its_waiters() {
    let (proxy, store, _, record) = cold().await;
    let mut held = proxy.hold("find");
    let mut first = Box::pin(SessionStore::load(&store, &record.id));
    assert!(futures::poll!(&mut first).is_pending());
    held.reached().await;
    let mut second = Box::pin(SessionStore::load(&store, &record.id));
    assert!(futures::poll!(&mut second).is_pending());
    drop(first);
    held.deliver();
    assert_eq!(second.await.unwrap().unwrap().data, record.data);
}

#[tokio::test]
async fn save_whose_caller_gives_up_is_carried_out_and_cached() {
    let (proxy, store, other, record) = cold().await;
    assert!(load(&store, &record).await.is_some());
    let mut held = proxy.hold("update");
    let save = changed(&record);
    let mut call = Box::pin(SessionStore::save(&store, &save));
    assert!(futures::poll!(&mut call).is_pending());
    held.reached().await;
    drop(call);
    held.deliver();
    eventually("the cache has what was saved", async || {
        load(&store, &record).await.unwrap().data == save.data
    })
    .await;
    assert_eq!(SessionStore::load(&other, &record.id).await.unwrap().unwrap().data, save.data);
}

#[tokio::test]
async fn shutdown_waits_for_the_call_in_progress() {
    let (proxy, store, other, record) = cold().await;
    let mut held = proxy.hold("update");
    let save = changed(&record);
    let mut call = Box::pin(SessionStore::save(&store, &save));
    assert!(futures::poll!(&mut call).is_pending());
    held.reached().await;
    let mut shutdown = Box::pin(store.shutdown());
    assert!(futures::poll!(&mut shutdown).is_pending());
    held.deliver();
    shutdown.await;
    call.await.unwrap();
    assert_eq!(SessionStore::load(&other, &record.id).await.unwrap().unwrap().data, save.data);
}
