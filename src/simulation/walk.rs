//! `Walk`: one random run. In each step it starts operations, causes faults and serves waiting calls.

use std::time::Duration;

use serde_json::json;
use tokio::time::{advance, sleep};

use crate::invalidation::source::Fault;
use crate::session::Session;
use crate::session::id::RawId;
use crate::simulation::chance::Chance;
use crate::simulation::fault_plan::{FaultPlan, Scenario};
use crate::simulation::fleet::{Fleet, Verb};
use crate::simulation::merge_oracle::COUNTER;
use crate::simulation::operation::Operation;
use crate::simulation::scheduler::Scheduler;
use crate::simulation::scoped_request::{MAX_VALUES, Request};
use crate::simulation::trace::Trace;
use crate::simulation::types::{UNSTORABLE, data, refused, version};
use crate::simulation::wire::State;
use crate::time::{Moment, WallTime};

pub(crate) struct Walk {
    /// For what the walks did not have from the start.
    second: Chance,
    pub(crate) fleet: Fleet,
    pub(crate) scheduler: Scheduler,
    stalls: Vec<Stall>,
    /// The latest version. Each new one is unique.
    versions: u64,
    /// Added to each new expiry, in milliseconds, so that no two are the same.
    expiries: u64,
}

/// `Stall`: some calls of one store make no progress until a moment.
struct Stall {
    node: usize,
    traffic: Traffic,
    effect: Effect,
    until: Moment,
}

/// The calls that a stall affects.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Traffic {
    /// Reads and writes.
    Operations,
    Stream,
    Checkpoints,
    All,
}

/// What a stall does to a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Effect {
    /// The call does not reach the database.
    HoldRequest,
    /// The reply does not reach the store.
    HoldReply,
    /// The call fails at once.
    Fail,
    /// The server rejects the call for overload.
    Reject,
}

impl Walk {
    pub(crate) fn new(seed: u64, trace: Trace) -> Self {
        let chance = Chance::of(seed);
        let mut plan = FaultPlan::draw(&chance);
        // Sign-outs and requests are drawn from a second generator, so that a walk without them is the same as before
        // the simulation had them. An overloaded walk has no sign-outs: it counts removed entries, and a sign-out
        // removes some on purpose.
        let second = Chance::of(!seed);
        if plan.scenario != Scenario::Overloaded {
            plan.sign_outs = second.pick(&[0.0, 0.0, 0.0, 0.1]);
        }
        plan.requests = second.pick(&[0.0, 0.0, 0.3, 0.7]);
        plan.adds_up = second.happens(0.5);
        let fleet = Fleet::new(plan, chance, &second);
        fleet.wire.state().trace = trace;
        let scheduler = Scheduler::new(fleet.chance.clone(), fleet.plan.laziness);
        let mut walk =
            Self { second, fleet, scheduler, stalls: Vec::new(), versions: 0, expiries: 0 };
        walk.note(|| format!("{:?}", walk.fleet.plan));
        walk.insert_sessions();
        walk
    }

    /// Takes the steps of the plan, or stops at the first violation.
    pub(crate) async fn run_steps(&mut self) {
        for _ in 0..self.fleet.plan.steps {
            self.step().await;
            if self.is_broken() {
                return;
            }
        }
    }

    pub(crate) fn is_broken(&self) -> bool {
        self.scheduler.has_panicked() || !self.fleet.wire.state().oracle.violations.is_empty()
    }

    /// Stores most of the sessions of the plan.
    fn insert_sessions(&mut self) {
        for id in self.fleet.ids() {
            if self.chance().happens(0.8) {
                let session = self.session();
                self.fleet.wire.state().database.insert(id.key(), &session, None);
            }
        }
    }

    async fn step(&mut self) {
        let rates = self.fleet.plan.rates;
        let chance = self.chance();
        if self.scheduler.running() < self.fleet.plan.max_running && chance.happens(rates.begin) {
            self.start_operation();
        }
        let running = self.scheduler.running();
        if running > 0 && chance.happens(rates.cancel) {
            let cancelled = self.scheduler.cancel(chance.below(running));
            self.note(|| format!("cancel: {cancelled}"));
        }
        if chance.happens(rates.foreign) {
            self.change_elsewhere();
        }
        self.cause_faults();
        for _ in 0..=chance.below(2) {
            self.serve_calls();
            for _ in 0..chance.below(3) {
                tokio::task::yield_now().await;
            }
        }
        self.pass_time().await;
    }

