//! Writes of one session keep their order, even if callers leave. Lists and removals are complete.

use std::collections::HashSet;

use futures::{StreamExt, TryStreamExt, poll};
use mongodb::bson::{DateTime, Document, doc};
use serde_json::json;
use tower_sessions::session::Record;
use tower_sessions::{SessionStore, session_store};
use tower_sessions_moka_mongodb_store::{ErrorKind, mongodb};

use crate::common::{PATIENCE, Store, cached, create, in_the_future, mongo, on_both_tiers};

on_both_tiers! {
    an_abandoned_save_does_not_overwrite_a_later_one = abandoned_saves_keep_their_order;
    save_that_cannot_be_stored_keeps_the_order = unstorable_saves_keep_the_order;
    an_abandoned_save_does_not_overwrite_a_later_one_of_the_old_data = old_data_stays_last;
    an_abandoned_save_does_not_undo_a_later_delete = abandoned_saves_stay_before_a_delete;
    clear_removes_every_session_beside_documents_of_others = clear_beside_others;
    interrupted_list_ends_with_an_error = cut_off_list;
    unread_list_does_not_delay_the_shutdown = unread_list;
}

fn version(record: &Record, version: u64) -> Record {
    let mut record = record.clone();
    record.data.insert("version".to_owned(), json!(version));
    record
}

/// Begins a save and drops it, as a handler does when its client disconnects.
async fn abandon(save: impl Future<Output = session_store::Result<()>>) {
    let mut save = Box::pin(save);
    assert!(poll!(&mut save).is_pending());
}

async fn abandoned_saves_keep_their_order(store: impl Store) {
    for round in 0..100 {
        let record = create(&store).await;
        abandon(store.save(&version(&record, 1))).await;
        store.save(&version(&record, 2)).await.unwrap();
        let another = store.another().await;
        let stored = another.load(&record.id).await.unwrap().unwrap();
        assert_eq!(stored.data["version"], json!(2), "round {round}");
        let served = store.load(&record.id).await.unwrap().unwrap();
        assert_eq!(served.data["version"], json!(2), "round {round}");
    }
}

async fn unstorable_saves_keep_the_order(store: impl Store) {
    for round in 0..50 {
        let record = create(&store).await;
        abandon(store.save(&version(&record, 1))).await;
        let mut deep = version(&record, 9);
        deep.data.insert("deep".to_owned(), (0..200).fold(json!(1), |inner, _| json!([inner])));
        let error = store.save(&deep).await.unwrap_err();
        assert!(matches!(error, session_store::Error::Encode(_)), "{error}");
        store.save(&version(&record, 2)).await.unwrap();
        let stored = store.another().await.load(&record.id).await.unwrap().unwrap();
        assert_eq!(stored.data["version"], json!(2), "round {round}");
    }
}

/// The last save decides what the cache holds, while another save is in progress.
async fn old_data_stays_last(store: impl Store) {
    for round in 0..50 {
        let record = create(&store).await;
        let mut later = record.clone();
        later.expiry_date += time::Duration::minutes(1);
        abandon(store.save(&version(&record, 1))).await;
        store.save(&later).await.unwrap();
        let stored = store.another().await.load(&record.id).await.unwrap().unwrap();
        assert_eq!(stored.data, record.data, "round {round}");
        assert_eq!(store.load(&record.id).await.unwrap().unwrap().data, record.data);
    }
}

async fn abandoned_saves_stay_before_a_delete(store: impl Store) {
    for _ in 0..30 {
        let record = create(&store).await;
        abandon(store.save(&version(&record, 1))).await;
        store.delete(&record.id).await.unwrap();
        assert_eq!(store.load(&record.id).await.unwrap(), None);
        assert_eq!(store.documents().await, 0);
    }
}

async fn clear_beside_others(store: impl Store) {
    let others = store.collection().clone_with_type::<Document>();
    let foreign = (0..1_000).map(|n| doc! { "_id": format!("other {n}") });
    others.insert_many(foreign).await.unwrap();
    let mut records = Vec::new();
    for _ in 0..5 {
        records.push(create(&store).await);
    }
    assert_eq!(store.clear().await.unwrap(), 5);
    for record in records {
        assert_eq!(store.load(&record.id).await.unwrap(), None);
    }
    assert_eq!(store.documents().await, 1_000, "they are not ours");
}

/// A store with more sessions than a list reads ahead.
async fn fill(store: &impl Store) {
    let creates = (0..300).map(|_| create(store));
    futures::stream::iter(creates).buffer_unordered(32).collect::<Vec<_>>().await;
}

async fn cut_off_list(store: impl Store) {
    fill(&store).await;
    let mut list = store.all();
    list.next().await.unwrap().unwrap();
    store.shutdown().await;
    let rest: Vec<_> = list.collect().await;
    assert!(rest.len() < 299);
    assert_eq!(rest.last().unwrap().as_ref().unwrap_err().kind(), ErrorKind::Closed);
}

async fn unread_list(store: impl Store) {
    fill(&store).await;
    let list = store.all();
    tokio::time::timeout(PATIENCE, store.shutdown()).await.unwrap();
    drop(list);
}

#[tokio::test]
async fn a_closed_cache_serves_nothing() {
    let store = cached().await;
    let record = create(&store).await;
    store.shutdown().await;
    assert!(store.load(&record.id).await.is_err());
}

#[tokio::test]
async fn session_that_is_prolonged_during_a_list_is_listed_once() {
    let store = mongo().await;
    for _ in 0..400 {
        create(&store).await;
    }
    let documents = store.collection().clone_with_type::<Document>();
    let mut listed = HashSet::new();
    let mut all = store.all();
    while let Some(session) = all.next().await {
        assert!(listed.insert(session.unwrap().handle), "listed twice");
        if listed.len() == 20 {
            let first = documents.find(doc! {}).sort(doc! { "expires": 1 }).limit(20);
            let first: Vec<_> = first.await.unwrap().try_collect().await.unwrap();
            let ids: Vec<_> = first.iter().filter_map(|session| session.get("_id")).collect();
            let later = (in_the_future().unix_timestamp() + 600) * 1_000;
            let later = doc! { "$set": { "expires": DateTime::from_millis(later) } };
            documents.update_many(doc! { "_id": { "$in": ids } }, later).await.unwrap();
        }
    }
    assert_eq!(listed.len(), 400);
}
