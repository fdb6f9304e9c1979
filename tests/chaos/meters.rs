//! The stores' own metrics: whether calls were sent in batches, and whether sessions were touched.

use std::sync::{Mutex, MutexGuard, PoisonError};

use metrics_util::debugging::{DebugValue, DebuggingRecorder, Snapshotter};

const TOGETHER: &str = "session_store_mongo_batch_size";
const OPERATIONS: &str = "session_store_mongo_operations_total";
const MERGES: &str = "session_store_merges_total";
const SKIPPED: &str = "session_store_touches_skipped_total";
const GAPS: &str = "session_store_stream_gaps_total";
const INVALIDATIONS: &str = "session_store_cache_invalidations_total";

/// The metrics of all stores that are built from now on.
pub(crate) struct Meters {
    snapshotter: Snapshotter,
    so_far: Mutex<Together>,
}

/// How many commands held several calls, how many calls these were, and how touches were sent.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Together {
    pub(crate) finds: u64,
    pub(crate) loads: u64,
    pub(crate) bulks: u64,
    pub(crate) saves: u64,
    /// Touches that were sent as single commands.
    pub(crate) touches: u64,
    pub(crate) skipped: u64,
    /// Saves of requests that kept the changes of other requests.
    pub(crate) merges: u64,
    /// The invalidations of the caches' entries.
    pub(crate) lost: Lost,
}

/// How often a cache lost entries without a change of the session.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Lost {
    /// Gaps in change streams.
    pub(crate) gaps: u64,
    /// Caches that were emptied after a gap.
    pub(crate) emptied: u64,
    /// Entries that were invalidated after an operation with unknown outcome.
    pub(crate) unknown_outcomes: u64,
}

impl Meters {
    pub(crate) fn install() -> Result<Self, String> {
        let recorder = DebuggingRecorder::new();
        let snapshotter = recorder.snapshotter();
        recorder.install().map_err(|error| error.to_string())?;
        Ok(Self { snapshotter, so_far: Mutex::default() })
    }

    /// Adds up what was counted since the last call. Call it now and then: until then every
    /// duration is kept.
    pub(crate) fn read(&self) -> Together {
        let mut so_far = self.so_far();
        for (key, _, _, value) in self.snapshotter.snapshot().into_vec() {
            let (_, key) = key.into_parts();
            // No metric here has two of these labels.
            let labels = ["verb", "cause", "result"];
            let label = key.labels().find(|label| labels.contains(&label.key()));
            let label = label.map_or("", |label| label.value());
            #[allow(
                clippy::cast_possible_truncation,
                clippy::cast_sign_loss,
                reason = "numbers of calls"
            )]
            match (key.name(), label, value) {
                (TOGETHER, verb, DebugValue::Histogram(sizes)) => {
                    let Together { finds, loads, bulks, saves, .. } = &mut *so_far;
                    let of_loads = verb == "find";
                    let (commands, calls) = if of_loads { (finds, loads) } else { (bulks, saves) };
                    *commands += sizes.len() as u64;
                    *calls += sizes.iter().map(|size| size.into_inner() as u64).sum::<u64>();
                }
                (OPERATIONS, "touch", DebugValue::Counter(count)) => so_far.touches += count,
                (MERGES, "merged", DebugValue::Counter(count)) => so_far.merges += count,
                (SKIPPED, _, DebugValue::Counter(count)) => so_far.skipped += count,
                (GAPS, _, DebugValue::Counter(count)) => so_far.lost.gaps += count,
                (INVALIDATIONS, "gap", DebugValue::Counter(count)) => {
                    so_far.lost.emptied += count;
                }
                (INVALIDATIONS, "unknown_outcome", DebugValue::Counter(count)) => {
                    so_far.lost.unknown_outcomes += count;
                }
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
    /// What did not happen although a run should show it.
    pub(crate) fn missing(&self) -> Option<&'static str> {
        let all = [
            (self.finds, "no loads were batched"),
            (self.bulks, "no saves were batched"),
            (self.touches, "no session was touched"),
            (self.skipped, "no touch was left out"),
            (self.merges, "no save was merged"),
        ];
        all.into_iter().find(|(count, _)| *count == 0).map(|(_, text)| text)
    }
}