    fn start_operation(&mut self) {
        let chance = self.chance();
        let node = chance.below(self.fleet.plan.stores);
        let crowded = self.fleet.plan.scenario == Scenario::Crowded;
        let unknown = if crowded { 0.2 } else { 0.02 };
        let (id, live) = self.choose();
        let signs_out = chance.happens(self.fleet.plan.sign_outs);
        let is_request = self.second.happens(self.fleet.plan.requests);
        let verb = match chance.below(1_000) {
            _ if is_request => Verb::Request(self.request(id)),
            _ if signs_out => Verb::SignOut(chance.pick(&[0, 1])),
            _ if chance.happens(unknown) => Verb::Load(self.unknown_id()),
            _ if chance.happens(self.fleet.plan.rates.reads) => Verb::Load(id),
            _ if !live && chance.happens(0.3) => Verb::Create(self.version(), self.expiry()),
            0..580 => Verb::Load(id),
            580..930 => self.save(node, id),
            930..950 => Verb::Delete(id),
            950..995 => Verb::Create(self.version(), self.expiry()),
            _ => Verb::Clear,
        };
        self.fleet.start(&self.scheduler, node, verb);
    }

    fn request(&mut self, id: RawId) -> Request {
        let first_value = self.versions + 1;
        self.versions += MAX_VALUES;
        let seed = self.second.fork().u64(..);
        Request { id, seed, first_value, expiries: [(); 3].map(|()| self.expiry()) }
    }

    /// A new id without a session. Another instance may store one under it later.
    fn unknown_id(&self) -> RawId {
        let id = RawId(1_000_000 + i128::try_from(self.chance().below(1 << 30)).unwrap());
        if self.fleet.plan.scenario != Scenario::Crowded {
            self.fleet.ids.lock().unwrap().push(id);
        }
        id
    }

    /// A save of new data, or of the data that the store has last returned, as an app does that always saves.
    fn save(&mut self, node: usize, id: RawId) -> Verb {
        let chance = self.chance();
        let served = {
            let mut state = self.fleet.wire.state();
            let number = state.database.number(id.key());
            state.oracle.last_served(node, number)
        };
        let version = match served {
            _ if chance.happens(0.01) => UNSTORABLE,
            Some(served) if chance.happens(self.fleet.plan.unchanged) => served,
            _ => self.version(),
        };
        Verb::Save(id, version, self.expiry())
    }

    /// Picks a session, mostly a live one. Returns also whether any session is live.
    fn choose(&self) -> (RawId, bool) {
        let chance = self.chance();
        let ids = self.fleet.ids();
        let mut state = self.fleet.wire.state();
        let live: Vec<_> =
            ids.iter().copied().filter(|id| state.database.find(id.key()).is_some()).collect();
        let few = &live[live.len().saturating_sub(self.fleet.plan.sessions + 1)..];
        if few.is_empty() || chance.happens(self.fleet.plan.any_session) {
            let recent = &ids[ids.len().saturating_sub(6)..];
            return (chance.pick(recent), !live.is_empty());
        }
        (chance.pick(few), true)
    }

    /// Changes the database as another instance does.
    fn change_elsewhere(&mut self) {
        let chance = self.chance();
        let (id, _) = self.choose();
        let session = self.session();
        let changes_one_key = self.second.happens(self.fleet.plan.requests);
        let value = version(&session.data);
        let ids = self.fleet.ids();
        let sessions: Vec<_> = ids.iter().map(|id| (id.key(), self.session())).collect();
        let mut state = self.fleet.wire.state();
        let state = &mut *state;
        let number = state.database.number(id.key());
        let database = &mut state.database;
        let key = id.key();
        database.is_bulk = chance.happens(state.faults.bulk_writes);
        let what = match chance.below(20) {
            // An id is never used twice.
            _ if !database.was_ever_stored(number) && chance.happens(0.4) => {
                database.insert(key, &session, None);
                "insert"
            }
            0..10 if changes_one_key => {
                if let Some(mut session) = database.find(key) {
                    // As a request at another instance does.
                    let name = self.second.pick(&["a", "b", "c", COUNTER]);
                    let removed = self.second.happens(0.3) && session.data.remove(name).is_some();
                    if !removed {
                        session.data.insert(name.to_owned(), json!(value));
                    }
                    database.replace(key, None, &session, None);
                }
                "change one key of"
            }
            0..10 => {
                database.replace(key, None, &session, None);
                "replace"
            }
            10..13 => {
                database.touch(key, session.expires);
                "touch"
            }
            13 => {
                database.remove(key, None);
                "remove"
            }
            14..16 => {
                database.sweep();
                "sweep"
            }
            16..18 => {
                database.replace_in_transaction(&sessions);
                "replace all in a transaction with"
            }
            _ => {
                database.write_elsewhere(None);
                "something else"
            }
        };
        state.trace.note(|| format!("elsewhere: {what} {number}"));
    }

