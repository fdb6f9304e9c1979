//! What a saboteur tried on owners, filters, events and warm-up: each of these was red once.

use std::time::{Duration, Instant};

use mongodb::bson::{DateTime, Document, doc};
use serde_json::json;
use tower_sessions::SessionStore;
use tower_sessions::session::{Id, Record};
use tower_sessions_moka_mongodb_store::{
    CachedMongoStore, Coherence, ErrorKind, MongoStore, mongodb,
};

use crate::common::{
    FOREVER, PATIENCE, cache_of, create, in_the_future, mongo, other_instance, uri,
};
use crate::proxy::Proxy;

#[test]
fn events_of_a_store_whose_runtime_is_gone_are_an_error_and_no_hang() {
    let uri = uri();
    let gone = tokio::runtime::Runtime::new().unwrap();
    let store = gone.block_on(async { cache_of(&other_instance(&uri).await).await });
    drop(gone);
    let (done, is_done) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let here = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
        let outcome = here.block_on(store.events()).map(drop);
        done.send(outcome.map_err(|e| e.to_string())).ok();
    });
    let outcome = is_done.recv_timeout(Duration::from_secs(30));
    assert!(outcome.is_ok(), "events() hangs: {outcome:?}");
    println!("{outcome:?}");
}

#[tokio::test]
async fn a_warm_up_takes_any_bound_in_time() {
    let store = cache_of(&mongo().await).await;
    create(&store).await;
    for within in
        [Duration::from_secs(30 * 24 * 3600), Duration::from_secs(u64::MAX), Duration::MAX]
    {
        let warmed = store.warm(10).within(within).await;
        println!("{within:?}: {warmed:?}");
    }
    let warmed = store.warm(u64::MAX).await;
    println!("u64::MAX: {warmed:?}");
    store.warm(10).within(Duration::MAX).await.unwrap();
}

#[tokio::test]
async fn a_shutdown_does_not_wait_for_a_warm_up() {
    let proxy = Proxy::start().await;
    let mongo = MongoStore::builder().uri(proxy.uri()).operation_timeout(Duration::from_secs(1));
    let store = cache_of(&mongo.build().await.unwrap()).await;
    create(&store).await;
    let mut held = proxy.hold("aggregate");
    let warm = tokio::spawn({
        let store = store.clone();
        async move { store.warm(10).within(Duration::from_secs(25)).await }
    });
    held.reached().await;
    let began = Instant::now();
    store.shutdown().await;
    println!("shutdown took {:?}", began.elapsed());
    assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());
    drop(warm);
}

/// A store with owners that reads nothing anew, behind a proxy.
async fn owners() -> (Proxy, CachedMongoStore) {
    let proxy = Proxy::start().await;
    let mongo = MongoStore::builder()
        .uri(proxy.uri())
        .owner(|data| data.get("user")?.as_i64())
        .operation_timeout(Duration::from_secs(60));
    let store =
        CachedMongoStore::builder(mongo.build().await.unwrap()).coherence(Coherence::TimeBound);
    (proxy, store.max_staleness(FOREVER).build().await.unwrap())
}

async fn session_of(user: i64, store: &CachedMongoStore) -> Record {
    let mut record = Record {
        id: Id::default(),
        data: [("user".to_owned(), json!(user))].into(),
        expiry_date: in_the_future(),
    };
    store.create(&mut record).await.unwrap();
    record
}

