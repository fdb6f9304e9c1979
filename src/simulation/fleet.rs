//! Stores over one database, and what is asked of them.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use metrics_util::debugging::{DebugValue, DebuggingRecorder, Snapshotter};
use tokio::runtime::Handle;
use tokio_util::sync::CancellationToken;

use crate::availability::Availability;
use crate::cache::{Cache, CacheConfig, EvictionPolicy};
use crate::error::{Error, ErrorKind};
use crate::invalidation::{self, InvalidationListener};
use crate::runtime::Tasks;
use crate::session::id::RawId;
use crate::session::revision::RevSource;
use crate::simulation::backend::{FakeBackend, UNSTORABLE};
use crate::simulation::chance::Chance;
use crate::simulation::fault_plan::{Kind, Profile};
use crate::simulation::oracle::Begun;
use crate::simulation::scheduler::Scheduler;
use crate::simulation::sign_out::OwnedPages;
use crate::simulation::traced_backend::TracedBackend;
use crate::simulation::wire::{Manners, Wire};
use crate::store::write_through::{TouchPolicy, WriteThrough};
use crate::telemetry::metrics::{Series, StreamMetrics};
use crate::time::Clock;
use crate::time::WallTime;

/// Clones share it.
#[derive(Clone)]
pub(crate) struct Fleet {
    pub(crate) wire: Wire,
    pub(crate) clock: Clock,
    pub(crate) chance: Chance,
    pub(crate) profile: Arc<Profile>,
    pub(crate) stores: Arc<[WriteThrough<TracedBackend>]>,
    /// The sessions that are known of; those past the first few were made by stores.
    pub(crate) ids: Arc<Mutex<Vec<RawId>>>,
    /// What the caches count, where a walk judges by that.
    meters: Option<Arc<Snapshotter>>,
}

#[derive(Clone, Copy, Debug)]
pub(crate) enum Verb {
    Create(u64, WallTime),
    Save(RawId, u64, WallTime),
    Load(RawId),
    Delete(RawId),
    Clear,
    SignOut(u64),
}

impl Fleet {
    pub(crate) fn new(profile: Profile, chance: Chance) -> Self {
        let clock = Clock::tokio();
        let pace = invalidation::poll_interval(profile.promise.max_staleness);
        let manners = Manners {
            laziness: profile.laziness,
            at_once: profile.at_once,
            slow: profile.slow,
            longest: profile.longest(),
            timeout: profile.timeout,
            recalls: profile.promise.exclusive,
            pace,
            streams: profile.follows(),
            tokens_have_times: profile.tokens_have_times,
            shards: profile.shards,
            busy: profile.busy.then(|| RawId(-1).key()),
            others: profile.others,
            bulks: profile.bulks,
            lags: profile.lags,
            healed: false,
        };
        let wire = Wire::new(clock.clone(), chance.clone(), manners);
        let limits = CacheConfig {
            max_bytes: 1 << 20,
            max_entries: profile.max_entries,
            max_absent_ids: profile.max_absent,
            policy: EvictionPolicy::Lru,
            max_staleness: profile.promise.max_staleness,
            exclusive: profile.promise.exclusive,
            outage_grace: profile.promise.grace,
            compact: false,
        };
        let recorder = (profile.kind == Kind::Overloaded).then(DebuggingRecorder::new);
        let stores = (0..profile.stores).map(|node| {
            let limits =
                CacheConfig { compact: (node + profile.sessions) % 2 == 1, ..limits.clone() };
            let availability = Availability::new(clock.clone());
            let of_cache = availability.clone();
            let new = || Cache::new(&limits, clock.clone(), of_cache, &Series::default());
            let cache = match &recorder {
                Some(recorder) => metrics::with_local_recorder(recorder, new),
                None => new(),
            };
            let tasks = Tasks::new(Handle::current(), profile.timeout, availability);
            let ends = tasks.closed().child_token();
            if !profile.promise.exclusive {
                let follower = InvalidationListener {
                    source: FakeBackend::new(wire.clone(), node),
                    cache: cache.clone(),
                    clock: clock.clone(),
                    poll_interval: pace,
                    timeout: profile.timeout,
                    metrics: StreamMetrics::new(
                        &Series::default(),
                        crate::telemetry::metrics::Counter::noop(),
                        clock.clone(),
                    ),
                    rng: chance.another(),
                };
                drop(follower.start(&tasks, CancellationToken::clone(&ends)));
            }
            WriteThrough {
                backend: TracedBackend::new(&wire, node, &tasks, profile.limits),
                cache,
                tasks,
                revs: RevSource::new(),
                touch_policy: TouchPolicy { after: profile.touch_after, clock: clock.clone() },
                _stops_listener: ends.drop_guard(),
            }
        });
        let ids = (0..profile.sessions).map(|id| RawId(i128::try_from(id).unwrap())).collect();
        Self {
            meters: recorder.as_ref().map(|recorder| Arc::new(recorder.snapshotter())),
            stores: stores.collect(),
            ids: Arc::new(Mutex::new(ids)),
            profile: Arc::new(profile),
            wire,
            clock,
            chance,
        }
    }

