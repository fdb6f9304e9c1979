//! Gives `cargo bench --bench parts` and `--bench ratios` access to single parts. Not a part of the public
//! API: it changes without notice.
#![allow(
    missing_docs,
    missing_debug_implementations,
    clippy::must_use_candidate,
    reason = "only the benches use it"
)]

use std::time::Duration;

use bson::RawBson;

use crate::availability::Availability;
use crate::cache::coherence::versions::{Effect, VersionTable};
use crate::cache::{CacheConfig, Coherence, EvictionPolicy, Lookup};
use crate::mongo::codec::{self, DataFormat};
use crate::session::id::SessionKey;
use crate::session::{Data, Session};
use crate::telemetry::metrics::{CacheMetrics, Series};
use crate::time::Clock;

/// The `_id` of every stored session here.
const ID: [u8; 32] = [7; 32];

/// The digest of an id.
#[must_use]
pub fn key(id: i128) -> SessionKey {
    SessionKey::of(id)
}

/// How many bytes a session's data takes in the compact form. `None` if it cannot be encoded.
#[must_use]
pub fn compact_len(data: &Data) -> Option<usize> {
    crate::cache::compact::encode(data).map(|encoded| encoded.len())
}

/// A format in which MongoDB stores session data.
pub struct StoredForm(DataFormat);

impl StoredForm {
    #[must_use]
    pub fn text() -> Self {
        Self(DataFormat::Text)
    }

    #[must_use]
    pub fn native() -> Self {
        Self(DataFormat::Native)
    }

    #[cfg(feature = "encryption")]
    #[must_use]
    pub fn encrypted() -> Self {
        let key = codec::Key::from_bytes(&[7; 32]);
        Self(DataFormat::Encrypted(std::sync::Arc::new(codec::Keys::new(1, key))))
    }

    #[must_use]
    pub fn encode(&self, data: &Data) -> Option<bson::Bson> {
        codec::encode(data, &self.0, &ID).ok().map(|(stored, _)| stored)
    }

    #[must_use]
    pub fn decode(&self, stored: &RawBson) -> Option<Data> {
        codec::decode(stored.as_raw_bson_ref(), &self.0, &ID).ok()
    }
}

/// The memory tier.
pub struct Cache {
    cache: crate::cache::Cache,
    clock: Clock,
}

impl Cache {
    #[must_use]
    pub fn new(compact: bool) -> Self {
        let clock = Clock::system();
        let config = CacheConfig {
            max_bytes: 64 << 20,
            max_entries: None,
            max_absent_ids: 10_000,
            policy: EvictionPolicy::Lru,
            max_staleness: Duration::from_secs(5),
            coherence: Coherence::SoleWriter,
            outage_grace: Duration::ZERO,
            compact,
        };
        let availability = Availability::new(clock.clone());
        let cache =
            crate::cache::Cache::new(&config, clock.clone(), availability, &Series::default());
        Self { cache, clock }
    }

    /// Inserts an entry, as a save does once MongoDB has acknowledged it.
    pub fn publish(&self, key: SessionKey, data: Data) {
        let expires = self.clock.wall().after(Duration::from_secs(3_600));
        self.cache.begin(key).publish(Session::new(data, expires));
    }

    /// The data of a hit.
    #[must_use]
    pub fn hit(&self, key: SessionKey) -> Option<Data> {
        match self.cache.get(key) {
            Lookup::Hit(entry) => entry.session().ok().map(|session| session.data),
            _ => None,
        }
    }
}

/// The version table, which decides whether an operation may insert an entry.
pub struct Rules(VersionTable<()>);

impl Default for Rules {
    fn default() -> Self {
        Self(VersionTable::new())
    }
}

impl Rules {
    pub fn take_and_finish(&self, key: SessionKey) -> bool {
        let version = self.0.take_version(key, Effect::MayChangeData);
        self.0.finish(version, |is_current| is_current)
    }

    pub fn invalidate(&self, key: SessionKey) -> u64 {
        self.0.invalidate(key, || ())
    }

    #[must_use]
    pub fn epoch(&self) -> u64 {
        self.0.epoch()
    }
}

/// The counter of hits.
pub struct HitCounter(CacheMetrics);

impl Default for HitCounter {
    fn default() -> Self {
        Self(CacheMetrics::new(&Series::default()))
    }
}

impl HitCounter {
    pub fn increment(&self) {
        self.0.hits.increment(1);
    }
}
