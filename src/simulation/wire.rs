//! The network between stores and their database: each call waits here until the test
//! [applies](Wire::apply) it, which changes or reads the database, and [answers](Wire::answer) it.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use tokio::sync::{Notify, oneshot};

use crate::invalidation::source::Fault;
use crate::session::id::SessionKey;
use crate::simulation::chance::Chance;
use crate::simulation::database::Database;
use crate::simulation::operation::{Operation, Outcome, told};
use crate::simulation::oracle::{End, Oracle};
use crate::simulation::pending_calls::PendingCalls;
use crate::simulation::sign_out::Found;
use crate::simulation::trace::Trace;
use crate::time::{Clock, Moment};

/// Clones share it.
#[derive(Clone)]
pub(crate) struct Wire {
    state: Arc<Mutex<State>>,
    pub(crate) arrived: Arc<Notify>,
    pub(crate) clock: Clock,
    pub(crate) chance: Chance,
}

pub(crate) struct State {
    pub(crate) database: Database,
    pub(crate) calls: BTreeMap<usize, Waiting>,
    pub(crate) records: Vec<Record>,
    /// For each stream that was opened, what became of it.
    pub(crate) streams: Vec<Option<Fault>>,
    pub(crate) manners: Manners,
    pub(crate) errands: PendingCalls,
    commands: usize,
    /// The commands that failed as a whole, and why.
    pub(crate) failed: BTreeMap<usize, Fault>,
    /// The commands of which some part was carried out.
    begun: BTreeSet<usize>,
    /// Until then the database opens no stream that has no position.
    pub(crate) refuses_fresh_until: Moment,
    pub(crate) oracle: Oracle,
    pub(crate) trace: Trace,
}

/// How the network and the database behave.
#[derive(Clone, Debug, Default)]
#[allow(clippy::struct_excessive_bools, reason = "each is a habit of its own")]
pub(crate) struct Manners {
    /// How often a future that could go on lets others run first.
    pub(crate) laziness: f64,
    /// How often a call is carried out and answered without any wait.
    pub(crate) at_once: f64,
    /// How often a call takes long, and how long at most.
    pub(crate) slow: f64,
    pub(crate) longest: Duration,
    pub(crate) timeout: Duration,
    /// Whether nothing happens to a call any more once it is given up.
    pub(crate) recalls: bool,
    /// How long a stream waits for changes, once everything is answered at once.
    pub(crate) pace: Duration,
    /// The database has change streams.
    pub(crate) streams: bool,
    /// Resume tokens hold a time, as MongoDB's do.
    pub(crate) tokens_have_times: bool,
    /// Behind a router, if there are several.
    pub(crate) shards: usize,
    /// There is always another change to tell of.
    pub(crate) busy: Option<SessionKey>,
    /// How often something else is written before a fence is answered.
    pub(crate) others: f64,
    /// How often changes that are made together are one entry of the oplog.
    pub(crate) bulks: f64,
    /// How often a stream hands over one change at most, however many there are.
    pub(crate) lags: f64,
    /// All is well from now on: everything is answered at once.
    pub(crate) healed: bool,
}

pub(crate) struct Waiting {
    pub(crate) operation: Operation,
    /// Not carried out before this, and not answered before that.
    pub(crate) ready: Moment,
    pub(crate) due: Moment,
    pub(crate) outcome: Option<Result<Outcome, Fault>>,
    /// The command of several that it is a part of.
    command: Option<usize>,
    reply: oneshot::Sender<Result<Outcome, Fault>>,
}

/// What is known of a call, for good.
pub(crate) struct Record {
    pub(crate) node: usize,
    pub(crate) operation: Operation,
    pub(crate) asked: Moment,
    /// The database's time when it was asked.
    pub(crate) asked_time: u64,
    /// What was true of each session that it wrote to, once it had.
    pub(crate) ranks: Vec<(usize, usize)>,
    pub(crate) applied: bool,
    pub(crate) ended: Option<u64>,
}

