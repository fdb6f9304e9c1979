//! Judges the history of one session.
//!
//! The writers of a session take turns. Once the outcome of a write is unknown, only a delete may
//! follow. So the states of a session in the database only go forward, from step to step, and in
//! the end to absence. The checker does not know the exact time of each change. A state has
//! *ceased* at the latest when something newer was acknowledged, or when a load that returned
//! something newer ended.
//!
//! The checker makes no allowance. A load returns a state that was in the database at some moment
//! at most `max_staleness` before the load began: the cache counts an entry's age from the
//! beginning of its read, and a load joins no older read. If the state had ceased before that
//! moment, the rule was broken. One clock measures both.
//!
//! # Shared sessions
//!
//! Several requests change a shared session at once, so the module [`shared`] judges it by key. Each change of a
//! key sets a number that no other change sets, or removes the key. The rules:
//!
//! - **No change of a key is lost.** Once a save that changes a key is acknowledged, or once a load has shown its
//!   change, the key has this change or the one of a save that overlapped it or followed it. The key never has
//!   what an earlier save left. So a removed key does not come back. A save without a scope changes every key.
//! - **An unacknowledged change is stored once or not at all.** If it was seen, and a later save has changed the
//!   key, it does not come back.
//! - **A key has only what a save has put there**, and only after that save has begun.
//! - **The counter is exact** if all saves of the session are in a scope: it is the sum of the acknowledged
//!   increments, and of some or none of the unacknowledged ones. A load may miss what was stored less than
//!   `max_staleness` before it began, unless it was acknowledged or seen on the same instance.
//! - **A deleted session does not come back.** After an acknowledged delete, its id has no session. A `cycle_id`
//!   whose delete begins after another acknowledged delete gets an id without a session.
//! - **A `cycle_id` moves the session, once.** What was stored under the old id before the delete began is under the
//!   new id, with the changes of the request. Of all overlapping `cycle_id` of one session, one at most gets an id
//!   with a session; exactly one does if all of them were acknowledged and nothing else deleted the session.
//! - **The later expiry stays** if all saves are in a scope.
//!
//! A save that overlaps a delete of its id may be acknowledged without effect, since the session may be gone by then.
//! So its change counts as unacknowledged. A load that shows it under this id proves it for this id alone, because the
//! test server may hand a `cycle_id` an older state than it removes.

pub(crate) mod shared;

use std::collections::{BTreeMap, HashMap};

use crate::history::{Event, Nanos, Seen, State, What, name};

/// A rule that a history breaks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Violation {
    pub(crate) rule: &'static str,
    /// The index of the event that shows it. `None` if the end of the history shows it.
    pub(crate) event: Option<usize>,
    pub(crate) text: String,
}

/// The result of judging a history.
#[derive(Clone, Debug)]
pub(crate) struct Verdict {
    pub(crate) violations: Vec<Violation>,
    /// The longest time from the end of a state to the start of a load that still returned it.
    pub(crate) staleness: Nanos,
    pub(crate) expected: Expected,
}

/// What may be in the database in the end.
#[derive(Clone, Debug)]
pub(crate) struct Expected {
    pub(crate) may_live: bool,
    pub(crate) may_be_gone: bool,
    /// The last acknowledged state, or a later one that was seen, and every state that may have
    /// followed.
    pub(crate) states: Vec<State>,
}

/// The event that proves that a state has ended.
#[derive(Clone, Copy, Debug)]
enum Proof {
    Write,
    Delete,
    Load,
    Absence,
}

const ABSENT: u32 = u32::MAX;

/// For each rank: when something of a higher rank was first known to exist.
#[derive(Default)]
struct Ceased(BTreeMap<u32, (Nanos, Proof)>);

impl Ceased {
    fn known(&mut self, rank: u32, end: Nanos, proof: Proof) {
        let first = self.0.entry(rank).or_insert((end, proof));
        if end < first.0 {
            *first = (end, proof);
        }
    }

