//! A random walk: what the stores are asked and how the network serves them, step by step.

use std::collections::BTreeMap;
use std::time::Duration;

use tokio::time::{advance, sleep};

use crate::invalidation::source::{Fault, Refusal};
use crate::session::Session;
use crate::session::id::RawId;
use crate::simulation::backend::UNSTORABLE;
use crate::simulation::chance::Chance;
use crate::simulation::fault_plan::{Kind, Profile};
use crate::simulation::fleet::{Fleet, Verb};
use crate::simulation::operation::Operation;
use crate::simulation::scheduler::Scheduler;
use crate::simulation::trace::Trace;
use crate::simulation::wire::State;
use crate::time::Moment;
use crate::time::WallTime;

pub(crate) struct Walk {
    pub(crate) fleet: Fleet,
    pub(crate) crew: Scheduler,
    stalls: Vec<Stall>,
    versions: u64,
    expiries: u64,
}

/// What became of a walk.
#[derive(Debug)]
pub(crate) struct Report {
    pub(crate) violation: Option<String>,
    pub(crate) tally: BTreeMap<&'static str, u64>,
    pub(crate) digest: u64,
}

/// Some calls of one store stand still for a while.
struct Stall {
    node: usize,
    lane: Lane,
    way: Way,
    until: Moment,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Lane {
    Verbs,
    Stream,
    Fences,
    All,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    Requests,
    Replies,
    /// They fail instead of standing still.
    Neither,
    /// The server turns them away instead of carrying them out.
    TurnedAway,
}

/// Goes a walk to its end, or to the first thing that should not have been.
pub(crate) async fn walk(seed: u64, trace: Trace) -> Report {
    let chance = Chance::of(seed);
    let mut profile = Profile::draw(&chance);
    // Not drawn with the rest, so that the walks without go as they went before there were any.
    // A sign-out removes the entries of writes in flight on purpose, and there every removed entry counts.
    if profile.kind != Kind::Overloaded {
        profile.sign_outs = Chance::of(!seed).pick(&[0.0, 0.0, 0.0, 0.1]);
    }
    let fleet = Fleet::new(profile, chance);
    fleet.wire.state().trace = trace;
    let steps = fleet.profile.steps;
    let crew = Scheduler::new(fleet.chance.clone(), fleet.profile.laziness);
    let mut walk = Walk { fleet, crew, stalls: Vec::new(), versions: 0, expiries: 0 };
    walk.fleet.wire.state().trace.note(|| format!("{:?}", walk.fleet.profile));
    walk.settle();
    for _ in 0..steps {
        walk.step().await;
        if walk.is_broken() {
            break;
        }
    }
    if !walk.is_broken() {
        walk.heal().await;
    }
    if walk.crew.is_dead() {
        walk.fleet.wire.state().oracle.violated("panic".to_owned());
    }
    let mut state = walk.fleet.wire.state();
    // What is torn down with the runtime is not dropped before its time.
    state.oracle.closing = true;
    let violation = state.oracle.violations.first().cloned();
    let violation = violation.map(|text| format!("{text}\n  {:?}", walk.fleet.profile));
    let tally = std::mem::take(&mut state.oracle.tally);
    Report { violation, tally, digest: state.trace.digest() }
}

impl Walk {
    pub(crate) fn is_broken(&self) -> bool {
        self.crew.is_dead() || !self.fleet.wire.state().oracle.violations.is_empty()
    }

    /// Most sessions are there from the start.
    fn settle(&mut self) {
        for id in self.fleet.ids() {
            if self.chance().happens(0.8) {
                let session = self.session();
                self.fleet.wire.state().database.insert(id.key(), &session, None);
            }
        }
    }

    async fn step(&mut self) {
        let (rates, chance) = (self.fleet.profile.rates, self.chance());
        if self.crew.under_way() < self.fleet.profile.most_running && chance.happens(rates.begin) {
            self.begin();
        }
        let under_way = self.crew.under_way();
        if under_way > 0 && chance.happens(rates.cancel) {
            let cancelled = self.crew.cancel(chance.below(under_way));
            self.note(|| format!("cancel: {cancelled}"));
        }
        if chance.happens(rates.foreign) {
            self.change_elsewhere();
        }
        self.trouble();
        for _ in 0..=chance.below(2) {
            self.serve();
            for _ in 0..chance.below(3) {
                tokio::task::yield_now().await;
            }
        }
        self.wait().await;
    }

