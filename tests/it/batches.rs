//! Calls that are sent in one command: what one call, or the command as a whole, can do to the
//! others.

use futures::poll;
use serde_json::json;
use tokio::task::JoinHandle;
use tower_sessions::session::Record;
use tower_sessions::{SessionStore, session_store};
use tower_sessions_moka_mongodb_store::mongodb::bson::spec::BinarySubtype;
use tower_sessions_moka_mongodb_store::mongodb::bson::{Binary, DateTime, doc};
use tower_sessions_moka_mongodb_store::{CachedMongoStore, MongoStore, SessionKey};

use crate::common::{FOREVER, PATIENCE, create, mongo, other_instance};
use crate::proxy::Proxy;

fn version(record: &Record, version: u64) -> Record {
    let mut record = record.clone();
    record.data.insert("version".to_owned(), json!(version));
    record
}

fn save(
    store: &(impl SessionStore + Clone),
    record: Record,
) -> JoinHandle<session_store::Result<()>> {
    let store = store.clone();
    tokio::spawn(async move { store.save(&record).await })
}

/// A store that sends one command at a time, so that saves that wait are sent as one batch.
async fn one_at_a_time(proxy: &Proxy) -> MongoStore {
    MongoStore::builder().uri(proxy.uri()).max_commands_in_flight(1).build().await.unwrap()
}

#[tokio::test]
async fn batch_with_a_lost_connection_is_not_sent_again() {
    let proxy = Proxy::start().await;
    let ours = one_at_a_time(&proxy).await;
    let theirs = other_instance(proxy.direct()).await;
    let busy = create(&ours).await;
    let a = create(&ours).await;
    let b = create(&ours).await;
    let mut first = proxy.hold("update");
    let keeps_busy = save(&ours, version(&busy, 1));
    first.reached().await;
    let mut batch = proxy.hold("update");
    let saves = (save(&ours, version(&a, 1)), save(&ours, version(&b, 1)));
    assert_eq!(batch.reached().await, 2, "they are sent as one batch");
    // The server has carried out the save. Another instance sees it, and saves on top of it.
    let seen = theirs.load(&a.id).await.unwrap().unwrap();
    assert_eq!(seen.data["version"], json!(1));
    theirs.save(&version(&seen, 2)).await.unwrap();
    batch.cut();
    first.deliver();
    keeps_busy.await.unwrap().unwrap();
    assert!(saves.0.await.unwrap().is_err() && saves.1.await.unwrap().is_err(), "in doubt");
    assert_eq!(theirs.load(&a.id).await.unwrap().unwrap().data["version"], json!(2));
}

#[tokio::test]
async fn save_of_an_expired_session_is_not_cached_even_if_a_touch_prolongs_it() {
    let proxy = Proxy::start().await;
    let mongo = one_at_a_time(&proxy).await;
    let ours = CachedMongoStore::builder(mongo).max_staleness(FOREVER).build().await.unwrap();
    let theirs = other_instance(proxy.direct()).await;
    let busy = create(&ours).await;
    let a = create(&ours).await;
    let b = create(&ours).await;
    let key = SessionKey::from(a.id).as_bytes().to_vec();
    let id = Binary { subtype: BinarySubtype::Generic, bytes: key };
    let expires = async |at: i64| {
        let set =
            doc! { "$set": { "expires": DateTime::from_millis(at), "updated": DateTime::now() } };
        theirs.collection().update_one(doc! { "_id": id.clone() }, set).await.unwrap();
    };
    expires(1_000).await;
    let mut first = proxy.hold("update");
    let keeps_busy = save(&ours, version(&busy, 1));
    first.reached().await;
    let mut batch = proxy.hold("update");
    let saves = (save(&ours, version(&a, 1)), save(&ours, version(&b, 1)));
    assert_eq!(batch.reached().await, 2, "they are sent as one batch");
    // Another instance found the session live. Its touch is carried out late.
    expires(DateTime::now().timestamp_millis() + 600_000).await;
    batch.deliver();
    first.deliver();
    for done in [keeps_busy, saves.0, saves.1] {
        done.await.unwrap().unwrap();
    }
    let stored = theirs.load(&a.id).await.unwrap().unwrap();
    assert_eq!(stored.data.get("version"), None);
    assert_eq!(ours.load(&a.id).await.unwrap().unwrap().data, stored.data);
    assert_eq!(ours.load(&b.id).await.unwrap().unwrap().data["version"], json!(1));
}

/// `select!` and buffered streams leave a call like this.
#[tokio::test]
async fn call_that_is_not_polled_blocks_no_other_call() {
    let mongo = mongo().await;
    let store = CachedMongoStore::builder(mongo.clone()).build().await.unwrap();
    let loaded = create(&mongo).await;
    let saved = create(&mongo).await;
    let mut held = (Box::pin(store.load(&loaded.id)), Box::pin(store.save(&saved)));
    assert!(poll!(&mut held.0).is_pending() && poll!(&mut held.1).is_pending());
    let load = tokio::time::timeout(PATIENCE, store.load(&loaded.id)).await.unwrap();
    assert!(load.unwrap().is_some());
    let later = version(&saved, 2);
    tokio::time::timeout(PATIENCE, store.save(&later)).await.unwrap().unwrap();
    drop(held);
}
