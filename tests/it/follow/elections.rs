//! Elections: what a member of a replica set answers while it steps down, or before it is primary.
//! No change is missed, no acknowledged write is lost, and no stale session is served.

use session_test_proxy::{Commands, Injection, Lasts, Role, ServerError};
use tower_sessions::SessionStore;
use tower_sessions_moka_mongodb_store::MongoStore;

use super::faults::behind_a_proxy;
use super::{EMPTIED, OPEN, RESUMES, changed, instance, wait_until_at_least, wait_until_sees};
use crate::common::{cache_of, create, other_instance};
use crate::proxy::Proxy;

/// `QueryPlanKilled`, `NotWritablePrimary`, `InterruptedAtShutdown`, `ShutdownInProgress`.
const CODES: [i32; 4] = [175, 10107, 11600, 91];

/// More failures in a row than a resume token survives if the server refuses it.
const BURST: u32 = 5;

// | the other instance's stream  | this instance |
// |------------------------------|---------------|
// | getMore, its reply is held   |               |
// |                              | delete        |
// | the reply becomes an error   |               |
// | resumed where it was         |               |
// | the next getMores: errors    |               |
// | the delete is reported       |               |
#[tokio::test]
async fn election_during_a_stream_leaves_no_gap() {
    at_once(async |code| {
        let (proxy, meters, one, other, record) = behind_a_proxy().await;
        let mut held = proxy.hold("getMore");
        held.reached().await;
        one.delete(&record.id).await.unwrap();
        let error = || ServerError::new(code);
        let burst = proxy.inject("getMore", Injection::Refuse(error()), Lasts::Times(BURST));
        held.refuse_as(error());
        burst.reached(BURST).await;
        wait_until_sees(&other, &record, None).await;
        assert!(meters.value(RESUMES) >= f64::from(BURST), "{code}");
        assert!(meters.value(EMPTIED).abs() < 0.5, "{code}: the cache was emptied");
        for cause in ["history_lost", "refused", "collection_gone"] {
            let gaps = format!("session_store_stream_gaps_total{{cause={cause}}}");
            assert!(meters.value(&gaps).abs() < 0.5, "{code}: {cause}");
        }
        wait_until_at_least(&meters, OPEN, 1.0).await;
    })
    .await;
}

#[tokio::test]
async fn a_stream_resumes_once_its_server_is_primary_again() {
    let (proxy, meters, one, other, record) = behind_a_proxy().await;
    proxy.introduce_as(Role::Secondary);
    let refused = Injection::Refuse(ServerError::new(10107));
    let refused = proxy.inject(Commands::All, refused, Lasts::UntilStopped);
    refused.reached(1).await;
    one.delete(&record.id).await.unwrap();
    refused.stop();
    proxy.introduce_as(Role::ItsOwn);
    wait_until_sees(&other, &record, None).await;
    assert!(meters.value(EMPTIED).abs() < 0.5, "nothing was lost");
}

#[tokio::test]
async fn load_during_an_election_returns_the_session_or_an_error() {
    at_once(async |code| {
        let proxy = Proxy::start().await;
        let record = create(&other_instance(proxy.direct()).await).await;
        let mongo = other_instance(proxy.uri()).await;
        let store = cache_of(&mongo).await;
        let refuse = Injection::Refuse(ServerError::new(code));
        let refused = proxy.inject("find", refuse, Lasts::Times(BURST));
        let uncached = SessionStore::load(&mongo, &record.id).await;
        let cached = SessionStore::load(&store, &record.id).await;
        for found in [uncached, cached].into_iter().flatten() {
            assert_eq!(found.unwrap().data, record.data, "{code}: an error is no absence");
        }
        assert!(refused.count() > 0, "{code}");
        refused.stop();
        wait_until_sees(&store, &record, Some(&record)).await;
    })
    .await;
}

/// How the server loses the reply to a write.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Moment {
    BeforeTheWrite,
    AfterTheWrite,
    WhileItReplicates,
}

#[tokio::test]
async fn save_during_an_election_is_kept_or_fails_with_unknown_outcome() {
    at_once(async |code| {
        let each = [
            (Moment::BeforeTheWrite, 1),
            (Moment::BeforeTheWrite, BURST),
            (Moment::AfterTheWrite, BURST),
            (Moment::WhileItReplicates, BURST),
        ];
        let each = each.map(async |(moment, times)| {
            let proxy = Proxy::start().await;
            let one = instance(proxy.direct()).await;
            let mongo = MongoStore::connect(proxy.direct()).await.unwrap();
            let other = instance(proxy.uri()).await;
            let record = create(&one).await;
            wait_until_sees(&other, &record, Some(&record)).await;
            let error = ServerError::new(code);
            let injection = match moment {
                Moment::BeforeTheWrite => Injection::Refuse(error),
                Moment::AfterTheWrite => Injection::RefuseAfterwards(error),
                Moment::WhileItReplicates => Injection::WriteConcern(error),
            };
            let refused = proxy.inject("update", injection, Lasts::Times(times));
            let saved = changed(&record);
            let outcome = other.save(&saved).await;
            refused.stop();
            let what = format!("{code}, {moment:?}, {times} times: {outcome:?}");
            assert!(refused.count() > 0, "{what}");
            let stored = SessionStore::load(&mongo, &record.id).await.unwrap().unwrap();
            if outcome.is_ok() || moment != Moment::BeforeTheWrite {
                assert_eq!(stored.data, saved.data, "{what}");
            }
            // Neither instance serves anything but what is stored.
            let found = SessionStore::load(&other, &record.id).await;
            assert!(found.is_ok_and(|found| found.unwrap().data == stored.data), "{what}");
            wait_until_sees(&one, &record, Some(&stored)).await;
        });
        futures::future::join_all(each).await;
    })
    .await;
}

/// Runs a test with all codes at once: the driver waits half a second after each error.
async fn at_once(test: impl AsyncFn(i32)) {
    futures::future::join_all(CODES.map(|code| test(code))).await;
}
