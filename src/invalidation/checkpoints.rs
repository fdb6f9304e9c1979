//! The fences of a stream: answered, and not passed yet.

use std::collections::VecDeque;

use crate::invalidation::source::{PrimaryTime, ServerId, ServerTime};
use crate::sync::{Mutex, lock};
use crate::time::Moment;

/// More fences than can wait within any sensible bound.
const MAX_PENDING: usize = 1_024;

/// The fences that have not been passed.
#[derive(Debug, Default)]
pub(crate) struct Checkpoints(Mutex<Pending>);

#[derive(Debug, Default)]
struct Pending {
    checkpoints: VecDeque<Checkpoint>,
    last_batch: u64,
    /// The local time of the first fence that has not been passed, were it one that is not kept.
    since: Option<Moment>,
}

#[derive(Debug)]
struct Checkpoint {
    /// The local time before the database was asked.
    at: Moment,
    /// What it answered.
    answer: PrimaryTime,
    /// The batch that was asked for last when the answer came.
    asked: u64,
}

impl Checkpoints {
    /// The number of a batch that is about to be asked for.
    pub(crate) fn begin_batch(&self) -> u64 {
        let mut waiting = lock(&self.0);
        waiting.last_batch += 1;
        waiting.last_batch
    }

    pub(crate) fn add(&self, at: Moment, answer: PrimaryTime) {
        let mut waiting = lock(&self.0);
        let asked = waiting.last_batch;
        waiting.since.get_or_insert(at);
        if waiting.checkpoints.len() == MAX_PENDING {
            waiting.checkpoints.pop_front();
        }
        waiting.checkpoints.push_back(Checkpoint { at, answer, asked });
    }

    /// The local time of the latest fence that the batch of this number has passed. Every change before
    /// `reached` has been taken, and every one that the member `complete_on` could see when the batch was
    /// asked for.
    pub(crate) fn confirm(
        &self,
        reached: Option<ServerTime>,
        complete_on: Option<&ServerId>,
        number: u64,
    ) -> Option<Moment> {
        let mut waiting = lock(&self.0);
        let passed = |fence: &Checkpoint| {
            let lies_behind = reached.is_some_and(|reached| fence.answer.time < reached);
            // A member that is primary no more may not have what the new primary has answered with.
            let is_visible =
                complete_on.is_some() && fence.answer.visible_on.as_ref() == complete_on;
            let was_answered_before = fence.asked < number;
            lies_behind || (is_visible && was_answered_before)
        };
        let last = waiting.checkpoints.iter().rposition(passed)?;
        let at = waiting.checkpoints.drain(..=last).map(|fence| fence.at).next_back();
        waiting.since = waiting.checkpoints.front().map(|fence| fence.at);
        at
    }

    /// Since when fences have been answered, and none of them passed.
    pub(crate) fn pending_since(&self) -> Option<Moment> {
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
        let fences = Checkpoints::default();
        let passed = |reached: Option<u64>| fences.confirm(reached.map(ServerTime), None, 1);
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
        let fences = Checkpoints::default();
        let one = server("one");
        let first = fences.begin_batch();
        fences.add(at(1), answer(10));
        let passed = |number| fences.confirm(None, Some(&one), number);
        assert_eq!(passed(first), None, "under way when the fence was answered");
        let second = fences.begin_batch();
        fences.add(at(2), answer(10));
        assert_eq!(passed(second), Some(at(1)));
        assert_eq!(passed(fences.begin_batch()), Some(at(2)));
    }

    #[test]
    fn a_complete_batch_passes_only_fences_whose_changes_its_member_can_see() {
        let fences = Checkpoints::default();
        let one = server("one");
        let other = server("other");
        fences.add(at(1), answer(10));
        let number = fences.begin_batch();
        assert_eq!(
            fences.confirm(None, Some(&other), number),
            None,
            "a primary that is one no more"
        );
        assert_eq!(fences.confirm(None, None, number), None);
        assert_eq!(fences.confirm(None, Some(&one), number), Some(at(1)));
        fences.add(at(2), PrimaryTime { visible_on: None, ..answer(10) });
        let number = fences.begin_batch();
        for member in [Some(&one), Some(&other), None] {
            assert_eq!(fences.confirm(None, member, number), None, "not a majority's yet");
        }
        assert_eq!(fences.confirm(Some(ServerTime(11)), None, number), Some(at(2)));
    }

    #[test]
    fn fences_do_not_pile_up() {
        let fences = Checkpoints::default();
        for _ in 0..2 * MAX_PENDING {
            fences.add(at(1), answer(1));
        }
        assert_eq!(lock(&fences.0).checkpoints.len(), MAX_PENDING);
    }
}
