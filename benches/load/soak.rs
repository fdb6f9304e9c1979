//! Millions of calls on one store, in this process, to see whether memory or tasks grow.

use std::pin::pin;
use std::process;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use indicatif::ProgressBar;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution, Zipf};
use session_test_server::TestServer;
use time::OffsetDateTime;
use tokio::task::JoinSet;
use tower_sessions::SessionStore;
use tower_sessions::session::{Id, Record};

use crate::content::Content;
use crate::kind::Kind;
use crate::number::float;
use crate::options::{Options, Soak};
use crate::process::Usage;
use crate::stats::Meters;
use crate::stores::Store;

/// The number of lines of figures.
const SAMPLES: u64 = 40;
/// The part of the calls after which the first sample is taken: the caches are full by then.
const WARM_UP: u64 = 10;
/// One load in this many asks for an id that does not exist, and one is given up at once.
const ODD: u32 = 100;
/// One save in this many ends the session and begins another.
const RENEWED: u32 = 100;
/// How long background work may take to end after the last call.
const PATIENCE: Duration = Duration::from_secs(20);
const MIB: u64 = 1 << 20;

/// What all callers share.
struct Shared {
    store: Arc<dyn SessionStore>,
    content: Content,
    plan: Soak,
    zipf: f64,
    next: AtomicU64,
    /// The number of the last call of this part.
    until: AtomicU64,
    loads: AtomicU64,
    saves: AtomicU64,
}

/// A caller, and the sessions that no other caller changes.
struct Caller {
    shared: Arc<Shared>,
    records: Vec<Record>,
    sessions: usize,
    zipf: Zipf<f64>,
    chance: ChaCha8Rng,
}

#[derive(Clone, Copy)]
struct Sample {
    resident: u64,
    tasks: u64,
}

/// Returns whether nothing has grown.
pub(crate) async fn run(plan: Soak, options: &Options, mongo: &TestServer) -> Result<bool> {
    let meters = Meters::install(false)?;
    let kind = if options.stores == Kind::ALL { Kind::Ours } else { options.stores[0] };
    let uri = mongo.uri_for(&session_test_server::fresh_database());
    let store = Store::build(kind, &uri, &options.store, meters.commands()).await?;
    let shared = Arc::new(Shared {
        store: store.shared(),
        content: Content::new(options.size),
        plan,
        zipf: options.zipf,
        next: AtomicU64::new(0),
        until: AtomicU64::new((plan.loads + plan.saves) / WARM_UP),
        loads: AtomicU64::new(0),
        saves: AtomicU64::new(0),
    });
    println!("\nsoak of {}, {} sessions of {} bytes", kind.title(), options.sessions, options.size);
    let callers = (0..options.connections).map(|index| Caller::new(&shared, index, options));
    let callers = join(callers.map(async |caller| caller?.create().await)).await?;
    let begun = Instant::now();
    let callers = part(&shared, callers, &meters, begun).await?;
    let start = settle(&meters, 0).await;
    shared.until.store(plan.loads + plan.saves, Ordering::Relaxed);
    drop(part(&shared, callers, &meters, begun).await?);
    let end = settle(&meters, start.tasks).await;
    let grows = end.tasks > start.tasks || end.resident > start.resident * 11 / 10 + 8 * MIB;
    println!(
        "soak loads={} saves={} rss_start={} rss_end={} tasks_start={} tasks_end={} {}",
        shared.loads.load(Ordering::Relaxed),
        shared.saves.load(Ordering::Relaxed),
        start.resident,
        end.resident,
        start.tasks,
        end.tasks,
        if grows { "grows" } else { "ok" }
    );
    Ok(!grows)
}

/// Runs all callers until the part is over, and shows figures meanwhile.
async fn part(
    shared: &Arc<Shared>,
    callers: Vec<Caller>,
    meters: &Meters,
    begun: Instant,
) -> Result<Vec<Caller>> {
    let all = shared.plan.loads + shared.plan.saves;
    let until = shared.until.load(Ordering::Relaxed);
    let progress = ProgressBar::new(all);
    let mut next_line = shared.next.load(Ordering::Relaxed);
    let mut calls = pin!(join(callers.into_iter().map(Caller::call)));
    let mut tick = tokio::time::interval(Duration::from_millis(200));
    loop {
        tokio::select! {
            callers = &mut calls => {
                progress.finish_and_clear();
                return callers;
            }
            _ = tick.tick() => {}
        }
        let done = shared.next.load(Ordering::Relaxed).min(until);
        progress.set_position(done);
        if done >= next_line {
            next_line = done + all / SAMPLES;
            progress.suspend(|| show(shared, meters, begun));
        }
    }
}

