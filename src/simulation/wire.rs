//! `Wire`: the network between stores and their database.
//!
//! Each call waits here twice: until it is [applied](Wire::apply), when the database carries it out, and until it is
//! [answered](Wire::answer). A walk or a test decides when.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use tokio::sync::{Notify, oneshot};

use crate::batching::Updated;
use crate::invalidation::source::Fault;
use crate::session::Session;
use crate::session::id::SessionKey;
use crate::session::revision::Rev;
use crate::simulation::chance::Chance;
use crate::simulation::database::Database;
use crate::simulation::merge_oracle::MergeOracle;
use crate::simulation::operation::{CallRecord, Operation, Outcome, Update, describe};
use crate::simulation::oracle::Oracle;
use crate::simulation::pending_calls::PendingCalls;
use crate::simulation::stream::{Context, Streams};
use crate::simulation::trace::Trace;
use crate::simulation::types::{End, FaultConfig, OwnedPage, refused};
use crate::time::{Clock, Moment};

/// A handle to the network. All clones share one state.
#[derive(Clone)]
pub(crate) struct Wire {
    /// A std `Mutex`: nothing awaits while it is held.
    state: Arc<Mutex<State>>,
    /// Notified when a call has begun to wait.
    pub(crate) arrived: Arc<Notify>,
    pub(crate) clock: Clock,
    pub(crate) chance: Chance,
}

/// Everything behind the network, and the parts that watch it.
pub(crate) struct State {
    pub(crate) database: Database,
    /// The calls that have not been answered, by number.
    pub(crate) calls: BTreeMap<usize, WaitingCall>,
    /// All store calls and wire calls of the walk. The number of a call is its index here.
    pub(crate) records: Vec<CallRecord>,
    pub(crate) streams: Streams,
    pub(crate) faults: FaultConfig,
    pub(crate) pending: PendingCalls,
    pub(crate) merges: MergeOracle,
    /// The number of the latest batch.
    batches: usize,
    /// The batches that failed as a whole, and why.
    pub(crate) failed_batches: BTreeMap<usize, Fault>,
    /// The batches of which the database has carried out some part.
    begun_batches: BTreeSet<usize>,
    /// Until this moment the database opens no stream without a position.
    pub(crate) refuses_fresh_until: Moment,
    pub(crate) oracle: Oracle,
    pub(crate) trace: Trace,
}

/// `WaitingCall`: a call on its way to the database, or its reply on the way back.
pub(crate) struct WaitingCall {
    pub(crate) operation: Operation,
    /// The call reaches the database at this moment.
    pub(crate) ready: Moment,
    /// The reply reaches the store at this moment.
    pub(crate) due: Moment,
    /// `None`: the database has not carried the call out.
    pub(crate) outcome: Option<Result<Outcome, Fault>>,
    /// The batch that the call is a part of.
    batch: Option<usize>,
    reply: oneshot::Sender<Result<Outcome, Fault>>,
}

impl Wire {
    pub(crate) fn new(clock: Clock, chance: Chance, faults: FaultConfig) -> Self {
        let state = State {
            database: Database::new(clock.clone(), faults.shards.max(1)),
            calls: BTreeMap::new(),
            records: Vec::new(),
            streams: Streams::default(),
            faults,
            pending: PendingCalls::default(),
            merges: MergeOracle::default(),
            batches: 0,
            failed_batches: BTreeMap::new(),
            begun_batches: BTreeSet::new(),
            refuses_fresh_until: Moment::from_nanos(0),
            oracle: Oracle::default(),
            trace: Trace::default(),
        };
        Self { state: Arc::new(Mutex::new(state)), arrived: Arc::default(), clock, chance }
    }

    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    /// Lets the database carry a call out. The call is not answered yet.
    pub(crate) fn apply(&self, call: usize) {
        let mut state = self.state();
        let Some(waiting) = state.calls.get(&call) else { return };
        assert!(waiting.outcome.is_none(), "applied twice");
        let batch = waiting.batch;
        state.begun_batches.extend(batch);
        let outcome = state.perform(call, &self.chance);
        state.trace.note(|| format!("apply {call}: {}", describe(&outcome)));
        if let Some(waiting) = state.calls.get_mut(&call) {
            waiting.outcome = Some(outcome);
        }
    }