    /// Starts faults, each at its own rate.
    fn cause_faults(&mut self) {
        let rates = self.fleet.plan.rates;
        let chance = self.chance();
        let now = self.fleet.clock.now();
        self.stalls.retain(|stall| stall.until > now);
        let node = chance.below(self.fleet.plan.stores);
        let longest = self.fleet.plan.promise.max_staleness * 4;
        if chance.happens(rates.stall) {
            let traffic =
                chance.pick(&[Traffic::Operations, Traffic::Stream, Traffic::Checkpoints]);
            let effect = chance.pick(&[Effect::HoldRequest, Effect::HoldReply]);
            // In a quiet walk the stall is shorter than the lease, so entries from before it are served after it.
            let quiet = self.fleet.plan.scenario == Scenario::Quiet;
            let longest = if quiet { longest / 4 } else { longest };
            let until = now.after(chance.part_of(longest));
            self.note(|| format!("stall: {traffic:?} {effect:?} of store {node} until {until:?}"));
            self.stalls.push(Stall { node, traffic, effect, until });
        }
        if chance.happens(rates.outage) {
            let traffic = chance.pick(&[Traffic::Operations, Traffic::All]);
            let effect =
                chance.pick(&[Effect::HoldRequest, Effect::HoldReply, Effect::Fail, Effect::Fail]);
            let until = now.after(chance.part_of(longest * 2));
            self.note(|| format!("outage: {traffic:?} {effect:?} of store {node} until {until:?}"));
            self.stalls.push(Stall { node, traffic, effect, until });
        }
        if chance.happens(rates.overload) {
            let traffic =
                chance.pick(&[Traffic::Operations, Traffic::Stream, Traffic::All, Traffic::All]);
            let until = now.after(chance.part_of(longest));
            self.note(|| format!("overload: {traffic:?} of store {node} until {until:?}"));
            self.stalls.push(Stall { node, traffic, effect: Effect::Reject, until });
        }
        let mut state = self.fleet.wire.state();
        if chance.happens(rates.refuse_fresh) {
            let until = now.after(chance.part_of(longest * 2));
            state.trace.note(|| format!("refuse fresh streams until {until:?}"));
            state.refuses_fresh_until = state.refuses_fresh_until.max(until);
        }
        if chance.happens(rates.cut_stream) {
            state.trace.note(|| format!("cut the stream of store {node}"));
            state.break_streams(node, &Fault::Passing);
        }
        if chance.happens(rates.refuse_stream) {
            state.trace.note(|| format!("refuse the stream of store {node}"));
            state.break_streams(node, &refused());
        }
        if chance.happens(rates.lose_history) {
            state.trace.note(|| "lose the history".to_owned());
            state.database.oplog.lose_history();
            for node in 0..self.fleet.plan.stores {
                let fault = if chance.happens(0.5) { Fault::Lost } else { Fault::Passing };
                state.break_streams(node, &fault);
            }
        }
        if chance.happens(rates.elect) {
            state.trace.note(|| "elect another primary".to_owned());
            state.database.oplog.elect();
        }
        if chance.happens(rates.drop_collection) {
            state.trace.note(|| "drop the collection".to_owned());
            state.database.drop_collection();
        }
    }

