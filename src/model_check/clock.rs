//! A clock that stands still until a model moves it.

use std::sync::Arc;

use crate::sync::{AtomicU64, Ordering};
use crate::time::Moment;

const HOUR: u64 = 3_600;

/// Clones share the time. If the clock never moves, reading it is no step of the model.
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
        // By an addition: time is the same for all, where a load may answer with a past value.
        let seconds = self.0.as_ref().map(|seconds| seconds.fetch_add(0, Ordering::Relaxed));
        Moment::from_nanos(seconds.unwrap_or(HOUR) * 1_000_000_000)
    }
}
