//! Loads of cached sessions.

use std::hint::black_box;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use futures::FutureExt;
use moka::sync::Cache;
use sha2::{Digest, Sha256};
use tower_sessions::SessionStore;
use tower_sessions::session::{Id, Record};
use tower_sessions_moka_mongodb_store::{MongoStore, in_request_scope};

use crate::bench::{Bench, Measured};
use crate::fixtures::{self, Shape};
use crate::naive;
use crate::rounds::{Rounds, Side};

const SEED: u64 = 1;
/// Few enough that the sessions of both sides fit into the processor's caches, so that the code is
/// measured and not the memory.
const SESSIONS: usize = 100;
/// For the same reason, this is the number of keys in all sessions. Each key takes a kilobyte.
const KEYS: usize = 500;
/// The number of loads in a block.
const LOADS: usize = 500;
const BLOCKS: usize = 201;

/// The digest of the id, moka's look-up, and the record's copy. A plain cache: no expiry, no
/// weights, and the standard hasher. A store with a cheaper hasher may be faster.
struct Floor(Cache<[u8; 32], Record>);

impl Floor {
    fn key(id: Id) -> [u8; 32] {
        Sha256::digest(id.0.to_le_bytes()).into()
    }

    fn load(&self, id: Id) -> Option<Record> {
        self.0.get(&Self::key(id))
    }
}

pub(crate) async fn against_floor(bench: Bench, keys: usize, compact: bool) -> Result<Measured> {
    let (ids, uri) = stored(&bench, keys).await?;
    let ours = fixtures::cached(&uri, compact).await?;
    let floor = Floor(Cache::new(10 * SESSIONS as u64));
    // Read the sessions in the same way and alternately, so that both caches have the same memory
    // layout.
    let mongo = MongoStore::connect(&uri).await?;
    for id in &ids {
        ours.load(id).await?.context("it was just stored")?;
        let record = mongo.load(id).await?.context("it was just stored")?;
        floor.0.insert(Floor::key(*id), record);
    }
    let ours = &ours;
    let floor = &floor;
    let ids = &ids;
    let shape = [bench.rounds, bench.size(BLOCKS, 3), LOADS];
    let rounds = Rounds::run(shape, |side, _| {
        async move {
            match side {
                Side::Ours => loads(ours, passes(ids)).await,
                Side::Theirs => {
                    let start = Instant::now();
                    for id in passes(ids) {
                        black_box(floor.load(black_box(*id)).context("it is there")?);
                    }
                    Ok(start.elapsed())
                }
            }
        }
        .boxed()
    });
    let rounds = rounds.await?;
    rounds.tell("load", "SHA-256, moka and a clone");
    ours.shutdown().await;
    mongo.shutdown().await;
    Ok(Measured::Value(rounds.ratio()))
}

pub(crate) async fn against_naive(bench: Bench) -> Result<Measured> {
    let (ids, uri) = stored(&bench, 5).await?;
    let ours = fixtures::cached(&uri, false).await?;
    let mongo = MongoStore::connect(&uri).await?;
    let theirs = naive::pair(mongo.clone(), 10 * SESSIONS as u64);
    // Reads the sessions into both caches.
    for id in &ids {
        loads(&ours, [id]).await?;
        loads(&theirs, [id]).await?;
    }
    let ours = &ours;
    let theirs = &theirs;
    let ids = &ids;
    let shape = [bench.rounds, bench.size(BLOCKS, 3), LOADS];
    let rounds = Rounds::run(shape, |side, _| {
        async move {
            match side {
                Side::Ours => loads(ours, passes(ids)).await,
                Side::Theirs => loads(theirs, passes(ids)).await,
            }
        }
        .boxed()
    });
    let rounds = rounds.await?;
    rounds.tell("load", "load of the naive pair");
    ours.shutdown().await;
    mongo.shutdown().await;
    Ok(Measured::Value(rounds.ratio()))
}

/// Hits in a request scope, beside hits of the same sessions without one.
pub(crate) async fn scoped(bench: Bench) -> Result<Measured> {
    let (ids, uri) = stored(&bench, 5).await?;
    let store = fixtures::cached(&uri, false).await?;
    loads(&store, &ids).await?;
    let store = &store;
    let ids = &ids;
    let shape = [bench.rounds, bench.size(BLOCKS, 3), LOADS];
    let rounds = Rounds::run(shape, |side, _| {
        async move {
            match side {
                Side::Ours => {
                    let start = Instant::now();
                    for id in passes(ids) {
                        // A scope for each load, as the layer opens one for each request.
                        let loaded = in_request_scope(store.load(black_box(id))).await?;
                        black_box(loaded.context("it is there")?);
                    }
                    Ok(start.elapsed())
                }
                Side::Theirs => loads(store, passes(ids)).await,
            }
        }
        .boxed()
    });
    let rounds = rounds.await?;
    rounds.tell("load in a scope", "load");
    store.shutdown().await;
    Ok(Measured::Value(rounds.ratio()))
}

fn passes(ids: &[Id]) -> impl Iterator<Item = &Id> {
    ids.iter().cycle().take(LOADS)
}

/// Loads each of these, one after the other, as the session layer does.
pub(crate) async fn loads<'a>(
    store: &impl SessionStore,
    ids: impl IntoIterator<Item = &'a Id>,
) -> Result<Duration> {
    let start = Instant::now();
    for id in ids {
        black_box(store.load(black_box(id)).await?.context("it is there")?);
    }
    Ok(start.elapsed())
}

async fn stored(bench: &Bench, keys: usize) -> Result<(Vec<Id>, String)> {
    let uri = bench.uri();
    let driver = fixtures::driver(&uri).await?;
    let count = SESSIONS.min(KEYS / keys);
    fixtures::fill(&driver, SEED, Shape::Keys(keys), count).await?;
    Ok(((0..count).map(|number| fixtures::id(SEED, number)).collect(), uri))
}
