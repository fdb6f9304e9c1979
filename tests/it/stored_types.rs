//! Sessions whose stored fields have a type that no store writes: another program or an operator
//! changed them.

use mongodb::bson::oid::ObjectId;
use mongodb::bson::spec::BinarySubtype;
use mongodb::bson::{
    Binary, Bson, DateTime, Decimal128, Document, JavaScriptCodeWithScope, Regex, Timestamp, doc,
};
use serde_json::json;
use tokio::task::JoinHandle;
use tower_sessions::SessionStore;
use tower_sessions::session::Record;
use tower_sessions::session_store::{self, Error};
use tower_sessions_moka_mongodb_store::{
    CachedMongoStore, Coherence, MongoStore, SessionKey, mongodb,
};

use crate::common::{
    FOREVER, Log, Store, cache_of, create, in_the_future, mongo, on_both_tiers, uri,
};
use crate::proxy::Proxy;

/// A value of each type that the driver can send. One list contains a date in the future.
fn values() -> Vec<Bson> {
    let far = DateTime::from_millis(253_402_300_799_000);
    let binary = |subtype| Binary { subtype, bytes: vec![1; 16] };
    vec![
        Bson::Double(0.5),
        Bson::Double(f64::NAN),
        Bson::String("2999-01-01".into()),
        Bson::Document(doc! { "at": far }),
        Bson::Document(doc! { "$ne": 1 }),
        Bson::Array(Vec::new()),
        Bson::Array(vec![far.into()]),
        Bson::Array(vec![far.into(), DateTime::from_millis(0).into()]),
        binary(BinarySubtype::Generic).into(),
        binary(BinarySubtype::Uuid).into(),
        Bson::Undefined,
        ObjectId::new().into(),
        Bson::Boolean(true),
        Bson::Null,
        Bson::RegularExpression(Regex {
            pattern: "a".try_into().unwrap(),
            options: "i".try_into().unwrap(),
        }),
        Bson::JavaScriptCode("1".into()),
        Bson::Symbol("a".into()),
        Bson::JavaScriptCodeWithScope(JavaScriptCodeWithScope { code: "1".into(), scope: doc! {} }),
        Bson::Int32(i32::MAX),
        Bson::Timestamp(Timestamp { time: u32::MAX, increment: 1 }),
        Bson::Int64(i64::MAX),
        Bson::Decimal128("1".parse::<Decimal128>().unwrap()),
        Bson::MinKey,
        Bson::MaxKey,
    ]
}

/// Each value, and `None` for a missing field.
fn values_and_none() -> Vec<Option<Bson>> {
    values().into_iter().map(Some).chain([None]).collect()
}

fn id(record: &Record) -> Document {
    let bytes = SessionKey::from(record.id).as_bytes().to_vec();
    doc! { "_id": Binary { subtype: BinarySubtype::Generic, bytes } }
}

async fn stored(store: &impl Store, record: &Record) -> Document {
    let documents = store.collection().clone_with_type::<Document>();
    documents.find_one(id(record)).await.unwrap().unwrap()
}

/// Changes a stored field.
async fn change(store: &impl Store, record: &Record, field: &str, value: Option<&Bson>) {
    let mut document = stored(store, record).await;
    match value {
        Some(value) => drop(document.insert(field, value.clone())),
        None => drop(document.remove(field)),
    }
    let documents = store.collection().clone_with_type::<Document>();
    assert_eq!(documents.replace_one(id(record), document).await.unwrap().matched_count, 1);
}

fn with_new_data(record: &Record) -> Record {
    let mut record = record.clone();
    record.data.insert("saved".to_owned(), json!(true));
    record
}

fn is_of_the_expiry(outcome: &session_store::Result<()>) -> bool {
    matches!(outcome, Err(Error::Decode(said)) if said.contains("`expires`"))
}

/// A store that sends one command at a time, so that saves that wait are sent as one batch.
async fn one_at_a_time(proxy: &Proxy) -> MongoStore {
    let builder = MongoStore::builder().uri(proxy.uri()).max_commands_in_flight(1);
    builder.create_indexes(false).build().await.unwrap()
}

fn save(
    store: &(impl SessionStore + Clone),
    record: Record,
) -> JoinHandle<session_store::Result<()>> {
    let store = store.clone();
    tokio::spawn(async move { store.save(&record).await })
}

