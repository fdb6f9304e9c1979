//! Change streams that break off, stall, are refused or cannot be opened.

use std::time::{Duration, Instant};

use session_test_proxy::{Injection, Lasts, ServerError};
use tower_sessions::SessionStore;
use tower_sessions::session::Record;
use tower_sessions_moka_mongodb_store::{CachedMongoStore, MongoStore};

use super::{
    EMPTIED, OPEN, OTHER, RESUMES, builder, instance, load, metered, wait_until_at_least,
    wait_until_sees,
};
use crate::common::{FOREVER, Meters, create, eventually};
use crate::proxy::Proxy;

/// An instance whose stream the test controls, an instance whose stream it does not control, and a
/// session that both have cached.
pub(super) async fn behind_a_proxy() -> (Proxy, Meters, CachedMongoStore, CachedMongoStore, Record)
{
    let proxy = Proxy::start().await;
    let one = instance(proxy.direct()).await;
    let (meters, other) = metered(proxy.uri()).await;
    let record = create(&one).await;
    wait_until_sees(&other, &record, Some(&record)).await;
    (proxy, meters, one, other, record)
}

#[tokio::test]
async fn cut_stream_resumes_at_its_token() {
    let (proxy, meters, one, other, record) = behind_a_proxy().await;
    let mut held = proxy.hold("getMore");
    held.reached().await;
    one.delete(&record.id).await.unwrap();
    assert!(load(&other, &record).await.is_some(), "the report is on its way");
    held.cut();
    wait_until_sees(&other, &record, None).await;
    wait_until_at_least(&meters, RESUMES, 1.0).await;
    assert!(meters.value(EMPTIED).abs() < 0.5, "nothing was lost");
    wait_until_at_least(&meters, OPEN, 1.0).await;
}

#[tokio::test]
async fn lost_history_empties_the_cache_once_a_new_stream_is_open() {
    for code in [286, 280, 136] {
        let (proxy, meters, one, other, record) = behind_a_proxy().await;
        let mut held = proxy.hold("getMore");
        held.reached().await;
        one.delete(&record.id).await.unwrap();
        held.refuse(code);
        wait_until_sees(&other, &record, None).await;
        wait_until_at_least(&meters, EMPTIED, 1.0).await;
        wait_until_at_least(&meters, "session_store_stream_gaps_total{cause=history_lost}", 1.0)
            .await;
    }
}

#[tokio::test]
async fn resume_token_that_is_refused_repeatedly_is_given_up() {
    let (proxy, meters, one, other, record) = behind_a_proxy().await;
    let mut held = proxy.hold("getMore");
    held.reached().await;
    one.delete(&record.id).await.unwrap();
    let refused: Vec<_> = (0..2).map(|_| proxy.hold("aggregate")).collect();
    held.refuse(1);
    for held in refused {
        held.refuse(1);
    }
    wait_until_sees(&other, &record, None).await;
    wait_until_at_least(&meters, "session_store_stream_gaps_total{cause=refused}", 1.0).await;
}

#[tokio::test]
async fn stalled_stream_serves_no_session_past_the_bound() {
    const BOUND: Duration = Duration::from_secs(1);

    let proxy = Proxy::start().await;
    let one = instance(proxy.direct()).await;
    let builder = builder(proxy.uri()).await.max_staleness(BOUND);
    let (meters, guard) = Meters::install();
    let other = builder.build().await.unwrap();
    drop(guard);
    let record = create(&one).await;
    wait_until_sees(&other, &record, Some(&record)).await;
    let mut held = proxy.hold("getMore");
    held.reached().await;
    one.delete(&record.id).await.unwrap();
    let deleted = Instant::now();
    loop {
        let begun = deleted.elapsed();
        match load(&other, &record).await {
            Some(_) => assert!(begun <= BOUND, "served {begun:?} after the log-out"),
            None => break,
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    assert!(meters.value("session_store_loads_total{result=expired}") >= 1.0);
    held.deliver();
}

#[tokio::test]
async fn build_does_not_wait_for_a_stream_past_its_deadline() {
    let proxy = Proxy::start().await;
    let mongo = MongoStore::builder().uri(proxy.uri());
    let mongo = mongo.operation_timeout(Duration::from_millis(300)).build().await.unwrap();
    let mut held = proxy.hold("aggregate");
    let builder = CachedMongoStore::builder(mongo).max_staleness(FOREVER);
    let (meters, guard) = Meters::install();
    let store = builder.build().await.unwrap();
    drop(guard);
    held.reached().await;
    assert!(meters.value(OPEN).abs() < 0.5);
    let record = create(&store).await;
    assert!(load(&store, &record).await.is_some());
    held.cut();
    eventually("the stream opens later", async || meters.value(OPEN) > 0.5).await;
    assert!(load(&store, &record).await.is_some());
}

#[tokio::test]
async fn dropped_build_leaves_no_change_stream() {
    let proxy = Proxy::start().await;
    let mongo = MongoStore::builder().uri(proxy.uri()).operation_timeout(FOREVER);
    let mongo = mongo.build().await.unwrap();
    let mut held = proxy.hold("aggregate");
    let build = CachedMongoStore::builder(mongo.clone()).build();
    tokio::select! {
        _ = build => panic!("the stream cannot be open"),
        _ = held.reached() => {}
    }
    held.abandoned().await;
    mongo.shutdown().await;
}

#[tokio::test]
async fn store_without_change_stream_keeps_the_staleness_bound() {
    for code in [40573, 13] {
        let proxy = Proxy::start().await;
        let one = instance(proxy.direct()).await;
        let builder = builder(proxy.uri()).await.max_staleness(Duration::from_millis(200));
        let held = proxy.hold("aggregate");
        let (meters, guard) = Meters::install();
        let build = builder.build();
        held.refuse(code);
        let other = build.await.unwrap();
        drop(guard);
        let record = create(&one).await;
        wait_until_sees(&other, &record, Some(&record)).await;
        one.delete(&record.id).await.unwrap();
        wait_until_sees(&other, &record, None).await;
        assert!(meters.value(OPEN).abs() < 0.5 && meters.value(OTHER).abs() < 0.5);
    }
}

/// `IngressRequestRateLimitExceeded`, `AdmissionQueueOverflow`, `RateLimitExceeded` and
/// `PooledConnectionAcquisitionRejected`.
#[tokio::test]
async fn overload_keeps_the_resume_token_and_the_cache() {
    /// The driver sends each command three times. Then the token survived three refusals.
    const REFUSED: u32 = 15;

    let overload = async |code| {
        let (proxy, meters, one, other, record) = behind_a_proxy().await;
        let refuse = Injection::Refuse(ServerError::new(code));
        let commands: &[&str] = &["getMore", "aggregate"];
        let refused = proxy.inject(commands, refuse, Lasts::Times(REFUSED));
        refused.reached(REFUSED).await;
        one.delete(&record.id).await.unwrap();
        wait_until_sees(&other, &record, None).await;
        assert!(meters.value(EMPTIED).abs() < 0.5, "{code}: the cache was emptied");
        let gaps = meters.value("session_store_stream_gaps_total{cause=refused}");
        assert!(gaps.abs() < 0.5, "{code}");
    };
    futures::future::join_all([462, 433, 449, 450].map(overload)).await;
}