fn show(shared: &Shared, meters: &Meters, begun: Instant) {
    let stats = meters.read();
    let sample = sample(meters);
    println!(
        "{:6.1} s  loads {:9}  saves {:8}  RSS {:6.1} MiB  entries {:7}  bytes {:10}  hits {:5.1} %  tasks {}",
        begun.elapsed().as_secs_f64(),
        shared.loads.load(Ordering::Relaxed),
        shared.saves.load(Ordering::Relaxed),
        float(sample.resident) / float(MIB),
        stats.entries,
        stats.bytes,
        stats.hit_rate().unwrap_or(0.0) * 100.0,
        sample.tasks
    );
}

fn sample(meters: &Meters) -> Sample {
    let (_, resident) = Usage::new().of(&[process::id()]);
    Sample { resident, tasks: meters.read().tasks }
}

/// Waits until at most `tasks` are left, or until none has ended for a while.
async fn settle(meters: &Meters, tasks: u64) -> Sample {
    let mut least = u64::MAX;
    let mut since = Instant::now();
    while since.elapsed() < PATIENCE / 10 && least > tasks {
        tokio::time::sleep(Duration::from_millis(50)).await;
        let now = meters.read().tasks;
        if now < least {
            (least, since) = (now, Instant::now());
        }
    }
    sample(meters)
}

impl Caller {
    fn new(shared: &Arc<Shared>, index: usize, options: &Options) -> Result<Self> {
        let sessions = options.sessions.div_ceil(options.connections);
        Ok(Self {
            shared: shared.clone(),
            sessions,
            records: Vec::new(),
            zipf: Zipf::new(float(sessions as u64), shared.zipf)?,
            chance: ChaCha8Rng::seed_from_u64(options.seed.wrapping_add(index as u64)),
        })
    }

    async fn create(mut self) -> Result<Self> {
        for _ in 0..self.sessions {
            let owner = self.chance.random_range(0..1 << 40);
            let mut record = Record {
                id: Id::default(),
                data: self.shared.content.of(owner),
                expiry_date: tomorrow(),
            };
            self.shared.store.create(&mut record).await?;
            self.records.push(record);
        }
        Ok(self)
    }

    async fn call(mut self) -> Result<Self> {
        let shared = self.shared.clone();
        let Soak { loads, saves } = shared.plan;
        let all = u128::from(loads + saves);
        let saves_by = |calls: u64| u128::from(calls) * u128::from(saves) / all;
        loop {
            let call = shared.next.fetch_add(1, Ordering::Relaxed);
            if call >= shared.until.load(Ordering::Relaxed) {
                // The next part begins with the call that this part did not make.
                shared.next.fetch_sub(1, Ordering::Relaxed);
                return Ok(self);
            }
            #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a rank")]
            let at = self.zipf.sample(&mut self.chance) as usize - 1;
            let at = at.min(self.records.len() - 1);
            if saves_by(call + 1) > saves_by(call) {
                self.save(at).await?;
                shared.saves.fetch_add(1, Ordering::Relaxed);
            } else {
                self.load(at).await?;
                shared.loads.fetch_add(1, Ordering::Relaxed);
            }
        }
    }

    async fn load(&mut self, at: usize) -> Result<()> {
        let store = &self.shared.store;
        match self.chance.random_range(0..ODD) {
            0 => {
                let found = store.load(&Id::default()).await?;
                ensure!(found.is_none(), "a session under an id that was made up");
            }
            1 => {
                // Polled once and dropped, as when a visitor disconnects.
                let given_up = pin!(store.load(&self.records[at].id));
                drop(futures::poll!(given_up));
            }
            _ => {
                let found = store.load(&self.records[at].id).await?;
                let found = found.context("a session that there is was not found")?;
                ensure!(found.data == self.records[at].data, "a session with other data");
            }
        }
        Ok(())
    }

    async fn save(&mut self, at: usize) -> Result<()> {
        let record = &mut self.records[at];
        let version = record.data.get("version").and_then(serde_json::Value::as_u64);
        record.data.insert("version".to_owned(), (version.unwrap_or(0) + 1).into());
        record.expiry_date = tomorrow();
        if self.chance.random_range(0..RENEWED) == 0 {
            self.shared.store.delete(&record.id).await?;
            record.id = Id::default();
            self.shared.store.create(record).await?;
        } else {
            self.shared.store.save(record).await?;
        }
        Ok(())
    }
}

/// Runs these futures in tasks of their own.
async fn join<T: Send + 'static>(
    all: impl Iterator<Item = impl Future<Output = Result<T>> + Send + 'static>,
) -> Result<Vec<T>> {
    let mut running: JoinSet<Result<T>> = all.collect();
    let mut done = Vec::new();
    while let Some(ended) = running.join_next().await {
        done.push(ended??);
    }
    Ok(done)
}

fn tomorrow() -> OffsetDateTime {
    OffsetDateTime::now_utc() + time::Duration::days(1)
}
