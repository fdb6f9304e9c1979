//! The pair of stores that an app can assemble in an hour: a moka cache and an upserting MongoDB
//! store, written as the crates of tower-sessions write them, and joined by `CachingSessionStore`.

use async_trait::async_trait;
use bson::spec::BinarySubtype;
use bson::{Binary, DateTime, doc};
use metrics::Counter;
use mongodb::Collection;
use serde::{Deserialize, Serialize};
use time::OffsetDateTime;
use tower_sessions::session::{Id, Record};
use tower_sessions::session_store::{Error, Result};
use tower_sessions::{CachingSessionStore, SessionStore};
use tower_sessions_moka_mongodb_store::mongodb;

pub(crate) type NaivePair = CachingSessionStore<NaiveCache, NaiveMongo>;

/// Joins the two over a collection of the database in the client's URI.
pub(crate) fn pair(collection: Collection<Stored>, max_entries: Option<u64>) -> NaivePair {
    let cache = match max_entries {
        Some(entries) => moka::future::Cache::new(entries),
        None => moka::future::Cache::builder().build(),
    };
    let loads = |result: &'static str| metrics::counter!(crate::stats::LOADS, "result" => result);
    let cache = NaiveCache { cache, hits: loads("hit"), misses: loads("miss") };
    CachingSessionStore::new(cache, NaiveMongo { collection })
}

#[derive(Clone)]
pub(crate) struct NaiveCache {
    cache: moka::future::Cache<Id, Record>,
    hits: Counter,
    misses: Counter,
}

impl std::fmt::Debug for NaiveCache {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("NaiveCache").finish_non_exhaustive()
    }
}

#[async_trait]
impl SessionStore for NaiveCache {
    async fn create(&self, record: &mut Record) -> Result<()> {
        while self.cache.contains_key(&record.id) {
            record.id = Id::default();
        }
        self.save(record).await
    }

    async fn save(&self, record: &Record) -> Result<()> {
        self.cache.insert(record.id, record.clone()).await;
        Ok(())
    }

    async fn load(&self, id: &Id) -> Result<Option<Record>> {
        let now = OffsetDateTime::now_utc();
        let found = self.cache.get(id).await.filter(|record| record.expiry_date > now);
        if found.is_some() {
            self.hits.increment(1);
        } else {
            self.misses.increment(1);
        }
        Ok(found)
    }

    async fn delete(&self, id: &Id) -> Result<()> {
        self.cache.invalidate(id).await;
        Ok(())
    }
}

#[derive(Clone, Debug)]
pub(crate) struct NaiveMongo {
    collection: Collection<Stored>,
}

#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Stored {
    #[serde(rename = "_id")]
    id: String,
    data: Binary,
    #[serde(rename = "expireAt")]
    expires: DateTime,
}

#[async_trait]
impl SessionStore for NaiveMongo {
    async fn create(&self, record: &mut Record) -> Result<()> {
        self.save(record).await
    }

    async fn save(&self, record: &Record) -> Result<()> {
        let bytes = serde_json::to_vec(record).map_err(|error| Error::Encode(error.to_string()))?;
        let data = Binary { subtype: BinarySubtype::Generic, bytes };
        let expires = DateTime::from(std::time::SystemTime::from(record.expiry_date));
        self.collection
            .update_one(
                doc! { "_id": record.id.to_string() },
                doc! { "$set": { "data": data, "expireAt": expires } },
            )
            .upsert(true)
            .await
            .map_err(|error| Error::Backend(error.to_string()))?;
        Ok(())
    }

    async fn load(&self, id: &Id) -> Result<Option<Record>> {
        let live = doc! { "_id": id.to_string(), "expireAt": { "$gt": DateTime::now() } };
        let found = self.collection.find_one(live).await;
        found
            .map_err(|error| Error::Backend(error.to_string()))?
            .map(|stored| serde_json::from_slice(&stored.data.bytes))
            .transpose()
            .map_err(|error| Error::Decode(error.to_string()))
    }

    async fn delete(&self, id: &Id) -> Result<()> {
        let deleted = self.collection.delete_one(doc! { "_id": id.to_string() }).await;
        deleted.map(drop).map_err(|error| Error::Backend(error.to_string()))
    }
}
