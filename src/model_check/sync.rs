//! What `src/sync.rs` exports under `cfg(model_check)`.

use std::hash::{BuildHasherDefault, DefaultHasher};

pub(crate) use loom::sync::atomic::{AtomicBool, AtomicU64, Ordering};
pub(crate) use loom::sync::{Mutex, MutexGuard};

pub(crate) use crate::model_check::moka;
pub(crate) use crate::model_check::tasks::{sleep, spawn, timeout};

/// A hasher without a random seed: each run of a model must take the same schedules.
pub(crate) type RandomState = BuildHasherDefault<DefaultHasher>;
