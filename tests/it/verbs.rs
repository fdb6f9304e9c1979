//! What the verbs of our stores do beyond the contract of tower-sessions.

use futures::{StreamExt, TryStreamExt};
use serde_json::{Value, json};
use tower_sessions::session::{Id, Record};
use tower_sessions::{SessionStore, session_store};
use tower_sessions_moka_mongodb_store::mongodb::bson::{DateTime, Document, doc};
use tower_sessions_moka_mongodb_store::{ErrorKind, LiveSession, MongoStore};

use crate::common::{
    Commands, Store, cache_of, create, in_the_past, on_both_tiers, other_instance, record, uri,
};

on_both_tiers! {
    save_after_a_delete_stores_nothing_and_leaves_no_entry = save_after_delete;
    a_save_of_an_expired_session_stores_nothing = save_of_an_expired;
    a_save_of_what_another_instance_expired_stores_nothing = save_of_what_another_expired;
    create_without_a_free_id_names_the_likely_cause = no_free_id;
    clear_returns_the_count_and_keeps_the_index = clear;
    length_counts_live_sessions = length;
    all_streams_what_is_live_without_ids = all;
    contains_reads_the_database = contains;
    document_that_is_no_session_is_a_decode_error = foreign_documents;
    after_shutdown_every_call_says_closed = shutdown;
}

async fn save_after_delete(store: impl Store) {
    let mut record = record();
    store.create(&mut record).await.unwrap();
    store.delete(&record.id).await.unwrap();
    store.save(&record).await.unwrap();
    assert_eq!(store.load(&record.id).await.unwrap(), None);
    assert_eq!(store.documents().await, 0);
}

async fn save_of_an_expired(store: impl Store) {
    let mut record = record();
    store.create(&mut record).await.unwrap();
    let later = record.clone();
    record.expiry_date = in_the_past();
    store.save(&record).await.unwrap();
    store.save(&later).await.unwrap();
    assert_eq!(store.load(&record.id).await.unwrap(), None, "the session does not come back");
}

async fn save_of_what_another_expired(store: impl Store) {
    let record = create(&store).await;
    store.expire_all().await;
    store.save(&record).await.unwrap();
    assert_eq!(store.load(&record.id).await.unwrap(), None);
    assert_eq!(store.length().await.unwrap(), 0);
}

// No test can make ids collide, but another unique index returns the same error.
async fn no_free_id(store: impl Store) {
    let unique = doc! { "createIndexes": "sessions", "indexes": [
    { "key": { "format": 1 }, "name": "one", "unique": true }] };
    let sessions = store.collection();
    sessions.client().database(&sessions.namespace().db).run_command(unique).await.unwrap();
    let first = create(&store).await;
    let error = store.create(&mut record()).await.unwrap_err();
    assert!(error.to_string().contains("unique index"), "{error}");
    assert_eq!(store.load(&first.id).await.unwrap().unwrap().data, first.data);
    assert_eq!(store.length().await.unwrap(), 1);
}

async fn clear(store: impl Store) {
    assert_eq!(store.clear().await.unwrap(), 0);
    let mut records = Vec::new();
    for _ in 0..7 {
        records.push(create(&store).await);
    }
    assert_eq!(store.clear().await.unwrap(), 7);
    assert_eq!(store.length().await.unwrap(), 0);
    for record in records {
        assert_eq!(store.load(&record.id).await.unwrap(), None);
    }
    let indexes: Vec<_> =
        store.collection().list_indexes().await.unwrap().try_collect().await.unwrap();
    let ttl = indexes.iter().find(|index| index.keys == doc! { "expires": 1 });
    let options = ttl.expect("the index stays").options.as_ref().unwrap();
    assert_eq!(options.expire_after, Some(std::time::Duration::ZERO));
    assert_eq!(store.clear().await.unwrap(), 0);
    assert!(store.load(&create(&store).await.id).await.unwrap().is_some(), "the store still works");
}

async fn length(store: impl Store) {
    assert_eq!(store.length().await.unwrap(), 0);
    assert_eq!(store.estimated_length().await.unwrap(), 0);
    let records: Vec<_> = futures::stream::iter(0..1_000)
        .map(|_| create(&store))
        .buffer_unordered(32)
        .collect()
        .await;
    futures::stream::iter(&records[..300])
        .for_each_concurrent(32, |record| async { store.delete(&record.id).await.unwrap() })
        .await;
    futures::stream::iter(&records[300..500])
        .for_each_concurrent(32, |record| async {
            let record = Record { expiry_date: in_the_past(), ..record.clone() };
            store.save(&record).await.unwrap();
        })
        .await;
    assert_eq!(store.length().await.unwrap(), 500);
    assert_eq!(store.estimated_length().await.unwrap(), 500);
}