    /// Answers a call with its outcome. A call that was not applied gets an error.
    pub(crate) fn answer(&self, call: usize) {
        let Some(waiting) = self.state().calls.remove(&call) else { return };
        self.state().trace.note(|| format!("answer {call}"));
        let _ = waiting.reply.send(waiting.outcome.unwrap_or(Err(Fault::Passing)));
    }

    /// Answers a call with an error, whether it was applied or not.
    pub(crate) fn fail(&self, call: usize, fault: Fault) {
        let Some(waiting) = self.state().calls.remove(&call) else { return };
        self.state().trace.note(|| format!("fail {call}: {fault:?}"));
        let _ = waiting.reply.send(Err(fault));
    }

    /// Fails the whole batch of a call. A call outside a batch fails alone.
    pub(crate) fn fail_batch(&self, call: usize, fault: Fault) {
        let calls = {
            let mut state = self.state();
            let Some(batch) = state.batch_of(call) else {
                drop(state);
                return self.fail(call, fault);
            };
            state.failed_batches.insert(batch, fault.clone());
            state.oracle.count("a whole command failed");
            let part =
                |(call, it): (&usize, &WaitingCall)| (it.batch == Some(batch)).then_some(*call);
            state.calls.iter().filter_map(part).collect::<Vec<_>>()
        };
        for call in calls {
            self.fail(call, fault.clone());
        }
    }

    /// The overloaded server rejects a call with its whole batch, unless it has begun to carry the batch out.
    pub(crate) fn reject(&self, call: usize) {
        let has_begun = {
            let mut state = self.state();
            let batch = state.batch_of(call);
            let has_begun = batch.is_some_and(|batch| state.begun_batches.contains(&batch));
            if !has_begun {
                state.oracle.count("rejected");
            }
            has_begun
        };
        if !has_begun {
            self.fail_batch(call, Fault::Overloaded);
        }
    }

    /// The calls that have not been answered.
    pub(crate) fn waiting(&self) -> Vec<usize> {
        self.state().calls.keys().copied().collect()
    }

    /// Sends a call and waits for its outcome.
    pub(crate) async fn call(
        self,
        node: usize,
        operation: Operation,
        batch: Option<usize>,
    ) -> Result<Outcome, Fault> {
        let (immediate, wait) = {
            let state = self.state();
            let faults = &state.faults;
            let immediate = faults.recovered || self.chance.happens(faults.immediate);
            let is_get_more = matches!(operation, Operation::GetMore(_));
            (immediate, is_get_more.then_some(faults.poll_interval))
        };
        let call = self.begin(node, &operation);
        let mut guard = AbandonGuard { call: Some(call), wire: &self };
        let outcome = if immediate {
            if let Some(wait) = wait {
                tokio::time::sleep(wait).await;
            }
            self.state().begun_batches.extend(batch);
            let outcome = self.state().perform(call, &self.chance);
            self.state().trace.note(|| format!("at once {call}: {}", describe(&outcome)));
            outcome
        } else {
            let answer = self.enqueue(call, operation, batch);
            self.arrived.notify_waiters();
            let outcome = answer.await.unwrap_or(Err(Fault::Passing));
            let laziness = self.state().faults.laziness;
            self.chance.dawdle(laziness).await;
            outcome
        };
        guard.call = None;
        self.state().finish(call, Some(&outcome), self.clock.now());
        outcome
    }

    fn begin(&self, node: usize, operation: &Operation) -> usize {
        let now = self.clock.now();
        let mut state = self.state();
        let call = state.record(node, operation.clone(), now);
        let State { trace, database, pending, merges, oracle, faults, .. } = &mut *state;
        trace.note(|| format!("ask {call} by {node}: {}", operation.describe(database)));
        match operation {
            Operation::Open(_) => oracle.record_open(node, now),
            Operation::Take(_) => merges.record_take_sent(call),
            _ => {}
        }
        if operation.is_queued() {
            pending.record_sent(call, node, operation, now, faults.timeout, oracle);
        } else if !operation.is_of_a_stream() {
            oracle.begin_call(node, call);
        }
        call
    }

