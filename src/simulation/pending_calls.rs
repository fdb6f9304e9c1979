//! `PendingCalls`: the store calls that have not ended, and the saves that apps have made.
//!
//! It checks that the batcher sends a call only while its caller waits, that saves of one session are stored in the
//! order of their calls, and that an acknowledged save without new data was right not to store its data.

use std::collections::{BTreeMap, HashMap};
use std::time::Duration;

use crate::session::id::SessionKey;
use crate::session::revision::Rev;
use crate::simulation::database::{Database, StoredDoc};
use crate::simulation::operation::{CallRecord, Operation};
use crate::simulation::oracle::Oracle;
use crate::simulation::types::Begun;
use crate::time::{Moment, WallTime};

#[derive(Default)]
pub(crate) struct PendingCalls {
    /// By the number of the store call.
    pending: BTreeMap<usize, PendingCall>,
    /// The store call of each write. The rev is what a store call and its wire call have in common.
    by_rev: HashMap<Rev, usize>,
    /// The store call that each wire call carries out.
    by_wire_call: BTreeMap<usize, usize>,
    /// All saves, in the order in which apps called them.
    saves: Vec<Save>,
    /// The save whose store has not decided yet between a replace, a touch and nothing.
    undecided: Option<usize>,
    save_of: BTreeMap<usize, usize>,
    /// The merges that are sent together with a merge, by its store call.
    together: BTreeMap<usize, Vec<usize>>,
}

struct PendingCall {
    node: usize,
    key: SessionKey,
    kind: CallKind,
    is_merge: bool,
    asked: Moment,
    /// How many other calls were in its queue when it came.
    others: usize,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum CallKind {
    Find,
    Replace,
    Touch,
}

/// A save that an app has called.
#[allow(clippy::struct_excessive_bools, reason = "each is another fact")]
pub(crate) struct Save {
    node: usize,
    number: usize,
    version: u64,
    expires: WallTime,
    begun: Begun,
    acknowledged: bool,
    /// The rank that the save gave the session, once the database has carried it out.
    rank: Option<usize>,
    /// The store sent a full replace, not a touch.
    is_replace: bool,
    /// It is a save of a request scope.
    is_scoped: bool,
    /// The driver's call was dropped, so a later save may have overtaken this one.
    abandoned: bool,
}

impl PendingCalls {
    /// An app saves. The caller records that right before it calls the store. Returns the number of the save.
    pub(crate) fn begin_save(
        &mut self,
        (node, number): (usize, usize),
        (version, expires): (u64, WallTime),
        begun: Begun,
    ) -> usize {
        self.saves.push(Save {
            node,
            number,
            version,
            expires,
            begun,
            acknowledged: false,
            rank: None,
            is_replace: false,
            is_scoped: false,
            abandoned: false,
        });
        self.undecided = Some(self.saves.len() - 1);
        self.saves.len() - 1
    }

    /// A request saves in its scope. Otherwise as [`begin_save`](Self::begin_save).
    pub(crate) fn begin_scoped_save(
        &mut self,
        session: (usize, usize),
        what: (u64, WallTime),
        begun: Begun,
    ) -> usize {
        let save = self.begin_save(session, what, begun);
        self.saves[save].is_scoped = true;
        save
    }

    pub(crate) fn record_scoped_acknowledged(&mut self, save: usize) {
        self.saves[save].acknowledged = true;
    }

    /// The turn of a merge has come. It sends its calls with this rev, for itself and for those that have joined it.
    pub(crate) fn begin_merge(&mut self, store_call: usize, rev: Rev, joined: usize) {
        self.by_rev.insert(rev, store_call);
        let first = &self.pending[&store_call];
        let is_same =
            |it: &&PendingCall| it.is_merge && (it.node, it.key) == (first.node, first.key);
        let merges = self.pending.range(store_call..).filter(|(_, it)| is_same(it));
        let together = merges.map(|(store_call, _)| *store_call).take(joined + 1);
        self.together.insert(store_call, together.collect());
    }

