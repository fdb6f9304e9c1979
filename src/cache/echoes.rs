//! Tells the writes of this store from those of others when the database reports them.
//!
//! Kept are the writes of which the report is still to come and would say nothing new. What is not
//! kept counts as another's, so to forget one costs an entry, never a stale answer.

use std::collections::HashMap;

use crate::backend::Rev;
use crate::metrics::Void;
use crate::sync::{AtomicBool, Mutex, Ordering, lock};

/// More than ever are under way at once; beyond it writes evict what they left.
const MOST: usize = 65_536;

#[derive(Debug, Default)]
pub(crate) struct Echoes {
    listening: AtomicBool,
    writes: Mutex<HashMap<Rev, State>>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Sent in this generation of its session, and neither answered nor reported.
    UnderWay(u64),
    /// Reported before it was answered; the generation that began then.
    Landed(u64),
    /// Answered, and the cache has taken it; its report says nothing new.
    Acknowledged,
}

/// What a reported change is to this store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Report {
    /// A write of its own of which all is known.
    Echo,
    /// A write of its own that has not been answered yet.
    Early,
    /// Another's, or one of which it knows nothing.
    Foreign,
}

impl Report {
    pub(crate) fn is_news(self) -> bool {
        self != Self::Echo
    }

    pub(crate) fn is_own(self) -> bool {
        self != Self::Foreign
    }
}

impl Echoes {
    /// A write is about to be sent, in a generation of its session that began already.
    pub(crate) fn sends(&self, rev: Rev, generation: u64) {
        if !self.listening.load(Ordering::Acquire) {
            return;
        }
        let mut writes = lock(&self.writes);
        if writes.len() < MOST {
            writes.insert(rev, State::UnderWay(generation));
        }
    }

    /// A write was acknowledged. `Some` generation if it has been reported already: the write is as
    /// new as that generation.
    pub(crate) fn landed(&self, rev: Rev) -> Option<u64> {
        match lock(&self.writes).get(&rev)? {
            State::Landed(generation) => Some(*generation),
            State::UnderWay(_) | State::Acknowledged => None,
        }
    }

    /// A write was acknowledged, and no entry from before it is left. Not earlier: a report that is
    /// passed over vouches for what is cached.
    pub(crate) fn acknowledges(&self, rev: Rev) {
        let mut writes = lock(&self.writes);
        match writes.get_mut(&rev) {
            Some(State::Landed(_)) => drop(writes.remove(&rev)),
            Some(state) => *state = State::Acknowledged,
            None => {}
        }
    }

    /// Nobody knows how a write ended, or it changed nothing.
    pub(crate) fn doubts(&self, rev: Rev) {
        lock(&self.writes).remove(&rev);
    }

    /// The database reports a write. Unless that says nothing new, `void` must remove what is
    /// cached; it answers with the generation that begins.
    pub(crate) fn reports(&self, rev: Option<Rev>, void: impl FnOnce(Void) -> u64) -> Report {
        // Locked while `void` runs: the write may be acknowledged before this or after, not amidst.
        let mut writes = lock(&self.writes);
        match rev.and_then(|rev| writes.get_mut(&rev).map(|state| (rev, state))) {
            Some((rev, State::Acknowledged)) => {
                writes.remove(&rev);
                Report::Echo
            }
            Some((rev, state @ State::UnderWay(_))) => {
                // A read from before the write may have left an entry: the answer that would
                // remove it can be as late as the operation timeout.
                let begins = void(Void::Echo);
                // The write stays as current as it was, and no more: of two that overlap, the later
                // one may have been acknowledged already, whose report will say nothing new.
                if *state == State::UnderWay(begins.wrapping_sub(1)) {
                    *state = State::Landed(begins);
                } else {
                    writes.remove(&rev);
                }
                Report::Early
            }
            Some((_, State::Landed(_))) | None => {
                void(Void::Remote);
                Report::Foreign
            }
        }
    }

    /// Reports may have been lost; from here on they come, or nobody listens to them.
    pub(crate) fn restart(&self, listening: bool) {
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
    use crate::backend::RevSource;

    fn listening() -> Echoes {
        let echoes = Echoes::default();
        echoes.restart(true);
        echoes
    }

    #[test]
    fn a_report_after_the_answer_says_nothing_new_and_only_once() {
        let (echoes, rev) = (listening(), RevSource::new().next());
        echoes.sends(rev, 6);
        assert_eq!(echoes.landed(rev), None);
        echoes.acknowledges(rev);
        assert!(!echoes.reports(Some(rev), |_| 1).is_news());
        assert!(echoes.reports(Some(rev), |_| 1).is_news(), "told twice");
        assert_eq!(echoes.len(), 0);
    }

    #[test]
    fn a_report_before_the_answer_removes_what_older_reads_left() {
        let (echoes, rev) = (listening(), RevSource::new().next());
        echoes.sends(rev, 6);
        assert!(echoes.reports(Some(rev), |_| 7).is_news());
        assert_eq!(echoes.landed(rev), Some(7));
        echoes.acknowledges(rev);
        assert_eq!(echoes.len(), 0);
    }

    #[test]
    fn a_report_while_an_acknowledged_write_is_taken_is_news() {
        let (echoes, rev) = (listening(), RevSource::new().next());
        echoes.sends(rev, 6);
        assert_eq!(echoes.landed(rev), None);
        assert!(echoes.reports(Some(rev), |_| 7).is_news());
        echoes.acknowledges(rev);
        assert_eq!(echoes.len(), 0);
    }

    #[test]
    fn a_report_does_not_make_a_write_current_that_was_overtaken_before() {
        let (echoes, rev) = (listening(), RevSource::new().next());
        echoes.sends(rev, 6);
        assert!(echoes.reports(Some(rev), |_| 8).is_news());
        assert_eq!(echoes.landed(rev), None);
        echoes.acknowledges(rev);
        assert_eq!(echoes.len(), 0);
    }

    #[test]
    fn a_write_in_doubt_or_of_another_store_is_news() {
        let (echoes, revs) = (listening(), RevSource::new());
        let (doubtful, foreign) = (revs.next(), RevSource::new().next());
        echoes.sends(doubtful, 6);
        echoes.doubts(doubtful);
        assert!(echoes.reports(Some(doubtful), |_| 1).is_news());
        assert!(echoes.reports(Some(foreign), |_| 1).is_news());
        assert!(echoes.reports(None, |_| 1).is_news());
        assert_eq!(echoes.landed(doubtful), None);
        echoes.acknowledges(doubtful);
        assert_eq!(echoes.len(), 0);
    }

    #[test]
    fn nothing_is_kept_where_nobody_listens() {
        let (echoes, rev) = (Echoes::default(), RevSource::new().next());
        echoes.sends(rev, 6);
        echoes.acknowledges(rev);
        assert_eq!((echoes.len(), echoes.landed(rev)), (0, None));
    }

    #[test]
    fn memory_is_bounded() {
        let (echoes, revs) = (listening(), RevSource::new());
        for _ in 0..2 * MOST {
            echoes.sends(revs.next(), 0);
        }
        assert_eq!(echoes.len(), MOST);
    }
}
