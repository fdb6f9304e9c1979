//! The options of the command line.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Result, bail};
use lexopt::prelude::{Long, Short, Value, ValueExt};
use serde::{Deserialize, Serialize};

use crate::scenario::Scenario;
use crate::stores::Kind;

pub(crate) const HELP: &str = "\
A load test of session stores: an Axum server in a process of its own, clients that keep their
connections, every answer checked. Runs against MONGODB_URI, or a test server of its own.

cargo bench --bench load -- [OPTIONS]

What is run
  --stores LIST        in-memory, mongo, naive, ours, compact (all)
  --scenarios LIST     bare, read, read-zipf, read-mostly, write, always-save, log-in, stampede,
                       tenfold, tenfold-zipf, flood, two-instances (all)
  --connections N      keep-alive connections, each with sessions of its own (32)
  --sessions N         sessions, at least one a connection (1000; with --soak 40000)
  --size BYTES         a session's data as JSON, at least 80 (502)
  --rounds N           rounds of each store, in turns with the other stores (5)
  --seconds S          length of a round (1.0)
  --warm-up S          unmeasured time of each store before each of its rounds (1.0)
  --rate R             open loop: R requests a second, whatever the answers take, and latencies
                       counted from the moment at which a request was due. Default: closed loop, each
                       connection sends when it has its answer
  --zipf S             exponent of the Zipf choices (0.99)
  --invented PERCENT   share of invented ids in `flood` (90)
  --seed N             what sessions and steps are drawn from (1)
  --client-threads N   threads that the clients run on (1)
  --server-threads N   threads that the server runs on (one a core)
  --commands           count MongoDB commands by name as well, for --json; the driver then copies each
                       command, which costs the server some 12 µs
  --quick              everything once and shortly: 64 sessions, one round of 0.2 s

The store under test (ours and compact); what is left out is the store's own default
  --max-bytes BYTES    what the cache may hold
  --max-entries N      the same in sessions (also the naive pair's); `tenfold` sets a tenth of
                       --sessions for both
  --max-staleness S    how old a cached session may be
  --touch-after S      how long a save that moves nothing but the expiry may wait (60)
  --max-in-flight N    how many commands keep MongoDB busy (also of `mongo`)
  --tiny-lfu           keep what is read often, not what was read last; the naive pair does so
  --no-ttl-index       leave expired sessions to somebody else (also of `mongo`; the naive pair has no
                       such index in any case)
  --no-change-stream   do not follow the changes of other instances
  --exclusive          the only instance; `two-instances` is then left out

What comes out: a table, and
  --json FILE          every figure
  --html FILE          a report with plots, in one file
  --plots DIR          each plot as SVG, and run.md with what was run on what and the medians: the page of
                       the guide, which has them from src/guide/plots

Ten million loads and a million saves on one store, in this process
  --soak               of the first of --stores (ours); ends with a line of figures, `ok` or `grows`:
                       more than a tenth and 8 MiB more memory, or a task more, than at the start
  --loads N            (10000000)
  --saves N            (1000000)

  --help               this

RUST_LOG=error in the environment shows on stderr what the servers log.
Exits with 1 if any answer was wrong, or if a soak grows.";

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
}

/// The settings of our store. `None` keeps its own default.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[allow(clippy::struct_excessive_bools, reason = "switches, each by itself")]
pub(crate) struct StoreOptions {
    pub(crate) max_bytes: Option<u64>,
    pub(crate) max_entries: Option<u64>,
    pub(crate) max_staleness: Option<Duration>,
    pub(crate) touch_after: Duration,
    pub(crate) max_in_flight: Option<u32>,
    pub(crate) tiny_lfu: bool,
    pub(crate) ttl_index: bool,
    pub(crate) change_stream: bool,
    pub(crate) exclusive: bool,
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct Soak {
    pub(crate) loads: u64,
    pub(crate) saves: u64,
}

/// What the command line asks for.
pub(crate) enum Asked {
    Run(Box<Options>),
    /// Be the server, which the load test starts by itself.
    Server,
    Help,
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
                max_in_flight: None,
                tiny_lfu: false,
                ttl_index: true,
                change_stream: true,
                exclusive: false,
            },
            json: None,
            html: None,
            plots: None,
            soak: None,
        }
    }
}

