//! `Oracle`: judges each answer of a store by what was true in the database, and when.
//!
//! Each state of a session has a [rank](crate::simulation::database::Span::rank), which grows with each change. For
//! each store and session the oracle keeps *floors*: from some step on, a load that begins must return that rank or
//! a later one. The rules, by the name that a violation has:
//!
//! - `I1`: a load that begins after a delete, a clear or a sign-out has ended returns no state from before it.
//! - `I2`: a load that begins after a save has been acknowledged returns that version or a later one.
//! - `I3`: a load that begins after another load has ended returns no older state than that load did.
//! - `I5`: a load returns only data and an expiry that the session had at some time.
//! - `I6`: a load that begins after a write has failed or timed out returns no state from before the database
//!   carried it out; and a store drops no call before its time.
//! - `I7`: a load returns "absent" only if the session was absent within the staleness bound.
//! - `bound`: a load returns no state that ended longer ago than `max_staleness`, plus the grace in an outage.
//! - `expired`: a load returns no session that had expired before the load began.
//! - `error`: a load fails only if a read of its session failed or was overdue after the load began.
//! - `stream`: after [`MAX_REFUSALS`] refusals in a row, a store opens no stream for [`UNSUPPORTED_RETRY`].
//! - `overload`: an overloaded server makes a store remove no entry, except those of writes with unknown outcome.
//!
//! [`PendingCalls`](crate::simulation::pending_calls::PendingCalls) adds `order` and `expiry`,
//! [`MergeOracle`](crate::simulation::merge_oracle::MergeOracle) `merge` and `renewal`,
//! [`Fleet`](crate::simulation::fleet::Fleet) `deadline`, and [`recovery`](crate::simulation::recovery) `I8`,
//! `convergence` and `hang`.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use crate::error::ErrorKind;
use crate::invalidation::reconnect::{MAX_REFUSALS, UNSUPPORTED_RETRY};
use crate::invalidation::source::Fault;
use crate::session::Session;
use crate::session::id::SessionKey;
use crate::simulation::database::{Database, Span};
use crate::simulation::operation::{CallRecord, Operation, Outcome};
use crate::simulation::types::{Begun, End, FaultConfig, Promise, version};
use crate::time::Moment;

#[derive(Default)]
pub(crate) struct Oracle {
    nodes: Vec<Node>,
    pub(crate) violations: Vec<String>,
    /// The events of the walk, and how often each has happened.
    pub(crate) tally: BTreeMap<&'static str, u64>,
    /// The walk is over: the runtime drops all calls, and that is no violation.
    pub(crate) closing: bool,
    /// When the process last woke up from a suspension.
    pub(crate) woke_up_at: Option<Moment>,
    /// The version that each store has last returned for each session.
    served: BTreeMap<(usize, usize), u64>,
    /// How many entries the stores may have removed for writes with unknown outcome.
    unknown_outcomes: u64,
    /// How many attempts to resume a stream were given up because they took too long.
    too_slow: u64,
}

/// What the oracle knows of one store.
#[derive(Default)]
struct Node {
    /// By session number, in the order of their steps.
    floors: Vec<Vec<Floor>>,
    /// The calls that have not ended.
    pending: BTreeSet<usize>,
    /// When the database last answered the store, and when a call last failed as in an outage.
    answered_at: Option<Moment>,
    failed_at: Option<Moment>,
    /// When the server last rejected a call for overload, and when it last accepted one.
    rejected_at: Option<Moment>,
    accepted_at: Option<Moment>,
    /// How often in a row the server refused a stream that has no position, and when last.
    refused_fresh: u32,
    refused_fresh_at: Option<Moment>,
}

/// A load that begins after `step` must return `rank` or a later one.
#[derive(Clone, Copy)]
struct Floor {
    step: u64,
    rank: usize,
    invariant: &'static str,
}

impl Oracle {
    pub(crate) fn count(&mut self, what: &'static str) {
        *self.tally.entry(what).or_default() += 1;
    }

    pub(crate) fn report_violation(&mut self, text: String) {
        self.violations.push(text);
    }

    /// Records what the [`MergeOracle`](crate::simulation::merge_oracle::MergeOracle) has found.
    pub(crate) fn record_verdict(&mut self, verdict: Option<Result<&'static str, String>>) {
        match verdict {
            Some(Ok(event)) => self.count(event),
            Some(Err(violation)) => self.report_violation(violation),
            None => {}
        }
    }

    pub(crate) fn begin_call(&mut self, node: usize, call: usize) {
        self.node(node).pending.insert(call);
    }

    /// The database has answered a checkpoint of a store, so it is not silent.
    pub(crate) fn record_checkpoint(&mut self, node: usize, now: Moment) {
        self.node(node).answered_at = Some(now);
    }

