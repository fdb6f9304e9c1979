//! `FaultPlan`: the size, the load and the faults of one walk. It is drawn from the seed before the first step.

use std::time::Duration;

use crate::batching::BatchLimits;
use crate::simulation::chance::Chance;
use crate::simulation::types::{Promise, bytes_of};

/// The `f64` fields are probabilities.
#[derive(Clone, Debug)]
pub(crate) struct FaultPlan {
    pub(crate) scenario: Scenario,
    pub(crate) stores: usize,
    /// The number of sessions at the start.
    pub(crate) sessions: usize,
    pub(crate) steps: usize,
    /// At most this number of operations run at the same time.
    pub(crate) max_running: usize,
    pub(crate) promise: Promise,
    pub(crate) timeout: Duration,
    pub(crate) max_entries: Option<u64>,
    pub(crate) max_absent_ids: u64,
    // The fields up to `small_batches` are those of `FaultConfig`.
    pub(crate) laziness: f64,
    pub(crate) immediate: f64,
    pub(crate) slow: f64,
    pub(crate) tokens_have_times: bool,
    pub(crate) shards: usize,
    pub(crate) busy_stream: bool,
    pub(crate) unrelated_writes: f64,
    pub(crate) bulk_writes: f64,
    pub(crate) small_batches: f64,
    /// An operation is about any of the latest sessions, live or not.
    pub(crate) any_session: f64,
    /// The usual upper limit for the duration of a step.
    pub(crate) tick: Duration,
    pub(crate) rates: Rates,
    pub(crate) limits: BatchLimits,
    pub(crate) touch_after: Duration,
    /// A save stores the version that its store has last returned.
    pub(crate) unchanged: f64,
    /// An operation is a sign-out.
    pub(crate) sign_outs: f64,
    /// An operation is a request, with a scope.
    pub(crate) requests: f64,
    /// The app has an `on_conflict`, which adds up counters.
    pub(crate) adds_up: bool,
}

/// How often each event happens: once for each step, or once for each call that can go on.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rates {
    /// An operation starts.
    pub(crate) begin: f64,
    /// An operation that starts is a load, whatever else it would have been.
    pub(crate) reads: f64,
    pub(crate) cancel: f64,
    /// A waiting call is applied or answered.
    pub(crate) serve: f64,
    /// A waiting call fails.
    pub(crate) fail: f64,
    /// Another instance changes a session.
    pub(crate) foreign: f64,
    /// A step takes long.
    pub(crate) leap: f64,
    /// The process is suspended.
    pub(crate) suspend: f64,
    pub(crate) cut_stream: f64,
    pub(crate) refuse_stream: f64,
    pub(crate) lose_history: f64,
    pub(crate) drop_collection: f64,
    /// Another member of the replica set becomes the primary.
    pub(crate) elect: f64,
    /// One kind of calls makes no progress for a while, in one direction.
    pub(crate) stall: f64,
    /// One store gets no answers for a while.
    pub(crate) outage: f64,
    /// The server rejects the calls of one store for a while.
    pub(crate) overload: f64,
    /// The server opens no stream without a position for a while.
    pub(crate) refuse_fresh: f64,
}

/// The kind of trouble that a walk is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Scenario {
    Calm,
    Lossy,
    Slow,
    Stalled,
    HistoryLost,
    Outage,
    Exclusive,
    /// Stores without change streams: `max_staleness` alone bounds what is served.
    Bounded,
    /// More sessions than the cache has room for.
    Crowded,
    /// More calls than the batcher sends at once.
    Busy,
    /// An overloaded server, and no other fault.
    Overloaded,
    /// The oplog has no new entries for a long time, so the first token of a stream stays the latest.
    Quiet,
}