    /// Sets each rank to the earliest time of its own rank and all higher ranks.
    fn close(&mut self) {
        let mut earliest = None;
        for (_, own) in self.0.iter_mut().rev() {
            let best = earliest.filter(|(end, _)| *end <= own.0).unwrap_or(*own);
            (*own, earliest) = (best, Some(best));
        }
    }

    fn after(&self, rank: u32) -> Option<(Nanos, Proof)> {
        self.0.range(rank.checked_add(1)?..).next().map(|(_, known)| *known)
    }
}

/// The writes and deletes of a history.
struct Writes {
    steps: HashMap<u32, (State, Nanos)>,
    /// When the first delete began, and when the first delete was acknowledged.
    delete_began: Option<Nanos>,
    deleted: Option<Nanos>,
}

impl Writes {
    fn of(events: &[Event]) -> Self {
        let deletes = |only_ok: bool| {
            let ok = move |event: &&Event| match event.what {
                What::Delete { ok } => ok || !only_ok,
                _ => false,
            };
            events.iter().filter(ok)
        };
        let steps = events.iter().filter_map(|event| match event.what {
            What::Write { state, .. } => Some((state.step, (state, event.start))),
            _ => None,
        });
        Self {
            steps: steps.collect(),
            delete_began: deletes(false).map(|event| event.start).min(),
            deleted: deletes(true).map(|event| event.end).min(),
        }
    }

    /// Whether a write that began at this time was too late to have any effect.
    fn is_ghost(&self, start: Nanos) -> bool {
        self.deleted.is_some_and(|deleted| start > deleted)
    }

    /// Why nothing that this load returned can have existed, if so.
    fn objection(&self, seen: Seen, end: Nanos) -> Option<(&'static str, String)> {
        match seen {
            Seen::Error => None,
            Seen::Foreign => Some(("I5", "data was served that no task wrote".to_owned())),
            Seen::Absent => match self.delete_began {
                Some(began) if began <= end => None,
                _ => Some(("I7", "a live session was answered with None".to_owned())),
            },
            Seen::State(state) => match self.steps.get(&state.step) {
                Some((written, start)) if *written == state && self.is_ghost(*start) => Some((
                    "I4",
                    format!("version {} was saved after the delete and is served", state.version),
                )),
                Some((written, start)) if *written == state && *start <= end => None,
                _ => Some(("I5", format!("version {} was not written by then", state.version))),
            },
        }
    }
}

/// Judges the events of one session, in any order.
pub(crate) fn check(events: &[Event], max_staleness: Nanos) -> Verdict {
    let writes = Writes::of(events);
    let mut violations = Vec::new();
    let mut anywhere = Ceased::default();
    let mut here: HashMap<u8, Ceased> = HashMap::new();
    for (index, event) in events.iter().enumerate() {
        let (version, step, proof) = match event.what {
            What::Write { state, least, ok: true } if !writes.is_ghost(event.start) => {
                (state.version, least, Proof::Write)
            }
            What::Delete { ok: true } => (ABSENT, ABSENT, Proof::Delete),
            What::Write { .. } | What::Delete { .. } => continue,
            What::Load(seen) => {
                if let Some((rule, text)) = writes.objection(seen, event.end) {
                    violations.push(Violation { rule, event: Some(index), text });
                    continue;
                }
                match seen {
                    Seen::State(state) => (state.version, state.step, Proof::Load),
                    Seen::Absent => (ABSENT, ABSENT, Proof::Absence),
                    Seen::Error | Seen::Foreign => continue,
                }
            }
        };
        anywhere.known(version, event.end, proof);
        here.entry(event.instance).or_default().known(step, event.end, proof);
    }
    anywhere.close();
    here.values_mut().for_each(Ceased::close);

    let mut staleness = 0;
    for (index, event) in events.iter().enumerate() {
        let What::Load(Seen::State(state)) = event.what else { continue };
        if writes.objection(Seen::State(state), event.end).is_some() {
            continue;
        }
        let own = here.get(&event.instance).and_then(|ceased| ceased.after(state.step));
        let ceased = anywhere.after(state.version);
        let late = ceased.map_or(0, |(at, _)| event.start.saturating_sub(at));
        staleness = staleness.max(late);
        let broken = match (own, ceased) {
            (Some((at, proof)), _) if at < event.start => Some(here_rule(proof, state, event)),
            (_, Some((_, proof))) if late > max_staleness => {
                Some(elsewhere_rule(proof, state, late))
            }
            _ => None,
        };
        if let Some((rule, text)) = broken {
            violations.push(Violation { rule, event: Some(index), text });
        }
    }
    let expected = expected(events, &writes);
    Verdict { violations, staleness, expected }
}

