//! Many tasks at once, beside as many tasks that use the driver's own operations.

use std::hint::black_box;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use futures::FutureExt;
use mongodb::Collection;
use mongodb::bson::{Document, doc};
use serde_json::json;
use tokio::task::JoinSet;
use tower_sessions::SessionStore;
use tower_sessions_moka_mongodb_store::{CachedMongoStore, in_request_scope, mongodb};

use crate::bench::{Bench, Measured};
use crate::fixtures::{self, Commands, Shape};
use crate::rounds::{Rounds, Side};

const SEED: u64 = 3;
const THEIRS: u64 = 103;
const SHAPE: Shape = Shape::Keys(5);
const TASKS: usize = 128;
/// The number of blocks in a round.
const BLOCKS: usize = 3;

pub(crate) async fn load(bench: Bench) -> Result<Measured> {
    let uri = bench.uri();
    let each = bench.size(16, 2);
    let driver = fixtures::driver(&uri).await?;
    let ours = fixtures::cached(&uri, false).await?;
    fixtures::fill(&driver, SEED, SHAPE, (bench.rounds * BLOCKS + 1) * TASKS * each).await?;
    let ours = &ours;
    let driver = &driver;
    let rounds = Rounds::run([bench.rounds, BLOCKS, TASKS * each], |side, block| {
        async move {
            // Each session once, so that each load is a miss.
            let ids = |task| {
                let first = (block * TASKS + task) * each;
                (first..first + each).map(|number| fixtures::id(SEED, number))
            };
            match side {
                Side::Ours => {
                    let work = (0..TASKS).map(|task| {
                        let ours = ours.clone();
                        let ids = ids(task).collect::<Vec<_>>();
                        async move {
                            for id in &ids {
                                black_box(ours.load(id).await?.context("it was stored")?);
                            }
                            Ok(())
                        }
                    });
                    together(work).await
                }
                Side::Theirs => {
                    let work = (0..TASKS).map(|task| {
                        let filters: Vec<_> =
                            ids(task).map(|id| doc! { "_id": fixtures::key(id) }).collect();
                        let driver = driver.clone();
                        async move {
                            for filter in filters {
                                black_box(driver.find_one(filter).await?.context("it was stored")?);
                            }
                            Ok(())
                        }
                    });
                    together(work).await
                }
            }
        }
        .boxed()
    });
    let rounds = rounds.await?;
    rounds.tell("load", "find_one");
    ours.shutdown().await;
    Ok(Measured::Value(rounds.throughput_ratio()))
}

/// Compared with updates in the same collection, as for one task at a time.
pub(crate) async fn save(bench: Bench) -> Result<Measured> {
    eprintln!("  compared with a collection without a change stream:");
    let uri = bench.uri();
    let apart = save_beside(&bench, &uri, &fixtures::driver_apart(&uri).await?).await?;
    eprintln!("  that is {apart:.4}; against the same collection:");
    let uri = bench.uri();
    let followed = save_beside(&bench, &uri, &fixtures::driver(&uri).await?).await?;
    Ok(Measured::Value(followed))
}

async fn save_beside(bench: &Bench, uri: &str, theirs: &Collection<Document>) -> Result<f64> {
    let each = bench.size(16, 2);
    let ours = fixtures::cached(uri, false).await?;
    fixtures::fill(&fixtures::driver(uri).await?, SEED, SHAPE, TASKS * each).await?;
    fixtures::fill(theirs, THEIRS, SHAPE, TASKS * each).await?;
    let ours = &ours;
    let rounds = Rounds::run([bench.rounds, BLOCKS, TASKS * each], |side, block| {
        async move {
            // The data always differs from the stored data.
            let changed = |seed, task| {
                let first = task * each;
                let data = move |number| SHAPE.data(1_000_000 + block * TASKS * each + number);
                (first..first + each).map(move |number| (fixtures::id(seed, number), data(number)))
            };
            match side {
                Side::Ours => {
                    let work = (0..TASKS).map(|task| {
                        let records =
                            changed(SEED, task).map(|(id, data)| fixtures::record(id, data));
                        let ours = ours.clone();
                        let records = records.collect::<Vec<_>>();
                        async move {
                            for record in &records {
                                ours.save(record).await?;
                            }
                            Ok(())
                        }
                    });
                    together(work).await
                }
                Side::Theirs => {
                    let work = (0..TASKS).map(|task| {
                        let update = |(id, data)| {
                            let filter = doc! { "_id": fixtures::key(id) };
                            fixtures::update(&data).map(|update| (filter, update))
                        };
                        let updates: Result<Vec<_>> = changed(THEIRS, task).map(update).collect();
                        let theirs = theirs.clone();
                        async move {
                            for (filter, update) in updates? {
                                let done = theirs.update_one(filter, update).await?;
                                ensure!(done.modified_count == 1, "an update changed nothing");
                            }
                            Ok(())
                        }
                    });
                    together(work).await
                }
            }
        }
        .boxed()
    });
    let rounds = rounds.await?;
    rounds.tell("save", "update_one");
    ours.shutdown().await;
    Ok(rounds.throughput_ratio())
}

