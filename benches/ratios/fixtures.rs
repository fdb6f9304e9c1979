//! Sessions, stores and collections for the measurements.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result};
use futures::{StreamExt, TryStreamExt};
use mongodb::bson::{Binary, Bson, DateTime, Document, doc, spec::BinarySubtype};
use mongodb::event::{EventHandler, command::CommandEvent};
use mongodb::options::{ClientOptions, WriteConcern};
use mongodb::{Client, Collection};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use time::OffsetDateTime;
use tower_sessions::SessionStore;
use tower_sessions::session::{Id, Record};
use tower_sessions_moka_mongodb_store::{
    CachedMongoStore, CachedMongoStoreBuilder, MongoStore, SessionKey, mongodb,
};

/// The data of an app in a session.
pub(crate) type Data = HashMap<String, Value>;

/// The shape of a session's data.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(crate) enum Shape {
    /// This number of keys, each with `{"id": 17, "name": "a visitor's name", "at": [3, 1.5]}`.
    Keys(usize),
    /// One key with a text of this many bytes.
    Text(usize),
    /// One key with a list of this many whole numbers.
    Numbers(usize),
}

impl Shape {
    pub(crate) fn data(self, serial: usize) -> Data {
        match self {
            Self::Keys(keys) => {
                (0..keys).map(|key| (format!("key_{key:02}"), small(serial + key))).collect()
            }
            Self::Text(bytes) => [("text".to_owned(), json!("x".repeat(bytes)))].into(),
            Self::Numbers(count) => {
                let numbers: Vec<_> = (serial..serial + count).collect();
                [("numbers".to_owned(), json!(numbers))].into()
            }
        }
    }
}

fn small(serial: usize) -> Value {
    json!({ "id": serial, "name": "a visitor's name", "at": [serial % 97, 1.5] })
}

/// The id of a session by its number. Every process computes the same id.
pub(crate) fn id(seed: u64, number: usize) -> Id {
    let digest = Sha256::new().chain_update(seed.to_le_bytes()).chain_update(number.to_le_bytes());
    let mut bytes = [0; 16];
    bytes.copy_from_slice(&digest.finalize()[..16]);
    Id(i128::from_le_bytes(bytes))
}

pub(crate) fn record(id: Id, data: Data) -> Record {
    Record { id, data, expiry_date: OffsetDateTime::now_utc() + time::Duration::days(14) }
}

/// A session as the store stores it.
pub(crate) fn document(id: Id, data: &Data) -> Result<Document> {
    let now = DateTime::now();
    Ok(doc! {
        "_id": key(id),
        "format": 1,
        "data": serde_json::to_string(data)?,
        "expires": in_two_weeks(),
        "rev": rev(),
        "created": now,
        "updated": now,
    })
}

/// The update that a save of a session sends.
pub(crate) fn update(data: &Data) -> Result<Document> {
    Ok(doc! { "$set": {
        "data": serde_json::to_string(data)?,
        "expires": in_two_weeks(),
        "rev": rev(),
        "updated": DateTime::now(),
    } })
}

pub(crate) fn key(id: Id) -> Binary {
    binary(SessionKey::from(id).as_bytes())
}

fn rev() -> Binary {
    binary(&Id::default().0.to_le_bytes())
}

fn binary(bytes: &[u8]) -> Binary {
    Binary { subtype: BinarySubtype::Generic, bytes: bytes.to_vec() }
}

fn in_two_weeks() -> DateTime {
    DateTime::from_millis(DateTime::now().timestamp_millis() + 14 * 24 * 3_600 * 1_000)
}

/// The collection of the sessions, by a client of its own with the driver's defaults. Two settings
/// are those of our store: its writes wait for a majority, and its pool has the same size.
pub(crate) async fn driver(uri: &str) -> Result<Collection<Document>> {
    plain_collection(uri, "sessions").await
}

/// Creates the index on the collection of the sessions, which takes long once there are many
/// sessions.
pub(crate) async fn indexed(uri: &str) -> Result<()> {
    MongoStore::connect(uri).await?.shutdown().await;
    Ok(())
}

/// Another collection like it, on which no store has a change stream.
pub(crate) async fn driver_apart(uri: &str) -> Result<Collection<Document>> {
    // With the same index.
    MongoStore::builder().uri(uri).collection("apart").build().await?.shutdown().await;
    plain_collection(uri, "apart").await
}

async fn plain_collection(uri: &str, name: &str) -> Result<Collection<Document>> {
    let mut options = ClientOptions::parse(uri).await?;
    options.max_pool_size.get_or_insert(100);
    options.max_connecting.get_or_insert(8);
    let client = Client::with_options(options)?;
    let database = client.default_database().context("the URI names a database")?;
    let majority = WriteConcern::majority();
    let options = mongodb::options::CollectionOptions::builder().write_concern(majority).build();
    Ok(database.collection_with_options(name, options))
}

