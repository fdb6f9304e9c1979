//! What the program prints.

use std::collections::{BTreeMap, HashSet};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::actions::Run;
use crate::faults::Kind;
use crate::ledger::{Broken, Findings};
use crate::meters::Together;
use crate::prober::Latencies;

/// The outcome of a whole run.
pub(crate) struct Report {
    pub(crate) took: Duration,
    pub(crate) faults: u64,
    pub(crate) kinds: BTreeMap<Kind, u32>,
    pub(crate) latencies: Latencies,
    pub(crate) together: Together,
    /// Why the run itself failed, apart from broken rules.
    pub(crate) failures: Vec<String>,
}

/// How many broken sessions are shown with their history, and how many lines are shown of the
/// others.
const SHOWN: usize = 3;
const NAMED: usize = 20;

/// Prints one line of progress.
pub(crate) fn progress(run: &Run, faults: u64, broken: usize) {
    let seconds = Duration::from_nanos(run.clock.now()).as_secs();
    let operations = run.ledger.counts.operations();
    eprintln!("chaos: {seconds} s, {operations} operations, {faults} faults, {broken} violations");
}

impl Report {
    /// Prints everything. Returns true if nothing was broken.
    pub(crate) fn print(&self, run: &Run, findings: &Findings) -> bool {
        let count = |count: &AtomicU64| count.load(Ordering::Relaxed);
        let counts = &run.ledger.counts;
        println!(
            "loads {}, saves {}, touches {}, creates {}, deletes {}; requests of shared sessions {}, \
             of these cycle_id {}; failed {}, abandoned {}; the slowest took {} ms",
            count(&counts.loads),
            count(&counts.saves),
            count(&counts.touches),
            count(&counts.creates),
            count(&counts.deletes),
            count(&counts.requests),
            count(&counts.cycles),
            count(&counts.failed),
            count(&counts.abandoned),
            count(&counts.slowest) / 1_000_000,
        );
        let kinds: Vec<_> =
            self.kinds.iter().map(|(kind, times)| format!("{kind:?} {times}")).collect();
        println!(
            "faults: {}; latencies measured: {}",
            if kinds.is_empty() { "none".to_owned() } else { kinds.join(", ") },
            self.latencies.len()
        );
        let Together { finds, loads, bulks, saves, touches, skipped, merges, .. } = self.together;
        println!(
            "{loads} loads left in {finds} commands, {saves} saves in {bulks}; {touches} touches \
             were sent alone, {skipped} not at all; {merges} saves were merged"
        );
        show(&findings.broken);
        for failure in &self.failures {
            println!("failed: {failure}");
        }
        let violations = findings.broken.len() + self.failures.len();
        println!("again with: {}", run.settings.again());
        let ok = violations == 0;
        println!("\ntest {} ... {}\n", crate::args::NAME, if ok { "ok" } else { "FAILED" });
        println!("{}", summary(ok, usize::from(ok), usize::from(!ok), 0, self.took));
        println!(
            "chaos operations={} faults={} violations={violations} staleness_max_ms={} \
             invalidation_p50_ms={} invalidation_p99_ms={}",
            counts.operations(),
            self.faults,
            findings.staleness.div_ceil(1_000_000),
            self.latency(0.5),
            self.latency(0.99),
        );
        ok
    }

    fn latency(&self, quantile: f64) -> String {
        if self.latencies.is_empty() {
            return "none".to_owned();
        }
        let micros = self.latencies.value_at_quantile(quantile);
        format!("{}.{:03}", micros / 1_000, micros % 1_000)
    }
}

/// Prints the rules that were broken, and the history of the first sessions.
fn show(broken: &[Broken]) {
    let mut times: BTreeMap<(u64, &str), usize> = BTreeMap::new();
    for Broken { number, violation, .. } in broken {
        *times.entry((*number, violation.rule)).or_default() += 1;
    }
    let mut named = HashSet::new();
    for Broken { number, violation, .. } in broken {
        let case = (*number, violation.rule);
        if named.len() < NAMED && named.insert(case) {
            let rule = violation.rule;
            let text = &violation.text;
            println!("VIOLATION of {rule}: session {number}: {text} ({} of these)", times[&case]);
        }
    }
    let mut shown = HashSet::new();
    for Broken { number, violation, story } in broken {
        if shown.len() == SHOWN || story.is_empty() || !shown.insert(number) {
            continue;
        }
        println!("\nthe history of session {number} (ms since the start) to its violation of");
        println!("{}: {}", violation.rule, violation.text);
        for line in story {
            println!("{line}");
        }
    }
}

/// A summary line in libtest's form, for tools that count tests.
pub(crate) fn summary(
    ok: bool,
    passed: usize,
    failed: usize,
    filtered: usize,
    took: Duration,
) -> String {
    let word = if ok { "ok" } else { "FAILED" };
    format!(
        "test result: {word}. {passed} passed; {failed} failed; 0 ignored; 0 measured; {filtered} \
         filtered out; finished in {:.2}s",
        took.as_secs_f64()
    )
}
