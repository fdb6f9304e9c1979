//! Server-side sessions for [`tower-sessions`](https://docs.rs/tower-sessions) in MongoDB, read at
//! memory speed.
#![cfg_attr(docsrs, feature(doc_cfg))]

mod backend;
mod cache;
mod clock;
mod contract;
mod error;
mod key;
mod metrics;
mod mongo;
mod record;
#[cfg(test)]
mod simulation;
mod store;
mod tasks;

pub use mongodb;

pub use self::cache::EvictionPolicy;
pub use self::error::{Error, ErrorKind, Result};
pub use self::key::SessionKey;
pub use self::mongo::{
    ExpiredRemoval, LiveSession, LiveSessions, MongoStore, MongoStoreBuilder, StoredSession,
};
pub use self::store::{CachedMongoStore, CachedMongoStoreBuilder};
