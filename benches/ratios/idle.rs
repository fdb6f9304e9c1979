//! One operation at a time, beside the driver's own operation on documents of the same kind.

use std::hint::black_box;

use anyhow::{Context, Result, ensure};
use futures::FutureExt;
use mongodb::Collection;
use mongodb::bson::{Document, doc};
use serde_json::json;
use tower_sessions::SessionStore;
use tower_sessions_moka_mongodb_store::{in_request_scope, mongodb};

use crate::bench::{Bench, Measured};
use crate::fixtures::{self, Shape, timed};
use crate::hits;
use crate::rounds::{Rounds, Side};

const SEED: u64 = 2;
const THEIRS: u64 = 102;
const SHAPE: Shape = Shape::Keys(5);
const BLOCK: usize = 50;

/// The number of blocks in each round. One more block at the beginning warms both sides up.
fn blocks(bench: &Bench) -> usize {
    bench.size(21, 2)
}

pub(crate) async fn load(bench: Bench) -> Result<Measured> {
    let uri = bench.uri();
    let driver = fixtures::driver(&uri).await?;
    let blocks = blocks(&bench);
    let ours = fixtures::cached(&uri, false).await?;
    fixtures::fill(&driver, SEED, SHAPE, (bench.rounds * blocks + 1) * BLOCK).await?;
    let ours = &ours;
    let driver = &driver;
    let rounds = Rounds::run([bench.rounds, blocks, BLOCK], |side, block| {
        async move {
            // Each session once, so that each load is a miss.
            let ids: Vec<_> = (block * BLOCK..(block + 1) * BLOCK)
                .map(|number| fixtures::id(SEED, number))
                .collect();
            let filters: Vec<_> = ids.iter().map(|id| doc! { "_id": fixtures::key(*id) }).collect();
            match side {
                Side::Ours => hits::loads(ours, &ids).await,
                Side::Theirs => {
                    let finds = async {
                        for filter in filters {
                            black_box(driver.find_one(filter).await?.context("it was stored")?);
                        }
                        anyhow::Ok(())
                    };
                    timed(finds).await
                }
            }
        }
        .boxed()
    });
    let rounds = rounds.await?;
    rounds.tell("load", "find_one");
    ours.shutdown().await;
    Ok(Measured::Value(rounds.ratio()))
}

/// Compared with updates in the same collection, which its change stream reports like those of the
/// store. The server's work for that stream is a part of both. The figure on stderr shows its cost.
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
    let driver = fixtures::driver(uri).await?;
    let blocks = blocks(bench);
    let ours = fixtures::cached(uri, false).await?;
    fixtures::fill(&driver, SEED, SHAPE, 10 * BLOCK).await?;
    fixtures::fill(theirs, THEIRS, SHAPE, 10 * BLOCK).await?;
    let ours = &ours;
    let rounds = Rounds::run([bench.rounds, blocks, BLOCK], |side, block| {
        async move {
            let ids = |seed| (0..BLOCK).map(move |n| fixtures::id(seed, block % 10 * BLOCK + n));
            // The data always differs from the stored data.
            let data: Vec<_> =
                (0..BLOCK).map(|n| SHAPE.data(1_000_000 + block * BLOCK + n)).collect();
            match side {
                Side::Ours => {
                    let records = ids(SEED).zip(data);
                    let records: Vec<_> =
                        records.map(|(id, data)| fixtures::record(id, data)).collect();
                    let saves = async {
                        for record in &records {
                            ours.save(record).await?;
                        }
                        anyhow::Ok(())
                    };
                    timed(saves).await
                }
                Side::Theirs => {
                    let filters = ids(THEIRS).map(|id| doc! { "_id": fixtures::key(id) });
                    let updates: Result<Vec<_>> = data.iter().map(fixtures::update).collect();
                    let updates: Vec<_> = filters.zip(updates?).collect();
                    let updates = async {
                        for (filter, update) in updates {
                            let done = theirs.update_one(filter, update).await?;
                            ensure!(done.modified_count == 1, "an update changed nothing");
                        }
                        anyhow::Ok(())
                    };
                    timed(updates).await
                }
            }
        }
        .boxed()
    });
    let rounds = rounds.await?;
    rounds.tell("save", "update_one");
    ours.shutdown().await;
    Ok(rounds.ratio())
}

