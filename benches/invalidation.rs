//! How long it takes until a log-out on one instance ends the session on another instance, beside
//! how long a bare change stream of the driver takes to deliver the same deletion.
//!
//! `cargo bench --bench invalidation -- [--rounds N]`
//!
//! Each round deletes one session that the other instance has cached. Both clocks start before the
//! deletion is sent. One stops when the bare stream delivers its event. The other stops at the
//! start of the first load that does not return the session. Both are measured in the same rounds,
//! so changes of the machine's speed affect both.
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a bench prints what it measured")]

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use futures::StreamExt;
use hdrhistogram::Histogram;
use lexopt::ValueExt;
use mongodb::bson::{Document, doc};
use mongodb::options::ReadConcern;
use tokio::sync::mpsc;
use tower_sessions::SessionStore;
use tower_sessions::session::Record;
use tower_sessions_moka_mongodb_store::{CachedMongoStore, MongoStore, mongodb};

const ROUNDS: u32 = 1_000;
const PATIENCE: Duration = Duration::from_secs(30);

#[tokio::main]
async fn main() -> Result<()> {
    let rounds = rounds()?;
    let server = session_test_server::shared_fast()?;
    let uri = server.uri_for(&session_test_server::fresh_database());
    let (bare, cached) = measure(&uri, rounds).await?;
    println!("{rounds} rounds on {}", server.description());
    print("bare change stream", &bare);
    print("other instance's cache", &cached);
    let ratio = |at: f64| micros(&cached, at) / micros(&bare, at);
    println!("ratio of medians {:.2}, of p99 {:.2}", ratio(0.5), ratio(0.99));
    Ok(())
}

async fn measure(uri: &str, rounds: u32) -> Result<(Histogram<u64>, Histogram<u64>)> {
    let one = MongoStore::connect(uri).await?;
    let other = CachedMongoStore::connect(uri).await?;
    let mut delivered = bare_stream(uri, one.collection().name()).await?;
    let mut bare = Histogram::new(3)?;
    let mut cached = Histogram::new(3)?;
    for round in 0..rounds {
        let mut record = Record {
            id: tower_sessions::session::Id::default(),
            data: [("round".to_owned(), round.into())].into(),
            expiry_date: time::OffsetDateTime::now_utc() + time::Duration::hours(1),
        };
        one.create(&mut record).await?;
        other.load(&record.id).await?.context("it was just created")?;
        let start = Instant::now();
        let (deleted, gone, event) = tokio::join!(
            one.delete(&record.id),
            ends(&other, &record, start),
            tokio::time::timeout(PATIENCE, delivered.recv()),
        );
        deleted?;
        cached.record(nanos(gone?))?;
        bare.record(nanos(event?.context("the bare stream ended")?.duration_since(start)))?;
        if round % 500 == 499 {
            eprintln!("{} of {rounds} rounds", round + 1);
        }
    }
    other.shutdown().await;
    Ok((bare, cached))
}

/// Loads without a pause until the session is gone. Returns when that was.
async fn ends(store: &CachedMongoStore, record: &Record, start: Instant) -> Result<Duration> {
    loop {
        let begun = start.elapsed();
        if store.load(&record.id).await?.is_none() {
            return Ok(begun);
        }
        if begun > PATIENCE {
            bail!("the session is still served {PATIENCE:?} after its log-out");
        }
        tokio::task::yield_now().await;
    }
}

/// A change stream as an app would open it for this purpose, in a task of its own.
async fn bare_stream(uri: &str, collection: &str) -> Result<mpsc::UnboundedReceiver<Instant>> {
    let client = mongodb::Client::with_uri_str(uri).await?;
    let database = client.default_database().context("the URI names a database")?;
    let collection = database.collection::<Document>(collection);
    let deletions = [doc! { "$match": { "operationType": "delete" } }];
    let mut stream =
        collection.watch().pipeline(deletions).read_concern(ReadConcern::majority()).await?;
    let (sender, receiver) = mpsc::unbounded_channel();
    tokio::spawn(async move {
        while let Some(Ok(_)) = stream.next().await {
            if sender.send(Instant::now()).is_err() {
                return;
            }
        }
    });
    Ok(receiver)
}

fn rounds() -> Result<u32> {
    let mut rounds = ROUNDS;
    let mut args = lexopt::Parser::from_env();
    while let Some(arg) = args.next()? {
        match arg {
            lexopt::Arg::Long("rounds") => rounds = args.value()?.parse()?,
            // Cargo passes this to every bench.
            lexopt::Arg::Long("bench") => {}
            other => return Err(other.unexpected().into()),
        }
    }
    if rounds == 0 {
        bail!("--rounds must be at least 1");
    }
    Ok(rounds)
}

fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX).max(1)
}

#[allow(clippy::cast_precision_loss, reason = "a figure to read")]
fn micros(histogram: &Histogram<u64>, at: f64) -> f64 {
    histogram.value_at_quantile(at) as f64 / 1_000.0
}

fn print(what: &str, taken: &Histogram<u64>) {
    let [p50, p90, p99] = [0.5, 0.9, 0.99].map(|at| micros(taken, at));
    println!("{what}: p50 {p50:.0} us, p90 {p90:.0} us, p99 {p99:.0} us");
}
