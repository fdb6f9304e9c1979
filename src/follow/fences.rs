//! The fences of a stream: answered, and not passed yet.

use std::collections::VecDeque;

use crate::backend::{PrimaryTime, ServerId, ServerTime};
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
    answer: PrimaryTime,
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

    pub(super) fn add(&self, at: Moment, answer: PrimaryTime) {
        let mut waiting = lock(&self.0);
        let asked = waiting.asked;
        waiting.since.get_or_insert(at);
        if waiting.fences.len() == MOST_FENCES {
            waiting.fences.pop_front();
        }
        waiting.fences.push_back(Fence { at, answer, asked });
    }

    /// The local time of the latest fence that the batch of this number has passed. Every change before
    /// `reached` has been taken, and every one that the member `complete_on` could see when the batch was
    /// asked for.
    pub(super) fn passed(
        &self,
        reached: Option<ServerTime>,
        complete_on: Option<&ServerId>,
        number: u64,
    ) -> Option<Moment> {
        let mut waiting = lock(&self.0);
        let passed = |fence: &Fence| {
            let lies_behind = reached.is_some_and(|reached| fence.answer.time < reached);
            // A member that is primary no more may not have what the new primary has answered with.
            let is_visible =
                complete_on.is_some() && fence.answer.visible_on.as_ref() == complete_on;
            let was_answered_before = fence.asked < number;
            lies_behind || (is_visible && was_answered_before)
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

    fn server(name: &str) -> ServerId {
        ServerId(name.into())
    }

    fn answer(time: u64) -> PrimaryTime {
        PrimaryTime { time: ServerTime(time), visible_on: Some(server("one")) }
    }

    #[test]
    fn a_fence_is_passed_by_what_lies_strictly_behind_it() {
        let fences = Fences::default();
        let passed = |reached: Option<u64>| fences.passed(reached.map(ServerTime), None, 1);
        fences.add(at(1), answer(10));
        fences.add(at(2), answer(20));
        assert_eq!(passed(Some(10)), None, "more may come of that time");
        assert_eq!(passed(Some(11)), Some(at(1)));
        assert_eq!(passed(Some(11)), None);
        assert_eq!(passed(None), None);
        assert_eq!(passed(Some(21)), Some(at(2)));
    }

    #[test]
    fn a_complete_batch_passes_only_fences_that_were_answered_before_it_was_asked_for() {
        let fences = Fences::default();
        let one = server("one");
        let first = fences.asks();
        fences.add(at(1), answer(10));
        let passed = |number| fences.passed(None, Some(&one), number);
        assert_eq!(passed(first), None, "under way when the fence was answered");
        let second = fences.asks();
        fences.add(at(2), answer(10));
        assert_eq!(passed(second), Some(at(1)));
        assert_eq!(passed(fences.asks()), Some(at(2)));
    }

    #[test]
    fn a_complete_batch_passes_only_fences_whose_changes_its_member_can_see() {
        let fences = Fences::default();
        let one = server("one");
        let other = server("other");
        fences.add(at(1), answer(10));
        let number = fences.asks();
        assert_eq!(
            fences.passed(None, Some(&other), number),
            None,
            "a primary that is one no more"
        );
        assert_eq!(fences.passed(None, None, number), None);
        assert_eq!(fences.passed(None, Some(&one), number), Some(at(1)));
        fences.add(at(2), PrimaryTime { visible_on: None, ..answer(10) });
        let number = fences.asks();
        for member in [Some(&one), Some(&other), None] {
            assert_eq!(fences.passed(None, member, number), None, "not a majority's yet");
        }
        assert_eq!(fences.passed(Some(ServerTime(11)), None, number), Some(at(2)));
    }

    #[test]
    fn fences_do_not_pile_up() {
        let fences = Fences::default();
        for _ in 0..2 * MOST_FENCES {
            fences.add(at(1), answer(1));
        }
        assert_eq!(lock(&fences.0).fences.len(), MOST_FENCES);
    }
}
