//! What the stores count of themselves: whether calls left together, and sessions were touched.

use std::sync::{Mutex, MutexGuard, PoisonError};

use metrics_util::debugging::{DebugValue, DebuggingRecorder, Snapshotter};

const TOGETHER: &str = "session_store_mongo_together_size";
const OPERATIONS: &str = "session_store_mongo_operations_total";
const SKIPPED: &str = "session_store_touches_skipped_total";

/// The metrics of all stores that are built from now on.
pub(crate) struct Meters {
    snapshotter: Snapshotter,
    so_far: Mutex<Together>,
}

/// How many commands held several calls, how many calls these were, and what became of touches.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Together {
    pub(crate) finds: u64,
    pub(crate) loads: u64,
    pub(crate) bulks: u64,
    pub(crate) saves: u64,
    /// Those that were sent alone.
    pub(crate) touches: u64,
    pub(crate) skipped: u64,
}

impl Meters {
    pub(crate) fn install() -> Result<Self, String> {
        let recorder = DebuggingRecorder::new();
        let snapshotter = recorder.snapshotter();
        recorder.install().map_err(|error| error.to_string())?;
        Ok(Self { snapshotter, so_far: Mutex::default() })
    }

    /// Adds up what was counted since the last time. To be called now and then: until then every
    /// duration is kept.
    pub(crate) fn read(&self) -> Together {
        let mut so_far = self.so_far();
        for (key, _, _, value) in self.snapshotter.snapshot().into_vec() {
            let (_, key) = key.into_parts();
            let verb = key.labels().find(|label| label.key() == "verb");
            let verb = verb.map_or("", |label| label.value());
            #[allow(
                clippy::cast_possible_truncation,
                clippy::cast_sign_loss,
                reason = "numbers of calls"
            )]
            match (key.name(), verb, value) {
                (TOGETHER, verb, DebugValue::Histogram(sizes)) => {
                    let Together { finds, loads, bulks, saves, .. } = &mut *so_far;
                    let of_loads = verb == "find";
                    let (commands, calls) = if of_loads { (finds, loads) } else { (bulks, saves) };
                    *commands += sizes.len() as u64;
                    *calls += sizes.iter().map(|size| size.into_inner() as u64).sum::<u64>();
                }
                (OPERATIONS, "touch", DebugValue::Counter(count)) => so_far.touches += count,
                (SKIPPED, _, DebugValue::Counter(count)) => so_far.skipped += count,
                _ => {}
            }
        }
        *so_far
    }

    fn so_far(&self) -> MutexGuard<'_, Together> {
        self.so_far.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Together {
    /// What did not happen, of what a run is to tell something about.
    pub(crate) fn missing(&self) -> Option<&'static str> {
        let all = [
            (self.finds, "no loads left together"),
            (self.bulks, "no saves left together"),
            (self.touches, "no session was touched"),
            (self.skipped, "no touch was left out"),
        ];
        all.into_iter().find(|(count, _)| *count == 0).map(|(_, text)| text)
    }
}
