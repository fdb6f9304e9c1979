//! The catalogue of metrics, on real stores. Each series exists from the start, and moves when the
//! event happens that it counts. The series of the change stream are tested in `follow`.

use std::collections::BTreeSet;
use std::time::Duration;

use futures::future::join_all;
use metrics_exporter_prometheus::PrometheusBuilder;
use serde_json::json;
use tower_sessions::SessionStore;
use tower_sessions::session::Record;
use tower_sessions_moka_mongodb_store::mongodb::bson::doc;
use tower_sessions_moka_mongodb_store::{
    CachedMongoStore, CachedMongoStoreBuilder, Coherence, MongoStore,
};

use crate::common::{FOREVER, Meters, create, eventually, serial, uri};
use crate::metrics::{assert_count, operations};
use crate::proxy::Proxy;

const LIVE: &str = "session_store_live_sessions";

fn fills(outcome: &str) -> String {
    format!("session_store_cache_fills_total{{outcome={outcome}}}")
}

fn invalidations(cause: &str) -> String {
    format!("session_store_cache_invalidations_total{{cause={cause}}}")
}

/// A cache without a change stream, and the store behind it.
async fn without_stream(
    uri: &str,
    with: impl FnOnce(CachedMongoStoreBuilder) -> CachedMongoStoreBuilder,
) -> (Meters, MongoStore, CachedMongoStore) {
    let (meters, guard) = Meters::install();
    let mongo = MongoStore::connect(uri).await.unwrap();
    let builder = CachedMongoStore::builder(mongo.clone()).coherence(Coherence::TimeBound);
    let cached = with(builder.max_staleness(FOREVER)).build().await.unwrap();
    drop(guard);
    (meters, mongo, cached)
}

fn changed(record: &Record) -> Record {
    let mut record = record.clone();
    record.data.insert("changed".to_owned(), json!(serial()));
    record
}

