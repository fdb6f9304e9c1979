//! `OwnWrites`: recognises the writes of this store when the change stream reports them.
//!
//! The state of one write, by its [`Rev`]:
//!
//! | state | event | then |
//! |---|---|---|
//! | not tracked | sent | `Sent` |
//! | `Sent` | acknowledged | `Acknowledged` |
//! | `Sent`, and its version was current | reported | invalidate, `Seen` |
//! | `Sent`, and its version was outdated | reported | invalidate, not tracked |
//! | `Seen` | acknowledged | not tracked |
//! | `Acknowledged` | reported | keep the entry, not tracked |
//! | any | failed with unknown outcome, or changed nothing | not tracked |
//! | not tracked, or `Seen` | reported | invalidate, as for another instance's write |
//!
//! So to forget a write costs one read, and never serves a stale entry.

use std::collections::HashMap;

use crate::session::revision::Rev;
use crate::sync::{AtomicBool, Mutex, Ordering, lock};
use crate::telemetry::metrics::Invalidation;

/// Bounds the memory, far above the number of writes that are pending at once. A write beyond it is not
/// tracked.
const MAX_TRACKED: usize = 65_536;

#[derive(Debug, Default)]
pub(crate) struct OwnWrites {
    /// Whether a change stream reports the writes. Otherwise no report would ever remove them from the
    /// map. An atomic, so that [`record_sent`](Self::record_sent) takes no lock without a stream.
    listening: AtomicBool,
    /// A std mutex, since nothing awaits while it is held.
    writes: Mutex<HashMap<Rev, State>>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Sent in this generation of its session, and neither acknowledged nor reported yet.
    Sent(u64),
    /// Reported before it was acknowledged. The report began this generation.
    Seen(u64),
    /// Acknowledged, and the cache has taken it. Its report brings nothing new.
    Acknowledged,
}

/// Whose write a reported change is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ChangeOrigin {
    /// A write of this store that the cache has taken already.
    OwnAcknowledged,
    /// A write of this store that has not been acknowledged yet.
    OwnPending,
    /// A write of another instance, or one that is not tracked.
    Foreign,
}

impl ChangeOrigin {
    /// Whether the report of the change has invalidated the entry.
    pub(crate) fn has_invalidated(self) -> bool {
        self != Self::OwnAcknowledged
    }

    pub(crate) fn is_own(self) -> bool {
        self != Self::Foreign
    }
}

impl OwnWrites {
    /// Tracks a write that is about to be sent. `generation` is that of its version.
    pub(crate) fn record_sent(&self, rev: Rev, generation: u64) {
        if !self.listening.load(Ordering::Acquire) {
            return;
        }
        let mut writes = lock(&self.writes);
        if writes.len() < MAX_TRACKED {
            writes.insert(rev, State::Sent(generation));
        }
    }

    /// The generation that the report of an acknowledged write has begun, if the report came first. The
    /// write is as new as that generation.
    pub(crate) fn seen_generation(&self, rev: Rev) -> Option<u64> {
        match lock(&self.writes).get(&rev)? {
            State::Seen(generation) => Some(*generation),
            State::Sent(_) | State::Acknowledged => None,
        }
    }

    /// Records that a write was acknowledged. Call it only after the cache has taken the write: from
    /// then on its report keeps the entry, so no entry from before the write may be left.
    pub(crate) fn record_acked(&self, rev: Rev) {
        let mut writes = lock(&self.writes);
        match writes.get_mut(&rev) {
            Some(State::Seen(_)) => {
                writes.remove(&rev);
            }
            Some(state) => *state = State::Acknowledged,
            None => {}
        }
    }

    /// Records that a write has failed with unknown outcome, or has changed nothing.
    pub(crate) fn record_unknown(&self, rev: Rev) {
        lock(&self.writes).remove(&rev);
    }

    /// Records that the database reports a write. Unless the cache has taken the write already, calls
    /// `invalidate`, which must remove the entry and return the new generation.
    pub(crate) fn record_seen(
        &self,
        rev: Option<Rev>,
        invalidate: impl FnOnce(Invalidation) -> u64,
    ) -> ChangeOrigin {
        // The lock is held while `invalidate` runs. So the write is acknowledged before this or after
        // it, and not in between.
        let mut writes = lock(&self.writes);
        match rev.and_then(|rev| writes.get_mut(&rev).map(|state| (rev, state))) {
            Some((rev, State::Acknowledged)) => {
                writes.remove(&rev);
                ChangeOrigin::OwnAcknowledged
            }
            Some((rev, state @ State::Sent(_))) => {
                // A read from before the write may have inserted an entry. The answer to the write would
                // remove it too, but can take as long as the operation timeout.
                let generation = invalidate(Invalidation::OwnWrite);
                // The write moves to the new generation only if its version was current. Otherwise it
                // could replace a later write, which was acknowledged in between and whose report will
                // keep the entry.
                if *state == State::Sent(generation.wrapping_sub(1)) {
                    *state = State::Seen(generation);
                } else {
                    writes.remove(&rev);
                }
                ChangeOrigin::OwnPending
            }
            Some((_, State::Seen(_))) | None => {
                invalidate(Invalidation::Remote);
                ChangeOrigin::Foreign
            }
        }
    }

