//! `Fleet`: several stores over one database, and the operations that apps call on them.
//!
//! Each operation reports its result to the oracle in the turn in which it ends.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use metrics_util::debugging::{DebugValue, DebuggingRecorder, Snapshotter};
use tokio::runtime::Handle;
use tokio_util::sync::CancellationToken;

use crate::availability::Availability;
use crate::cache::{Cache, CacheConfig, Coherence, EvictionPolicy};
use crate::error::{Error, ErrorKind};
use crate::invalidation::{self, InvalidationListener};
use crate::runtime::Tasks;
use crate::session::Session;
use crate::session::id::RawId;
use crate::session::revision::RevSource;
use crate::simulation::backend::FakeBackend;
use crate::simulation::chance::Chance;
use crate::simulation::fault_plan::{FaultPlan, Scenario};
use crate::simulation::owned_pages::OwnedPages;
use crate::simulation::scheduler::Scheduler;
use crate::simulation::scoped_request::Request;
use crate::simulation::traced_backend::TracedBackend;
use crate::simulation::types::{Begun, FaultConfig, UNSTORABLE, data, owner_of, version};
use crate::simulation::wire::{State, Wire};
use crate::store::write_through::{TouchPolicy, WriteThrough};
use crate::telemetry::metrics::{Series, StreamMetrics};
use crate::time::{Clock, WallTime};

/// Operations clone it: all clones share their parts.
#[derive(Clone)]
pub(crate) struct Fleet {
    pub(crate) wire: Wire,
    pub(crate) clock: Clock,
    pub(crate) chance: Chance,
    pub(crate) plan: Arc<FaultPlan>,
    pub(crate) stores: Arc<[WriteThrough<TracedBackend>]>,
    /// The ids of all sessions so far. The first `plan.sessions` of them belong to the sessions of the start.
    pub(crate) ids: Arc<Mutex<Vec<RawId>>>,
    /// The caches' metrics, in the scenario whose rules need them.
    meters: Option<Arc<Snapshotter>>,
}

/// An operation that an app calls. Numbers are versions, and the owner of a sign-out.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Verb {
    Create(u64, WallTime),
    Save(RawId, u64, WallTime),
    Load(RawId),
    Delete(RawId),
    Clear,
    SignOut(u64),
    Request(Request),
}

