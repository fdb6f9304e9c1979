//! What operators ask of the stored sessions, and end by it.

use std::time::{Duration, Instant};

use futures::StreamExt;
use mongodb::bson::doc;
use serde_json::{Value, json};
use tower_sessions::SessionStore;
use tower_sessions::session::Record;
use tower_sessions_moka_mongodb_store::{
    ErrorKind, LiveSessions, Result, SessionHandle, data_path, mongodb,
};

use crate::common::{create, eventually, everything_said_by, on_both_tiers, record};
use crate::owner::Owned;

on_both_tiers! {
    what_the_data_says_can_be_asked = find;
    a_store_of_texts_says_what_to_do = not_queryable;
    what_a_filter_finds_ends_here_and_elsewhere = delete_where;
    an_empty_filter_ends_nothing = empty;
    the_server_is_not_quoted = errors;
}

async fn with(store: &impl SessionStore, key: &str, value: Value) -> Record {
    let mut record = record();
    record.data.insert(key.to_owned(), value);
    store.create(&mut record).await.unwrap();
    record
}

async fn is_there(store: &impl SessionStore, record: &Record) -> bool {
    store.load(&record.id).await.unwrap().is_some()
}

async fn found(listed: LiveSessions) -> Vec<SessionHandle> {
    listed.map(|session| session.unwrap().handle).collect().await
}

async fn error_of(mut listed: LiveSessions) -> tower_sessions_moka_mongodb_store::Error {
    let error = listed.next().await.unwrap().unwrap_err();
    assert!(listed.next().await.is_none());
    error
}

async fn find(plain: impl Owned) {
    let store = plain.with(|mongo| mongo.queryable(true)).await;
    let large = with(&store, "cart", json!({ "total": 2_000 })).await;
    drop(with(&store, "cart", json!({ "total": 20 })).await);
    let odd = with(&store, "a.b%", json!({ "$c": "x" })).await;
    drop(with(&plain, "cart", json!({ "total": 3_000 })).await);

    let total = data_path(&["cart", "total"]);
    let filter = doc! { &total: { "$gt": 1_000 } };
    assert_eq!(found(store.find(filter.clone())).await, [SessionHandle::of(large.id)]);
    let filter = doc! { "$and": [{ data_path(&["a.b%", "$c"]): "x" }] };
    assert_eq!(found(store.find(filter)).await, [SessionHandle::of(odd.id)]);
    assert_eq!(store.find(doc! {}).count().await, 4, "all of them");
    // A condition of one's own on what the store asks for as well.
    let soon = mongodb::bson::DateTime::from_millis(1_000);
    assert_eq!(store.find(doc! { "expires": { "$lt": soon } }).count().await, 0);
    let far = doc! { "expires": { "$gt": soon }, "$and": [{ &total: { "$lt": 1_000 } }] };
    assert_eq!(store.find(far).count().await, 1);
    let times = doc! { "created": { "$lte": mongodb::bson::DateTime::now() } };
    assert_eq!(plain.find(times.clone()).count().await, 4, "texts have times too");

    store.expire_all().await;
    assert_eq!(store.find(times).count().await, 0);
    assert_eq!(store.delete_where(doc! { &total: { "$gt": 0 } }).await.unwrap(), 0);
    assert_eq!(store.documents().await, 4, "what has expired is left to who removes it");
}

async fn not_queryable(store: impl Owned) {
    let record = with(&store, "card", json!("4111")).await;
    for filter in [
        doc! { data_path(&["card"]): "4111" },
        doc! { "$nor": [{ "$or": [{ "data.card": "4111" }] }] },
        doc! { "$expr": { "$eq": ["$data.card", "4111"] } },
    ] {
        for error in [
            error_of(store.find(filter.clone())).await,
            store.delete_where(filter.clone()).await.unwrap_err(),
        ] {
            assert_eq!(error.kind(), ErrorKind::Config);
            let said = everything_said_by(&error);
            assert!(said.contains("queryable(true)") && !said.contains("4111"), "{said}");
        }
    }
    assert!(is_there(&store, &record).await);
}

async fn delete_where(plain: impl Owned) {
    let store = plain.with(|mongo| mongo.queryable(true)).await;
    let other = store.with(|mongo| mongo.queryable(true)).await;
    let (mut old, mut new) = (Vec::new(), Vec::new());
    for version in 0..6 {
        let made = with(&store, "version", json!(version)).await;
        assert!(is_there(&other, &made).await, "it is cached there");
        if version < 4 { &mut old } else { &mut new }.push(made);
    }
    let filter = doc! { data_path(&["version"]): { "$lt": 4 } };
    assert_eq!(store.delete_where(filter.clone()).await.unwrap(), 4);
    let returned = Instant::now();
    for record in &old {
        assert!(!is_there(&store, record).await);
        eventually("it ends there", async || !is_there(&other, record).await).await;
        store.save(record).await.unwrap();
        assert!(!is_there(&store, record).await, "no save brings it back");
    }
    assert!(returned.elapsed() < Duration::from_secs(5), "the bound by default");
    for record in &new {
        assert!(is_there(&store, record).await && is_there(&other, record).await);
    }
    assert_eq!(store.delete_where(filter).await.unwrap(), 0);
}

async fn empty(store: impl Owned) {
    let record = create(&store).await;
    let error = store.delete_where(doc! {}).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Config);
    assert!(error.to_string().contains("`clear`"), "{error}");
    assert!(is_there(&store, &record).await);
}

async fn errors(plain: impl Owned) {
    let store = plain.with(|mongo| mongo.queryable(true)).await;
    drop(create(&store).await);
    let filter = doc! { "data.card": { "$no_such": "4111" } };
    let deleted: Result<u64> = store.delete_where(filter.clone()).await;
    for error in [error_of(store.find(filter)).await, deleted.unwrap_err()] {
        assert_eq!(error.kind(), ErrorKind::Server);
        let said = everything_said_by(&error);
        assert!(!said.contains("4111") && !said.contains("no_such"), "{said}");
    }
}
