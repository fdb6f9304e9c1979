//! `max_sessions_per_owner`: how many live sessions an owner may have, and what happens beyond that.

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::http::{Request, StatusCode, header};
use axum::routing::get;
use futures::future::join_all;
use futures::{TryStreamExt, poll};
use http_body_util::BodyExt;
use mongodb::bson::{DateTime, doc};
use serde_json::json;
use session_test_proxy::{Injection, Lasts, ServerError};
use tower::ServiceExt;
use tower_sessions::session::Record;
use tower_sessions::{Session, SessionManagerLayer, SessionStore, session_store};
use tower_sessions_moka_mongodb_store::{
    CachedMongoStore, Coherence, ErrorKind, ExpiredRemoval, MongoStore, MongoStoreBuilder, OnLimit,
    mongodb,
};

use crate::common::{
    Commands, FOREVER, Meters, PATIENCE, Store, cache_of, create, eventually, on_both_tiers,
    record, uri,
};
use crate::metrics::assert_count;
use crate::owner::Owned;
use crate::proxy::Proxy;

const EVICTED: &str = "session_store_sessions_over_limit_total{outcome=evicted}";
const REFUSED: &str = "session_store_sessions_over_limit_total{outcome=refused}";

on_both_tiers! {
    evict_keeps_the_newest_sessions = evict_keeps_the_newest;
    refuse_keeps_the_older_sessions = refuse_keeps_the_older;
    limit_leaves_other_sessions_alone = others_stay;
    expired_sessions_do_not_count = expired_do_not_count;
    evict_ends_more_sessions_than_a_page_has = evict_more_than_a_page;
    cycle_id_at_the_limit_succeeds = cycle_id_at_the_limit;
    log_in_with_a_late_clock_is_refused_too = late_clock_is_refused;
    panic_in_the_owner_function_stores_nothing = owner_function_panics;
}

/// The user of a session, if a user is logged in.
fn user(data: &std::collections::HashMap<String, serde_json::Value>) -> Option<String> {
    Some(data.get("user")?.as_str().unwrap().to_owned())
}

fn limited(builder: MongoStoreBuilder, max: u32, on_limit: OnLimit) -> MongoStoreBuilder {
    builder.owner(user).max_sessions_per_owner(max, on_limit)
}

async fn with_limit<S: Owned>(store: &S, max: u32, on_limit: OnLimit) -> S {
    store.with(|builder| limited(builder, max, on_limit)).await
}

fn of(owner: &str) -> Record {
    let mut record = record();
    record.data.insert("user".to_owned(), json!(owner));
    record
}

async fn try_log_in(
    store: &impl SessionStore,
    owner: &str,
) -> Result<Record, session_store::Error> {
    let mut record = of(owner);
    store.create(&mut record).await?;
    Ok(record)
}

async fn log_in(store: &impl SessionStore, owner: &str) -> Record {
    try_log_in(store, owner).await.unwrap()
}

/// Logs in at a later millisecond than every log-in before. `created` has whole milliseconds.
async fn log_in_later(store: &impl SessionStore, owner: &str) -> Record {
    let before = DateTime::now();
    while DateTime::now() <= before {
        tokio::task::yield_now().await;
    }
    log_in(store, owner).await
}

fn assert_refused<T: std::fmt::Debug>(outcome: Result<T, session_store::Error>) {
    let session_store::Error::Backend(said) = outcome.unwrap_err() else {
        panic!("an error of the backend")
    };
    assert!(said.contains("the new session was refused"), "{said}");
}

async fn is_there(store: &impl SessionStore, record: &Record) -> bool {
    store.load(&record.id).await.unwrap().is_some()
}

async fn all_are_there(store: &impl SessionStore, records: &[Record]) -> Vec<bool> {
    join_all(records.iter().map(|record| is_there(store, record))).await
}

