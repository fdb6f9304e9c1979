//! `Database`: the database of a model, with one session and the changes that a stream reports.

use std::sync::PoisonError;
use std::time::Duration;

use crate::session::id::SessionKey;
use crate::session::revision::Rev;
use crate::session::{Data, Session};
use crate::sync::{Mutex, Ordering, lock};
use crate::time::{Clock, Moment, WallTime};

/// Data that an app saves has this number or a higher one.
const CHOSEN: u64 = 100;

/// The states of the session are numbered in the order in which the database goes through them. A removed session
/// never comes back (invariant I4), so `GONE` is the last state.
pub(crate) type Rank = u64;
pub(crate) const GONE: Rank = Rank::MAX;

/// When the session expires. The wall clock of a model never moves.
pub(crate) const EXPIRES: WallTime = WallTime::from_millis(3_600_000);

pub(crate) fn key() -> SessionKey {
    SessionKey::of(1)
}

pub(crate) fn session(data: u64) -> Session {
    Session::new(data_of(data), EXPIRES)
}

/// The keys that requests add. Each is one bit of the number, from `FIRST_KEY_BIT` on.
pub(crate) const KEYS: [&str; 3] = ["a", "b", "c"];
const FIRST_KEY_BIT: u64 = 1 << 32;

pub(crate) fn bit_of(key: &str) -> u64 {
    let place = KEYS.iter().position(|it| *it == key).unwrap_or_default();
    FIRST_KEY_BIT << place
}

/// The data of a session is one number: a rank, and the keys that requests have added.
pub(crate) fn data_of(number: u64) -> Data {
    let mut data = Data::from([("rank".to_owned(), (number % FIRST_KEY_BIT).into())]);
    let has = |key: &&&str| number & bit_of(key) != 0;
    data.extend(KEYS.iter().filter(has).map(|key| ((*key).to_owned(), true.into())));
    data
}

pub(crate) fn number_in(data: &Data) -> u64 {
    let rank = data["rank"].as_u64().unwrap_or_default();
    KEYS.iter().filter(|key| data.contains_key(**key)).fold(rank, |sum, key| sum + bit_of(key))
}

/// Each call that takes the lock of `state` is one step of the model.
pub(crate) struct Database {
    state: Mutex<State>,
    /// The number in the data of each state: the rank, unless an app has chosen it. A std lock, because reading it must
    /// not be a step.
    data: std::sync::Mutex<Vec<(Rank, u64)>>,
    chosen: std::sync::atomic::AtomicU64,
}

struct State {
    rank: Rank,
    data: u64,
    rev: Option<Rev>,
    /// All changes.
    written: Vec<Written>,
    /// The number of changes that the stream has reported.
    reported: usize,
}

/// The outcome of a conditional replace.
pub(crate) enum Conditional {
    Stored,
    Gone,
    Changed,
}

#[derive(Clone, Copy)]
pub(crate) struct Written {
    pub(crate) rank: Rank,
    pub(crate) rev: Option<Rev>,
    pub(crate) ours: bool,
    at: Moment,
}

impl Database {
    pub(crate) fn new() -> Self {
        let state = State { rank: 1, data: 1, rev: None, written: Vec::new(), reported: 0 };
        let data = std::sync::Mutex::new(vec![(1, 1)]);
        Self { state: Mutex::new(state), data, chosen: CHOSEN.into() }
    }

    pub(crate) fn find(&self) -> Option<Session> {
        let state = lock(&self.state);
        (state.rank != GONE).then(|| Session { rev: state.rev, ..session(state.data) })
    }

    pub(crate) fn replace(&self, rev: Rev, ours: bool, clock: &Clock) -> Option<Rank> {
        self.replace_with(None, rev, ours, clock)
    }