impl Wire {
    pub(crate) fn new(clock: Clock, chance: Chance, manners: Manners) -> Self {
        let state = State {
            database: Database::new(clock.clone(), manners.shards.max(1)),
            calls: BTreeMap::new(),
            records: Vec::new(),
            streams: Vec::new(),
            manners,
            errands: PendingCalls::default(),
            commands: 0,
            failed: BTreeMap::new(),
            begun: BTreeSet::new(),
            refuses_fresh_until: Moment::from_nanos(0),
            oracle: Oracle::default(),
            trace: Trace::default(),
        };
        Self { state: Arc::new(Mutex::new(state)), arrived: Arc::default(), clock, chance }
    }

    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    /// Carries a call out, without answering.
    pub(crate) fn apply(&self, call: usize) {
        let mut state = self.state();
        let Some(waiting) = state.calls.get(&call) else { return };
        assert!(waiting.outcome.is_none(), "applied twice");
        let command = waiting.command;
        state.begun.extend(command);
        let outcome = state.perform(call, &self.chance);
        state.trace.note(|| format!("apply {call}: {}", told(&outcome)));
        if let Some(waiting) = state.calls.get_mut(&call) {
            waiting.outcome = Some(outcome);
        }
    }

    /// Answers a call with what came of it, which is an error if it was not applied.
    pub(crate) fn answer(&self, call: usize) {
        let Some(waiting) = self.state().calls.remove(&call) else { return };
        self.state().trace.note(|| format!("answer {call}"));
        drop(waiting.reply.send(waiting.outcome.unwrap_or(Err(Fault::Passing))));
    }

    /// Answers a call with an error, whatever came of it.
    pub(crate) fn fail(&self, call: usize, fault: Fault) {
        let Some(waiting) = self.state().calls.remove(&call) else { return };
        self.state().trace.note(|| format!("fail {call}: {fault:?}"));
        drop(waiting.reply.send(Err(fault)));
    }

    /// The same for all that was sent with it.
    pub(crate) fn fail_whole(&self, call: usize, fault: Fault) {
        let calls = {
            let mut state = self.state();
            let command = state.calls.get(&call).and_then(|waiting| waiting.command);
            let Some(command) = command else {
                drop(state);
                return self.fail(call, fault);
            };
            state.failed.insert(command, fault.clone());
            state.oracle.count("a whole command failed");
            let part =
                |(call, it): (&usize, &Waiting)| (it.command == Some(command)).then_some(*call);
            state.calls.iter().filter_map(part).collect::<Vec<_>>()
        };
        for call in calls {
            self.fail(call, fault.clone());
        }
    }

    /// The server is overloaded and turns a call away, with all that was sent with it, unless it has begun
    /// to carry some of that out.
    pub(crate) fn turn_away(&self, call: usize) {
        let has_begun = {
            let mut state = self.state();
            let command = state.calls.get(&call).and_then(|waiting| waiting.command);
            let has_begun = command.is_some_and(|command| state.begun.contains(&command));
            if !has_begun {
                state.oracle.count("turned away");
            }
            has_begun
        };
        if !has_begun {
            self.fail_whole(call, Fault::Overloaded);
        }
    }

    /// The calls that have not been answered.
    pub(crate) fn waiting(&self) -> Vec<usize> {
        self.state().calls.keys().copied().collect()
    }

