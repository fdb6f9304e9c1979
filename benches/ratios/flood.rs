//! The effect of invented ids on the cached sessions of visitors.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use tokio::task::JoinSet;
use tower_sessions::SessionStore;
use tower_sessions::session::Id;
use tower_sessions_moka_mongodb_store::{CachedMongoStore, EvictionPolicy};

use crate::bench::{Bench, Measured};
use crate::fixtures::{self, Commands, Shape};

const SEED: u64 = 5;
/// The number of cached sessions. The working set is as large, so it fits.
const HELD: u64 = 1_000;
const LIVE: usize = 800;
const TASKS: usize = 32;
/// Invented ids for each request of a visitor.
const INVENTED: usize = 10;

/// The ratio of the hit rates. It is that of the eviction policy for which it is worse.
pub(crate) async fn hit_rate(bench: Bench) -> Result<Measured> {
    let mut worst = f64::INFINITY;
    for policy in [EvictionPolicy::Lru, EvictionPolicy::TinyLfu] {
        let ratio = of(&bench, policy).await?;
        eprintln!("  {policy:?}: {ratio:.4}");
        worst = worst.min(ratio);
    }
    Ok(Measured::Value(worst))
}

#[allow(clippy::cast_precision_loss, reason = "a figure to read")]
async fn of(bench: &Bench, policy: EvictionPolicy) -> Result<f64> {
    let uri = bench.uri();
    let commands = Commands::default();
    let builder = CachedMongoStore::builder(commands.mongo(&uri).await?);
    let ours = builder.eviction_policy(policy).max_entries(HELD).build().await?;
    fixtures::fill(&fixtures::driver(&uri).await?, SEED, Shape::Keys(2), LIVE).await?;
    let ids: Arc<[Id]> = (0..LIVE).map(|number| fixtures::id(SEED, number)).collect();
    let keys: Vec<_> = ids.iter().map(|id| fixtures::key(*id).bytes).collect();
    for id in &*ids {
        ours.load(id).await?.context("it was stored")?;
    }
    commands.take_asked(&keys);
    // Loads of live sessions, and the loads among them that went to the server.
    let mut loads = [0_usize; 2];
    let mut asked = [0_usize; 2];
    let each = bench.size(100, 5);
    for _ in 0..bench.rounds {
        for (side, invented) in [0, INVENTED].into_iter().enumerate() {
            visitors(&ours, &ids, each, invented).await?;
            loads[side] += TASKS * each;
            asked[side] += commands.take_asked(&keys);
        }
    }
    let rate = |side: usize| 1.0 - asked[side] as f64 / loads[side] as f64;
    eprintln!("  {policy:?}: hit rate {:.4} without, {:.4} with a flood", rate(0), rate(1));
    ensure!(rate(0) > 0.0, "nothing is served from the cache");
    ours.shutdown().await;
    Ok(rate(1) / rate(0))
}

/// Each task makes `loads` loads, each followed by loads of ids that no store has issued.
async fn visitors(
    ours: &CachedMongoStore,
    ids: &Arc<[Id]>,
    each: usize,
    invented: usize,
) -> Result<()> {
    let mut tasks = JoinSet::new();
    for _ in 0..TASKS {
        let ours = ours.clone();
        let ids = Arc::clone(ids);
        tasks.spawn(async move {
            for _ in 0..each {
                let id = &ids[fastrand::usize(..ids.len())];
                ours.load(id).await?.context("a live session was not found")?;
                for _ in 0..invented {
                    ensure!(ours.load(&Id::default()).await?.is_none(), "an invented id was found");
                }
                // Like the think time of a visitor, so that no task monopolizes the machine.
                tokio::task::yield_now().await;
            }
            anyhow::Ok(())
        });
    }
    let ended = async {
        while let Some(ended) = tasks.join_next().await {
            ended??;
        }
        anyhow::Ok(())
    };
    tokio::time::timeout(Duration::from_secs(600), ended)
        .await
        .context("the flood went on and on")?
}
