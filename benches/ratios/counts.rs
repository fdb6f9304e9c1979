//! Counts the commands that are sent to the server.

use std::sync::Arc;

use anyhow::{Context, Result};
use tokio::sync::Barrier;
use tokio::task::JoinSet;
use tower_sessions::SessionStore;
use tower_sessions_moka_mongodb_store::CachedMongoStore;

use crate::bench::{Bench, Measured};
use crate::fixtures::{self, Commands, Shape};

const SEED: u64 = 4;

/// The number of finds in the worst round.
#[allow(clippy::cast_precision_loss, reason = "a figure to read")]
pub(crate) async fn stampede(bench: Bench) -> Result<Measured> {
    const LOADS: usize = 1_000;
    let uri = bench.uri();
    let commands = Commands::default();
    let ours = CachedMongoStore::builder(commands.mongo(&uri).await?).build().await?;
    fixtures::fill(&fixtures::driver(&uri).await?, SEED, Shape::Keys(5), bench.rounds).await?;
    let mut worst = 0;
    for round in 0..bench.rounds {
        let id = fixtures::id(SEED, round);
        let before = commands.finds();
        let start = Arc::new(Barrier::new(LOADS));
        let mut tasks = JoinSet::new();
        for _ in 0..LOADS {
            let ours = ours.clone();
            let start = Arc::clone(&start);
            tasks.spawn(async move {
                start.wait().await;
                ours.load(&id).await?.context("it was stored")
            });
        }
        while let Some(loaded) = tasks.join_next().await {
            loaded??;
        }
        let finds = commands.finds() - before;
        eprintln!("  {finds} finds for {LOADS} loads");
        worst = worst.max(finds);
    }
    ours.shutdown().await;
    Ok(Measured::Value(worst as f64))
}