    /// A call has ended at its store, which has inserted or removed the entry by now.
    pub(crate) fn finish_call(
        &mut self,
        record: &CallRecord,
        call: usize,
        end: End,
        database: &mut Database,
        faults: &FaultConfig,
        (step, now): (u64, Moment),
    ) {
        let deadline = record.asked.after(faults.timeout);
        let in_time = now < deadline;
        let patience = faults.timeout * 2;
        if end == End::Abandoned && !self.closing && now.since(record.asked) < patience {
            self.report_violation(format!("I6: call {call} was dropped before its time"));
        }
        let woke_at = self.woke_up_at.filter(|at| *at > record.asked);
        let removes = matches!(record.operation, Operation::Remove(_) | Operation::Take(_));
        if !in_time || matches!(end, End::Abandoned | End::Failed { .. }) || removes {
            // The store may remove the entry twice: at the deadline of the call, and at its late end.
            self.unknown_outcomes += 2;
        }
        let node = self.node(record.node);
        node.pending.remove(&call);
        // A call of many steps tells its store only at its end that the database answers.
        if record.operation.is_paged() {
            match end {
                End::Failed { outage: true } => node.failed_at = Some(now),
                End::Rejected => node.rejected_at = Some(now),
                _ => {}
            }
        } else {
            match end {
                // The call did not reach the database, so its end says nothing about the database.
                End::NotSent => return,
                _ if !in_time => {
                    node.failed_at = node.failed_at.max(Some(deadline)).max(woke_at);
                }
                End::Failed { outage: true } => node.failed_at = Some(now),
                End::Rejected => node.rejected_at = Some(now),
                _ => {
                    node.answered_at = Some(now);
                    node.accepted_at = Some(now);
                }
            }
        }
        if end == End::Rejected {
            return;
        }
        if record.applied && !in_time {
            self.count("ended after its deadline");
        }
        let answered = end == End::Answered;
        let (numbers, invariant) = match record.operation {
            Operation::Insert(key, _) | Operation::Replace(key, ..) | Operation::Merge(key, _) => {
                let number = database.number(key);
                (number..number + 1, if answered { "I2" } else { "I6, unknown outcome" })
            }
            Operation::Remove(key) | Operation::Take(key) => {
                let number = database.number(key);
                (number..number + 1, if answered { "I1" } else { "I6, unknown outcome" })
            }
            Operation::Clear if end != End::Abandoned => (0..database.sessions(), "I1, clear"),
            _ => return,
        };
        for number in numbers {
            let applied = record.ranks.iter().find(|(it, _)| *it == number).map(|(_, rank)| *rank);
            // Without an answer, and after a clear, the store keeps no entry: a later load reads what is stored now.
            let leaves_nothing = matches!(record.operation, Operation::Clear) || !answered;
            let rank = applied.filter(|_| !leaves_nothing).unwrap_or_else(|| database.rank(number));
            self.raise(record.node, number, Floor { step, rank, invariant });
        }
    }

    /// A sign-out has ended.
    pub(crate) fn record_sign_out(&mut self, node: usize, floors: &[(usize, usize)], step: u64) {
        self.count("signed out");
        for (number, rank) in floors {
            self.raise(node, *number, Floor { step, rank: *rank, invariant: "I1, sign-out" });
        }
    }

    /// A write has timed out: its caller does not know whether the database has carried it out.
    pub(crate) fn record_timeout(
        &mut self,
        node: usize,
        number: usize,
        deadline: Moment,
        database: &mut Database,
    ) {
        let step = database.step();
        let rank = database.rank_before(number, deadline);
        self.count("timed out");
        self.raise(node, number, Floor { step, rank, invariant: "I6, unknown outcome" });
    }

