//! No id, data or credential is shown or logged (I9).

use tower_sessions::SessionStore;
use tower_sessions::session::Record;
use tower_sessions_moka_mongodb_store::mongodb::bson::{Binary, RawDocumentBuf, Uuid, doc};
use tower_sessions_moka_mongodb_store::{CachedMongoStore, MongoStore};

use crate::common::{
    Log, Store, cache_of, create, everything_said_by, mongo, on_both_tiers, record, uri,
};

/// Asserts that the text contains no part of the session, in any of its forms.
#[track_caller]
fn assert_shows_nothing_of(shown: &str, record: &Record) {
    let bytes = record.id.0.to_le_bytes();
    let hex = format!("{:032x}", u128::from_be_bytes(bytes));
    for secret in [record.id.to_string(), record.id.0.to_string(), hex, format!("{bytes:?}")] {
        assert!(!shown.contains(&secret), "{shown}");
    }
    assert!(!shown.contains("4111-1111"), "{shown}");
    assert!(!shown.contains("card-number"), "{shown}");
}

fn secret_record() -> Record {
    let mut record = record();
    record.data.insert("card-number".to_owned(), "4111-1111".into());
    record
}

on_both_tiers! {
    log_shows_no_session = logs;
    error_shows_no_session = errors;
}

async fn logs(store: impl Store) {
    let log = Log::default();
    let guard = tracing::subscriber::set_default(log.subscriber());
    let mut record = secret_record();
    store.create(&mut record).await.unwrap();
    store.save(&record).await.unwrap();
    store.load(&record.id).await.unwrap();
    store.delete(&record.id).await.unwrap();
    store.save(&record).await.unwrap();
    store.clear().await.unwrap();
    store.shutdown().await;
    store.load(&record.id).await.unwrap_err();
    drop(guard);
    let log = log.take();
    assert!(log.contains("a save was dropped"), "{log}");
    assert!(log.contains("session_store.delete") && log.contains("db.operation.name"), "{log}");
    assert_shows_nothing_of(&log, &record);
}

async fn errors(store: impl Store) {
    let mut record = secret_record();
    store.create(&mut record).await.unwrap();
    let cold = cache_of(&store.another().await).await;
    let broken = doc! { "$set": { "data": { "card-number": Binary::from_uuid(Uuid::new()) } } };
    for broken in [broken, doc! { "$set": { "data": "4111-1111" } }] {
        store.collection().update_one(doc! {}, broken).await.unwrap();
        let error = cold.load(&record.id).await.unwrap_err();
        assert_shows_nothing_of(&everything_said_by(&error), &record);
    }
    store.clear().await.unwrap();
    let mut deep = serde_json::json!("4111-1111");
    for _ in 0..100 {
        deep = serde_json::json!({ "card-number": deep });
    }
    record.data.insert("card-number".to_owned(), deep);
    let error = store.save(&record).await.unwrap_err();
    assert_shows_nothing_of(&everything_said_by(&error), &record);

    // A server's reply to a duplicate key quotes the key and its value.
    let unique = doc! { "createIndexes": "sessions", "indexes": [
    { "key": { "data.card-number": 1 }, "name": "one", "unique": true }] };
    store.clear().await.unwrap();
    let sessions = store.collection();
    let queryable = MongoStore::builder().collection_handle(sessions.clone()).queryable(true);
    let store = queryable.build().await.unwrap();
    sessions.client().database(&sessions.namespace().db).run_command(unique).await.unwrap();
    let mut first = secret_record();
    let mut second = create(&store).await;
    store.create(&mut first).await.unwrap();
    second.data.clone_from(&first.data);
    let error = store.save(&second).await.unwrap_err();
    assert_shows_nothing_of(&everything_said_by(&error), &first);
    assert_shows_nothing_of(&everything_said_by(&error), &second);
}

#[tokio::test]
async fn debug_of_stores_and_builders_shows_no_password_and_no_session() {
    let uri = uri();
    let builder = MongoStore::builder().uri(&uri).username("somebody").password("pa55-word");
    let shown = format!("{builder:?} {builder:#?}");
    assert!(!shown.contains("pa55-word") && !shown.contains(&uri), "{shown}");
    let builder = MongoStore::builder().uri("mongodb://somebody:pa55-word@localhost/app");
    let shown = format!("{builder:?} {builder:#?}");
    assert!(!shown.contains("pa55-word") && !shown.contains("somebody"), "{shown}");

    let mongo = mongo().await;
    let builder = CachedMongoStore::builder(mongo.clone());
    let cached = builder.clone().build().await.unwrap();
    let mut record = secret_record();
    cached.create(&mut record).await.unwrap();
    cached.load(&record.id).await.unwrap();
    let key = tower_sessions_moka_mongodb_store::SessionKey::from(record.id);
    let all = mongo.all();
    let shown = format!("{mongo:#?} {cached:#?} {builder:#?} {key:?} {all:?}");
    assert_shows_nothing_of(&shown, &record);
    assert!(!shown.contains("mongodb://"), "{shown}");
    assert!(shown.contains(&mongo.collection().namespace().to_string()), "but what store it is");
}

#[tokio::test]
async fn debug_of_a_stored_document_shows_no_data() {
    let store = mongo().await;
    let mut record = secret_record();
    store.create(&mut record).await.unwrap();
    let stored = store.collection().find_one(doc! {}).await.unwrap().unwrap();
    assert_shows_nothing_of(&format!("{stored:?} {stored:#?}"), &record);
}

#[tokio::test]
async fn the_database_holds_no_id() {
    let store = mongo().await;
    let mut record = secret_record();
    store.create(&mut record).await.unwrap();
    store.save(&record).await.unwrap();
    let raw = store.collection().clone_with_type::<RawDocumentBuf>();
    let raw = raw.find_one(doc! {}).await.unwrap().unwrap();
    let id = record.id;
    for secret in [&id.0.to_le_bytes()[..], &id.0.to_be_bytes()[..], id.to_string().as_bytes()] {
        assert!(!raw.as_bytes().windows(secret.len()).any(|window| window == secret));
    }
}
