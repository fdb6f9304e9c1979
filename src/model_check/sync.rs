//! What `src/sync.rs` exports under `cfg(model_check)`.

use std::hash::{BuildHasherDefault, DefaultHasher};

pub(crate) use loom::sync::atomic::{AtomicBool, AtomicU64, Ordering};
pub(crate) use loom::sync::{Mutex, MutexGuard};

pub(crate) use crate::model_check::moka;
pub(crate) use crate::model_check::tasks::{spawn, timeout};

/// Without a secret: each run of a model must be like the last one.
pub(crate) type RandomState = BuildHasherDefault<DefaultHasher>;
