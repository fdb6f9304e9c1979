//! Judges each answer by what was really true, and when. Invariants are those of `ARCHITECTURE.md`.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use crate::error::ErrorKind;
use crate::invalidation::reconnect::{MAX_REFUSALS, UNSUPPORTED_RETRY};
use crate::invalidation::source::Fault;
use crate::session::Session;
use crate::session::id::SessionKey;
use crate::simulation::database::{Database, Span};
use crate::simulation::operation::{Operation, Outcome};
use crate::simulation::wire::{Manners, Record};
use crate::time::Moment;
use crate::time::WallTime;

#[derive(Default)]
pub(crate) struct Oracle {
    nodes: Vec<Node>,
    pub(crate) violations: Vec<String>,
    /// What the walks have come across, and how often.
    pub(crate) tally: BTreeMap<&'static str, u64>,
    /// Whether calls may be dropped, since their store is.
    pub(crate) closing: bool,
    /// When the process woke up the last time.
    pub(crate) asleep_at: Option<Moment>,
    /// What each store has served last of each session.
    served: BTreeMap<(usize, usize), u64>,
    /// How many entries may have been removed for calls whose outcome is not known.
    pub(crate) in_doubt: u64,
    /// How many streams took too long to be resumed.
    pub(crate) too_slow: u64,
}

/// What a store may not go back behind, and whether it may think that the database is down.
#[derive(Default)]
struct Node {
    floors: Vec<Vec<Floor>>,
    under_way: BTreeSet<usize>,
    answered_at: Option<Moment>,
    failed_at: Option<Moment>,
    /// When a call was turned away last, and when one was not.
    turned_away_at: Option<Moment>,
    taken_at: Option<Moment>,
    /// How often in a row a stream without a position was refused, and when last.
    refused_fresh: u32,
    refused_fresh_at: Option<Moment>,
}

/// A load that begins after this step answers with this rank or a later one.
#[derive(Clone, Copy)]
struct Floor {
    step: u64,
    rank: usize,
    invariant: &'static str,
}

/// What is promised about the age of what is served.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Promise {
    pub(crate) max_staleness: Duration,
    pub(crate) grace: Duration,
    pub(crate) exclusive: bool,
}

/// How a call ended, as its store knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    GivenUp,
    Answered,
    Failed {
        outage: bool,
    },
    /// The database was not asked.
    NotSent,
    /// The database is overloaded, and has not begun to carry it out.
    TurnedAway,
}

/// When an operation began.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Begun {
    pub(crate) step: u64,
    pub(crate) at: Moment,
    pub(crate) wall: WallTime,
}

impl Oracle {
    pub(crate) fn count(&mut self, what: &'static str) {
        *self.tally.entry(what).or_default() += 1;
    }

    pub(crate) fn violated(&mut self, text: String) {
        self.violations.push(text);
    }

    pub(crate) fn begins(&mut self, node: usize, call: usize) {
        self.node(node).under_way.insert(call);
    }

    /// A fence of a store was answered.
    pub(crate) fn hears(&mut self, node: usize, now: Moment) {
        self.node(node).answered_at = Some(now);
    }

    /// A call has come to its end at its store, which by now has left an entry or removed it.
    pub(crate) fn ends(
        &mut self,
        record: &Record,
        call: usize,
        end: End,
        database: &mut Database,
        manners: &Manners,
        (step, now): (u64, Moment),
    ) {
        let deadline = record.asked.after(manners.timeout);
        let in_time = now < deadline;
        let patience = manners.timeout * 2;
        if end == End::GivenUp && !self.closing && now.since(record.asked) < patience {
            self.violated(format!("I6: call {call} was dropped before its time"));
        }
        let woke_at = self.asleep_at.filter(|at| *at > record.asked);
        let removes = matches!(record.operation, Operation::Remove(_));
        if !in_time || matches!(end, End::GivenUp | End::Failed { .. }) || removes {
            // At its deadline, though it may still have waited to be sent, and once more at its late end.
            self.in_doubt += 2;
        }
        let node = self.node(record.node);
        node.under_way.remove(&call);
        // What a call of many steps has learned its store notes at the end of all.
        if record.operation.is_paged() {
            match end {
                End::Failed { outage: true } => node.failed_at = Some(now),
                End::TurnedAway => node.turned_away_at = Some(now),
                _ => {}
            }
        } else {
            match end {
                // That says nothing about the database.
                End::NotSent => return,
                _ if !in_time => {
                    node.failed_at = node.failed_at.max(Some(deadline)).max(woke_at);
                }
                End::Failed { outage: true } => node.failed_at = Some(now),
                End::TurnedAway => node.turned_away_at = Some(now),
                _ => {
                    node.answered_at = Some(now);
                    node.taken_at = Some(now);
                }
            }
        }
        if end == End::TurnedAway {
            return;
        }
        if record.applied && !in_time {
            self.count("ended after its deadline");
        }
        let answered = end == End::Answered;
        let (numbers, invariant) = match record.operation {
            Operation::Insert(key, _) | Operation::Replace(key, ..) => {
                let number = database.number(key);
                (number..number + 1, if answered { "I2" } else { "I6, in doubt" })
            }
            Operation::Remove(key) => {
                let number = database.number(key);
                (number..number + 1, if answered { "I1" } else { "I6, in doubt" })
            }
            Operation::Clear if end != End::GivenUp => (0..database.sessions(), "I1, clear"),
            _ => return,
        };
        for number in numbers {
            let applied = record.ranks.iter().find(|(it, _)| *it == number).map(|(_, rank)| *rank);
            let emptied = matches!(record.operation, Operation::Clear) || !answered;
            let rank = applied.filter(|_| !emptied).unwrap_or_else(|| database.rank(number));
            self.raise(record.node, number, Floor { step, rank, invariant });
        }
    }

