//! What is served while MongoDB does not answer, and how it ends.

use std::time::{Duration, Instant};

use serde_json::json;
use session_test_server::{TestServer, fresh_database};
use tower_sessions::SessionStore;
use tower_sessions::session::Record;
use tower_sessions_moka_mongodb_store::{CachedMongoStore, ErrorKind, MongoStore};

use crate::common::{FOREVER, Meters, create, eventually};

const TIMEOUT: Duration = Duration::from_millis(500);
const BOUND: Duration = Duration::from_secs(1);
const SERVED: &str = "session_store_loads_total{result=grace}";

async fn on(server: &TestServer, grace: Duration) -> (Meters, CachedMongoStore) {
    let mongo = loop {
        let uri = server.uri_for(&fresh_database());
        match MongoStore::builder().uri(uri).operation_timeout(TIMEOUT).build().await {
            Ok(mongo) => break mongo,
            // A busy machine may need more than so short a time for the first connection.
            Err(error) => assert_eq!(error.kind(), ErrorKind::Timeout, "{error}"),
        }
    };
    let (meters, _guard) = Meters::install();
    let builder = CachedMongoStore::builder(mongo).max_staleness(BOUND).outage_grace(grace);
    (meters, builder.build().await.unwrap())
}

async fn load(store: &CachedMongoStore, record: &Record) -> Result<Option<Record>, String> {
    SessionStore::load(store, &record.id).await.map_err(|error| error.to_string())
}

#[tokio::test]
async fn a_grace_serves_what_is_cached_and_nothing_that_is_gone_until_the_server_is_back() {
    let mut server = TestServer::builder().fast(true).start().unwrap();
    let (meters, store) = on(&server, FOREVER).await;
    let (record, gone, doubtful) =
        (create(&store).await, create(&store).await, create(&store).await);
    store.delete(&gone.id).await.unwrap();
    server.pause().unwrap();

    eventually("the lease has run out", async || {
        assert_eq!(load(&store, &record).await.unwrap().unwrap().data, record.data);
        meters.value(SERVED) >= 1.0
    })
    .await;
    let start = Instant::now();
    for _ in 0..1_000 {
        assert_eq!(load(&store, &record).await.unwrap().unwrap().data, record.data);
    }
    assert!(start.elapsed() < TIMEOUT, "at once: {:?}", start.elapsed());
    let at_once = meters.value(SERVED);
    assert!(at_once >= 1_000.0);
    let mut deep = doubtful.clone();
    deep.data.insert("deep".to_owned(), (0..200).fold(json!(1), |inner, _| json!([inner])));
    assert!(store.save(&deep).await.is_err(), "it cannot be stored");
    assert!(load(&store, &record).await.unwrap().is_some());
    let more = meters.value(SERVED) - at_once;
    assert!((more - 1.0).abs() < 0.5, "which says nothing of the database: {more}");
    assert!(!matches!(load(&store, &gone).await, Ok(Some(_))));
    assert!(store.save(&doubtful).await.is_err());
    assert!(load(&store, &doubtful).await.is_err(), "a write of it ended in doubt");

    server.resume().unwrap();
    eventually("the store recovers", async || {
        let before = meters.value(SERVED);
        load(&store, &record).await.is_ok() && (meters.value(SERVED) - before).abs() < 0.5
    })
    .await;
    assert_eq!(load(&store, &gone).await, Ok(None));
    assert_eq!(load(&store, &doubtful).await.unwrap().unwrap().data, doubtful.data);
}

#[tokio::test]
async fn without_a_grace_a_load_past_the_bound_is_an_error() {
    let mut server = TestServer::builder().fast(true).start().unwrap();
    let (meters, store) = on(&server, Duration::ZERO).await;
    let record = create(&store).await;
    server.pause().unwrap();
    let paused = Instant::now();
    loop {
        let begun = Instant::now();
        let loaded = load(&store, &record).await;
        // That it is there at the deadline is tested in paused time; here, that it is the store's
        // deadline and not the driver's own patience of 30 s, on a machine however busy.
        assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", begun.elapsed());
        match loaded {
            Ok(found) => {
                assert!(begun.duration_since(paused) <= BOUND, "served past the bound");
                assert_eq!(found.unwrap().data, record.data, "an outage is no absence");
            }
            Err(error) => {
                assert!(error.contains("did not answer within 500ms"), "{error}");
                break;
            }
        }
    }
    assert!(meters.value(SERVED).abs() < 0.5);
    server.resume().unwrap();
    eventually("the store recovers", async || load(&store, &record).await.is_ok()).await;
    assert_eq!(load(&store, &record).await.unwrap().unwrap().data, record.data);
}

#[tokio::test]
async fn a_grace_that_is_over_is_over() {
    let mut server = TestServer::builder().fast(true).start().unwrap();
    let grace = Duration::from_millis(500);
    let (_, store) = on(&server, grace).await;
    let record = create(&store).await;
    server.pause().unwrap();
    let paused = Instant::now();
    loop {
        let begun = Instant::now();
        match load(&store, &record).await {
            Ok(_) => assert!(begun.duration_since(paused) <= BOUND + grace),
            Err(_) => break,
        }
    }
}
