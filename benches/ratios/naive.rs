//! A cache that works like the published moka store for tower-sessions: moka's async cache of
//! records, whose expiry each load checks.

use moka::future::Cache;
use time::OffsetDateTime;
use tower_sessions::session::{Id, Record};
use tower_sessions::session_store::Result;
use tower_sessions::{CachingSessionStore, SessionStore};
use tower_sessions_moka_mongodb_store::MongoStore;

/// The pair of stores that an app would build with it.
pub(crate) type Naive = CachingSessionStore<NaiveCache, MongoStore>;

#[derive(Clone, Debug)]
pub(crate) struct NaiveCache(Cache<Id, Record>);

pub(crate) fn pair(mongo: MongoStore, capacity: u64) -> Naive {
    CachingSessionStore::new(NaiveCache(Cache::new(capacity)), mongo)
}

#[async_trait::async_trait]
impl SessionStore for NaiveCache {
    async fn create(&self, record: &mut Record) -> Result<()> {
        self.save(record).await
    }

    async fn save(&self, record: &Record) -> Result<()> {
        self.0.insert(record.id, record.clone()).await;
        Ok(())
    }

    async fn load(&self, id: &Id) -> Result<Option<Record>> {
        let found = self.0.get(id).await;
        Ok(found.filter(|record| record.expiry_date > OffsetDateTime::now_utc()))
    }

    async fn delete(&self, id: &Id) -> Result<()> {
        self.0.invalidate(id).await;
        Ok(())
    }
}
