//! The printed tables.

use comfy_table::{CellAlignment, Table, presets};

use crate::figures::{Cell, Ratio};
use crate::kind::Kind;
use crate::number::float;

const HEAD: [&str; 15] = [
    "store",
    "requests/s",
    "p50 µs",
    "p95",
    "p99",
    "p99.9",
    "hits %",
    "Mongo ops",
    "server µs",
    "Mongo µs",
    "cores s/c/M",
    "RSS MiB",
    "wrong",
    "stale %",
    "unsent",
];

pub(crate) const LEGEND: &str = "\
requests/s: the median of the rounds. Mongo ops: commands for each request. server µs, Mongo µs: time on
a processor for each request. cores s/c/M: kept busy by server, clients and MongoDB.
stale: reads on B that showed a version before the last that was written on A.";

/// The figures of each store in one scenario.
pub(crate) fn figures<'a>(cells: impl Iterator<Item = &'a Cell>) -> Vec<Vec<String>> {
    let head = HEAD.iter().map(|text| (*text).to_owned()).collect();
    [head].into_iter().chain(cells.map(|cell| row(cell).into())).collect()
}

fn row(cell: &Cell) -> [String; HEAD.len()] {
    let latency = &cell.latency_micros;
    let percent = |part: u64| {
        if part == 0 {
            return "-".to_owned();
        }
        format!("{:.2}", float(part) * 100.0 / float(cell.requests.max(1)))
    };
    let count = |n: u64| if n == 0 { "-".to_owned() } else { n.to_string() };
    [
        cell.store.title().to_owned(),
        format!("{:.0}", cell.throughput),
        micros(latency.p50),
        micros(latency.p95),
        micros(latency.p99),
        micros(latency.p999),
        cell.hit_rate.map_or_else(|| "-".to_owned(), |rate| format!("{:.1}", rate * 100.0)),
        format!("{:.3}", cell.mongo_commands_per_request),
        format!("{:.1}", cell.server_cpu_micros),
        cell.mongo_cpu_micros.map_or_else(|| "?".to_owned(), |micros| format!("{micros:.1}")),
        format!(
            "{:.2}/{:.2}/{}",
            cell.server_cores,
            cell.client_cores,
            cell.mongo_cores.map_or_else(|| "?".to_owned(), |cores| format!("{cores:.2}"))
        ),
        format!("{:.1}", float(cell.resident_bytes) / f64::from(1 << 20)),
        cell.wrong.to_string(),
        percent(cell.stale),
        count(cell.unsent),
    ]
}

/// A line for each scenario, a column for each pair of stores.
pub(crate) fn ratios(ratios: &[Ratio]) -> Vec<Vec<String>> {
    let mut scenarios = Vec::new();
    let mut pairs = Vec::new();
    for ratio in ratios {
        if !scenarios.contains(&ratio.scenario) {
            scenarios.push(ratio.scenario);
        }
        if !pairs.contains(&(ratio.peer, ratio.store)) {
            pairs.push((ratio.peer, ratio.store));
        }
    }
    pairs.sort_unstable();
    let title = |(peer, store): &(Kind, Kind)| format!("{} / {}", store.key(), peer.key());
    let mut lines =
        vec![["scenario".to_owned()].into_iter().chain(pairs.iter().map(title)).collect()];
    for scenario in scenarios {
        let of = |pair: &(Kind, Kind)| {
            ratios
                .iter()
                .find(|ratio| ratio.scenario == scenario && (ratio.peer, ratio.store) == *pair)
        };
        let value = |pair| of(pair).map_or_else(String::new, |ratio| format!("{:.2}", ratio.value));
        let values = pairs.iter().map(value);
        lines.push([scenario.key().to_owned()].into_iter().chain(values).collect());
    }
    lines
}

/// Lines with equal columns. The first line is the head. The first text of each line is aligned to
/// the left.
pub(crate) fn plain(lines: &[Vec<String>]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    let mut lines = lines.iter();
    table.set_header(lines.next().into_iter().flatten());
    for line in lines {
        table.add_row(line);
    }
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table
}

/// The goals of `ours`, and whether each one is reached.
pub(crate) fn goals(ratios: &[Ratio]) -> Vec<String> {
    let line = |ratio: &Ratio| {
        let Ratio { scenario, store, peer, value, goal } = ratio;
        let goal = (*goal)?;
        Some(format!(
            "ratio {}_{}_by_{} {value:.2} goal {goal:.2} {}",
            scenario.key(),
            store.key(),
            peer.key(),
            if *value >= goal { "ok" } else { "short" }
        ))
    };
    ratios.iter().filter_map(line).collect()
}

pub(crate) fn micros(value: f64) -> String {
    if value < 100.0 { format!("{value:.1}") } else { format!("{value:.0}") }
}