#[tokio::test]
async fn a_sign_out_does_not_wait_for_the_end_of_a_long_removal() {
    let (proxy, store) = owners().await;
    // More than a page.
    for _ in 0..1_001 {
        session_of(7, &store).await;
    }
    let one = session_of(8, &store).await;
    let other = session_of(9, &store).await;
    let mut page = proxy.hold("delete");
    let long = tokio::spawn({
        let store = store.clone();
        async move { store.delete_by_owner(7).await }
    });
    page.reached().await;
    let mut short = Box::pin(store.delete_by_owner(8));
    while store.contains(one.id).await.unwrap() {
        assert!(futures::poll!(&mut short).is_pending());
    }
    // Nor does anybody wait behind who waits.
    let mut another = Box::pin(store.delete_by_owner(9));
    while store.contains(other.id).await.unwrap() {
        assert!(futures::poll!(&mut another).is_pending());
    }
    let mut next_page = proxy.hold("delete");
    page.deliver();
    next_page.reached().await;
    assert_eq!(tokio::time::timeout(PATIENCE, short).await.unwrap().unwrap(), 1);
    assert_eq!(tokio::time::timeout(PATIENCE, another).await.unwrap().unwrap(), 1);
    next_page.deliver();
    assert_eq!(long.await.unwrap().unwrap(), 1_001);
}

#[tokio::test]
async fn a_filter_that_says_not_finds_nothing_that_mongodb_cannot_look_into() {
    let uri = uri();
    let text = other_instance(&uri).await;
    let mut admin = Record {
        id: Id::default(),
        data: [("role".to_owned(), json!("admin"))].into(),
        expiry_date: in_the_future(),
    };
    text.create(&mut admin).await.unwrap();
    let store = MongoStore::builder().uri(&uri).queryable(true).build().await.unwrap();
    let ended = store.delete_where(doc! { "data.role": { "$ne": "admin" } }).await.unwrap();
    assert_eq!(ended, 0, "an admin was signed out by role != admin");
}

#[tokio::test]
async fn data_as_a_document_in_a_filter_over_texts_is_refused() {
    let store = mongo().await;
    let record = create(&store).await;
    for filter in
        [doc! { "data": { "user": 7 } }, doc! { "$nor": [{ "data": { "$type": "object" } }] }]
    {
        let error = store.delete_where(filter).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Config, "{error}");
    }
    assert!(store.load(&record.id).await.unwrap().is_some());
}

#[tokio::test]
async fn a_warm_up_that_gives_up_in_time_says_nothing_of_mongodb() {
    let proxy = Proxy::start().await;
    let mongo = other_instance(proxy.uri()).await;
    let store =
        CachedMongoStore::builder(mongo).coherence(Coherence::TimeBound).build().await.unwrap();
    create(&store).await;
    assert!(store.health().is_serving());
    let held = proxy.hold("aggregate");
    println!("{:?}", store.warm(10).within(Duration::from_millis(300)).await);
    drop(held);
    tokio::time::sleep(Duration::from_secs(2)).await;
    println!("{:?}", store.health());
    assert!(store.health().is_serving(), "nobody asks any more, so it stays so");
}

#[tokio::test]
async fn a_session_that_is_prolonged_stands_in_a_list_once() {
    use futures::TryStreamExt;
    let store = mongo().await;
    for _ in 0..400 {
        create(&store).await;
    }
    let documents = store.collection().clone_with_type::<Document>();
    let mut all = store.all();
    let mut seen = std::collections::HashSet::new();
    let mut twice = 0;
    let mut number = 0;
    while let Some(session) = all.try_next().await.unwrap() {
        number += 1;
        if number == 20 {
            let later = DateTime::from_millis((in_the_future().unix_timestamp() + 600) * 1000);
            let filter = doc! {};
            let ids: Vec<_> = {
                use futures::StreamExt;
                documents
                    .find(filter)
                    .sort(doc! {"expires": 1})
                    .limit(20)
                    .await
                    .unwrap()
                    .map(|d| d.unwrap().get("_id").unwrap().clone())
                    .collect()
                    .await
            };
            documents
                .update_many(doc! { "_id": { "$in": ids } }, doc! { "$set": { "expires": later } })
                .await
                .unwrap();
        }
        if !seen.insert(session.handle) {
            twice += 1;
        }
    }
    println!("{number} sessions, {twice} twice");
    assert_eq!(twice, 0);
}
