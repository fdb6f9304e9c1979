//! Implements `SessionStore` of tower-sessions for both stores, in both versions that are in use: 0.15
//! and 0.14.
//!
//! A session's data moves between their types and ours. Nothing is copied.

use crate::error::{Error, ErrorKind};
use crate::mongo::MongoStore;
use crate::session::id::RawId;
use crate::store::CachedMongoStore;
use crate::telemetry::spans;
use crate::time::WallTime;

/// Implements the traits of one version of tower-sessions-core for one store.
macro_rules! implement_contract {
    ($core:ident, $store:ident) => {
        #[async_trait::async_trait]
        impl $core::SessionStore for $store {
            async fn create(
                &self,
                record: &mut $core::session::Record,
            ) -> $core::session_store::Result<()> {
                let expires = WallTime::from_datetime(record.expiry_date);
                let record_id = RawId(record.id.0);
                let create = $store::create_session(self, record_id, &record.data, expires);
                let id = spans::verb!("session_store.create", create)?;
                record.id = $core::session::Id(id.0);
                Ok(())
            }

            async fn save(
                &self,
                record: &$core::session::Record,
            ) -> $core::session_store::Result<()> {
                let expires = WallTime::from_datetime(record.expiry_date);
                let save = $store::save_session(self, RawId(record.id.0), &record.data, expires);
                Ok(spans::verb!("session_store.save", save)?)
            }

            async fn load(
                &self,
                id: &$core::session::Id,
            ) -> $core::session_store::Result<Option<$core::session::Record>> {
                let load = $store::load_session(self, RawId(id.0));
                let Some(session) = spans::verb!("session_store.load", load)? else {
                    return Ok(None);
                };
                let Some(expiry_date) = session.expires.to_datetime() else {
                    return Err(beyond_year_9999().into());
                };
                Ok(Some($core::session::Record { id: *id, data: session.data, expiry_date }))
            }

            async fn delete(&self, id: &$core::session::Id) -> $core::session_store::Result<()> {
                let delete = $store::delete_session(self, RawId(id.0));
                Ok(spans::verb!("session_store.delete", delete)?)
            }
        }

        #[async_trait::async_trait]
        impl $core::session_store::ExpiredDeletion for $store {
            async fn delete_expired(&self) -> $core::session_store::Result<()> {
                let expire = $store::remove_expired(self);
                Ok(spans::verb!("session_store.delete_expired", expire)?)
            }
        }
    };
}

/// Converts an error for one version of tower-sessions-core. Its error holds only a kind and a text.
macro_rules! convert_error {
    ($core:ident) => {
        impl From<Error> for $core::session_store::Error {
            fn from(error: Error) -> Self {
                match error.kind() {
                    ErrorKind::Encode => Self::Encode(error.to_string()),
                    ErrorKind::Decode => Self::Decode(error.to_string()),
                    _ => Self::Backend(error.to_string()),
                }
            }
        }
    };
}

fn beyond_year_9999() -> Error {
    Error::new(
        ErrorKind::Decode,
        "the stored session cannot be read: its `expires` is beyond the year 9999",
    )
}

convert_error!(tower_sessions_core);
implement_contract!(tower_sessions_core, MongoStore);
implement_contract!(tower_sessions_core, CachedMongoStore);

#[cfg(feature = "tower-sessions-014")]
mod version_014 {
    use super::{
        CachedMongoStore, Error, ErrorKind, MongoStore, RawId, WallTime, beyond_year_9999, spans,
    };

    convert_error!(tower_sessions_core_014);
    implement_contract!(tower_sessions_core_014, MongoStore);
    implement_contract!(tower_sessions_core_014, CachedMongoStore);
}
