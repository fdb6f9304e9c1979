//! The figures of the operator's page, read from the store's metrics once a second.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::Result;
use metrics_exporter_prometheus::{PrometheusBuilder, PrometheusHandle};
use time::OffsetDateTime;
use tokio::time::MissedTickBehavior;
use tower_sessions_moka_mongodb_store::{CachedMongoStore, Health};

/// The number of seconds that are kept and shown.
pub(crate) const SECONDS: usize = 120;

/// Installs a recorder, which collects every metric of this process from now on.
pub(crate) fn recorder() -> Result<PrometheusHandle> {
    Ok(PrometheusBuilder::new().install_recorder()?)
}

/// The number of loads, by the source of the answer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Loads {
    pub(crate) memory: u64,
    pub(crate) mongo: u64,
}

impl Loads {
    pub(crate) fn all(self) -> u64 {
        self.memory + self.mongo
    }

    fn since(self, earlier: Self) -> Self {
        let memory = self.memory.saturating_sub(earlier.memory);
        Self { memory, mongo: self.mongo.saturating_sub(earlier.mongo) }
    }
}

/// The values of the metrics at one moment.
#[derive(Clone, Copy, Default)]
struct Reading {
    loads: Loads,
    sessions: u64,
}

impl Reading {
    /// Parses the text that a Prometheus would scrape.
    fn of(exposition: &str) -> Self {
        let mut reading = Self::default();
        for (name, value) in exposition.lines().filter_map(|line| line.rsplit_once(' ')) {
            let Ok(value) = value.parse::<u64>() else { continue };
            if name == "session_store_live_sessions" {
                reading.sessions = value;
            } else if let Some(labels) = name.strip_prefix("session_store_loads_total{") {
                // All other results come from a read of MongoDB.
                let memory = ["hit", "absent", "grace"];
                let memory = memory.iter().any(|result| labels.contains(&format!("\"{result}\"")));
                *(if memory { &mut reading.loads.memory } else { &mut reading.loads.mongo }) +=
                    value;
            }
        }
        reading
    }
}

/// The figures so far. A real site has a Prometheus for that, for all instances and for months.
#[derive(Clone)]
pub(crate) struct History {
    store: CachedMongoStore,
    seen: Arc<Mutex<Seen>>,
}

#[derive(Default)]
struct Seen {
    last: Reading,
    /// The loads of each second, the latest last.
    seconds: VecDeque<Loads>,
}

/// Everything that the page shows, at one moment.
pub(crate) struct Figures {
    pub(crate) at: OffsetDateTime,
    pub(crate) health: Health,
    pub(crate) sessions: u64,
    pub(crate) seconds: Vec<Loads>,
}

impl History {
    /// Starts to read the store's metrics once a second, until the program ends.
    pub(crate) fn start(store: CachedMongoStore, metrics: PrometheusHandle) -> Self {
        let history = Self { store, seen: Arc::default() };
        let seen = history.seen.clone();
        tokio::spawn(async move {
            let mut every = tokio::time::interval(Duration::from_secs(1));
            every.set_missed_tick_behavior(MissedTickBehavior::Delay);
            loop {
                every.tick().await;
                // Without upkeep, durations pile up in memory until the next scrape.
                metrics.run_upkeep();
                let reading = Reading::of(&metrics.render());
                seen.lock().unwrap_or_else(PoisonError::into_inner).add(reading);
            }
        });
        history
    }

    pub(crate) fn figures(&self) -> Figures {
        let seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        Figures {
            at: OffsetDateTime::now_utc(),
            health: self.store.health(),
            sessions: seen.last.sessions,
            seconds: seen.seconds.iter().copied().collect(),
        }
    }
}

impl Seen {
    fn add(&mut self, reading: Reading) {
        if self.seconds.len() == SECONDS {
            self.seconds.pop_front();
        }
        self.seconds.push_back(reading.loads.since(self.last.loads));
        self.last = reading;
    }
}
