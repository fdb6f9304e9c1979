//! Tests the checker before each run: it must find each broken rule, and nothing else.

mod shared;

use crate::args;
use crate::checker::{Violation, check};
use crate::history::{Event, Nanos, Seen, State, What};
use crate::overload;

/// In these histories one unit is a nanosecond, and the bound is 100 of them.
const BOUND: Nanos = 100;

const A: u8 = 0;
const B: u8 = 1;

fn event(instance: u8, start: Nanos, end: Nanos, what: What) -> Event {
    Event { start, end, instance, what }
}

/// The state after A wrote `version`, which changed the data.
fn state(version: u32) -> State {
    State { step: version, version, writer: A }
}

fn save(start: Nanos, end: Nanos, version: u32) -> Event {
    event(A, start, end, What::Write { state: state(version), least: version, ok: true })
}

fn unknown(start: Nanos, end: Nanos, version: u32) -> Event {
    event(A, start, end, What::Write { state: state(version), least: version, ok: false })
}

/// A touch of version 1 that is write number `step`. It may leave any step from `least` on.
fn touch(start: Nanos, end: Nanos, step: u32, least: u32) -> Event {
    event(A, start, end, What::Write { state: State { step, ..state(1) }, least, ok: true })
}

fn delete(start: Nanos, end: Nanos) -> Event {
    event(A, start, end, What::Delete { ok: true })
}

fn saw(instance: u8, start: Nanos, end: Nanos, version: u32) -> Event {
    event(instance, start, end, What::Load(Seen::State(state(version))))
}

fn none(instance: u8, start: Nanos, end: Nanos) -> Event {
    event(instance, start, end, What::Load(Seen::Absent))
}

struct Case {
    name: &'static str,
    events: Vec<Event>,
    /// The rule that is broken, if one is.
    rule: Option<&'static str>,
}

fn case(name: &'static str, rule: Option<&'static str>, events: Vec<Event>) -> Case {
    Case { name, events, rule }
}

fn broken() -> Vec<Case> {
    let foreign = event(B, 20, 30, What::Load(Seen::Foreign));
    let other_writer = event(B, 20, 30, What::Load(Seen::State(State { writer: B, ..state(1) })));
    let touch = touch(20, 30, 2, 2);
    let worth_it = self::touch(20, 30, 3, 2);
    vec![
        case(
            "seen after a delete here",
            Some("I1"),
            vec![save(0, 10, 1), delete(20, 30), saw(A, 31, 32, 1)],
        ),
        case(
            "seen long after a delete elsewhere",
            Some("I1"),
            vec![save(0, 10, 1), delete(20, 30), saw(B, 131, 132, 1)],
        ),
        case(
            "seen long after a load elsewhere had seen it gone",
            Some("I1"),
            vec![
                save(0, 10, 1),
                event(A, 20, 25, What::Delete { ok: false }),
                none(A, 26, 30),
                saw(B, 131, 132, 1),
            ],
        ),
        case(
            "an older version after a save here",
            Some("I2"),
            vec![save(0, 10, 1), save(20, 30, 2), saw(A, 31, 32, 1)],
        ),
        case(
            "an older expiry after a touch here",
            Some("I2"),
            vec![save(0, 10, 1), touch, saw(A, 31, 32, 1)],
        ),
        case(
            "an older expiry after a touch here that was worth it",
            Some("I2"),
            vec![save(0, 10, 1), worth_it, saw(A, 31, 32, 1)],
        ),
        case(
            "backward",
            Some("I3"),
            vec![save(0, 10, 1), save(20, 30, 2), saw(B, 31, 32, 2), saw(B, 33, 34, 1)],
        ),
        case(
            "backward from a version of unknown outcome",
            Some("I3"),
            vec![save(0, 10, 1), unknown(20, 30, 2), saw(B, 31, 32, 2), saw(B, 33, 34, 1)],
        ),
        case(
            "back after it was seen to be gone",
            Some("I4"),
            vec![
                save(0, 10, 1),
                event(A, 20, 60, What::Delete { ok: false }),
                none(B, 31, 32),
                saw(B, 33, 34, 1),
            ],
        ),
        case(
            "brought back by a late save",
            Some("I4"),
            vec![save(0, 10, 1), delete(20, 30), save(40, 50, 2), saw(B, 51, 52, 2)],
        ),
        case("never written", Some("I5"), vec![save(0, 10, 1), saw(B, 20, 30, 2)]),
        case(
            "not written yet",
            Some("I5"),
            vec![save(0, 10, 1), saw(B, 20, 30, 2), save(31, 40, 2)],
        ),
        case("another's data", Some("I5"), vec![save(0, 10, 1), foreign]),
        case("under another's name", Some("I5"), vec![save(0, 10, 1), other_writer]),
        case("None for a live session", Some("I7"), vec![save(0, 10, 1), none(B, 20, 30)]),
        case(
            "None before the delete",
            Some("I7"),
            vec![save(0, 10, 1), none(B, 20, 30), delete(31, 40)],
        ),
        case(
            "stale",
            Some("staleness"),
            vec![save(0, 10, 1), save(20, 30, 2), saw(B, 131, 140, 1)],
        ),
        case(
            "stale, as another load shows",
            Some("staleness"),
            vec![save(0, 10, 1), unknown(20, 300, 2), saw(A, 25, 40, 2), saw(B, 141, 142, 1)],
        ),
    ]
}