async fn evict_keeps_the_newest(store: impl Owned) {
    let store = with_limit(&store, 2, OnLimit::Evict).await;
    let mut records = Vec::new();
    for _ in 0..5 {
        records.push(log_in_later(&store, "ferris").await);
    }
    let newest = [false, false, false, true, true];
    assert_eq!(all_are_there(&store, &records).await, newest);
    assert_eq!(store.length().await.unwrap(), 2);
    // A save of a session that was evicted does not bring it back.
    store.save(&records[0]).await.unwrap();
    assert_eq!(all_are_there(&store, &records).await, newest);
}

async fn refuse_keeps_the_older(store: impl Owned) {
    let store = with_limit(&store, 2, OnLimit::Refuse).await;
    let one = log_in_later(&store, "ferris").await;
    let other = log_in_later(&store, "ferris").await;
    for _ in 0..3 {
        assert_refused(try_log_in(&store, "ferris").await);
        assert_eq!(store.documents().await, 2);
    }
    assert!(is_there(&store, &one).await && is_there(&store, &other).await);
    store.delete(&one.id).await.unwrap();
    let third = log_in(&store, "ferris").await;
    assert!(is_there(&store, &third).await && is_there(&store, &other).await);
    assert_refused(try_log_in(&store, "ferris").await);
}

async fn others_stay(store: impl Owned) {
    for on_limit in [OnLimit::Evict, OnLimit::Refuse] {
        let store = with_limit(&store, 1, on_limit).await;
        store.clear().await.unwrap();
        let corro = log_in(&store, "corro").await;
        let anonymous = [create(&store).await, create(&store).await];
        log_in(&store, "ferris").await;
        let second = try_log_in(&store, "ferris").await;
        assert_eq!(second.is_ok(), on_limit == OnLimit::Evict);
        assert!(is_there(&store, &corro).await, "{on_limit:?}");
        assert_eq!(all_are_there(&store, &anonymous).await, [true, true], "{on_limit:?}");
        assert_eq!(store.length().await.unwrap(), 4, "{on_limit:?}");
    }
}

async fn expired_do_not_count(store: impl Owned) {
    for on_limit in [OnLimit::Evict, OnLimit::Refuse] {
        let store = store.with(|builder| {
            limited(builder.expired_removal(ExpiredRemoval::Off), 2, on_limit).create_indexes(false)
        });
        let store = store.await;
        store.clear().await.unwrap();
        log_in_later(&store, "ferris").await;
        log_in_later(&store, "ferris").await;
        store.expire_all().await;
        let live = [log_in_later(&store, "ferris").await, log_in_later(&store, "ferris").await];
        assert_eq!(all_are_there(&store, &live).await, [true, true], "{on_limit:?}");
        assert_eq!(store.documents().await, 4, "{on_limit:?}: expired ones are not evicted");
    }
}

async fn evict_more_than_a_page(store: impl Owned) {
    let unlimited = store.with(|builder| builder.owner(user)).await;
    for _ in 0..3 {
        join_all((0..400).map(|_| log_in(&unlimited, "ferris"))).await;
    }
    let store = with_limit(&store, 3, OnLimit::Evict).await;
    let newest = log_in_later(&store, "ferris").await;
    assert!(is_there(&store, &newest).await);
    assert_eq!(store.documents().await, 3);
}

async fn cycle_id_at_the_limit(store: impl Owned) {
    for on_limit in [OnLimit::Evict, OnLimit::Refuse] {
        let store = with_limit(&store, 1, on_limit).await;
        store.clear().await.unwrap();
        let session = Session::new(None, Arc::new(store.clone()), None);
        session.insert("user", "ferris").await.unwrap();
        session.save().await.unwrap();
        for _ in 0..3 {
            let before = session.id();
            session.cycle_id().await.unwrap();
            session.save().await.unwrap();
            assert_ne!(session.id(), before);
            assert!(store.contains(session.id().unwrap()).await.unwrap(), "{on_limit:?}");
            assert_eq!(store.documents().await, 1, "{on_limit:?}");
        }
    }
}

