//! The number of instructions of a cached load, counted by valgrind, each with a bound.
//!
//! `cargo bench --bench instructions -- [--require] [--only NAME]…`
//!
//! Prints `instructions NAME COUNT bound BOUND ok|over` for each case, and fails if one is over. A
//! count does not depend on how busy the machine is. It repeats from run to run to within two in a
//! thousand: the hash tables' seeds are random, and moka's maintenance reads the clock. It depends
//! on the build, so there is one bound for release builds (`bench`) and one for debug builds
//! (`--profile dev`, which CI has built). It depends a little on the processor and the C library,
//! so the bounds leave some room. Valgrind has no SHA instructions, so the digest counts as the
//! portable one, which needs more instructions than a modern processor does.
//!
//! The program runs itself under callgrind. That counts only what runs inside of [`counted_hits`]
//! on that one thread, without the set-up and without the store's background tasks. If valgrind is
//! not installed, the program prints that and succeeds, unless `--require` is given.
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a bench prints what it counted")]

use std::collections::HashMap;
use std::hint::black_box;
use std::process::{Command, ExitCode};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use futures::FutureExt;
use moka::sync::Cache;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use time::OffsetDateTime;
use tower_sessions::SessionStore;
use tower_sessions::session::{Id, Record};
use tower_sessions_moka_mongodb_store::{CachedMongoStore, MongoStore, in_request_scope};

/// The load that is counted, and the cache that serves it.
struct Case {
    name: &'static str,
    keys: usize,
    from: Source,
    /// For a release build and a debug build. `None` for a case that is only a comparison.
    bounds: Option<[u64; 2]>,
}

#[derive(Clone, Copy, Serialize, Deserialize)]
enum Source {
    Plain,
    Compact,
    /// As `Plain`, with a request scope for each load.
    Scoped,
    /// SHA-256, moka and a clone.
    Floor,
}

const CASES: [Case; 6] = [
    Case { name: "hit_1", keys: 1, from: Source::Plain, bounds: Some([7_400, 51_900]) },
    Case { name: "hit_5", keys: 5, from: Source::Plain, bounds: Some([15_600, 75_100]) },
    Case { name: "hit_20", keys: 20, from: Source::Plain, bounds: Some([46_500, 162_500]) },
    Case { name: "hit_compact_5", keys: 5, from: Source::Compact, bounds: Some([22_500, 134_600]) },
    Case { name: "hit_scoped_5", keys: 5, from: Source::Scoped, bounds: Some([16_300, 90_000]) },
    Case { name: "floor_5", keys: 5, from: Source::Floor, bounds: None },
];

/// If this variable is set, this program is the one that is counted.
const CHILD: &str = "SESSION_INSTRUCTIONS_CHILD";

/// Keeps all blocks that a hit frees for the next hit. By default glibc keeps seven blocks of a
/// size, and the cost of freeing the others depends on their neighbours, which are random.
const ROOM_FOR_BLOCKS: &str = "glibc.malloc.tcache_count=127";

/// Enough that the extra work of the first hit does not count. A multiple of the number of hits
/// after which moka does its maintenance.
const HITS: u64 = 1_600;

const PATIENCE: Duration = Duration::from_secs(60);

