//! Documents of other programs in the collection of the sessions.

use futures::TryStreamExt;
use mongodb::bson::oid::ObjectId;
use mongodb::bson::spec::BinarySubtype;
use mongodb::bson::{Binary, Bson, DateTime, Document, Timestamp, doc};
use tower_sessions::ExpiredDeletion;
use tower_sessions_moka_mongodb_store::{CachedMongoStore, ExpiredRemoval, MongoStore, mongodb};

use crate::common::{Commands, Log, Store, cached, create, mongo, on_both_tiers, uri};

/// The last moment that a server written in Python can read.
const FAR: i64 = 253_402_300_799_000;

fn binary(length: usize, subtype: BinarySubtype) -> Bson {
    Bson::Binary(Binary { subtype, bytes: vec![0x55; length] })
}

/// An `_id` of each type that other stores and programs use.
fn ids() -> Vec<Bson> {
    vec![
        "sess:abc".into(),
        ObjectId::new().into(),
        7.into(),
        7_i64.pow(12).into(),
        0.5.into(),
        true.into(),
        Bson::Null,
        DateTime::now().into(),
        Bson::Timestamp(Timestamp { time: 1, increment: 1 }),
        doc! { "app": 1 }.into(),
    ]
}

/// Binary values that are not the key of a session.
fn binaries() -> Vec<Bson> {
    vec![
        binary(16, BinarySubtype::Uuid),
        binary(31, BinarySubtype::Generic),
        binary(32, BinarySubtype::Md5),
        binary(33, BinarySubtype::Generic),
    ]
}

/// Whether the server orders binary values by their length first, as MongoDB does. Only then can a
/// range of an index separate a session's key from a binary value of another length.
async fn orders_by_length(store: &impl Store) -> bool {
    let other = store.collection().client().database(&store.collection().namespace().db);
    let other = other.collection::<Document>("orders_by_length");
    let mut bytes = vec![0; 33];
    other
        .insert_one(
            doc! { "_id": Binary { subtype: BinarySubtype::Generic, bytes: bytes.clone() } },
        )
        .await
        .unwrap();
    bytes = vec![0xff; 32];
    let longer = doc! { "_id": { "$gt": Binary { subtype: BinarySubtype::Generic, bytes } } };
    other.count_documents(longer).await.unwrap() == 1
}

fn all_ids() -> Vec<Bson> {
    [ids(), binaries()].concat()
}

/// The ids that this server can tell from a session's key.
async fn told_apart(store: &impl Store) -> Vec<Bson> {
    if orders_by_length(store).await { all_ids() } else { ids() }
}

/// Inserts a document with a live expiry for each id. If the type has more values, it also inserts
/// an expired document and one without an expiry.
async fn insert_theirs(store: &impl Store, ids: Vec<Bson>) -> u64 {
    let theirs = store.collection().clone_with_type::<Document>();
    let mut number = 0;
    for id in ids {
        for hours in [Some(1), Some(-1), None] {
            let id = match (&id, hours) {
                (id, Some(1)) => id.clone(),
                (Bson::String(text), _) => format!("{text}{hours:?}").into(),
                (Bson::ObjectId(_), _) => ObjectId::new().into(),
                (Bson::Binary(binary), _) => {
                    let mut binary = binary.clone();
                    binary.bytes[0] = if hours.is_none() { 0 } else { 0xff };
                    binary.into()
                }
                _ => continue,
            };
            let mut document =
                doc! { "_id": id, "session": "{}", "updated": DateTime::from_millis(FAR) };
            if let Some(hours) = hours {
                let millis = DateTime::now().timestamp_millis() + hours * 3_600_000;
                document.insert("expires", DateTime::from_millis(millis));
            }
            theirs.insert_one(document).await.unwrap();
            number += 1;
        }
    }
    number
}

on_both_tiers! {
    documents_of_others_are_not_counted = not_counted;
    documents_of_others_are_not_listed = not_listed;
    documents_of_others_are_not_cleared = not_cleared;
    documents_of_others_are_not_swept = not_swept;
}