    /// Replaces the data. `None` if the session does not exist.
    pub(crate) fn replace_with(
        &self,
        data: Option<u64>,
        rev: Rev,
        ours: bool,
        clock: &Clock,
    ) -> Option<Rank> {
        let mut state = lock(&self.state);
        if state.rank == GONE {
            return None;
        }
        let data = data.unwrap_or(state.rank + 1);
        Some(self.store(&mut state, data, rev, ours, clock))
    }

    fn store(&self, state: &mut State, data: u64, rev: Rev, ours: bool, clock: &Clock) -> Rank {
        let rank = state.rank + 1;
        state.rank = rank;
        state.data = data;
        state.rev = Some(rev);
        self.data().push((rank, data));
        state.written.push(Written { rank, rev: Some(rev), ours, at: clock.now() });
        rank
    }

    /// Replaces the data if the session has the expected `rev`.
    pub(crate) fn replace_if(
        &self,
        expected: Option<Rev>,
        data: u64,
        rev: Rev,
        clock: &Clock,
    ) -> Conditional {
        let mut state = lock(&self.state);
        if state.rank == GONE {
            return Conditional::Gone;
        }
        if state.rev != expected {
            return Conditional::Changed;
        }
        self.store(&mut state, data, rev, true, clock);
        Conditional::Stored
    }

    /// A request at another instance adds a key.
    pub(crate) fn add_elsewhere(&self, key: &str, rev: Rev, clock: &Clock) -> Option<Rank> {
        let mut state = lock(&self.state);
        if state.rank == GONE {
            return None;
        }
        let data = state.data | bit_of(key);
        Some(self.store(&mut state, data, rev, false, clock))
    }

    /// Whether the current state has a key. `None` if the session does not exist.
    pub(crate) fn has_key(&self, key: &str) -> Option<bool> {
        let state = lock(&self.state);
        (state.rank != GONE).then(|| state.data & bit_of(key) != 0)
    }

    pub(crate) fn remove(&self, clock: &Clock) {
        let mut state = lock(&self.state);
        if state.rank != GONE {
            state.rank = GONE;
            state.written.push(Written { rank: GONE, rev: None, ours: false, at: clock.now() });
        }
    }

    /// A number for new data.
    pub(crate) fn new_data(&self) -> u64 {
        self.chosen.fetch_add(1, Ordering::Relaxed)
    }

    /// The latest state that had this data.
    pub(crate) fn rank_of(&self, data: u64) -> Rank {
        self.rank_if_written(data).unwrap_or_default()
    }

    pub(crate) fn rank_if_written(&self, data: u64) -> Option<Rank> {
        self.data().iter().filter(|(_, it)| *it == data).map(|(rank, _)| *rank).max()
    }

    pub(crate) fn times_written(&self, data: u64) -> usize {
        self.data().iter().filter(|(_, it)| *it == data).count()
    }

    pub(crate) fn is_gone(&self) -> bool {
        self.rank() == GONE
    }

    pub(crate) fn rank_found(&self, found: Option<&Session>) -> Rank {
        found.map_or(GONE, |session| self.rank_of(number_in(&session.data)))
    }

    pub(crate) fn data(&self) -> std::sync::MutexGuard<'_, Vec<(Rank, u64)>> {
        self.data.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Loses all reports so far. Returns the state of the last lost report.
    pub(crate) fn lose_reports(&self) -> Rank {
        let mut state = lock(&self.state);
        state.reported = state.written.len();
        state.written.last().map_or(0, |written| written.rank)
    }

    /// The current state.
    pub(crate) fn rank(&self) -> Rank {
        lock(&self.state).rank
    }

    pub(crate) fn next_report(&self) -> Option<Written> {
        let mut state = lock(&self.state);
        let next = state.written.get(state.reported).copied()?;
        state.reported += 1;
        Some(next)
    }

    /// The state that the session had more than `ago` before `now`.
    pub(crate) fn rank_at(&self, ago: Duration, now: Moment) -> Rank {
        let state = lock(&self.state);
        let old = state.written.iter().filter(|written| now.since(written.at) > ago);
        old.map(|written| written.rank).max().unwrap_or_default()
    }
}
