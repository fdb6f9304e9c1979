//! The contract of tower-sessions, for both generations that are in use.
//!
//! Each is a conversion by moving at the edge: nothing of a session is copied here.

use crate::error::{Error, ErrorKind};
use crate::mongo::MongoStore;
use crate::session::id::RawId;
use crate::store::CachedMongoStore;
use crate::telemetry::spans;
use crate::time::WallTime;

/// Implements the traits of one tower-sessions-core for one store.
macro_rules! implement_contract {
    ($core:ident, $store:ident) => {
        #[async_trait::async_trait]
        impl $core::SessionStore for $store {
            async fn create(
                &self,
                record: &mut $core::session::Record,
            ) -> $core::session_store::Result<()> {
                let expires = WallTime::from_datetime(record.expiry_date);
                let create = $store::create_session(self, &record.data, expires);
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
                    return Err(beyond_the_calendar().into());
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

/// Flattens an error for one tower-sessions-core, which has room for a text only.
macro_rules! flatten_error {
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

fn beyond_the_calendar() -> Error {
    Error::new(
        ErrorKind::Decode,
        "the stored session cannot be read: its `expires` is beyond the year 9999",
    )
}

flatten_error!(tower_sessions_core);
implement_contract!(tower_sessions_core, MongoStore);
implement_contract!(tower_sessions_core, CachedMongoStore);

#[cfg(feature = "tower-sessions-014")]
mod generation_014 {
    use super::{
        CachedMongoStore, Error, ErrorKind, MongoStore, RawId, WallTime, beyond_the_calendar, spans,
    };

    flatten_error!(tower_sessions_core_014);
    implement_contract!(tower_sessions_core_014, MongoStore);
    implement_contract!(tower_sessions_core_014, CachedMongoStore);
}