pub(crate) fn parse() -> Result<Asked> {
    let mut parser = lexopt::Parser::from_env();
    let mut options = Options::default();
    let (mut soaks, mut soak) = (false, Soak { loads: 10_000_000, saves: 1_000_000 });
    let mut sessions = None;
    while let Some(arg) = parser.next()? {
        match arg {
            Long("stores") => {
                options.stores = list(&mut parser, &Kind::ALL, Kind::key, "store")?;
            }
            Long("scenarios") => {
                options.scenarios = list(&mut parser, &Scenario::ALL, Scenario::key, "scenario")?;
            }
            Long("connections") => options.connections = parser.value()?.parse()?,
            Long("sessions") => sessions = Some(parser.value()?.parse()?),
            Long("size") => options.size = parser.value()?.parse()?,
            Long("rounds") => options.rounds = parser.value()?.parse()?,
            Long("seconds") => options.seconds = parser.value()?.parse()?,
            Long("warm-up") => options.warm_up = parser.value()?.parse()?,
            Long("rate") => options.rate = Some(parser.value()?.parse()?),
            Long("zipf") => options.zipf = parser.value()?.parse()?,
            Long("invented") => options.invented = parser.value()?.parse()?,
            Long("seed") => options.seed = parser.value()?.parse()?,
            Long("client-threads") => options.client_threads = parser.value()?.parse()?,
            Long("server-threads") => options.server_threads = Some(parser.value()?.parse()?),
            Long("commands") => options.name_commands = true,
            Long("quick") => {
                (options.rounds, options.seconds, options.warm_up) = (1, 0.2, 0.05);
                sessions = sessions.or(Some(64));
            }
            Long("max-bytes") => options.store.max_bytes = Some(parser.value()?.parse()?),
            Long("max-entries") => options.store.max_entries = Some(parser.value()?.parse()?),
            Long("max-staleness") => options.store.max_staleness = Some(seconds(&mut parser)?),
            Long("touch-after") => options.store.touch_after = seconds(&mut parser)?,
            Long("max-in-flight") => options.store.max_in_flight = Some(parser.value()?.parse()?),
            Long("tiny-lfu") => options.store.tiny_lfu = true,
            Long("no-ttl-index") => options.store.ttl_index = false,
            Long("no-change-stream") => options.store.change_stream = false,
            Long("exclusive") => options.store.exclusive = true,
            Long("json") => options.json = Some(parser.value()?.into()),
            Long("html") => options.html = Some(parser.value()?.into()),
            Long("plots") => options.plots = Some(parser.value()?.into()),
            Long("soak") => soaks = true,
            Long("loads") => soak.loads = parser.value()?.parse()?,
            Long("saves") => soak.saves = parser.value()?.parse()?,
            Long("help") | Short('h') => return Ok(Asked::Help),
            Value(word) if word == "server" => return Ok(Asked::Server),
            // Cargo passes this to every bench.
            Long("bench") => {}
            other => return Err(other.unexpected().into()),
        }
    }
    options.soak = soaks.then_some(soak);
    options.sessions = sessions.unwrap_or(if soaks { 40_000 } else { options.sessions });
    check(&mut options)?;
    Ok(Asked::Run(Box::new(options)))
}

fn check(options: &mut Options) -> Result<()> {
    if options.connections == 0 || options.rounds == 0 || options.client_threads == 0 {
        bail!("--connections, --rounds and --client-threads must be at least 1");
    }
    if options.server_threads == Some(0) {
        bail!("--server-threads must be at least 1");
    }
    if options.sessions < options.connections {
        bail!("--sessions must be at least --connections: each has sessions of its own");
    }
    if options.size < 80 {
        bail!("--size must be at least 80");
    }
    for (name, value) in [("seconds", options.seconds), ("rate", options.rate.unwrap_or(1.0))] {
        if !(value > 0.0 && value.is_finite()) {
            bail!("--{name} must be above 0");
        }
    }
    for (name, value) in [("warm-up", options.warm_up), ("zipf", options.zipf)] {
        if !(value >= 0.0 && value.is_finite()) {
            bail!("--{name} must not be below 0");
        }
    }
    if options.invented > 100 {
        bail!("--invented is a percentage");
    }
    if options.store.exclusive {
        options.scenarios.retain(|scenario| *scenario != Scenario::TwoInstances);
    }
    if let Some(soak) = options.soak
        && (soak.loads == 0 || soak.saves == 0)
    {
        bail!("--loads and --saves must be at least 1");
    }
    Ok(())
}

/// Names from `all`, separated by commas.
fn list<T: Copy>(
    parser: &mut lexopt::Parser,
    all: &[T],
    key: fn(T) -> &'static str,
    what: &str,
) -> Result<Vec<T>> {
    let text = parser.value()?.string()?;
    let mut found = Vec::new();
    for word in text.split(',').map(str::trim) {
        let Some(item) = all.iter().find(|item| key(**item) == word) else {
            let known: Vec<_> = all.iter().map(|item| key(*item)).collect();
            bail!("there is no {what} `{word}`; there are {}", known.join(", "));
        };
        found.push(*item);
    }
    Ok(found)
}

fn seconds(parser: &mut lexopt::Parser) -> Result<Duration> {
    let seconds: f64 = parser.value()?.parse()?;
    Ok(Duration::try_from_secs_f64(seconds)?)
}
