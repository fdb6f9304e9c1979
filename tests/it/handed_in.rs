//! A client that the app creates, gives to a store, and shuts down itself.

use std::time::Duration;

use futures::future::join_all;
use futures::{StreamExt, TryStreamExt};
use mongodb::Client;
use mongodb::bson::{Document, doc};
use mongodb::options::ClientOptions;
use tower_sessions::SessionStore;
use tower_sessions::session_store::{Error as TraitError, ExpiredDeletion};
use tower_sessions_moka_mongodb_store::{
    CachedMongoStore, Coherence, Error, ErrorKind, ExpiredRemoval, MongoStore, MongoStoreBuilder,
    Result, SessionHandle, mongodb,
};

use crate::common::{FOREVER, Log, Meters, PATIENCE, create, eventually, record, uri};
use crate::proxy::Proxy;

const SAID: &str = "the app has shut down the MongoDB client that it handed to this store";

/// Each way in which an app can give its client to a store.
fn handed_in(client: &Client) -> [MongoStoreBuilder; 3] {
    let database = client.default_database().unwrap();
    let builder = MongoStore::builder;
    [
        builder().client(client.clone()),
        builder().database_handle(database.clone()),
        builder().collection_handle(database.collection::<Document>("sessions")),
    ]
}

async fn client(uri: &str) -> Client {
    Client::with_uri_str(uri).await.unwrap()
}

/// `Client::shutdown` waits for every session and cursor of the client that is still in use.
async fn shut_down(client: &Client) {
    let shutdown = client.clone().shutdown().into_future();
    let ended = tokio::time::timeout(Duration::from_secs(10), shutdown).await;
    assert!(ended.is_ok(), "the client waits for something that a store holds");
}

#[track_caller]
fn assert_says_so(what: &str, error: &Error) {
    assert_eq!(error.kind(), ErrorKind::Closed, "{what}: {error}");
    assert!(error.to_string().contains(SAID), "{what}: {error}");
}

#[track_caller]
fn assert_fails<T>(what: &str, outcome: Result<T>) {
    assert_says_so(what, &outcome.map(drop).expect_err(what));
}

#[track_caller]
fn assert_fails_by_the_trait<T>(what: &str, outcome: std::result::Result<T, TraitError>) {
    match outcome.map(drop).expect_err(what) {
        TraitError::Backend(said) => assert!(said.contains(SAID), "{what}: {said}"),
        other => panic!("{what}: {other}"),
    }
}

