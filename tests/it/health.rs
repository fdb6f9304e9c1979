//! `health()` returns a snapshot of the store's state, without I/O.

use std::time::{Duration, Instant};

use serde_json::{Value, json};
use session_test_proxy::Direction;
use tower_sessions::SessionStore;
use tower_sessions::session::Record;
use tower_sessions_moka_mongodb_store::{
    CachedMongoStore, CachedMongoStoreBuilder, Coherence, ErrorKind, LeaseHealth, MongoHealth,
    MongoStore, StreamHealth,
};

use crate::common::{self, Commands, FOREVER, Meters, cached, create, eventually, uri};
use crate::proxy::Proxy;

const TIMEOUT: Duration = Duration::from_secs(1);
const BOUND: Duration = Duration::from_secs(2);

async fn behind(proxy: &Proxy) -> (MongoStore, CachedMongoStoreBuilder) {
    let mongo = MongoStore::builder().uri(proxy.uri()).operation_timeout(TIMEOUT);
    let mongo = mongo.build().await.unwrap();
    (mongo.clone(), CachedMongoStore::builder(mongo).max_staleness(BOUND))
}

async fn wait_until_fresh(store: &CachedMongoStore) {
    eventually("all is well", async || {
        let health = store.health();
        matches!(health.lease, Some(LeaseHealth::Fresh { left, .. }) if left <= BOUND)
            && matches!(health.stream, StreamHealth::Open { lag, .. } if lag <= BOUND)
            && matches!(health.mongo, MongoHealth::Answers { .. })
            && health.is_serving()
            && !health.is_degraded()
    })
    .await;
}

#[tokio::test]
async fn health_shows_a_cut_network_and_its_end() {
    let proxy = Proxy::start().await;
    let (mongo, builder) = behind(&proxy).await;
    let store = builder.build().await.unwrap();
    let record = create(&store).await;
    wait_until_fresh(&store).await;

    proxy.cut();
    // No session is loaded: the stream and its checkpoints notice the outage.
    eventually("the stream is lost", async || {
        matches!(store.health().stream, StreamHealth::Lost { .. })
    })
    .await;
    eventually("MongoDB is unresponsive", async || {
        matches!(store.health().mongo, MongoHealth::Unresponsive { .. })
    })
    .await;
    assert!(store.health().is_degraded());
    assert!(
        matches!(mongo.health().mongo, MongoHealth::Unresponsive { .. }),
        "its store says the same"
    );
    assert!(!mongo.health().is_serving(), "there is no cache to serve from");
    eventually("the lease expires", async || {
        let health = store.health();
        let is_expired = matches!(health.lease, Some(LeaseHealth::Expired { .. }));
        assert!(is_expired != health.is_serving(), "as long as the lease lasts: {health:?}");
        is_expired
    })
    .await;
    let StreamHealth::Lost { lag, .. } = store.health().stream else { panic!("still lost") };
    assert!(lag > BOUND);
    let MongoHealth::Unresponsive { lasting, .. } = store.health().mongo else {
        panic!("still silent")
    };
    eventually("the outage lasts longer", async || {
        matches!(store.health().mongo, MongoHealth::Unresponsive { lasting: now, .. } if now > lasting)
    })
    .await;

    proxy.mend();
    wait_until_fresh(&store).await;
    assert!(store.load(&record.id).await.unwrap().is_some());
}

#[tokio::test]
async fn health_shows_the_grace_while_it_lasts() {
    let proxy = Proxy::start().await;
    let (_, builder) = behind(&proxy).await;
    let store = builder.outage_grace(FOREVER).build().await.unwrap();
    let record = create(&store).await;
    wait_until_fresh(&store).await;
    proxy.cut();
    eventually("a load is served in the grace", async || {
        store.load(&record.id).await.unwrap();
        matches!(store.health().lease, Some(LeaseHealth::Grace { left, .. }) if left <= FOREVER)
    })
    .await;
    let health = store.health();
    assert!(health.is_serving() && health.is_degraded(), "{health:?}");
}

/// A store with an outage grace whose server no longer answers, and a cached session past its lease. No call
/// has noticed the stall yet.
async fn cached_behind_a_stalled_server() -> (Proxy, CachedMongoStore, Record) {
    let proxy = Proxy::start().await;
    let (_, builder) = behind(&proxy).await;
    let store = builder.outage_grace(FOREVER).build().await.unwrap();
    let record = create(&store).await;
    wait_until_fresh(&store).await;
    proxy.stall(Direction::ToClient, true);
    eventually("the lease expires", async || {
        matches!(store.health().lease, Some(LeaseHealth::Expired { .. }))
    })
    .await;
    (proxy, store, record)
}