/// Saves all of these by one command.
async fn save_together(
    proxy: &Proxy,
    store: &(impl SessionStore + Clone),
    records: Vec<Record>,
) -> Vec<session_store::Result<()>> {
    let busy = create(store).await;
    let mut first = proxy.hold("update");
    let keeps_busy = save(store, with_new_data(&busy));
    first.reached().await;
    let mut batch = proxy.hold("update");
    let wanted = records.len();
    let saves: Vec<_> = records.into_iter().map(|record| save(store, record)).collect();
    assert_eq!(batch.reached().await, wanted, "they are sent as one batch");
    batch.deliver();
    first.deliver();
    keeps_busy.await.unwrap().unwrap();
    let mut outcomes = Vec::new();
    for save in saves {
        outcomes.push(save.await.unwrap());
    }
    outcomes
}

on_both_tiers! {
    a_save_over_data_or_a_rev_of_any_type_is_stored = saves_over_data_and_rev;
}

/// A store without an index on `expires`: the test server does not keep every type in an index.
async fn unindexed(uri: &str) -> MongoStore {
    MongoStore::builder().uri(uri).create_indexes(false).build().await.unwrap()
}

#[tokio::test]
async fn save_over_an_expiry_that_is_no_date_fails_like_a_load() {
    let uri = uri();
    let store = unindexed(&uri).await;
    saves_over_an_expiry(&uri, store.clone()).await;
    saves_over_an_expiry(&uri, cache_of(&store).await).await;
}

async fn saves_over_an_expiry(uri: &str, store: impl Store) {
    // Another instance, which does not use this cache.
    let other = unindexed(uri).await;
    for value in values_and_none() {
        let record = create(&store).await;
        change(&store, &record, "expires", value.as_ref()).await;
        let before = stored(&store, &record).await;
        let load = other.load(&record.id).await;
        let Err(Error::Decode(said_by_load)) = load else { panic!("{value:?}: {load:?}") };
        for result in
            [other.save(&with_new_data(&record)).await, store.save(&with_new_data(&record)).await]
        {
            let Err(Error::Decode(said)) = result else { panic!("{value:?}: {result:?}") };
            assert_eq!(said, said_by_load, "{value:?}");
        }
        assert_eq!(stored(&store, &record).await.get("rev"), before.get("rev"), "{value:?}");
        assert!(!other.contains(record.id).await.unwrap(), "{value:?}");
        store.delete(&record.id).await.unwrap();
        store.save(&record).await.unwrap();
        assert_eq!(store.documents().await, 0, "{value:?}: a save of no session stores nothing");
    }
}