impl Fleet {
    /// `chance` draws the faults, and `second` the waits of merges.
    pub(crate) fn new(plan: FaultPlan, chance: Chance, second: &Chance) -> Self {
        let clock = Clock::tokio();
        let poll_interval = invalidation::poll_interval(plan.promise.max_staleness);
        let faults = FaultConfig {
            laziness: plan.laziness,
            immediate: plan.immediate,
            slow: plan.slow,
            longest: plan.longest(),
            timeout: plan.timeout,
            drops_abandoned_calls: plan.promise.exclusive,
            poll_interval,
            streams: plan.has_streams(),
            tokens_have_times: plan.tokens_have_times,
            shards: plan.shards,
            busy_stream: plan.busy_stream.then(|| RawId(-1).key()),
            unrelated_writes: plan.unrelated_writes,
            bulk_writes: plan.bulk_writes,
            small_batches: plan.small_batches,
            recovered: false,
        };
        let wire = Wire::new(clock.clone(), chance.clone(), faults);
        wire.state().merges.adds_up = plan.adds_up;
        let config = CacheConfig {
            max_bytes: 1 << 20,
            max_entries: plan.max_entries,
            max_absent_ids: plan.max_absent_ids,
            policy: EvictionPolicy::Lru,
            max_staleness: plan.promise.max_staleness,
            coherence: if plan.promise.exclusive {
                Coherence::SoleWriter
            } else {
                Coherence::ChangeStream
            },
            outage_grace: plan.promise.grace,
            compact: false,
        };
        let recorder = (plan.scenario == Scenario::Overloaded).then(DebuggingRecorder::new);
        let stores = (0..plan.stores).map(|node| {
            let config = CacheConfig { compact: (node + plan.sessions) % 2 == 1, ..config.clone() };
            let availability = Availability::new(clock.clone());
            let of_cache = availability.clone();
            let new = || Cache::new(&config, clock.clone(), of_cache, &Series::default());
            let cache = match &recorder {
                Some(recorder) => metrics::with_local_recorder(recorder, new),
                None => new(),
            };
            let tasks = Tasks::new(Handle::current(), plan.timeout, availability);
            let ends = tasks.closed().child_token();
            if !plan.promise.exclusive {
                let listener = InvalidationListener {
                    source: FakeBackend::new(wire.clone(), node),
                    cache: cache.clone(),
                    clock: clock.clone(),
                    poll_interval,
                    timeout: plan.timeout,
                    metrics: StreamMetrics::new(
                        &Series::default(),
                        crate::telemetry::metrics::Counter::noop(),
                        clock.clone(),
                    ),
                    rng: chance.fork(),
                };
                drop(listener.start(&tasks, CancellationToken::clone(&ends)));
            }
            WriteThrough {
                backend: TracedBackend::new(&wire, node, &tasks, plan.limits, second.fork()),
                cache,
                tasks,
                revs: RevSource::new(),
                touch_policy: TouchPolicy { after: plan.touch_after, clock: clock.clone() },
                _stops_listener: ends.drop_guard(),
            }
        });
        let ids = (0..plan.sessions).map(|id| RawId(i128::try_from(id).unwrap())).collect();
        Self {
            meters: recorder.as_ref().map(|recorder| Arc::new(recorder.snapshotter())),
            stores: stores.collect(),
            ids: Arc::new(Mutex::new(ids)),
            plan: Arc::new(plan),
            wire,
            clock,
            chance,
        }
    }

    /// Checks `overload`, in the scenario that has no other fault.
    pub(crate) fn judge_overload(&self) {
        let Some(meters) = &self.meters else { return };
        let counted = meters.snapshot().into_vec();
        let removed = |cause: &str| -> u64 {
            let counts = counted.iter().filter_map(|(key, _, _, value)| {
                let key = key.key();
                let is_it = key.name() == "session_store_cache_invalidations_total"
                    && key.labels().any(|label| label.value() == cause);
                match value {
                    DebugValue::Counter(count) if is_it => Some(*count),
                    _ => None,
                }
            });
            counts.sum()
        };
        let gaps = removed("gap");
        let unknown = removed("unknown_outcome");
        self.wire.state().oracle.judge_overload(gaps, unknown);
    }

    pub(crate) fn ids(&self) -> Vec<RawId> {
        self.ids.lock().unwrap().clone()
    }

    pub(crate) fn start(&self, scheduler: &Scheduler, node: usize, verb: Verb) {
        let fleet = self.clone();
        let what = format!("{} at store {node}", self.describe(verb));
        self.wire.state().trace.note(|| format!("start: {what}"));
        scheduler.start(what, async move { fleet.run(node, verb).await });
    }

    async fn run(&self, node: usize, verb: Verb) {
        let store = &self.stores[node];
        let begun = self.begin();
        let what = self.describe(verb);
        self.wire.state().trace.note(|| format!("step {}: {what} begins", begun.step));
        match verb {
            Verb::Load(id) => drop(self.load(node, id).await),
            Verb::Request(request) => self.request(node, request).await,
            Verb::Create(version, expires) => {
                self.wire.state().merges.begin_creation();
                match store.create(RawId::random(), &data(version), expires).await {
                    Ok(id) => self.ids.lock().unwrap().push(id),
                    Err(error) => self.record_failure(node, None, begun, &error),
                }
            }
            Verb::Save(id, version, expires) => {
                let save = self.begin_save(node, id, version, expires, begun);
                let data = self.wire.state().database.data_of(version);
                match store.save(id, &data, expires).await {
                    Ok(()) => self.check_saved(id, version, save, begun),
                    Err(error) if error.kind() == ErrorKind::Encode && version == UNSTORABLE => {
                        self.check_deadline(begun, &mut self.wire.state());
                    }
                    Err(error) => {
                        let is_replace = self.wire.state().pending.is_replace(save);
                        self.record_failure(node, is_replace.then_some(id), begun, &error);
                    }
                }
            }
            Verb::Delete(id) => drop(self.delete(node, id).await),
            Verb::SignOut(owner) => self.sign_out(node, owner).await,
            Verb::Clear => {
                let live = self.live(&self.ids());
                // A clear has no deadline.
                match store.clear().await {
                    Ok(_) => self.check_gone(&live, begun),
                    Err(error) => check_error(&mut self.wire.state(), node, &error),
                }
            }
        }
    }