    /// The store calls that are sent together with this one, in the order of the calls.
    pub(crate) fn together_with(&self, store_call: usize) -> Vec<usize> {
        self.together.get(&store_call).cloned().unwrap_or_else(|| vec![store_call])
    }

    /// The save that a store call carries out.
    pub(crate) fn save_of(&self, store_call: usize) -> Option<usize> {
        self.save_of.get(&store_call).copied()
    }

    /// Whether the store sent a full replace for a save.
    pub(crate) fn is_replace(&self, save: usize) -> bool {
        self.saves[save].is_replace
    }

    /// A store makes a store call.
    pub(crate) fn begin(&mut self, store_call: usize, record: &CallRecord) {
        let Some((kind, key)) = kind_of(&record.operation) else { return };
        if let Operation::Replace(_, rev, ..) = &record.operation {
            self.by_rev.insert(*rev, store_call);
        }
        if kind == CallKind::Replace
            && let Some(save) = self.undecided.take()
        {
            self.save_of.insert(store_call, save);
            self.saves[save].is_replace = true;
        }
        let node = record.node;
        let others = self.count_queued(node, kind);
        let is_merge = record.operation.is_merge();
        let call = PendingCall { node, key, kind, is_merge, asked: record.asked, others };
        self.pending.insert(store_call, call);
    }

    /// Counts the calls in the queue that a new call enters: reads and saves have a queue each.
    fn count_queued(&self, node: usize, kind: CallKind) -> usize {
        let is_read = kind == CallKind::Find;
        // A merge may be in either.
        let same = |it: &&PendingCall| {
            let same = (it.kind == CallKind::Find) == is_read || it.is_merge;
            it.node == node && same
        };
        self.pending.values().filter(same).count()
    }

    /// A store call ends. Returns how many other calls were in its queue when it came.
    pub(crate) fn finish(&mut self, store_call: usize) -> Option<usize> {
        self.pending.remove(&store_call).map(|call| call.others)
    }

    /// The batcher sends a wire call. Some store call must still wait for it.
    pub(crate) fn record_sent(
        &mut self,
        wire_call: usize,
        node: usize,
        operation: &Operation,
        now: Moment,
        timeout: Duration,
        oracle: &mut Oracle,
    ) {
        let Some((kind, key)) = kind_of(operation) else { return };
        if let Operation::Replace(_, rev, ..) = operation
            && let Some(store_call) = self.by_rev.get(rev)
        {
            self.by_wire_call.insert(wire_call, *store_call);
        }
        let is_wanted = |(store_call, it): (&usize, &PendingCall)| {
            // A merge also sends those that wait behind it.
            let own = self.by_wire_call.get(&wire_call);
            let is_its_own = own.is_none_or(|own| own == store_call || it.is_merge);
            // A merge reads the session itself.
            let same_kind = it.kind == kind || (it.is_merge && kind == CallKind::Find);
            let same = (it.node, it.key) == (node, key) && same_kind;
            is_its_own && same && now < it.asked.after(timeout)
        };
        if !self.pending.iter().any(is_wanted) {
            oracle
                .report_violation(format!("call {wire_call} is sent, and no caller waits for it"));
        }
        if kind == CallKind::Touch {
            oracle.count("touched");
        }
    }

    /// The store call that a wire call carries out.
    pub(crate) fn store_call_of(&self, wire_call: usize) -> Option<usize> {
        self.by_wire_call.get(&wire_call).copied()
    }

    /// The driver's call was dropped before its end.
    pub(crate) fn record_abandoned(&mut self, wire_call: usize) {
        let save =
            self.store_call_of(wire_call).and_then(|store_call| self.save_of.get(&store_call));
        if let Some(save) = save {
            self.saves[*save].abandoned = true;
        }
    }

