//! The command line: a run and its settings, or what a test harness asks for.

use std::ffi::OsString;
use std::time::Duration;

use lexopt::prelude::{Long, Short, Value, ValueExt};

/// The name under which filters find this test.
pub(crate) const NAME: &str = "chaos";

pub(crate) const HELP: &str = "\
Chaos on a real server: several instances, each behind a proxy that breaks its connections and answers
as MongoDB does, over a server that is killed and paused; a checker judges what they answered.

cargo test --test chaos -- [OPTIONS]

  --seconds N            how long the load lasts (10)
  --instances N          how many instances, 1 to 26 (3)
  --seed N               what faults and operations are drawn from (1)
  --max-staleness-ms N   `max_staleness` of the stores, which the checker holds them to (1000)
  --timeout-ms N         `operation_timeout` of the stores (1000)
  --calm                 no faults at all
  --help                 this

First comes an overload alone: the server refuses reads for a fifth of the run, and then everything, as one does
that has too much to do (codes 462, 433, 449, 450 with their labels). No cache may lose an entry by that.
Then come these faults, drawn from the seed, of one instance or of several:

  Cut, Reset, Refuse                   connections end, are reset, or cannot be made
  StallRequests, StallReplies, Delay   messages are held back, or are late
  ResetMidMessage, Truncate            connections end in the middle of a message
  Overload                             all commands are refused, or all reads
  Election                             the server is no primary for a moment: it interrupts what runs
                                       (11602), ends cursors (175), refuses commands (11600, 10107, 91,
                                       11602), and answers `hello` as a secondary
  Kill, Pause                          the server is killed and restarted, or is paused

What libtest takes is taken as well: a filter that does not match `chaos` runs nothing.";

/// Short, so that some touches are sent: one write moves the expiry by one second.
const TOUCH_AFTER: Duration = Duration::from_secs(3);

/// The settings of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Settings {
    pub(crate) seconds: u64,
    pub(crate) instances: u8,
    pub(crate) seed: u64,
    pub(crate) max_staleness: Duration,
    pub(crate) timeout: Duration,
    pub(crate) calm: bool,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            seconds: 10,
            instances: 3,
            seed: 1,
            max_staleness: Duration::from_secs(1),
            timeout: Duration::from_secs(1),
            calm: false,
        }
    }
}

impl Settings {
    /// `touch_after` of an instance. Every other instance does not send small changes of the
    /// expiry.
    pub(crate) fn touch_after(instance: u8) -> Duration {
        if instance.is_multiple_of(2) { TOUCH_AFTER } else { Duration::ZERO }
    }

    /// The command that repeats this run.
    pub(crate) fn again(&self) -> String {
        format!(
            "cargo test --test chaos -- --seconds {} --instances {} --seed {} \
             --max-staleness-ms {} --timeout-ms {}{}",
            self.seconds,
            self.instances,
            self.seed,
            self.max_staleness.as_millis(),
            self.timeout.as_millis(),
            if self.calm { " --calm" } else { "" }
        )
    }
}

/// What the command line asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Asked {
    Run(Settings),
    Help,
    /// Print the names of the selected tests: this test, or none.
    List(bool),
    /// The filter selects no test of this binary.
    Nothing,
}

/// Parses the arguments, without the program's name.
pub(crate) fn parse(
    args: impl IntoIterator<Item = impl Into<OsString>>,
) -> Result<Asked, lexopt::Error> {
    let mut parser = lexopt::Parser::from_args(args.into_iter().map(Into::into));
    let mut settings = Settings::default();
    let mut filters = Vec::new();
    let mut skips = Vec::new();
    let mut list = false;
    let mut exact = false;
    let mut ignored = false;
    while let Some(arg) = parser.next()? {
        match arg {
            Long("seconds") => settings.seconds = number(&mut parser, "seconds", 3, 1_000_000)?,
            Long("instances") => {
                settings.instances =
                    u8::try_from(number(&mut parser, "instances", 1, 26)?).unwrap_or(1);
            }
            Long("seed") => settings.seed = number(&mut parser, "seed", 0, u64::MAX)?,
            Long("max-staleness-ms") => {
                settings.max_staleness =
                    Duration::from_millis(number(&mut parser, "max-staleness-ms", 0, 3_600_000)?);
            }
            Long("timeout-ms") => {
                settings.timeout =
                    Duration::from_millis(number(&mut parser, "timeout-ms", 1, 3_600_000)?);
            }
            Long("calm") => settings.calm = true,
            Long("help") | Short('h') => return Ok(Asked::Help),
            Value(filter) => filters.push(filter.string()?),
            Long("skip") => skips.push(parser.value()?.string()?),
            Long("list") => list = true,
            Long("exact") => exact = true,
            Long("ignored") => ignored = true,
            // Options of libtest that have no effect here.
            Long(
                "test-threads" | "color" | "format" | "logfile" | "report-time" | "shuffle-seed",
            )
            | Short('Z') => drop(parser.value()?),
            Long(
                "nocapture"
                | "no-capture"
                | "show-output"
                | "quiet"
                | "include-ignored"
                | "test"
                | "bench"
                | "exclude-should-panic"
                | "ensure-time"
                | "shuffle"
                | "force-run-in-process",
            )
            | Short('q') => {}
            _ => return Err(arg.unexpected()),
        }
    }
    let matches = |filter: &String| if exact { filter == NAME } else { NAME.contains(&**filter) };
    let selected = !ignored
        && (filters.is_empty() || filters.iter().any(matches))
        && !skips.iter().any(matches);
    Ok(match (list, selected) {
        (true, _) => Asked::List(selected),
        (false, true) => Asked::Run(settings),
        (false, false) => Asked::Nothing,
    })
}

/// The option's value, from `least` to `most`.
fn number(
    parser: &mut lexopt::Parser,
    option: &str,
    least: u64,
    most: u64,
) -> Result<u64, lexopt::Error> {
    let value = parser.value()?.to_string_lossy().into_owned();
    match value.parse() {
        Ok(number) if (least..=most).contains(&number) => Ok(number),
        _ => {
            let wants = format!("--{option} takes a whole number from {least} to {most}");
            Err(format!("{wants}, not `{value}`").into())
        }
    }
}

/// Tests the parser itself. An error says what it parsed wrong.
pub(crate) fn self_check() -> Result<(), String> {
    let run = |settings| Some(Asked::Run(settings));
    let plain = Settings::default();
    let long = Settings { seconds: 60, seed: 7, calm: true, ..plain };
    let cases: [(&str, Option<Asked>); 12] = [
        ("", run(plain)),
        ("--seconds 60 --instances=3 --seed 7 --calm", run(long)),
        ("chaos --exact --nocapture --test-threads=1", run(plain)),
        ("cha", run(plain)),
        ("cha --exact", Some(Asked::Nothing)),
        ("verbs --nocapture", Some(Asked::Nothing)),
        ("--skip chaos", Some(Asked::Nothing)),
        ("--list --format terse", Some(Asked::List(true))),
        ("--list --format terse --ignored", Some(Asked::List(false))),
        ("--help", Some(Asked::Help)),
        ("--seconds many", None),
        ("--instances 0", None),
    ];
    for (line, wanted) in cases {
        let got = parse(line.split_whitespace()).ok();
        if got != wanted {
            return Err(format!("`{line}` is taken for {got:?} instead of {wanted:?}"));
        }
    }
    Ok(())
}