fn sound() -> Vec<Case> {
    vec![
        case(
            "all of it, just within the bounds",
            None,
            vec![
                save(0, 10, 1),
                saw(A, 11, 12, 1),
                save(20, 30, 2),
                saw(B, 130, 500, 1), // waited long, but began in time
                saw(A, 31, 32, 2),
                saw(B, 131, 132, 2),
                delete(140, 150),
                saw(B, 250, 260, 2),
                none(B, 240, 270),
                save(160, 170, 3), // dropped
                none(A, 171, 172),
            ],
        ),
        case(
            "loads that overlap may cross",
            None,
            vec![
                save(0, 10, 1),
                save(20, 50, 2),
                saw(B, 21, 40, 2),
                saw(B, 22, 41, 1),
                saw(A, 23, 50, 1),
            ],
        ),
        case(
            "a write of unknown outcome is carried out late or never",
            None,
            vec![
                save(0, 10, 1),
                unknown(20, 30, 2),
                saw(A, 31, 32, 1),
                saw(B, 1_000, 1_001, 2),
                saw(A, 1_050, 1_051, 1),
                event(A, 1_052, 1_053, What::Load(Seen::Error)),
            ],
        ),
        case(
            "a delete of unknown outcome, and a save beside a delete",
            None,
            vec![
                save(0, 10, 1),
                event(B, 20, 30, What::Delete { ok: false }),
                none(A, 25, 26),
                saw(B, 27, 28, 1),
                save(22, 35, 2),
                none(A, 36, 37),
                delete(40, 50),
                none(A, 51, 52),
            ],
        ),
        case(
            "a touch elsewhere need not be reported",
            None,
            vec![save(0, 10, 1), touch(20, 30, 2, 2), saw(B, 1_000, 1_001, 1)],
        ),
        case(
            "a touch that is not worth it stores nothing",
            None,
            vec![save(0, 10, 1), touch(20, 30, 3, 1), saw(A, 31, 32, 1), saw(B, 33, 34, 1)],
        ),
    ]
}

/// What may be in the database in the end, after the same beginning.
fn ends() -> Vec<(&'static str, Vec<Event>, Seen, Option<&'static str>)> {
    let begin = || vec![save(0, 10, 1), save(20, 30, 2)];
    let with = |more: &[Event]| [begin(), more.to_vec()].concat();
    let holds = |version| Seen::State(state(version));
    vec![
        ("the last one", begin(), holds(2), None),
        ("lost altogether", begin(), Seen::Absent, Some("I5")),
        ("lost the last one", begin(), holds(1), Some("I5")),
        ("not the last expiry", begin(), Seen::State(State { step: 3, ..state(2) }), Some("I5")),
        (
            "a touch that was not worth it",
            vec![save(0, 10, 1), touch(20, 30, 3, 1)],
            holds(1),
            None,
        ),
        ("a touch lost", vec![save(0, 10, 1), touch(20, 30, 3, 2)], holds(1), Some("I5")),
        ("unknown outcome, carried out", with(&[unknown(40, 50, 3)]), holds(3), None),
        ("unknown outcome, not carried out", with(&[unknown(40, 50, 3)]), holds(2), None),
        (
            "seen and not there",
            with(&[unknown(40, 50, 3), saw(B, 60, 61, 3)]),
            holds(2),
            Some("I5"),
        ),
        ("deleted and there", with(&[delete(40, 50)]), holds(2), Some("I4")),
        ("brought back", with(&[delete(40, 50), save(60, 70, 3)]), holds(3), Some("I4")),
        ("deleted", with(&[delete(40, 50), save(60, 70, 3)]), Seen::Absent, None),
    ]
}

/// Runs all checks. Returns how many histories were judged correctly, or which one was not.
pub(crate) fn run() -> Result<usize, String> {
    args::self_check()?;
    overload::self_check()?;
    let mut judged = shared::run()?;
    for Case { name, events, rule } in broken().into_iter().chain(sound()) {
        let violations = check(&events, BOUND).violations;
        let rules: Vec<_> = violations.iter().map(|violation| violation.rule).collect();
        if rules != Vec::from_iter(rule) {
            return Err(format!("`{name}`: {rules:?} instead of {rule:?}: {violations:?}"));
        }
        judged += 1;
    }
    for (name, events, found, rule) in ends() {
        let verdict = check(&events, BOUND);
        let end = verdict.expected.check(found, false).err().map(|Violation { rule, .. }| rule);
        if end != rule {
            return Err(format!("the end `{name}`: {end:?} instead of {rule:?}"));
        }
        judged += 1;
    }
    let stale = check(&[save(0, 10, 1), save(20, 30, 2), saw(B, 77, 78, 1)], BOUND).staleness;
    if stale == 47 { Ok(judged) } else { Err(format!("a staleness of 47 is taken for {stale}")) }
}