async fn all(store: impl Store) {
    let mut made: Vec<_> = Vec::new();
    for _ in 0..150 {
        made.push(create(&store).await);
    }
    let mut ended = record();
    ended.expiry_date = in_the_past();
    store.create(&mut ended).await.unwrap();
    let gone = create(&store).await;
    store.delete(&gone.id).await.unwrap();

    let live: Vec<LiveSession> = store.all().try_collect().await.unwrap();
    assert_eq!(live.len(), made.len());
    for session in &live {
        let record = made.iter().find(|record| record.data == session.data).expect("ours");
        assert!((record.expiry_date - session.expires).abs() < time::Duration::MILLISECOND);
        assert_eq!(session.created, session.updated);
        let shown = format!("{session:?}");
        assert!(!shown.contains(&record.id.0.to_string()) && !shown.contains("serial"), "{shown}");
    }
    let _ = store.all().next().await.unwrap().unwrap();

    let broken = doc! { "$set": { "format": 9 } };
    store
        .collection()
        .update_one(doc! { "expires": { "$gt": DateTime::now() } }, broken)
        .await
        .unwrap();
    let live: Vec<_> = store.all().collect().await;
    let (readable, unreadable): (Vec<_>, Vec<_>) = live.into_iter().partition(Result::is_ok);
    assert_eq!((readable.len(), unreadable.len()), (149, 1), "one bad document ends no list");
    assert_eq!(unreadable[0].as_ref().unwrap_err().kind(), ErrorKind::Decode);
}

async fn contains(store: impl Store) {
    let record = create(&store).await;
    assert!(store.contains(record.id).await.unwrap());
    assert!(!store.contains(Id::default()).await.unwrap());
    store.expire_all().await;
    assert!(!store.contains(record.id).await.unwrap());
}

async fn foreign_documents(store: impl Store) {
    let record = create(&store).await;
    let sessions = store.collection();
    let cold = cache_of(&store.another().await).await;
    let good: Document = sessions.clone_with_type().find_one(doc! {}).await.unwrap().unwrap();
    for (broken, said) in [
        (doc! { "$set": { "format": 2 } }, "its format is 2"),
        (doc! { "$unset": { "format": 1 } }, "no `format`"),
        (doc! { "$set": { "data": 7 } }, "`data` should be a text, a document or a binary"),
        (doc! { "$set": { "data": "{" } }, "its JSON is truncated"),
        (doc! { "$set": { "data": { "a": f64::NAN } } }, "not finite"),
        (doc! { "$set": { "data": { "%zz": 1 } } }, "no known escape"),
    ] {
        sessions.update_one(doc! {}, broken).await.unwrap();
        for _ in 0..2 {
            let error = SessionStore::load(&cold, &record.id).await.unwrap_err();
            assert!(matches!(error, session_store::Error::Decode(_)), "{error:?}");
            assert!(error.to_string().contains(said), "{error}");
        }
        sessions.clone_with_type::<Document>().replace_one(doc! {}, &good).await.unwrap();
    }
    assert!(SessionStore::load(&cold, &record.id).await.unwrap().is_some(), "mended, it is read");
}

async fn shutdown(store: impl Store) {
    let mut record = create(&store).await;
    store.shutdown().await;
    assert_eq!(store.length().await.unwrap_err().kind(), ErrorKind::Closed);
    assert_eq!(store.estimated_length().await.unwrap_err().kind(), ErrorKind::Closed);
    assert_eq!(store.contains(record.id).await.unwrap_err().kind(), ErrorKind::Closed);
    assert_eq!(store.clear().await.unwrap_err().kind(), ErrorKind::Closed);
    assert_eq!(store.all().next().await.unwrap().unwrap_err().kind(), ErrorKind::Closed);
    for ended in [
        store.create(&mut record).await,
        store.save(&record).await,
        store.delete(&record.id).await,
        store.load(&Id::default()).await.map(drop),
    ] {
        assert!(ended.unwrap_err().to_string().contains("shut down"));
    }
    store.shutdown().await;
}

#[tokio::test]
async fn client_of_the_app_is_not_closed() {
    let client = Commands::default().client(&uri()).await;
    let store = MongoStore::builder().client(client.clone()).build().await.unwrap();
    store.shutdown().await;
    client.default_database().unwrap().run_command(doc! { "ping": 1 }).await.unwrap();
}