async fn not_counted(store: impl Store) {
    for _ in 0..3 {
        create(&store).await;
    }
    store.expire_all().await;
    for _ in 0..2 {
        create(&store).await;
    }
    assert_eq!(store.length().await.unwrap(), 2);
    assert_eq!(store.estimated_length().await.unwrap(), 2);
    insert_theirs(&store, told_apart(&store).await).await;
    assert_eq!(store.length().await.unwrap(), 2);
    assert_eq!(store.estimated_length().await.unwrap(), 2);
}

async fn not_listed(store: impl Store) {
    create(&store).await;
    insert_theirs(&store, all_ids()).await;
    let all: Vec<_> = store.all().try_collect().await.unwrap();
    assert_eq!(all.len(), 1);
}

async fn not_cleared(store: impl Store) {
    let theirs = insert_theirs(&store, all_ids()).await;
    create(&store).await;
    create(&store).await;
    assert_eq!(store.clear().await.unwrap(), 2);
    assert_eq!(store.documents().await, theirs);
}

async fn not_swept(store: impl Store + ExpiredDeletion) {
    create(&store).await;
    store.expire_all().await;
    let theirs = insert_theirs(&store, all_ids()).await;
    create(&store).await;
    store.delete_expired().await.unwrap();
    assert_eq!(store.documents().await, theirs + 1);
}

#[tokio::test]
async fn filters_delete_only_sessions() {
    let store = mongo().await;
    create(&store).await;
    let theirs = insert_theirs(&store, all_ids()).await;
    let any = doc! { "expires": { "$gt": DateTime::from_millis(0) } };
    let found: Vec<_> = store.find(any.clone()).try_collect().await.unwrap();
    assert_eq!(found.len(), 1);
    assert_eq!(store.delete_where(any).await.unwrap(), 1);
    assert_eq!(store.documents().await, theirs);
}

#[tokio::test]
async fn owners_are_assigned_only_to_sessions() {
    let log = Log::default();
    let _logs = tracing::subscriber::set_default(log.subscriber());
    let uri = uri();
    let plain = MongoStore::connect(&uri).await.unwrap();
    create(&plain).await;
    insert_theirs(&plain, all_ids()).await;
    let owned = MongoStore::builder().uri(&uri).owner(|_| Some("ferris")).build().await.unwrap();
    assert_eq!(owned.assign_owners().await.unwrap(), 1);
    assert!(!log.take().contains("left as they are"));
}

#[tokio::test]
async fn warm_up_loads_only_sessions() {
    let store = cached().await;
    create(&store).await;
    insert_theirs(&store, told_apart(&store).await).await;
    let other = CachedMongoStore::builder(store.another().await).build().await.unwrap();
    // More documents of other programs have a later `updated` than the warm-up asks for.
    let warmed = other.warm(1).await.unwrap();
    assert_eq!(warmed.sessions, 1);
}

#[tokio::test]
async fn expired_documents_of_others_do_not_block_the_sweep() {
    let store = MongoStore::builder().uri(uri()).expired_removal(ExpiredRemoval::Off);
    let store = store.build().await.unwrap();
    let theirs = store.collection().clone_with_type::<Document>();
    let past = DateTime::from_millis(500);
    let documents = (0..1_100).map(|id| doc! { "_id": id, "expires": past });
    theirs.insert_many(documents).await.unwrap();
    create(&store).await;
    let ours = doc! { "format": 1 };
    let ended = doc! { "$set": { "expires": DateTime::from_millis(1_000) } };
    theirs.update_many(ours, ended).await.unwrap();
    store.delete_expired().await.unwrap();
    assert_eq!(store.documents().await, 1_100);
}

#[tokio::test]
async fn build_warns_once_about_documents_of_others() {
    let log = Log::default();
    let _logs = tracing::subscriber::set_default(log.subscriber());
    let uri = uri();
    let store = MongoStore::connect(&uri).await.unwrap();
    create(&store).await;
    MongoStore::connect(&uri).await.unwrap();
    let warning = "holds documents that are not sessions of this store";
    assert!(!log.take().contains(warning));
    insert_theirs(&store, all_ids()).await;
    let client = Commands::default().client(&uri).await;
    for create_indexes in [true, false] {
        let builder = MongoStore::builder().client(client.clone()).create_indexes(create_indexes);
        builder.build().await.unwrap();
        let said = log.take();
        assert_eq!(said.matches(warning).count(), 1, "{said}");
        assert!(!said.contains("sess:abc"), "{said}");
    }
}
