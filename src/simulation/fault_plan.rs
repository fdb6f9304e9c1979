//! What a walk is like, drawn from its seed.

use std::time::Duration;

use crate::batching::BatchLimits;
use crate::simulation::chance::Chance;
use crate::simulation::oracle::Promise;
use crate::simulation::traced_backend::bytes_of;

#[derive(Clone, Debug)]
pub(crate) struct Profile {
    pub(crate) kind: Kind,
    pub(crate) stores: usize,
    pub(crate) sessions: usize,
    pub(crate) steps: usize,
    /// How many operations there are at a time. More are of no use.
    pub(crate) most_running: usize,
    pub(crate) promise: Promise,
    pub(crate) timeout: Duration,
    pub(crate) max_entries: Option<u64>,
    pub(crate) max_absent: u64,
    pub(crate) laziness: f64,
    pub(crate) at_once: f64,
    pub(crate) slow: f64,
    pub(crate) tokens_have_times: bool,
    pub(crate) shards: usize,
    pub(crate) busy: bool,
    pub(crate) others: f64,
    pub(crate) bulks: f64,
    pub(crate) lags: f64,
    /// How often a session is asked for whether it is there or not.
    pub(crate) curious: f64,
    /// How long a step takes at most, most of the time.
    pub(crate) tick: Duration,
    pub(crate) rates: Rates,
    pub(crate) limits: BatchLimits,
    pub(crate) touch_after: Duration,
    /// How many saves are of what was served last.
    pub(crate) unchanged: f64,
    /// How many operations are sign-outs.
    pub(crate) sign_outs: f64,
}

/// How often things happen: at each step, or to each call that could go on.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rates {
    pub(crate) begin: f64,
    /// How often what is begun is a load, whatever else it might have been.
    pub(crate) reads: f64,
    pub(crate) cancel: f64,
    pub(crate) serve: f64,
    pub(crate) fail: f64,
    /// A change that no store made.
    pub(crate) foreign: f64,
    /// A long step, and one in which the process sleeps.
    pub(crate) leap: f64,
    pub(crate) suspend: f64,
    pub(crate) cut_stream: f64,
    pub(crate) refuse_stream: f64,
    pub(crate) lose_history: f64,
    pub(crate) drop_collection: f64,
    /// Another member of the replica set becomes the primary.
    pub(crate) elect: f64,
    /// One kind of calls stands still for a while, in one direction.
    pub(crate) stall: f64,
    /// Nothing answers one store for a while.
    pub(crate) outage: f64,
    /// The server turns away what one store asks, for a while.
    pub(crate) overload: f64,
    /// The server opens no stream without a position, for a while.
    pub(crate) refuse_fresh: f64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Calm,
    Lossy,
    Slow,
    Stalled,
    HistoryLost,
    Outage,
    Exclusive,
    /// Without change streams.
    Bounded,
    /// More sessions than fit.
    Crowded,
    /// More calls than leave at once.
    Busy,
    /// An overloaded server, and nothing else that goes wrong.
    Overloaded,
    /// The oplog stands still for long, and with it the first token of a stream.
    Quiet,
}

impl Profile {
    pub(crate) fn draw(chance: &Chance) -> Self {
        use Kind::{
            Bounded, Busy, Calm, Crowded, Exclusive, HistoryLost, Lossy, Outage, Overloaded, Quiet,
            Slow, Stalled,
        };

        let kind = chance.pick(&[
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
        let grace = match kind {
            Outage | Overloaded => max_staleness.mul_f64(chance.pick(&[0.0, 0.5, 2.0, 5.0])),
            Lossy | Slow => max_staleness.mul_f64(chance.pick(&[0.0, 0.0, 0.0, 1.0])),
            _ => Duration::ZERO,
        };
        // A stream that was given no token cannot be resumed, and there a gap counts.
        let tokens_have_times = kind == Quiet || chance.happens(0.75) || kind == Overloaded;
        let stores = if kind == Exclusive { 1 } else { chance.pick(&[1, 2, 2, 2, 3]) };
        let rates = Self::rates(kind, chance);
        let crowded = kind == Crowded;
        Self {
            kind,
            stores,
            sessions: match kind {
                Crowded => 12,
                Busy => 6,
                _ => chance.pick(&[1, 1, 2, 3]),
            },
            most_running: if kind == Busy { 40 } else { 12 },
            steps: chance.pick(&[100, 150, 200, 300]),
            promise: Promise { max_staleness, grace, exclusive: kind == Exclusive },
            timeout,
            max_entries: crowded.then_some(3),
            max_absent: if crowded { 3 } else { 100 },
            laziness: chance.pick(&[0.0, 0.1, 0.3, 0.5]),
            at_once: chance.pick(&[0.0, 0.02, 0.1]),
            slow: if kind == Slow { 0.3 } else { chance.pick(&[0.0, 0.05, 0.1]) },
            tokens_have_times,
            shards: if tokens_have_times && kind != Quiet && chance.happens(0.3) { 2 } else { 1 },
            busy: kind != Quiet && chance.happens(0.15),
            others: if kind == Quiet { 0.0 } else { chance.pick(&[0.0, 0.05, 0.3]) },
            bulks: chance.pick(&[0.0, 0.3, 0.8]),
            lags: chance.pick(&[0.0, 0.0, 0.0, 0.6, 0.95]),
            curious: chance.pick(&[0.15, 0.15, 0.5]),
            tick: max_staleness.mul_f64(chance.pick(&[0.01, 0.03, 0.08])),
            rates,
            limits: Self::limits(kind, chance, timeout),
            touch_after: Duration::from_millis(chance.pick(&[0, 0, 5, 50, 500, 60_000])),
            unchanged: chance.pick(&[0.0, 0.3, 0.7]),
            sign_outs: 0.0,
        }
    }

    fn rates(kind: Kind, chance: &Chance) -> Rates {
        use Kind::{
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
        let rates = match kind {
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
        if kind == Exclusive { Rates { foreign: 0.0, ..rates } } else { rates }
    }

    /// Small enough for calls to wait, and to leave together.
    fn limits(kind: Kind, chance: &Chance, timeout: Duration) -> BatchLimits {
        let together = 2 + chance.below(7);
        BatchLimits {
            max_commands: if kind == Kind::Busy { 1 } else { 1 + chance.below(4) },
            max_batch: together,
            max_bytes: bytes_of(chance.pick(&[1, 3, together])),
            max_wait: chance.pick(&[Duration::from_millis(1), timeout / 20, timeout / 4]),
            max_calls: chance.pick(&[1_000, 1_000, 1_000, 4, 2]),
        }
    }

    /// Whether the stores hear of changes.
    pub(crate) fn follows(&self) -> bool {
        !matches!(self.kind, Kind::Exclusive | Kind::Bounded)
    }

    /// Longer than any call takes that somebody still waits for.
    pub(crate) fn longest(&self) -> Duration {
        (self.timeout * 9 / 4).max(self.promise.max_staleness * 3)
    }
}
