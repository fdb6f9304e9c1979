//! Shared sessions: several requests use one of them at once, most of them in a request scope.
//!
//! Each change of a key has a number of its own, so a load shows which changes are stored.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use serde_json::{Value, json};
use tower_sessions::session::Id;

use crate::history::{Nanos, name};

/// How many keys the requests change.
pub(crate) const KEYS: usize = 3;
/// The key that counts, with an `on_conflict` that adds up.
pub(crate) const VIEWS: &str = "views";

/// What a request does to one key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum KeyChange {
    None,
    Remove,
    /// Sets it to this number, which no other request draws.
    Set(u64),
}

impl KeyChange {
    /// What the key has afterwards, if this changes it.
    pub(crate) fn result(self) -> Option<Contained> {
        match self {
            Self::None => None,
            Self::Remove => Some(Contained::Nothing),
            Self::Set(number) => Some(Contained::Number(number)),
        }
    }
}

/// What a session has under one key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Contained {
    Nothing,
    Number(u64),
}

/// The data and the expiry of a shared session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Contents {
    pub(crate) keys: [Contained; KEYS],
    pub(crate) views: u64,
    /// In seconds after the first expiry of the run.
    pub(crate) expires: u64,
}

/// The result of a load.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Seen {
    Contents(Contents),
    Absent,
    Error,
    /// Data that no request has written.
    Foreign,
}

/// A create, a save, or the create of a `cycle_id`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Save {
    pub(crate) keys: [KeyChange; KEYS],
    /// What it adds to the counter.
    pub(crate) views: u64,
    pub(crate) expires: u64,
    pub(crate) ok: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum What {
    Save(Save),
    /// A delete, also the one of a `cycle_id`.
    Delete {
        ok: bool,
    },
    Load(Seen),
}

/// One operation on one id of the session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Event {
    /// The index of the id.
    pub(crate) id: usize,
    pub(crate) instance: u8,
    pub(crate) start: Nanos,
    pub(crate) end: Nanos,
    pub(crate) what: What,
}

/// Where an id comes from: a `cycle_id` whose delete and whose create were acknowledged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Origin {
    /// The index of the id before it.
    pub(crate) parent: usize,
    /// When the delete of that id began.
    pub(crate) delete_began: Nanos,
    /// When the create of this id began.
    pub(crate) create_began: Nanos,
}

/// All that happened to a shared session.
#[derive(Clone, Debug, Default)]
pub(crate) struct History {
    /// For each id. The first id comes from no other one.
    pub(crate) origins: Vec<Option<Origin>>,
    pub(crate) events: Vec<Event>,
}

/// A shared session, under all the ids that it had.
pub(crate) struct SharedSession {
    pub(crate) number: u64,
    /// Whether all its saves are in a request scope.
    pub(crate) is_scoped_only: bool,
    /// From this time on it may be deleted.
    pub(crate) ends: Nanos,
    /// Whether it is deleted then.
    pub(crate) mortal: bool,
    /// When it was deleted, or when a load found none of its ids. 0 before that.
    ended: AtomicU64,
    state: Mutex<State>,
}

#[derive(Default)]
pub(crate) struct State {
    /// Each id, and whether a load found no session.
    pub(crate) ids: Vec<(Id, bool)>,
    pub(crate) history: History,
}

impl SharedSession {
    pub(crate) fn new(
        number: u64,
        id: Id,
        is_scoped_only: bool,
        ends: Nanos,
        mortal: bool,
        created: Event,
    ) -> Self {
        let history = History { origins: vec![None], events: vec![created] };
        let state = State { ids: vec![(id, false)], history };
        let ended = AtomicU64::new(0);
        Self { number, is_scoped_only, ends, mortal, ended, state: Mutex::new(state) }
    }

    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Records an operation.
    pub(crate) fn note(&self, event: Event) {
        let mut state = self.state();
        state.history.events.push(event);
        if event.what == What::Load(Seen::Absent) {
            state.ids[event.id].1 = true;
            if state.ids.iter().all(|(_, is_gone)| *is_gone) {
                self.end(event.end);
            }
        }
    }

    /// Records that a `cycle_id` has returned a new id.
    pub(crate) fn renew(&self, id: Id, origin: Origin, created: Event) {
        let mut state = self.state();
        let index = state.ids.len();
        state.ids.push((id, false));
        state.history.origins.push(Some(origin));
        state.history.events.push(Event { id: index, ..created });
    }

    /// Records that the session has ended. The first time counts.
    pub(crate) fn end(&self, at: Nanos) {
        let _ = self.ended.compare_exchange(0, at, Ordering::SeqCst, Ordering::SeqCst);
    }

    pub(crate) fn ended(&self) -> Option<Nanos> {
        Some(self.ended.load(Ordering::SeqCst)).filter(|at| *at > 0)
    }
}

impl Contents {
    pub(crate) fn data(&self, number: u64) -> HashMap<String, Value> {
        let numbers = self.keys.iter().zip(0..).filter_map(|(contained, key)| match contained {
            Contained::Nothing => None,
            Contained::Number(number) => Some((key_name(key), json!(number))),
        });
        let others = [("session".to_owned(), json!(number)), (VIEWS.to_owned(), json!(self.views))];
        numbers.chain(others).collect()
    }

    /// Reads the data of a session. `None` if it is not what [`data`](Self::data) makes.
    pub(crate) fn read(number: u64, data: &HashMap<String, Value>, expires: u64) -> Option<Self> {
        let mut keys = [Contained::Nothing; KEYS];
        for (contained, key) in keys.iter_mut().zip(0..) {
            if let Some(value) = data.get(&key_name(key)) {
                *contained = Contained::Number(value.as_u64()?);
            }
        }
        let views = data.get(VIEWS)?.as_u64()?;
        let contents = Self { keys, views, expires };
        (*data == contents.data(number)).then_some(contents)
    }

    /// Makes the changes of a save.
    pub(crate) fn change(&mut self, save: &Save) {
        for (contained, change) in self.keys.iter_mut().zip(save.keys) {
            *contained = change.result().unwrap_or(*contained);
        }
        self.views += save.views;
        self.expires = save.expires;
    }
}

fn key_name(key: usize) -> String {
    format!("key{key}")
}

/// The app's `on_conflict`: two requests that count add up.
pub(crate) fn add_up(
    key: &str,
    base: Option<&Value>,
    theirs: Option<&Value>,
    ours: Option<&Value>,
) -> Option<Value> {
    let count = |value: Option<&Value>| value.and_then(Value::as_i64).unwrap_or(0);
    if key == VIEWS {
        Some(json!(count(theirs) + count(ours) - count(base)))
    } else {
        ours.cloned()
    }
}

impl Event {
    /// One line of a history.
    pub(crate) fn line(&self) -> String {
        #[allow(clippy::cast_precision_loss, reason = "shown in milliseconds")]
        let ms = |at: Nanos| at as f64 / 1e6;
        let verdict = |ok| if ok { "ok" } else { "undecided" };
        let what = match self.what {
            What::Save(Save { keys, views, expires, ok }) => {
                format!("save   {keys:?}, views +{views}, expires {expires}: {}", verdict(ok))
            }
            What::Delete { ok } => format!("delete {}", verdict(ok)),
            What::Load(Seen::Contents(Contents { keys, views, expires })) => {
                format!("load   -> {keys:?}, views {views}, expires {expires}")
            }
            What::Load(seen) => format!("load   -> {seen:?}"),
        };
        let start = ms(self.start);
        let end = ms(self.end);
        format!("{start:>12.3} .. {end:>12.3}  {}  id {}: {what}", name(self.instance), self.id)
    }
}