/// A cached store with all defaults, or with the compact form.
pub(crate) async fn cached(uri: &str, compact: bool) -> Result<CachedMongoStore> {
    let mongo = MongoStore::connect(uri).await?;
    Ok(form(CachedMongoStore::builder(mongo), compact).build().await?)
}

pub(crate) fn form(builder: CachedMongoStoreBuilder, compact: bool) -> CachedMongoStoreBuilder {
    builder.compact(compact)
}

/// A request that loads a session and changes a key of it.
pub(crate) async fn change(
    store: &CachedMongoStore,
    id: Id,
    key: String,
    value: Value,
) -> Result<()> {
    let mut record = store.load(&id).await?.context("it was stored")?;
    record.data.insert(key, value);
    Ok(store.save(&record).await?)
}

/// Inserts the sessions `0..count` of `seed` into the database, without a store.
pub(crate) async fn fill(
    into: &Collection<Document>,
    seed: u64,
    shape: Shape,
    count: usize,
) -> Result<()> {
    const BATCH: usize = 1_000;
    let batches = futures::stream::iter((0..count).step_by(BATCH)).map(|first| async move {
        let numbers = first..count.min(first + BATCH);
        let documents: Result<Vec<_>> =
            numbers.map(|number| document(id(seed, number), &shape.data(number))).collect();
        into.insert_many(documents?).await?;
        if first > 0 && first.is_multiple_of(100 * BATCH) {
            eprintln!("  {first} of {count} sessions stored");
        }
        anyhow::Ok(())
    });
    batches.buffer_unordered(4).try_collect().await
}

/// Records the commands that a client sends.
#[derive(Clone, Default)]
pub(crate) struct Commands(Arc<Mutex<Seen>>);

#[derive(Default)]
struct Seen {
    finds: usize,
    /// Write statements. One command may hold many.
    writes: usize,
    write_commands: usize,
    /// The number of reads of each key.
    asked: HashMap<Vec<u8>, usize>,
}

impl Commands {
    pub(crate) fn finds(&self) -> usize {
        self.seen(|seen| seen.finds)
    }

    pub(crate) fn writes(&self) -> usize {
        self.seen(|seen| seen.writes)
    }

    pub(crate) fn write_commands(&self) -> usize {
        self.seen(|seen| seen.write_commands)
    }

    /// How often sessions of these keys were read since the last call.
    pub(crate) fn take_asked(&self, keys: &[Vec<u8>]) -> usize {
        let asked = self.seen(|seen| std::mem::take(&mut seen.asked));
        keys.iter().filter_map(|key| asked.get(key)).sum()
    }

    /// A store whose commands are recorded.
    pub(crate) async fn mongo(&self, uri: &str) -> Result<MongoStore> {
        let mut options = ClientOptions::parse(uri).await?;
        let seen = self.clone();
        options.command_event_handler = Some(EventHandler::callback(move |event| {
            if let CommandEvent::Started(event) = event {
                seen.seen(|seen| seen.take(&event.command_name, &event.command));
            }
        }));
        let client = Client::with_options(options)?;
        Ok(MongoStore::builder().client(client).build().await?)
    }

    fn seen<R>(&self, act: impl FnOnce(&mut Seen) -> R) -> R {
        act(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Seen {
    fn take(&mut self, name: &str, command: &Document) {
        let statements = |field| command.get_array(field).map_or(1, Vec::len);
        let writes_before = self.writes;
        match name {
            "find" => {
                self.finds += 1;
                match command.get_document("filter").ok().and_then(|filter| filter.get("_id")) {
                    Some(Bson::Document(among)) => {
                        self.ask(among.get_array("$in").into_iter().flatten());
                    }
                    Some(key) => self.ask([key]),
                    None => {}
                }
            }
            "insert" => self.writes += statements("documents"),
            "update" => self.writes += statements("updates"),
            "delete" => self.writes += statements("deletes"),
            "bulkWrite" => self.writes += statements("ops"),
            "findAndModify" => self.writes += 1,
            _ => {}
        }
        self.write_commands += usize::from(self.writes > writes_before);
    }

    fn ask<'a>(&mut self, keys: impl IntoIterator<Item = &'a Bson>) {
        for key in keys {
            if let Bson::Binary(key) = key {
                *self.asked.entry(key.bytes.clone()).or_default() += 1;
            }
        }
    }
}

/// How long the future takes.
pub(crate) async fn timed<T>(work: impl Future<Output = Result<T>>) -> Result<Duration> {
    let start = std::time::Instant::now();
    work.await?;
    Ok(start.elapsed())
}