impl FaultPlan {
    pub(crate) fn draw(chance: &Chance) -> Self {
        use Scenario::{
            Bounded, Busy, Calm, Crowded, Exclusive, HistoryLost, Lossy, Outage, Overloaded, Quiet,
            Slow, Stalled,
        };

        let scenario = chance.pick(&[
            Calm,
            Calm,
            Lossy,
            Lossy,
            Slow,
            Slow,
            Stalled,
            Stalled,
            HistoryLost,
            Outage,
            Outage,
            Exclusive,
            Bounded,
            Crowded,
            Busy,
            Busy,
            Overloaded,
            Overloaded,
            Quiet,
            Quiet,
        ]);
        let max_staleness =
            Duration::from_millis(chance.pick(&[200, 300, 500, 1_000, 2_000, 5_000]));
        let timeout = max_staleness.mul_f64(chance.pick(&[0.25, 0.5, 1.5, 3.0, 6.0]));
        let grace = match scenario {
            Outage | Overloaded => max_staleness.mul_f64(chance.pick(&[0.0, 0.5, 2.0, 5.0])),
            Lossy | Slow => max_staleness.mul_f64(chance.pick(&[0.0, 0.0, 0.0, 1.0])),
            _ => Duration::ZERO,
        };
        // A stream without tokens cannot be resumed. In an overload that would be a gap, which is a violation there.
        let tokens_have_times = scenario == Quiet || chance.happens(0.75) || scenario == Overloaded;
        let stores = if scenario == Exclusive { 1 } else { chance.pick(&[1, 2, 2, 2, 3]) };
        let rates = Self::rates(scenario, chance);
        let crowded = scenario == Crowded;
        Self {
            scenario,
            stores,
            sessions: match scenario {
                Crowded => 12,
                Busy => 6,
                _ => chance.pick(&[1, 1, 2, 3]),
            },
            max_running: if scenario == Busy { 40 } else { 12 },
            steps: chance.pick(&[100, 150, 200, 300]),
            promise: Promise { max_staleness, grace, exclusive: scenario == Exclusive },
            timeout,
            max_entries: crowded.then_some(3),
            max_absent_ids: if crowded { 3 } else { 100 },
            laziness: chance.pick(&[0.0, 0.1, 0.3, 0.5]),
            immediate: chance.pick(&[0.0, 0.02, 0.1]),
            slow: if scenario == Slow { 0.3 } else { chance.pick(&[0.0, 0.05, 0.1]) },
            tokens_have_times,
            shards: if tokens_have_times && scenario != Quiet && chance.happens(0.3) {
                2
            } else {
                1
            },
            busy_stream: scenario != Quiet && chance.happens(0.15),
            unrelated_writes: if scenario == Quiet { 0.0 } else { chance.pick(&[0.0, 0.05, 0.3]) },
            bulk_writes: chance.pick(&[0.0, 0.3, 0.8]),
            small_batches: chance.pick(&[0.0, 0.0, 0.0, 0.6, 0.95]),
            any_session: chance.pick(&[0.15, 0.15, 0.5]),
            tick: max_staleness.mul_f64(chance.pick(&[0.01, 0.03, 0.08])),
            rates,
            limits: Self::limits(scenario, chance, timeout),
            touch_after: Duration::from_millis(chance.pick(&[0, 0, 5, 50, 500, 60_000])),
            unchanged: chance.pick(&[0.0, 0.3, 0.7]),
            sign_outs: 0.0,
            requests: 0.0,
            adds_up: false,
        }
    }

    fn rates(scenario: Scenario, chance: &Chance) -> Rates {
        use Scenario::{
            Bounded, Busy, Calm, Crowded, Exclusive, HistoryLost, Lossy, Outage, Overloaded, Quiet,
            Slow, Stalled,
        };

        let base = Rates {
            begin: chance.pick(&[0.2, 0.4, 0.6]),
            reads: 0.0,
            cancel: 0.03,
            serve: chance.pick(&[0.3, 0.5, 0.8]),
            fail: 0.01,
            foreign: chance.pick(&[0.0, 0.05, 0.1]),
            leap: 0.01,
            suspend: 0.005,
            cut_stream: 0.003,
            refuse_stream: 0.002,
            lose_history: 0.002,
            drop_collection: 0.0005,
            elect: chance.pick(&[0.0, 0.005, 0.02]),
            stall: 0.005,
            outage: 0.0,
            overload: 0.002,
            refuse_fresh: 0.0,
        };
        let rates = match scenario {
            Calm | Crowded => Rates { fail: 0.0, stall: 0.0, cut_stream: 0.0, leap: 0.005, ..base },
            Lossy => Rates { fail: 0.08, cut_stream: 0.02, refuse_stream: 0.02, ..base },
            Slow => Rates { serve: 0.15, stall: 0.01, ..base },
            Stalled => Rates { stall: 0.04, leap: 0.02, ..base },
            HistoryLost => {
                let refuse_fresh = chance.pick(&[0.0, 0.01]);
                let drop_collection = 0.003;
                Rates {
                    cut_stream: 0.03,
                    lose_history: 0.03,
                    drop_collection,
                    refuse_fresh,
                    ..base
                }
            }
            Outage => Rates { outage: 0.02, fail: 0.03, begin: 0.6, leap: 0.02, ..base },
            Overloaded => Rates {
                overload: 0.05,
                fail: 0.0,
                stall: 0.0,
                cut_stream: 0.0,
                refuse_stream: 0.0,
                elect: 0.0,
                lose_history: 0.0,
                drop_collection: 0.0,
                leap: 0.0,
                suspend: 0.0,
                ..base
            },
            Quiet => Rates {
                begin: 0.6,
                reads: 0.98,
                fail: 0.0,
                foreign: 0.02,
                stall: 0.05,
                elect: 0.0,
                ..base
            },
            Busy => Rates { begin: 1.0, serve: 0.3, fail: 0.03, ..base },
            Exclusive | Bounded => Rates { fail: 0.04, drop_collection: 0.0, ..base },
        };
        if scenario == Exclusive { Rates { foreign: 0.0, ..rates } } else { rates }
    }

    /// Small limits, so that calls wait and are sent as one batch.
    fn limits(scenario: Scenario, chance: &Chance, timeout: Duration) -> BatchLimits {
        let max_batch = 2 + chance.below(7);
        BatchLimits {
            max_commands: if scenario == Scenario::Busy { 1 } else { 1 + chance.below(4) },
            max_batch,
            max_bytes: bytes_of(chance.pick(&[1, 3, max_batch])),
            max_wait: chance.pick(&[Duration::from_millis(1), timeout / 20, timeout / 4]),
            max_calls: chance.pick(&[1_000, 1_000, 1_000, 4, 2]),
        }
    }

    /// Whether the stores have a change stream.
    pub(crate) fn has_streams(&self) -> bool {
        !matches!(self.scenario, Scenario::Exclusive | Scenario::Bounded)
    }

    /// Longer than a caller waits for any call.
    pub(crate) fn longest(&self) -> Duration {
        (self.timeout * 9 / 4).max(self.promise.max_staleness * 3)
    }
}
