//! `StreamMetrics`: the metrics of the invalidation stream. `StreamState`: its state, for `health()`.

use std::sync::Arc;

use crate::sync::{Mutex, MutexGuard, lock};
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
    state: StreamState,
}

/// The state of a change stream. Clones share it.
///
/// A lock, because the phase and its beginning change together.
#[derive(Clone, Debug)]
pub(crate) struct StreamState(Arc<Mutex<StateInner>>);

#[derive(Clone, Copy, Debug)]
struct StateInner {
    phase: Phase,
    since: Moment,
    started_at: Moment,
}

/// The phase of a change stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    Opening,
    Open,
    Lost,
    /// The server has no change streams, or the user may not open one.
    Unavailable,
}

impl StreamState {
    fn new(at: Moment) -> Self {
        Self(Arc::new(Mutex::new(StateInner { phase: Phase::Opening, since: at, started_at: at })))
    }

    /// The phase, and when it began.
    pub(crate) fn phase(&self) -> (Phase, Moment) {
        let state = self.state();
        (state.phase, state.since)
    }

    /// When the listener was started.
    pub(crate) fn started_at(&self) -> Moment {
        self.state().started_at
    }

    /// Begins a phase, and returns the one before.
    fn set_phase(&self, phase: Phase, now: Moment) -> Phase {
        let mut state = self.state();
        let before = state.phase;
        if before != phase {
            state.phase = phase;
            state.since = now;
        }
        before
    }

    fn state(&self) -> MutexGuard<'_, StateInner> {
        lock(&self.0)
    }
}

impl StreamMetrics {
    /// `retries` is the counter of the `MongoStore`, under that store's name.
    pub(crate) fn new(series: &Series, retries: Counter, clock: Clock) -> Self {
        catalogue::describe();
        let open = series.gauge(&STREAM_OPEN);
        let lag = series.gauge(&STREAM_LAG);
        open.increment(0);
        lag.set(0);
        Self {
            resumes: series.counter(&STREAM_RESUMES),
            retries,
            events: series.counters(&STREAM_EVENTS),
            gaps: series.counters(&STREAM_GAPS),
            open,
            lag,
            state: StreamState::new(clock.now()),
            clock,
        }
    }

    pub(crate) fn stream_state(&self) -> StreamState {
        self.state.clone()
    }

    pub(crate) fn count_event(&self, is_own: bool) {
        let origin = if is_own { Origin::Own } else { Origin::Other };
        self.events[origin as usize].increment(1);
    }

    pub(crate) fn count_gap(&self, gap: Gap) {
        self.gaps[gap as usize].increment(1);
    }

    pub(crate) fn set_open(&self) {
        if self.state.set_phase(Phase::Open, self.clock.now()) != Phase::Open {
            self.open.increment(1);
        }
    }

    pub(crate) fn set_lost(&self) {
        self.leave(Phase::Lost);
    }

    pub(crate) fn set_unavailable(&self) {
        self.leave(Phase::Unavailable);
    }

    fn leave(&self, phase: Phase) {
        if self.state.set_phase(phase, self.clock.now()) == Phase::Open {
            self.open.decrement(1);
        }
    }

    /// Shows the lag. Before the first checkpoint is confirmed, it counts from the start of the listener.
    pub(crate) fn set_lag(&self, now: Moment, synced_through: Moment) {
        let since = synced_through.max(self.state.started_at());
        self.lag.set(now.since(since).as_secs_f64());
    }
}

impl Drop for StreamMetrics {
    fn drop(&mut self) {
        self.set_lost();
        self.lag.set(0);
    }
}