    /// A load has returned. Checks I5, I7, `expired`, `bound` and all floors, in this order.
    #[allow(clippy::too_many_arguments, reason = "the judgement of an answer rests on all of them")]
    pub(crate) fn judge_load(
        &mut self,
        (node, number): (usize, usize),
        begun: Begun,
        answer: Option<&Session>,
        promise: &Promise,
        (database, records): (&mut Database, &[CallRecord]),
        faults: &FaultConfig,
        now: Moment,
    ) {
        let step = database.step();
        let seen = answer.map(|session| version(&session.data));
        self.served.extend(seen.map(|seen| ((node, number), seen)));
        let is_answer = |span: &Span<'_>| match (span.doc, answer) {
            (None, None) => true,
            (Some(doc), Some(session)) => {
                let expires = session.expires;
                let known = doc.expiries.contains(&expires);
                Some(doc.version) == seen
                    && (known || database.touched(number).any(|it| *it == expires))
            }
            _ => false,
        };
        let spans: Vec<_> = database.spans(number).filter(is_answer).collect();
        let whose = format!("session {number} at store {node}, begun at step {}", begun.step);
        if spans.is_empty() {
            let invariant = if answer.is_some() { "I5" } else { "I7" };
            return self.report_violation(format!("{invariant}: {seen:?} was never true: {whose}"));
        }
        if answer.is_some_and(|session| session.expires <= begun.wall) {
            return self.report_violation(format!("expired: {seen:?} was returned: {whose}"));
        }
        let down = !promise.grace.is_zero() && self.may_be_down(node, records, faults, now);
        let reach = promise.max_staleness + if down { promise.grace } else { Duration::ZERO };
        let is_recent = |span: &&Span<'_>| {
            let age = span.until.map_or(Duration::ZERO, |until| begun.at.since(until));
            if !promise.exclusive || answer.is_none() {
                return age <= reach;
            }
            // Only this store changes the sessions. An old state is allowed until the call that ended it has ended.
            let has_ended = |call: usize| records[call].ended.is_some_and(|end| end < begun.step);
            age.is_zero() || span.ended_by.is_some_and(|call| !has_ended(call))
        };
        let recent: Vec<_> = spans.iter().filter(is_recent).collect();
        let Some(last) = recent.last() else {
            let age = spans.last().and_then(|span| Some(begun.at.since(span.until?)));
            let invariant = if answer.is_some() { "bound" } else { "I7" };
            return self.report_violation(format!(
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
            return self.report_violation(format!(
                "{}: {seen:?} (rank {}) is older than rank {}, known since step {}: {whose}",
                floor.invariant, last.rank, floor.rank, floor.step
            ));
        };
        self.raise(node, number, Floor { step, rank, invariant: "I3" });
    }

    /// A load has failed. Checks `error`.
    pub(crate) fn judge_failed_load(
        &mut self,
        (node, key): (usize, SessionKey),
        begun: Begun,
        kind: ErrorKind,
        records: &[CallRecord],
        faults: &FaultConfig,
    ) {
        let woke_up_at = self.woke_up_at;
        let may_be_why = |record: &CallRecord| {
            let reads = matches!(record.operation, Operation::Find(it) if it == key);
            let open = record.ended.is_none_or(|end| end > begun.step);
            let woke_at = woke_up_at.filter(|at| *at > record.asked);
            let noticed = woke_at.max(Some(record.asked.after(faults.timeout)));
            let overdue = noticed >= Some(begun.at);
            record.node == node && reads && open && (kind != ErrorKind::Timeout || overdue)
        };
        if !records.iter().rev().any(may_be_why) {
            let step = begun.step;
            self.report_violation(format!(
                "error: {kind:?}, and no read of the session failed: a load at store {node}, begun at step {step}"
            ));
        }
    }

    /// The version that a store has last returned for a session.
    pub(crate) fn last_served(&self, node: usize, number: usize) -> Option<u64> {
        self.served.get(&(node, number)).copied()
    }

    /// A save without new data was acknowledged. `ranks` are the states that have its data.
    pub(crate) fn record_unchanged_save(
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

    /// Whether the store may take the database for down: the last thing that it learned is a failure, an overdue call
    /// or an overload.
    fn may_be_down(
        &mut self,
        node: usize,
        records: &[CallRecord],
        faults: &FaultConfig,
        now: Moment,
    ) -> bool {
        let woke_up_at = self.woke_up_at;
        let node = self.node(node);
        let pending = node.pending.iter().map(|call| &records[*call]);
        let overdue = pending.filter(|record| {
            !record.operation.is_paged() && record.asked.after(faults.timeout) <= now
        });
        // The store notices a deadline that passed during a suspension only when the process wakes up.
        let noticed = overdue.map(|record| {
            let woke_at = woke_up_at.filter(|at| *at > record.asked);
            woke_at.max(Some(record.asked.after(faults.timeout)))
        });
        let failed = noticed.max().flatten().max(node.failed_at);
        let rejected = node.rejected_at;
        (failed.is_some() && failed >= node.answered_at)
            || (rejected.is_some() && rejected >= node.accepted_at)
    }

    /// A store opens a stream. Checks `stream`.
    pub(crate) fn record_open(&mut self, node: usize, now: Moment) {
        let it = self.node(node);
        let since = it.refused_fresh_at.map(|at| now.since(at));
        if it.refused_fresh >= MAX_REFUSALS && since.is_some_and(|since| since < UNSUPPORTED_RETRY)
        {
            let text =
                format!("stream: store {node} opens a stream {since:?} after the last refusal");
            self.report_violation(text);
        }
    }

    /// The opening of a stream, or a `getMore`, has ended.
    pub(crate) fn record_stream_end(
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

    /// Checks `overload` after a walk whose only fault was overload. `gaps` and `unknown` are the numbers of
    /// invalidations that the caches counted, by cause.
    pub(crate) fn judge_overload(&mut self, gaps: u64, unknown: u64) {
        if gaps > 0 && self.too_slow < u64::from(MAX_REFUSALS) {
            self.report_violation(format!("overload: the cache was emptied {gaps} times"));
        }
        // A save that is still pending may have removed its entry at its deadline already.
        let pending: usize = self.nodes.iter().map(|node| node.pending.len()).sum();
        let most = self.unknown_outcomes + pending as u64;
        if unknown > most {
            self.report_violation(format!(
                "overload: {unknown} entries were removed for unknown outcomes, of which there were {most}"
            ));
        }
    }

    /// The latest floor from before a step.
    fn floor(&mut self, node: usize, number: usize, step: u64) -> Floor {
        let floors = self.floors(node, number);
        let before = floors.partition_point(|floor| floor.step < step);
        let bottom = Floor { step: 0, rank: 0, invariant: "none" };
        before.checked_sub(1).map_or(bottom, |last| floors[last])
    }

    /// Adds a floor, unless the latest one is as high.
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
