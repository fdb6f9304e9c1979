//! Saves that change no data store only the expiry, or nothing.

use std::time::Duration;

use time::OffsetDateTime;
use tower_sessions::SessionStore;
use tower_sessions::session::Record;
use tower_sessions_moka_mongodb_store::mongodb::bson::{Document, doc};
use tower_sessions_moka_mongodb_store::{CachedMongoStore, Coherence, MongoStore};

use crate::common::{FOREVER, create, mongo, uri};
use crate::proxy::Proxy;

const HOUR: Duration = Duration::from_secs(3_600);

/// A cache without a change stream: it knows only its own writes and reads.
async fn caching(mongo: MongoStore, touch_after: Duration) -> CachedMongoStore {
    let cached =
        CachedMongoStore::builder(mongo).max_staleness(FOREVER).coherence(Coherence::TimeBound);
    cached.touch_after(touch_after).build().await.unwrap()
}

async fn save_until(store: &CachedMongoStore, record: &Record, expiry: OffsetDateTime) {
    store.save(&Record { expiry_date: expiry, ..record.clone() }).await.unwrap();
}

/// The one document.
async fn stored(store: &CachedMongoStore) -> Document {
    let documents = store.collection().clone_with_type::<Document>();
    documents.find_one(doc! {}).await.unwrap().unwrap()
}

async fn ends(store: &CachedMongoStore) -> i64 {
    stored(store).await.get_datetime("expires").unwrap().timestamp_millis() / 1_000
}

#[tokio::test]
async fn touches_of_two_instances_keep_the_later_expiry() {
    let uri = uri();
    let ours = caching(MongoStore::connect(&uri).await.unwrap(), Duration::ZERO).await;
    let theirs = caching(MongoStore::connect(&uri).await.unwrap(), Duration::ZERO).await;
    let record = create(&ours).await;
    theirs.load(&record.id).await.unwrap().unwrap();
    let before = stored(&ours).await;
    let sooner = record.expiry_date + HOUR;
    let later = record.expiry_date + 2 * HOUR;
    save_until(&ours, &record, later).await;
    save_until(&theirs, &record, sooner).await;
    assert_eq!(ends(&ours).await, later.unix_timestamp());
    let after = stored(&ours).await;
    assert_eq!(after.get("rev"), before.get("rev"), "other instances receive no change");
}

#[tokio::test]
async fn touch_that_found_no_session_leaves_no_entry_if_the_read_after_it_fails() {
    let proxy = Proxy::start().await;
    let store = caching(MongoStore::connect(proxy.uri()).await.unwrap(), Duration::ZERO).await;
    let other = MongoStore::connect(proxy.uri()).await.unwrap();
    let record = create(&store).await;
    other.delete(&record.id).await.unwrap();
    let mut held = proxy.hold("find");
    let touched = Record { expiry_date: record.expiry_date + HOUR, ..record.clone() };
    let saved = tokio::spawn({
        let store = store.clone();
        async move { store.save(&touched).await }
    });
    held.reached().await;
    held.refuse(13);
    assert!(saved.await.unwrap().is_err());
    assert!(store.load(&record.id).await.unwrap().is_none(), "MongoDB said that it is gone");
}

#[tokio::test]
async fn shorter_expiry_is_stored_and_reported() {
    let store = caching(mongo().await, HOUR).await;
    let record = create(&store).await;
    let before = stored(&store).await;
    let sooner = record.expiry_date - Duration::from_secs(1);
    save_until(&store, &record, sooner).await;
    assert_eq!(ends(&store).await, sooner.unix_timestamp());
    assert_ne!(stored(&store).await.get("rev"), before.get("rev"));
}

#[tokio::test]
async fn small_extensions_are_not_sent_until_they_add_up_to_touch_after() {
    let store = caching(mongo().await, Duration::from_secs(60)).await;
    let record = create(&store).await;
    let before = stored(&store).await;
    for seconds in [0, 1, 59] {
        let expiry = record.expiry_date + Duration::from_secs(seconds);
        save_until(&store, &record, expiry).await;
        assert_eq!(stored(&store).await, before, "after {seconds} s");
    }
    let expiry = record.expiry_date + Duration::from_secs(61);
    save_until(&store, &record, expiry).await;
    assert_eq!(ends(&store).await, expiry.unix_timestamp());
    let served = store.load(&record.id).await.unwrap().unwrap();
    assert_eq!(served.expiry_date.unix_timestamp(), expiry.unix_timestamp());
}

#[tokio::test]
async fn large_touch_after_costs_at_most_a_tenth_of_the_lifetime() {
    let store = caching(mongo().await, FOREVER).await;
    let mut record = create(&store).await;
    let now = OffsetDateTime::now_utc().replace_nanosecond(0).unwrap();
    record.expiry_date = now + Duration::from_secs(100);
    store.save(&record).await.unwrap();
    save_until(&store, &record, now + Duration::from_secs(109)).await;
    assert_eq!(ends(&store).await, (now + Duration::from_secs(100)).unix_timestamp());
    save_until(&store, &record, now + Duration::from_secs(112)).await;
    assert_eq!(ends(&store).await, (now + Duration::from_secs(112)).unix_timestamp());
}
