//! What the follower of the database's changes counts, and how its stream stands.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::telemetry::metrics::Series;
use crate::telemetry::metrics::catalogue::{
    self, STREAM_EVENTS, STREAM_GAPS, STREAM_LAG, STREAM_OPEN, STREAM_RESUMES,
};
use crate::telemetry::metrics::handles::{Counter, Gauge};
use crate::telemetry::metrics::labels::{Gap, Origin};
use crate::time::{Clock, Moment};

#[derive(Debug)]
pub(crate) struct StreamMetrics {
    pub(crate) resumes: Counter,
    pub(crate) retries: Counter,
    events: [Counter; Origin::COUNT],
    gaps: [Counter; Gap::COUNT],
    open: Gauge,
    lag: Gauge,
    clock: Clock,
    standing: StreamState,
}

/// How a stream stands. Clones share it.
#[derive(Clone, Debug)]
pub(crate) struct StreamState(Arc<Mutex<StateInner>>);

#[derive(Clone, Copy, Debug)]
struct StateInner {
    phase: Phase,
    since: Moment,
    begun: Moment,
}

/// Where a stream is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    Opening,
    Open,
    Lost,
    /// The server has none, or does not let the user have one.
    Unavailable,
}

impl StreamState {
    fn new(at: Moment) -> Self {
        Self(Arc::new(Mutex::new(StateInner { phase: Phase::Opening, since: at, begun: at })))
    }

    /// The phase, and since when.
    pub(crate) fn phase(&self) -> (Phase, Moment) {
        let state = self.state();
        (state.phase, state.since)
    }

    /// From when on there was somebody to vouch for the cache.
    pub(crate) fn started_at(&self) -> Moment {
        self.state().begun
    }

    /// The phase before.
    fn set_phase(&self, phase: Phase, now: Moment) -> Phase {
        let mut state = self.state();
        let before = state.phase;
        if before != phase {
            (state.phase, state.since) = (phase, now);
        }
        before
    }

    fn state(&self) -> MutexGuard<'_, StateInner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl StreamMetrics {
    /// `retries` counts what is tried again, under the name of the store whose database it is.
    pub(crate) fn new(series: &Series, retries: Counter, clock: Clock) -> Self {
        catalogue::describe();
        let (open, lag) = (series.gauge(&STREAM_OPEN), series.gauge(&STREAM_LAG));
        open.increment(0);
        lag.set(0);
        Self {
            resumes: series.counter(&STREAM_RESUMES),
            retries,
            events: series.counters(&STREAM_EVENTS),
            gaps: series.counters(&STREAM_GAPS),
            open,
            lag,
            standing: StreamState::new(clock.now()),
            clock,
        }
    }

    pub(crate) fn stream_state(&self) -> StreamState {
        self.standing.clone()
    }

    pub(crate) fn event(&self, is_own: bool) {
        let origin = if is_own { Origin::Own } else { Origin::Other };
        self.events[origin as usize].increment(1);
    }

    pub(crate) fn gap(&self, gap: Gap) {
        self.gaps[gap as usize].increment(1);
    }

    pub(crate) fn opened(&self) {
        if self.standing.set_phase(Phase::Open, self.clock.now()) != Phase::Open {
            self.open.increment(1);
        }
    }

    pub(crate) fn closed(&self) {
        self.leave(Phase::Lost);
    }

    pub(crate) fn unavailable(&self) {
        self.leave(Phase::Unavailable);
    }

    fn leave(&self, phase: Phase) {
        if self.standing.set_phase(phase, self.clock.now()) == Phase::Open {
            self.open.decrement(1);
        }
    }

    /// Before anything is vouched for, the lag counts from the beginning.
    pub(crate) fn lag(&self, now: Moment, synced_at: Moment) {
        self.lag.set(now.since(synced_at.max(self.standing.started_at())).as_secs_f64());
    }
}

impl Drop for StreamMetrics {
    fn drop(&mut self) {
        self.closed();
        self.lag.set(0);
    }
}
