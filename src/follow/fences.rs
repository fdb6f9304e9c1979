//! The fences of a stream: answered, and not passed yet.

use std::collections::VecDeque;

use crate::backend::ServerTime;
use crate::clock::Moment;
use crate::sync::{Mutex, lock};

/// More fences than can wait within any sensible bound.
const MOST_FENCES: usize = 1_024;

/// The fences that have not been passed.
#[derive(Debug, Default)]
pub(super) struct Fences(Mutex<Waiting>);

#[derive(Debug, Default)]
struct Waiting {
    fences: VecDeque<Fence>,
    asked: u64,
    /// The local time of the first fence that has not been passed, were it one that is not kept.
    since: Option<Moment>,
}

#[derive(Debug)]
struct Fence {
    /// The local time before the database was asked.
    at: Moment,
    /// What it answered.
    time: ServerTime,
    /// The batch that was asked for last when the answer came.
    asked: u64,
}

impl Fences {
    /// The number of a batch that is about to be asked for.
    pub(super) fn asks(&self) -> u64 {
        let mut waiting = lock(&self.0);
        waiting.asked += 1;
        waiting.asked
    }

    pub(super) fn add(&self, at: Moment, time: ServerTime) {
        let mut waiting = lock(&self.0);
        let asked = waiting.asked;
        waiting.since.get_or_insert(at);
        if waiting.fences.len() == MOST_FENCES {
            waiting.fences.pop_front();
        }
        waiting.fences.push_back(Fence { at, time, asked });
    }

    /// The local time of the latest fence that has been passed: every change before `reached` has
    /// been taken, and if `complete`, every one from before the batch of that number was asked for.
    pub(super) fn passed(
        &self,
        reached: Option<ServerTime>,
        complete: Option<u64>,
    ) -> Option<Moment> {
        let mut waiting = lock(&self.0);
        let passed = |fence: &Fence| {
            reached.is_some_and(|reached| fence.time < reached)
                || complete.is_some_and(|number| fence.asked < number)
        };
        let last = waiting.fences.iter().rposition(passed)?;
        let at = waiting.fences.drain(..=last).map(|fence| fence.at).next_back();
        waiting.since = waiting.fences.front().map(|fence| fence.at);
        at
    }

    /// Since when fences have been answered, and none of them passed.
    pub(super) fn waiting_since(&self) -> Option<Moment> {
        lock(&self.0).since
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: u64) -> Moment {
        Moment::from_nanos(seconds * 1_000_000_000)
    }

    #[test]
    fn a_fence_is_passed_by_what_lies_strictly_behind_it() {
        let fences = Fences::default();
        fences.add(at(1), ServerTime(10));
        fences.add(at(2), ServerTime(20));
        assert_eq!(fences.passed(Some(ServerTime(10)), None), None, "more may come of that time");
        assert_eq!(fences.passed(Some(ServerTime(11)), None), Some(at(1)));
        assert_eq!(fences.passed(Some(ServerTime(11)), None), None);
        assert_eq!(fences.passed(None, None), None);
        assert_eq!(fences.passed(Some(ServerTime(21)), None), Some(at(2)));
    }

    #[test]
    fn a_complete_batch_passes_only_fences_that_were_answered_before_it_was_asked_for() {
        let fences = Fences::default();
        let first = fences.asks();
        fences.add(at(1), ServerTime(10));
        assert_eq!(fences.passed(None, Some(first)), None, "under way when the fence was answered");
        let second = fences.asks();
        fences.add(at(2), ServerTime(10));
        assert_eq!(fences.passed(None, Some(second)), Some(at(1)));
        assert_eq!(fences.passed(None, Some(fences.asks())), Some(at(2)));
    }

    #[test]
    fn fences_do_not_pile_up() {
        let fences = Fences::default();
        for _ in 0..2 * MOST_FENCES {
            fences.add(at(1), ServerTime(1));
        }
        assert_eq!(lock(&fences.0).fences.len(), MOST_FENCES);
    }
}
