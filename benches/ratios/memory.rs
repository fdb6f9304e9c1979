//! What the cache takes, in a process that does nothing else.

use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};
use tokio::task::JoinSet;
use tower_sessions::SessionStore;
use tower_sessions_moka_mongodb_store::{CachedMongoStore, MongoStore};

use crate::bench::{Bench, Measured};
use crate::fixtures::{self, Shape};
use crate::million;
use crate::resident::{self, Gauges};

/// The variable that makes this program the child of itself. Not an argument: a URI may hold a
/// password, which a list of processes would show.
const CHILD: &str = "SESSION_RATIOS_CHILD";

/// What a child is to do.
#[derive(Serialize, Deserialize)]
pub(crate) struct Child {
    pub(crate) uri: String,
    pub(crate) seed: u64,
    pub(crate) shape: Shape,
    /// How many sessions it loads.
    pub(crate) count: usize,
    pub(crate) compact: bool,
    /// How many rounds of hits it takes afterwards, and how many blocks there are in one.
    pub(crate) hits: Option<(usize, usize)>,
}

/// What it has found.
#[derive(Clone, Copy, Serialize, Deserialize)]
pub(crate) struct Found {
    /// By how much the process has grown, in bytes.
    pub(crate) resident: f64,
    /// By how much the store says that its cache has grown.
    pub(crate) held: f64,
    /// For how many sessions that was.
    pub(crate) sessions: f64,
    /// A hit among all against one among a thousand.
    pub(crate) hit: Option<f64>,
}

/// Sessions that are read before, so that what a store takes for itself is there already.
const FIRST: usize = 1_000;

impl Child {
    pub(crate) fn of_environment() -> Option<Self> {
        serde_json::from_str(&std::env::var(CHILD).ok()?).ok()
    }

    /// Runs it, in another process.
    pub(crate) async fn start(&self) -> Result<Found> {
        let child = tokio::process::Command::new(std::env::current_exe()?)
            .env(CHILD, serde_json::to_string(self)?)
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()?;
        let child = child.wait_with_output().await?;
        ensure!(child.status.success(), "the child process failed: {}", child.status);
        Ok(serde_json::from_slice(&child.stdout)?)
    }

    /// What the other process does.
    pub(crate) async fn run(self) -> Result<()> {
        let gauges = Gauges::install()?;
        // What takes so long on a busy machine is not what is measured here.
        let patience = std::time::Duration::from_secs(60);
        let mongo = MongoStore::builder().uri(&self.uri).operation_timeout(patience);
        let mongo = mongo.build().await?;
        let builder = CachedMongoStore::builder(mongo).max_bytes(64 << 30);
        let ours = fixtures::form(builder, self.compact).build().await?;
        self.load(&ours, 0, FIRST.min(self.count)).await?;
        let before = Sizes::read(&ours, &gauges).await?;
        self.load(&ours, FIRST, self.count).await?;
        let after = Sizes::read(&ours, &gauges).await?;
        ensure!(after.entries >= count(self.count), "not all sessions are held");
        let hit = match self.hits {
            Some((rounds, blocks)) => Some(million::hits(&self, &ours, rounds, blocks).await?),
            None => None,
        };
        let found = Found {
            resident: after.resident - before.resident,
            held: after.held - before.held,
            sessions: after.entries - before.entries,
            hit,
        };
        println!("{}", serde_json::to_string(&found)?);
        Ok(())
    }

    /// Reads the sessions of these numbers, many at a time.
    async fn load(&self, ours: &CachedMongoStore, first: usize, end: usize) -> Result<()> {
        let (next, mut tasks) = (Arc::new(AtomicUsize::new(first)), JoinSet::new());
        for _ in 0..64 {
            let (ours, next, seed) = (ours.clone(), Arc::clone(&next), self.seed);
            tasks.spawn(async move {
                loop {
                    let number = next.fetch_add(1, Ordering::Relaxed);
                    if number >= end {
                        return anyhow::Ok(());
                    }
                    ours.load(&fixtures::id(seed, number)).await?.context("it was stored")?;
                    if number > 0 && number.is_multiple_of(100_000) {
                        eprintln!("  {number} of {end} sessions read");
                    }
                }
            });
        }
        while let Some(ended) = tasks.join_next().await {
            ended??;
        }
        Ok(())
    }
}

struct Sizes {
    resident: f64,
    held: f64,
    entries: f64,
}

impl Sizes {
    #[allow(clippy::cast_precision_loss, reason = "a figure to read")]
    async fn read(ours: &CachedMongoStore, gauges: &Gauges) -> Result<Self> {
        // An answer of the server: whatever was under way before has ended.
        ours.estimated_length().await?;
        Ok(Self {
            resident: resident::resident().context("this system does not say")? as f64,
            held: gauges.value("session_store_cache_bytes"),
            entries: gauges.value("session_store_cache_entries"),
        })
    }
}

/// Bytes that the store says it holds, against those by which the process has grown: the worst of
/// several shapes in both forms.
pub(crate) async fn weighed(bench: Bench) -> Result<Measured> {
    const SEED: u64 = 6;
    if resident::resident().is_none() {
        return Ok(Measured::Skipped("this system does not say what a process takes".into()));
    }
    let full = [
        (Shape::Keys(1), 80_000),
        (Shape::Keys(5), 40_000),
        (Shape::Keys(20), 20_000),
        (Shape::Text(2_000), 30_000),
        (Shape::Numbers(200), 30_000),
    ];
    let shapes = if bench.quick { &[(Shape::Keys(5), 3_000)][..] } else { &full[..] };
    let mut worst: Option<f64> = None;
    for &(shape, count) in shapes {
        let uri = bench.uri();
        // Compact ones are small, so it takes more of them.
        let forms = [(false, count), (true, bench.size(3, 1) * count)];
        fixtures::indexed(&uri).await?;
        fixtures::fill(&fixtures::driver(&uri).await?, SEED, shape, forms[1].1).await?;
        for (compact, count) in forms {
            let uri = uri.clone();
            let found =
                Child { uri, seed: SEED, shape, count, compact, hits: None }.start().await?;
            let ratio = found.held / found.resident;
            eprintln!(
                "  {shape:?}, {}: {:.0} bytes held of {:.0} resident for a session: {ratio:.3}",
                if compact { "compact" } else { "plain" },
                found.held / found.sessions,
                found.resident / found.sessions,
            );
            if worst.is_none_or(|worst| ratio.ln().abs() > worst.ln().abs()) {
                worst = Some(ratio);
            }
        }
    }
    match worst {
        Some(worst) if worst.is_finite() => Ok(Measured::Value(worst)),
        _ => bail!("no memory was taken"),
    }
}

#[allow(clippy::cast_precision_loss, reason = "a figure to read")]
pub(crate) fn count(count: usize) -> f64 {
    count as f64
}
