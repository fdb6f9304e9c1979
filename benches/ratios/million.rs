//! A million sessions in the compact form: their memory, and how fast one of them is found.

use anyhow::{Context, Result};
use tokio::sync::OnceCell;
use tower_sessions_moka_mongodb_store::internals;

use crate::bench::{Bench, Measured};
use crate::fixtures::{self, Shape};
use crate::memory::{self, Child, Found};
use crate::resident;

const SEED: u64 = 7;
const SHAPE: Shape = Shape::Keys(5);

/// The memory of moka's own entry and of ours, besides the encoded data.
const BESIDE: f64 = 450.0;

/// Measured once for the two figures that need it.
static MILLION: OnceCell<Million> = OnceCell::const_new();

/// The measurement for both figures.
#[derive(Clone, Copy)]
pub(crate) struct Million {
    found: Found,
    /// Average size of a session's data in the compact form, in bytes.
    encoded: f64,
}

impl Million {
    async fn of(bench: &Bench) -> Result<Self> {
        let uri = bench.uri();
        let count = bench.size(1_000_000, 10_000);
        let driver = fixtures::driver(&uri).await?;
        fixtures::indexed(&uri).await?;
        fixtures::fill(&driver, SEED, SHAPE, count).await?;
        let hits = Some((bench.rounds, bench.size(51, 3)));
        let child = Child { uri, seed: SEED, shape: SHAPE, count, compact: true, hits };
        let found = child.start().await?;
        let length = |number| internals::compact_len(&SHAPE.data(number));
        let lengths: Option<Vec<_>> = (0..count).map(length).collect();
        let lengths = lengths.context("each session has a compact form")?;
        let encoded = memory::count(lengths.iter().sum()) / memory::count(count);
        // Clean up in case the server stays. This may take longer than the driver waits.
        if driver.drop().await.is_err() {
            eprintln!("  the server did not drop the sessions in time");
        }
        Ok(Self { found, encoded })
    }
}

async fn taken(bench: &Bench) -> Result<Option<Million>> {
    if resident::resident().is_none() {
        return Ok(None);
    }
    MILLION.get_or_try_init(|| Million::of(bench)).await.copied().map(Some)
}

fn skipped() -> Measured {
    Measured::Skipped("this system does not report the memory of a process".into())
}

pub(crate) async fn memory(bench: Bench) -> Result<Measured> {
    let Some(Million { found, encoded }) = taken(&bench).await? else { return Ok(skipped()) };
    let each = found.resident / found.sessions;
    let held = found.held / found.sessions;
    eprintln!(
        "  {each:.0} resident bytes for each of {} sessions of {encoded:.0} encoded bytes; the store \
         reports {held:.0}",
        found.sessions
    );
    Ok(Measured::Value(each / (encoded + BESIDE)))
}

pub(crate) async fn hit(bench: Bench) -> Result<Measured> {
    let Some(million) = taken(&bench).await? else { return Ok(skipped()) };
    Ok(Measured::Value(million.found.hit.context("the child took the hits")?))
}
