//! The plots of the guide: files that `src/guide/mod.rs` includes.

use std::fmt::Write;
use std::fs;
use std::path::Path;

use anyhow::Result;

use crate::figures::Cell;
use crate::findings::Findings;
use crate::{plot, table};

/// Writes `<scenario>-throughput.svg` and `<scenario>-latency.svg` for each scenario, and `run.md`,
/// into `folder`.
pub(crate) fn write(findings: &Findings, folder: &Path) -> Result<()> {
    fs::create_dir_all(folder)?;
    for cells in findings.cells.chunk_by(|one, next| one.scenario == next.scenario) {
        let key = cells[0].scenario.key();
        let cells = cells.iter().collect::<Vec<_>>();
        fs::write(folder.join(format!("{key}-throughput.svg")), lines(&plot::throughput(&cells)?))?;
        fs::write(folder.join(format!("{key}-latency.svg")), lines(&plot::latency(&cells)?))?;
    }
    fs::write(folder.join("run.md"), run(findings)?)?;
    Ok(())
}

/// In Markdown, HTML ends at an empty line.
fn lines(svg: &str) -> String {
    let lines = svg.lines().map(str::trim_end).filter(|line| !line.is_empty());
    lines.fold(String::new(), |svg, line| svg + line + "\n")
}

/// The command and the machine of the run, and a line for each store in each scenario.
fn run(findings: &Findings) -> Result<String> {
    let mut text = String::from("| | |\n|---|---|\n");
    for (what, about) in findings.machine.lines() {
        writeln!(text, "| {what} | {about} |")?;
    }
    text.push_str(
        "\n| scenario | store | requests/s | p50 µs | p99 µs | hits % | commands for MongoDB |\n",
    );
    text.push_str("|---|---|--:|--:|--:|--:|--:|\n");
    for cell in &findings.cells {
        writeln!(text, "| {} |", columns(cell).join(" | "))?;
    }
    Ok(text)
}

fn columns(cell: &Cell) -> [String; 7] {
    let latency = &cell.latency_micros;
    [
        cell.scenario.key().to_owned(),
        cell.store.title().to_owned(),
        format!("{:.0}", cell.throughput),
        table::micros(latency.p50),
        table::micros(latency.p99),
        cell.hit_rate.map_or_else(|| "-".to_owned(), |rate| format!("{:.1}", rate * 100.0)),
        format!("{:.3}", cell.mongo_commands_per_request),
    ]
}
