//! Tells the writes of this store from those of others when the database reports them.
//!
//! Kept are the writes of which the report is still to come and would say nothing new. What is not
//! kept counts as another's, so to forget one costs an entry, never a stale answer.

use std::collections::HashMap;

use crate::session::revision::Rev;
use crate::sync::{AtomicBool, Mutex, Ordering, lock};
use crate::telemetry::metrics::Invalidation;

/// More than ever are under way at once; beyond it writes evict what they left.
const MAX_TRACKED: usize = 65_536;

#[derive(Debug, Default)]
pub(crate) struct OwnWrites {
    listening: AtomicBool,
    writes: Mutex<HashMap<Rev, State>>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Sent in this generation of its session, and neither answered nor reported.
    Sent(u64),
    /// Reported before it was answered; the generation that began then.
    Seen(u64),
    /// Answered, and the cache has taken it; its report says nothing new.
    Acknowledged,
}

/// What a reported change is to this store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ChangeOrigin {
    /// A write of its own of which all is known.
    OwnAcknowledged,
    /// A write of its own that has not been answered yet.
    OwnPending,
    /// Another's, or one of which it knows nothing.
    Foreign,
}

impl ChangeOrigin {
    pub(crate) fn is_news(self) -> bool {
        self != Self::OwnAcknowledged
    }

    pub(crate) fn is_own(self) -> bool {
        self != Self::Foreign
    }
}

impl OwnWrites {
    /// A write is about to be sent, in a generation of its session that began already.
    pub(crate) fn record_sent(&self, rev: Rev, generation: u64) {
        if !self.listening.load(Ordering::Acquire) {
            return;
        }
        let mut writes = lock(&self.writes);
        if writes.len() < MAX_TRACKED {
            writes.insert(rev, State::Sent(generation));
        }
    }

    /// A write was acknowledged. `Some` generation if it has been reported already: the write is as
    /// new as that generation.
    pub(crate) fn seen_generation(&self, rev: Rev) -> Option<u64> {
        match lock(&self.writes).get(&rev)? {
            State::Seen(generation) => Some(*generation),
            State::Sent(_) | State::Acknowledged => None,
        }
    }

    /// A write was acknowledged, and no entry from before it is left. Not earlier: a report that is
    /// passed over vouches for what is cached.
    pub(crate) fn record_acked(&self, rev: Rev) {
        let mut writes = lock(&self.writes);
        match writes.get_mut(&rev) {
            Some(State::Seen(_)) => drop(writes.remove(&rev)),
            Some(state) => *state = State::Acknowledged,
            None => {}
        }
    }

    /// Nobody knows how a write ended, or it changed nothing.
    pub(crate) fn record_unknown(&self, rev: Rev) {
        lock(&self.writes).remove(&rev);
    }

    /// The database reports a write. Unless that says nothing new, `void` must remove what is
    /// cached; it answers with the generation that begins.
    pub(crate) fn record_seen(
        &self,
        rev: Option<Rev>,
        void: impl FnOnce(Invalidation) -> u64,
    ) -> ChangeOrigin {
        // Locked while `void` runs: the write may be acknowledged before this or after, not amidst.
        let mut writes = lock(&self.writes);
        match rev.and_then(|rev| writes.get_mut(&rev).map(|state| (rev, state))) {
            Some((rev, State::Acknowledged)) => {
                writes.remove(&rev);
                ChangeOrigin::OwnAcknowledged
            }
            Some((rev, state @ State::Sent(_))) => {
                // A read from before the write may have left an entry: the answer that would
                // remove it can be as late as the operation timeout.
                let begins = void(Invalidation::OwnWrite);
                // The write stays as current as it was, and no more: of two that overlap, the later
                // one may have been acknowledged already, whose report will say nothing new.
                if *state == State::Sent(begins.wrapping_sub(1)) {
                    *state = State::Seen(begins);
                } else {
                    writes.remove(&rev);
                }
                ChangeOrigin::OwnPending
            }
            Some((_, State::Seen(_))) | None => {
                void(Invalidation::Remote);
                ChangeOrigin::Foreign
            }
        }
    }

    /// Reports may have been lost; from here on they come, or nobody listens to them.
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
        let echoes = OwnWrites::default();
        echoes.reset(true);
        echoes
    }

    #[test]
    fn a_report_after_the_answer_says_nothing_new_and_only_once() {
        let (echoes, rev) = (listening(), RevSource::new().next());
        echoes.record_sent(rev, 6);
        assert_eq!(echoes.seen_generation(rev), None);
        echoes.record_acked(rev);
        assert!(!echoes.record_seen(Some(rev), |_| 1).is_news());
        assert!(echoes.record_seen(Some(rev), |_| 1).is_news(), "told twice");
        assert_eq!(echoes.len(), 0);
    }

    #[test]
    fn a_report_before_the_answer_removes_what_older_reads_left() {
        let (echoes, rev) = (listening(), RevSource::new().next());
        echoes.record_sent(rev, 6);
        assert!(echoes.record_seen(Some(rev), |_| 7).is_news());
        assert_eq!(echoes.seen_generation(rev), Some(7));
        echoes.record_acked(rev);
        assert_eq!(echoes.len(), 0);
    }

    #[test]
    fn a_report_while_an_acknowledged_write_is_taken_is_news() {
        let (echoes, rev) = (listening(), RevSource::new().next());
        echoes.record_sent(rev, 6);
        assert_eq!(echoes.seen_generation(rev), None);
        assert!(echoes.record_seen(Some(rev), |_| 7).is_news());
        echoes.record_acked(rev);
        assert_eq!(echoes.len(), 0);
    }

    #[test]
    fn a_report_does_not_make_a_write_current_that_was_overtaken_before() {
        let (echoes, rev) = (listening(), RevSource::new().next());
        echoes.record_sent(rev, 6);
        assert!(echoes.record_seen(Some(rev), |_| 8).is_news());
        assert_eq!(echoes.seen_generation(rev), None);
        echoes.record_acked(rev);
        assert_eq!(echoes.len(), 0);
    }

    #[test]
    fn a_write_in_doubt_or_of_another_store_is_news() {
        let (echoes, revs) = (listening(), RevSource::new());
        let (doubtful, foreign) = (revs.next(), RevSource::new().next());
        echoes.record_sent(doubtful, 6);
        echoes.record_unknown(doubtful);
        assert!(echoes.record_seen(Some(doubtful), |_| 1).is_news());
        assert!(echoes.record_seen(Some(foreign), |_| 1).is_news());
        assert!(echoes.record_seen(None, |_| 1).is_news());
        assert_eq!(echoes.seen_generation(doubtful), None);
        echoes.record_acked(doubtful);
        assert_eq!(echoes.len(), 0);
    }

    #[test]
    fn nothing_is_kept_where_nobody_listens() {
        let (echoes, rev) = (OwnWrites::default(), RevSource::new().next());
        echoes.record_sent(rev, 6);
        echoes.record_acked(rev);
        assert_eq!((echoes.len(), echoes.seen_generation(rev)), (0, None));
    }

    #[test]
    fn memory_is_bounded() {
        let (echoes, revs) = (listening(), RevSource::new());
        for _ in 0..2 * MAX_TRACKED {
            echoes.record_sent(revs.next(), 0);
        }
        assert_eq!(echoes.len(), MAX_TRACKED);
    }
}