/// The new session looks older than those that exist. It must not take the place of one.
async fn late_clock_is_refused(store: impl Owned) {
    let store = with_limit(&store, 1, OnLimit::Refuse).await;
    let first = log_in(&store, "ferris").await;
    let tomorrow = DateTime::from_millis(DateTime::now().timestamp_millis() + 86_400_000);
    let created = doc! { "$set": { "created": tomorrow } };
    store.collection().update_many(doc! {}, created).await.unwrap();
    assert_refused(try_log_in(&store, "ferris").await);
    assert!(is_there(&store, &first).await);
    assert_eq!(store.documents().await, 1);
}

async fn owner_function_panics(store: impl Owned) {
    for on_limit in [OnLimit::Evict, OnLimit::Refuse] {
        let store = with_limit(&store, 1, on_limit).await;
        let mut broken = record();
        broken.data.insert("user".to_owned(), json!(7));
        let error = store.create(&mut broken).await.unwrap_err();
        assert!(error.to_string().contains("the `owner` function panicked"), "{error}");
        assert_eq!(store.documents().await, 0);
    }
}

async fn instance(uri: &str, max: u32, on_limit: OnLimit) -> CachedMongoStore {
    let builder = MongoStore::builder().uri(uri).operation_timeout(PATIENCE);
    cache_of(&limited(builder, max, on_limit).build().await.unwrap()).await
}