    /// Puts a call on the wire, and waits for what comes of it.
    pub(crate) async fn call(
        self,
        node: usize,
        operation: Operation,
        command: Option<usize>,
    ) -> Result<Outcome, Fault> {
        let (at_once, more) = {
            let state = self.state();
            let manners = &state.manners;
            let at_once = manners.healed || self.chance.happens(manners.at_once);
            (at_once, matches!(operation, Operation::More(_)).then_some(manners.pace))
        };
        let mut given_up = GivenUp { call: self.begins(node, &operation), wire: &self };
        let call = given_up.call;
        let outcome = if at_once {
            if let Some(pace) = more {
                tokio::time::sleep(pace).await;
            }
            self.state().begun.extend(command);
            let outcome = self.state().perform(call, &self.chance);
            self.state().trace.note(|| format!("at once {call}: {}", told(&outcome)));
            outcome
        } else {
            let answer = self.waits(call, operation, command);
            self.arrived.notify_waiters();
            let outcome = answer.await.unwrap_or(Err(Fault::Passing));
            let laziness = self.state().manners.laziness;
            self.chance.dawdle(laziness).await;
            outcome
        };
        given_up.call = usize::MAX;
        self.state().ends(call, Some(&outcome), self.clock.now());
        outcome
    }

    fn begins(&self, node: usize, operation: &Operation) -> usize {
        let now = self.clock.now();
        let mut state = self.state();
        let call = state.notes(node, operation.clone(), now);
        let State { trace, database, errands, oracle, manners, .. } = &mut *state;
        trace.note(|| format!("ask {call} by {node}: {}", operation.told(database)));
        if matches!(operation, Operation::Open(_)) {
            oracle.opens(node, now);
        }
        if operation.is_queued() {
            errands.is_sent(call, node, operation, now, manners.timeout, oracle);
        } else if !operation.is_of_a_stream() {
            oracle.begins(node, call);
        }
        call
    }

    fn waits(
        &self,
        call: usize,
        operation: Operation,
        command: Option<usize>,
    ) -> oneshot::Receiver<Result<Outcome, Fault>> {
        let mut state = self.state();
        let (slow, longest) = (state.manners.slow, state.manners.longest);
        let long = || {
            if self.chance.happens(slow) { self.chance.part_of(longest) } else { Duration::ZERO }
        };
        let ready = self.clock.now().after(long());
        let due = ready.after(long());
        let (reply, answer) = oneshot::channel();
        let outcome = None;
        state.calls.insert(call, Waiting { operation, ready, due, outcome, command, reply });
        answer
    }
}

impl State {
    /// A record of something that begins; answers with its number.
    pub(crate) fn notes(&mut self, node: usize, operation: Operation, asked: Moment) -> usize {
        let asked_time = self.database.oplog.applied();
        let (ranks, applied, ended) = (Vec::new(), false, None);
        let record = Record { node, operation, asked, asked_time, ranks, applied, ended };
        self.records.push(record);
        self.records.len() - 1
    }

    /// The number of a command of so many parts.
    pub(crate) fn command(&mut self, parts: usize) -> usize {
        self.oracle.count("sent together");
        self.trace.note(|| format!("{parts} together"));
        self.commands += 1;
        self.commands
    }