/// Requests that load a session and change a key of it, each in a request scope, beside the same requests
/// without one.
pub(crate) async fn save_scoped(bench: Bench) -> Result<Measured> {
    const SESSIONS: usize = 10 * BLOCK;
    let uri = bench.uri();
    let driver = fixtures::driver(&uri).await?;
    let store = fixtures::cached(&uri, false).await?;
    for seed in [SEED, THEIRS] {
        fixtures::fill(&driver, seed, SHAPE, SESSIONS).await?;
        // From now on, each load is a hit.
        let ids: Vec<_> = (0..SESSIONS).map(|number| fixtures::id(seed, number)).collect();
        hits::loads(&store, &ids).await?;
    }
    let store = &store;
    let rounds = Rounds::run([bench.rounds, blocks(&bench), BLOCK], |side, block| {
        async move {
            let first = block * BLOCK;
            let serials = first..first + BLOCK;
            let requests = async {
                for serial in serials {
                    let change = |seed| {
                        let id = fixtures::id(seed, serial % SESSIONS);
                        // The value always differs from the stored one.
                        fixtures::change(store, id, "key_00".to_owned(), json!(1_000_000 + serial))
                    };
                    match side {
                        Side::Ours => in_request_scope(change(SEED)).await?,
                        Side::Theirs => change(THEIRS).await?,
                    }
                }
                anyhow::Ok(())
            };
            timed(requests).await
        }
        .boxed()
    });
    let rounds = rounds.await?;
    rounds.tell("load and save in a scope", "load and save");
    store.shutdown().await;
    Ok(Measured::Value(rounds.ratio()))
}

/// Compared with inserts into the same collection, as for [`save`].
pub(crate) async fn create(bench: Bench) -> Result<Measured> {
    eprintln!("  compared with a collection without a change stream:");
    let uri = bench.uri();
    let apart = create_beside(&bench, &uri, &fixtures::driver_apart(&uri).await?).await?;
    eprintln!("  that is {apart:.4}; against the same collection:");
    let uri = bench.uri();
    let followed = create_beside(&bench, &uri, &fixtures::driver(&uri).await?).await?;
    Ok(Measured::Value(followed))
}

async fn create_beside(bench: &Bench, uri: &str, theirs: &Collection<Document>) -> Result<f64> {
    let ours = fixtures::cached(uri, false).await?;
    let blocks = blocks(bench);
    let ours = &ours;
    let rounds = Rounds::run([bench.rounds, blocks, BLOCK], |side, block| {
        async move {
            let ids = (0..BLOCK).map(|n| fixtures::id(SEED, block * BLOCK + n));
            let data = (0..BLOCK).map(|n| SHAPE.data(block * BLOCK + n));
            match side {
                Side::Ours => {
                    let mut records: Vec<_> =
                        ids.zip(data).map(|(id, data)| fixtures::record(id, data)).collect();
                    let creates = async {
                        for record in &mut records {
                            ours.create(record).await?;
                        }
                        anyhow::Ok(())
                    };
                    timed(creates).await
                }
                Side::Theirs => {
                    let documents = ids.zip(data).map(|(id, data)| fixtures::document(id, &data));
                    let documents: Vec<_> = documents.collect::<Result<_>>()?;
                    let inserts = async {
                        for document in documents {
                            theirs.insert_one(document).await?;
                        }
                        anyhow::Ok(())
                    };
                    timed(inserts).await
                }
            }
        }
        .boxed()
    });
    let rounds = rounds.await?;
    rounds.tell("create", "insert_one");
    ours.shutdown().await;
    Ok(rounds.ratio())
}
