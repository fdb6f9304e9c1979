//! Sessions as they are shown to whoever looks into the collection or at a list.

use bson::{Binary, Bson, DateTime, RawBson};
use serde::{Deserialize, Serialize};

use crate::error::Result;
use crate::mongo::codec::{self, DataFormat, MALFORMED, unreadable};
use crate::session::Data;
use crate::session::handle::SessionHandle;
use crate::session::owner::Owner;

/// A session as it stands in the collection, for operators who query it.
///
/// [`MongoStore::collection`](crate::MongoStore::collection) is typed with it. Caches hear of any
/// change that is made to it, but for one that touches `expires` and `updated` alone, which is how a
/// session is prolonged, or `data` and `reencrypted` alone, which is how it is encrypted anew.
#[derive(Clone, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct StoredSession {
    /// SHA-256 of the session's id, 32 bytes.
    #[serde(rename = "_id")]
    pub key: Binary,
    /// The version of this format; 1.
    pub format: i32,
    /// The session's data: JSON text, or a document of a store that is
    /// [`queryable`](crate::MongoStoreBuilder::queryable), in whose keys `%`, `.`, NUL and a leading
    /// `$` are percent-escaped. [`data`](Self::data) reads both. Of a store that encrypts, a binary,
    /// which the store reads.
    pub data: Bson,
    /// When the session ends.
    pub expires: DateTime,
    /// New on each write of a store that other instances must hear of, 16 bytes.
    pub rev: Binary,
    /// When the session was created under its present id, by the creating app's clock: a new id,
    /// as at each log-in, begins anew.
    pub created: DateTime,
    /// When the session was last written, by the writing app's clock.
    pub updated: DateTime,
    /// Whose session it is, where [`owner`](crate::MongoStoreBuilder::owner) is given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub owner: Option<String>,
}

impl StoredSession {
    /// Reads the session's data.
    ///
    /// # Errors
    ///
    /// [`Decode`](crate::ErrorKind::Decode) if it is in no form that this release writes, or is encrypted.
    pub fn data(&self) -> Result<Data> {
        let stored = RawBson::try_from(self.data.clone());
        let stored = stored.map_err(|_| unreadable(MALFORMED))?;
        codec::decode(stored.as_raw_bson_ref(), &DataFormat::Text, &self.key.bytes)
    }
}

impl std::fmt::Debug for StoredSession {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("StoredSession")
            .field("format", &self.format)
            .field("expires", &self.expires)
            .field("created", &self.created)
            .field("updated", &self.updated)
            .finish_non_exhaustive()
    }
}

/// A live session in a list: all but what would let somebody use it.
#[derive(Clone, PartialEq)]
#[non_exhaustive]
pub struct LiveSession {
    /// Names the session, to end it.
    pub handle: SessionHandle,
    /// Whose session it is, where [`owner`](crate::MongoStoreBuilder::owner) is given.
    pub owner: Option<Owner>,
    /// The session's data.
    pub data: Data,
    /// When the session ends.
    pub expires: time::OffsetDateTime,
    /// When the session was created under its present id, by the creating app's clock: a new id,
    /// as at each log-in, begins anew.
    pub created: time::OffsetDateTime,
    /// When the session was last written, by the writing app's clock.
    pub updated: time::OffsetDateTime,
}

impl std::fmt::Debug for LiveSession {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("LiveSession")
            .field("expires", &self.expires)
            .field("created", &self.created)
            .field("updated", &self.updated)
            .finish_non_exhaustive()
    }
}
