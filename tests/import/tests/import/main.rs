//! The import of the documents that the published tower-sessions-mongodb-store 0.11 writes.
#![allow(clippy::expect_used, clippy::unwrap_used, reason = "a test ends where it fails")]

mod overlapping;

use std::collections::HashMap;

use futures::{StreamExt, stream};
use mongodb::Collection;
use mongodb::bson::{Binary, Bson, DateTime, Document, doc, spec::BinarySubtype};
use session_test_server::fresh_database;
use session_test_support::proxy;
use time::{Duration, OffsetDateTime};
use tower_sessions_core::SessionStore;
use tower_sessions_core::session::Id;
use tower_sessions_core_011::SessionStore as _;
use tower_sessions_core_011::session as old;
use tower_sessions_moka_mongodb_store::import::{Progress, tower_sessions_mongodb_store};
use tower_sessions_moka_mongodb_store::{ErrorKind, MongoStore};
use tower_sessions_mongodb_store::MongoDBStore;

const MANY: u32 = 10_000;

/// The published store on a database of the shared server. Its collection is called `sessions`.
async fn published(uri: &str, database: &str) -> MongoDBStore {
    use tower_sessions_mongodb_store::mongodb::Client;

    MongoDBStore::new(Client::with_uri_str(uri).await.unwrap(), database.to_owned())
}

fn data(serial: u32) -> HashMap<String, serde_json::Value> {
    let data = serde_json::json!({
        "serial": serial,
        "largest": u64::MAX - u64::from(serial),
        "least": i64::MIN + i64::from(serial),
        "share": f64::from(serial) / 3.0,
        "zero": -0.0,
        "user": { "näme": "Zoë \u{0}", "tags": [null, true, [], {}, ["$x", { "a.b": "%" }]] },
    });
    serde_json::from_value(data).unwrap()
}

fn record(serial: u32) -> old::Record {
    let expiry_date = OffsetDateTime::now_utc() + Duration::minutes(60);
    old::Record { id: old::Id::default(), data: data(serial), expiry_date }
}

async fn write(store: &MongoDBStore, serials: impl Iterator<Item = u32>) -> Vec<old::Record> {
    let records: Vec<_> = serials.map(record).collect();
    stream::iter(&records)
        .for_each_concurrent(32, |record| async move { store.save(record).await.unwrap() })
        .await;
    records
}

/// What a store returns under the id of a record.
async fn loaded(store: &MongoStore, record: &old::Record) -> Option<(u32, bool)> {
    let found = SessionStore::load(store, &Id(record.id.0)).await.unwrap()?;
    assert_eq!(found.id.0, record.id.0);
    assert_eq!(found.id.to_string(), record.id.to_string(), "the cookie stays as it is");
    let early = record.expiry_date - found.expiry_date;
    assert!(!early.is_negative() && early < Duration::MILLISECOND, "{early}");
    Some((serde_json::from_value(found.data["serial"].clone()).unwrap(), found.data == record.data))
}

async fn documents(collection: &Collection<Document>) -> u64 {
    collection.count_documents(doc! {}).await.unwrap()
}

