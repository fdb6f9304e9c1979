//! The shipped store over a simulated network and a simulated MongoDB, on paused time.
//!
//! # Random walks
//!
//! A *walk* is one random run of 1 to 3 stores over one database. Every choice in it comes from one seed.
//! [`FaultPlan`](fault_plan::FaultPlan) draws the size of the walk, its load and its faults. Then
//! [`Walk`](walk::Walk) repeats a step:
//!
//! 1. It starts an operation at a store, or cancels one, or changes the database as another instance does.
//! 2. It may begin a fault: a stall, an outage, an overload, an election, a lost history.
//! 3. It serves some of the waiting calls. A call is *applied* (the database carries it out) and later *answered*.
//! 4. It moves the clock.
//!
//! After the last step all faults end, and [recovery](recovery) checks that the stores agree with the database
//! and that nothing is left over.
//!
//! ```text
//! app's call -> WriteThrough -> TracedBackend -> Batcher -> FakeBackend -> Wire -> Database
//!                               a store call                a wire call
//! ```
//!
//! A *store call* is what the store asks of its batcher. A *wire call* is what the batcher sends: one call, or one
//! part of a batch.
//!
//! # The oracle
//!
//! [`Oracle`](oracle::Oracle) compares each answer with the [history](database) of the session. It checks the
//! invariants I1 to I8 of `ARCHITECTURE.md`, the staleness bound, deadlines and errors.
//! [`PendingCalls`](pending_calls::PendingCalls) checks the order of saves and the rules of touches.
//!
//! # Replaying a seed
//!
//! A failure prints its seed. The first command below runs that walk and prints its steps. The second one runs
//! many seeds:
//!
//! ```sh
//! SIMULATION_SEED=7 cargo test --lib simulation::seeds -- --nocapture
//! SIMULATION_SEEDS=100000 cargo test --release --lib simulation::seeds
//! ```
//!
//! # Hand-written races
//!
//! `races`, `merges`, `sign_out`, `watermark`, `queues` and `memory` use a [`World`](world::World) instead: one store,
//! where the test applies and answers each call.

mod backend;
mod chance;
mod database;
mod fault_plan;
mod fleet;
mod memory;
mod merge_oracle;
mod merges;
mod operation;
mod oplog;
mod oracle;
mod owned_pages;
mod pending_calls;
mod queues;
mod races;
mod recovery;
mod scheduler;
mod scoped_request;
mod seeds;
mod sign_out;
mod stream;
mod trace;
mod traced_backend;
mod types;
mod walk;
mod watermark;
mod wire;
mod world;
