//! How expired sessions leave the collection.

use std::time::Duration;

use futures::TryStreamExt;
use session_test_server::{TestServer, fresh_database};
use time::OffsetDateTime;
use tower_sessions::{ExpiredDeletion, SessionStore};
use tower_sessions_moka_mongodb_store::mongodb::bson::{Bson, Document, doc};
use tower_sessions_moka_mongodb_store::mongodb::{Database, IndexModel};
use tower_sessions_moka_mongodb_store::{
    CachedMongoStore, ErrorKind, ExpiredRemoval, MongoStore, MongoStoreBuilder,
};

use crate::common::{
    Commands, Meters, Store, create, eventually, in_the_past, mongo, on_both_tiers, record, uri,
};

async fn create_expired(store: &impl SessionStore) {
    let mut record = record();
    record.expiry_date = in_the_past();
    store.create(&mut record).await.unwrap();
}

async fn index(store: &MongoStore) -> IndexModel {
    let indexes: Vec<_> =
        store.collection().list_indexes().await.unwrap().try_collect().await.unwrap();
    assert_eq!(indexes.len(), 2, "that on _id and ours: {indexes:?}");
    indexes.into_iter().find(|index| index.keys == doc! { "expires": 1 }).unwrap()
}

fn expire_after(index: &IndexModel) -> Option<Duration> {
    index.options.as_ref().and_then(|options| options.expire_after)
}

#[tokio::test]
async fn ttl_index_has_zero_seconds() {
    let uri = uri();
    for _ in 0..2 {
        let store = MongoStore::connect(&uri).await.unwrap();
        assert_eq!(expire_after(&index(&store).await), Some(Duration::ZERO));
        store.ensure_indexes().await.unwrap();
    }
}

#[tokio::test]
async fn instances_that_start_at_once_create_one_index() {
    let uri = uri();
    let built = futures::future::join_all((0..8).map(|_| MongoStore::connect(&uri))).await;
    let stores: Vec<_> = built.into_iter().collect::<Result<_, _>>().unwrap();
    assert_eq!(expire_after(&index(&stores[0]).await), Some(Duration::ZERO));
}

#[tokio::test]
async fn store_without_ttl_index_has_an_index_for_counting() {
    for removal in [ExpiredRemoval::Off, ExpiredRemoval::Sweep(Duration::from_secs(3_600))] {
        let store =
            MongoStore::builder().uri(uri()).expired_removal(removal).build().await.unwrap();
        assert_eq!(expire_after(&index(&store).await), None);
    }
}

#[tokio::test]
async fn expired_removal_off_creates_no_index() {
    let commands = Commands::default();
    let uri = uri();
    let builder = MongoStore::builder().client(commands.client(&uri).await).create_indexes(false);
    let store = builder.build().await.unwrap();
    assert_eq!((commands.sent("createIndexes"), commands.sent("listIndexes")), (0, 0));
    create(&store).await;
    store.ensure_indexes().await.unwrap();
    assert_eq!(expire_after(&index(&store).await), Some(Duration::ZERO));
}

/// An index that already exists, what the store expects, and the command that repairs it.
struct ExistingIndex {
    options: Document,
    wanted: ExpiredRemoval,
    found: &'static str,
    by_coll_mod: bool,
}

#[tokio::test]
async fn ttl_index_with_other_options_is_an_error_with_the_repair_command() {
    let off = ExpiredRemoval::Off;
    let ttl = ExpiredRemoval::TtlIndex;
    for existing in [
        ExistingIndex {
            options: doc! { "expireAfterSeconds": 60 },
            wanted: ttl,
            found: "60 s after it has expired",
            by_coll_mod: true,
        },
        ExistingIndex { options: doc! {}, wanted: ttl, found: "no TTL index", by_coll_mod: false },
        ExistingIndex {
            options: doc! { "expireAfterSeconds": 0 },
            wanted: off,
            found: "is a TTL index with expireAfterSeconds: 0",
            by_coll_mod: false,
        },
        ExistingIndex {
            options: doc! { "expireAfterSeconds": 0, "sparse": true },
            wanted: ttl,
            found: "covers only some",
            by_coll_mod: false,
        },
    ] {
        let client = Commands::default().client(&uri()).await;
        let name = "by_expiry";
        let database = client.default_database().unwrap();
        let mut spec = doc! { "key": { "expires": 1 }, "name": name };
        spec.extend(existing.options);
        let create = doc! { "createIndexes": "sessions", "indexes": [spec] };
        database.run_command(create).await.unwrap();

        let builder = MongoStore::builder().client(client).expired_removal(existing.wanted);
        let error = builder.clone().build().await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Index, "{error}");
        let said = error.to_string();
        assert!(said.contains(existing.found), "{said}");
        let (shell, command) = mend(&database, name, existing.by_coll_mod);
        assert!(said.ends_with(&shell), "{said}\n{shell}");
        database.run_command(command).await.unwrap();
        mended(builder).await;
    }
}

