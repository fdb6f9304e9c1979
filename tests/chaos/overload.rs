//! An overload alone, before all other faults. An overloaded server refuses commands, and loses
//! nothing. So no cache may lose an entry: otherwise it would read every entry again, from that
//! same server.

use std::sync::atomic::Ordering;
use std::time::Duration;

use session_test_proxy::{Commands, Injected};
use tokio::time::sleep;

use crate::actions::Run;
use crate::faults::{ActiveFaults, OVERLOADED, READS, Victims, overload};
use crate::history::Clock;
use crate::meters::{Lost, Meters};

/// How long the load runs before the overload.
const BEFORE: Duration = Duration::from_millis(700);
/// The part of a run in which reads are refused, and its longest duration. 3 s are longer than a
/// stream needs to be refused three times: the driver waits, and sends each command three times.
const PART: u32 = 5;
const LONGEST: Duration = Duration::from_secs(4);
const ALL_REFUSED: Duration = Duration::from_millis(700);
/// How long a stream takes to open again after the last refusal.
const AFTER: Duration = Duration::from_millis(600);

/// How long reads are refused in a run of this length.
fn reads_refused(run: Duration) -> Duration {
    (run / PART).min(LONGEST)
}

/// When the whole overload has ended in a run of this length.
pub(crate) fn end(run: Duration) -> Duration {
    BEFORE + reads_refused(run) + AFTER + ALL_REFUSED + AFTER
}

/// What the server refused, and what the caches lost by it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Outcome {
    refused: u32,
    reads: Lost,
    all: Lost,
    /// Writes that failed before reads were answered again.
    undecided: u64,
}

/// Carries the overload out, and measures what the caches lose.
pub(crate) async fn alone(
    victims: &Victims,
    active_faults: &ActiveFaults,
    meters: &Meters,
    run: &Run,
) -> Outcome {
    let clock = run.clock;
    let lasts = reads_refused(Duration::from_secs(run.settings.seconds));
    sleep(BEFORE).await;
    let (refused, reads) = refuse(victims, active_faults, meters, clock, READS.into(), lasts).await;
    let undecided = run.ledger.counts.undecided.load(Ordering::SeqCst);
    let (more, all) =
        refuse(victims, active_faults, meters, clock, Commands::All, ALL_REFUSED).await;
    Outcome { refused: refused + more, reads, all, undecided }
}

async fn refuse(
    victims: &Victims,
    active_faults: &ActiveFaults,
    meters: &Meters,
    clock: Clock,
    commands: Commands,
    lasts: Duration,
) -> (u32, Lost) {
    let before = meters.read().lost;
    active_faults.begin();
    let begin = |(index, proxy)| {
        let code = OVERLOADED[index % OVERLOADED.len()];
        overload(proxy, commands.clone(), code)
    };
    let refused: Vec<_> = victims.proxies.iter().enumerate().map(begin).collect();
    sleep(lasts).await;
    refused.iter().for_each(Injected::stop);
    active_faults.end(clock.now());
    sleep(AFTER).await;
    let after = meters.read().lost;
    let lost = Lost {
        gaps: after.gaps - before.gaps,
        emptied: after.emptied - before.emptied,
        unknown_outcomes: after.unknown_outcomes - before.unknown_outcomes,
    };
    (refused.iter().map(Injected::count).sum(), lost)
}

impl Outcome {
    /// What is wrong with the outcome.
    pub(crate) fn failures(&self) -> Vec<String> {
        let mut failures = Vec::new();
        let Self { refused, reads, all, undecided } = *self;
        if refused == 0 {
            failures.push("the overload has met no command".to_owned());
        }
        // On a slow machine a write may end with unknown outcome at its deadline, and once more
        // when it ends.
        if (reads.gaps, reads.emptied) != (0, 0) || reads.unknown_outcomes > 2 * undecided {
            let writes = format!("{undecided} writes failed");
            failures
                .push(format!("overload of reads cost caches their entries: {reads:?}, {writes}"));
        }
        if (all.gaps, all.emptied) != (0, 0) {
            failures.push(format!("overload cost caches their entries: {all:?}"));
        }
        failures
    }

    /// One line of the report.
    pub(crate) fn line(&self) -> String {
        format!("an overload refused {} commands and emptied no cache", self.refused)
    }
}

/// Tests the judgement itself. An error says what it judged wrong.
pub(crate) fn self_check() -> Result<(), String> {
    let none = Lost::default();
    let gap = Lost { gaps: 1, ..none };
    let emptied = Lost { emptied: 1, ..none };
    let unknown_outcomes = Lost { unknown_outcomes: 1, ..none };
    for (refused, reads, all, undecided, failures) in [
        (9, none, none, 0, 0),
        (0, none, none, 0, 1),
        (9, gap, none, 5, 1),
        (9, emptied, gap, 5, 2),
        (9, unknown_outcomes, emptied, 0, 2),
        (9, unknown_outcomes, unknown_outcomes, 1, 0),
    ] {
        let outcome = Outcome { refused, reads, all, undecided };
        if outcome.failures().len() != failures {
            return Err(format!("{outcome:?} is judged as {:?}", outcome.failures()));
        }
    }
    Ok(())
}
