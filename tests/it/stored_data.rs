//! The data of a session is stored and comes back unchanged, on every instance and in every form. A
//! session that cannot be read affects no other session.

use std::collections::{BTreeMap, HashMap};

use futures::StreamExt;
use mongodb::bson::{Binary, Bson, Document, doc, spec::BinarySubtype};
use serde_json::{Number, Value, json};
use tower_sessions::session::{Id, Record};
use tower_sessions::{MemoryStore, SessionStore};
use tower_sessions_moka_mongodb_store::{
    CachedMongoStore, ErrorKind, MongoStore, MongoStoreBuilder, SessionKey, mongodb,
};
#[cfg(feature = "encryption")]
use tower_sessions_moka_mongodb_store::{Key, Keys};

use crate::common::{FOREVER, in_the_future, uri};

type Data = HashMap<String, Value>;

/// Data that `serde_json`'s own `Value` misreads, with one of its features or another.
fn hostile() -> Vec<Data> {
    let number = |text: &str| Value::Number(text.parse::<Number>().unwrap());
    let raw = "$serde_json::private::RawValue";
    let private_number = "$serde_json::private::Number";
    let values = [
        json!({ "title": "t", raw: "[1]" }),
        json!({ raw: "[1]", "title": "t" }),
        json!({ "draft": { raw: "{\"a\": 1", "x": null } }),
        json!({ "draft": { raw: "[1]" } }),
        json!({ "draft": { raw: 7 } }),
        json!({ "cart": [{ private_number: "1" }] }),
        json!({ private_number: "not a number" }),
        json!({
            "price": number("1.10"), "big": number("1e5"), "long": number("100000000000000000000"),
            "tiny": number("5e-324"), "zero": number("-0.0"), "odd": number("1.5e-3"), "most": u64::MAX,
            "digits": number("12345678901234567890123456789012345678901234567890"),
        }),
        json!({ "deep": (1..98).fold(json!({}), |inner, _| json!([inner])) }),
        json!({ "bomb": bomb(20) }),
    ];
    values.into_iter().map(|value| serde_json::Map::into_iter(object(value)).collect()).collect()
}

fn object(value: Value) -> serde_json::Map<String, Value> {
    match value {
        Value::Object(map) => map,
        other => panic!("{other} is no object"),
    }
}

/// Objects in arrays, each with the next one as a text that `serde_json` may take for a value of
/// its own.
fn bomb(levels: usize) -> Value {
    let mut value = json!(1);
    for _ in 0..levels {
        let text = value.to_string().replace("\\\\", "\\u005c");
        let object = json!({ "$serde_json::private::RawValue": text });
        value = (0..90).fold(object, |inner, _| json!([inner]));
    }
    value
}

/// As text, so that `0.0` and `-0.0` differ.
fn text(data: &Data) -> String {
    serde_json::to_string(&data.iter().collect::<BTreeMap<_, _>>()).unwrap()
}

/// A store for each form of the data.
fn forms(uri: &str) -> Vec<MongoStoreBuilder> {
    let builder = || MongoStore::builder().uri(uri).owner(|data| data.get("title").map(|_| 7));
    vec![
        builder(),
        builder().queryable(true),
        #[cfg(feature = "encryption")]
        builder().encryption(Keys::new(1, Key::from_bytes(&[1; 32]))),
    ]
}

#[tokio::test(flavor = "multi_thread")]
async fn data_that_serde_json_misreads_is_returned_unchanged() {
    for form in 0..forms("").len() {
        for compact in [false, true] {
            let uri = uri();
            let mongo = || async { forms(&uri).remove(form).build().await.unwrap() };
            let cached = async |mongo| {
                let store =
                    CachedMongoStore::builder(mongo).max_staleness(FOREVER).compact(compact);
                store.build().await.unwrap()
            };
            let here = cached(mongo().await).await;
            let memory = MemoryStore::default();
            let mut records = Vec::new();
            for data in hostile() {
                let mut record =
                    Record { id: Id::default(), data: Data::new(), expiry_date: in_the_future() };
                here.create(&mut record).await.unwrap();
                record.data = data;
                here.save(&record).await.unwrap();
                memory.save(&record).await.unwrap();
                records.push(record);
            }
            let elsewhere = cached(mongo().await).await;
            assert_eq!(elsewhere.warm(100).await.unwrap().sessions, records.len() as u64);
            let cold = mongo().await;
            for record in &records {
                let expected = memory.load(&record.id).await.unwrap().unwrap().data;
                for found in [
                    here.load(&record.id).await,
                    elsewhere.load(&record.id).await,
                    cold.load(&record.id).await,
                ] {
                    assert_eq!(text(&found.unwrap().unwrap().data), text(&expected));
                }
            }
            let mut listed: Vec<_> =
                cold.all().map(|session| text(&session.unwrap().data)).collect().await;
            let mut expected: Vec<_> = records.iter().map(|record| text(&record.data)).collect();
            listed.sort();
            expected.sort();
            assert_eq!(listed, expected);
            assert_eq!(cold.assign_owners().await.unwrap(), 0, "each save has stored its owner");
        }
    }
}

