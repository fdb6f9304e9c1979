//! The command line: its help text and its parser.

use std::time::Duration;

use anyhow::{Result, bail};
use lexopt::prelude::{Long, Short, Value, ValueExt};

use crate::kind::Kind;
use crate::options::{Options, Soak};
use crate::scenario::Scenario;

pub(crate) const HELP: &str = "\
A load test of session stores: an Axum server in a process of its own, clients that keep their
connections, and a check of every response. It uses the server of MONGODB_URI, or starts a test
server.

cargo bench --bench load -- [OPTIONS]

The run
  --stores LIST        in-memory, mongo, naive, ours, compact (default: all)
  --scenarios LIST     bare, read, read-zipf, read-mostly, write, always-save, log-in, stampede,
                       tenfold, tenfold-zipf, flood, two-instances (default: all)
  --connections N      keep-alive connections, each with its own sessions (32)
  --sessions N         sessions, at least one for each connection (1000; with --soak 40000)
  --size BYTES         size of a session's data as JSON, at least 80 (502)
  --rounds N           rounds of each store; the stores take turns (5)
  --seconds S          length of a round (1.0)
  --warm-up S          unmeasured time of each store before each of its rounds (1.0)
  --rate R             open loop: R requests a second, however long the responses take. A latency
                       counts from the time at which the request was due. Default: closed loop, each
                       connection sends its next request when it has its response
  --zipf S             exponent of the Zipf distribution (0.99)
  --invented PERCENT   share of invented ids in `flood` (90)
  --seed N             seed of the random sessions and steps (1)
  --client-threads N   threads of the clients (1)
  --server-threads N   threads of the server (default: one for each core)
  --commands           count MongoDB commands by name as well, for --json. The driver then copies each
                       command, which costs the server about 12 µs
  --quick              everything once and briefly: 64 sessions, one round of 0.2 s

The tested store (ours and compact). Without an option, the store's own default applies
  --max-bytes BYTES    limit of the cache in bytes
  --max-entries N      limit of the cache in sessions (also for the naive pair); `tenfold` sets a
                       tenth of --sessions for both
  --max-staleness S    how old a cached session may be
  --touch-after S      how long a save that only changes the expiry may wait (60)
  --max-in-flight N    how many commands may be in flight (also for `mongo`)
  --tiny-lfu           evict what is read rarely, not what was read long ago, like the naive pair
  --no-ttl-index       do not remove expired sessions (also for `mongo`; the naive pair never does)
  --no-change-stream   do not receive the changes of other instances
  --sole-writer        the store is the only instance; `two-instances` is left out

The output: a table, and
  --json FILE          every figure
  --html FILE          a report with plots, in one file
  --plots DIR          each plot as SVG, and run.md with the machine and the medians. The page of the
                       guide includes them from src/guide/plots

Ten million loads and a million saves on one store, in this process
  --soak               uses the first of --stores (ours). It ends with a line of figures, `ok` or
                       `grows`: a tenth and 8 MiB more memory, or one task more, than at the start
  --loads N            (10000000)
  --saves N            (1000000)

How many of parallel views of one session each store counts, in one process and in two
  --lost-updates       100 rounds of 8 parallel views. The exit code is 1 if our store loses one with
                       the RequestScopeLayer

  --help               this text

With RUST_LOG=error in the environment, the log of the servers goes to stderr.
The exit code is 1 if a response was wrong, or if a soak grows.";

/// What the command line asks for.
pub(crate) enum Asked {
    Run(Box<Options>),
    /// Be the server, which the load test starts by itself.
    Server,
    Help,
}

pub(crate) fn parse() -> Result<Asked> {
    let mut parser = lexopt::Parser::from_env();
    let mut options = Options::default();
    let mut soaks = false;
    let mut soak = Soak { loads: 10_000_000, saves: 1_000_000 };
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
                options.rounds = 1;
                options.seconds = 0.2;
                options.warm_up = 0.05;
                sessions = sessions.or(Some(64));
            }
            Long("max-bytes") => options.store.max_bytes = Some(parser.value()?.parse()?),
            Long("max-entries") => options.store.max_entries = Some(parser.value()?.parse()?),
            Long("max-staleness") => options.store.max_staleness = Some(seconds(&mut parser)?),
            Long("touch-after") => options.store.touch_after = seconds(&mut parser)?,
            Long("max-in-flight") => {
                options.store.max_commands_in_flight = Some(parser.value()?.parse()?);
            }
            Long("tiny-lfu") => options.store.tiny_lfu = true,
            Long("no-ttl-index") => options.store.ttl_index = false,
            Long("no-change-stream") => options.store.change_stream = false,
            Long("sole-writer") => options.store.sole_writer = true,
            Long("json") => options.json = Some(parser.value()?.into()),
            Long("html") => options.html = Some(parser.value()?.into()),
            Long("plots") => options.plots = Some(parser.value()?.into()),
            Long("soak") => soaks = true,
            Long("loads") => soak.loads = parser.value()?.parse()?,
            Long("saves") => soak.saves = parser.value()?.parse()?,
            Long("lost-updates") => options.lost_updates = true,
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
    if options.store.sole_writer {
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