    /// Where nothing but overload has happened, whether the caches have kept what they had.
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
        let doubts = removed("doubt");
        self.wire.state().oracle.judge_overload(gaps, doubts);
    }

    pub(crate) fn ids(&self) -> Vec<RawId> {
        self.ids.lock().unwrap().clone()
    }

    pub(crate) fn start(&self, crew: &Scheduler, node: usize, verb: Verb) {
        let (fleet, what) = (self.clone(), format!("{} at store {node}", self.told(verb)));
        self.wire.state().trace.note(|| format!("start: {what}"));
        crew.start(what, async move { fleet.run(node, verb).await });
    }

    async fn run(&self, node: usize, verb: Verb) {
        let (store, begun) = (&self.stores[node], self.begins());
        let told = self.told(verb);
        self.wire.state().trace.note(|| format!("step {}: {told} begins", begun.step));
        match verb {
            Verb::Load(id) => self.load(node, id).await,
            Verb::Create(version, expires) => {
                match store.create(&crate::simulation::data(version), expires).await {
                    Ok(id) => self.ids.lock().unwrap().push(id),
                    Err(error) => self.failed(node, None, begun, &error),
                }
            }
            Verb::Save(id, version, expires) => {
                let save = self.calls(node, id, version, expires, begun);
                match store.save(id, &crate::simulation::data(version), expires).await {
                    Ok(()) => self.saved(id, version, save, begun),
                    Err(error) if error.kind() == ErrorKind::Encode && version == UNSTORABLE => {
                        self.in_time(begun, &mut self.wire.state());
                    }
                    Err(error) => {
                        let replaces = self.wire.state().errands.replaces(save);
                        self.failed(node, replaces.then_some(id), begun, &error);
                    }
                }
            }
            Verb::Delete(id) => {
                let there = self.stored(&[id]);
                match store.delete(id).await {
                    Ok(()) => {
                        self.gone(&there, begun);
                        self.in_time(begun, &mut self.wire.state());
                    }
                    Err(error) => self.failed(node, Some(id), begun, &error),
                }
            }
            Verb::SignOut(owner) => self.sign_out(node, owner).await,
            Verb::Clear => {
                let there = self.stored(&self.ids());
                // It keeps to no deadline, and fails as others do.
                match store.clear().await {
                    Ok(_) => self.gone(&there, begun),
                    Err(error) => self.noted(node, &error),
                }
            }
        }
    }

    /// Loads, and lets the oracle judge the answer.
    pub(crate) async fn load(&self, node: usize, id: RawId) {
        let begun = self.begins();
        let answer = self.stores[node].load(id).await;
        let mut state = self.wire.state();
        let number = state.database.number(id.key());
        match answer {
            Ok(answer) => {
                let version =
                    answer.as_ref().map(|session| crate::simulation::version(&session.data));
                let state = &mut *state;
                state.trace.note(|| format!("store {node} has {version:?} for session {number}"));
                let truth = (&mut state.database, &*state.records);
                let (promise, now) = (&self.profile.promise, self.clock.now());
                let whose = (node, number);
                let (answer, manners) = (answer.as_ref(), &state.manners);
                state.oracle.judge(whose, begun, answer, promise, truth, manners, now);
            }
            Err(error) => {
                let (whose, kind, it) = ((node, id.key()), error.kind(), &mut *state);
                it.oracle.judge_failure(whose, begun, kind, &it.records, &it.manners);
                drop(state);
                self.failed(node, None, begun, &error);
                state = self.wire.state();
            }
        }
        self.in_time(begun, &mut state);
    }

    /// Ends the sessions of an owner, and lets the oracle know what that promises.
    async fn sign_out(&self, node: usize, owner: u64) {
        let live = |state: &crate::simulation::wire::State| -> Vec<_> {
            let database = &state.database;
            let live = (0..database.sessions()).filter_map(|number| {
                let version = database.version(number)?;
                (crate::simulation::sign_out::owner(version) == owner)
                    .then(|| (number, database.rank(number)))
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
        state.oracle.signed_out(node, &reached.removed, step);
        match ended {
            Ok(_) => {
                state.oracle.signed_out(node, &reached.pending, step);
                let after = live(state);
                if let Some((number, _)) = before.iter().find(|it| after.contains(it)) {
                    let text = format!("I1, sign-out: session {number} of {owner} is there still");
                    state.oracle.violated(text);
                }
            }
            Err(error) => self.noted_in(state, node, &error),
        }
    }

    fn begins(&self) -> Begun {
        let step = self.wire.state().database.step();
        Begun { step, at: self.clock.now(), wall: self.clock.wall() }
    }

    /// To be told right before the store is.
    fn calls(
        &self,
        node: usize,
        id: RawId,
        version: u64,
        expires: WallTime,
        begun: Begun,
    ) -> usize {
        let mut state = self.wire.state();
        let number = state.database.number(id.key());
        state.errands.calls((node, number), (version, expires), begun)
    }

    fn saved(&self, id: RawId, version: u64, save: usize, begun: Begun) {
        let mut state = self.wire.state();
        let state = &mut *state;
        let number = state.database.number(id.key());
        state.trace.note(|| format!("saved {version} of session {number}"));
        let held = state.database.spans(number).any(|span| {
            let known = span.held.is_some_and(|held| held.version == version);
            // One that found the session gone is dropped.
            known || (span.held.is_none() && span.until.is_none_or(|until| until >= begun.at))
        });
        if !held {
            state.oracle.violated(format!("I6: {version} was acknowledged and never stored"));
        }
        let crate::simulation::wire::State { errands, database, oracle, .. } = state;
        errands.is_acknowledged(save, self.profile.touch_after, database, oracle);
        self.in_time(begun, state);
    }

    fn gone(&self, ids: &[RawId], begun: Begun) {
        let mut state = self.wire.state();
        let state = &mut *state;
        for id in ids {
            let number = state.database.number(id.key());
            if state.database.is_live(number) {
                let text = format!("I6: session {number} was said to be gone, and is not");
                state.oracle.violated(text);
            }
        }
        state.trace.note(|| format!("gone since step {}", begun.step));
    }

    /// Those that are there.
    fn stored(&self, ids: &[RawId]) -> Vec<RawId> {
        let database = &mut self.wire.state().database;
        ids.iter().copied().filter(|id| database.find(id.key()).is_some()).collect()
    }

    /// `wrote`: the session that this may have changed.
    fn failed(&self, node: usize, wrote: Option<RawId>, begun: Begun, error: &Error) {
        self.noted(node, error);
        let mut state = self.wire.state();
        let state = &mut *state;
        if let (ErrorKind::Timeout, Some(id)) = (error.kind(), wrote) {
            let number = state.database.number(id.key());
            let deadline = begun.at.after(self.profile.timeout);
            state.oracle.timed_out(node, number, deadline, &mut state.database);
        }
        self.in_time(begun, state);
    }

    fn noted(&self, node: usize, error: &Error) {
        self.noted_in(&mut self.wire.state(), node, error);
    }

    #[allow(clippy::unused_self, reason = "as the one above")]
    fn noted_in(&self, state: &mut crate::simulation::wire::State, node: usize, error: &Error) {
        use ErrorKind::{Connection, Overloaded, Server, Timeout};

        state.trace.note(|| format!("store {node} fails: {error}"));
        let kind = error.kind();
        if !matches!(kind, Connection | Overloaded | Server | Timeout) {
            state.oracle.violated(format!("an error of its own: {kind:?}"));
        }
    }

    /// Whether the deadline of an operation was kept, if the process was awake.
    fn in_time(&self, begun: Begun, state: &mut crate::simulation::wire::State) {
        let took = self.clock.now().since(begun.at);
        let asleep = state.oracle.asleep_at.is_some_and(|asleep| asleep >= begun.at);
        if took > self.profile.timeout + Duration::from_millis(2) && !asleep {
            state.trace.note(|| "too late".to_owned());
            state.oracle.violated(format!("deadline: it took {took:?}"));
        }
    }

    fn told(&self, verb: Verb) -> String {
        let number = |id: RawId| self.wire.state().database.number(id.key());
        match verb {
            Verb::Create(version, _) => format!("create {version}"),
            Verb::Save(id, version, _) => format!("save {version} of session {}", number(id)),
            Verb::Load(id) => format!("load session {}", number(id)),
            Verb::Delete(id) => format!("delete session {}", number(id)),
            Verb::Clear => "clear".to_owned(),
            Verb::SignOut(owner) => format!("sign out {owner}"),
        }
    }
}