#[tokio::test]
async fn an_index_with_another_number_type_is_recognised() {
    for one in [Bson::Int64(1), Bson::Double(1.0)] {
        let client = Commands::default().client(&uri()).await;
        let database = client.default_database().unwrap();
        let spec = doc! { "key": { "expires": one }, "name": "own", "expireAfterSeconds": 0 };
        let create = doc! { "createIndexes": "sessions", "indexes": [spec] };
        database.run_command(create).await.unwrap();
        let store = MongoStore::builder().client(client).build().await.unwrap();
        let indexes: Vec<_> =
            store.collection().list_indexes().await.unwrap().try_collect().await.unwrap();
        assert_eq!(indexes.len(), 2, "{indexes:?}");
    }
}

#[tokio::test]
async fn other_index_with_our_name_is_an_error_with_the_repair_command() {
    let client = Commands::default().client(&uri()).await;
    let database = client.default_database().unwrap();
    let spec = doc! { "key": { "other": 1 }, "name": "expires_1" };
    let create = doc! { "createIndexes": "sessions", "indexes": [spec] };
    database.run_command(create).await.unwrap();
    let builder = MongoStore::builder().client(client);
    let error = builder.clone().build().await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Index, "{error}");
    let (shell, command) = mend(&database, "expires_1", false);
    assert!(error.to_string().ends_with(&shell), "{error}");
    database.run_command(command).await.unwrap();
    mended(builder).await;
}

/// The command that repairs the index: in mongosh's form, and in the driver's form.
fn mend(database: &Database, index: &str, by_coll_mod: bool) -> (String, Document) {
    let database = format!("db.getSiblingDB({:?})", database.name());
    if by_coll_mod {
        let shell = format!(
            "{database}.runCommand({{ collMod: \"sessions\", index: {{ name: {index:?}, \
             expireAfterSeconds: 0 }} }})"
        );
        let index = doc! { "name": index, "expireAfterSeconds": 0 };
        return (shell, doc! { "collMod": "sessions", "index": index });
    }
    let shell = format!("{database}.getCollection(\"sessions\").dropIndex({index:?})");
    (shell, doc! { "dropIndexes": "sessions", "index": index })
}

async fn mended(builder: MongoStoreBuilder) {
    let store = builder.build().await.unwrap();
    store.ensure_indexes().await.unwrap();
    index(&store).await;
}

#[tokio::test]
async fn sweep_removes_expired_sessions_repeatedly() {
    let sweep = ExpiredRemoval::Sweep(Duration::from_millis(20));
    let store = MongoStore::builder().uri(uri()).expired_removal(sweep).build().await.unwrap();
    let live = create(&store).await;
    for _ in 0..3 {
        create_expired(&store).await;
        eventually("the expired one is removed", async || store.documents().await == 1).await;
    }
    assert!(store.load(&live.id).await.unwrap().is_some());
}

#[tokio::test]
async fn a_sweep_survives_an_outage() {
    let mut server = TestServer::builder().fast(true).start().unwrap();
    let (meters, guard) = Meters::install();
    let store = MongoStore::builder()
        .uri(server.uri_for(&fresh_database()))
        .operation_timeout(Duration::from_millis(500))
        .expired_removal(ExpiredRemoval::Sweep(Duration::from_millis(20)))
        .build()
        .await
        .unwrap();
    drop(guard);
    server.pause().unwrap();
    let failed = "session_store_mongo_operations_total{verb=expire,outcome=timeout}";
    eventually("two sweeps have failed", async || meters.value(failed) >= 2.0).await;
    server.resume().unwrap();
    let mut late = record();
    late.expiry_date = in_the_past();
    eventually("the store is back", async || store.create(&mut late).await.is_ok()).await;
    eventually("the expired one is removed", async || {
        store.collection().count_documents(doc! {}).await.is_ok_and(|count| count == 0)
    })
    .await;
}

#[tokio::test]
async fn a_sweep_ends_with_the_store() {
    let sweep = ExpiredRemoval::Sweep(Duration::from_millis(10));
    let commands = Commands::default();
    let uri = uri();
    for by_drop in [true, false] {
        let builder = MongoStore::builder().client(commands.client(&uri).await);
        let store = builder.expired_removal(sweep).build().await.unwrap();
        let swept = commands.sent("find");
        eventually("it sweeps", async || commands.sent("find") > swept + 2).await;
        if by_drop {
            drop(store);
        } else {
            store.shutdown().await;
        }
        eventually("it has ended", async || {
            let before = commands.sent("find");
            tokio::time::sleep(Duration::from_millis(100)).await;
            commands.sent("find") == before
        })
        .await;
    }
}