    /// A sign-out has ended: no later load answers with less.
    pub(crate) fn signed_out(&mut self, node: usize, floors: &[(usize, usize)], step: u64) {
        self.count("signed out");
        for (number, rank) in floors {
            self.raise(node, *number, Floor { step, rank: *rank, invariant: "I1, sign-out" });
        }
    }

    /// A caller was told that a write may or may not have happened, since its time was over.
    pub(crate) fn timed_out(
        &mut self,
        node: usize,
        number: usize,
        deadline: Moment,
        database: &mut Database,
    ) {
        let (step, rank) = (database.step(), database.rank_before(number, deadline));
        self.count("timed out");
        self.raise(node, number, Floor { step, rank, invariant: "I6, in doubt" });
    }

    /// A load was answered.
    #[allow(clippy::too_many_arguments, reason = "all that the judgement of an answer rests on")]
    pub(crate) fn judge(
        &mut self,
        (node, number): (usize, usize),
        begun: Begun,
        answer: Option<&Session>,
        promise: &Promise,
        (database, records): (&mut Database, &[Record]),
        manners: &Manners,
        now: Moment,
    ) {
        let (step, seen) =
            (database.step(), answer.map(|session| crate::simulation::version(&session.data)));
        self.served.extend(seen.map(|seen| ((node, number), seen)));
        let is_answer = |span: &Span<'_>| match (span.held, answer) {
            (None, None) => true,
            (Some(held), Some(session)) => {
                let expires = session.expires;
                let known = held.expiries.contains(&expires);
                Some(held.version) == seen
                    && (known || database.touched(number).any(|it| *it == expires))
            }
            _ => false,
        };
        let held: Vec<_> = database.spans(number).filter(is_answer).collect();
        let whose = format!("session {number} at store {node}, begun at step {}", begun.step);
        if held.is_empty() {
            let invariant = if answer.is_some() { "I5" } else { "I7" };
            return self.violated(format!("{invariant}: {seen:?} was never true: {whose}"));
        }
        if answer.is_some_and(|session| session.expires <= begun.wall) {
            return self.violated(format!("expired: {seen:?} was answered: {whose}"));
        }
        let down = !promise.grace.is_zero() && self.may_be_down(node, records, manners, now);
        let reach = promise.max_staleness + if down { promise.grace } else { Duration::ZERO };
        let recent = |span: &&Span<'_>| {
            let age = span.until.map_or(Duration::ZERO, |until| begun.at.since(until));
            if !promise.exclusive || answer.is_none() {
                return age <= reach;
            }
            let known = |call: usize| records[call].ended.is_some_and(|end| end < begun.step);
            age.is_zero() || span.ended_by.is_some_and(|call| !known(call))
        };
        let recent: Vec<_> = held.iter().filter(recent).collect();
        let Some(last) = recent.last() else {
            let age = held.last().and_then(|span| Some(begun.at.since(span.until?)));
            let invariant = if answer.is_some() { "bound" } else { "I7" };
            return self.violated(format!(
                "{invariant}: {seen:?} had not been true for {age:?} (down: {down}): {whose}"
            ));
        };
        let age = last.until.map_or(Duration::ZERO, |until| begun.at.since(until));
        if age > promise.max_staleness {
            self.count("served under the grace");
        } else if !age.is_zero() {
            self.count("served stale, within the bound");
        }
        let floor = self.floor(node, number, begun.step);
        let rank = recent.iter().map(|span| span.rank).find(|rank| *rank >= floor.rank);
        let Some(rank) = rank else {
            return self.violated(format!(
                "{}: {seen:?} (rank {}) is older than rank {}, known since step {}: {whose}",
                floor.invariant, last.rank, floor.rank, floor.step
            ));
        };
        self.raise(node, number, Floor { step, rank, invariant: "I3" });
    }

    /// A load failed: a read of its session must have, and not before the load began.
    pub(crate) fn judge_failure(
        &mut self,
        (node, key): (usize, SessionKey),
        begun: Begun,
        kind: ErrorKind,
        records: &[Record],
        manners: &Manners,
    ) {
        let asleep_at = self.asleep_at;
        let may_be_why = |record: &Record| {
            let reads = matches!(record.operation, Operation::Find(it) if it == key);
            let open = record.ended.is_none_or(|end| end > begun.step);
            let woke_at = asleep_at.filter(|at| *at > record.asked);
            let noticed = woke_at.max(Some(record.asked.after(manners.timeout)));
            let overdue = noticed >= Some(begun.at);
            record.node == node && reads && open && (kind != ErrorKind::Timeout || overdue)
        };
        if !records.iter().rev().any(may_be_why) {
            let step = begun.step;
            let text = format!("{kind:?}, of no read of a load at store {node}, begun at {step}");
            self.violated(text);
        }
    }

    /// What a store has served last of a session.
    pub(crate) fn served(&self, node: usize, number: usize) -> Option<u64> {
        self.served.get(&(node, number)).copied()
    }

    /// A save was acknowledged that changed no data: what it left is at least this version.
    pub(crate) fn kept(
        &mut self,
        (node, number): (usize, usize),
        begun: Begun,
        ranks: &[usize],
        step: u64,
    ) {
        let floor = self.floor(node, number, begun.step);
        if let Some(rank) = ranks.iter().copied().find(|rank| *rank >= floor.rank) {
            self.raise(node, number, Floor { step, rank, invariant: "I2, touched" });
        }
    }

    /// Whether a store may have seen no answer of the database after some failure.
    fn may_be_down(
        &mut self,
        node: usize,
        records: &[Record],
        manners: &Manners,
        now: Moment,
    ) -> bool {
        let asleep_at = self.asleep_at;
        let node = self.node(node);
        let asked = node.under_way.iter().map(|call| &records[*call]);
        let overdue = asked.filter(|record| {
            !record.operation.is_paged() && record.asked.after(manners.timeout) <= now
        });
        // A deadline that passed while the process was asleep is noticed once it is awake.
        let noticed = overdue.map(|record| {
            let woke_at = asleep_at.filter(|at| *at > record.asked);
            woke_at.max(Some(record.asked.after(manners.timeout)))
        });
        let failed = noticed.max().flatten().max(node.failed_at);
        let turned_away = node.turned_away_at;
        (failed.is_some() && failed >= node.answered_at)
            || (turned_away.is_some() && turned_away >= node.taken_at)
    }

    /// A store asks for a stream.
    pub(crate) fn opens(&mut self, node: usize, now: Moment) {
        let it = self.node(node);
        let since = it.refused_fresh_at.map(|at| now.since(at));
        if it.refused_fresh >= MAX_REFUSALS && since.is_some_and(|since| since < UNSUPPORTED_RETRY)
        {
            let text = format!("store {node} asks for a stream {since:?} after the last refusal");
            self.violated(text);
        }
    }

    /// What came of that, or of a question for more.
    pub(crate) fn ends_of_a_stream(
        &mut self,
        node: usize,
        operation: &Operation,
        outcome: Option<&Result<Outcome, Fault>>,
        now: Moment,
    ) {
        if matches!((operation, outcome), (Operation::Open(Some(_)), None)) {
            self.too_slow += 1;
        }
        let it = self.node(node);
        match (operation, outcome) {
            (Operation::Open(None), Some(Err(Fault::Refused(_)))) => {
                it.refused_fresh += 1;
                it.refused_fresh_at = Some(now);
                self.count("refused a fresh stream");
            }
            (_, Some(Err(Fault::Overloaded))) => {}
            _ => it.refused_fresh = 0,
        }
    }

    /// Nothing but overload has happened to these stores, which have removed so many entries for a gap
    /// and so many for doubt.
    pub(crate) fn judge_overload(&mut self, gaps: u64, doubts: u64) {
        if gaps > 0 && self.too_slow < u64::from(MAX_REFUSALS) {
            self.violated(format!("overload: the cache was emptied {gaps} times"));
        }
        // A save that is still in flight may have removed its entry at its deadline already.
        let in_flight: usize = self.nodes.iter().map(|node| node.under_way.len()).sum();
        let most = self.in_doubt + in_flight as u64;
        if doubts > most {
            self.violated(format!("overload: {doubts} entries were removed, {most} in doubt"));
        }
    }

    fn floor(&mut self, node: usize, number: usize, step: u64) -> Floor {
        let floors = self.floors(node, number);
        let before = floors.partition_point(|floor| floor.step < step);
        let bottom = Floor { step: 0, rank: 0, invariant: "none" };
        before.checked_sub(1).map_or(bottom, |last| floors[last])
    }

    fn raise(&mut self, node: usize, number: usize, floor: Floor) {
        let floors = self.floors(node, number);
        match floors.last() {
            Some(last) if last.rank >= floor.rank => {}
            _ => floors.push(floor),
        }
    }

    fn floors(&mut self, node: usize, number: usize) -> &mut Vec<Floor> {
        let floors = &mut self.node(node).floors;
        if floors.len() <= number {
            floors.resize_with(number + 1, Vec::new);
        }
        &mut floors[number]
    }

    fn node(&mut self, node: usize) -> &mut Node {
        if self.nodes.len() <= node {
            self.nodes.resize_with(node + 1, Node::default);
        }
        &mut self.nodes[node]
    }
}
