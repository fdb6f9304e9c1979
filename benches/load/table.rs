//! What is printed.

use comfy_table::{CellAlignment, Table, presets};

use crate::figures::{Cell, Ratio};

const HEAD: [&str; 14] = [
    "store",
    "requests/s",
    "p50 µs",
    "p95",
    "p99",
    "p99.9",
    "hits %",
    "Mongo ops",
    "server µs",
    "cores s/c/M",
    "RSS MiB",
    "wrong",
    "stale %",
    "unsent",
];

pub(crate) const LEGEND: &str = "\
requests/s: the median of the rounds. Mongo ops: commands for each request. server µs: the server's
time on a processor for each request. cores s/c/M: kept busy by server, clients and MongoDB.
stale: reads on B that showed a version before the last that was written on A.";

pub(crate) fn of(cells: &[Cell]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_header(HEAD);
    for cell in cells {
        table.add_row(row(cell));
    }
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table
}

/// The texts of one line, as in the report.
pub(crate) fn row(cell: &Cell) -> [String; HEAD.len()] {
    let latency = &cell.latency_micros;
    let percent = |part: u64| {
        if part == 0 {
            return "-".to_owned();
        }
        format!("{:.2}", crate::float(part) * 100.0 / crate::float(cell.requests.max(1)))
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
        format!(
            "{:.2}/{:.2}/{}",
            cell.server_cores,
            cell.client_cores,
            cell.mongo_cores.map_or_else(|| "?".to_owned(), |cores| format!("{cores:.2}"))
        ),
        format!("{:.1}", crate::float(cell.resident_bytes) / f64::from(1 << 20)),
        cell.wrong.to_string(),
        percent(cell.stale),
        count(cell.unsent),
    ]
}

pub(crate) fn head() -> &'static [&'static str] {
    &HEAD
}

pub(crate) fn ratios(ratios: &[Ratio]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    for ratio in ratios {
        table.add_row(ratio_row(ratio));
    }
    table
}

pub(crate) fn ratio_row(ratio: &Ratio) -> [String; 4] {
    let goal = ratio.goal.map_or_else(String::new, |goal| {
        format!("goal {goal:.2} {}", if ratio.value >= goal { "ok" } else { "short" })
    });
    [
        ratio.scenario.key().to_owned(),
        format!("{} / {}", ratio.store.title(), ratio.peer.title()),
        format!("{:.2}", ratio.value),
        goal,
    ]
}

fn micros(value: f64) -> String {
    if value < 100.0 { format!("{value:.1}") } else { format!("{value:.0}") }
}
