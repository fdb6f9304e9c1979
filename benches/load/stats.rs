//! The figures of a server process: its store's metrics, the commands that it sent, and its tasks.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use metrics::{Counter, Gauge, Histogram, Key, KeyName, Metadata, Recorder, SharedString, Unit};
use metrics_util::registry::{AtomicStorage, Registry};
use mongodb::event::EventHandler;
use mongodb::event::cmap::CmapEvent;
use mongodb::event::command::CommandEvent;
use mongodb::options::ClientOptions;
use serde::{Deserialize, Serialize};
use tower_sessions_moka_mongodb_store::mongodb;

use crate::number::float;

/// The counter of loads, by result. The naive pair's cache also counts into it.
pub(crate) const LOADS: &str = "session_store_loads_total";
const ENTRIES: &str = "session_store_cache_entries";
const BYTES: &str = "session_store_cache_bytes";

/// Figures since the process began.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Stats {
    /// Loads, by result.
    pub(crate) loads: BTreeMap<String, u64>,
    /// Commands sent to MongoDB, including those of the change stream.
    pub(crate) commands: u64,
    /// The same by name, without those of the change stream. Empty unless the options ask for it.
    pub(crate) named: BTreeMap<String, u64>,
    /// Sessions in the cache, if the store reports them.
    pub(crate) entries: u64,
    pub(crate) bytes: u64,
    pub(crate) tasks: u64,
}

impl Stats {
    /// The counts since `before`. Values that are not counters are those of now.
    pub(crate) fn since(&self, before: &Self) -> Self {
        let less = |now: &BTreeMap<String, u64>, then: &BTreeMap<String, u64>| {
            let was = |name| then.get(name).copied().unwrap_or(0);
            now.iter().map(|(name, n)| (name.clone(), n.saturating_sub(was(name)))).collect()
        };
        Self {
            loads: less(&self.loads, &before.loads),
            commands: self.commands.saturating_sub(before.commands),
            named: less(&self.named, &before.named),
            ..self.clone()
        }
    }

    pub(crate) fn add(&mut self, other: &Self) {
        for (name, n) in &other.loads {
            *self.loads.entry(name.clone()).or_default() += n;
        }
        self.commands += other.commands;
        for (name, n) in &other.named {
            *self.named.entry(name.clone()).or_default() += n;
        }
        self.entries += other.entries;
        self.bytes += other.bytes;
        self.tasks += other.tasks;
    }

    /// The share of loads that the cache answered. `None` if there were no loads.
    pub(crate) fn hit_rate(&self) -> Option<f64> {
        let of = |results: &[&str]| -> u64 {
            results.iter().filter_map(|result| self.loads.get(*result)).sum()
        };
        let all: u64 = self.loads.values().sum();
        (all > 0).then(|| float(of(&["hit", "absent", "grace"])) / float(all))
    }
}

/// Counts metrics and commands of this process.
#[derive(Clone)]
pub(crate) struct Meters {
    registry: Arc<Registry<Key, AtomicStorage>>,
    commands: Commands,
}

impl Meters {
    /// Call it before a store is built: a store registers its metrics when it is built.
    pub(crate) fn install(names: bool) -> anyhow::Result<Self> {
        let registry = Arc::new(Registry::atomic());
        metrics::set_global_recorder(Recording(registry.clone()))
            .map_err(|_| anyhow::anyhow!("there is a metrics recorder already"))?;
        Ok(Self { registry, commands: Commands { names, ..Commands::default() } })
    }

    pub(crate) fn commands(&self) -> &Commands {
        &self.commands
    }

    pub(crate) fn read(&self) -> Stats {
        let mut loads = BTreeMap::new();
        self.registry.visit_counters(|key, count| {
            if key.name() == LOADS {
                let result = key.labels().map(|label| label.value().to_owned()).collect();
                loads.insert(result, count.load(Ordering::Relaxed));
            }
        });
        // A store without a cache registers the series as well, and leaves them at zero.
        loads.retain(|_, count| *count > 0);
        let mut entries = 0;
        let mut bytes = 0;
        self.registry.visit_gauges(|key, value| {
            #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a count")]
            let value = f64::from_bits(value.load(Ordering::Relaxed)).max(0.0) as u64;
            match key.name() {
                ENTRIES => entries = value,
                BYTES => bytes = value,
                _ => {}
            }
        });
        let tasks = tokio::runtime::Handle::current().metrics().num_alive_tasks() as u64;
        let commands = self.commands.sent.load(Ordering::Relaxed);
        Stats { loads, commands, named: self.commands.named(), entries, bytes, tasks }
    }
}

/// Keeps counters and gauges. It drops durations: if they were kept, they would be the memory that
/// grows.
struct Recording(Arc<Registry<Key, AtomicStorage>>);

impl Recorder for Recording {
    fn describe_counter(&self, _: KeyName, _: Option<Unit>, _: SharedString) {}
    fn describe_gauge(&self, _: KeyName, _: Option<Unit>, _: SharedString) {}
    fn describe_histogram(&self, _: KeyName, _: Option<Unit>, _: SharedString) {}

    fn register_counter(&self, key: &Key, _: &Metadata<'_>) -> Counter {
        self.0.get_or_create_counter(key, |counter| Counter::from_arc(counter.clone()))
    }

    fn register_gauge(&self, key: &Key, _: &Metadata<'_>) -> Gauge {
        self.0.get_or_create_gauge(key, |gauge| Gauge::from_arc(gauge.clone()))
    }

    fn register_histogram(&self, _: &Key, _: &Metadata<'_>) -> Histogram {
        Histogram::noop()
    }
}

/// The number of sent commands.
#[derive(Clone, Default)]
pub(crate) struct Commands {
    names: bool,
    sent: Arc<AtomicU64>,
    by_name: Arc<[AtomicU64; NAMES.len() + 1]>,
}

const NAMES: [&str; 7] =
    ["find", "insert", "update", "delete", "bulkWrite", "findAndModify", "aggregate"];

/// Commands of the change stream and of the driver, for which no request waits.
const BACKGROUND: [&str; 3] = ["ping", "getMore", "endSessions"];

impl Commands {
    /// Counts the commands of a client.
    ///
    /// Each command takes a connection from the pool, and counting those costs almost nothing. To
    /// report a command's name, the driver copies the command and the reply.
    pub(crate) fn count(&self, options: &mut ClientOptions) {
        let sent = self.sent.clone();
        options.cmap_event_handler = Some(EventHandler::callback(move |event| {
            if let CmapEvent::ConnectionCheckedOut(_) = event {
                sent.fetch_add(1, Ordering::Relaxed);
            }
        }));
        if !self.names {
            return;
        }
        let counts = self.by_name.clone();
        options.command_event_handler = Some(EventHandler::callback(move |event| {
            if let CommandEvent::Started(event) = event {
                let name = event.command_name.as_str();
                let at = NAMES.iter().position(|known| *known == name).unwrap_or(NAMES.len());
                if !BACKGROUND.contains(&name) {
                    counts[at].fetch_add(1, Ordering::Relaxed);
                }
            }
        }));
    }

    fn named(&self) -> BTreeMap<String, u64> {
        let names = NAMES.into_iter().chain(["other"]);
        let counts = self.by_name.iter().map(|count| count.load(Ordering::Relaxed));
        names.zip(counts).filter(|(_, n)| *n > 0).map(|(name, n)| (name.to_owned(), n)).collect()
    }
}
