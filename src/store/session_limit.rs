//! `create` of a [`CachedMongoStore`] that has
//! [`max_sessions_per_owner`](crate::MongoStoreBuilder::max_sessions_per_owner).

use crate::backend;
use crate::error::Result;
use crate::mongo::SessionLimit;
use crate::session::Data;
use crate::session::id::{RawId, SessionKey};
use crate::store::CachedMongoStore;
use crate::store::write_through::begin_deletes;
use crate::time::WallTime;

impl CachedMongoStore {
    pub(crate) async fn create_within_limit(
        &self,
        limit: SessionLimit,
        data: &Data,
        expires: WallTime,
    ) -> Result<RawId> {
        let insert = |id: RawId| self.insert_within_limit(limit, id.key(), data, expires);
        backend::create(insert).await
    }

    /// Stores a new session within the limit, and returns whether it did: not if the key is taken.
    ///
    /// The sessions that the limit evicts leave this cache as those of a sign-out do. If the new session is one of
    /// them, its version is outdated by then, so its entry is not inserted.
    async fn insert_within_limit(
        &self,
        limit: SessionLimit,
        key: SessionKey,
        data: &Data,
        expires: WallTime,
    ) -> Result<bool> {
        let sessions = self.mongo.session_collection();
        let guard = self.tiers.cache.begin(key);
        let cache = self.tiers.cache.clone();
        let begin = move |keys: &[SessionKey]| begin_deletes(&cache, keys);
        let new = (key, self.tiers.revs.next());
        let insert = sessions.insert_within_limit(limit, new, data, expires, begin);
        let late = sessions.clone();
        self.tiers.run_insert(guard, key, insert, data, move || late.remove_later(key)).await
    }
}