fn main() -> Result<ExitCode> {
    if let Some(child) = Child::of_environment() {
        child.run()?;
        return Ok(ExitCode::SUCCESS);
    }
    let options = Options::parse()?;
    let Some(valgrind) = valgrind() else {
        eprintln!(
            "there is no valgrind, so nothing is counted; to install it: apt-get install valgrind \
             (Debian, Ubuntu), dnf install valgrind (Fedora)"
        );
        return Ok(if options.required { ExitCode::FAILURE } else { ExitCode::SUCCESS });
    };
    let server = session_test_server::shared_fast()?;
    let profile = if cfg!(debug_assertions) { "debug" } else { "release" };
    eprintln!("{valgrind}, {profile} build, server: {}", server.description());
    let mut over = false;
    for case in CASES.iter().filter(|case| options.chosen(case.name)) {
        let uri = server.uri_for(&session_test_server::fresh_database());
        let counted = Child { uri, keys: case.keys, from: case.from }.count()? / HITS;
        ensure!(counted > 0, "nothing was counted: does the build have its symbols?");
        let Some(bounds) = case.bounds else {
            eprintln!("to compare with: {} {counted}", case.name);
            continue;
        };
        let bound = bounds[usize::from(cfg!(debug_assertions))];
        let verdict = if counted <= bound { "ok" } else { "over" };
        println!("instructions {} {counted} bound {bound} {verdict}", case.name);
        over |= counted > bound;
    }
    Ok(if over { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

/// Its version, if it is installed.
fn valgrind() -> Option<String> {
    let version = Command::new("valgrind").arg("--version").output().ok()?;
    version.status.success().then(|| String::from_utf8_lossy(&version.stdout).trim().to_owned())
}

#[derive(Default)]
struct Options {
    required: bool,
    only: Vec<String>,
}

impl Options {
    fn parse() -> Result<Self> {
        use lexopt::ValueExt;

        let mut options = Self::default();
        let mut args = lexopt::Parser::from_env();
        while let Some(arg) = args.next()? {
            match arg {
                lexopt::Arg::Long("require") => options.required = true,
                lexopt::Arg::Long("only") => options.only.push(args.value()?.string()?),
                // Cargo passes this to every bench.
                lexopt::Arg::Long("bench") => {}
                other => return Err(other.unexpected().into()),
            }
        }
        let unknown = |name: &&String| CASES.iter().all(|case| case.name != **name);
        if let Some(name) = options.only.iter().find(unknown) {
            bail!("nothing is counted under the name `{name}`");
        }
        Ok(options)
    }

    fn chosen(&self, name: &str) -> bool {
        self.only.is_empty() || self.only.iter().any(|only| only == name)
    }
}

/// One run under valgrind.
#[derive(Serialize, Deserialize)]
struct Child {
    uri: String,
    keys: usize,
    from: Source,
}

impl Child {
    fn of_environment() -> Option<Self> {
        serde_json::from_str(&std::env::var(CHILD).ok()?).ok()
    }

    /// The number of instructions of all of its hits.
    fn count(&self) -> Result<u64> {
        let child = Command::new("valgrind")
            .args(["--tool=callgrind", "--callgrind-out-file=/dev/null"])
            .arg("--toggle-collect=*counted_hits*")
            .arg(std::env::current_exe()?)
            .env(CHILD, serde_json::to_string(self)?)
            .env("GLIBC_TUNABLES", ROOM_FOR_BLOCKS)
            .output()?;
        let said = String::from_utf8_lossy(&child.stderr);
        ensure!(child.status.success(), "the counted process failed:\n{said}");
        let line = said.lines().find_map(|line| line.split_once("Collected :"));
        let (_, count) = line.context("callgrind says what it has collected")?;
        Ok(count.trim().parse()?)
    }

    fn run(&self) -> Result<()> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let mut record = record(self.keys);
        if let Source::Floor = self.from {
            let floor = Cache::new(10_000);
            floor.insert(digest(record.id), record.clone());
            let load = || {
                let found: Option<Record> = floor.get(&digest(*black_box(&record.id)));
                drop(black_box(found.context("it is there")?));
                Ok(())
            };
            return counted_hits(load);
        }
        let store = runtime.block_on(async {
            // Valgrind makes everything slow, but not the clock.
            let mongo = MongoStore::builder().uri(&self.uri).operation_timeout(PATIENCE);
            let builder = CachedMongoStore::builder(mongo.build().await?);
            let builder = builder.max_staleness(60 * PATIENCE);
            let store = builder.compact(matches!(self.from, Source::Compact)).build().await?;
            store.create(&mut record).await?;
            anyhow::Ok(store)
        })?;
        let is_scoped = matches!(self.from, Source::Scoped);
        let load = || {
            let load = store.load(black_box(&record.id));
            // A hit does not wait for anything.
            let loaded =
                if is_scoped { in_request_scope(load).now_or_never() } else { load.now_or_never() };
            drop(black_box(loaded.context("it is a hit")??.context("it is there")?));
            Ok(())
        };
        counted_hits(load)
    }
}

/// Valgrind counts the instructions inside of this function, which it finds by its name.
#[inline(never)]
fn counted_hits(mut load: impl FnMut() -> Result<()>) -> Result<()> {
    for _ in 0..HITS {
        load()?;
    }
    Ok(())
}

fn digest(id: Id) -> [u8; 32] {
    Sha256::digest(id.0.to_le_bytes()).into()
}

/// The same data as in `cargo bench --bench ratios`.
fn record(keys: usize) -> Record {
    let small = |key: usize| json!({ "id": key, "name": "a visitor's name", "at": [key, 1.5] });
    let data: HashMap<String, Value> =
        (0..keys).map(|key| (format!("key_{key:02}"), small(key))).collect();
    let expiry_date = OffsetDateTime::now_utc() + time::Duration::days(14);
    Record { id: Id::default(), data, expiry_date }
}