/// Requests that change few sessions, each request its own key, in a request scope. Beside the same requests
/// without one, which overwrite each other's changes.
pub(crate) async fn merge(bench: Bench) -> Result<Measured> {
    let uri = bench.uri();
    let work = SharedSessions { each: bench.size(8, 2) };
    let store = fixtures::cached(&uri, false).await?;
    for seed in [SEED, THEIRS] {
        fixtures::fill(&fixtures::driver(&uri).await?, seed, SHAPE, SharedSessions::COUNT).await?;
        work.add_keys(&store, seed).await?;
    }
    let shape = [bench.rounds, 3 * BLOCKS, TASKS * work.each];
    let rounds = Rounds::run(shape, |side, block| work.change(&store, side, block).boxed()).await?;
    rounds.tell("load and save in a scope", "load and save");
    work.check(&store, shape[0] * shape[1]).await?;
    store.shutdown().await;
    let commands = Commands::default();
    let store = CachedMongoStore::builder(commands.mongo(&uri).await?).build().await?;
    for side in [Side::Ours, Side::Theirs] {
        let counts = || [commands.finds(), commands.writes(), commands.write_commands()];
        let before = counts();
        work.change(&store, side, shape[0] * shape[1] + 1).await?;
        let [finds, writes, sent] = counts();
        let [finds, writes, sent] = [finds - before[0], writes - before[1], sent - before[2]];
        let requests = shape[2];
        eprintln!(
            "  {side:?}: {requests} requests, {finds} finds, {writes} updates in {sent} commands"
        );
    }
    store.shutdown().await;
    Ok(Measured::Value(rounds.throughput_ratio()))
}

/// Few sessions with a key for each task.
#[derive(Clone, Copy)]
struct SharedSessions {
    /// The number of requests of each task in a block.
    each: usize,
}

impl SharedSessions {
    const COUNT: usize = 8;

    fn own_key(task: usize) -> String {
        format!("task_{task:03}")
    }

    /// Adds the keys of all tasks, so that the sessions have the same size from the beginning, even if changes of
    /// them get lost.
    async fn add_keys(self, store: &CachedMongoStore, seed: u64) -> Result<()> {
        for session in 0..Self::COUNT {
            let tasks = (session..TASKS).step_by(Self::COUNT);
            let mut data = SHAPE.data(session);
            data.extend(tasks.map(|task| (Self::own_key(task), json!(0))));
            store.save(&fixtures::record(fixtures::id(seed, session), data)).await?;
        }
        Ok(())
    }

    async fn change(self, store: &CachedMongoStore, side: Side, block: usize) -> Result<Duration> {
        let work = (0..TASKS).map(|task| {
            let store = store.clone();
            async move {
                for serial in block * self.each..(block + 1) * self.each {
                    let session = task % Self::COUNT;
                    let change = |seed| {
                        let id = fixtures::id(seed, session);
                        fixtures::change(&store, id, Self::own_key(task), json!(1 + serial))
                    };
                    match side {
                        Side::Ours => in_request_scope(change(SEED)).await?,
                        Side::Theirs => change(THEIRS).await?,
                    }
                }
                Ok(())
            }
        });
        together(work).await
    }

    /// Checks that no change of a request in a scope was lost.
    async fn check(self, store: &CachedMongoStore, last_block: usize) -> Result<()> {
        let last = json!((last_block + 1) * self.each);
        for task in 0..TASKS {
            let stored = store.load(&fixtures::id(SEED, task % Self::COUNT)).await?;
            let stored = stored.context("it was stored")?;
            ensure!(stored.data.get(&Self::own_key(task)) == Some(&last), "a change was lost");
        }
        Ok(())
    }
}

/// Runs each future in a task of its own. Returns how long it takes until the last one has ended.
/// The futures are built before the first one starts.
async fn together<W>(work: impl Iterator<Item = W>) -> Result<Duration>
where
    W: Future<Output = Result<()>> + Send + 'static,
{
    let work: Vec<_> = work.collect();
    let start = Instant::now();
    let mut tasks: JoinSet<_> = work.into_iter().collect();
    while let Some(ended) = tasks.join_next().await {
        ended??;
    }
    Ok(start.elapsed())
}