    /// What the database makes of a call.
    fn perform(&mut self, call: usize, chance: &Chance) -> Result<Outcome, Fault> {
        self.database.is_bulk = chance.happens(self.manners.bulks);
        let by = Some(self.errands.behind(call).unwrap_or(call));
        let operation = self.records[call].operation.clone();
        let outcome = match &operation {
            Operation::Insert(key, session) => {
                let inserted = self.database.insert(*key, session, by);
                Outcome::Written(inserted.then_some(session.expires))
            }
            Operation::Replace(key, rev, session) => {
                let replaced = self.database.replace(*key, Some(*rev), session, by);
                Outcome::Written(replaced.then_some(session.expires))
            }
            Operation::Touch(key, expires) => {
                let touched = self.database.touch(*key, *expires);
                Outcome::Written(touched.then_some(*expires))
            }
            Operation::Find(key) => Outcome::Found(self.database.find(*key)),
            Operation::Remove(key) => {
                self.database.remove(*key, by);
                Outcome::Removed
            }
            Operation::Clear => Outcome::Cleared(self.database.clear(usize::MAX, by)),
            Operation::FindOwned(owner, after) => {
                let sessions = self.database.owned(*owner, *after);
                let node = self.records[call].node;
                let is_pending = |by: usize| {
                    let record = &self.records[by];
                    record.node == node && record.ended.is_none()
                };
                let pending = (0..self.database.sessions()).filter_map(|number| {
                    Some((number, self.database.rank_by(number, is_pending)?))
                });
                Outcome::Owned(Found { sessions, pending: pending.collect() })
            }
            Operation::RemoveOwned(keys, owner) => {
                let removed = self.database.remove_owned(keys, *owner, by);
                Outcome::Ended(removed, self.database.ranks(keys))
            }
            Operation::Open(None)
                if self.database.now() < self.refuses_fresh_until && !self.manners.healed =>
            {
                return Err(crate::simulation::walk::refused());
            }
            Operation::Open(after) => {
                let (cursor, reply) = self.open(after.as_ref(), chance)?;
                Outcome::Handed(cursor, reply)
            }
            Operation::More(cursor) => {
                let (cursor, reply) = self.more(cursor.clone(), chance)?;
                Outcome::Handed(cursor, reply)
            }
            Operation::Fence => Outcome::Time(self.fence(call, chance)),
        };
        let written = match &operation {
            Operation::Insert(key, _) | Operation::Replace(key, ..) | Operation::Remove(key) => {
                let number = self.database.number(*key);
                number..number + 1
            }
            Operation::Clear => 0..self.database.sessions(),
            _ => 0..0,
        };
        let ranks = written.map(|number| (number, self.database.rank(number))).collect();
        (self.records[call].ranks, self.records[call].applied) = (ranks, true);
        if let Some(errand) = self.errands.behind(call) {
            (self.records[errand].ranks, self.records[errand].applied) =
                (self.records[call].ranks.clone(), true);
            let took_effect = matches!(outcome, Outcome::Written(Some(_)));
            let Self { errands, records, oracle, .. } = self;
            errands.is_applied(errand, took_effect, &records[errand], oracle);
        }
        Ok(outcome)
    }

    /// A call has come to its end at its caller: with what came of it, or by being given up.
    fn ends(&mut self, call: usize, outcome: Option<&Result<Outcome, Fault>>, now: Moment) {
        let step = self.database.step();
        self.trace.note(|| format!("end {call}"));
        self.records[call].ended = Some(step);
        if outcome.is_none() {
            self.errands.is_given_up(call);
        }
        let Self { records, database, oracle, manners, .. } = self;
        let record = &records[call];
        // Not what the stream brings: a deposed primary may feed it.
        if let Some(Ok(Outcome::Time(_))) = outcome {
            oracle.hears(record.node, now);
        }
        if matches!(record.operation, Operation::Open(_) | Operation::More(_)) {
            oracle.ends_of_a_stream(record.node, &record.operation, outcome, now);
        }
        if record.operation.is_of_a_stream() || record.operation.is_queued() {
            return;
        }
        let end = match outcome {
            None => End::GivenUp,
            Some(Ok(_)) => End::Answered,
            Some(Err(Fault::Overloaded)) => End::TurnedAway,
            Some(Err(fault)) => End::Failed { outage: *fault == Fault::Passing },
        };
        oracle.ends(record, call, end, database, manners, (step, now));
    }
}

/// Notes it if a call is dropped before its end.
struct GivenUp<'a> {
    call: usize,
    wire: &'a Wire,
}

impl Drop for GivenUp<'_> {
    fn drop(&mut self) {
        if self.call == usize::MAX || std::thread::panicking() {
            return;
        }
        let mut state = self.wire.state();
        let (call, now) = (self.call, self.wire.clock.now());
        state.trace.note(|| format!("given up {call}"));
        state.ends(call, None, now);
        let unapplied = state.calls.get(&call).is_some_and(|waiting| waiting.outcome.is_none());
        let recalled = state.manners.recalls && unapplied;
        if recalled || state.records[call].operation.is_of_a_stream() {
            state.calls.remove(&call);
        }
    }
}