    /// Forgets all writes, since reports may have been lost. `listening` says whether a change stream
    /// reports the later ones.
    pub(crate) fn reset(&self, listening: bool) {
        self.listening.store(listening, Ordering::Release);
        lock(&self.writes).clear();
    }

    #[cfg(test)]
    pub(crate) fn len(&self) -> usize {
        lock(&self.writes).len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::session::revision::RevSource;

    fn listening() -> OwnWrites {
        let own_writes = OwnWrites::default();
        own_writes.reset(true);
        own_writes
    }

    /// Reports the write. The report begins this generation.
    fn report(own_writes: &OwnWrites, rev: Rev, generation: u64) -> ChangeOrigin {
        own_writes.record_seen(Some(rev), |_| generation)
    }

    #[test]
    fn a_report_after_the_acknowledgement_keeps_the_entry_once() {
        let own_writes = listening();
        let rev = RevSource::new().next();
        own_writes.record_sent(rev, 6);
        assert_eq!(own_writes.seen_generation(rev), None);
        own_writes.record_acked(rev);
        assert_eq!(report(&own_writes, rev, 1), ChangeOrigin::OwnAcknowledged);
        assert_eq!(report(&own_writes, rev, 1), ChangeOrigin::Foreign, "a second report");
        assert_eq!(own_writes.len(), 0);
    }

    #[test]
    fn a_report_before_the_acknowledgement_invalidates_and_moves_the_write_to_its_generation() {
        let own_writes = listening();
        let rev = RevSource::new().next();
        own_writes.record_sent(rev, 6);
        assert_eq!(report(&own_writes, rev, 7), ChangeOrigin::OwnPending);
        assert_eq!(own_writes.seen_generation(rev), Some(7));
        own_writes.record_acked(rev);
        assert_eq!(own_writes.len(), 0);
    }

    #[test]
    fn a_report_while_the_cache_takes_an_acknowledged_write_invalidates() {
        let own_writes = listening();
        let rev = RevSource::new().next();
        own_writes.record_sent(rev, 6);
        assert_eq!(own_writes.seen_generation(rev), None);
        assert!(report(&own_writes, rev, 7).has_invalidated());
        own_writes.record_acked(rev);
        assert_eq!(own_writes.len(), 0);
    }

    #[test]
    fn a_report_does_not_move_a_write_whose_version_was_outdated() {
        let own_writes = listening();
        let rev = RevSource::new().next();
        own_writes.record_sent(rev, 6);
        assert!(report(&own_writes, rev, 8).has_invalidated());
        assert_eq!(own_writes.seen_generation(rev), None);
        own_writes.record_acked(rev);
        assert_eq!(own_writes.len(), 0);
    }

    #[test]
    fn the_report_of_a_write_of_unknown_outcome_or_of_another_store_invalidates() {
        let own_writes = listening();
        let unknown = RevSource::new().next();
        let foreign = RevSource::new().next();
        own_writes.record_sent(unknown, 6);
        own_writes.record_unknown(unknown);
        assert_eq!(report(&own_writes, unknown, 1), ChangeOrigin::Foreign);
        assert_eq!(report(&own_writes, foreign, 1), ChangeOrigin::Foreign);
        assert_eq!(own_writes.record_seen(None, |_| 1), ChangeOrigin::Foreign);
        assert_eq!(own_writes.seen_generation(unknown), None);
        own_writes.record_acked(unknown);
        assert_eq!(own_writes.len(), 0);
    }

    #[test]
    fn no_write_is_tracked_without_a_change_stream() {
        let own_writes = OwnWrites::default();
        let rev = RevSource::new().next();
        own_writes.record_sent(rev, 6);
        own_writes.record_acked(rev);
        assert_eq!(own_writes.len(), 0);
        assert_eq!(own_writes.seen_generation(rev), None);
    }

    #[test]
    fn the_number_of_tracked_writes_is_bounded() {
        let own_writes = listening();
        let revs = RevSource::new();
        for _ in 0..2 * MAX_TRACKED {
            own_writes.record_sent(revs.next(), 0);
        }
        assert_eq!(own_writes.len(), MAX_TRACKED);
    }
}
