//! The index on the owner, and indexes that conflict with it.

use futures::TryStreamExt;
use mongodb::bson::{Document, doc};
use mongodb::options::IndexOptions;
use mongodb::{Collection, IndexModel};
use tower_sessions_moka_mongodb_store::{ErrorKind, MongoStore, StoredSession, mongodb};

use super::user;
use crate::common::uri;

async fn plain() -> (String, Collection<StoredSession>) {
    let uri = uri();
    let collection = MongoStore::connect(&uri).await.unwrap().collection();
    (uri, collection)
}

async fn build(uri: &str) -> tower_sessions_moka_mongodb_store::Result<MongoStore> {
    MongoStore::builder().uri(uri).owner(user).build().await
}

async fn on_the_owner(collection: &Collection<StoredSession>) -> Vec<IndexModel> {
    let indexes: Vec<IndexModel> =
        collection.list_indexes().await.unwrap().try_collect().await.unwrap();
    indexes.into_iter().filter(|index| index.keys.contains_key("owner")).collect()
}

fn exists() -> Document {
    doc! { "owner": { "$exists": true } }
}

#[tokio::test]
async fn owner_index_exists_only_with_an_owner_function() {
    let (uri, collection) = plain().await;
    assert!(on_the_owner(&collection).await.is_empty());
    for _ in 0..2 {
        build(&uri).await.unwrap().ensure_indexes().await.unwrap();
    }
    let [index] = &on_the_owner(&collection).await[..] else { panic!("one index") };
    assert_eq!(index.keys, doc! { "owner": 1, "_id": 1 });
    let options = index.options.as_ref().unwrap();
    assert_eq!(options.partial_filter_expression, Some(exists()));
    assert_eq!(options.expire_after, None);
    MongoStore::connect(&uri).await.unwrap();

    let (uri, collection) = plain().await;
    let alone = MongoStore::builder().uri(&uri).owner(user).create_indexes(false);
    alone.build().await.unwrap();
    assert!(on_the_owner(&collection).await.is_empty());
}

#[tokio::test]
async fn equivalent_owner_index_is_accepted() {
    for (keys, only) in [
        (doc! { "owner": 1_i64, "_id": 1_i64 }, None),
        (doc! { "owner": 1.0, "_id": 1.0 }, Some(exists())),
    ] {
        let (uri, collection) = plain().await;
        let options =
            IndexOptions::builder().name("mine".to_owned()).partial_filter_expression(only).build();
        let index = IndexModel::builder().keys(keys).options(options).build();
        collection.create_index(index).await.unwrap();
        build(&uri).await.unwrap();
        assert_eq!(on_the_owner(&collection).await.len(), 1);
    }
}

#[tokio::test]
async fn useless_owner_index_is_an_error_with_the_repair_command() {
    let only = doc! { "owner": { "$gt": "m" } };
    let partial = IndexOptions::builder().partial_filter_expression(only).build();
    let named = IndexOptions::builder().name("owner_1__id_1".to_owned()).build();
    for (keys, options, said) in [
        (doc! { "owner": 1, "_id": 1 }, partial, "covers only some"),
        (doc! { "rev": 1 }, named, "owner_1__id_1"),
    ] {
        let (uri, collection) = plain().await;
        let index = IndexModel::builder().keys(keys).options(options).build();
        collection.create_index(index).await.unwrap();
        let error = build(&uri).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Index, "{error}");
        let text = error.to_string();
        assert!(text.contains(said) && text.contains("dropIndex"), "{text}");
        collection.drop_index("owner_1__id_1").await.unwrap();
        build(&uri).await.unwrap();
    }
}
