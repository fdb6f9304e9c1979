//! One suite for the contract of tower-sessions. It runs on `MemoryStore` of tower-sessions and on
//! both of our stores, for each version of tower-sessions that is supported.

use std::collections::HashMap;

use serde_json::{Value, json};
use tower_sessions_moka_mongodb_store::{CachedMongoStore, MongoStore};

type Data = HashMap<String, Value>;

/// What tower-sessions asks of every store. The first five are the tests of its own store.
macro_rules! contract {
    ($suite:ident, $tower_sessions:ident, $store:expr) => {
        mod $suite {
            use $tower_sessions::SessionStore;
            use $tower_sessions::session::{Id, Record};

            use super::{awkward, same, some_data};
            use crate::common::{in_the_future, in_the_past};

            fn record() -> Record {
                Record { id: Id::default(), data: some_data(), expiry_date: in_the_future() }
            }

            #[tokio::test]
            async fn a_session_is_created() {
                assert!($store.create(&mut record()).await.is_ok());
            }

            #[tokio::test]
            async fn saved_session_is_loaded() {
                let store = $store;
                let mut record = record();
                store.create(&mut record).await.unwrap();
                record.data.insert("more".to_owned(), true.into());
                record.data.remove("name");
                store.save(&record).await.unwrap();
                let loaded = store.load(&record.id).await.unwrap().unwrap();
                assert_eq!((loaded.id, loaded.data), (record.id, record.data));
            }

            #[tokio::test]
            async fn created_session_is_loaded() {
                let store = $store;
                let mut record = record();
                store.create(&mut record).await.unwrap();
                let loaded = store.load(&record.id).await.unwrap().unwrap();
                assert_eq!((loaded.id, &loaded.data), (record.id, &record.data));
                assert!(
                    (loaded.expiry_date - record.expiry_date).abs() < time::Duration::MILLISECOND
                );
            }

            #[tokio::test]
            async fn deleted_session_is_absent_and_can_be_deleted_again() {
                let store = $store;
                let mut record = record();
                store.create(&mut record).await.unwrap();
                store.delete(&record.id).await.unwrap();
                assert_eq!(store.load(&record.id).await.unwrap(), None);
                store.delete(&record.id).await.unwrap();
                assert_eq!(store.load(&record.id).await.unwrap(), None);
            }

            #[tokio::test]
            async fn id_collision_gives_a_new_id_and_keeps_both_sessions() {
                let store = $store;
                let mut first = record();
                let mut second = record();
                store.create(&mut first).await.unwrap();
                second.id = first.id;
                store.create(&mut second).await.unwrap();
                assert_ne!(first.id, second.id);
                for record in [first, second] {
                    assert_eq!(store.load(&record.id).await.unwrap().unwrap().data, record.data);
                }
            }

            #[tokio::test]
            async fn unknown_id_is_always_absent() {
                let store = $store;
                let id = Id::default();
                for _ in 0..3 {
                    assert_eq!(store.load(&id).await.unwrap(), None);
                }
                store.delete(&id).await.unwrap();
            }

            #[tokio::test]
            async fn expired_session_is_absent() {
                let store = $store;
                let mut late = record();
                let mut ended = record();
                late.expiry_date = in_the_past();
                store.create(&mut late).await.unwrap();
                assert_eq!(store.load(&late.id).await.unwrap(), None);
                store.create(&mut ended).await.unwrap();
                assert!(store.load(&ended.id).await.unwrap().is_some());
                ended.expiry_date = in_the_past();
                store.save(&ended).await.unwrap();
                assert_eq!(store.load(&ended.id).await.unwrap(), None);
            }

            #[tokio::test]
            async fn all_json_values_are_returned_unchanged() {
                let store = $store;
                let mut record = record();
                record.data = awkward();
                store.create(&mut record).await.unwrap();
                same(&store.load(&record.id).await.unwrap().unwrap().data, &record.data);
                record.data.insert("saved".to_owned(), true.into());
                store.save(&record).await.unwrap();
                same(&store.load(&record.id).await.unwrap().unwrap().data, &record.data);
            }
        }
    };
}

