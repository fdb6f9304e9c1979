//! A million sessions in the compact form: their memory, and how fast one of them is found.

use anyhow::{Context, Result};
use tower_sessions_moka_mongodb_store::{CachedMongoStore, internals};

use crate::bench::{Bench, Measured};
use crate::fixtures::{self, Shape};
use crate::memory::{self, Child, Found};
use crate::rounds::{Rounds, Side};
use crate::{hits, resident};

const SEED: u64 = 7;
const SHAPE: Shape = Shape::Keys(5);

/// The memory of moka's own entry and of ours, besides the encoded data.
const BESIDE: f64 = 450.0;

/// The measurement for both figures.
#[derive(Clone, Copy)]
pub(crate) struct Million {
    found: Found,
    /// Average size of a session's data in the compact form, in bytes.
    encoded: f64,
}

impl Million {
    async fn of(bench: &Bench) -> Result<Self> {
        let (uri, count) = (bench.uri(), bench.size(1_000_000, 10_000));
        let driver = fixtures::driver(&uri).await?;
        fixtures::indexed(&uri).await?;
        fixtures::fill(&driver, SEED, SHAPE, count).await?;
        let hits = Some((bench.rounds, bench.size(51, 3)));
        let child = Child { uri, seed: SEED, shape: SHAPE, count, compact: true, hits };
        let found = child.start().await?;
        let packed = |number| internals::packed_len(&SHAPE.data(number));
        let packed: Option<Vec<_>> = (0..count).map(packed).collect();
        let packed = packed.context("each can be packed")?;
        let encoded = memory::count(packed.iter().sum()) / memory::count(count);
        // Clean up in case the server stays. This may take longer than the driver waits.
        if driver.drop().await.is_err() {
            eprintln!("  the server has not dropped the sessions in time");
        }
        Ok(Self { found, encoded })
    }
}

async fn taken(bench: &Bench) -> Result<Option<Million>> {
    if resident::resident().is_none() {
        return Ok(None);
    }
    bench.million.get_or_try_init(|| Million::of(bench)).await.copied().map(Some)
}

fn skipped() -> Measured {
    Measured::Skipped("this system does not say what a process takes".into())
}

pub(crate) async fn memory(bench: Bench) -> Result<Measured> {
    let Some(Million { found, encoded }) = taken(&bench).await? else { return Ok(skipped()) };
    let (each, held) = (found.resident / found.sessions, found.held / found.sessions);
    eprintln!(
        "  {each:.0} bytes resident for each of {} sessions of {encoded:.0} bytes encoded; the store \
         says {held:.0}",
        found.sessions
    );
    Ok(Measured::Value(each / (encoded + BESIDE)))
}

pub(crate) async fn hit(bench: Bench) -> Result<Measured> {
    let Some(million) = taken(&bench).await? else { return Ok(skipped()) };
    Ok(Measured::Value(million.found.hit.context("the child took the hits")?))
}

/// Hits on random sessions among all that `ours` holds, divided by hits on random sessions among a
/// thousand in another store.
pub(crate) async fn hits(
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
            let (wide, narrow) = (among(child.count), among(FEW));
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
