//! `absolute_lifetime`: a session ends after a time, however often it is used.

use std::time::Duration;

use futures::TryStreamExt;
use serde_json::json;
use time::OffsetDateTime;
use tower_sessions::SessionStore;
use tower_sessions::session::{Id, Record};
use tower_sessions_moka_mongodb_store::mongodb::bson::{Bson, DateTime, Document, Timestamp, doc};
use tower_sessions_moka_mongodb_store::{
    CachedMongoStore, ErrorKind, MongoStore, MongoStoreBuilder, in_request_scope,
};

use crate::common::{
    Commands, FOREVER, PATIENCE, Store, cache_of, create, eventually, in_the_future, record, uri,
};

const LIMIT: Duration = Duration::from_secs(3_600);

fn limited(limit: Duration) -> MongoStoreBuilder {
    MongoStore::builder().uri(uri()).operation_timeout(PATIENCE).absolute_lifetime(limit)
}

async fn mongo(limit: Duration) -> MongoStore {
    limited(limit).build().await.unwrap()
}

/// Runs the same tests on both of our stores, each with the limit of one hour.
macro_rules! with_limit {
    ($($name:ident = $test:ident;)*) => {
        mod uncached {
            $(#[tokio::test] async fn $name() { super::$test(super::mongo(super::LIMIT).await).await; })*
        }
        mod cached {
            $(#[tokio::test] async fn $name() {
                super::$test(crate::common::cache_of(&super::mongo(super::LIMIT).await).await).await;
            })*
        }
    };
}

with_limit! {
    no_save_and_no_touch_prolongs_a_session_past_the_limit = saves_and_touches;
    a_session_past_the_limit_is_not_live = past_the_limit;
    a_session_whose_created_is_no_date_is_not_live = unknown_age;
    cycle_id_in_a_request_scope_keeps_the_age = cycle_id;
    a_new_session_expires_at_the_limit = new_session;
}

fn date(at: OffsetDateTime) -> DateTime {
    DateTime::from_millis(i64::try_from(at.unix_timestamp_nanos() / 1_000_000).unwrap())
}

fn ago(minutes: i64) -> OffsetDateTime {
    OffsetDateTime::now_utc() - time::Duration::minutes(minutes)
}

async fn set_created(store: &impl Store, created: impl Into<Bson>) {
    let created = doc! { "$set": { "created": created.into() } };
    let updated = store.collection().update_many(doc! {}, created).await.unwrap();
    assert_eq!(updated.modified_count, 1);
}

/// Stores a session that was created this number of minutes ago, for a store that has not cached it.
async fn stored(store: &impl Store, minutes: i64) -> (Record, OffsetDateTime) {
    let another = store.another().await;
    let mut record = record();
    record.expiry_date = OffsetDateTime::now_utc() + time::Duration::minutes(5);
    another.create(&mut record).await.unwrap();
    let created = ago(minutes);
    set_created(&another, date(created)).await;
    let millis = i64::try_from(created.unix_timestamp_nanos() / 1_000_000).unwrap();
    let created = OffsetDateTime::from_unix_timestamp_nanos(i128::from(millis) * 1_000_000);
    (record, created.unwrap())
}

async fn document(store: &impl Store) -> Document {
    let documents = store.collection().clone_with_type::<Document>();
    documents.find_one(doc! {}).await.unwrap().unwrap()
}

async fn saves_and_touches(store: impl Store) {
    let (mut record, created) = stored(&store, 50).await;
    let end = created + LIMIT;
    for changes in [true, false, true] {
        // Once a save of a session that is not cached, and then of one that is.
        if changes {
            record.data.insert("serial".to_owned(), json!(crate::common::serial()));
        }
        record.expiry_date = in_the_future();
        store.save(&record).await.unwrap();
        assert_eq!(document(&store).await.get_datetime("expires").unwrap(), &date(end));
        let found = store.load(&record.id).await.unwrap().unwrap();
        assert_eq!(found.expiry_date, end);
        in_request_scope(async {
            let mut found = store.load(&record.id).await.unwrap().unwrap();
            if changes {
                found.data.insert("scoped".to_owned(), json!(crate::common::serial()));
            }
            found.expiry_date = in_the_future();
            store.save(&found).await.unwrap();
            assert_eq!(store.load(&record.id).await.unwrap().unwrap().expiry_date, end);
        })
        .await;
        record = store.load(&record.id).await.unwrap().unwrap();
    }
    // An earlier expiry is kept.
    record.expiry_date = OffsetDateTime::now_utc() + time::Duration::minutes(2);
    store.save(&record).await.unwrap();
    assert_eq!(document(&store).await.get_datetime("expires").unwrap(), &date(record.expiry_date));
}

async fn assert_not_live(store: &impl Store, record: &Record) {
    let before = document(store).await;
    assert_eq!(store.load(&record.id).await.unwrap(), None);
    assert!(!store.contains(record.id).await.unwrap());
    assert_eq!(store.all().try_collect::<Vec<_>>().await.unwrap_or_default().len(), 0);
    let mut later = record.clone();
    later.data.insert("late".to_owned(), json!(true));
    store.save(&later).await.unwrap();
    store.save(record).await.unwrap();
    assert_eq!(document(store).await, before, "nothing is stored");
    assert_eq!(store.load(&record.id).await.unwrap(), None);
}