/// What our stores promise beyond the contract.
macro_rules! our_contract {
    ($suite:ident, $tower_sessions:ident, $store:expr) => {
        mod $suite {
            use tower_sessions_moka_mongodb_store::MongoStore;
            use tower_sessions_moka_mongodb_store::mongodb::bson::doc;
            use $tower_sessions::session::{Id, Record};
            use $tower_sessions::session_store::Error;
            use $tower_sessions::{ExpiredDeletion, SessionStore};

            use super::{awkward, same, some_data};
            use crate::common::{in_the_future, in_the_past, uri};

            fn record() -> Record {
                Record { id: Id::default(), data: some_data(), expiry_date: in_the_future() }
            }

            #[tokio::test]
            async fn create_never_takes_the_id_it_is_given() {
                let store = $store(uri()).await;
                let mut record = record();
                let given = record.id;
                store.create(&mut record).await.unwrap();
                assert_ne!(record.id, given);
                assert_eq!(store.load(&given).await.unwrap(), None);
                let first = record.id;
                store.delete(&first).await.unwrap();
                store.create(&mut record).await.unwrap();
                assert_ne!(record.id, first, "the id is free again, and still not used");
            }

            #[tokio::test]
            async fn a_save_of_an_unknown_id_is_ok_and_stores_nothing() {
                let store = $store(uri()).await;
                let record = record();
                store.save(&record).await.unwrap();
                assert_eq!(store.load(&record.id).await.unwrap(), None);
                assert_eq!(store.collection().count_documents(doc! {}).await.unwrap(), 0);
            }

            #[tokio::test]
            async fn expiry_is_stored_to_the_millisecond() {
                let uri = uri();
                let store = $store(uri.clone()).await;
                let plain = MongoStore::connect(uri).await.unwrap();
                for nanos in [0, 1, 999_999, 1_000_000, 123_456_789, 999_999_999] {
                    let mut record = record();
                    record.expiry_date = record.expiry_date.replace_nanosecond(nanos).unwrap();
                    let kept = record.expiry_date.replace_nanosecond(nanos / 1_000_000 * 1_000_000);
                    store.create(&mut record).await.unwrap();
                    for _ in 0..2 {
                        let loaded = store.load(&record.id).await.unwrap().unwrap();
                        assert_eq!(loaded.expiry_date, kept.unwrap());
                    }
                    let stored = SessionStore::load(&plain, &record.id).await.unwrap().unwrap();
                    assert_eq!(stored.expiry_date, kept.unwrap());
                }
            }

            #[tokio::test]
            async fn all_tiers_return_the_same_record() {
                let uri = uri();
                let writer = $store(uri.clone()).await;
                let mut record = record();
                record.data = awkward();
                writer.create(&mut record).await.unwrap();
                writer.save(&record).await.unwrap();
                let written = writer.load(&record.id).await.unwrap().unwrap();
                let reader = $store(uri.clone()).await;
                let read = reader.load(&record.id).await.unwrap().unwrap();
                let again = reader.load(&record.id).await.unwrap().unwrap();
                let plain = MongoStore::connect(uri).await.unwrap();
                let stored = SessionStore::load(&plain, &record.id).await.unwrap().unwrap();
                for other in [read, again, stored] {
                    assert_eq!((other.id, other.expiry_date), (written.id, written.expiry_date));
                    same(&other.data, &written.data);
                }
            }

            #[tokio::test]
            async fn delete_expired_removes_only_expired_sessions() {
                let store = $store(uri()).await;
                let mut live = record();
                let mut ended = record();
                store.create(&mut live).await.unwrap();
                ended.expiry_date = in_the_past();
                store.create(&mut ended).await.unwrap();
                store.delete_expired().await.unwrap();
                assert_eq!(store.collection().count_documents(doc! {}).await.unwrap(), 1);
                assert!(store.load(&live.id).await.unwrap().is_some());
            }

            #[tokio::test]
            async fn session_that_cannot_be_stored_is_an_encode_error() {
                let store = $store(uri()).await;
                let mut record = record();
                record.data.insert("large".to_owned(), "x".repeat(17 << 20).into());
                let error = store.create(&mut record).await.unwrap_err();
                assert!(matches!(error, Error::Encode(_)), "{error:?}");
            }

            #[tokio::test]
            async fn unreadable_session_is_a_decode_error_and_an_outage_a_backend_error() {
                let store = $store(uri()).await;
                let mut record = record();
                store.create(&mut record).await.unwrap();
                let newer = doc! { "$set": { "format": 2 } };
                store.collection().update_many(doc! {}, newer).await.unwrap();
                let cold = store.collection().namespace();
                let client = store.collection().client().clone();
                let other = MongoStore::builder().client(client).database(&cold.db);
                let other = other.collection(&cold.coll).build().await.unwrap();
                let error = SessionStore::load(&other, &record.id).await.unwrap_err();
                assert!(matches!(error, Error::Decode(_)), "{error:?}");
                other.shutdown().await;
                let error = SessionStore::load(&other, &record.id).await.unwrap_err();
                assert!(matches!(error, Error::Backend(_)), "{error:?}");
            }
        }
    };
}