/// Values that are not readable data, by whatever means they were stored.
fn unreadable() -> Vec<Bson> {
    let brackets =
        |levels: usize| format!("{{\"a\":{}{}}}", "[".repeat(levels), "]".repeat(levels));
    let binary = |bytes: &[u8]| Binary { subtype: BinarySubtype::Generic, bytes: bytes.to_vec() };
    vec![
        brackets(99).into(),
        brackets(100_000).into(),
        "{\"a\":[".repeat(100_000).into(),
        "{".into(),
        "null".into(),
        "{\"a\":1e999}{".into(),
        doc! { "a": { "%": 1 } }.into(),
        doc! { "a": f64::NAN }.into(),
        binary(b"").into(),
        binary(&[1; 60]).into(),
        binary(&[0xff; 60]).into(),
        Bson::Null,
        Bson::Int32(7),
        vec![Bson::Int32(7)].into(),
    ]
}

#[tokio::test(flavor = "multi_thread")]
async fn unreadable_session_affects_no_other_session() {
    for form in 0..forms("").len() {
        let uri = uri();
        let mongo = forms(&uri).remove(form).build().await.unwrap();
        let mut records = Vec::new();
        for _ in 0..unreadable().len() + 3 {
            let data = Data::from([("title".to_owned(), json!("t"))]);
            let mut record = Record { id: Id::default(), data, expiry_date: in_the_future() };
            mongo.create(&mut record).await.unwrap();
            records.push(record);
        }
        let (bad, good) = records.split_at(unreadable().len());
        let documents = mongo.collection().clone_with_type::<Document>();
        for (record, data) in bad.iter().zip(unreadable()) {
            let bytes = SessionKey::from(record.id).as_bytes().to_vec();
            let id = doc! { "_id": Binary { subtype: BinarySubtype::Generic, bytes } };
            let change =
                vec![doc! { "$set": { "data": { "$literal": data } } }, doc! { "$unset": "owner" }];
            assert_eq!(documents.update_one(id, change).await.unwrap().modified_count, 1);
        }

        let store =
            CachedMongoStore::builder(mongo.clone()).max_staleness(FOREVER).build().await.unwrap();
        assert_eq!(store.warm(100).await.unwrap().sessions, 3);
        let listed: Vec<_> = store.all().collect().await;
        let errors: Vec<_> = listed.iter().filter_map(|session| session.as_ref().err()).collect();
        assert_eq!((listed.len(), errors.len()), (records.len(), bad.len()));
        assert!(errors.iter().all(|error| error.kind() == ErrorKind::Decode), "{errors:?}");
        assert_eq!(mongo.assign_owners().await.unwrap(), 0, "each readable session has its owner");
        // Load them at the same time, so that they are sent as one command.
        let loads =
            futures::future::join_all(records.iter().map(|record| mongo.load(&record.id))).await;
        for (nth, load) in loads.into_iter().enumerate() {
            assert_eq!(load.is_err(), nth < bad.len(), "{nth}: {load:?}");
        }
        for record in good {
            assert!(store.load(&record.id).await.unwrap().is_some());
        }
        // They can be overwritten and deleted.
        for record in bad {
            store.save(record).await.unwrap();
            assert_eq!(mongo.load(&record.id).await.unwrap().unwrap().data, record.data);
        }
        assert_eq!(store.delete_by_owner(7).await.unwrap(), records.len() as u64);
    }
}
