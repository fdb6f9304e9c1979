//! The figures of one store in one scenario after all rounds, and comparisons of stores.

use std::collections::BTreeMap;
use std::time::Duration;

use hdrhistogram::Histogram;
use serde::Serialize;

use crate::drive::Tally;
use crate::kind::Kind;
use crate::number::float;
use crate::scenario::Scenario;
use crate::stats::Stats;

/// The results of one store in one scenario, while its rounds continue.
pub(crate) struct Sum {
    pub(crate) rounds: Vec<f64>,
    pub(crate) tally: Tally,
    pub(crate) stats: Stats,
    pub(crate) cpu: Cpu,
    pub(crate) resident: u64,
}

/// CPU time, by process.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Cpu {
    pub(crate) server: Duration,
    pub(crate) client: Duration,
    pub(crate) mongo: Option<Duration>,
}

/// The figures of one store in one scenario.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Cell {
    pub(crate) scenario: Scenario,
    pub(crate) store: Kind,
    /// Requests a second: the median of the rounds, and each of them.
    pub(crate) throughput: f64,
    pub(crate) rounds: Vec<f64>,
    pub(crate) requests: u64,
    pub(crate) wrong: u64,
    /// Descriptions of the first wrong responses.
    pub(crate) wrong_answers: Vec<String>,
    /// Reads on the other instance that returned an older version.
    pub(crate) stale: u64,
    /// Requests that were due and never sent. Open loop only.
    pub(crate) unsent: u64,
    pub(crate) latency_micros: Latency,
    pub(crate) hit_rate: Option<f64>,
    pub(crate) mongo_commands_per_request: f64,
    /// By name, if the options ask for that.
    pub(crate) mongo_commands: BTreeMap<String, u64>,
    pub(crate) loads: BTreeMap<String, u64>,
    /// CPU time for each request, and how many cores that kept busy.
    pub(crate) server_cpu_micros: f64,
    pub(crate) client_cpu_micros: f64,
    pub(crate) mongo_cpu_micros: Option<f64>,
    pub(crate) server_cores: f64,
    pub(crate) client_cores: f64,
    pub(crate) mongo_cores: Option<f64>,
    /// The resident memory of the server processes at the end.
    pub(crate) resident_bytes: u64,
    pub(crate) cache_entries: u64,
    pub(crate) cache_bytes: u64,
    pub(crate) tasks: u64,
}

#[derive(Clone, Debug, Serialize)]
pub(crate) struct Latency {
    pub(crate) p50: f64,
    pub(crate) p95: f64,
    pub(crate) p99: f64,
    pub(crate) p999: f64,
    pub(crate) max: f64,
    /// Pairs of a share of the requests and the longest latency in that share.
    pub(crate) curve: Vec<(f64, f64)>,
}

/// The median of one store divided by the median of another.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Ratio {
    pub(crate) scenario: Scenario,
    pub(crate) store: Kind,
    pub(crate) peer: Kind,
    pub(crate) value: f64,
    pub(crate) goal: Option<f64>,
}

impl Sum {
    pub(crate) fn new() -> anyhow::Result<Self> {
        Ok(Self {
            rounds: Vec::new(),
            tally: Tally::new()?,
            stats: Stats::default(),
            cpu: Cpu::default(),
            resident: 0,
        })
    }

    pub(crate) fn cell(self, scenario: Scenario, store: Kind) -> Cell {
        let Self { rounds, tally, stats, cpu, resident } = self;
        let requests = float(tally.requests.max(1));
        let elapsed = tally.elapsed.as_secs_f64();
        let each = |used: Duration| used.as_secs_f64() * 1e6 / requests;
        let cores = |used: Duration| used.as_secs_f64() / elapsed;
        Cell {
            scenario,
            store,
            throughput: median(rounds.clone()),
            rounds,
            requests: tally.requests,
            wrong: tally.wrong,
            wrong_answers: tally.descriptions,
            stale: tally.stale,
            unsent: tally.unsent,
            latency_micros: Latency::of(&tally.latencies),
            hit_rate: stats.hit_rate(),
            mongo_commands_per_request: float(stats.commands) / requests,
            mongo_commands: stats.named,
            loads: stats.loads,
            server_cpu_micros: each(cpu.server),
            client_cpu_micros: each(cpu.client),
            mongo_cpu_micros: cpu.mongo.map(each),
            server_cores: cores(cpu.server),
            client_cores: cores(cpu.client),
            mongo_cores: cpu.mongo.map(cores),
            resident_bytes: resident,
            cache_entries: stats.entries,
            cache_bytes: stats.bytes,
            tasks: stats.tasks,
        }
    }
}

impl Latency {
    fn of(taken: &Histogram<u64>) -> Self {
        let at = |share: f64| float(taken.value_at_quantile(share)) / 1_000.0;
        // Nine points to each further nine, from a tenth of the requests, as far as there are
        // enough requests.
        let nines = (0..5_i32).flat_map(|nines| (0..9_i32).map(move |step| (nines, step)));
        let shares =
            nines.map(|(nines, step)| 1.0 - 0.1_f64.powi(nines) * (1.0 - 0.1 * f64::from(step)));
        let last = 1.0 - 1.0 / float(taken.len().max(1));
        let curve = shares
            .filter(|share| (0.05..=last).contains(share))
            .map(|share| (share, at(share)))
            .collect();
        Self { p50: at(0.5), p95: at(0.95), p99: at(0.99), p999: at(0.999), max: at(1.0), curve }
    }
}

/// Every store divided by the naive pair and by the in-memory store.
pub(crate) fn ratios(cells: &[Cell]) -> Vec<Ratio> {
    let mut ratios = Vec::new();
    for cell in cells {
        for peer in [Kind::Naive, Kind::InMemory] {
            let found = cells.iter().find(|c| c.scenario == cell.scenario && c.store == peer);
            if let Some(other) = found
                && cell.store != peer
            {
                let goal = cell.scenario.goal(peer).filter(|_| cell.store == Kind::Ours);
                let value = cell.throughput / other.throughput;
                let scenario = cell.scenario;
                let store = cell.store;
                ratios.push(Ratio { scenario, store, peer, value, goal });
            }
        }
    }
    ratios
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.len() {
        0 => 0.0,
        n if n % 2 == 1 => values[middle],
        _ => f64::midpoint(values[middle - 1], values[middle]),
    }
}