#[tokio::test]
async fn unanswered_length_shows_in_health_and_allows_the_grace() {
    let (_proxy, store, record) = cached_behind_a_stalled_server().await;

    // The driver may notice the stall before the call times out.
    let kind = store.length().await.unwrap_err().kind();
    assert!(matches!(kind, ErrorKind::Timeout | ErrorKind::Connection), "{kind:?}");
    let health = store.health();
    assert!(matches!(health.mongo, MongoHealth::Unresponsive { .. }), "{health:?}");
    assert!(matches!(health.lease, Some(LeaseHealth::Grace { .. })), "{health:?}");
    let start = Instant::now();
    assert!(store.load(&record.id).await.unwrap().is_some());
    assert!(start.elapsed() < TIMEOUT, "without a wait: {:?}", start.elapsed());
}

#[tokio::test]
async fn warm_up_without_an_answer_ends_no_outage() {
    let (_proxy, store, record) = cached_behind_a_stalled_server().await;
    store.length().await.unwrap_err();

    // The first one sends nothing. The other one gives up before the operation timeout.
    for sessions in [0, 10] {
        let warmed = store.warm(sessions).within(TIMEOUT / 5).await.unwrap();
        assert_eq!(warmed.sessions, 0);
        let health = store.health();
        assert!(matches!(health.mongo, MongoHealth::Unresponsive { .. }), "{health:?}");
        let start = Instant::now();
        assert!(store.load(&record.id).await.unwrap().is_some());
        assert!(start.elapsed() < TIMEOUT, "without a wait: {:?}", start.elapsed());
    }
}

#[tokio::test]
async fn slow_count_in_the_background_allows_no_grace() {
    let proxy = Proxy::start().await;
    let mut held = proxy.hold("aggregate");
    let mongo = MongoStore::builder().uri(proxy.uri()).operation_timeout(TIMEOUT);
    let mongo = mongo.count_every(FOREVER).build().await.unwrap();
    let other = MongoStore::connect(proxy.uri()).await.unwrap();
    let builder = CachedMongoStore::builder(mongo).coherence(Coherence::TimeBound);
    let builder = builder.max_staleness(TIMEOUT / 10).outage_grace(FOREVER);
    let store = builder.build().await.unwrap();
    held.reached().await;
    let record = create(&store).await;
    other.delete(&record.id).await.unwrap();
    tokio::time::sleep(TIMEOUT * 3 / 2).await;
    assert!(
        store.load(&record.id).await.unwrap().is_none(),
        "every other call is answered, so the bound holds"
    );
}

#[tokio::test]
async fn health_of_an_uncached_store_follows_its_calls() {
    let proxy = Proxy::start().await;
    let (mongo, _) = behind(&proxy).await;
    let record = create(&mongo).await;
    let health = mongo.health();
    assert!(health.is_serving() && !health.is_degraded(), "{health:?}");
    assert_eq!((health.stream, health.lease, health.cache), (StreamHealth::Off, None, None));

    proxy.cut();
    mongo.load(&record.id).await.unwrap_err();
    eventually("the failure is known", async || {
        let health = mongo.health();
        matches!(health.mongo, MongoHealth::Unresponsive { .. })
            && health.is_degraded()
            && !health.is_serving()
    })
    .await;
    proxy.mend();
    eventually("MongoDB is back", async || mongo.load(&record.id).await.is_ok()).await;
    eventually("and its health shows it", async || mongo.health().is_serving()).await;
}

#[tokio::test]
async fn store_without_stream_by_choice_is_not_degraded() {
    let build = async |builder: CachedMongoStoreBuilder| builder.build().await.unwrap().health();
    let builder = || async { CachedMongoStore::builder(MongoStore::connect(uri()).await.unwrap()) };
    let sole_writer = build(builder().await.coherence(Coherence::SoleWriter)).await;
    assert_eq!(sole_writer.lease, Some(LeaseHealth::Unbounded));
    let time_bound = build(builder().await.coherence(Coherence::TimeBound)).await;
    assert_eq!(time_bound.lease, Some(LeaseHealth::PerSession));
    let uncached = build(builder().await.max_staleness(Duration::ZERO)).await;
    for health in [sole_writer, time_bound, uncached] {
        assert_eq!(health.stream, StreamHealth::Off);
        assert!(health.is_serving() && !health.is_degraded(), "{health:?}");
    }

    let proxy = Proxy::start().await;
    let (_, builder) = behind(&proxy).await;
    let held = proxy.hold("aggregate");
    let refused = tokio::spawn(builder.build());
    held.refuse(40573);
    let store = refused.await.unwrap().unwrap();
    let health = store.health();
    assert!(matches!(health.stream, StreamHealth::Unavailable { .. }), "{health:?}");
    assert_eq!(health.lease, Some(LeaseHealth::PerSession));
    assert!(health.is_serving() && !health.is_degraded(), "{health:?}");
}

