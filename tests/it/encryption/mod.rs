//! Encryption at rest: what is in the collection, and which store can read it.

mod reencrypt;

use futures::StreamExt;
use mongodb::bson::spec::BinarySubtype;
use mongodb::bson::{Binary, Document, RawDocumentBuf, doc};
use serde_json::json;
use tower_sessions::SessionStore;
use tower_sessions::session::Record;
use tower_sessions_moka_mongodb_store::{
    ErrorKind, Key, Keys, MongoStore, SessionKey, StoredSession, mongodb,
};

use crate::common::{
    PATIENCE, Store, cache_of, cached, create, everything_said_by, in_the_future, mongo, record,
    uri,
};

fn key(byte: u8) -> Key {
    Key::from_bytes(&[byte; 32])
}

async fn with_keys(uri: &str, keys: Keys) -> MongoStore {
    let builder = MongoStore::builder().uri(uri).operation_timeout(PATIENCE);
    builder.encryption(keys).build().await.unwrap()
}

fn by_key(record: &Record) -> Document {
    let bytes = SessionKey::from(record.id).as_bytes().to_vec();
    doc! { "_id": Binary { subtype: BinarySubtype::Generic, bytes } }
}

/// A session with a secret in it, stored by this store.
async fn secret(store: &impl SessionStore) -> Record {
    let mut record = record();
    record.data.insert("card-number".to_owned(), json!({ "digits": "4111-1111" }));
    store.create(&mut record).await.unwrap();
    record
}

async fn stored(store: &MongoStore, record: &Record) -> StoredSession {
    let sessions = store.collection().clone_with_type::<StoredSession>();
    sessions.find_one(by_key(record)).await.unwrap().unwrap()
}

/// The number of the key that encrypts a stored session.
fn key_of(stored: &StoredSession) -> Option<u32> {
    match &stored.data {
        mongodb::bson::Bson::Binary(envelope) => {
            Some(u32::from_be_bytes(envelope.bytes[1..5].try_into().unwrap()))
        }
        _ => None,
    }
}

/// Asserts that a load fails to decode with this message, which shows no data.
async fn assert_refuses(store: &impl SessionStore, record: &Record, said: &str) {
    let error = store.load(&record.id).await.unwrap_err();
    let shown = everything_said_by(&error);
    assert!(shown.contains("Decode") && shown.contains(said), "{shown}");
    for secret in ["4111", "card-number", &record.id.to_string()] {
        assert!(!shown.contains(secret), "{shown}");
    }
}

/// All bytes that are in the database.
async fn dump(store: &MongoStore) -> Vec<u8> {
    let namespace = store.collection().namespace();
    let database = store.collection().client().database(&namespace.db);
    let mut dump = Vec::new();
    for name in database.list_collection_names().await.unwrap() {
        let mut all = database.collection::<RawDocumentBuf>(&name).find(doc! {}).await.unwrap();
        while let Some(document) = all.next().await {
            dump.extend_from_slice(document.unwrap().as_bytes());
        }
    }
    dump
}

fn holds(dump: &[u8], text: &str) -> bool {
    dump.windows(text.len()).any(|window| window == text.as_bytes())
}

#[tokio::test]
async fn dump_contains_no_plain_text() {
    for encrypted in [true, false] {
        let uri = uri();
        let store = if encrypted {
            with_keys(&uri, Keys::new(1, key(1))).await
        } else {
            MongoStore::connect(&uri).await.unwrap()
        };
        let cached = cache_of(&store).await;
        let mut one = secret(&store).await;
        let other = secret(&cached).await;
        one.data.insert("added".to_owned(), json!("by a save"));
        store.save(&one).await.unwrap();
        cached.save(&Record { expiry_date: in_the_future(), ..other.clone() }).await.unwrap();
        assert_eq!(store.load(&other.id).await.unwrap().unwrap().data, other.data);
        assert_eq!(cached.load(&one.id).await.unwrap().unwrap().data, one.data);
        let dump = dump(&store).await;
        for text in ["card-number", "digits", "4111-1111", "4111", "added", "by a save", "serial"] {
            assert_ne!(holds(&dump, text), encrypted, "{text}");
        }
        assert!(holds(&dump, "expires"), "the dump is one");
    }
}

#[tokio::test]
async fn data_moved_to_another_document_is_a_decode_error() {
    let uri = uri();
    let store = with_keys(&uri, Keys::new(1, key(1))).await;
    let victim = secret(&store).await;
    let thief = create(&store).await;
    let stolen = stored(&store, &victim).await;
    let change = doc! { "$set": { "data": stolen.data.clone(), "rev": stolen.rev.clone() } };
    store.collection().update_one(by_key(&thief), change).await.unwrap();
    for cache in [store.clone(), store.another_with_keys(&uri).await] {
        assert_refuses(&cache, &thief, "cannot be decrypted with key 1").await;
        assert_refuses(&cache_of(&cache).await, &thief, "cannot be decrypted with key 1").await;
        assert_eq!(cache.load(&victim.id).await.unwrap().unwrap().data, victim.data);
    }

    // The whole document under another `_id`, and then under its own `_id` again.
    store.collection().delete_one(by_key(&thief)).await.unwrap();
    let mut moved = stolen.clone();
    moved.key = stored_key(&thief);
    store.collection().insert_one(moved).await.unwrap();
    assert_refuses(&store, &thief, "cannot be decrypted with key 1").await;
    store.collection().delete_one(by_key(&victim)).await.unwrap();
    assert!(store.load(&victim.id).await.unwrap().is_none());
    store.collection().insert_one(stolen).await.unwrap();
    assert_eq!(store.load(&victim.id).await.unwrap().unwrap().data, victim.data);
}

