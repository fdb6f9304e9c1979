//! Chaos on a real server. The instances are behind proxies that break their connections, and the
//! server is killed and paused. A checker judges the history by the invariants of ARCHITECTURE.md.
//!
//! `cargo test --test chaos -- --help` explains how to run it.
#![allow(clippy::print_stdout, reason = "it is its own test harness")]

mod actions;
mod args;
mod checker;
mod cluster;
mod ending;
mod faults;
mod history;
mod ledger;
mod meters;
mod overload;
mod prober;
mod report;
mod requests;
mod self_check;
mod session;
mod shared;
mod workload;

use std::collections::BTreeMap;
use std::process::ExitCode;
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use tokio::task::JoinSet;

use self::actions::Run;
use self::args::{Asked, Settings};
use self::cluster::{Cluster, Server};
use self::faults::ActiveFaults;
use self::meters::Meters;
use self::report::Report;

/// How much longer than its load a run may take. After that it counts as a hang.
const PATIENCE: Duration = Duration::from_secs(300);
/// How long a task may take to end.
const TASK_END: Duration = Duration::from_secs(60);
/// A run of at least this many seconds must have sent batches and touches.
const LONG_ENOUGH: u64 = 10;
const PROGRESS: Duration = Duration::from_secs(5);

fn main() -> ExitCode {
    let settings = match args::parse(std::env::args_os().skip(1)) {
        Ok(Asked::Run(settings)) => settings,
        Ok(Asked::Help) => {
            println!("{}", args::HELP);
            return ExitCode::SUCCESS;
        }
        Ok(Asked::List(selected)) => {
            if selected {
                println!("{}: test", args::NAME);
            }
            return ExitCode::SUCCESS;
        }
        Ok(Asked::Nothing) => {
            println!("\nrunning 0 tests\n\n{}\n", report::summary(true, 0, 0, 1, Duration::ZERO));
            return ExitCode::SUCCESS;
        }
        Err(error) => {
            eprintln!("chaos: {error} (`--help` says what there is)");
            return ExitCode::from(2);
        }
    };
    match run(settings) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("chaos: {error}\nchaos: again with: {}", settings.again());
            ExitCode::FAILURE
        }
    }
}

/// Runs everything. Returns false if a rule was broken, and an error if the run did not take place.
fn run(settings: Settings) -> Result<bool, String> {
    println!("\nrunning 1 test\nchaos: {}", settings.again());
    let judged = self_check::run().map_err(|error| format!("the checker is wrong: {error}"))?;
    println!("the checker judged {judged} histories made by hand rightly");
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
    let runtime = runtime.map_err(|error| error.to_string())?;
    let meters = Arc::new(Meters::install()?);
    // Start the server before the time limit begins: on a new machine, installing a server takes
    // minutes.
    let server = Server::start()?;
    let limit = Duration::from_secs(settings.seconds) + PATIENCE;
    let outcome = runtime.block_on(async {
        // Even if the run hangs, the server ends with this process.
        tokio::time::timeout(limit, storm(settings, server, meters)).await
    });
    runtime.shutdown_background();
    outcome.map_err(|_| format!("it did not end within {limit:?}"))?
}

async fn storm(settings: Settings, server: Server, meters: Arc<Meters>) -> Result<bool, String> {
    let cluster = Cluster::start(&settings, server).await?;
    let began = Instant::now();
    let run = Arc::new(Run::new(settings, cluster.instances.clone()));
    let active_faults = Arc::new(ActiveFaults::default());
    let seconds = Duration::from_secs(settings.seconds);
    let mut rng = workload::random(settings.seed, 0);
    let own = cluster.victims.server.is_some();
    let plan = if settings.calm {
        Vec::new()
    } else {
        faults::plan(&mut rng, overload::end(seconds), seconds, settings.instances, own)
    };
    let mut tasks = JoinSet::new();
    workload::start(&run, &mut tasks);
    let alone = (!settings.calm).then(|| {
        let victims = cluster.victims.clone();
        let active_faults = active_faults.clone();
        let meters = meters.clone();
        let run = run.clone();
        tokio::spawn(async move { overload::alone(&victims, &active_faults, &meters, &run).await })
    });
    let storm = faults::carry_out(plan, cluster.victims.clone(), active_faults.clone(), run.clock);
    let storm = tokio::spawn(storm);
    let for_prober = run.clone();
    let sky = active_faults.clone();
    let prober = tokio::task::spawn_blocking(move || {
        prober::probe(&for_prober, &sky, &tokio::runtime::Handle::current())
    });

    while began.elapsed() < seconds {
        tokio::time::sleep(PROGRESS.min(seconds.saturating_sub(began.elapsed()))).await;
        meters.read();
        if settings.seconds > 15 {
            let broken = run.ledger.findings.lock().unwrap_or_else(PoisonError::into_inner);
            report::progress(&run, active_faults.faults(), broken.broken.len());
        }
    }
    let kinds = storm.await.map_err(|error| error.to_string())??;
    run.ended.store(true, Ordering::SeqCst);
    let mut failures = Vec::new();
    if let Some(alone) = alone {
        let outcome = alone.await.map_err(|error| error.to_string())?;
        let broken = outcome.failures();
        if broken.is_empty() {
            println!("{}", outcome.line());
        }
        failures.extend(broken);
    }
    let latencies = tokio::time::timeout(TASK_END, prober).await;
    let latencies = latencies.map_err(|_| "the prober hangs".to_owned())?;
    let latencies = latencies.map_err(|error| error.to_string())??;
    let ended = tokio::time::timeout(TASK_END, async {
        while let Some(ended) = tasks.join_next().await {
            ended.map_err(|error| error.to_string())?;
        }
        Ok::<_, String>(())
    });
    ended.await.map_err(|_| "an operation hangs".to_owned())??;

    ending::settle(&run).await;
    workload::sweep(&run, true);
    match ending::check(&run, &cluster).await {
        Ok(sessions) => println!("{sessions} sessions were judged"),
        Err(error) => failures.push(error),
    }
    failures.extend(idle(&run, &kinds, settings));
    let together = meters.read();
    if settings.seconds >= LONG_ENOUGH {
        failures.extend(together.missing().map(str::to_owned));
    }
    failures.extend(ending::clean_up(&run, &cluster).await.err());
    let faults = active_faults.faults();
    let report = Report { took: began.elapsed(), faults, kinds, latencies, together, failures };
    let ok = {
        let findings = run.ledger.findings.lock().unwrap_or_else(PoisonError::into_inner);
        report.print(&run, &findings)
    };
    // Dropping the server blocks.
    tokio::task::spawn_blocking(move || drop(cluster)).await.map_err(|error| error.to_string())?;
    Ok(ok)
}

/// Finds what did not happen: a run in which nothing happened proves nothing.
fn idle(run: &Run, kinds: &BTreeMap<faults::Kind, u32>, settings: Settings) -> Option<String> {
    let counts = &run.ledger.counts;
    let all = [
        &counts.creates,
        &counts.saves,
        &counts.touches,
        &counts.deletes,
        &counts.loads,
        &counts.requests,
    ];
    let some = all.iter().all(|count| count.load(Ordering::Relaxed) > 0);
    let storm = settings.calm || kinds.len() >= 8;
    (!some || !storm).then(|| "too little happened to tell anything".to_owned())
}
