//! The database of a model.

use std::sync::PoisonError;
use std::time::Duration;

use crate::model_check::app::number_in;
use crate::session::id::SessionKey;
use crate::session::revision::Rev;
use crate::session::{Data, Session};
use crate::sync::{Mutex, Ordering, lock};
use crate::time::WallTime;
use crate::time::{Clock, Moment};

/// The first number of data that an app has chosen.
const CHOSEN: u64 = 100;

/// States of the session in the order in which the database went through them. What is gone stays
/// gone (invariant I4), so that is the last one.
pub(crate) type Rank = u64;
pub(crate) const GONE: Rank = Rank::MAX;

/// When the session ends; the clock of the wall stands still.
pub(crate) const EXPIRES: WallTime = WallTime::from_millis(3_600_000);

pub(crate) fn key() -> SessionKey {
    SessionKey::of(1)
}

pub(crate) fn session(data: u64) -> Session {
    let data = Data::from([("rank".to_owned(), data.into())]);
    Session { data, expires: EXPIRES }
}

/// The database: one session, and the changes that it reports. Each of its calls is one step.
pub(crate) struct Database {
    state: Mutex<State>,
    /// Of each rank, the number in its data: the rank itself, unless an app has chosen it. Not seen
    /// by loom, as the story.
    data: std::sync::Mutex<Vec<(Rank, u64)>>,
    chosen: std::sync::atomic::AtomicU64,
}

struct State {
    rank: Rank,
    data: u64,
    written: Vec<Written>,
    reported: usize,
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
        let state = State { rank: 1, data: 1, written: Vec::new(), reported: 0 };
        let data = std::sync::Mutex::new(vec![(1, 1)]);
        Self { state: Mutex::new(state), data, chosen: CHOSEN.into() }
    }

    pub(crate) fn find(&self) -> Option<Session> {
        let state = lock(&self.state);
        (state.rank != GONE).then(|| session(state.data))
    }

    pub(crate) fn replace(&self, rev: Rev, ours: bool, clock: &Clock) -> Option<Rank> {
        self.replace_with(None, rev, ours, clock)
    }

    /// `None` if there is no session to replace.
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
        let rank = state.rank + 1;
        (state.rank, state.data) = (rank, data.unwrap_or(rank));
        self.data().push((rank, state.data));
        state.written.push(Written { rank, rev: Some(rev), ours, at: clock.now() });
        Some(rank)
    }

    pub(crate) fn remove(&self, clock: &Clock) {
        let mut state = lock(&self.state);
        if state.rank != GONE {
            state.rank = GONE;
            state.written.push(Written { rank: GONE, rev: None, ours: false, at: clock.now() });
        }
    }

    /// A number for data that are not there yet.
    pub(crate) fn fresh(&self) -> u64 {
        self.chosen.fetch_add(1, Ordering::Relaxed)
    }

    /// The latest rank that had these data.
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

    /// Loses all reports so far; answers with the state that the last one told of.
    pub(crate) fn lose_reports(&self) -> Rank {
        let mut state = lock(&self.state);
        state.reported = state.written.len();
        state.written.last().map_or(0, |written| written.rank)
    }

    /// What stands there now.
    pub(crate) fn rank(&self) -> Rank {
        lock(&self.state).rank
    }

    pub(crate) fn next_report(&self) -> Option<Written> {
        let mut state = lock(&self.state);
        let next = state.written.get(state.reported).copied()?;
        state.reported += 1;
        Some(next)
    }

    /// What stood there so long before `now`.
    pub(crate) fn stood(&self, ago: Duration, now: Moment) -> Rank {
        let state = lock(&self.state);
        let old = state.written.iter().filter(|written| now.since(written.at) > ago);
        old.map(|written| written.rank).max().unwrap_or_default()
    }
}