    fn begin(&mut self) {
        let chance = self.chance();
        let node = chance.below(self.fleet.profile.stores);
        let crowded = self.fleet.profile.kind == Kind::Crowded;
        let unknown = if crowded { 0.2 } else { 0.02 };
        let (id, live) = self.choose();
        let signs_out = chance.happens(self.fleet.profile.sign_outs);
        let verb = match chance.below(1_000) {
            _ if signs_out => Verb::SignOut(chance.pick(&[0, 1])),
            _ if chance.happens(unknown) => Verb::Load(self.invent()),
            _ if chance.happens(self.fleet.profile.rates.reads) => Verb::Load(id),
            _ if !live && chance.happens(0.3) => Verb::Create(self.version(), self.expiry()),
            0..580 => Verb::Load(id),
            580..930 => self.save(node, id),
            930..950 => Verb::Delete(id),
            950..995 => Verb::Create(self.version(), self.expiry()),
            _ => Verb::Clear,
        };
        self.fleet.start(&self.crew, node, verb);
    }

    /// An id that nobody was given, of a session that somebody may yet put there.
    fn invent(&self) -> RawId {
        let id = RawId(1_000_000 + i128::try_from(self.chance().below(1 << 30)).unwrap());
        if self.fleet.profile.kind != Kind::Crowded {
            self.fleet.ids.lock().unwrap().push(id);
        }
        id
    }

    /// A save of new data, or, as an app does that always saves, of what it was served last.
    fn save(&mut self, node: usize, id: RawId) -> Verb {
        let chance = self.chance();
        let served = {
            let mut state = self.fleet.wire.state();
            let number = state.database.number(id.key());
            state.oracle.served(node, number)
        };
        let version = match served {
            _ if chance.happens(0.01) => UNSTORABLE,
            Some(served) if chance.happens(self.fleet.profile.unchanged) => served,
            _ => self.version(),
        };
        Verb::Save(id, version, self.expiry())
    }

    /// A session, mostly one that is there, and whether it is.
    fn choose(&self) -> (RawId, bool) {
        let (chance, ids) = (self.chance(), self.fleet.ids());
        let mut state = self.fleet.wire.state();
        let live: Vec<_> =
            ids.iter().copied().filter(|id| state.database.find(id.key()).is_some()).collect();
        let few = &live[live.len().saturating_sub(self.fleet.profile.sessions + 1)..];
        if few.is_empty() || chance.happens(self.fleet.profile.curious) {
            let recent = &ids[ids.len().saturating_sub(6)..];
            return (chance.pick(recent), !live.is_empty());
        }
        (chance.pick(few), true)
    }

    fn change_elsewhere(&mut self) {
        let chance = self.chance();
        let ((id, _), session) = (self.choose(), self.session());
        let ids = self.fleet.ids();
        let together: Vec<_> = ids.iter().map(|id| (id.key(), self.session())).collect();
        let mut state = self.fleet.wire.state();
        let state = &mut *state;
        let number = state.database.number(id.key());
        let (database, key) = (&mut state.database, id.key());
        database.is_bulk = chance.happens(state.manners.bulks);
        let what = match chance.below(20) {
            // An id that was in use is never so again.
            _ if !database.has_held_anything(number) && chance.happens(0.4) => {
                database.insert(key, &session, None);
                "insert"
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
                database.replace_together(&together);
                "replace together with all"
            }
            _ => {
                database.another_write(None);
                "something else"
            }
        };
        state.trace.note(|| format!("elsewhere: {what} {number}"));
    }

