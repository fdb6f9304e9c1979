//! A model check of who may leave an entry in the cache: generations, tickets, flights, epochs, own
//! echoes and the lease.
//!
//! The code under test is the crate's own `src/cache` and `src/tiers.rs`, as they ship, over locks and
//! atomics of [loom](https://docs.rs/loom): each model is run under every order of its threads'
//! steps, and every value that the memory model lets an atomic read, with up to so many preemptions.
//! In the place of the database, of moka and of the clock stand small ones whose every call is one
//! step.
//!
//! `cargo test --test model -- NAME…` runs the models whose names contain one of these.
//! `MODEL_PREEMPTIONS=N` goes deeper. A run is the same each time, so to replay a failure is to run
//! its model again; what happened in it is printed, step by step.

mod app;
#[allow(dead_code, unreachable_pub, unused_imports, reason = "a part of it is used, and here")]
#[path = "../../src/backend.rs"]
mod backend;
#[allow(dead_code, unreachable_pub, unused_imports, reason = "a part of it is used, and here")]
#[path = "../../src/cache/mod.rs"]
mod cache;
mod clock;
mod database;
#[allow(dead_code, unreachable_pub, unused_imports, reason = "a part of it is used, and here")]
#[path = "../../src/error.rs"]
mod error;
mod key;
mod memory;
#[allow(dead_code, unreachable_pub, unused_imports, reason = "a part of it is used, and here")]
#[path = "../../src/metrics/mod.rs"]
mod metrics;
#[allow(unused_imports, reason = "its tests are not run here")]
#[path = "../../src/number.rs"]
mod number;
#[allow(dead_code, unreachable_pub, unused_imports, reason = "a part of it is used, and here")]
#[path = "../../src/record.rs"]
mod record;
#[allow(dead_code, unused_imports, reason = "nobody waits for another's removal here")]
#[path = "../../src/removals.rs"]
mod removals;
mod scenarios;
mod sync;
mod tasks;
#[allow(dead_code, unreachable_pub, unused_imports, reason = "a part of it is used, and here")]
#[path = "../../src/tiers.rs"]
mod tiers;
mod world;

use std::panic::catch_unwind;
use std::process::ExitCode;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use crate::scenarios::{ALL, Scenario};

/// Enough for every hole that was made on purpose.
const PREEMPTIONS: usize = 2;

#[allow(clippy::print_stdout, reason = "this is what the test says")]
fn main() -> ExitCode {
    let wanted: Vec<_> = std::env::args().skip(1).filter(|word| !word.starts_with('-')).collect();
    let chosen = |scenario: &&Scenario| {
        wanted.is_empty() || wanted.iter().any(|word| scenario.name.contains(word.as_str()))
    };
    let queue = Mutex::new(ALL.iter().filter(chosen));
    let next = || queue.lock().unwrap_or_else(PoisonError::into_inner).next();
    let start = std::time::Instant::now();
    let (held, failed) = (AtomicUsize::new(0), AtomicUsize::new(0));
    std::thread::scope(|threads| {
        for _ in 0..std::thread::available_parallelism().map_or(1, Into::into) {
            threads.spawn(|| {
                while let Some(scenario) = next() {
                    let count = if holds(scenario) { &held } else { &failed };
                    count.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
    });
    let (held, failed) = (held.into_inner(), failed.into_inner());
    let (verdict, left_out) =
        (if failed == 0 { "ok" } else { "FAILED" }, ALL.len() - held - failed);
    // As libtest would say it, so that these count among the tests.
    println!(
        "test result: {verdict}. {held} passed; {failed} failed; 0 ignored; 0 measured; {left_out} \
         filtered out; finished in {:.2}s",
        start.elapsed().as_secs_f64()
    );
    println!("models held={held} failed={failed} left_out={left_out}");
    if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

#[allow(clippy::print_stdout, reason = "this is what the test says")]
fn holds(scenario: &'static Scenario) -> bool {
    let mut check = loom::model::Builder::new();
    check.max_branches = 10_000;
    check.preemption_bound =
        std::env::var("MODEL_PREEMPTIONS").map_or(Some(PREEMPTIONS), |bound| bound.parse().ok());
    let start = Instant::now();
    let schedules = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&schedules);
    let checked = catch_unwind(move || {
        check.check(move || {
            counted.fetch_add(1, Ordering::Relaxed);
            scenario.run();
        });
    });
    let (name, schedules) = (scenario.name, schedules.load(Ordering::Relaxed));
    let verdict = if checked.is_ok() { "ok" } else { "FAILED in the last" };
    println!("model {name} ... {verdict} of {schedules} schedules, {:.1?}", start.elapsed());
    checked.is_ok()
}
