//! Switches between the real types of concurrent code and those of the model check.
//!
//! The cache, the tiers and the tasks import these from here: locks, atomics, the seeds of hashers, moka,
//! deadlines and the start of a task. Under `cfg(model_check)`, the unit tests get the types of
//! [loom](https://docs.rs/loom) and of `model_check` instead. So loom runs the shipped code under every
//! schedule.

#[cfg(all(test, model_check))]
pub(crate) use crate::model_check::sync::*;
#[cfg(not(all(test, model_check)))]
pub(crate) use crate::sync::real::*;

#[cfg(not(all(test, model_check)))]
mod real {
    pub(crate) use std::hash::RandomState;
    pub(crate) use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
    pub(crate) use std::sync::{Mutex, MutexGuard};

    pub(crate) use ::moka;
    pub(crate) use tokio::time::{sleep, timeout};

    /// Starts a task and detaches it.
    pub(crate) fn spawn(
        runtime: &tokio::runtime::Handle,
        task: impl Future<Output = ()> + Send + 'static,
    ) {
        drop(runtime.spawn(task));
    }
}

/// Locks a mutex, even if a thread has panicked while it held the lock. Every holder in this crate changes
/// the value in steps that each leave it consistent, so the value can still be used.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}