#[tokio::test]
async fn stream_that_opens_late_is_shown_as_opening() {
    let proxy = Proxy::start().await;
    let (_, builder) = behind(&proxy).await;
    let mut held = proxy.hold("aggregate");
    let store = builder.build().await.unwrap();
    held.reached().await;
    let health = store.health();
    assert!(matches!(health.stream, StreamHealth::Opening { .. }), "{health:?}");
    assert!(health.is_serving() && health.is_degraded(), "{health:?}");
    held.cut();
    wait_until_fresh(&store).await;
}

#[tokio::test]
async fn store_that_was_shut_down_is_closed_and_empty() {
    let mongo = common::mongo().await;
    for through_the_lower_tier in [false, true] {
        let mongo = if through_the_lower_tier { common::mongo().await } else { mongo.clone() };
        let (meters, guard) = Meters::install();
        let store = CachedMongoStore::builder(mongo.clone()).build().await.unwrap();
        drop(guard);
        for _ in 0..1_000 {
            create(&store).await;
        }
        assert!(store.health().cache.unwrap().entries >= 1_000);
        if through_the_lower_tier {
            mongo.shutdown().await;
        } else {
            store.shutdown().await;
        }
        let health = store.health();
        assert!(!health.open && !health.is_serving() && health.is_degraded(), "{health:?}");
        assert_eq!((health.mongo, health.stream), (MongoHealth::Closed, StreamHealth::Off));
        let held = health.cache.unwrap();
        assert_eq!((health.lease, held.entries, held.bytes), (None, 0, 0));
        for gauge in ["cache_entries", "cache_bytes", "stream_open", "stream_lag_seconds"] {
            let value = meters.value(&format!("session_store_{gauge}"));
            assert!(value.abs() < 0.001, "{gauge} {value}");
        }
        assert!(meters.value("session_store_cache_limit_bytes") > 0.5, "until it is dropped");
        drop(store);
        assert!(meters.value("session_store_cache_limit_bytes").abs() < 0.5);
        assert_eq!(mongo.health().mongo, MongoHealth::Closed);
    }
}

#[tokio::test]
async fn health_is_json_without_ids_and_does_no_io() {
    let commands = Commands::default();
    let mongo = commands.mongo(&uri()).await;
    let builder = CachedMongoStore::builder(mongo).coherence(Coherence::TimeBound).max_entries(7);
    let store = builder.build().await.unwrap();
    let record = create(&store).await;
    let sent = commands.all();
    let mut health = Value::Null;
    for _ in 0..100 {
        health = serde_json::to_value(store.health()).unwrap();
    }
    assert_eq!(commands.all(), sent);
    let last_answer = health["mongo"]["last_answer_seconds"].take();
    assert!((0.0..60.0).contains(&last_answer.as_f64().unwrap()), "{last_answer}");
    let bytes = health["cache"]["bytes"].take();
    assert!(bytes.as_u64().unwrap() > 100, "{bytes}");
    assert_eq!(
        health,
        json!({
            "open": true,
            "mongo": { "state": "answers", "last_answer_seconds": null },
            "stream": { "state": "off" },
            "lease": { "state": "per_session" },
            "cache": { "entries": 1, "bytes": null, "limit_bytes": 64 << 20, "limit_entries": 7 },
        })
    );
    let followed = cached().await;
    eventually("a stream and a lease", async || {
        let health = serde_json::to_value(followed.health()).unwrap();
        let text = health.to_string();
        assert!(!text.contains(&record.id.to_string()), "{text}");
        health["stream"]["state"] == "open"
            && health["stream"]["lag_seconds"].is_f64()
            && health["lease"]["state"] == "fresh"
            && health["lease"]["left_seconds"].is_f64()
    })
    .await;
}