macro_rules! every_verb_fails {
    ($store:expr, $known:expr) => {
        let store = $store;
        let known = $known;
        assert_fails_by_the_trait("create", store.create(&mut record()).await);
        assert_fails_by_the_trait("save", store.save(&record()).await);
        assert_fails_by_the_trait("load", store.load(&record().id).await);
        assert_fails_by_the_trait("delete", store.delete(&known.id).await);
        assert_fails_by_the_trait("delete_expired", store.delete_expired().await);
        assert_fails("contains", store.contains(known.id).await);
        assert_fails("length", store.length().await);
        assert_fails("estimated_length", store.estimated_length().await);
        assert_fails("clear", store.clear().await);
        assert_fails("ensure_indexes", store.ensure_indexes().await);
        assert_fails("all", store.all().try_next().await);
        assert_fails("find", store.find(doc! { "owner": "7" }).try_next().await);
        assert_fails("find_by_owner", store.find_by_owner(7).try_next().await);
        assert_fails("delete_by_owner", store.delete_by_owner(7).await);
        assert_fails("delete_by_owner_except", store.delete_by_owner_except(7, known.id).await);
        assert_fails("delete_where", store.delete_where(doc! { "owner": "7" }).await);
        assert_fails("assign_owners", store.assign_owners().await);
        assert_fails("revoke", store.revoke(SessionHandle::of(known.id)).await);
        assert_fails("revoke_owned", store.revoke_owned(7, SessionHandle::of(known.id)).await);
    };
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn verbs_report_that_the_app_has_shut_its_client_down() {
    for nth in 0..3 {
        let client = client(&uri()).await;
        let [first, second, third] = handed_in(&client);
        let builder = [first, second, third].into_iter().nth(nth).unwrap();
        let builder = builder.owner(|data| data.get("user")?.as_i64());
        let mongo = builder.build().await.unwrap();
        let cached = CachedMongoStore::builder(mongo.clone()).max_staleness(FOREVER);
        let store = cached.build().await.unwrap();
        let mut events = store.events().await.unwrap();
        // Each of several calls at the same time has its own driver session.
        let records = join_all((0..16).map(|_| create(&store))).await;
        join_all(records.iter().map(|record| mongo.load(&record.id))).await;
        assert_eq!(store.all().try_collect::<Vec<_>>().await.unwrap().len(), 16);
        mongo.delete(&records[1].id).await.unwrap();

        shut_down(&client).await;

        // Events that were reported before come first.
        while tokio::time::timeout(PATIENCE, events.next()).await.unwrap().is_some() {}
        assert_fails("events", store.events().await);
        assert_fails("warm", store.warm(1).await);
        every_verb_fails!(&mongo, &records[2]);
        every_verb_fails!(&store, &records[2]);
        assert!(!store.health().is_serving(), "{:?}", store.health());
        assert_fails("build", MongoStore::builder().client(client).build().await);
        // The store itself still ends as usual, and then reports another error.
        store.shutdown().await;
        let error = store.length().await.unwrap_err();
        assert_eq!(error.to_string(), "the session store has been shut down");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn cached_store_on_a_client_that_was_shut_down_is_rejected() {
    let client = client(&uri()).await;
    let mongo = MongoStore::builder().client(client.clone()).build().await.unwrap();
    shut_down(&client).await;
    assert_fails("build", CachedMongoStore::builder(mongo).build().await);
}

/// Two stores on one client, each with a change stream. Several rounds shut the client down at
/// different moments.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn client_of_several_stores_can_be_shut_down_at_any_moment() {
    for round in 0..20 {
        let uri = uri();
        let client = client(&uri).await;
        let mut stores = Vec::new();
        for name in ["one", "two"] {
            let mongo = MongoStore::builder().client(client.clone()).collection(name);
            let store = CachedMongoStore::builder(mongo.build().await.unwrap());
            stores.push(store.max_staleness(Duration::from_millis(200)).build().await.unwrap());
        }
        let events = stores[0].events().await.unwrap();
        let records = join_all(stores.iter().map(create)).await;
        tokio::time::sleep(Duration::from_millis(7 * round)).await;
        shut_down(&client).await;
        for (store, record) in stores.iter().zip(records) {
            let error = store.length().await.unwrap_err();
            assert_says_so("length", &error);
            let _ = store.load(&record.id).await;
        }
        drop(events);
    }
}

/// A store without a change stream. Its calls leave nothing open that `Client::shutdown` would wait
/// for.
#[tokio::test]
async fn calls_leave_nothing_open_on_the_apps_client() {
    let client = client(&uri()).await;
    let store = MongoStore::builder().client(client.clone()).build().await.unwrap();
    for _ in 0..3 {
        let record = create(&store).await;
        store.load(&record.id).await.unwrap();
        store.save(&record).await.unwrap();
    }
    shut_down(&client).await;
    assert_fails("length", store.length().await);
}

#[tokio::test]
async fn background_tasks_end_with_the_apps_client_and_warn_once() {
    let (meters, guard) = Meters::install();
    let log = Log::default();
    let _logs = tracing::subscriber::set_default(log.subscriber());
    let client = client(&uri()).await;
    let often = Duration::from_millis(20);
    let mongo = MongoStore::builder()
        .client(client.clone())
        .expired_removal(ExpiredRemoval::Sweep(often))
        .count_every(often);
    let mongo = mongo.build().await.unwrap();
    let store = CachedMongoStore::builder(mongo).build().await.unwrap();
    drop(guard);
    create(&store).await;
    shut_down(&client).await;
    let operations = || {
        let names = meters.names().into_iter();
        let sent = names.filter(|name| name.starts_with("session_store_mongo_operations_total"));
        sent.map(|name| meters.value(&name)).sum::<f64>()
    };
    // Each task notices at its next step. After that it sends nothing.
    let mut before = operations();
    let mut quiet = 0;
    eventually("no command is sent any longer", async || {
        tokio::time::sleep(4 * often).await;
        let now = operations();
        quiet = if (now - before).abs() < 0.5 { quiet + 1 } else { 0 };
        before = now;
        quiet == 5
    })
    .await;
    let said = log.take();
    let warnings: Vec<_> = said.lines().filter(|line| line.contains("WARN")).collect();
    assert!(!warnings.is_empty() && warnings.len() <= 3, "{warnings:#?}");
    assert!(warnings.iter().all(|line| line.contains(SAID)), "{warnings:#?}");
}

#[tokio::test]
async fn client_with_too_small_a_pool_is_rejected() {
    let own = async |pool| {
        let mongo = MongoStore::builder().uri(uri()).max_pool_size(pool).build().await.unwrap();
        CachedMongoStore::builder(mongo).build().await
    };
    let refusal = own(1).await.unwrap_err();
    let no_events = own(2).await.unwrap().events().await.unwrap_err();
    for pool in [None, Some(1), Some(2), Some(3)] {
        let uri = uri();
        let mut options = ClientOptions::parse(&uri).await.unwrap();
        options.max_pool_size = pool;
        // The name of the app may contain anything.
        options.app_name = Some(r#"a\", max_pool_size: Some(1), "#.to_owned());
        let client = Client::with_options(options).unwrap();
        for builder in handed_in(&client) {
            let mongo = builder.build().await.unwrap();
            let built = CachedMongoStore::builder(mongo.clone()).build().await;
            if pool == Some(1) {
                let error = built.unwrap_err();
                assert_eq!(error.kind(), ErrorKind::Config);
                assert_eq!(error.to_string(), refusal.to_string());
                // A cache that needs no connection for itself.
                let store = CachedMongoStore::builder(mongo).coherence(Coherence::TimeBound);
                create(&store.build().await.unwrap()).await;
                continue;
            }
            let events = built.unwrap().events().await;
            if pool == Some(2) {
                let error = events.unwrap_err();
                assert_eq!(error.kind(), ErrorKind::Config);
                assert_eq!(error.to_string(), no_events.to_string());
            } else {
                drop(events.unwrap());
            }
        }
    }
}

/// The app shuts its client down while a reply is on its way.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn call_in_progress_ends_before_the_client() {
    let proxy = Proxy::start().await;
    let client = client(proxy.uri()).await;
    let mongo = MongoStore::builder().client(client.clone()).build().await.unwrap();
    let mut held = proxy.hold("insert");
    let insert = tokio::spawn({
        let mongo = mongo.clone();
        async move { mongo.create(&mut record()).await }
    });
    held.reached().await;
    let closes = tokio::spawn({
        let client = client.clone();
        async move { shut_down(&client).await }
    });
    held.deliver();
    insert.await.unwrap().unwrap();
    closes.await.unwrap();
    assert_fails("length", mongo.length().await);
}