    /// Deletes a session, and returns whether that was acknowledged.
    pub(crate) async fn delete(&self, node: usize, id: RawId) -> bool {
        let begun = self.begin();
        let live = self.live(&[id]);
        match self.stores[node].delete(id).await {
            Ok(()) => {
                self.check_gone(&live, begun);
                self.check_deadline(begun, &mut self.wire.state());
                true
            }
            Err(error) => {
                self.record_failure(node, Some(id), begun, &error);
                false
            }
        }
    }

    /// Loads a session and lets the oracle judge the answer.
    pub(crate) async fn load(&self, node: usize, id: RawId) -> Option<Session> {
        let begun = self.begin();
        let answer = self.stores[node].load(id).await;
        let mut state = self.wire.state();
        let number = state.database.number(id.key());
        let found = match answer {
            Ok(answer) => {
                let version = answer.as_ref().map(|session| version(&session.data));
                let state = &mut *state;
                state.trace.note(|| format!("store {node} has {version:?} for session {number}"));
                state.oracle.judge_load(
                    (node, number),
                    begun,
                    answer.as_ref(),
                    &self.plan.promise,
                    (&mut state.database, &*state.records),
                    &state.faults,
                    self.clock.now(),
                );
                answer
            }
            Err(error) => {
                let it = &mut *state;
                it.oracle.judge_failed_load(
                    (node, id.key()),
                    begun,
                    error.kind(),
                    &it.records,
                    &it.faults,
                );
                drop(state);
                self.record_failure(node, None, begun, &error);
                state = self.wire.state();
                None
            }
        };
        self.check_deadline(begun, &mut state);
        found
    }

    /// Removes the sessions of an owner and tells the oracle which floors that sets.
    async fn sign_out(&self, node: usize, owner: u64) {
        let live = |state: &State| -> Vec<_> {
            let database = &state.database;
            let live = (0..database.sessions()).filter_map(|number| {
                let version = database.version(number)?;
                (owner_of(version) == owner).then(|| (number, database.rank(number)))
            });
            live.collect()
        };
        let before = live(&self.wire.state());
        let pages = OwnedPages::new(FakeBackend::new(self.wire.clone(), node), owner);
        let reached = pages.reached();
        let ended = self.stores[node].delete_pages(pages).await;
        let mut state = self.wire.state();
        let state = &mut *state;
        let step = state.database.step();
        let reached = std::mem::take(&mut *reached.lock().unwrap());
        state.oracle.record_sign_out(node, &reached.removed, step);
        match ended {
            Ok(_) => {
                state.oracle.record_sign_out(node, &reached.pending, step);
                let after = live(state);
                if let Some((number, _)) = before.iter().find(|it| after.contains(it)) {
                    let text = format!("I1, sign-out: session {number} of {owner} still exists");
                    state.oracle.report_violation(text);
                }
            }
            Err(error) => check_error(state, node, &error),
        }
    }

    pub(crate) fn begin(&self) -> Begun {
        let step = self.wire.state().database.step();
        Begun { step, at: self.clock.now(), wall: self.clock.wall() }
    }

    /// Records a save, right before it is called on the store.
    fn begin_save(
        &self,
        node: usize,
        id: RawId,
        version: u64,
        expires: WallTime,
        begun: Begun,
    ) -> usize {
        let mut state = self.wire.state();
        let number = state.database.number(id.key());
        state.pending.begin_save((node, number), (version, expires), begun)
    }

