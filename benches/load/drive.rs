//! One round of load on one store: closed loop, open loop, or all clients at the same time.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::Result;
use hdrhistogram::Histogram;
use hyper::header::HeaderValue;
use tokio::sync::{Barrier, Semaphore};
use tokio::task::JoinSet;

use crate::fleet::Fleet;
use crate::number::float;
use crate::worker::{Verdict, Worker};

/// How many wrong responses are described.
const DESCRIBED: usize = 3;

/// The results of one round, or of all rounds of one store.
pub(crate) struct Tally {
    pub(crate) requests: u64,
    pub(crate) wrong: u64,
    pub(crate) stale: u64,
    /// Requests that were due and never sent. Open loop only.
    pub(crate) unsent: u64,
    pub(crate) descriptions: Vec<String>,
    /// In nanoseconds.
    pub(crate) latencies: Histogram<u64>,
    pub(crate) elapsed: Duration,
}

impl Tally {
    pub(crate) fn new() -> Result<Self> {
        Ok(Self {
            requests: 0,
            wrong: 0,
            stale: 0,
            unsent: 0,
            descriptions: Vec::new(),
            latencies: Histogram::new(3)?,
            elapsed: Duration::ZERO,
        })
    }

    pub(crate) fn add(&mut self, other: Self) -> Result<()> {
        self.requests += other.requests;
        self.wrong += other.wrong;
        self.stale += other.stale;
        self.unsent += other.unsent;
        self.descriptions.extend(other.descriptions);
        self.descriptions.truncate(DESCRIBED);
        self.latencies.add(other.latencies)?;
        self.elapsed += other.elapsed;
        Ok(())
    }

    fn note(&mut self, due: Instant, answer: Result<Verdict>) -> Result<()> {
        self.requests += 1;
        self.latencies.record(nanos(due.elapsed()))?;
        match answer {
            Ok(Verdict::Fresh) => {}
            Ok(Verdict::Stale) => self.stale += 1,
            Err(error) => {
                self.wrong += 1;
                if self.descriptions.len() < DESCRIBED {
                    self.descriptions.push(format!("{error:#}"));
                }
            }
        }
        Ok(())
    }
}

/// Puts load on a store for about `length`.
pub(crate) async fn round(fleet: &mut Fleet, length: Duration, rate: Option<f64>) -> Result<Tally> {
    match rate {
        _ if fleet.scenario.is_stampede() => stampede(fleet, length).await,
        Some(rate) => open(fleet, length, rate).await,
        None => all(fleet, |worker, start| closed(worker, start, length)).await,
    }
}

/// Sends the next request when it has the response.
async fn closed(mut worker: Worker, start: Instant, length: Duration) -> Result<(Worker, Tally)> {
    let mut tally = Tally::new()?;
    while start.elapsed() < length {
        let due = Instant::now();
        let answer = worker.step().await;
        tally.note(due, answer)?;
    }
    Ok((worker, tally))
}

/// Requests are due at fixed times. If no client is free, a request waits, and its latency counts
/// from the time at which it was due.
async fn open(fleet: &mut Fleet, length: Duration, rate: f64) -> Result<Tally> {
    let due = Arc::new(Semaphore::new(0));
    let taken = Arc::new(AtomicU64::new(0));
    let start = Instant::now();
    let moment = move |index: u64| start + Duration::from_secs_f64(float(index) / rate);
    let pacer = tokio::task::spawn_blocking({
        let due = due.clone();
        move || pace(&due, start, length, rate)
    });
    let mut tally = all(fleet, |mut worker, _| {
        let due = due.clone();
        let taken = taken.clone();
        async move {
            let mut tally = Tally::new()?;
            while let Ok(permit) = due.acquire().await {
                permit.forget();
                let due = moment(taken.fetch_add(1, Ordering::Relaxed));
                let answer = worker.step().await;
                tally.note(due, answer)?;
            }
            Ok((worker, tally))
        }
    })
    .await?;
    let all = pacer.await?;
    // Without them, a slow store would look faster the fewer requests it completes.
    for index in taken.load(Ordering::Relaxed)..all {
        tally.unsent += 1;
        let waited = (start + length).saturating_duration_since(moment(index));
        tally.latencies.record(nanos(waited))?;
    }
    Ok(tally)
}

/// Releases the requests that are due by now. A thread's sleep is exact to a tenth of a
/// millisecond, tokio's timer is not.
fn pace(due: &Semaphore, start: Instant, length: Duration, rate: f64) -> u64 {
    let mut gone = 0;
    while start.elapsed() < length {
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a count")]
        let by_now = (start.elapsed().as_secs_f64() * rate) as u64 + 1;
        #[allow(clippy::cast_possible_truncation, reason = "a few at a time")]
        due.add_permits((by_now - gone) as usize);
        gone = by_now;
        let next = start + Duration::from_secs_f64(float(gone) / rate);
        std::thread::sleep(next.min(start + length).saturating_duration_since(Instant::now()));
    }
    due.close();
    gone
}

/// In each wave, all clients ask for the same session at the same time. Each session is used once,
/// and the servers have just started.
async fn stampede(fleet: &mut Fleet, length: Duration) -> Result<Tally> {
    let sessions: Arc<[(HeaderValue, u64)]> = fleet.sessions().into();
    let barrier = Arc::new(Barrier::new(fleet.workers.len()));
    // The first wave that does not take place. The client that finds that the time is over sets it
    // before the barrier of that wave, so all clients see the same value.
    let end = Arc::new(AtomicU64::new(sessions.len() as u64));
    all(fleet, |mut worker, start| {
        let sessions = sessions.clone();
        let barrier = barrier.clone();
        let end = end.clone();
        async move {
            let mut tally = Tally::new()?;
            for (wave, (cookie, owner)) in (0..).zip(sessions.iter()) {
                if start.elapsed() >= length {
                    end.fetch_min(wave, Ordering::SeqCst);
                }
                barrier.wait().await;
                if end.load(Ordering::SeqCst) <= wave {
                    break;
                }
                let due = Instant::now();
                let answer = worker.read_cookie(cookie, *owner).await;
                tally.note(due, answer.map(|()| Verdict::Fresh))?;
            }
            Ok((worker, tally))
        }
    })
    .await
}

/// Runs every client in a task of its own, and adds up their results.
async fn all<F, Fut>(fleet: &mut Fleet, run: F) -> Result<Tally>
where
    F: Fn(Worker, Instant) -> Fut,
    Fut: Future<Output = Result<(Worker, Tally)>> + Send + 'static,
{
    let start = Instant::now();
    let mut running = JoinSet::new();
    for worker in fleet.workers.drain(..) {
        running.spawn(run(worker, start));
    }
    let mut sum = Tally::new()?;
    while let Some(ended) = running.join_next().await {
        let (worker, tally) = ended??;
        fleet.workers.push(worker);
        sum.add(tally)?;
    }
    sum.elapsed = start.elapsed();
    Ok(sum)
}

fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX).max(1)
}
