//! The figures that show how fast and how small the store is. Each one is a ratio of the store (A)
//! to something else (B). Both are measured alternately within one run, so that changes of the
//! machine's speed affect both.
//!
//! `cargo bench --bench ratios -- [--only NAME]… [--rounds N] [--quick]`
//!
//! Each figure is one line on stdout, `ratio NAME VALUE goal GOAL ok|short`. Everything else is
//! printed on stderr. Times are measured in blocks, A and B alternately. A round's figure is the
//! median of its blocks, and the value is the ratio of the medians over the rounds. `--quick` only
//! shows that everything runs: it uses few rounds and small sizes, and its values mean nothing.
//! `short` is not a failure. The exit code is 1 if a figure could not be measured.
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a bench prints what it measured")]

mod bench;
mod busy;
mod counts;
mod figures;
mod fixtures;
mod flood;
mod hits;
mod idle;
mod machine;
mod memory;
mod million;
mod naive;
mod resident;
mod rounds;
mod touch;

use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use lexopt::ValueExt;

use crate::bench::{Bench, Measured};
use crate::figures::{ALL, Figure};

fn main() -> Result<ExitCode> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    if let Some(child) = memory::Child::of_environment() {
        runtime.block_on(async { tokio::spawn(child.run()).await? })?;
        return Ok(ExitCode::SUCCESS);
    }
    let options = Options::parse()?;
    let bench = Bench::new(session_test_server::shared_fast()?, options.rounds, options.quick);
    machine::describe(&bench);
    let mut failed = 0;
    for figure in options.chosen {
        eprintln!("\n{}: {}", figure.name, figure.what);
        // In a task, like a request handler.
        let measured = runtime.block_on(async { tokio::spawn((figure.measure)(bench)).await });
        let goal = figure.goal;
        match measured.context("it panicked").and_then(|measured| measured) {
            Ok(Measured::Value(value)) => {
                let verdict = if goal.is_met(value) { "ok" } else { "short" };
                println!("ratio {} {value:.4} goal {goal} {verdict}", figure.name);
            }
            Ok(Measured::Skipped(why)) => {
                eprintln!("  skipped: {why}");
                println!("ratio {} - goal {goal} skipped", figure.name);
            }
            Err(error) => {
                failed += 1;
                eprintln!("  failed: {error:#}");
                println!("ratio {} - goal {goal} failed", figure.name);
            }
        }
    }
    if failed > 0 {
        eprintln!("\n{failed} figures could not be measured");
        return Ok(ExitCode::FAILURE);
    }
    Ok(ExitCode::SUCCESS)
}

struct Options {
    chosen: Vec<&'static Figure>,
    rounds: usize,
    quick: bool,
}

impl Options {
    fn parse() -> Result<Self> {
        let mut only = Vec::<String>::new();
        let mut rounds = None;
        let mut quick = false;
        let mut args = lexopt::Parser::from_env();
        while let Some(arg) = args.next()? {
            match arg {
                lexopt::Arg::Long("only") => only.push(args.value()?.string()?),
                lexopt::Arg::Long("rounds") => rounds = Some(args.value()?.parse::<usize>()?),
                lexopt::Arg::Long("quick") => quick = true,
                // Cargo passes this to every bench.
                lexopt::Arg::Long("bench") => {}
                other => return Err(other.unexpected().into()),
            }
        }
        if let Some(unknown) =
            only.iter().find(|name| ALL.iter().all(|figure| figure.name != **name))
        {
            let names: Vec<_> = ALL.iter().map(|figure| figure.name).collect();
            bail!("there is no figure `{unknown}`; there are {}", names.join(", "));
        }
        if rounds == Some(0) {
            bail!("--rounds must be at least 1");
        }
        let chosen =
            |figure: &&Figure| only.is_empty() || only.iter().any(|name| name == figure.name);
        Ok(Self {
            chosen: ALL.iter().filter(chosen).collect(),
            rounds: rounds.unwrap_or(if quick { 1 } else { 7 }),
            quick,
        })
    }
}
