//! The settings of a run.

use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::kind::Kind;
use crate::scenario::Scenario;
use tower_sessions_moka_mongodb_store::Coherence;

/// The settings of a run.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Options {
    pub(crate) stores: Vec<Kind>,
    pub(crate) scenarios: Vec<Scenario>,
    pub(crate) connections: usize,
    pub(crate) sessions: usize,
    pub(crate) size: usize,
    pub(crate) rounds: usize,
    pub(crate) seconds: f64,
    pub(crate) warm_up: f64,
    pub(crate) rate: Option<f64>,
    pub(crate) zipf: f64,
    pub(crate) invented: u32,
    pub(crate) seed: u64,
    pub(crate) client_threads: usize,
    pub(crate) server_threads: Option<usize>,
    pub(crate) name_commands: bool,
    pub(crate) store: StoreOptions,
    #[serde(skip)]
    pub(crate) json: Option<PathBuf>,
    #[serde(skip)]
    pub(crate) html: Option<PathBuf>,
    #[serde(skip)]
    pub(crate) plots: Option<PathBuf>,
    #[serde(skip)]
    pub(crate) soak: Option<Soak>,
    #[serde(skip)]
    pub(crate) lost_updates: bool,
}

/// The settings of our store. `None` keeps its own default.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[allow(clippy::struct_excessive_bools, reason = "switches, each by itself")]
pub(crate) struct StoreOptions {
    pub(crate) max_bytes: Option<u64>,
    pub(crate) max_entries: Option<u64>,
    pub(crate) max_staleness: Option<Duration>,
    pub(crate) touch_after: Duration,
    pub(crate) max_commands_in_flight: Option<u32>,
    pub(crate) tiny_lfu: bool,
    pub(crate) ttl_index: bool,
    pub(crate) change_stream: bool,
    pub(crate) sole_writer: bool,
}

impl StoreOptions {
    pub(crate) fn coherence(&self) -> Coherence {
        if self.sole_writer {
            Coherence::SoleWriter
        } else if self.change_stream {
            Coherence::ChangeStream
        } else {
            Coherence::TimeBound
        }
    }
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct Soak {
    pub(crate) loads: u64,
    pub(crate) saves: u64,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            stores: Kind::ALL.to_vec(),
            scenarios: Scenario::ALL.to_vec(),
            connections: 32,
            sessions: 1_000,
            size: 502,
            rounds: 5,
            seconds: 1.0,
            warm_up: 1.0,
            rate: None,
            zipf: 0.99,
            invented: 90,
            seed: 1,
            client_threads: 1,
            server_threads: None,
            name_commands: false,
            store: StoreOptions {
                max_bytes: None,
                max_entries: None,
                max_staleness: None,
                touch_after: Duration::from_secs(60),
                max_commands_in_flight: None,
                tiny_lfu: false,
                ttl_index: true,
                change_stream: true,
                sole_writer: false,
            },
            json: None,
            html: None,
            plots: None,
            soak: None,
            lost_updates: false,
        }
    }
}