async fn saves_over_data_and_rev(store: impl Store) {
    for field in ["data", "rev"] {
        for value in values_and_none() {
            let record = create(&store).await;
            change(&store, &record, field, value.as_ref()).await;
            let changed = with_new_data(&record);
            store.save(&changed).await.unwrap();
            for loaded in
                [store.load(&record.id).await, store.another().await.load(&record.id).await]
            {
                assert_eq!(loaded.unwrap().unwrap().data, changed.data, "{field}: {value:?}");
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn batched_save_over_an_expiry_that_is_no_date_fails_alone() {
    let proxy = Proxy::start().await;
    let mongo = one_at_a_time(&proxy).await;
    let good = create(&mongo).await;
    let gone = create(&mongo).await;
    mongo.delete(&gone.id).await.unwrap();
    let mut records = vec![with_new_data(&good), gone];
    for value in values_and_none() {
        let record = create(&mongo).await;
        change(&mongo, &record, "expires", value.as_ref()).await;
        records.push(with_new_data(&record));
    }
    let outcomes = save_together(&proxy, &mongo, records.clone()).await;
    for ((outcome, record), value) in outcomes.iter().zip(&records).skip(2).zip(values_and_none()) {
        assert!(is_of_the_expiry(outcome), "{value:?}: {outcome:?}");
        let before = stored(&mongo, record).await;
        assert!(!before.get("data").unwrap().to_string().contains("saved"), "{value:?}");
    }
    assert!(outcomes[0].is_ok() && outcomes[1].is_ok(), "{outcomes:?}");
    assert_eq!(mongo.load(&good.id).await.unwrap().unwrap().data, records[0].data);
}

#[tokio::test(flavor = "multi_thread")]
async fn batched_save_over_data_or_a_rev_of_any_type_is_stored() {
    for field in ["data", "rev"] {
        let proxy = Proxy::start().await;
        let mongo = one_at_a_time(&proxy).await;
        let mut records = Vec::new();
        for value in values_and_none() {
            let record = create(&mongo).await;
            change(&mongo, &record, field, value.as_ref()).await;
            records.push(with_new_data(&record));
        }
        // It had expired, so the reply does not say which of the sessions were saved.
        let expired = create(&mongo).await;
        change(&mongo, &expired, "expires", Some(&DateTime::from_millis(0).into())).await;
        records.push(expired);
        for outcome in save_together(&proxy, &mongo, records.clone()).await {
            outcome.unwrap();
        }
        records.pop();
        for record in records {
            let loaded = mongo.load(&record.id).await.unwrap().unwrap();
            assert_eq!(loaded.data, record.data, "{field}");
        }
    }
}

/// A save of the same data is a touch. Without a change stream, the store does not learn of the
/// changed expiry.
#[tokio::test(flavor = "multi_thread")]
async fn touch_of_an_expiry_that_is_no_date_fails_and_leaves_no_entry() {
    for together in [false, true] {
        for value in values_and_none() {
            let proxy = Proxy::start().await;
            let mongo = one_at_a_time(&proxy).await;
            let builder = CachedMongoStore::builder(mongo).max_staleness(FOREVER);
            let store = builder.coherence(Coherence::SoleWriter).build().await.unwrap();
            let mut record = create(&store).await;
            let also = with_new_data(&create(&store).await);
            change(&store, &record, "expires", value.as_ref()).await;
            record.expiry_date = in_the_future() + time::Duration::hours(2);
            assert!(store.load(&record.id).await.unwrap().is_some(), "it is cached");
            let outcome = if together {
                let mut outcomes = save_together(&proxy, &store, vec![record.clone(), also]).await;
                outcomes.pop().unwrap().unwrap();
                outcomes.pop().unwrap()
            } else {
                store.save(&record).await
            };
            assert!(is_of_the_expiry(&outcome), "{value:?}, {together}: {outcome:?}");
            let loaded = store.load(&record.id).await;
            assert!(matches!(loaded, Err(Error::Decode(_))), "{value:?}, {together}: {loaded:?}");
        }
    }
}

/// A session with a `rev` of any type belongs to its owner, so a sign-out must delete it too.
#[tokio::test]
async fn assign_owners_accepts_a_rev_of_any_type() {
    let log = Log::default();
    let _logs = tracing::subscriber::set_default(log.subscriber());
    let plain = mongo().await;
    let mut records = Vec::new();
    for value in values_and_none() {
        let record = create(&plain).await;
        change(&plain, &record, "rev", value.as_ref()).await;
        // The test server in Python stores a symbol as a string, and undefined as null.
        let kept = stored(&plain, &record).await.get("rev").cloned();
        records.push((record, kept));
    }
    let is_deprecated =
        |value: &Option<Bson>| matches!(value, Some(Bson::Undefined | Bson::Symbol(_)));
    let deprecated = records.iter().filter(|(_, value)| is_deprecated(value)).count() as u64;
    let client = plain.collection().client().clone();
    let namespace = plain.collection().namespace();
    let store =
        MongoStore::builder().client(client).database(namespace.db).owner(|_| Some("ferris"));
    let store = store.build().await.unwrap();
    let assigned = store.assign_owners().await.unwrap();
    let mut left = 0;
    for (record, value) in &records {
        let document = stored(&plain, record).await;
        if document.get_str("owner").is_ok_and(|owner| owner == "ferris") {
            assert!(document.get_binary_generic("rev").is_ok(), "{value:?}");
        } else {
            // Deprecated types, with which not every server compares.
            assert!(is_deprecated(value), "{value:?}");
            assert_eq!(document.get("rev"), value.as_ref());
            left += 1;
        }
    }
    assert_eq!(left, deprecated);
    let is_counted = log.take().contains(&format!("left={left}"));
    assert!(is_counted || left == 0, "the warning has their number");
    assert_eq!(assigned, records.len() as u64 - left);
    assert_eq!(store.assign_owners().await.unwrap(), 0);
    assert_eq!(store.delete_by_owner("ferris").await.unwrap(), assigned);
}

/// Each `rev` is compared as it was read. A session whose `rev` has changed meanwhile is left
/// alone.
#[tokio::test(flavor = "multi_thread")]
async fn assign_owners_does_not_overwrite_a_save() {
    for value in values_and_none() {
        let proxy = Proxy::start().await;
        let plain = MongoStore::connect(proxy.direct()).await.unwrap();
        let record = create(&plain).await;
        change(&plain, &record, "rev", value.as_ref()).await;
        let owner = |data: &std::collections::HashMap<String, serde_json::Value>| {
            Some(if data.contains_key("saved") { "new" } else { "old" })
        };
        let connect = |uri: &str| MongoStore::builder().uri(uri).owner(owner).build();
        let here = connect(proxy.uri()).await.unwrap();
        let there = connect(proxy.direct()).await.unwrap();
        let mut read = proxy.hold("find");
        let assigns = tokio::spawn(async move { here.assign_owners().await });
        read.reached().await;
        there.save(&with_new_data(&record)).await.unwrap();
        read.deliver();
        assert_eq!(assigns.await.unwrap().unwrap(), 0, "{value:?}");
        assert_eq!(stored(&plain, &record).await.get_str("owner").unwrap(), "new", "{value:?}");
    }
}
