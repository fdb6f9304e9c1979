//! The load test: an Axum server in a process of its own, clients on real sockets, and every store
//! beside the others. `cargo bench --bench load -- --help` lists all options.
//!
//! - `options`: the settings of a run; `args` parses them from the command line
//! - `scenario`: what the clients do; `kind`: the stores that are compared
//! - `stores`, `naive`: how each store is built
//! - `server`: the process under load; `content`: its sessions; `stats`: its own figures
//! - `process`: starts the server; `client`: calls it; `worker`: checks the responses; `fleet`:
//!   holds all three
//! - `drive`: one round; `run`: one scenario; `figures`: its results
//! - `machine`, `table`, `report`, `plot`, `guide`: the output
//! - `soak`: millions of calls on one store
//! - `lost_updates`: how many of parallel views each store loses
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a bench prints what it measured")]

mod args;
mod client;
mod content;
mod drive;
mod figures;
mod findings;
mod fleet;
mod guide;
mod kind;
mod lost_updates;
mod machine;
mod naive;
mod number;
mod options;
mod plot;
mod process;
mod report;
mod run;
mod scenario;
mod server;
mod soak;
mod stats;
mod stores;
mod table;
mod worker;

use std::fs;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Result;
use indicatif::{ProgressBar, ProgressStyle};
use session_test_server::TestServer;

use crate::args::Asked;
use crate::figures::Cell;
use crate::findings::Findings;
use crate::machine::Machine;
use crate::options::Options;

fn main() -> Result<ExitCode> {
    let options = match args::parse()? {
        Asked::Help => {
            println!("{}", args::HELP);
            return Ok(ExitCode::SUCCESS);
        }
        Asked::Server => return server::run().map(|()| ExitCode::SUCCESS),
        Asked::Run(options) => *options,
    };
    // Cargo starts a bench in its package's folder. File names in the options are relative to the
    // repository.
    std::env::set_current_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/.."))?;
    let mongo = session_test_server::shared_fast()?;
    let machine = Machine::of(mongo);
    for (what, text) in machine.lines() {
        println!("{what:9} {text}");
    }
    if !machine::is_optimised() {
        println!("WARNING   debug assertions are on: these figures say nothing about speed");
    }
    if let Some(plan) = options.soak {
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
        let flat = runtime.block_on(soak::run(plan, &options, mongo))?;
        return Ok(if flat { ExitCode::SUCCESS } else { ExitCode::FAILURE });
    }
    if options.lost_updates {
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
        let exact = runtime.block_on(lost_updates::run(&options, mongo))?;
        return Ok(if exact { ExitCode::SUCCESS } else { ExitCode::FAILURE });
    }
    let mut runtime = match options.client_threads {
        1 => tokio::runtime::Builder::new_current_thread(),
        _ => tokio::runtime::Builder::new_multi_thread(),
    };
    let runtime = runtime.worker_threads(options.client_threads).enable_all().build()?;
    let cells = runtime.block_on(run_all(&options, mongo))?;
    let ratios = figures::ratios(&cells);
    if !ratios.is_empty() {
        println!("\nratios of medians\n{}", table::plain(&table::ratios(&ratios)));
        for line in table::goals(&ratios).iter().filter(|_| machine::is_optimised()) {
            println!("{line}");
        }
    }
    println!("\n{}", table::LEGEND);
    let findings = Findings { machine, options, cells, ratios };
    write(&findings)?;
    let wrong: u64 = findings.cells.iter().map(|cell| cell.wrong).sum();
    if wrong > 0 {
        println!("{wrong} responses were wrong");
        return Ok(ExitCode::FAILURE);
    }
    Ok(ExitCode::SUCCESS)
}

async fn run_all(options: &Options, mongo: &TestServer) -> Result<Vec<Cell>> {
    let steps = options.scenarios.iter().map(|scenario| run::steps(*scenario, options)).sum();
    let progress = ProgressBar::new(steps);
    progress.set_style(ProgressStyle::with_template("{bar:30} {pos}/{len} {eta:>4} left  {msg}")?);
    progress.enable_steady_tick(Duration::from_millis(200));
    let mut all = Vec::new();
    for scenario in &options.scenarios {
        let cells = run::scenario(*scenario, options, mongo, &progress).await?;
        if cells.is_empty() {
            continue;
        }
        progress.suspend(|| {
            let table = table::plain(&table::figures(cells.iter()));
            println!("\n{}: {}\n{}", scenario.key(), scenario.about(), table);
            for cell in &cells {
                for text in &cell.wrong_answers {
                    println!("  wrong, {}: {text}", cell.store.title());
                }
            }
        });
        all.extend(cells);
    }
    progress.finish_and_clear();
    Ok(all)
}

fn write(findings: &Findings) -> Result<()> {
    if let Some(path) = &findings.options.json {
        fs::write(path, serde_json::to_vec_pretty(findings)?)?;
        println!("figures in {}", path.display());
    }
    if let Some(path) = &findings.options.html {
        fs::write(path, report::of(findings)?)?;
        println!("report in {}", path.display());
    }
    if let Some(folder) = &findings.options.plots {
        guide::write(findings, folder)?;
        println!("plots in {}", folder.display());
    }
    Ok(())
}