/// Many browsers of one user log in at the same time, on two instances.
async fn log_in_in_parallel(max: u32, on_limit: OnLimit) {
    const BROWSERS: usize = 32;

    let uri = uri();
    let instances = [instance(&uri, max, on_limit).await, instance(&uri, max, on_limit).await];
    let kept = log_in(&instances[0], "corro").await;
    let max = u64::from(max);
    for round in 0..15 {
        let browsers = (0..BROWSERS).map(|number| {
            let store = instances[number % 2].clone();
            tokio::spawn(async move { try_log_in(&store, "ferris").await })
        });
        let outcomes: Vec<_> =
            join_all(browsers).await.into_iter().map(|outcome| outcome.unwrap()).collect();
        let there = instances[0].length().await.unwrap() - 1;
        let accepted: Vec<_> =
            outcomes.iter().filter_map(|outcome| outcome.as_ref().ok()).collect();
        if on_limit == OnLimit::Evict {
            assert_eq!(there, max, "round {round}");
            assert_eq!(accepted.len(), BROWSERS, "round {round}");
        } else {
            assert!((1..=max).contains(&there), "round {round}: {there}");
            assert_eq!(accepted.len() as u64, there, "round {round}");
        }
        for record in accepted {
            let stays = instances[0].contains(record.id).await.unwrap();
            for store in &instances {
                eventually("it is served if it is there", async || {
                    is_there(store, record).await == stays
                })
                .await;
            }
        }
        assert!(is_there(&instances[1], &kept).await);
        assert_eq!(instances[1].delete_by_owner("ferris").await.unwrap(), there);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn parallel_log_ins_with_evict_leave_exactly_the_limit() {
    for max in [1, 3] {
        log_in_in_parallel(max, OnLimit::Evict).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn parallel_log_ins_with_refuse_leave_at_least_one_and_at_most_the_limit() {
    for max in [1, 3] {
        log_in_in_parallel(max, OnLimit::Refuse).await;
    }
}

#[tokio::test]
async fn evicted_session_is_served_by_no_instance() {
    let uri = uri();
    let here = instance(&uri, 1, OnLimit::Evict).await;
    let there = instance(&uri, 1, OnLimit::Evict).await;
    for _ in 0..5 {
        let old = log_in_later(&here, "ferris").await;
        assert!(is_there(&here, &old).await && is_there(&there, &old).await, "both cache it");
        let new = log_in_later(&here, "ferris").await;
        assert!(!is_there(&here, &old).await, "at once here");
        eventually("the stream reports it", async || !is_there(&there, &old).await).await;
        assert!(is_there(&here, &new).await && is_there(&there, &new).await);
    }
}

/// A store behind a proxy, and another instance that reaches the server directly.
async fn behind_a_proxy(max: u32, on_limit: OnLimit) -> (Proxy, CachedMongoStore, MongoStore) {
    let proxy = Proxy::start().await;
    let store = instance(proxy.uri(), max, on_limit).await;
    let other = MongoStore::builder().uri(proxy.direct()).owner(user).build().await.unwrap();
    (proxy, store, other)
}

/// As [`behind_a_proxy`], but nothing tells the cache of changes. So only the rules of the store itself
/// remove an entry.
async fn without_stream(max: u32, on_limit: OnLimit) -> (Proxy, CachedMongoStore, MongoStore) {
    let (proxy, _, other) = behind_a_proxy(max, on_limit).await;
    let builder = MongoStore::builder().uri(proxy.uri()).operation_timeout(PATIENCE);
    let mongo = limited(builder, max, on_limit).build().await.unwrap();
    let builder = CachedMongoStore::builder(mongo).coherence(Coherence::TimeBound);
    (proxy, builder.max_staleness(FOREVER).build().await.unwrap(), other)
}

fn spawn_log_in(store: &CachedMongoStore) -> tokio::task::JoinHandle<Record> {
    let store = store.clone();
    tokio::spawn(async move { log_in(&store, "ferris").await })
}

/// ```text
/// load:    find ───────────────────────────────> its reply is delivered
/// log-in:        insert, find, delete the old one
/// ```
#[tokio::test]
async fn slow_load_of_an_evicted_session_leaves_no_entry() {
    let (proxy, store, other) = without_stream(1, OnLimit::Evict).await;
    let old = log_in_later(&other, "ferris").await;
    let mut held = proxy.hold("find");
    let slow = tokio::spawn({
        let store = store.clone();
        let old = old.clone();
        async move { is_there(&store, &old).await }
    });
    held.reached().await;
    log_in_later(&store, "ferris").await;
    held.deliver();
    assert!(slow.await.unwrap(), "it began before");
    assert!(!is_there(&store, &old).await);
}

/// ```text
/// log-in:  insert, find, delete the old one ──────────> the reply is delivered
/// load:                                      from cache
/// ```
#[tokio::test]
async fn session_that_is_loaded_while_it_is_evicted_leaves_no_entry() {
    let (proxy, store, _) = without_stream(1, OnLimit::Evict).await;
    let old = log_in_later(&store, "ferris").await;
    let mut held = proxy.hold("delete");
    let new = spawn_log_in(&store);
    held.reached().await;
    let _ = store.load(&old.id).await.unwrap();
    held.deliver();
    new.await.unwrap();
    assert!(!is_there(&store, &old).await);
}

/// The server rejects the delete for overload, and the driver repeats it.
///
/// ```text
/// log-in:  insert, find, delete (rejected) ─────────> the rejection is delivered, delete
/// load:                                     find
/// ```
#[tokio::test]
async fn session_that_is_loaded_before_the_server_evicts_it_leaves_no_entry() {
    let (proxy, store, other) = without_stream(1, OnLimit::Evict).await;
    let old = log_in_later(&other, "ferris").await;
    let overload = Injection::Refuse(ServerError::new(462));
    let rejected = proxy.inject("delete", overload, Lasts::Times(1));
    let mut held = proxy.hold("delete");
    let new = spawn_log_in(&store);
    held.reached().await;
    assert!(is_there(&store, &old).await, "it is not deleted yet");
    held.deliver();
    let new = new.await.unwrap();
    assert_eq!(rejected.count(), 1);
    assert!(!is_there(&store, &old).await);
    assert!(is_there(&store, &new).await);
}

/// ```text
/// first log-in:   insert ──────────────────────────> the reply is delivered, find
/// second log-in:          insert, find, delete the first one
/// ```
#[tokio::test]
async fn session_that_is_evicted_during_its_own_log_in_leaves_no_entry() {
    let (proxy, store, _) = without_stream(1, OnLimit::Evict).await;
    let mut held = proxy.hold("insert");
    let first = spawn_log_in(&store);
    held.reached().await;
    let second = log_in_later(&store, "ferris").await;
    held.deliver();
    let first = first.await.unwrap();
    assert!(!is_there(&store, &first).await);
    assert!(is_there(&store, &second).await);
}

/// A count has found a session, and the session gets another owner before it is removed.
#[tokio::test]
async fn evict_leaves_a_session_whose_owner_changed() {
    let (proxy, store, _) = behind_a_proxy(1, OnLimit::Evict).await;
    let mut old = log_in_later(&store, "ferris").await;
    let mut held = proxy.hold("find");
    let new = spawn_log_in(&store);
    held.reached().await;
    old.data.insert("user".to_owned(), json!("corro"));
    store.save(&old).await.unwrap();
    held.deliver();
    new.await.unwrap();
    assert_eq!(store.load(&old.id).await.unwrap().unwrap().data, old.data);
    assert_eq!(store.documents().await, 2);
}

/// Code 1 is not one that the driver repeats a command for.
fn internal_error() -> ServerError {
    ServerError::new(1)
}

#[tokio::test]
async fn error_after_the_insert_leaves_no_new_session() {
    let refuse = || Injection::Refuse(internal_error());
    let afterwards = || Injection::RefuseAfterwards(internal_error());
    for (on_limit, command, injection, left) in [
        (OnLimit::Evict, "find", refuse(), 1),
        (OnLimit::Refuse, "find", refuse(), 1),
        (OnLimit::Evict, "delete", refuse(), 1),
        // The old session has been evicted.
        (OnLimit::Evict, "delete", afterwards(), 0),
        (OnLimit::Refuse, "delete", refuse(), 1),
        (OnLimit::Refuse, "delete", afterwards(), 1),
        // The insert itself, with an outcome that is unknown.
        (OnLimit::Evict, "insert", afterwards(), 1),
        (OnLimit::Refuse, "insert", afterwards(), 1),
    ] {
        let what = format!("{on_limit:?} {command} {injection:?}");
        let (proxy, store, other) = without_stream(1, on_limit).await;
        let old = log_in_later(&other, "ferris").await;
        assert!(is_there(&store, &old).await, "it is cached");
        let injected = proxy.inject(command, injection, Lasts::Times(1));
        let error = try_log_in(&store, "ferris").await.unwrap_err().to_string();
        assert!(error.contains("error 1 (InternalError)"), "{what}: {error}");
        assert_eq!(injected.count(), 1, "{what}");
        eventually(&what, async || other.documents().await == left).await;
        assert_eq!(is_there(&store, &old).await, left == 1, "{what}");
    }
}

/// A server that rejects a step for overload has carried the insert out.
#[tokio::test]
async fn count_rejected_for_overload_leaves_no_new_session() {
    for on_limit in [OnLimit::Evict, OnLimit::Refuse] {
        let (proxy, store, other) = behind_a_proxy(1, on_limit).await;
        let overload =
            proxy.inject("find", Injection::Refuse(ServerError::new(462)), Lasts::UntilStopped);
        try_log_in(&store, "ferris").await.unwrap_err();
        assert!(overload.count() > 0);
        eventually("it is removed", async || other.documents().await == 0).await;
    }
}

#[tokio::test]
async fn log_in_past_its_deadline_leaves_no_session() {
    for command in ["insert", "find"] {
        for is_delivered in [true, false] {
            let proxy = Proxy::start().await;
            let timeout = Duration::from_millis(500);
            let builder = MongoStore::builder().uri(proxy.uri()).operation_timeout(timeout);
            let mongo = limited(builder, 1, OnLimit::Refuse).build().await.unwrap();
            let builder = CachedMongoStore::builder(mongo.clone()).max_staleness(FOREVER);
            let store = builder.build().await.unwrap();
            let other = MongoStore::connect(proxy.direct()).await.unwrap();
            for through_the_cache in [true, false] {
                let mut held = proxy.hold(command);
                let error = if through_the_cache {
                    try_log_in(&store, "ferris").await.unwrap_err()
                } else {
                    try_log_in(&mongo, "ferris").await.unwrap_err()
                };
                assert!(error.to_string().contains("within 500ms"), "{command}: {error}");
                held.reached().await;
                assert_eq!(other.documents().await, 1, "{command}");
                if is_delivered {
                    held.deliver();
                } else {
                    held.abandoned().await;
                }
                let what = format!("{command} {is_delivered}: it is removed");
                eventually(&what, async || other.documents().await == 0).await;
            }
        }
    }
}

#[tokio::test]
async fn log_in_without_its_caller_keeps_the_limit() {
    for on_limit in [OnLimit::Evict, OnLimit::Refuse] {
        for command in ["insert", "find", "delete"] {
            let what = format!("{on_limit:?}, dropped during {command}");
            let (proxy, store, other) = behind_a_proxy(1, on_limit).await;
            let uncached = limited(MongoStore::builder().uri(proxy.uri()), 1, on_limit);
            let uncached = uncached.build().await.unwrap();
            let old = log_in_later(&store, "ferris").await;
            for through_the_cache in [true, false] {
                let mut held = proxy.hold(command);
                {
                    let log_in = async {
                        if through_the_cache {
                            drop(try_log_in(&store, "ferris").await);
                        } else {
                            drop(try_log_in(&uncached, "ferris").await);
                        }
                    };
                    let mut log_in = Box::pin(log_in);
                    assert!(poll!(&mut log_in).is_pending());
                    held.reached().await;
                }
                held.deliver();
                eventually(&what, async || other.documents().await == 1).await;
                let live: Vec<_> = other.find_by_owner("ferris").try_collect().await.unwrap();
                assert_eq!(live.len(), 1, "{what}");
            }
            let stays = on_limit == OnLimit::Refuse;
            eventually(&what, async || is_there(&store, &old).await == stays).await;
        }
    }
}

#[tokio::test]
async fn shutdown_waits_for_a_log_in_in_progress() {
    let (proxy, store, other) = behind_a_proxy(1, OnLimit::Evict).await;
    log_in_later(&store, "ferris").await;
    let mut held = proxy.hold("find");
    let new = spawn_log_in(&store);
    held.reached().await;
    let mut shutdown = Box::pin(store.shutdown());
    assert!(poll!(&mut shutdown).is_pending());
    held.deliver();
    shutdown.await;
    let new = new.await.unwrap();
    assert_eq!(other.documents().await, 1);
    assert!(other.contains(new.id).await.unwrap());
}

#[tokio::test]
async fn only_new_sessions_that_have_an_owner_cost_more() {
    let commands = Commands::default();
    let client = commands.client(&uri()).await;
    let builder = || MongoStore::builder().client(client.clone()).owner(user);
    let unlimited = builder().build().await.unwrap();
    let limited = builder().max_sessions_per_owner(1, OnLimit::Evict).build().await.unwrap();
    let mut before = commands.all();
    let mut sent = || {
        let all = commands.all();
        all - std::mem::replace(&mut before, all)
    };
    log_in_later(&unlimited, "ferris").await;
    assert_eq!(sent(), 1);
    let anonymous = create(&limited).await;
    assert_eq!(sent(), 1);
    log_in_later(&limited, "corro").await;
    assert_eq!(sent(), 2, "insert and find");
    log_in_later(&limited, "ferris").await;
    assert_eq!(sent(), 3, "insert, find and delete");
    limited.save(&anonymous).await.unwrap();
    assert_eq!(sent(), 1);
}

#[tokio::test]
async fn evicted_and_refused_sessions_are_counted() {
    let uri = uri();
    let (meters, guard) = Meters::install();
    let evicts = instance(&uri, 1, OnLimit::Evict).await;
    let refuses = instance(&uri, 1, OnLimit::Refuse).await;
    drop(guard);
    assert_count(&meters, EVICTED, 0);
    assert_count(&meters, REFUSED, 0);
    for _ in 0..4 {
        log_in_later(&evicts, "ferris").await;
    }
    assert_count(&meters, EVICTED, 3);
    for _ in 0..2 {
        assert_refused(try_log_in(&refuses, "ferris").await);
    }
    assert_count(&meters, REFUSED, 2);
    assert_count(&meters, EVICTED, 3);
}

#[tokio::test]
async fn limit_needs_an_owner_and_at_least_one_session() {
    for on_limit in [OnLimit::Evict, OnLimit::Refuse] {
        let builder = || MongoStore::builder().uri(uri());
        for (builder, said) in [
            (builder().owner(user).max_sessions_per_owner(0, on_limit), "at least 1"),
            (builder().max_sessions_per_owner(1, on_limit), "give `owner` too"),
        ] {
            let error = builder.build().await.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Config);
            assert!(error.to_string().contains(said), "{error}");
        }
        let largest = limited(builder(), u32::MAX, on_limit).build().await.unwrap();
        log_in(&largest, "ferris").await;
        log_in(&largest, "ferris").await;
        assert_eq!(largest.length().await.unwrap(), 2);
    }
}

/// The handler of the guide's page on security.
async fn log_in_handler(session: Session) -> Result<&'static str, StatusCode> {
    let failed = |_| StatusCode::INTERNAL_SERVER_ERROR;
    session.cycle_id().await.map_err(failed)?;
    session.insert("user", "ferris").await.map_err(failed)?;
    match session.save().await {
        Ok(()) => Ok("welcome"),
        Err(error) if error.to_string().contains("max_sessions_per_owner") => {
            session.clear().await;
            Ok("too many sessions")
        }
        Err(error) => Err(failed(error)),
    }
}

async fn careless_log_in_handler(session: Session) -> &'static str {
    session.insert("user", "ferris").await.unwrap();
    "welcome"
}

#[tokio::test]
async fn refused_log_in_is_500_unless_the_handler_stores_the_session_itself() {
    let store = instance(&uri(), 1, OnLimit::Refuse).await;
    let app = Router::new()
        .route("/careful", get(log_in_handler))
        .route("/careless", get(careless_log_in_handler))
        .layer(SessionManagerLayer::new(store.clone()));
    let request = async |path: &str| {
        let request = Request::builder().uri(path).body(Body::empty()).unwrap();
        let response = app.clone().oneshot(request).await.unwrap();
        let status = response.status();
        let has_cookie = response.headers().contains_key(header::SET_COOKIE);
        let body = response.into_body().collect().await.unwrap().to_bytes();
        (status, has_cookie, String::from_utf8(body.to_vec()).unwrap())
    };
    assert_eq!(request("/careful").await, (StatusCode::OK, true, "welcome".to_owned()));
    let refused = (StatusCode::OK, false, "too many sessions".to_owned());
    assert_eq!(request("/careful").await, refused);
    let (status, has_cookie, _) = request("/careless").await;
    assert_eq!((status, has_cookie), (StatusCode::INTERNAL_SERVER_ERROR, false));
    assert_eq!(store.documents().await, 1);
}

/// Documents that no store writes: an expiry that is a list of dates, and an `_id` that is no key.
#[tokio::test]
async fn documents_that_are_no_live_sessions_do_not_count() {
    for on_limit in [OnLimit::Evict, OnLimit::Refuse] {
        let builder = limited(MongoStore::builder().uri(uri()), 2, on_limit);
        let store = builder.build().await.unwrap();
        log_in_later(&store, "ferris").await;
        let future = DateTime::from_millis(DateTime::now().timestamp_millis() + 3_600_000);
        let list = doc! { "$set": { "expires": [future, future] } };
        store.collection().update_many(doc! {}, list).await.unwrap();
        let others = store.collection().clone_with_type::<mongodb::bson::Document>();
        let theirs = |id: &str| {
            doc! { "_id": id, "owner": "ferris", "expires": future, "created": future }
        };
        others.insert_many([theirs("one"), theirs("other")]).await.unwrap();
        let live = [log_in_later(&store, "ferris").await, log_in_later(&store, "ferris").await];
        assert_eq!(all_are_there(&store, &live).await, [true, true], "{on_limit:?}");
        assert_eq!(store.documents().await, 5, "{on_limit:?}");
    }
}
