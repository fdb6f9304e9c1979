//! Documents that released code wrote. Every later release reads them to the same data.
//!
//! Each file of `frozen/` has a document as extended JSON, the id of its session, and the data that
//! was saved. The files never change. A new form of the stored document gets its own files: add it
//! to [`the_documents_of_today`], and run `cargo test --test it -- --ignored writes_the_frozen`.

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bson::{Bson, Document, doc};
use futures::TryStreamExt;
use serde_json::{Value, json};
use time::OffsetDateTime;
use tower_sessions::SessionStore;
use tower_sessions::session::{Id, Record};
use tower_sessions_moka_mongodb_store::MongoStore;

use crate::common::{cache_of, uri};

/// The number of documents in today's form, so that a lost file is noticed.
const FROZEN: usize = 14;

fn folder() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("it/frozen")
}

fn the_documents_of_today() -> Vec<(&'static str, Value)> {
    let deep =
        (0..97).fold(
            json!(1),
            |inner, level| {
                if level % 2 == 0 { json!([inner]) } else { json!({ "k": inner }) }
            },
        );
    vec![
        ("empty", json!({})),
        (
            "plain",
            json!({ "views": 3, "user": { "name": "Zoë", "admin": false, "groups": ["a", "b"] } }),
        ),
        (
            "keys",
            json!({
                "": 1, "a.b": 2, ".": 3, "$set": 4, "$": 5, "a$b": 6, "100%": 7, "%2E": 8, "%": 9,
                "nul\u{0}": 10, "_id": 11, "ключ": 12, "\u{1F980}": 13, "$oid": "0123", " ": 14,
                "inner": { "": { "$numberLong": "5", "a.b": [{ "$date": 1, "x\u{0}y": null }] } },
            }),
        ),
        (
            "numbers",
            json!({
                "i32": [i32::MIN, -1, 0, 1, i32::MAX],
                "i64": [i64::MIN, i64::from(i32::MIN) - 1, i64::from(i32::MAX) + 1, i64::MAX],
                "u64": [9_223_372_036_854_775_808_u64, 9_999_999_999_999_999_999_u64, u64::MAX],
                "f64": [0.0, -0.0, 1.0, 0.1, 5e-324, f64::MIN_POSITIVE, f64::MAX, f64::MIN, 1e16, 9_007_199_254_740_993.0],
            }),
        ),
        (
            "texts",
            json!({
                "empty": "", "nul": "a\u{0}b", "quotes": "\"\\/\u{8}\u{c}\n\r\t\u{1f}\u{7f}",
                "beyond": "é漢\u{1F980}\u{10FFFF}\u{FFFD}\u{2028}", "long": "x".repeat(300),
                "like": ["2024-01-01T00:00:00Z", "{\"a\":1}", "%24", "null", "1"],
            }),
        ),
        (
            "values",
            json!({ "null": null, "yes": true, "no": false, "list": [[], {}, [null, [1, "a", {}]]] }),
        ),
        ("deep", json!({ "deep": deep })),
    ]
}

/// Compares as text, so that 0.0 and -0.0 differ.
fn text(data: &HashMap<String, Value>) -> String {
    serde_json::to_string(&data.iter().collect::<BTreeMap<_, _>>()).unwrap()
}