#[tokio::test]
async fn expired_removal_off_removes_only_on_request() {
    let commands = Commands::default();
    let builder = MongoStore::builder().client(commands.client(&uri()).await);
    let store = builder.expired_removal(ExpiredRemoval::Off).build().await.unwrap();
    create_expired(&store).await;
    let live = create(&store).await;
    assert_eq!(expire_after(&index(&store).await), None, "the server will not");
    // The sweeper of another store has run several times meanwhile, so this one would have run too.
    let sweep = ExpiredRemoval::Sweep(Duration::from_millis(10));
    let other = MongoStore::builder().uri(uri()).expired_removal(sweep).build().await.unwrap();
    for _ in 0..2 {
        create_expired(&other).await;
        eventually("the other sweeps", async || other.documents().await == 0).await;
    }
    assert_eq!(store.documents().await, 2);
    assert_eq!(commands.sent("delete"), 0);
    store.delete_expired().await.unwrap();
    assert_eq!(store.documents().await, 1);
    assert!(store.load(&live.id).await.unwrap().is_some());
}

on_both_tiers! {
    delete_expired_removes_all_of_the_expired_and_only_them = delete_expired;
    tower_sessions_own_deletion_task_works = deletion_task;
}

async fn delete_expired(store: impl Store + ExpiredDeletion) {
    let mut ended = Vec::new();
    for _ in 0..20 {
        ended.push(create(&store).await);
    }
    store.expire_all().await;
    let live = create(&store).await;
    store.delete_expired().await.unwrap();
    assert_eq!(store.documents().await, 1);
    assert!(store.load(&live.id).await.unwrap().is_some());
    store.delete_expired().await.unwrap();
    assert_eq!(store.documents().await, 1);
}

async fn deletion_task(store: impl Store + ExpiredDeletion) {
    create_expired(&store).await;
    let task = store.clone().continuously_delete_expired(Duration::from_millis(10));
    let gone = eventually("the expired one is removed", async || store.documents().await == 0);
    tokio::select! {
        () = gone => {}
        ended = task => panic!("{ended:?}"),
    }
}

#[tokio::test]
async fn more_than_a_page_of_expired_sessions_is_removed() {
    use futures::StreamExt;

    let store = mongo().await;
    futures::stream::iter(0..1_050).for_each_concurrent(32, |_| create_expired(&store)).await;
    store.delete_expired().await.unwrap();
    assert_eq!(store.documents().await, 0);
}

#[tokio::test]
async fn a_ttl_overrides_the_cookies_expiry() {
    let ttl = Duration::from_secs(3_600);
    let uri = uri();
    let mongo = MongoStore::builder().uri(&uri).ttl(ttl).build().await.unwrap();
    let cached = CachedMongoStore::builder(mongo.clone()).build().await.unwrap();
    let reader = MongoStore::connect(&uri).await.unwrap();
    for expiry in [time::Duration::weeks(2), time::Duration::minutes(1), -time::Duration::hours(1)]
    {
        let mut record = record();
        record.expiry_date = OffsetDateTime::now_utc() + expiry;
        let start = OffsetDateTime::now_utc() - time::Duration::MILLISECOND;
        cached.create(&mut record).await.unwrap();
        cached.save(&record).await.unwrap();
        let expires = cached.load(&record.id).await.unwrap().unwrap().expiry_date;
        assert!(expires >= start + ttl && expires <= OffsetDateTime::now_utc() + ttl, "{expires}");
        for other in [&mongo, &reader] {
            assert_eq!(other.load(&record.id).await.unwrap().unwrap().expiry_date, expires);
        }
    }
}

#[tokio::test]
async fn impossible_durations_are_config_errors() {
    let builder = || MongoStore::builder().uri("mongodb://127.0.0.1:1/never");
    for (builder, said) in [
        (builder().expired_removal(ExpiredRemoval::Sweep(Duration::ZERO)), "Sweep"),
        (builder().ttl(Duration::ZERO), "ttl"),
        (builder().ttl(Duration::from_micros(999)), "ttl"),
        (builder().operation_timeout(Duration::ZERO), "operation_timeout"),
    ] {
        let error = builder.build().await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Config);
        assert!(error.to_string().contains(said), "{error}");
    }
}