    /// Adds a call to those that wait, and draws how long it takes in each direction.
    fn enqueue(
        &self,
        call: usize,
        operation: Operation,
        batch: Option<usize>,
    ) -> oneshot::Receiver<Result<Outcome, Fault>> {
        let mut state = self.state();
        let slow = state.faults.slow;
        let longest = state.faults.longest;
        let delay = || {
            if self.chance.happens(slow) { self.chance.part_of(longest) } else { Duration::ZERO }
        };
        let ready = self.clock.now().after(delay());
        let due = ready.after(delay());
        let (reply, answer) = oneshot::channel();
        let outcome = None;
        state.calls.insert(call, WaitingCall { operation, ready, due, outcome, batch, reply });
        answer
    }
}

impl State {
    /// Adds the record of a call that begins. Returns the number of the call.
    pub(crate) fn record(&mut self, node: usize, operation: Operation, asked: Moment) -> usize {
        self.records.push(CallRecord {
            node,
            operation,
            asked,
            asked_time: self.database.oplog.applied(),
            ranks: Vec::new(),
            applied: false,
            ended: None,
        });
        self.records.len() - 1
    }

    /// Begins a batch. Returns its number.
    pub(crate) fn begin_batch(&mut self, parts: usize) -> usize {
        self.oracle.count("sent as one batch");
        self.trace.note(|| format!("a batch of {parts}"));
        self.batches += 1;
        self.batches
    }

    fn batch_of(&self, call: usize) -> Option<usize> {
        self.calls.get(&call).and_then(|waiting| waiting.batch)
    }

    /// Breaks the open stream of one store.
    pub(crate) fn break_streams(&mut self, node: usize, fault: &Fault) {
        for waiting in self.calls.keys().map(|call| &self.records[*call]) {
            if let Operation::GetMore(cursor) = &waiting.operation
                && waiting.node == node
            {
                self.streams.break_off(cursor.stream, fault.clone());
            }
        }
    }

