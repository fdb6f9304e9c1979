//! `Checkpoints`: the checkpoints that the change stream has not confirmed yet.

use std::collections::VecDeque;

use crate::invalidation::source::{PrimaryTime, ServerId, ServerTime};
use crate::sync::{Mutex, lock};
use crate::time::Moment;

/// The largest number of checkpoints that are kept. No sensible staleness bound lets as many as this wait.
const MAX_PENDING: usize = 1_024;

/// The checkpoints of one open stream that are not confirmed.
///
/// A lock, because one loop of the listener adds them while another one confirms them.
#[derive(Debug, Default)]
pub(crate) struct Checkpoints(Mutex<Pending>);

#[derive(Debug, Default)]
struct Pending {
    checkpoints: VecDeque<Checkpoint>,
    /// The number of the batch that was requested last.
    last_batch: u64,
    /// The local time of the oldest checkpoint that is not confirmed. It may have been dropped from
    /// `checkpoints`.
    since: Option<Moment>,
}

#[derive(Debug)]
struct Checkpoint {
    /// The local time before the primary was asked.
    at: Moment,
    answer: PrimaryTime,
    /// The batch that had been requested last when the primary answered.
    requested_batch: u64,
}

impl Checkpoint {
    /// Whether a batch shows that every change up to this checkpoint was applied. See
    /// [`confirm`](Checkpoints::confirm).
    fn is_confirmed(
        &self,
        reached: Option<ServerTime>,
        complete_on: Option<&ServerId>,
        batch: u64,
    ) -> bool {
        if reached.is_some_and(|reached| self.answer.time < reached) {
            return true;
        }
        // A member that is no longer the primary may not have what the new primary has answered with.
        let is_visible = complete_on.is_some() && self.answer.visible_on.as_ref() == complete_on;
        let was_answered_before = self.requested_batch < batch;
        is_visible && was_answered_before
    }
}

impl Checkpoints {
    /// The number of a batch that is about to be requested.
    pub(crate) fn begin_batch(&self) -> u64 {
        let mut pending = lock(&self.0);
        pending.last_batch += 1;
        pending.last_batch
    }

    pub(crate) fn add(&self, at: Moment, answer: PrimaryTime) {
        let mut pending = lock(&self.0);
        let requested_batch = pending.last_batch;
        pending.since.get_or_insert(at);
        if pending.checkpoints.len() == MAX_PENDING {
            pending.checkpoints.pop_front();
        }
        pending.checkpoints.push_back(Checkpoint { at, answer, requested_batch });
    }

    /// Removes the checkpoints that this batch confirms, and returns the local time of the latest one.
    ///
    /// The batch shows that the cache has every change before `reached`, and every change that the member
    /// `complete_on` could see when the batch was requested.
    pub(crate) fn confirm(
        &self,
        reached: Option<ServerTime>,
        complete_on: Option<&ServerId>,
        batch: u64,
    ) -> Option<Moment> {
        let mut pending = lock(&self.0);
        let is_confirmed = |it: &Checkpoint| it.is_confirmed(reached, complete_on, batch);
        let last = pending.checkpoints.iter().rposition(is_confirmed)?;
        let at = pending.checkpoints.drain(..=last).map(|it| it.at).next_back();
        pending.since = pending.checkpoints.front().map(|it| it.at);
        at
    }

    /// Since when checkpoints have been answered without being confirmed.
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
    fn a_checkpoint_is_confirmed_by_a_later_time_and_not_by_its_own() {
        let checkpoints = Checkpoints::default();
        let confirm = |reached: Option<u64>| checkpoints.confirm(reached.map(ServerTime), None, 1);
        checkpoints.add(at(1), answer(10));
        checkpoints.add(at(2), answer(20));
        assert_eq!(confirm(Some(10)), None, "more changes of that time may follow");
        assert_eq!(confirm(Some(11)), Some(at(1)));
        assert_eq!(confirm(Some(11)), None);
        assert_eq!(confirm(None), None);
        assert_eq!(confirm(Some(21)), Some(at(2)));
    }

    #[test]
    fn a_complete_batch_confirms_only_checkpoints_that_were_answered_before_its_request() {
        let checkpoints = Checkpoints::default();
        let one = server("one");
        let first = checkpoints.begin_batch();
        checkpoints.add(at(1), answer(10));
        let confirm = |number| checkpoints.confirm(None, Some(&one), number);
        assert_eq!(confirm(first), None, "requested before the checkpoint was answered");
        let second = checkpoints.begin_batch();
        checkpoints.add(at(2), answer(10));
        assert_eq!(confirm(second), Some(at(1)));
        assert_eq!(confirm(checkpoints.begin_batch()), Some(at(2)));
    }

    #[test]
    fn a_complete_batch_confirms_only_checkpoints_whose_changes_its_member_can_see() {
        let checkpoints = Checkpoints::default();
        let one = server("one");
        let other = server("other");
        checkpoints.add(at(1), answer(10));
        let number = checkpoints.begin_batch();
        assert_eq!(checkpoints.confirm(None, Some(&other), number), None, "a former primary");
        assert_eq!(checkpoints.confirm(None, None, number), None);
        assert_eq!(checkpoints.confirm(None, Some(&one), number), Some(at(1)));
        checkpoints.add(at(2), PrimaryTime { visible_on: None, ..answer(10) });
        let number = checkpoints.begin_batch();
        for member in [Some(&one), Some(&other), None] {
            assert_eq!(checkpoints.confirm(None, member, number), None, "no majority has it yet");
        }
        assert_eq!(checkpoints.confirm(Some(ServerTime(11)), None, number), Some(at(2)));
    }

    #[test]
    fn the_number_of_pending_checkpoints_is_bounded() {
        let checkpoints = Checkpoints::default();
        for _ in 0..2 * MAX_PENDING {
            checkpoints.add(at(1), answer(1));
        }
        assert_eq!(lock(&checkpoints.0).checkpoints.len(), MAX_PENDING);
    }
}
