//! Runs walks from many seeds, on all cores. [`simulation`](crate::simulation) says how to replay one.

use std::collections::{BTreeMap, HashSet};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::{available_parallelism, scope};
use std::time::Instant;

use crate::simulation::trace::Trace;
use crate::simulation::walk::Walk;

/// The number of seeds without `SIMULATION_SEEDS`.
const SEEDS: u64 = 2_000;
/// Events that `SEEDS` walks must contain. A rule is not tested if its event never happens.
const MUST_OCCUR: [&str; 16] = [
    "ended after its deadline",
    "sent as one batch",
    "a whole command failed",
    "touched",
    "prolonged",
    "not worth a touch",
    "overloaded",
    "signed out",
    "rejected",
    "refused a fresh stream",
    "merged",
    "two requests changed one key",
    "renewed",
    "renewed, merged",
    "not renewed, since it had ended",
    "created after a flush",
];

/// The result of a walk.
#[derive(Debug)]
struct Report {
    violation: Option<String>,
    tally: BTreeMap<&'static str, u64>,
    digest: u64,
}

#[test]
fn walks_keep_every_invariant() {
    if let Some(seed) = number("SIMULATION_SEED") {
        let report = run(seed, Trace::printed);
        assert!(report.violation.is_none(), "seed {seed}: {}", report.violation.unwrap());
        return;
    }
    let seeds = number("SIMULATION_SEEDS").unwrap_or(SEEDS);
    let first = number("SIMULATION_FIRST_SEED").unwrap_or(0);
    let next = AtomicU64::new(first);
    let end = AtomicU64::new(first + seeds);
    let violation = Mutex::new(None::<(u64, String)>);
    let tally = Mutex::new(BTreeMap::new());
    let start = Instant::now();
    scope(|scope| {
        for _ in 0..available_parallelism().map_or(1, usize::from) {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= end.load(Ordering::Relaxed) {
                        return;
                    }
                    let report = run(seed, Trace::default);
                    for (what, count) in report.tally {
                        *tally.lock().unwrap().entry(what).or_insert(0) += count;
                    }
                    if let Some(text) = report.violation {
                        // Seeds below this one still run, so the smallest seed that fails is reported.
                        end.fetch_min(seed, Ordering::Relaxed);
                        let mut violation = violation.lock().unwrap();
                        if violation.as_ref().is_none_or(|(first, _)| seed < *first) {
                            *violation = Some((seed, text));
                        }
                    }
                    let done = seed - first + 1;
                    if done.is_multiple_of(10_000) {
                        let seconds = start.elapsed().as_secs_f64();
                        eprintln!("{done} of {seeds} seeds, {seconds:.0} s");
                    }
                }
            });
        }
    });
    eprintln!(
        "{seeds} seeds in {:.1} s: {:?}",
        start.elapsed().as_secs_f64(),
        tally.lock().unwrap()
    );
    let violation = violation.into_inner().unwrap();
    if seeds >= SEEDS && violation.is_none() {
        for what in MUST_OCCUR {
            assert!(tally.lock().unwrap().contains_key(what), "nothing was {what}");
        }
    }
    if let Some((seed, text)) = violation {
        panic!(
            "seed {seed}: {text}\n  SIMULATION_SEED={seed} cargo test --lib simulation::seeds -- \
             --nocapture"
        );
    }
}

#[test]
fn a_seed_replays_the_same_walk() {
    for seed in 0..100 {
        // moka reads the real clock, so one run may differ on a machine that pauses. Two runs of many agree.
        let mut digests = HashSet::new();
        let repeats = (0..20).any(|_| !digests.insert(run(seed, Trace::hashed).digest));
        assert!(repeats, "seed {seed} differs each time");
    }
}

/// Runs a walk until its recovery has ended, or until the first violation.
fn run(seed: u64, trace: impl FnOnce() -> Trace) -> Report {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build()
        .unwrap();
    runtime.block_on(async { run_walk(seed, trace()).await })
}

async fn run_walk(seed: u64, trace: Trace) -> Report {
    let mut walk = Walk::new(seed, trace);
    walk.run_steps().await;
    if !walk.is_broken() {
        walk.recover().await;
    }
    let mut state = walk.fleet.wire.state();
    if walk.scheduler.has_panicked() {
        state.oracle.report_violation("panic".to_owned());
    }
    // The end of the runtime drops all calls. That is not a violation.
    state.oracle.closing = true;
    let violation = state.oracle.violations.first().cloned();
    let violation = violation.map(|text| format!("{text}\n  {:?}", walk.fleet.plan));
    let tally = std::mem::take(&mut state.oracle.tally);
    Report { violation, tally, digest: state.trace.digest() }
}

fn number(variable: &str) -> Option<u64> {
    std::env::var(variable).ok()?.parse().ok()
}