    /// Applies and answers some of the waiting calls.
    fn serve_calls(&mut self) {
        let chance = self.chance();
        let mut late = Vec::new();
        let mut calls = self.fleet.wire.waiting();
        chance.shuffle(&mut calls);
        let rates = self.fleet.plan.rates;
        for call in calls {
            if !chance.happens(rates.serve) {
                continue;
            }
            let wire = &self.fleet.wire;
            let now = self.fleet.clock.now();
            let (effect, ready, due, applied, stream) = {
                let state = wire.state();
                let Some(waiting) = state.calls.get(&call) else { continue };
                let stream =
                    matches!(waiting.operation, Operation::Open(_) | Operation::GetMore(_));
                let applied = waiting.outcome.is_some();
                (self.stall(&state, call), waiting.ready, waiting.due, applied, stream)
            };
            if effect == Some(Effect::Fail) {
                wire.fail(call, Fault::Passing);
                continue;
            }
            if effect == Some(Effect::Reject) && !applied {
                wire.reject(call);
                continue;
            }
            if !applied {
                if effect == Some(Effect::HoldRequest) || now < ready {
                    continue;
                }
                if chance.happens(rates.fail) {
                    self.fail(call, stream);
                    continue;
                }
                wire.apply(call);
                if chance.happens(0.5) {
                    continue;
                }
            }
            if effect == Some(Effect::HoldReply) || now < due {
                continue;
            }
            if chance.happens(rates.fail) {
                self.fail(call, stream);
            } else {
                wire.answer(call);
                let record = &wire.state().records[call];
                if stream && now.since(record.asked) > self.fleet.plan.promise.max_staleness / 5 {
                    late.push(record.node);
                }
            }
        }
        for node in late {
            self.stall_again(node);
        }
    }

    /// A stream whose reply was late may stall again, before it has reported the changes since then.
    fn stall_again(&mut self, node: usize) {
        let chance = self.chance();
        if chance.happens(self.fleet.plan.rates.stall * 20.0) {
            let longest = self.fleet.plan.promise.max_staleness * 4;
            let until = self.fleet.clock.now().after(chance.part_of(longest));
            self.note(|| format!("stall again: the stream of store {node} until {until:?}"));
            self.stalls.push(Stall {
                node,
                traffic: Traffic::Stream,
                effect: Effect::HoldRequest,
                until,
            });
        }
    }

    /// Fails a call, alone or with its whole batch.
    fn fail(&self, call: usize, stream: bool) {
        let fault = self.fault(stream);
        if self.chance().happens(0.5) {
            self.fleet.wire.fail_batch(call, fault);
        } else {
            self.fleet.wire.fail(call, fault);
        }
    }

    fn fault(&self, stream: bool) -> Fault {
        let often = if stream { 0.3 } else { 0.1 };
        if self.chance().happens(often) { refused() } else { Fault::Passing }
    }

    /// The effect of the stall that a call is in.
    fn stall(&self, state: &State, call: usize) -> Option<Effect> {
        let record = &state.records[call];
        let traffic = match record.operation {
            Operation::Open(_) | Operation::GetMore(_) => Traffic::Stream,
            Operation::PrimaryTime => Traffic::Checkpoints,
            _ => Traffic::Operations,
        };
        let hits = |stall: &&Stall| {
            stall.node == record.node && (stall.traffic == traffic || stall.traffic == Traffic::All)
        };
        self.stalls.iter().find(hits).map(|stall| stall.effect)
    }

    async fn pass_time(&self) {
        let plan = &self.fleet.plan;
        let chance = self.chance();
        if chance.happens(plan.rates.suspend) {
            let asleep = chance.part_of(plan.promise.max_staleness * 3);
            self.note(|| format!("suspended for {asleep:?}"));
            let wakes_at = self.fleet.clock.now().after(asleep);
            self.fleet.wire.state().oracle.woke_up_at = Some(wakes_at);
            advance(asleep).await;
        } else if chance.happens(plan.rates.leap) {
            sleep(chance.part_of(plan.longest())).await;
        } else if chance.happens(0.7) {
            sleep(chance.part_of(plan.tick)).await;
        }
    }

    fn session(&mut self) -> Session {
        Session::new(data(self.version()), self.expiry())
    }

    fn version(&mut self) -> u64 {
        self.versions += 1;
        self.versions
    }

    /// A new expiry: mostly in about an hour, sometimes soon.
    fn expiry(&mut self) -> WallTime {
        let soon = self.fleet.plan.promise.max_staleness * 3;
        let lasts = if self.chance().happens(0.1) {
            self.chance().part_of(soon) + Duration::from_millis(1)
        } else {
            Duration::from_secs(3_600)
        };
        self.expiries += 1;
        self.fleet.clock.wall().after(lasts + Duration::from_millis(self.expiries))
    }

    pub(crate) fn note(&self, text: impl FnOnce() -> String) {
        self.fleet.wire.state().trace.note(text);
    }

    fn chance(&self) -> Chance {
        self.fleet.chance.clone()
    }
}