#[tokio::test]
async fn session_that_cannot_be_stored_sends_nothing() {
    let mut deep = json!(0);
    for _ in 0..99 {
        deep = json!([deep]);
    }
    let commands = Commands::default();
    let uri = uri();
    let plain = commands.mongo(&uri).await;
    let cached = cache_of(&plain).await;
    let mut existing = record();
    SessionStore::create(&cached, &mut existing).await.unwrap();
    let before = commands.all();
    for value in [deep, Value::String("x".repeat(17 << 20))] {
        let data = [("too much".to_owned(), value)].into();
        let mut record = Record { data, ..existing.clone() };
        for error in [
            SessionStore::create(&plain, &mut record).await.unwrap_err(),
            SessionStore::create(&cached, &mut record).await.unwrap_err(),
            SessionStore::save(&plain, &record).await.unwrap_err(),
            SessionStore::save(&cached, &record).await.unwrap_err(),
        ] {
            assert!(matches!(error, session_store::Error::Encode(_)), "{error:?}");
        }
    }
    assert_eq!(commands.all(), before);
    let loaded = SessionStore::load(&cached, &existing.id).await.unwrap().unwrap();
    assert_eq!(loaded.data, existing.data, "the existing session is unchanged");
}

#[tokio::test]
async fn thousand_loads_of_one_uncached_session_are_one_find() {
    let commands = Commands::default();
    let uri = uri();
    let record = create(&other_instance(&uri).await).await;
    let store = cache_of(&commands.mongo(&uri).await).await;
    let mut tasks = tokio::task::JoinSet::new();
    for _ in 0..1_000 {
        let store = store.clone();
        let id = record.id;
        tasks.spawn(async move { SessionStore::load(&store, &id).await.unwrap().unwrap().data });
    }
    for loaded in tasks.join_all().await {
        assert_eq!(loaded, record.data);
    }
    assert_eq!(commands.sent("find"), 1);
}

#[tokio::test]
async fn a_cached_session_is_loaded_without_a_command() {
    let commands = Commands::default();
    let uri = uri();
    let store = cache_of(&commands.mongo(&uri).await).await;
    let mut record = create(&store).await;
    let before = commands.all();
    assert!(SessionStore::load(&store, &record.id).await.unwrap().is_some());
    assert_eq!(commands.all(), before, "created here");
    record.data.insert("more".to_owned(), json!(1));
    SessionStore::save(&store, &record).await.unwrap();
    assert_eq!(SessionStore::load(&store, &record.id).await.unwrap().unwrap().data, record.data);
    assert_eq!(commands.all(), before + 1, "one round trip for the save, none for the load");
    SessionStore::delete(&store, &record.id).await.unwrap();
    assert_eq!(SessionStore::load(&store, &record.id).await.unwrap(), None);
    assert!(commands.all() <= before + 3);
}

#[tokio::test]
async fn every_verb_is_one_round_trip() {
    let commands = Commands::default();
    let store = commands.mongo(&uri()).await;
    let mut record = record();
    let mut before = commands.all();
    let mut one_more = |what: &str| {
        before += 1;
        assert_eq!(commands.all(), before, "{what}");
    };
    SessionStore::create(&store, &mut record).await.unwrap();
    one_more("create");
    SessionStore::save(&store, &record).await.unwrap();
    one_more("save");
    SessionStore::load(&store, &record.id).await.unwrap();
    one_more("load");
    store.contains(record.id).await.unwrap();
    one_more("contains");
    SessionStore::delete(&store, &record.id).await.unwrap();
    one_more("delete");
}

#[tokio::test]
async fn every_store_reads_text_and_document() {
    let texts = MongoStore::connect(uri()).await.unwrap();
    let builder = MongoStore::builder().collection_handle(texts.collection()).queryable(true);
    let documents = builder.build().await.unwrap();
    let mut one = record();
    let mut other = record();
    one.data.insert("plan.name".to_owned(), json!("pro"));
    other.data.insert("plan.name".to_owned(), json!("free"));
    texts.create(&mut one).await.unwrap();
    documents.create(&mut other).await.unwrap();
    let sessions = texts.collection();
    let by_plan = doc! { "data.plan%2Ename": "free" };
    assert_eq!(sessions.count_documents(by_plan.clone()).await.unwrap(), 1);
    for store in [&texts, &documents] {
        for record in [&one, &other] {
            assert_eq!(store.load(&record.id).await.unwrap().unwrap().data, record.data);
        }
    }
    let stored: Vec<_> = sessions.find(doc! {}).await.unwrap().try_collect().await.unwrap();
    assert!(stored.iter().all(|it| [&one.data, &other.data].contains(&&it.data().unwrap())));
    assert_eq!(stored.iter().filter(|it| it.data.as_str().is_some()).count(), 1);

    // A save through each store changes the form back to that of the store.
    texts.save(&other).await.unwrap();
    assert_eq!(sessions.count_documents(by_plan).await.unwrap(), 0);
}