async fn past_the_limit(store: impl Store) {
    let (record, _) = stored(&store, 61).await;
    assert_not_live(&store, &record).await;
}

async fn unknown_age(store: impl Store) {
    let (record, _) = stored(&store, 1).await;
    // A comparison in an expression holds between types: the last two are greater than each date.
    let list = Bson::Array(vec![date(ago(1)).into()]);
    let timestamp = Bson::Timestamp(Timestamp { time: 4_000_000_000, increment: 0 });
    for created in [Bson::Null, 5.into(), "now".into(), list, timestamp, Bson::MaxKey] {
        set_created(&store, created).await;
        assert_not_live(&store, &record).await;
    }
}

async fn new_session(store: impl Store) {
    let mut record = record();
    record.expiry_date = OffsetDateTime::now_utc() + time::Duration::days(1);
    let before = OffsetDateTime::now_utc();
    store.create(&mut record).await.unwrap();
    let found = store.load(&record.id).await.unwrap().unwrap();
    let lives = found.expiry_date - before;
    assert!(lives <= LIMIT + time::Duration::minutes(1) && lives >= LIMIT - time::Duration::SECOND);
}

/// What `Session::cycle_id` does.
async fn cycle(store: &impl Store, id: Id, change: impl FnOnce(&mut Record)) -> Id {
    let mut record = store.load(&id).await.unwrap().unwrap();
    change(&mut record);
    record.id = Id::default();
    record.expiry_date = in_the_future();
    store.delete(&id).await.unwrap();
    store.create(&mut record).await.unwrap();
    record.id
}

async fn cycle_id(store: impl Store) {
    let (record, created) = stored(&store, 50).await;
    let id = in_request_scope(cycle(&store, record.id, |_| ())).await;
    assert_eq!(store.load(&id).await.unwrap().unwrap().expiry_date, created + LIMIT);
    let twice = async {
        let id = cycle(&store, id, |_| ()).await;
        cycle(&store, id, |record| drop(record.data.insert("a".to_owned(), json!(1)))).await
    };
    let id = in_request_scope(twice).await;
    assert_eq!(document(&store).await.get_datetime("created").unwrap(), &date(created));
    let outside = cycle(&store, id, |_| ()).await;
    let found = store.load(&outside).await.unwrap().unwrap();
    assert!(found.expiry_date > created + LIMIT, "without a scope the age begins again");
}

#[tokio::test]
async fn a_log_in_begins_a_new_lifetime() {
    let mongo = limited(LIMIT).owner(|data| data.get("user")?.as_i64()).build().await.unwrap();
    let store = cache_of(&mongo).await;
    let (record, created) = stored(&store, 50).await;
    let log_in = |record: &mut Record| drop(record.data.insert("user".to_owned(), json!(7)));
    let id = in_request_scope(cycle(&store, record.id, log_in)).await;
    assert!(store.load(&id).await.unwrap().unwrap().expiry_date > created + LIMIT);
    set_created(&store, date(created)).await;
    let id = in_request_scope(cycle(&cache_of(&mongo).await, id, log_in)).await;
    let found = store.load(&id).await.unwrap().unwrap();
    assert_eq!(found.expiry_date, created + LIMIT, "the owner has not changed");
}

#[tokio::test]
async fn a_cached_session_is_not_served_past_the_limit() {
    let store: CachedMongoStore = cache_of(&mongo(Duration::from_millis(300)).await).await;
    let record = create(&store).await;
    assert!(store.load(&record.id).await.unwrap().is_some());
    eventually("the session ends", async || store.load(&record.id).await.unwrap().is_none()).await;
    store.save(&record).await.unwrap();
    assert_eq!(store.load(&record.id).await.unwrap(), None);
}

#[tokio::test]
async fn a_session_that_expires_at_the_limit_needs_no_touch() {
    let commands = Commands::default();
    let client = commands.client(&uri()).await;
    let mongo = MongoStore::builder().client(client).absolute_lifetime(LIMIT);
    let builder = CachedMongoStore::builder(mongo.build().await.unwrap());
    let builder = builder.max_staleness(FOREVER).touch_after(Duration::from_secs(60));
    let store = builder.build().await.unwrap();
    let mut record = record();
    record.expiry_date = OffsetDateTime::now_utc() + time::Duration::days(1);
    store.create(&mut record).await.unwrap();
    let before = commands.sent("update");
    for in_scope in [false, true, false, true] {
        let save = async {
            let mut found = store.load(&record.id).await.unwrap().unwrap();
            found.expiry_date = OffsetDateTime::now_utc() + time::Duration::days(1);
            store.save(&found).await.unwrap();
        };
        if in_scope { in_request_scope(save).await } else { save.await }
    }
    assert_eq!(commands.sent("update"), before);
}

#[tokio::test]
async fn a_limit_below_a_millisecond_is_refused() {
    let error = limited(Duration::from_micros(999)).build().await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Config);
    assert!(error.to_string().contains("`absolute_lifetime` must be at least 1 ms"), "{error}");
    let forever = limited(Duration::MAX).build().await.unwrap();
    let record = create(&forever).await;
    assert!(forever.load(&record.id).await.unwrap().is_some());
}
