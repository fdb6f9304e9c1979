//! Servers that crash, hang and come back. Each test has its own server.

use std::time::{Duration, Instant};

use session_test_server::{TestServer, fresh_database};
use tower_sessions::session::Id;
use tower_sessions::{SessionStore, session_store};
use tower_sessions_moka_mongodb_store::{CachedMongoStore, ErrorKind, MongoStore};

use crate::common::{FOREVER, Store, cache_of, create, eventually, record};

/// Short, so that an outage is noticed soon. Long enough for one call on a slow machine.
const TIMEOUT: Duration = Duration::from_millis(500);

async fn on(server: &TestServer, database: &str) -> (MongoStore, CachedMongoStore) {
    let mongo = MongoStore::builder().uri(server.uri_for(database)).operation_timeout(TIMEOUT);
    let mut built = mongo.clone().build().await;
    for _ in 0..20 {
        if built.is_ok() {
            break;
        }
        built = mongo.clone().build().await;
    }
    let mongo = built.unwrap();
    let cached = CachedMongoStore::builder(mongo.clone()).max_staleness(FOREVER);
    (mongo, cached.build().await.unwrap())
}

#[tokio::test]
async fn crash_after_a_save_loses_nothing_and_the_store_recovers() {
    let mut server = TestServer::builder().fast(true).durable(true).start().unwrap();
    let database = fresh_database();
    let mongo = MongoStore::connect(server.uri_for(&database)).await.unwrap();
    let store = cache_of(&mongo).await;
    let mut records = Vec::new();
    for _ in 0..20 {
        let mut record = create(&store).await;
        record.data.insert("saved".to_owned(), true.into());
        store.save(&record).await.unwrap();
        records.push(record);
    }
    server.kill().unwrap();
    let loaded = store.load(&records[0].id).await.unwrap().unwrap();
    assert_eq!(loaded.data, records[0].data, "what is cached is served meanwhile");
    server.restart().unwrap();

    eventually("the store recovers", async || mongo.load(&records[0].id).await.is_ok()).await;
    for record in &records {
        let stored = mongo.load(&record.id).await.unwrap().expect("an acknowledged save");
        assert_eq!(stored.data, record.data);
    }
    assert_eq!(mongo.length().await.unwrap(), 20);
    records[1].data.insert("after".to_owned(), true.into());
    store.save(&records[1]).await.unwrap();
    assert_eq!(store.load(&records[1].id).await.unwrap().unwrap().data, records[1].data);
}

#[tokio::test]
async fn dead_server_is_an_error_of_every_verb_and_never_an_absence() {
    let mut server = TestServer::builder().fast(true).start().unwrap();
    let (mongo, store) = on(&server, &fresh_database()).await;
    let cold = create(&mongo).await;
    let warm = create(&store).await;
    server.kill().unwrap();

    every_verb_fails(&mongo, &cold.id).await;
    every_verb_fails(&store, &cold.id).await;
    let error = mongo.length().await.unwrap_err();
    let kinds = [ErrorKind::Connection, ErrorKind::Timeout];
    assert!(kinds.contains(&error.kind()), "{error:?}");
    assert!(store.load(&warm.id).await.unwrap().is_some(), "others' failures leave it cached");
    assert!(store.save(&warm).await.is_err());
    assert!(store.load(&warm.id).await.unwrap().is_some(), "a failed touch changed nothing");
    let mut changed = warm.clone();
    changed.data.insert("changed".to_owned(), true.into());
    assert!(store.save(&changed).await.is_err());
    assert!(store.load(&warm.id).await.is_err(), "a write that failed leaves nothing cached");
    assert!(mongo.clear().await.is_err() && store.clear().await.is_err());
}

#[tokio::test]
async fn failed_clear_leaves_no_entry() {
    let mut server = TestServer::builder().fast(true).start().unwrap();
    let (_, store) = on(&server, &fresh_database()).await;
    let record = create(&store).await;
    server.kill().unwrap();
    assert!(store.load(&record.id).await.unwrap().is_some());
    assert!(store.clear().await.is_err());
    assert!(store.load(&record.id).await.is_err(), "it may have been removed, or not");
}

#[tokio::test]
async fn hanging_server_is_a_timeout_and_never_an_absence() {
    let mut server = TestServer::builder().fast(true).start().unwrap();
    let (mongo, store) = on(&server, &fresh_database()).await;
    let cold = create(&mongo).await;
    let written = create(&store).await;
    let deleted = create(&store).await;
    let before = store.load(&written.id).await.unwrap().unwrap();
    server.pause().unwrap();

    let start = Instant::now();
    let error = mongo.length().await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Timeout, "{error:?}");
    assert!(start.elapsed() >= TIMEOUT);
    for _ in 0..2 {
        let start = Instant::now();
        let error = store.load(&cold.id).await.unwrap_err();
        assert!(error.to_string().contains("did not answer within 500ms"), "{error}");
        // A task may be late on a busy machine. The driver's own timeout would be 30 s.
        assert!(start.elapsed() < Duration::from_secs(10), "{:?}", start.elapsed());
    }
    every_verb_fails(&mongo, &cold.id).await;
    every_verb_fails(&store, &cold.id).await;
    assert_eq!(store.load(&written.id).await.unwrap().unwrap().data, before.data);
    assert!(store.save(&written).await.is_err());
    assert!(store.delete(&deleted.id).await.is_err());
    for id in [written.id, deleted.id] {
        assert!(store.load(&id).await.is_err(), "a write that failed leaves nothing cached");
    }

    server.resume().unwrap();
    eventually("the store recovers", async || store.load(&cold.id).await.is_ok()).await;
    assert_eq!(store.load(&cold.id).await.unwrap().unwrap().data, cold.data);
    // The server may still carry out a write that was given up. The cache follows the database.
    eventually("cache and database agree", async || {
        let stored = mongo.load(&deleted.id).await.ok().map(|found| found.is_some());
        let seen = store.load(&deleted.id).await.ok().map(|found| found.is_some());
        stored.is_some() && stored == seen
    })
    .await;
}

#[tokio::test]
async fn shutdown_ends_even_if_the_server_hangs() {
    let mut server = TestServer::builder().fast(true).start().unwrap();
    let (_, store) = on(&server, &fresh_database()).await;
    server.pause().unwrap();
    let call = tokio::spawn({
        let store = store.clone();
        async move { store.load(&Id::default()).await }
    });
    tokio::task::yield_now().await;
    let ended = tokio::time::timeout(Duration::from_secs(30), store.shutdown()).await;
    assert!(ended.is_ok(), "by the deadline of the running call");
    assert!(call.await.unwrap().is_err());
}

async fn every_verb_fails(store: &impl Store, cold: &Id) {
    let mut unknown = record();
    unknown.id = *cold;
    for error in [
        store.load(cold).await.unwrap_err(),
        store.save(&unknown).await.unwrap_err(),
        store.delete(cold).await.unwrap_err(),
        store.create(&mut unknown).await.unwrap_err(),
    ] {
        assert!(matches!(error, session_store::Error::Backend(_)), "{error:?}");
    }
    for error in [
        store.length().await.unwrap_err(),
        store.estimated_length().await.unwrap_err(),
        store.contains(*cold).await.unwrap_err(),
    ] {
        let kinds = [ErrorKind::Connection, ErrorKind::Timeout];
        assert!(kinds.contains(&error.kind()), "{error:?}");
    }
}
