//! Builds each of the compared stores.

use std::sync::Arc;

use anyhow::{Context, Result};
use mongodb::Client;
use mongodb::options::ClientOptions;
use tower_sessions::{MemoryStore, SessionStore};
use tower_sessions_moka_mongodb_store::{
    CachedMongoStore, EvictionPolicy, ExpiredRemoval, MongoStore, mongodb,
};

use crate::kind::Kind;
use crate::lost_updates;
use crate::naive::{self, NaivePair};
use crate::options::StoreOptions;
use crate::stats::Commands;

/// Any of the stores.
pub(crate) enum Store {
    InMemory(MemoryStore),
    Mongo(MongoStore),
    Naive(NaivePair),
    Cached(CachedMongoStore),
}

impl Store {
    pub(crate) async fn build(
        kind: Kind,
        uri: &str,
        options: &StoreOptions,
        commands: &Commands,
    ) -> Result<Self> {
        if kind == Kind::InMemory {
            return Ok(Self::InMemory(MemoryStore::default()));
        }
        let mut client = ClientOptions::parse(uri).await?;
        commands.count(&mut client);
        // The size that our store sets when it creates the client. The naive pair gets it as well.
        client.max_pool_size.get_or_insert(100);
        client.max_connecting.get_or_insert(8);
        let client = Client::with_options(client)?;
        if kind == Kind::Naive {
            let database = client.default_database().context("the URI names a database")?;
            let collection = database.collection("sessions");
            return Ok(Self::Naive(naive::pair(collection, options.max_entries)));
        }
        let mut mongo =
            MongoStore::builder().client(client).on_conflict(lost_updates::add_up_views);
        if let Some(commands) = options.max_commands_in_flight {
            mongo = mongo.max_commands_in_flight(commands);
        }
        if !options.ttl_index {
            mongo = mongo.expired_removal(ExpiredRemoval::Off);
        }
        let mongo = mongo.build().await?;
        if kind == Kind::Mongo {
            return Ok(Self::Mongo(mongo));
        }
        let mut builder = CachedMongoStore::builder(mongo)
            .coherence(options.coherence())
            .touch_after(options.touch_after)
            .compact(kind == Kind::Compact);
        if let Some(bytes) = options.max_bytes {
            builder = builder.max_bytes(bytes);
        }
        if let Some(entries) = options.max_entries {
            builder = builder.max_entries(entries);
        }
        if let Some(bound) = options.max_staleness {
            builder = builder.max_staleness(bound);
        }
        if options.tiny_lfu {
            builder = builder.eviction_policy(EvictionPolicy::TinyLfu);
        }
        Ok(Self::Cached(builder.build().await?))
    }

    pub(crate) fn shared(self) -> Arc<dyn SessionStore> {
        match self {
            Self::InMemory(store) => Arc::new(store),
            Self::Mongo(store) => Arc::new(store),
            Self::Naive(store) => Arc::new(store),
            Self::Cached(store) => Arc::new(store),
        }
    }
}
