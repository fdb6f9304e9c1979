//! The locks and atomics of what decides freshness, and the map that it guards. By this name, so that
//! the model check in `tests/model` can put its own in their place and run the same code under every
//! schedule.

pub(crate) use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
pub(crate) use std::sync::{Mutex, MutexGuard, PoisonError};

pub(crate) use ::moka;

/// A panic while this is locked leaves it as it was between two of its owner's steps: whole.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