    /// Lets the database carry a call out.
    fn perform(&mut self, call: usize, chance: &Chance) -> Result<Outcome, Fault> {
        self.database.is_bulk = chance.happens(self.faults.bulk_writes);
        let by = Some(self.pending.store_call_of(call).unwrap_or(call));
        let operation = self.records[call].operation.clone();
        let store_call = self.pending.store_call_of(call);
        let outcome = match &operation {
            Operation::Insert(key, session) => {
                let inserted = self.database.insert(*key, session, by);
                if inserted {
                    let verdict = self.merges.judge_insert(session);
                    self.oracle.record_verdict(verdict);
                }
                Outcome::Inserted(inserted.then_some(session.expires))
            }
            Operation::Replace(key, rev, session, update) => Outcome::Updated(self.replace(
                store_call.unwrap_or(call),
                *key,
                (*rev, session),
                *update,
            )),
            Operation::Touch(key, expires) => {
                let touched = self.database.touch(*key, *expires);
                Outcome::Updated(if touched { Updated::Stored(*expires) } else { Updated::Gone })
            }
            Operation::Find(key) => Outcome::Found(self.database.find(*key)),
            Operation::Remove(key) => {
                self.database.remove(*key, by);
                Outcome::Removed
            }
            Operation::Take(key) => {
                let taken = self.database.find(*key);
                self.database.remove(*key, by);
                self.merges.record_taken(call, taken.as_ref());
                Outcome::Found(taken)
            }
            Operation::Clear => Outcome::Cleared(self.database.clear(by)),
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
                Outcome::Owned(OwnedPage { sessions, pending: pending.collect() })
            }
            Operation::RemoveOwned(keys, owner) => {
                let removed = self.database.remove_owned(keys, *owner, by);
                Outcome::RemovedOwned(removed, self.database.ranks(keys))
            }
            Operation::Open(None)
                if self.database.now() < self.refuses_fresh_until && !self.faults.recovered =>
            {
                return Err(refused());
            }
            Operation::Open(after) => {
                let mut context =
                    Context { database: &mut self.database, faults: &self.faults, chance };
                let (cursor, reply) = self.streams.open(after.as_ref(), &mut context)?;
                Outcome::Batch(cursor, reply)
            }
            Operation::GetMore(cursor) => {
                let mut context =
                    Context { database: &mut self.database, faults: &self.faults, chance };
                let (cursor, reply) = self.streams.get_more(cursor.clone(), &mut context)?;
                Outcome::Batch(cursor, reply)
            }
            Operation::PrimaryTime => {
                let asked_time = self.records[call].asked_time;
                let mut context =
                    Context { database: &mut self.database, faults: &self.faults, chance };
                Outcome::Time(context.primary_time(asked_time))
            }
        };
        let written = match &operation {
            Operation::Insert(key, _)
            | Operation::Replace(key, ..)
            | Operation::Remove(key)
            | Operation::Take(key) => {
                let number = self.database.number(*key);
                number..number + 1
            }
            Operation::Clear => 0..self.database.sessions(),
            _ => 0..0,
        };
        let ranks: Vec<_> = written.map(|number| (number, self.database.rank(number))).collect();
        if let Some(store_call) = store_call {
            self.records[store_call].ranks.clone_from(&ranks);
            self.records[store_call].applied = true;
            let took_effect = matches!(outcome, Outcome::Updated(Updated::Stored(_)));
            let Self { pending, records, oracle, .. } = self;
            pending.record_applied(store_call, took_effect, &records[store_call], oracle);
        }
        self.records[call].ranks = ranks;
        self.records[call].applied = true;
        Ok(outcome)
    }

    /// Carries out a replace, and judges it if it is a save of a request.
    fn replace(
        &mut self,
        by: usize,
        key: SessionKey,
        (rev, session): (Rev, &Session),
        update: Update,
    ) -> Updated {
        let old = self.database.find(key);
        let updated = self.database.replace_if(key, update, Some(rev), session, Some(by));
        if let (Some(save), Some(old), Updated::Stored(_)) =
            (self.pending.save_of(by), old, updated)
            && let Some(new) = self.database.find(key)
        {
            let verdict = self.merges.judge_save(save, &old, &new);
            self.oracle.record_verdict(verdict);
        }
        updated
    }

    /// A wire call has ended at its caller. `outcome` is `None` if the caller dropped it.
    fn finish(&mut self, call: usize, outcome: Option<&Result<Outcome, Fault>>, now: Moment) {
        let step = self.database.step();
        self.trace.note(|| format!("end {call}"));
        self.records[call].ended = Some(step);
        if outcome.is_none() {
            self.pending.record_abandoned(call);
        }
        let Self { records, database, oracle, faults, .. } = self;
        let record = &records[call];
        // Batches of the stream do not count: a former primary may send them.
        if let Some(Ok(Outcome::Time(_))) = outcome {
            oracle.record_checkpoint(record.node, now);
        }
        if matches!(record.operation, Operation::Open(_) | Operation::GetMore(_)) {
            oracle.record_stream_end(record.node, &record.operation, outcome, now);
        }
        if record.operation.is_of_a_stream() || record.operation.is_queued() {
            return;
        }
        let end = match outcome {
            None => End::Abandoned,
            Some(Ok(_)) => End::Answered,
            Some(Err(Fault::Overloaded)) => End::Rejected,
            Some(Err(fault)) => End::Failed { outage: *fault == Fault::Passing },
        };
        oracle.finish_call(record, call, end, database, faults, (step, now));
    }
}

/// Records that a caller drops its call before the call has ended.
struct AbandonGuard<'a> {
    /// `None`: the call has ended.
    call: Option<usize>,
    wire: &'a Wire,
}

impl Drop for AbandonGuard<'_> {
    fn drop(&mut self) {
        let Some(call) = self.call.filter(|_| !std::thread::panicking()) else { return };
        let now = self.wire.clock.now();
        let mut state = self.wire.state();
        state.trace.note(|| format!("abandoned {call}"));
        state.finish(call, None, now);
        let unapplied = state.calls.get(&call).is_some_and(|waiting| waiting.outcome.is_none());
        let is_dropped = state.faults.drops_abandoned_calls && unapplied;
        if is_dropped || state.records[call].operation.is_of_a_stream() {
            state.calls.remove(&call);
        }
    }
}
