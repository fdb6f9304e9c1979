//! The memory of the cache, in a process that does nothing else.

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
use crate::hits;
use crate::resident::{self, Gauges};
use crate::rounds::{Rounds, Side};

/// If this variable is set, this program is the child. It is not an argument: a URI may contain a
/// password, and a list of processes shows arguments.
const CHILD: &str = "SESSION_RATIOS_CHILD";

/// The task of a child.
#[derive(Serialize, Deserialize)]
pub(crate) struct Child {
    pub(crate) uri: String,
    pub(crate) seed: u64,
    pub(crate) shape: Shape,
    /// The number of sessions that it loads.
    pub(crate) count: usize,
    pub(crate) compact: bool,
    /// The number of rounds of hits afterwards, and the number of blocks in each round.
    pub(crate) hits: Option<(usize, usize)>,
}

/// Its results.
#[derive(Clone, Copy, Serialize, Deserialize)]
pub(crate) struct Found {
    /// By how much the process has grown, in bytes.
    pub(crate) resident: f64,
    /// By how much the cache has grown according to the store.
    pub(crate) held: f64,
    /// The number of sessions in both.
    pub(crate) sessions: f64,
    /// A hit among all sessions divided by a hit among a thousand.
    pub(crate) hit: Option<f64>,
}

/// Sessions that are loaded first, so that the store's own memory is already allocated.
const FIRST: usize = 1_000;

impl Child {
    pub(crate) fn of_environment() -> Option<Self> {
        serde_json::from_str(&std::env::var(CHILD).ok()?).ok()
    }

    /// Runs it in another process.
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

    /// The work of the other process.
    pub(crate) async fn run(self) -> Result<()> {
        let gauges = Gauges::install()?;
        // On a busy machine, slow calls are not what this measures.
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
            Some((rounds, blocks)) => Some(hits_among_all(&self, &ours, rounds, blocks).await?),
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

    /// Loads the sessions of these numbers, many at a time.
    async fn load(&self, ours: &CachedMongoStore, first: usize, end: usize) -> Result<()> {
        let next = Arc::new(AtomicUsize::new(first));
        let mut tasks = JoinSet::new();
        for _ in 0..64 {
            let ours = ours.clone();
            let next = Arc::clone(&next);
            let seed = self.seed;
            tasks.spawn(async move {
                loop {
                    let number = next.fetch_add(1, Ordering::Relaxed);
                    if number >= end {
                        return anyhow::Ok(());
                    }
                    ours.load(&fixtures::id(seed, number)).await?.context("it was stored")?;
                    if number > 0 && number.is_multiple_of(100_000) {
                        eprintln!("  {number} of {end} sessions loaded");
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

/// Hits on random sessions among all that `ours` holds, divided by hits on random sessions among a
/// thousand in another store.
async fn hits_among_all(
    child: &Child,
    ours: &CachedMongoStore,
    rounds: usize,
    blocks: usize,
) -> Result<f64> {
    const BLOCK: usize = 1_000;
    const FEW: usize = 1_000;
    let few = fixtures::cached(&child.uri, true).await?;
    let mut random = fastrand::Rng::with_seed(child.seed);
    let mut among = |held: usize| -> Vec<_> {
        (0..BLOCK).map(|_| fixtures::id(child.seed, random.usize(..held))).collect()
    };
    let all_few: Vec<_> = (0..FEW).map(|number| fixtures::id(child.seed, number)).collect();
    hits::loads(&few, &all_few).await?;
    let mut measured = Rounds::default();
    for _ in 0..rounds {
        for _ in 0..blocks {
            let wide = among(child.count);
            let narrow = among(FEW);
            for side in measured.turn() {
                let time = match side {
                    Side::Ours => hits::loads(ours, &wide).await?,
                    Side::Theirs => hits::loads(&few, &narrow).await?,
                };
                measured.took(side, time, BLOCK);
            }
            tokio::task::yield_now().await;
        }
        measured.ends();
    }
    measured.tell(&format!("a hit among {}", child.count), "a hit among 1000");
    few.shutdown().await;
    Ok(measured.ratio())
}

struct Sizes {
    resident: f64,
    held: f64,
    entries: f64,
}

impl Sizes {
    #[allow(clippy::cast_precision_loss, reason = "a figure to read")]
    async fn read(ours: &CachedMongoStore, gauges: &Gauges) -> Result<Self> {
        // When the server replies to this, all earlier commands have ended.
        ours.estimated_length().await?;
        Ok(Self {
            resident: resident::resident()
                .context("this system does not report the memory of a process")?
                as f64,
            held: gauges.value("session_store_cache_bytes"),
            entries: gauges.value("session_store_cache_entries"),
        })
    }
}

/// The bytes of the cache according to the store, divided by the bytes by which the process has
/// grown: the worst of several shapes in both forms.
pub(crate) async fn weighed(bench: Bench) -> Result<Measured> {
    const SEED: u64 = 6;
    if resident::resident().is_none() {
        return Ok(Measured::Skipped("this system does not report the memory of a process".into()));
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
        // Compact entries are small, so more of them are needed.
        let forms = [(false, count), (true, bench.size(3, 1) * count)];
        fixtures::indexed(&uri).await?;
        fixtures::fill(&fixtures::driver(&uri).await?, SEED, shape, forms[1].1).await?;
        for (compact, count) in forms {
            let uri = uri.clone();
            let found =
                Child { uri, seed: SEED, shape, count, compact, hits: None }.start().await?;
            let ratio = found.held / found.resident;
            eprintln!(
                "  {shape:?}, {}: {:.0} bytes reported of {:.0} resident for a session: {ratio:.3}",
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
        _ => bail!("the memory did not grow"),
    }
}

#[allow(clippy::cast_precision_loss, reason = "a figure to read")]
pub(crate) fn count(count: usize) -> f64 {
    count as f64
}