    /// The database has carried out a save. No later save of the session from the same store may have been stored
    /// or acknowledged before, unless the driver's call was dropped.
    pub(crate) fn record_applied(
        &mut self,
        store_call: usize,
        took_effect: bool,
        record: &CallRecord,
        oracle: &mut Oracle,
    ) {
        let save = self.save_of.get(&store_call).copied().filter(|_| took_effect);
        let Some(place) = save else { return };
        self.saves[place].rank = record.ranks.first().map(|(_, rank)| *rank);
        let save = &self.saves[place];
        let mut later = self.saves[place + 1..].iter();
        let session = (save.node, save.number);
        let overtaken = later.find(|it| {
            let is_touch = it.is_scoped && !it.is_replace;
            let has_ended = it.rank.is_some() || (it.acknowledged && !is_touch);
            (it.node, it.number) == session && has_ended
        });
        if let Some(overtaken) = overtaken.filter(|_| !save.abandoned) {
            oracle.report_violation(format!(
                "order: save {} of session {} at store {} undoes {}, which was called after it",
                save.version, save.number, save.node, overtaken.version
            ));
        }
    }

    /// A save was acknowledged. If the database never stored its data, the store took it for a save without new
    /// data. Then three things must be true:
    ///
    /// - Its data was stored already, and no save that the app called earlier is newer (`order`).
    /// - The stored expiry is early by at most `touch_after` and a tenth of the lifetime (`expiry`).
    /// - The stored expiry is not later than the save's (`expiry`).
    pub(crate) fn record_acknowledged(
        &mut self,
        place: usize,
        touch_after: Duration,
        database: &mut Database,
        oracle: &mut Oracle,
    ) {
        self.saves[place].acknowledged = true;
        let save = &self.saves[place];
        let node = save.node;
        let number = save.number;
        let begun = save.begun;
        let was_gone = database
            .spans(number)
            .any(|span| span.doc.is_none() && span.until.is_none_or(|until| until >= begun.at));
        if save.rank.is_some() || was_gone {
            return;
        }
        let whose = format!("save {} of session {number} at store {node}", save.version);
        let same_data = database.spans(number).filter_map(|span| {
            span.doc.filter(|doc| doc.version == save.version).map(|doc| (span.rank, doc))
        });
        let same_data: Vec<_> = same_data.collect();
        let newest = same_data.last().map_or(0, |(rank, _)| *rank);
        let undone = self.saves[..place].iter().find(|it| {
            let is_earlier = (it.node, it.number) == (node, number) && !it.abandoned;
            is_earlier && it.rank.is_some_and(|rank| rank > newest)
        });
        if let Some(it) = undone {
            return oracle.report_violation(format!(
                "order: {whose} was taken for a save without new data, after save {}",
                it.version
            ));
        }
        let expiries = || same_data.iter().flat_map(|(_, doc)| &doc.expiries);
        let lasts = save.expires.since(begun.wall);
        let slack = touch_after.min(lasts / 10);
        // A later expiry that another instance has stored since the save began is good enough.
        let meanwhile = database
            .spans(number)
            .filter(|span| span.until.is_none_or(|until| until >= begun.at))
            .filter_map(|span| span.doc.map(StoredDoc::expires))
            .max();
        let latest = expiries().chain(database.touched(number)).chain(&meanwhile).max();
        let latest = latest.map_or(Duration::MAX, |latest| save.expires.since(*latest));
        if latest > slack {
            oracle.report_violation(format!("expiry: {whose} expires {latest:?} too early"));
        }
        if expiries().chain(database.touched(number)).all(|expiry| *expiry > save.expires) {
            oracle.report_violation(format!("expiry: {whose} expires later than it should"));
        }
        oracle.count(if latest.is_zero() { "prolonged" } else { "not worth a touch" });
        let ranks: Vec<_> = same_data.iter().map(|(rank, _)| *rank).collect();
        let step = database.step();
        oracle.record_unchanged_save((node, number), begun, &ranks, step);
    }
}

fn kind_of(operation: &Operation) -> Option<(CallKind, SessionKey)> {
    match operation {
        Operation::Find(key) => Some((CallKind::Find, *key)),
        Operation::Replace(key, ..) | Operation::Merge(key, _) => Some((CallKind::Replace, *key)),
        Operation::Touch(key, _) => Some((CallKind::Touch, *key)),
        _ => None,
    }
}
