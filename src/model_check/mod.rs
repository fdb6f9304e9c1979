//! A model check of the rules that decide which entries the cache may keep: generations, fill guards, single flight,
//! epochs, own writes and the lease.
//!
//! The code under test is the shipped crate, except for what `src/sync.rs` exports: its locks and atomics come from
//! [loom](https://docs.rs/loom). loom runs each model under every order of its threads' steps, and with every value
//! that the memory model allows an atomic to read, up to a number of preemptions. The database, moka and the clock are
//! small ones. Each of their calls is one step.
//!
//! ```sh
//! RUSTC_WORKSPACE_WRAPPER=src/model_check/rustc cargo test --lib model_check
//! ```
//!
//! The last word may be the name of one model. `RUSTFLAGS='--cfg model_check'` does the same without a shell, and
//! compiles the dependencies again. `MODEL_PREEMPTIONS=3` checks more schedules. Each run takes the same schedules, so
//! a second run replays a failure. A failed model prints the steps of its last schedule.

mod app;
mod app_steps;
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

/// Enough to find each rule that was removed on purpose: see `tests/RULES.md`.
const PREEMPTIONS: usize = 2;

type Step = fn(&World);

/// Runs the steps of `first`, and then the threads at the same time, under every schedule.
#[allow(
    clippy::print_stdout,
    reason = "libtest prints it if the model fails, and with --nocapture"
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
        world.run(first);
        let threads: Vec<_> = threads
            .iter()
            .zip(["a", "b", "c"])
            .map(|(steps, name)| {
                let world = Arc::clone(&world);
                spawn(name, move || world.run(steps))
            })
            .collect();
        threads.into_iter().for_each(join);
        world.check_rest();
    }));
}

impl World {
    fn run(&self, steps: &[Step]) {
        for step in steps {
            step(self);
        }
    }
}

/// In machine words. loom's default stacks are too small for code that is not optimised.
const STACK: usize = 0x8000;

#[allow(clippy::expect_used, reason = "a panic ends the model, as it should")]
fn spawn(name: &str, run: impl FnOnce() + Send + 'static) -> loom::thread::JoinHandle<()> {
    let thread = loom::thread::Builder::new().name(name.into()).stack_size(STACK);
    thread.spawn(run).expect("loom spawns a thread")
}

#[allow(clippy::expect_used, reason = "a panic in a thread of loom has ended the model already")]
fn join(thread: loom::thread::JoinHandle<()>) {
    thread.join().expect("the thread ends without a panic");
}
