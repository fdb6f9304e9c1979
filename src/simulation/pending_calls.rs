//! What the stores have under way behind their queues and lanes, and whether it is sent when it
//! may be: in order, not after it was given up, and not at all if there was no room.

use std::collections::{BTreeMap, HashMap};
use std::time::Duration;

use crate::session::id::SessionKey;
use crate::session::revision::Rev;
use crate::simulation::database::{Database, Held};
use crate::simulation::operation::Operation;
use crate::simulation::oracle::{Begun, Oracle};
use crate::simulation::wire::Record;
use crate::time::Moment;
use crate::time::WallTime;

#[derive(Default)]
pub(crate) struct PendingCalls {
    under_way: BTreeMap<usize, Errand>,
    /// The errand of a write, and that of a call that carries it out.
    by_rev: HashMap<Rev, usize>,
    by_call: BTreeMap<usize, usize>,
    /// In the order in which they were called.
    saves: Vec<Save>,
    /// The save that is being called, before it is known what it comes down to.
    called: Option<usize>,
    save_of: BTreeMap<usize, usize>,
}

struct Errand {
    node: usize,
    key: SessionKey,
    kind: Kind,
    asked: Moment,
    /// How many others there were in its queue when it came.
    others: usize,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Find,
    Replace,
    Touch,
}

/// What an app has called.
pub(crate) struct Save {
    node: usize,
    number: usize,
    version: u64,
    expires: WallTime,
    begun: Begun,
    acknowledged: bool,
    /// What it made true of the session.
    rank: Option<usize>,
    /// It is to store its data, whether they are others or not.
    replaces: bool,
    /// The store has waited for it for as long as it may.
    given_up: bool,
}

impl PendingCalls {
    /// An app saves. To be told right before its store is.
    pub(crate) fn calls(
        &mut self,
        (node, number): (usize, usize),
        (version, expires): (u64, WallTime),
        begun: Begun,
    ) -> usize {
        let (acknowledged, rank, replaces, given_up) = (false, None, false, false);
        let save =
            Save { node, number, version, expires, begun, acknowledged, rank, replaces, given_up };
        self.saves.push(save);
        self.called = Some(self.saves.len() - 1);
        self.saves.len() - 1
    }

    /// Whether a save is not one of unchanged data.
    pub(crate) fn replaces(&self, save: usize) -> bool {
        self.saves[save].replaces
    }

    /// A store sends something on its way.
    pub(crate) fn begins(&mut self, errand: usize, record: &Record) {
        let Some((kind, key)) = kind_of(&record.operation) else { return };
        if let Operation::Replace(_, rev, _) = &record.operation {
            self.by_rev.insert(*rev, errand);
            if let Some(save) = self.called.take() {
                self.save_of.insert(errand, save);
                self.saves[save].replaces = true;
            }
        }
        let (node, asked, others) = (record.node, record.asked, self.in_queue(record.node, kind));
        self.under_way.insert(errand, Errand { node, key, kind, asked, others });
    }

    fn in_queue(&self, node: usize, kind: Kind) -> usize {
        let same =
            |it: &&Errand| it.node == node && (it.kind == Kind::Find) == (kind == Kind::Find);
        self.under_way.values().filter(same).count()
    }

    /// It has come to its end, and there were so many others when it came.
    pub(crate) fn ends(&mut self, errand: usize) -> Option<usize> {
        self.under_way.remove(&errand).map(|errand| errand.others)
    }

    /// A call is sent to the database.
    pub(crate) fn is_sent(
        &mut self,
        call: usize,
        node: usize,
        operation: &Operation,
        now: Moment,
        timeout: Duration,
        oracle: &mut Oracle,
    ) {
        let Some((kind, key)) = kind_of(operation) else { return };
        if let Operation::Replace(_, rev, _) = operation
            && let Some(errand) = self.by_rev.get(rev)
        {
            self.by_call.insert(call, *errand);
        }
        let is_wanted = |(errand, it): (&usize, &Errand)| {
            let its_own = self.by_call.get(&call).is_none_or(|own| own == errand);
            let same = (it.node, it.key, it.kind) == (node, key, kind);
            its_own && same && now < it.asked.after(timeout)
        };
        if !self.under_way.iter().any(is_wanted) {
            oracle.violated(format!("call {call} is sent, and nobody waits for it any more"));
        }
        if kind == Kind::Touch {
            oracle.count("touched");
        }
    }