    /// Breaks what can break.
    fn trouble(&mut self) {
        let (rates, chance) = (self.fleet.profile.rates, self.chance());
        let now = self.fleet.clock.now();
        self.stalls.retain(|stall| stall.until > now);
        let node = chance.below(self.fleet.profile.stores);
        let longest = self.fleet.profile.promise.max_staleness * 4;
        if chance.happens(rates.stall) {
            let lane = chance.pick(&[Lane::Verbs, Lane::Stream, Lane::Fences]);
            let way = chance.pick(&[Way::Requests, Way::Replies]);
            // Shorter than the lease: what was cached before is served after it.
            let quiet = self.fleet.profile.kind == Kind::Quiet;
            let longest = if quiet { longest / 4 } else { longest };
            let until = now.after(chance.part_of(longest));
            self.note(|| format!("stall: {lane:?} {way:?} of store {node} until {until:?}"));
            self.stalls.push(Stall { node, lane, way, until });
        }
        if chance.happens(rates.outage) {
            let lane = chance.pick(&[Lane::Verbs, Lane::All]);
            let way = chance.pick(&[Way::Requests, Way::Replies, Way::Neither, Way::Neither]);
            let until = now.after(chance.part_of(longest * 2));
            self.note(|| format!("outage: {lane:?} {way:?} of store {node} until {until:?}"));
            self.stalls.push(Stall { node, lane, way, until });
        }
        if chance.happens(rates.overload) {
            let lane = chance.pick(&[Lane::Verbs, Lane::Stream, Lane::All, Lane::All]);
            let until = now.after(chance.part_of(longest));
            self.note(|| format!("overload: {lane:?} of store {node} until {until:?}"));
            self.stalls.push(Stall { node, lane, way: Way::TurnedAway, until });
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
            for node in 0..self.fleet.profile.stores {
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
            state.database.drop_all();
        }
    }

    /// Serves some of the calls that wait.
    fn serve(&mut self) {
        let chance = self.chance();
        let mut late = Vec::new();
        let mut calls = self.fleet.wire.waiting();
        chance.shuffle(&mut calls);
        let rates = self.fleet.profile.rates;
        for call in calls {
            if !chance.happens(rates.serve) {
                continue;
            }
            let (wire, now) = (&self.fleet.wire, self.fleet.clock.now());
            let (stall, ready, due, applied, stream) = {
                let state = wire.state();
                let Some(waiting) = state.calls.get(&call) else { continue };
                let stream = matches!(waiting.operation, Operation::Open(_) | Operation::More(_));
                let applied = waiting.outcome.is_some();
                (self.stall(&state, call), waiting.ready, waiting.due, applied, stream)
            };
            if stall == Some(Way::Neither) {
                wire.fail(call, Fault::Passing);
                continue;
            }
            if stall == Some(Way::TurnedAway) && !applied {
                wire.turn_away(call);
                continue;
            }
            if !applied {
                if stall == Some(Way::Requests) || now < ready {
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
            if stall == Some(Way::Replies) || now < due {
                continue;
            }
            if chance.happens(rates.fail) {
                self.fail(call, stream);
            } else {
                wire.answer(call);
                let record = &wire.state().records[call];
                if stream && now.since(record.asked) > self.fleet.profile.promise.max_staleness / 5
                {
                    late.push(record.node);
                }
            }
        }
        for node in late {
            self.stall_again(node);
        }
    }

    /// A stream whose reply was late may stand still again, before it has told what has changed meanwhile.
    fn stall_again(&mut self, node: usize) {
        let chance = self.chance();
        if chance.happens(self.fleet.profile.rates.stall * 20.0) {
            let longest = self.fleet.profile.promise.max_staleness * 4;
            let until = self.fleet.clock.now().after(chance.part_of(longest));
            self.note(|| format!("stall again: the stream of store {node} until {until:?}"));
            self.stalls.push(Stall { node, lane: Lane::Stream, way: Way::Requests, until });
        }
    }

    /// A call fails, by itself or with all that was sent with it.
    fn fail(&self, call: usize, stream: bool) {
        let fault = self.fault(stream);
        if self.chance().happens(0.5) {
            self.fleet.wire.fail_whole(call, fault);
        } else {
            self.fleet.wire.fail(call, fault);
        }
    }

    fn fault(&self, stream: bool) -> Fault {
        let often = if stream { 0.3 } else { 0.1 };
        if self.chance().happens(often) { refused() } else { Fault::Passing }
    }

    /// How a call stands still.
    fn stall(&self, state: &State, call: usize) -> Option<Way> {
        let record = &state.records[call];
        let lane = match record.operation {
            Operation::Open(_) | Operation::More(_) => Lane::Stream,
            Operation::Fence => Lane::Fences,
            _ => Lane::Verbs,
        };
        let hits = |stall: &&Stall| {
            stall.node == record.node && (stall.lane == lane || stall.lane == Lane::All)
        };
        self.stalls.iter().find(hits).map(|stall| stall.way)
    }

    async fn wait(&self) {
        let (profile, chance) = (&self.fleet.profile, self.chance());
        if chance.happens(profile.rates.suspend) {
            let asleep = chance.part_of(profile.promise.max_staleness * 3);
            self.note(|| format!("asleep for {asleep:?}"));
            let wakes = self.fleet.clock.now().after(asleep);
            self.fleet.wire.state().oracle.asleep_at = Some(wakes);
            advance(asleep).await;
        } else if chance.happens(profile.rates.leap) {
            sleep(chance.part_of(profile.longest())).await;
        } else if chance.happens(0.7) {
            sleep(chance.part_of(profile.tick)).await;
        }
    }

    fn session(&mut self) -> Session {
        Session { data: crate::simulation::data(self.version()), expires: self.expiry() }
    }

    fn version(&mut self) -> u64 {
        self.versions += 1;
        self.versions
    }

    /// An hour from now, or soon. Each is another one.
    fn expiry(&mut self) -> WallTime {
        let soon = self.fleet.profile.promise.max_staleness * 3;
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

pub(crate) fn refused() -> Fault {
    Fault::Refused(Refusal::default())
}