    fn check_saved(&self, id: RawId, version: u64, save: usize, begun: Begun) {
        let mut state = self.wire.state();
        let state = &mut *state;
        let number = state.database.number(id.key());
        state.trace.note(|| format!("saved {version} of session {number}"));
        let was_stored = state.database.spans(number).any(|span| {
            let has_version = span.doc.is_some_and(|doc| doc.version == version);
            // A save of a session that does not exist stores nothing, and is acknowledged.
            let was_gone = span.doc.is_none() && span.until.is_none_or(|until| until >= begun.at);
            has_version || was_gone
        });
        if !was_stored {
            state
                .oracle
                .report_violation(format!("I6: {version} was acknowledged and never stored"));
        }
        let State { pending, database, oracle, .. } = state;
        pending.record_acknowledged(save, self.plan.touch_after, database, oracle);
        self.check_deadline(begun, state);
    }

    fn check_gone(&self, ids: &[RawId], begun: Begun) {
        let mut state = self.wire.state();
        let state = &mut *state;
        for id in ids {
            let number = state.database.number(id.key());
            if state.database.is_live(number) {
                let text =
                    format!("I6: session {number} was reported as removed, and still exists");
                state.oracle.report_violation(text);
            }
        }
        state.trace.note(|| format!("gone since step {}", begun.step));
    }

    /// The ids whose sessions are live.
    fn live(&self, ids: &[RawId]) -> Vec<RawId> {
        let database = &mut self.wire.state().database;
        ids.iter().copied().filter(|id| database.find(id.key()).is_some()).collect()
    }

    /// `wrote`: the session that the operation may have changed.
    pub(crate) fn record_failure(
        &self,
        node: usize,
        wrote: Option<RawId>,
        begun: Begun,
        error: &Error,
    ) {
        check_error(&mut self.wire.state(), node, error);
        let mut state = self.wire.state();
        let state = &mut *state;
        if let (ErrorKind::Timeout, Some(id)) = (error.kind(), wrote) {
            let number = state.database.number(id.key());
            let deadline = begun.at.after(self.plan.timeout);
            state.oracle.record_timeout(node, number, deadline, &mut state.database);
        }
        self.check_deadline(begun, state);
    }

    /// Checks that an operation has kept its deadline. Skipped if the process was suspended meanwhile.
    pub(crate) fn check_deadline(&self, begun: Begun, state: &mut State) {
        let took = self.clock.now().since(begun.at);
        let asleep = state.oracle.woke_up_at.is_some_and(|woke_at| woke_at >= begun.at);
        if took > self.plan.timeout + Duration::from_millis(2) && !asleep {
            state.trace.note(|| "too late".to_owned());
            state.oracle.report_violation(format!("deadline: an operation took {took:?}"));
        }
    }

    fn describe(&self, verb: Verb) -> String {
        let number = |id: RawId| self.wire.state().database.number(id.key());
        match verb {
            Verb::Create(version, _) => format!("create {version}"),
            Verb::Save(id, version, _) => format!("save {version} of session {}", number(id)),
            Verb::Load(id) => format!("load session {}", number(id)),
            Verb::Delete(id) => format!("delete session {}", number(id)),
            Verb::Clear => "clear".to_owned(),
            Verb::Request(request) => format!("request of session {}", number(request.id)),
            Verb::SignOut(owner) => format!("sign out {owner}"),
        }
    }
}

/// Checks that an error has one of the kinds that the simulated faults can cause.
fn check_error(state: &mut State, node: usize, error: &Error) {
    use ErrorKind::{Connection, Overloaded, Server, Timeout};

    state.trace.note(|| format!("store {node} fails: {error}"));
    let kind = error.kind();
    if !matches!(kind, Connection | Overloaded | Server | Timeout) {
        state.oracle.report_violation(format!("error: no fault causes {kind:?}"));
    }
}