trait Another {
    async fn another_with_keys(&self, uri: &str) -> MongoStore;
}

impl Another for MongoStore {
    async fn another_with_keys(&self, uri: &str) -> MongoStore {
        with_keys(uri, Keys::new(2, key(2)).and_old(1, key(1))).await
    }
}

fn stored_key(record: &Record) -> Binary {
    let bytes = SessionKey::from(record.id).as_bytes().to_vec();
    Binary { subtype: BinarySubtype::Generic, bytes }
}

#[tokio::test]
async fn a_missing_an_unknown_and_a_wrong_key_say_so() {
    let uri = uri();
    let store = with_keys(&uri, Keys::new(2026, key(1))).await;
    let record = secret(&store).await;
    let plain = MongoStore::connect(&uri).await.unwrap();
    assert_refuses(
        &plain,
        &record,
        "encrypted with key 2026, and this store was built without keys",
    )
    .await;
    assert_refuses(&cache_of(&plain).await, &record, "encrypted with key 2026").await;
    let error = stored(&store, &record).await.data().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Decode, "{error}");
    let unknown = with_keys(&uri, Keys::new(7, key(1))).await;
    assert_refuses(&unknown, &record, "key 2026, which this store does not have").await;
    let wrong = with_keys(&uri, Keys::new(2026, key(9))).await;
    assert_refuses(&wrong, &record, "cannot be decrypted with key 2026").await;

    // In a list, an unreadable session is an error in its own place.
    let readable = secret(&unknown).await;
    let mut listed = unknown.all().collect::<Vec<_>>().await;
    listed.sort_by_key(Result::is_ok);
    assert_eq!(listed.len(), 2);
    assert_eq!(listed[0].as_ref().unwrap_err().kind(), ErrorKind::Decode);
    assert_eq!(listed[1].as_ref().unwrap().data, readable.data);

    // A store that cannot read the session can still delete it.
    plain.delete(&record.id).await.unwrap();
    assert!(store.load(&record.id).await.unwrap().is_none());
}

#[tokio::test]
async fn plain_sessions_are_read_until_rejected_and_encrypted_on_save() {
    let uri = uri();
    let plain = MongoStore::connect(&uri).await.unwrap();
    let queryable = MongoStore::builder().uri(&uri).queryable(true).build().await.unwrap();
    let records = [secret(&plain).await, secret(&queryable).await];
    let store = with_keys(&uri, Keys::new(1, key(1))).await;
    let picky = with_keys(&uri, Keys::new(1, key(1)).require_encrypted()).await;
    for record in &records {
        assert_eq!(store.load(&record.id).await.unwrap().unwrap().data, record.data);
        assert_refuses(&picky, record, "refuses plain").await;
        assert_eq!(key_of(&stored(&store, record).await), None);
        store.save(record).await.unwrap();
        assert_eq!(key_of(&stored(&store, record).await), Some(1));
        assert_eq!(picky.load(&record.id).await.unwrap().unwrap().data, record.data);
    }
}

#[tokio::test]
async fn contradicting_options_are_rejected_before_anything_is_sent() {
    let nowhere = || MongoStore::builder().uri("mongodb://127.0.0.1:1/none");
    for (builder, said) in [
        (
            nowhere().queryable(true).encryption(Keys::new(1, key(1))),
            "`queryable` and `encryption`",
        ),
        (nowhere().encryption(Keys::new(3, key(1)).and_old(3, key(2))), "the id 3"),
    ] {
        let error = builder.build().await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Config, "{error}");
        assert!(error.to_string().contains(said), "{error}");
    }
}

#[tokio::test]
async fn a_key_is_shown_by_no_builder_and_no_store() {
    let builder = MongoStore::builder().uri(uri()).encryption(Keys::new(1, key(0xab)));
    let shown = format!("{builder:?} {builder:#?}");
    let store = builder.build().await.unwrap();
    let shown = format!("{shown}{store:?} {:?} {:?}", store.reencrypt(), key(0xab));
    for bytes in ["171", "abab", "q6ur"] {
        assert!(!shown.to_lowercase().contains(bytes), "{shown}");
    }
}

/// A touch, a batch, a delete and a clear need no key.
#[tokio::test]
async fn verbs_of_an_encrypted_store_work() {
    let store = with_keys(&uri(), Keys::new(1, key(1))).await;
    let records = futures::future::join_all((0..64).map(|_| create(&store))).await;
    let cold = cache_of(&store).await;
    let saves = records.iter().map(async |record| {
        let mut record = record.clone();
        record.data.insert("saved".to_owned(), json!(record.id.to_string()));
        store.save(&record).await.unwrap();
        assert_eq!(cold.load(&record.id).await.unwrap().unwrap().data, record.data);
    });
    futures::future::join_all(saves).await;
    assert_eq!(store.length().await.unwrap(), 64);
    cold.delete(&records[0].id).await.unwrap();
    assert!(!store.contains(records[0].id).await.unwrap());
    assert_eq!(store.clear().await.unwrap(), 63);
    let mongo = mongo().await;
    let cached = cached().await;
    assert_eq!(Store::documents(&mongo).await + Store::documents(&cached).await, 0);
}