fn here_rule(proof: Proof, state: State, event: &Event) -> (&'static str, String) {
    let (rule, what) = match proof {
        Proof::Write => ("I2", "a newer one had been saved there"),
        Proof::Delete => ("I1", "the session had been deleted there"),
        Proof::Load => ("I3", "a newer one had been seen there"),
        Proof::Absence => ("I4", "the session had been seen to be gone there"),
    };
    let State { step, version, .. } = state;
    (rule, format!("{} served version {version}, step {step}, after {what}", name(event.instance)))
}

fn elsewhere_rule(proof: Proof, state: State, late: Nanos) -> (&'static str, String) {
    let (rule, what) = match proof {
        Proof::Write => ("staleness", "a newer one had been saved"),
        Proof::Load => ("staleness", "a newer one had been seen elsewhere"),
        Proof::Delete => ("I1", "the session had been deleted elsewhere"),
        Proof::Absence => ("I1", "the session had been seen to be gone elsewhere"),
    };
    let ms = late / 1_000_000;
    (rule, format!("version {} was served {ms} ms after {what}", state.version))
}

fn expected(events: &[Event], writes: &Writes) -> Expected {
    let mut least = 0;
    let mut gone = writes.deleted.is_some();
    for event in events {
        match event.what {
            What::Write { least: written, ok: true, .. } if !writes.is_ghost(event.start) => {
                least = least.max(written);
            }
            What::Load(Seen::State(state)) => least = least.max(state.step),
            What::Load(Seen::Absent) if writes.delete_began.is_some() => gone = true,
            _ => {}
        }
    }
    let states = writes
        .steps
        .values()
        .filter(|(state, start)| state.step >= least && !writes.is_ghost(*start));
    Expected {
        may_live: !gone,
        may_be_gone: writes.delete_began.is_some(),
        states: states.map(|(state, _)| *state).collect(),
    }
}

impl Expected {
    /// Whether the data in the database is known exactly.
    pub(crate) fn is_decided(&self) -> bool {
        let mut versions = self.states.iter().map(|state| state.version);
        let first = versions.next();
        let same = first.is_some_and(|first| versions.all(|version| version == first));
        !self.may_live || (!self.may_be_gone && same)
    }

    /// Judges what is there in the end: in the database, or (`cached`) in an instance's cache. The
    /// expiry in a cache may be an older one, since a touch does not invalidate other instances'
    /// entries.
    pub(crate) fn check(&self, found: Seen, cached: bool) -> Result<(), Violation> {
        let broken = |rule, text: String| Err(Violation { rule, event: None, text });
        match found {
            Seen::Error => Ok(()),
            Seen::Foreign => broken("I5", "in the end there is data that no task wrote".to_owned()),
            Seen::Absent if self.may_be_gone => Ok(()),
            Seen::Absent => broken("I5", "an acknowledged session is lost in the end".to_owned()),
            Seen::State(_) if !self.may_live => {
                broken("I4", "in the end a deleted session is there".to_owned())
            }
            Seen::State(state) => {
                let fits = |wanted: &State| {
                    *wanted == state || (cached && wanted.version == state.version)
                };
                if self.states.iter().any(fits) {
                    return Ok(());
                }
                let State { step, version, .. } = state;
                broken("I5", format!("in the end there is version {version}, step {step}"))
            }
        }
    }
}