#[tokio::test]
async fn every_release_reads_the_frozen_documents() {
    let mongo = MongoStore::connect(uri()).await.unwrap();
    let cached = cache_of(&mongo).await;
    let documents = mongo.collection().clone_with_type::<Document>();
    let mut files = 0;
    for file in std::fs::read_dir(folder()).unwrap() {
        let path = file.unwrap().path();
        let frozen: Value = serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
        let document: Document = serde_json::from_value(frozen["document"].clone()).unwrap();
        let again = serde_json::from_value(extended(document.clone().into())).unwrap();
        assert_eq!(document, again, "what is frozen next can be read");
        documents.insert_one(&document).await.unwrap();
        let id: Id = frozen["id"].as_str().unwrap().parse().unwrap();
        let expected: HashMap<String, Value> =
            serde_json::from_str(frozen["data"].as_str().unwrap()).unwrap();
        let expires = OffsetDateTime::from_unix_timestamp(frozen["expires"].as_i64().unwrap());
        for found in [mongo.load(&id).await, cached.load(&id).await, cached.load(&id).await] {
            let found = found.unwrap().unwrap();
            assert_eq!(text(&found.data), text(&expected), "{path:?}");
            assert_eq!(found.expiry_date, expires.unwrap(), "{path:?}");
        }
        let typed = mongo.collection();
        let by_hand = typed.find_one(doc! { "_id": document.get("_id") }).await.unwrap().unwrap();
        assert_eq!(text(&by_hand.data().unwrap()), text(&expected), "{path:?}");
        let mut listed: Vec<_> = mongo.all().try_collect().await.unwrap();
        let listed = listed.pop().unwrap();
        assert_eq!(text(&listed.data), text(&expected), "{path:?}");
        // A document that can be read can also be written.
        let save = Record { id, data: expected, expiry_date: expires.unwrap() };
        mongo.save(&save).await.unwrap();
        let found = mongo.load(&id).await.unwrap().unwrap();
        assert_eq!(text(&found.data), text(&save.data), "{path:?}");
        mongo.delete(&id).await.unwrap();
        files += 1;
    }
    assert_eq!(files, FROZEN);
}

/// Extended JSON that keeps the types of numbers. The feature `serde_json-1` of `bson` is not used:
/// with it, Cargo builds the driver again for each set of `serde_json`'s features.
fn extended(value: Bson) -> Value {
    match value {
        Bson::Int32(number) => json!({ "$numberInt": number.to_string() }),
        Bson::Int64(number) => json!({ "$numberLong": number.to_string() }),
        Bson::Double(number) => json!({ "$numberDouble": format!("{number:?}") }),
        Bson::Binary(binary) => {
            let subtype = format!("{:02x}", u8::from(binary.subtype));
            json!({ "$binary": { "base64": STANDARD.encode(binary.bytes), "subType": subtype } })
        }
        Bson::Array(items) => items.into_iter().map(extended).collect(),
        Bson::Document(document) => {
            document.into_iter().map(|(key, value)| (key, extended(value))).collect()
        }
        other => serde_json::to_value(other).unwrap(),
    }
}

#[tokio::test]
#[ignore = "writes into the source: only to freeze a new form"]
async fn writes_the_frozen_documents() {
    for (form, queryable) in [("text", false), ("native", true)] {
        let mongo = MongoStore::builder().uri(uri()).queryable(queryable).build().await.unwrap();
        let documents = mongo.collection().clone_with_type::<Document>();
        for (turn, (name, data)) in the_documents_of_today().into_iter().enumerate() {
            let path = folder().join(format!("{form}-{name}.json"));
            if path.exists() {
                continue;
            }
            let data: HashMap<String, Value> = serde_json::from_value(data).unwrap();
            // 2100, and the last second of the calendar.
            let expires = if turn % 2 == 0 { 4_102_444_800 } else { 253_402_300_799 };
            let expiry_date = OffsetDateTime::from_unix_timestamp(expires).unwrap();
            let mut record = Record { id: Id::default(), data: data.clone(), expiry_date };
            mongo.create(&mut record).await.unwrap();
            if turn > 1 {
                mongo.save(&record).await.unwrap();
            }
            let document = documents.find_one(doc! {}).await.unwrap().unwrap();
            mongo.delete(&record.id).await.unwrap();
            let frozen = json!({
                "id": record.id.to_string(),
                "data": text(&data),
                "expires": expires,
                "document": extended(Bson::Document(document)),
            });
            let frozen = serde_json::to_string_pretty(&frozen).unwrap();
            std::fs::write(path, frozen + "\n").unwrap();
        }
    }
}
