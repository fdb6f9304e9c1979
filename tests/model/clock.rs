//! A clock that stands still until a model moves it.

use std::sync::Arc;

pub(crate) use self::shipped::Moment;
use crate::record::WallTime;
use crate::sync::{AtomicU64, Ordering};

#[path = "../../src/clock.rs"]
#[allow(dead_code, unused_imports, reason = "the moments are used, and not the clock")]
mod shipped;

/// Of one that is never moved every reading is the same and no step of the model.
#[derive(Clone, Debug)]
pub(crate) struct Clock(Option<Arc<AtomicU64>>);

const HOUR: u64 = 3_600;

impl Clock {
    pub(crate) fn system() -> Self {
        Self(None)
    }

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

    #[allow(clippy::unused_self, reason = "as the crate's clock is asked")]
    pub(crate) fn wall(&self) -> WallTime {
        WallTime::from_millis(0)
    }
}