/// The names in the table of the documentation.
fn documented() -> BTreeSet<&'static str> {
    let table = include_str!("../../src/metrics.md");
    let name = |line: &'static str| line.strip_prefix("| `")?.split('`').next();
    table.lines().filter_map(name).collect()
}

#[tokio::test]
async fn built_stores_register_exactly_the_documented_metrics() {
    let (meters, _, _store) = without_stream(&uri(), |builder| builder).await;
    let names = meters.names();
    let found: BTreeSet<_> = names.iter().map(|name| name.split('{').next().unwrap()).collect();
    assert_eq!(found, documented());
}

#[tokio::test]
async fn metrics_of_named_stores_are_separate() {
    let recorder = PrometheusBuilder::new().build_recorder();
    let rendered = recorder.handle();
    let guard = metrics::set_default_local_recorder(Box::leak(Box::new(recorder)));
    let shop = MongoStore::builder().uri(uri()).name("shop").build().await.unwrap();
    let shop = CachedMongoStore::builder(shop).build().await.unwrap();
    let admin = MongoStore::builder().uri(uri()).name("admin").build().await.unwrap();
    let admin = CachedMongoStore::builder(admin).name("admin cache").build().await.unwrap();
    drop(guard);
    for _ in 0..3 {
        create(&shop).await;
    }
    create(&admin).await;
    let text = rendered.render();
    for line in [
        r#"session_store_cache_entries{store="shop"} 3"#,
        r#"session_store_cache_entries{store="admin cache"} 1"#,
        r#"session_store_mongo_operations_total{verb="insert",outcome="ok",store="shop"} 3"#,
        r#"session_store_mongo_operations_total{verb="insert",outcome="ok",store="admin"} 1"#,
        r#"session_store_mongo_retries_total{cause="stream",store="admin"} 0"#,
        r#"session_store_max_staleness_seconds{store="admin cache"} 5"#,
        r#"session_store_live_sessions{store="shop"} 0"#,
    ] {
        assert!(text.lines().any(|found| found == line), "{line} in {text}");
    }
    let unnamed = |line: &&str| !line.starts_with('#') && !line.is_empty();
    for line in text.lines().filter(unnamed) {
        assert!(line.contains("store=\""), "{line}");
    }
    assert!(
        text.contains("# HELP session_store_loads_total Loads, by how they were answered"),
        "{text}"
    );

    let error = MongoStore::builder().uri(uri()).name("").build().await.unwrap_err();
    assert!(error.to_string().contains("`name` is empty"), "{error}");
    let builder = CachedMongoStore::builder(MongoStore::connect(uri()).await.unwrap()).name("");
    assert!(builder.build().await.unwrap_err().to_string().contains("`name` is empty"));
}

#[tokio::test]
async fn limit_gauges_show_the_options_and_end_with_the_store() {
    let limits = ["session_store_cache_limit_bytes", "session_store_cache_limit_entries"];
    let (meters, _, store) =
        without_stream(&uri(), |builder| builder.max_bytes(1 << 20).max_entries(100)).await;
    assert_count(&meters, limits[0], 1 << 20);
    assert_count(&meters, limits[1], 100);
    assert_count(&meters, "session_store_max_staleness_seconds", 3_600);
    drop(store);
    for limit in limits {
        eventually("the gauge returns to zero", async || meters.value(limit).abs() < 0.5).await;
    }
    let (meters, _, _store) =
        without_stream(&uri(), |builder| builder.coherence(Coherence::SoleWriter)).await;
    assert_count(&meters, limits[1], 0);
    assert!(meters.value("session_store_max_staleness_seconds").is_infinite());
}

#[tokio::test]
async fn loads_past_the_lease_are_counted_as_expired() {
    let (meters, mongo, store) =
        without_stream(&uri(), |builder| builder.max_staleness(Duration::from_millis(20))).await;
    let record = create(&mongo).await;
    let mut loads = 0.0;
    let expired = "session_store_loads_total{result=expired}";
    eventually("one load is past the lease", async || {
        store.load(&record.id).await.unwrap();
        loads += 1.0;
        meters.value(expired) >= 1.0
    })
    .await;
    let of = |result: &str| meters.value(&format!("session_store_loads_total{{result={result}}}"));
    let all: f64 = ["hit", "miss", "absent", "coalesced", "expired", "grace"].map(of).iter().sum();
    assert!((all - loads).abs() < 0.5, "{all} for {loads} loads");
    assert_count(&meters, "session_store_loads_total{result=miss}", 1);
}

#[tokio::test]
async fn fills_are_counted_by_outcome() {
    let proxy = Proxy::start().await;
    let (meters, mongo, store) = without_stream(proxy.uri(), |builder| builder).await;
    let record = create(&mongo).await;
    store.load(&record.id).await.unwrap();
    assert_count(&meters, &fills("stored"), 1);
    store.load(&record.id).await.unwrap();
    assert_count(&meters, &fills("stored"), 1);
    store.load(&crate::common::record().id).await.unwrap();
    assert_count(&meters, &fills("absent"), 1);

    let other = create(&mongo).await;
    let mut held = proxy.hold("find");
    let load = tokio::spawn({
        let store = store.clone();
        let id = other.id;
        async move { store.load(&id).await }
    });
    held.reached().await;
    store.save(&changed(&other)).await.unwrap();
    held.deliver();
    load.await.unwrap().unwrap();
    assert_count(&meters, &fills("overtaken"), 1);
    assert_count(&meters, &invalidations("overtaken"), 1);

    mongo.collection().update_many(doc! {}, doc! { "$set": { "format": 2 } }).await.unwrap();
    store.load(&other.id).await.unwrap_err();
    assert_count(&meters, &fills("failed"), 1);

    let (meters, mongo, store) = without_stream(&uri(), |builder| builder.max_bytes(0)).await;
    let record = create(&mongo).await;
    store.load(&record.id).await.unwrap();
    assert_count(&meters, &fills("unfit"), 1);
}

#[tokio::test]
async fn invalidation_is_counted_by_cause_if_an_entry_was_cached() {
    let proxy = Proxy::start().await;
    let (meters, mongo, store) =
        without_stream(proxy.uri(), |builder| builder.max_bytes(1 << 16)).await;
    let record = create(&store).await;
    store.delete(&record.id).await.unwrap();
    assert_count(&meters, &invalidations("delete"), 1);
    store.delete(&record.id).await.unwrap();
    assert_count(&meters, &invalidations("delete"), 1);

    let record = create(&store).await;
    mongo.delete(&record.id).await.unwrap();
    store.save(&changed(&record)).await.unwrap();
    assert_count(&meters, &invalidations("gone"), 1);

    let mut record = create(&store).await;
    record.data.insert("large".to_owned(), json!("x".repeat(1 << 17)));
    store.save(&record).await.unwrap();
    assert_count(&meters, &invalidations("unfit"), 1);

    let record = create(&store).await;
    let mut held = proxy.hold("update");
    let save = tokio::spawn({
        let store = store.clone();
        let changed = changed(&record);
        async move { store.save(&changed).await }
    });
    held.reached().await;
    held.refuse(1);
    save.await.unwrap().unwrap_err();
    assert_count(&meters, &invalidations("unknown_outcome"), 1);

    store.clear().await.unwrap();
    assert_count(&meters, &invalidations("clear"), 1);
    store.shutdown().await;
    for cause in ["remote", "own_write", "overtaken", "gap"] {
        assert_count(&meters, &invalidations(cause), 0);
    }
}

#[tokio::test]
async fn change_of_another_instance_is_counted_if_it_was_cached() {
    let uri = uri();
    let (meters, guard) = Meters::install();
    let mongo = MongoStore::connect(&uri).await.unwrap();
    let store = CachedMongoStore::builder(mongo).max_staleness(FOREVER).build().await.unwrap();
    drop(guard);
    let other = crate::common::other_instance(&uri).await;
    let cached = create(&store).await;
    let unknown = create(&other).await;
    other.delete(&unknown.id).await.unwrap();
    other.delete(&cached.id).await.unwrap();
    eventually("both are reported", async || {
        meters.value("session_store_stream_events_total{origin=other}") >= 2.0
    })
    .await;
    assert_count(&meters, &invalidations("remote"), 1);
}

#[tokio::test]
async fn reopened_stream_is_counted_as_a_retry() {
    const STREAM: &str = "session_store_mongo_retries_total{cause=stream}";

    let proxy = Proxy::start().await;
    let (meters, guard) = Meters::install();
    let mongo = MongoStore::builder().uri(proxy.uri()).operation_timeout(Duration::from_secs(1));
    let mongo = mongo.build().await.unwrap();
    let store = CachedMongoStore::builder(mongo).max_staleness(FOREVER).build().await.unwrap();
    drop(guard);
    eventually("it is open", async || meters.value("session_store_stream_open") > 0.5).await;
    assert_count(&meters, STREAM, 0);
    proxy.cut();
    eventually("it is opened again", async || meters.value(STREAM) >= 1.0).await;
    assert_count(&meters, "session_store_stream_open", 0);
    proxy.mend();
    eventually("it continues", async || {
        meters.value("session_store_stream_resumes_total") >= 1.0
            && meters.value("session_store_stream_open") > 0.5
    })
    .await;
    store.shutdown().await;
}

#[tokio::test]
async fn batches_and_skipped_touches_are_counted() {
    let (meters, guard) = Meters::install();
    let mongo = MongoStore::builder().uri(uri()).max_commands_in_flight(1).build().await.unwrap();
    let builder = CachedMongoStore::builder(mongo.clone()).touch_after(Duration::from_secs(60));
    let store = builder.build().await.unwrap();
    drop(guard);
    let records = join_all((0..20).map(|_| create(&mongo))).await;
    join_all(records.iter().map(|record| mongo.load(&record.id))).await;
    join_all(records.iter().map(|record| mongo.save(record))).await;
    for verb in ["find", "bulk"] {
        let size = format!("session_store_mongo_batch_size{{verb={verb}}}");
        assert!(meters.value(&size) >= 1.0, "{verb}");
    }
    let record = create(&store).await;
    store.save(&record).await.unwrap();
    assert_count(&meters, "session_store_touches_skipped_total", 1);
}

#[tokio::test]
async fn live_sessions_are_counted_at_the_interval_and_a_failure_keeps_the_count() {
    let proxy = Proxy::start().await;
    let (meters, guard) = Meters::install();
    let builder =
        || MongoStore::builder().uri(proxy.uri()).operation_timeout(Duration::from_secs(1));
    let every = Duration::from_millis(20);
    let quiet = builder().build().await.unwrap();
    let store = builder().count_every(every).build().await.unwrap();
    drop(guard);
    let record = create(&quiet).await;
    create(&quiet).await;
    eventually("both are counted", async || (meters.value(LIVE) - 2.0).abs() < 0.1).await;
    quiet.delete(&record.id).await.unwrap();
    eventually("one has gone", async || (meters.value(LIVE) - 1.0).abs() < 0.1).await;

    proxy.cut();
    let failed = || {
        let of = |outcome| meters.value(&operations("count", outcome));
        of("unreachable") + of("timeout")
    };
    eventually("a count fails", async || failed() >= 1.0).await;
    assert_count(&meters, LIVE, 1);
    proxy.mend();
    eventually("it continues", async || create(&quiet).await.id != record.id).await;
    eventually("and counts", async || meters.value(LIVE) > 1.5).await;
    store.shutdown().await;
    assert_count(&meters, LIVE, 0);
    let counted = meters.value(&operations("count", "ok"));
    create(&quiet).await;
    assert!((meters.value(&operations("count", "ok")) - counted).abs() < 0.1, "it has ended");

    let error = builder().count_every(Duration::ZERO).build().await.unwrap_err();
    assert!(error.to_string().contains("`count_every`"), "{error}");
}
