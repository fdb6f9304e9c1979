//! `ModelClock`: a clock that moves only when a model moves it.

use std::sync::Arc;

use crate::sync::{AtomicU64, Ordering};
use crate::time::Moment;

const HOUR: u64 = 3_600;

/// Clones share the time. In a model without time there is nothing to share, and reading the clock is no step.
#[derive(Clone, Debug, Default)]
pub(crate) struct ModelClock(Option<Arc<AtomicU64>>);

impl ModelClock {
    pub(crate) fn moving() -> Self {
        Self(Some(Arc::new(AtomicU64::new(HOUR))))
    }

    pub(crate) fn tick(&self) {
        if let Some(seconds) = &self.0 {
            seconds.fetch_add(1, Ordering::AcqRel);
        }
    }

    pub(crate) fn now(&self) -> Moment {
        // An addition of 0 reads the newest value. A load may read an older one, and time is the same for all threads.
        let seconds = self.0.as_ref().map(|seconds| seconds.fetch_add(0, Ordering::Relaxed));
        Moment::from_nanos(seconds.unwrap_or(HOUR) * 1_000_000_000)
    }
}
