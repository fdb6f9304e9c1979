//! Walks from many seeds, on all cores.
//!
//! `SIMULATION_SEEDS=100000 cargo test --release --lib simulation::seeds` goes so many, and
//! `SIMULATION_SEED=7 cargo test --lib simulation::seeds -- --nocapture` goes one and prints its steps.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::{available_parallelism, scope};
use std::time::Instant;

use crate::simulation::trace::Trace;
use crate::simulation::walk::{Report, walk};

const SEEDS: u64 = 2_000;
/// What so many walks must come across, to prove anything about it.
const OCCUR: [&str; 10] = [
    "ended after its deadline",
    "sent together",
    "a whole command failed",
    "touched",
    "prolonged",
    "not worth a touch",
    "overloaded",
    "signed out",
    "turned away",
    "refused a fresh stream",
];

#[test]
fn walks_keep_every_invariant() {
    if let Some(seed) = number("SIMULATION_SEED") {
        let report = go(seed, Trace::printed);
        assert!(report.violation.is_none(), "seed {seed}: {}", report.violation.unwrap());
        return;
    }
    let seeds = number("SIMULATION_SEEDS").unwrap_or(SEEDS);
    let first = number("SIMULATION_FIRST_SEED").unwrap_or(0);
    let (next, end) = (AtomicU64::new(first), AtomicU64::new(first + seeds));
    let (broken, tally) = (Mutex::new(None::<(u64, String)>), Mutex::new(BTreeMap::new()));
    let start = Instant::now();
    scope(|scope| {
        for _ in 0..available_parallelism().map_or(1, usize::from) {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= end.load(Ordering::Relaxed) {
                        return;
                    }
                    let report = go(seed, Trace::default);
                    for (what, count) in report.tally {
                        *tally.lock().unwrap().entry(what).or_insert(0) += count;
                    }
                    if let Some(text) = report.violation {
                        // The first one is what a replay is wanted of.
                        end.fetch_min(seed, Ordering::Relaxed);
                        let mut broken = broken.lock().unwrap();
                        if broken.as_ref().is_none_or(|(first, _)| seed < *first) {
                            *broken = Some((seed, text));
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
    let broken = broken.into_inner().unwrap();
    if seeds >= SEEDS && broken.is_none() {
        for what in OCCUR {
            assert!(tally.lock().unwrap().contains_key(what), "nothing was {what}");
        }
    }
    if let Some((seed, text)) = broken {
        panic!(
            "seed {seed}: {text}\n  SIMULATION_SEED={seed} cargo test --lib simulation::seeds -- \
             --nocapture"
        );
    }
}

#[test]
fn a_walk_can_be_gone_again() {
    for seed in 0..100 {
        // What moka does by the real clock may differ on a machine that stands still at times.
        let again = || go(seed, Trace::hashed).digest;
        let first = again();
        assert!((0..20).any(|_| again() == first), "seed {seed} goes another way each time");
    }
}

fn go(seed: u64, trace: impl FnOnce() -> Trace) -> Report {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build()
        .unwrap();
    runtime.block_on(async { walk(seed, trace()).await })
}

fn number(variable: &str) -> Option<u64> {
    std::env::var(variable).ok()?.parse().ok()
}
