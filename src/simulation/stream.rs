//! The change stream of the simulated database: as mean as what it vouches for allows.

use super::chance::Chance;
use super::operation::Operation;
use super::wire::State;
use crate::backend::{Batch, Change, Fault, ServerTime};

/// An open stream: a cursor on the log.
#[derive(Clone, Debug)]
pub(crate) struct Cursor {
    pub(super) stream: usize,
    opened: usize,
    position: usize,
    /// The last place to go on from that was handed over.
    named: usize,
}

pub(super) type Handed = Batch<usize>;

impl State {
    pub(super) fn open(
        &mut self,
        after: Option<usize>,
        call: usize,
        chance: &Chance,
    ) -> Result<(Cursor, Handed), Fault> {
        if !self.manners.streams {
            return Err(Fault::Unsupported("it is not asked to"));
        }
        if after.is_some_and(|after| after < self.database.oldest) {
            return Err(Fault::Lost);
        }
        let position = after.unwrap_or(self.database.log.len());
        let cursor =
            Cursor { stream: self.streams.len(), opened: position, position, named: position };
        self.streams.push(None);
        // What a new stream does not owe it does not vouch for.
        Ok(self.hand_over(cursor, call, chance, after.is_some()))
    }

    pub(super) fn more(
        &mut self,
        cursor: Cursor,
        call: usize,
        chance: &Chance,
    ) -> Result<(Cursor, Handed), Fault> {
        if let Some(fault) = self.streams[cursor.stream].clone() {
            return Err(fault);
        }
        if let Some(key) = self.manners.busy.filter(|_| !self.manners.healed) {
            self.database.another_write(Some(key));
        }
        Ok(self.hand_over(cursor, call, chance, true))
    }

    /// The time of the latest write, or of the latest when the question was sent.
    pub(super) fn fence(&mut self, call: usize, chance: &Chance) -> ServerTime {
        if chance.happens(0.3) {
            self.database.another_write(None);
        }
        let asked = self.records[call].asked_time;
        ServerTime(if chance.happens(0.3) { asked } else { self.database.time })
    }

    /// Breaks the streams of one store off.
    pub(super) fn break_streams(&mut self, node: usize, fault: &Fault) {
        for waiting in self.calls.keys().map(|call| &self.records[*call]) {
            if let Operation::More(cursor) = &waiting.operation
                && waiting.node == node
            {
                self.streams[cursor.stream] = Some(fault.clone());
            }
        }
    }

    fn hand_over(
        &mut self,
        mut cursor: Cursor,
        call: usize,
        chance: &Chance,
        vouches: bool,
    ) -> (Cursor, Handed) {
        let (log, healed) = (&self.database.log, self.manners.healed);
        let there = log.len() - cursor.position;
        let handed = if healed {
            there
        } else if chance.happens(self.manners.lags) {
            chance.below(2).min(there)
        } else if chance.happens(0.3) {
            chance.below(there + 1)
        } else {
            there
        };
        let mut end = cursor.position + handed;
        let drops = (cursor.position..end).find(|place| log[*place].change.is_none());
        let ended = drops.is_some();
        end = drops.unwrap_or(end);
        let again = if !healed && chance.happens(0.05) {
            chance.below((cursor.position - cursor.opened).min(3) + 1)
        } else {
            0
        };
        let changes = log[cursor.position - again..end].iter().filter_map(|logged| logged.change);
        let changes: Vec<_> = changes.map(|(key, rev)| Change { key, rev }).collect();
        cursor.position = end;
        let position = match chance.below(8) {
            _ if ended => None,
            0 if !healed => None,
            1 if !healed => Some(cursor.named + chance.below(end - cursor.named + 1)),
            _ => Some(end),
        };
        cursor.named = position.unwrap_or(cursor.named);
        let all = end == self.database.log.len();
        let owes_none = end >= self.records[call].asked_log;
        let reached = if self.manners.says_time && !ended && vouches {
            let last = changes.last().is_some().then(|| end.checked_sub(1)).flatten();
            self.time_reached(end, last, all, chance)
        } else {
            None
        };
        let complete = self.manners.says_complete
            && owes_none
            && !ended
            && vouches
            && (healed || chance.happens(0.8));
        (cursor, Batch { changes, ended, position, reached, complete })
    }

    /// A time before which every change has been handed over, up to `end`.
    fn time_reached(
        &mut self,
        end: usize,
        last: Option<usize>,
        all: bool,
        chance: &Chance,
    ) -> Option<ServerTime> {
        let database = &mut self.database;
        let latest = if all { database.time.max(database.sealed) } else { database.log[end].time };
        let choice = if self.manners.healed { 3 } else { chance.below(5) };
        match choice {
            0 => None,
            1 | 2 => last.map(|last| ServerTime(database.log[last].time)),
            3 if all => {
                database.sealed = database.sealed.max(database.time + 1);
                Some(ServerTime(database.sealed))
            }
            _ => Some(ServerTime(latest)),
        }
    }
}