mod generation_015 {
    use super::{awkward, connect_cached, connect_uncached, same, some_data};

    contract!(memory, tower_sessions, tower_sessions::MemoryStore::default());
    contract!(uncached, tower_sessions, crate::common::mongo().await);
    contract!(cached, tower_sessions, crate::common::cached().await);
    contract!(queryable, tower_sessions, crate::contract::queryable().await);
    our_contract!(our_uncached, tower_sessions, super::connect_uncached);
    our_contract!(our_cached, tower_sessions, super::connect_cached);
}

#[cfg(feature = "tower-sessions-014")]
mod generation_014 {
    use super::{awkward, connect_cached, connect_uncached, same, some_data};

    contract!(uncached, tower_sessions_014, crate::common::mongo().await);
    contract!(cached, tower_sessions_014, crate::common::cached().await);
    our_contract!(our_uncached, tower_sessions_014, super::connect_uncached);
    our_contract!(our_cached, tower_sessions_014, super::connect_cached);
}

async fn queryable() -> MongoStore {
    let builder = MongoStore::builder().uri(crate::common::uri()).queryable(true);
    builder.build().await.unwrap()
}

async fn connect_uncached(uri: String) -> MongoStore {
    MongoStore::connect(uri).await.unwrap()
}

async fn connect_cached(uri: String) -> CachedMongoStore {
    CachedMongoStore::connect(uri).await.unwrap()
}

fn some_data() -> Data {
    HashMap::from([("name".to_owned(), json!({ "serial": crate::common::serial() }))])
}

/// Asserts that both are equal, also where `==` on numbers sees no difference.
fn same(a: &Data, b: &Data) {
    assert_eq!(a, b);
    for (key, value) in a {
        assert_eq!(value.to_string(), b[key].to_string(), "{key:?}");
    }
}

fn awkward() -> Data {
    let mut deep = json!("the bottom");
    for level in 0..45 {
        deep = json!([{ format!("level.{level}"): deep }]);
    }
    let keys =
        ["", ".", "a.b", "$", "$set", "a$b", "%", "%2E", "%25", "\0", "a\0b", "_id", "ключ", "🔑"];
    let mut data: Data = keys.iter().map(|key| ((*key).to_owned(), json!({ *key: key }))).collect();
    for (key, value) in [
        ("numbers", json!([u64::MAX, i64::MIN, i64::MAX, u64::MAX - 1, 0, -1, 1, 1.0, -0.0, 0.0])),
        (
            "floats",
            json!([
                f64::MAX,
                f64::MIN_POSITIVE,
                f64::EPSILON,
                1e300,
                0.1,
                1e16,
                9_007_199_254_740_993_i64
            ]),
        ),
        ("nothing", json!([null, "", [], {}, false, [[]], [{}]])),
        ("like extended JSON", json!({ "$oid": "0123456789abcdef01234567", "$numberLong": "1" })),
        ("like a date", json!({ "$date": { "$numberLong": "0" } })),
        ("texts", json!(["\0", "a\0b", "\u{feff}", "ß\r\n\t\u{7f}", "\u{10ffff}", "\\\"'"])),
        ("deep", deep),
    ] {
        data.insert(key.to_owned(), value);
    }
    data
}
