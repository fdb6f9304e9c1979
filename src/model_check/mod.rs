//! A model check of who may leave an entry in the cache: generations, tickets, flights, epochs, own
//! echoes and the lease.
//!
//! The code under test is this crate as it ships, but for what `src/sync.rs` exports: locks and atomics
//! are those of [loom](https://docs.rs/loom), so that each model runs under every order of its threads'
//! steps and with every value that the memory model lets an atomic read, with a bounded number of
//! preemptions. The database, moka and the clock are small ones whose every call is one step.
//!
//! ```sh
//! RUSTC_WORKSPACE_WRAPPER=src/model_check/rustc cargo test --lib model_check
//! ```
//!
//! The last word may be the name of one model. `RUSTFLAGS='--cfg model_check'` does the same without a shell, and
//! compiles the dependencies again. `MODEL_PREEMPTIONS=3` goes deeper. Two runs are the same, so running a model
//! again replays its failure. A failed model prints what happened in its last schedule, step by step.

mod app;
mod clock;
mod database;
pub(crate) mod moka;
mod scenarios;
pub(crate) mod sync;
mod tasks;
mod world;

use std::panic::{catch_unwind, resume_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

pub(crate) use crate::model_check::clock::ModelClock;
use crate::model_check::world::World;

/// Enough for every fault that was made on purpose: see `tests/RULES.md`.
const PREEMPTIONS: usize = 2;

type Step = fn(&World);

/// Runs `first`, and then the threads beside each other, under every schedule.
#[allow(
    clippy::print_stdout,
    reason = "libtest shows it when the model fails, and with --nocapture"
)]
fn check(world: fn() -> World, first: &'static [Step], threads: &'static [&'static [Step]]) {
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
            run(world, first, threads);
        });
    });
    let verdict = if checked.is_ok() { "ok" } else { "FAILED in the last" };
    let schedules = schedules.load(Ordering::Relaxed);
    println!("{verdict} of {schedules} schedules, {:.1?}", start.elapsed());
    if let Err(panic) = checked {
        resume_unwind(panic);
    }
}

/// Runs the model once, under the schedule that loom has chosen.
fn run(world: fn() -> World, first: &'static [Step], threads: &'static [&'static [Step]]) {
    join(spawn("first", move || {
        let world = Arc::new(world());
        world.take(first);
        let threads: Vec<_> = threads
            .iter()
            .zip(["a", "b", "c"])
            .map(|(steps, name)| {
                let world = Arc::clone(&world);
                spawn(name, move || world.take(steps))
            })
            .collect();
        threads.into_iter().for_each(join);
        world.settle();
    }));
}

impl World {
    fn take(&self, steps: &[Step]) {
        for step in steps {
            step(self);
        }
    }
}

/// In words. The stacks that loom gives its threads by default, its first one included, are too small
/// for code that is not optimised.
const STACK: usize = 0x8000;

#[allow(clippy::expect_used, reason = "loom always has a thread")]
fn spawn(name: &str, run: impl FnOnce() + Send + 'static) -> loom::thread::JoinHandle<()> {
    let thread = loom::thread::Builder::new().name(name.into()).stack_size(STACK);
    thread.spawn(run).expect("a thread")
}

#[allow(clippy::expect_used, reason = "a panic in a thread of loom's ends the model by itself")]
fn join(thread: loom::thread::JoinHandle<()>) {
    thread.join().expect("an end");
}