    /// The errand that a call carries out.
    pub(crate) fn behind(&self, call: usize) -> Option<usize> {
        self.by_call.get(&call).copied()
    }

    /// The driver has given a call up.
    pub(crate) fn is_given_up(&mut self, call: usize) {
        let save = self.behind(call).and_then(|errand| self.save_of.get(&errand));
        if let Some(save) = save {
            self.saves[*save].given_up = true;
        }
    }

    /// The database has carried out a write.
    pub(crate) fn is_applied(
        &mut self,
        errand: usize,
        took_effect: bool,
        record: &Record,
        oracle: &mut Oracle,
    ) {
        let Some(place) = self.save_of.get(&errand).copied().filter(|_| took_effect) else {
            return;
        };
        self.saves[place].rank = record.ranks.first().map(|(_, rank)| *rank);
        let (save, later) = (&self.saves[place], &self.saves[place + 1..]);
        let whose = (save.node, save.number);
        let passed = later
            .iter()
            .find(|it| (it.node, it.number) == whose && (it.acknowledged || it.rank.is_some()));
        if let Some(passed) = passed.filter(|_| !save.given_up) {
            oracle.violated(format!(
                "order: save {} of session {} at store {} undoes {}, which was called after it",
                save.version, save.number, save.node, passed.version
            ));
        }
    }

    /// A save was acknowledged. Unless it stored its data, these must have been there already, and
    /// since whatever was saved before it here; and so must about its expiry.
    pub(crate) fn is_acknowledged(
        &mut self,
        place: usize,
        touch_after: Duration,
        database: &mut Database,
        oracle: &mut Oracle,
    ) {
        self.saves[place].acknowledged = true;
        let save = &self.saves[place];
        let (node, number, begun) = (save.node, save.number, save.begun);
        let gone = database
            .spans(number)
            .any(|span| span.held.is_none() && span.until.is_none_or(|until| until >= begun.at));
        if save.rank.is_some() || gone {
            return;
        }
        let whose = format!("save {} of session {number} at store {node}", save.version);
        let alike = database.spans(number).filter_map(|span| {
            span.held.filter(|held| held.version == save.version).map(|held| (span.rank, held))
        });
        let alike: Vec<_> = alike.collect();
        let newest = alike.last().map_or(0, |(rank, _)| *rank);
        let undone = self.saves[..place].iter().find(|it| {
            let before = (it.node, it.number) == (node, number) && !it.given_up;
            before && it.rank.is_some_and(|rank| rank > newest)
        });
        if let Some(it) = undone {
            let text =
                format!("order: {whose} was taken for no change, after one of {}", it.version);
            return oracle.violated(text);
        }
        let expiries = || alike.iter().flat_map(|(_, held)| &held.expiries);
        let lasts = save.expires.since(begun.wall);
        let slack = touch_after.min(lasts / 10);
        // What others have made of it meanwhile counts, if it lasts longer.
        let meanwhile = database
            .spans(number)
            .filter(|span| span.until.is_none_or(|until| until >= begun.at))
            .filter_map(|span| span.held.map(Held::expires))
            .max();
        let latest = expiries().chain(database.touched(number)).chain(&meanwhile).max();
        let latest = latest.map_or(Duration::MAX, |latest| save.expires.since(*latest));
        if latest > slack {
            oracle.violated(format!("expiry: {whose} is to end {latest:?} too early"));
        }
        if expiries().chain(database.touched(number)).all(|expiry| *expiry > save.expires) {
            oracle.violated(format!("expiry: {whose} is not to end as early as it should"));
        }
        oracle.count(if latest.is_zero() { "prolonged" } else { "not worth a touch" });
        let ranks: Vec<_> = alike.iter().map(|(rank, _)| *rank).collect();
        let step = database.step();
        oracle.kept((node, number), begun, &ranks, step);
    }
}

fn kind_of(operation: &Operation) -> Option<(Kind, SessionKey)> {
    match operation {
        Operation::Find(key) => Some((Kind::Find, *key)),
        Operation::Replace(key, ..) => Some((Kind::Replace, *key)),
        Operation::Touch(key, _) => Some((Kind::Touch, *key)),
        _ => None,
    }
}