fn name(uri: &str) -> String {
    uri.rsplit('/').next().unwrap().split('?').next().unwrap().to_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn interrupted_import_takes_each_of_ten_thousand_sessions_once() {
    let proxy = proxy::Proxy::start().await;
    let published = published(proxy.direct(), &name(proxy.direct())).await;
    let records = write(&published, 0..MANY).await;
    // Through the proxy. Both stores use one collection, which is the default of both.
    let mongo = MongoStore::connect(proxy.uri()).await.unwrap();
    let from = mongo.collection().clone_with_type::<Document>();
    assert_eq!(documents(&from).await, u64::from(MANY));
    let import = || tower_sessions_mongodb_store(&from).into_store(&mongo);

    let mut ended = Vec::new();
    // At each step of a page, the server carries out the command, and the import receives an error.
    for (command, earlier) in [("insert", 0), ("update", 0), ("update", 1), ("delete", 0)] {
        let holds: Vec<_> = (0..=earlier).map(|_| proxy.hold(command)).collect();
        let run = tokio::spawn(import().run());
        for (nth, mut held) in holds.into_iter().enumerate() {
            held.reached().await;
            // 11601, Interrupted: neither the driver nor the import retries it.
            if nth == earlier { held.refuse(11601) } else { held.deliver() }
        }
        assert_eq!(run.await.unwrap().unwrap_err().kind(), ErrorKind::Server);
        // One of the live sessions is deleted before the import continues.
        for record in &records {
            let id = Id(record.id.0);
            let live = mongo.contains(id).await.unwrap();
            if live {
                SessionStore::delete(&mongo, &id).await.unwrap();
                ended.push(record.id);
                break;
            }
        }
    }
    assert_eq!(ended.len(), 2, "after the third and the fourth step there are live ones");

    // The caller drops the import after its third page.
    let (report, mut progress) = tokio::sync::mpsc::unbounded_channel();
    let mut pages = 0;
    let dropped = import().on_progress(move |progress| {
        pages += 1;
        if pages == 3 {
            report.send(progress.imported).unwrap();
        }
    });
    tokio::select! {
        _ = dropped.run() => panic!("there are more than three pages"),
        imported = progress.recv() => assert!(imported.unwrap() >= 1_000),
    }

    let rest = import().run().await.unwrap();
    assert!(rest.imported > 0 && rest.unreadable == 0 && rest.expired == 0, "{rest:?}");
    // The dropped import ends with its page, maybe after this one.
    let mut again = import().run().await.unwrap();
    while again.read > 0 {
        again = import().run().await.unwrap();
    }
    assert_eq!(again, Progress::default());
    assert_eq!(documents(&from).await, u64::from(MANY) - 2, "each once, and nothing else");
    assert_eq!(mongo.length().await.unwrap(), u64::from(MANY) - 2);
    let right = stream::iter(records.iter().enumerate())
        .map(|(serial, record)| {
            let mongo = &mongo;
            let ended = &ended;
            async move {
                let found = loaded(mongo, record).await;
                if ended.contains(&record.id) {
                    found.is_none()
                } else {
                    found == Some((u32::try_from(serial).unwrap(), true))
                }
            }
        })
        .buffer_unordered(64);
    assert!(right.all(|right| async move { right }).await);
}

/// The published store, its collection, and our store beside it in another collection.
async fn side_by_side() -> (MongoDBStore, Collection<Document>, MongoStore) {
    let server = session_test_server::shared_fast().expect("a server to test on");
    let database = fresh_database();
    let uri = server.uri_for(&database);
    let mongo = MongoStore::builder().uri(uri.clone()).collection("ours").build().await.unwrap();
    let database = mongo.collection().client().database(&database);
    (published(&uri, database.name()).await, database.collection("sessions"), mongo)
}

#[tokio::test]
async fn kept_source_is_imported_once() {
    let (published, old, mongo) = side_by_side().await;
    let records = write(&published, 0..700).await;
    let import = || tower_sessions_mongodb_store(&old).into_store(&mongo).keep_source();
    let (report, progress) = std::sync::mpsc::channel();
    let first = import().on_progress(move |it| report.send(it.read).unwrap()).run().await.unwrap();
    assert_eq!((first.read, first.imported), (700, 700));
    assert_eq!(progress.iter().collect::<Vec<_>>(), [500, 700], "by pages");
    assert_eq!(documents(&old).await, 700);

    // One session continues here, another one is deleted here, and the old app writes both once
    // more.
    let mut newer = SessionStore::load(&mongo, &Id(records[0].id.0)).await.unwrap().unwrap();
    newer.data.insert("serial".to_owned(), 99_999.into());
    SessionStore::save(&mongo, &newer).await.unwrap();
    SessionStore::delete(&mongo, &Id(records[1].id.0)).await.unwrap();
    for record in &records[..2] {
        published.save(record).await.unwrap();
    }
    let again = import().run().await.unwrap();
    assert_eq!((again.read, again.imported, again.already_there), (700, 0, 700));
    assert_eq!(loaded(&mongo, &records[0]).await, Some((99_999, false)));
    assert_eq!(loaded(&mongo, &records[1]).await, None, "ended is ended");
    assert_eq!(loaded(&mongo, &records[699]).await, Some((699, true)));
    // They do not come back either when the import removes the source.
    let last = tower_sessions_mongodb_store(&old).into_store(&mongo).run().await.unwrap();
    assert_eq!((last.imported, documents(&old).await), (0, 0));
    assert_eq!(mongo.length().await.unwrap(), 699);
}

#[tokio::test]
async fn import_does_not_overwrite_an_existing_session() {
    let (published, old, mongo) = side_by_side().await;
    let record = &write(&published, 0..1).await[0];
    tower_sessions_mongodb_store(&old).into_store(&mongo).keep_source().run().await.unwrap();
    let unmark = doc! { "$unset": { "imported": "" } };
    old.update_many(doc! {}, unmark).await.unwrap();
    let mut newer = SessionStore::load(&mongo, &Id(record.id.0)).await.unwrap().unwrap();
    newer.data.insert("serial".to_owned(), 5.into());
    SessionStore::save(&mongo, &newer).await.unwrap();
    let imported = tower_sessions_mongodb_store(&old).into_store(&mongo).run().await.unwrap();
    assert_eq!((imported.imported, imported.already_there), (0, 1));
    assert_eq!(loaded(&mongo, record).await, Some((5, false)));
}

#[tokio::test]
async fn document_that_is_no_live_session_stays_and_is_reported() {
    let (published, old, mongo) = side_by_side().await;
    let good = write(&published, 0..3).await;
    let mut expired = record(7);
    expired.expiry_date = OffsetDateTime::now_utc() - Duration::minutes(1);
    published.save(&expired).await.unwrap();
    let binary = |bytes: Vec<u8>| Binary { subtype: BinarySubtype::Generic, bytes };
    let later = DateTime::from_millis(DateTime::now().timestamp_millis() + 3_600_000);
    let id = || old::Id::default().to_string();
    let written = rmp_serde::to_vec(&record(8)).unwrap();
    let deep = {
        let nested = (0..120).fold(serde_json::json!(1), |inner, _| serde_json::json!([inner]));
        let data = HashMap::from([("deep".to_owned(), nested)]);
        rmp_serde::to_vec(&old::Record { id: old::Id(1), data, ..record(9) }).unwrap()
    };
    let foreign = [
        ("text", doc! { "_id": 5, "data": "4111" }),
        ("text", doc! { "_id": { "a": "4111" } }),
        ("is no id", doc! { "_id": "4111", "data": binary(written.clone()), "expireAt": later }),
        ("no `data`", doc! { "_id": id(), "expireAt": later }),
        ("no `data`", doc! { "_id": id(), "data": "4111", "expireAt": later }),
        ("no `expireAt`", doc! { "_id": id(), "data": binary(written.clone()) }),
        ("no `expireAt`", doc! { "_id": id(), "data": binary(written.clone()), "expireAt": 5_i64 }),
        ("another id", doc! { "_id": id(), "data": binary(written.clone()), "expireAt": later }),
        ("no record", doc! { "_id": id(), "data": binary(b"4111".to_vec()), "expireAt": later }),
        (
            "no record",
            doc! { "_id": id(), "data": binary(written[..40].to_vec()), "expireAt": later },
        ),
        ("no record", doc! { "_id": id(), "data": binary(vec![0x91; 100_000]), "expireAt": later }),
        ("deeper", doc! { "_id": old::Id(1).to_string(), "data": binary(deep), "expireAt": later }),
    ];
    let mut reasons = HashMap::<_, u64>::new();
    for (reason, document) in &foreign {
        old.insert_one(document).await.unwrap();
        *reasons.entry(*reason).or_default() += 1;
    }
    for round in 0..2 {
        let imported = tower_sessions_mongodb_store(&old).into_store(&mongo).run().await.unwrap();
        assert_eq!(imported.imported, if round == 0 { 3 } else { 0 });
        assert_eq!((imported.expired, imported.unreadable), (1, foreign.len() as u64));
        assert_eq!(imported.read, imported.imported + imported.expired + imported.unreadable);
        assert_eq!(imported.reasons.len(), reasons.len());
        for (reason, count) in &imported.reasons {
            assert!(!reason.contains("4111"));
            let expected = reasons.iter().find(|(part, _)| reason.contains(**part));
            assert_eq!(expected.map(|(_, count)| count), Some(count), "{reason}");
        }
    }
    for (_, document) in &foreign {
        let left = old.find_one(doc! { "_id": document.get("_id").unwrap() }).await.unwrap();
        assert_eq!(left.as_ref(), Some(document), "untouched");
    }
    for (serial, record) in (0..).zip(&good) {
        assert_eq!(loaded(&mongo, record).await, Some((serial, true)));
    }
    assert_eq!(loaded(&mongo, &expired).await, None);
    assert_eq!(mongo.collection().count_documents(doc! {}).await.unwrap(), 3);
}

#[tokio::test]
async fn too_long_session_stays_and_a_session_that_expires_during_the_import_is_removed() {
    let (published, old, mongo) = side_by_side().await;
    let records = write(&published, 0..3).await;
    let client = mongo.collection().client().clone();
    let builder = MongoStore::builder().client(client).database(&old.namespace().db);
    let builder = builder.collection("ours").owner(|data| {
        let serial = data.get("serial")?.as_u64()?;
        Some(if serial == 1 { "x".repeat(1_025) } else { serial.to_string() })
    });
    let owned = builder.build().await.unwrap();
    // The state that a run leaves if it stops before it has removed the documents that no run
    // needs.
    let ours = mongo.collection().clone_with_type::<Document>();
    let key = |byte| Binary { subtype: BinarySubtype::Generic, bytes: vec![byte; 32] };
    let now = DateTime::now().timestamp_millis();
    for (byte, after) in [(1, -60_000), (2, 3_600_000)] {
        let expires = DateTime::from_millis(now + after);
        ours.insert_one(doc! { "_id": key(byte), "importing": expires }).await.unwrap();
    }
    let imported = tower_sessions_mongodb_store(&old).into_store(&owned).run().await.unwrap();
    assert_eq!((imported.imported, imported.unreadable, documents(&old).await), (2, 1, 1));
    assert!(
        imported.reasons.keys().all(|reason| reason.contains("owner is longer")),
        "{imported:?}"
    );
    assert_eq!(loaded(&mongo, &records[2]).await, Some((2, true)));
    assert_eq!(ours.count_documents(doc! { "_id": key(1) }).await.unwrap(), 0);
    assert_eq!(ours.count_documents(doc! { "_id": key(2) }).await.unwrap(), 1, "it may be awaited");
}

#[tokio::test]
async fn session_in_transit_is_an_error_and_no_absence() {
    let (published, old, mongo) = side_by_side().await;
    let record = &write(&published, 0..1).await[0];
    tower_sessions_mongodb_store(&old).into_store(&mongo).run().await.unwrap();
    // The state between the first step and the third.
    let stages = vec![doc! { "$set": { "importing": "$expires" } }, doc! { "$unset": "expires" }];
    let ours = mongo.collection();
    ours.update_many(doc! {}, stages).await.unwrap();
    let error = SessionStore::load(&mongo, &Id(record.id.0)).await.unwrap_err();
    assert!(error.to_string().contains("no `expires`"), "{error}");
    assert_eq!(mongo.length().await.unwrap(), 0);
    // The old document exists again, as if the import had been interrupted after its first step.
    let before = ours.clone_with_type::<Document>().find_one(doc! {}).await.unwrap().unwrap();
    assert!(matches!(before.get("importing"), Some(Bson::DateTime(_))));
    published.save(record).await.unwrap();
    let imported = tower_sessions_mongodb_store(&old).into_store(&mongo).run().await.unwrap();
    assert_eq!(imported.imported, 1);
    assert_eq!(loaded(&mongo, record).await, Some((0, true)));
}
