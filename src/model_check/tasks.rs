//! What `src/runtime.rs` uses under the model check instead of tokio: a task runs to completion on the thread that
//! starts it, and a deadline expires only when a model says so.

use std::cell::Cell;
use std::sync::OnceLock;
use std::time::Duration;

use futures::FutureExt as _;
use tokio::runtime::{Handle, Runtime};

use crate::availability::Availability;
use crate::runtime::Tasks;

loom::thread_local! {
    /// Whether the next deadline of this thread expires before the call has begun.
    static EXPIRES: Cell<bool> = Cell::new(false);
}

/// The deadline has expired.
#[derive(Debug)]
pub(crate) struct Elapsed;

/// The tasks of one store, which report to this `Availability`. Their runtime is never used.
pub(crate) fn tasks(availability: Availability) -> Tasks {
    Tasks::new(unused_runtime(), Duration::from_secs(5), availability)
}

#[allow(clippy::expect_used, reason = "without a runtime there is no model to check")]
fn unused_runtime() -> Handle {
    static RUNTIME: OnceLock<Runtime> = OnceLock::new();

    let build = || tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
    RUNTIME.get_or_init(build).handle().clone()
}

/// Lets the deadline of this thread's next call expire before the call has begun.
pub(crate) fn expire_next_deadline() {
    EXPIRES.with(|expires| expires.set(true));
}

/// Replaces `tokio::time::timeout`.
pub(crate) async fn timeout<F: Future>(_: Duration, call: F) -> Result<F::Output, Elapsed> {
    if EXPIRES.with(|expires| expires.replace(false)) {
        return Err(Elapsed);
    }
    Ok(call.await)
}

/// Replaces `tokio::time::sleep`. The small write queue of the models does not wait between attempts.
pub(crate) async fn sleep(_: Duration) {}

/// Runs `task` to completion. Its steps block the thread while they wait, so one poll is enough.
#[allow(clippy::expect_used, reason = "the panic ends the model")]
pub(crate) fn spawn(_: &Handle, task: impl Future<Output = ()> + Send + 'static) {
    task.now_or_never().expect("the task waits only for steps of the model");
}
