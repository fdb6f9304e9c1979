//! Runs a scenario. The servers of all its stores are started, and take turns under load, so that
//! changes of the machine's speed affect all of them. A server whose turn it is not is paused.

use std::time::Duration;

use anyhow::Result;
use indicatif::ProgressBar;
use session_test_server::TestServer;

use crate::drive;
use crate::figures::{Cell, Cpu, Sum};
use crate::fleet::Fleet;
use crate::number::float;
use crate::options::Options;
use crate::process::Usage;
use crate::scenario::Scenario;

/// The number of progress steps of a scenario.
pub(crate) fn steps(scenario: Scenario, options: &Options) -> u64 {
    let stores = options.stores.iter().filter(|kind| scenario.suits(**kind)).count();
    (stores * (options.rounds + 1)) as u64
}

pub(crate) async fn scenario(
    scenario: Scenario,
    options: &Options,
    mongo: &TestServer,
    progress: &ProgressBar,
) -> Result<Vec<Cell>> {
    let mut fleets = Vec::new();
    for kind in options.stores.iter().copied().filter(|kind| scenario.suits(*kind)) {
        progress.set_message(format!("{}: {}, sessions", scenario.key(), kind.title()));
        fleets.push((Fleet::start(kind, scenario, options, mongo).await?, Sum::new()?));
    }
    let mut usage = Usage::new();
    let warm_up = Duration::from_secs_f64(options.warm_up);
    for (fleet, sum) in &mut fleets {
        warms_up(fleet, sum, warm_up, options).await?;
        usage.pause(&fleet.pids(), true);
        progress.inc(1);
    }
    for round in 0..options.rounds {
        for turn in 0..fleets.len() {
            let at = (turn + round) % fleets.len();
            let (fleet, sum) = &mut fleets[at];
            progress.set_message(format!("{}: {}", scenario.key(), fleet.kind.title()));
            usage.pause(&fleet.pids(), false);
            // As long as the first warm-up: the lease has expired meanwhile, and the next
            // checkpoint may take half a second.
            warms_up(fleet, sum, warm_up, options).await?;
            measure(fleet, sum, options, mongo, &mut usage).await?;
            usage.pause(&fleet.pids(), true);
            progress.inc(1);
        }
    }
    let mut cells = Vec::new();
    for (fleet, sum) in fleets {
        usage.pause(&fleet.pids(), false);
        cells.push(sum.cell(scenario, fleet.kind));
        fleet.stop().await?;
    }
    Ok(cells)
}

/// Drives a store without recording figures, except for errors, which may never occur.
async fn warms_up(
    fleet: &mut Fleet,
    sum: &mut Sum,
    time: Duration,
    options: &Options,
) -> Result<()> {
    let tally = drive::round(fleet, time, options.rate).await?;
    sum.tally.wrong += tally.wrong;
    sum.tally.descriptions.extend(tally.descriptions);
    Ok(())
}

/// One round of one store.
async fn measure(
    fleet: &mut Fleet,
    sum: &mut Sum,
    options: &Options,
    mongo: &TestServer,
    usage: &mut Usage,
) -> Result<()> {
    if fleet.scenario.is_stampede() {
        fleet.restart().await?;
    }
    let pids = fleet.pids();
    let own = [std::process::id()];
    let mongo_pid: Vec<_> = mongo.pid().into_iter().collect();
    let stats = fleet.stats().await?;
    let mut spent = || [usage.of(&pids), usage.of(&own), usage.of(&mongo_pid)];
    let before = spent();
    let tally = drive::round(fleet, Duration::from_secs_f64(options.seconds), options.rate).await?;
    let after = spent();
    let [server, client, mongo] = [0, 1, 2].map(|at| after[at].0.saturating_sub(before[at].0));
    let now = fleet.stats().await?;
    let since = now.since(&stats);
    // Counters add up over the rounds. A state has its last value.
    (sum.stats.entries, sum.stats.bytes, sum.stats.tasks) = (0, 0, 0);
    sum.stats.add(&since);
    sum.resident = after[0].1;
    sum.cpu = Cpu {
        server: sum.cpu.server + server,
        client: sum.cpu.client + client,
        mongo: (!mongo_pid.is_empty()).then(|| sum.cpu.mongo.unwrap_or_default() + mongo),
    };
    sum.rounds.push(float(tally.requests) / tally.elapsed.as_secs_f64());
    sum.tally.add(tally)
}
