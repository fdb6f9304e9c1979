//! The public types of a session: as it is stored in the collection, and as it is in a list.

use bson::{Binary, Bson, DateTime, RawBson};
use serde::{Deserialize, Serialize};

use crate::error::Result;
use crate::mongo::codec::{self, DataFormat, MALFORMED, unreadable};
use crate::session::Data;
use crate::session::handle::SessionHandle;
use crate::session::owner::Owner;

/// A session as it is stored in the collection, for operators who query it.
///
/// It is the type of the documents in [`MongoStore::collection`](crate::MongoStore::collection), which also says
/// which changes the change stream reports to caches.
#[derive(Clone, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct StoredSession {
    /// SHA-256 of the session's id, 32 bytes.
    #[serde(rename = "_id")]
    pub key: Binary,
    /// The version of this format; 1.
    pub format: i32,
    /// The session's data, in one of three forms:
    ///
    /// - JSON text.
    /// - A document, if the store is [`queryable`](crate::MongoStoreBuilder::queryable). In its keys, `%`, `.`, NUL
    ///   and a leading `$` are percent-escaped.
    /// - A binary, if the store encrypts. Only the store can read it.
    ///
    /// [`data`](Self::data) reads the first two.
    pub data: Bson,
    /// When the session expires.
    pub expires: DateTime,
    /// The revision, 16 bytes. A store writes a new one with each change that other instances must know of.
    pub rev: Binary,
    /// When the session was created, by the clock of the app that created it. A session that gets a new id gets a
    /// new time. In a [request scope](crate::RequestScopeLayer), it keeps its time unless its owner changes.
    pub created: DateTime,
    /// When the session was last written, by the clock of the app that wrote it.
    pub updated: DateTime,
    /// The owner of the session, if the store was built with [`owner`](crate::MongoStoreBuilder::owner).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub owner: Option<String>,
}

impl StoredSession {
    /// Reads the session's data.
    ///
    /// # Errors
    ///
    /// [`Decode`](crate::ErrorKind::Decode) if this release does not know the form of the data, or if the data is
    /// encrypted.
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

/// A live session in a list. It has no id, so a list does not let anybody use a session.
#[derive(Clone, PartialEq)]
#[non_exhaustive]
pub struct LiveSession {
    /// Identifies the session, to end it.
    pub handle: SessionHandle,
    /// The owner of the session, if the store was built with [`owner`](crate::MongoStoreBuilder::owner).
    pub owner: Option<Owner>,
    /// The session's data.
    pub data: Data,
    /// When the session expires.
    pub expires: time::OffsetDateTime,
    /// When the session was created, by the clock of the app that created it. A session that gets a new id gets a
    /// new time. In a [request scope](crate::RequestScopeLayer), it keeps its time unless its owner changes.
    pub created: time::OffsetDateTime,
    /// When the session was last written, by the clock of the app that wrote it.
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
