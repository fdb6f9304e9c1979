//! Histories of shared sessions, made by hand.

use super::{A, B, BOUND};
use crate::checker::shared::check;
use crate::history::Nanos;
use crate::shared::What;
use crate::shared::{Contained, Contents, Event, History, KEYS, KeyChange, Origin, Save, Seen};

use Contained::{Nothing, Number};
use KeyChange::{Remove, Set};

const NONE: [KeyChange; KEYS] = [KeyChange::None; KEYS];
/// The first key has this number from the create on. The others are not there.
const FIRST: u64 = 1;

fn on(instance: u8, start: Nanos, end: Nanos, what: What) -> Event {
    Event { id: 0, instance, start, end, what }
}

/// The same operation on the id with this index.
fn of(id: usize, event: Event) -> Event {
    Event { id, ..event }
}

fn create() -> Event {
    let keys = [Set(FIRST), Remove, Remove];
    on(A, 0, 10, What::Save(Save { keys, views: 0, expires: 0, ok: true }))
}

/// An acknowledged save on A that changes a key and counts.
fn save(start: Nanos, end: Nanos, key: usize, change: KeyChange) -> Event {
    let mut keys = NONE;
    keys[key] = change;
    on(A, start, end, What::Save(Save { keys, views: 1, expires: 0, ok: true }))
}

/// The same save, with an unknown outcome.
fn unknown(start: Nanos, end: Nanos, key: usize, change: KeyChange) -> Event {
    let saved = save(start, end, key, change);
    match saved.what {
        What::Save(save) => Event { what: What::Save(Save { ok: false, ..save }), ..saved },
        _ => saved,
    }
}

/// A save on A without a scope.
fn overwrite(start: Nanos, end: Nanos, keys: [KeyChange; KEYS]) -> Event {
    on(A, start, end, What::Save(Save { keys, views: 0, expires: 0, ok: true }))
}

fn delete(start: Nanos, end: Nanos, ok: bool) -> Event {
    on(A, start, end, What::Delete { ok })
}

fn holds(keys: [Contained; KEYS], views: u64) -> Seen {
    Seen::Contents(Contents { keys, views, expires: 0 })
}

fn saw(instance: u8, start: Nanos, end: Nanos, seen: Seen) -> Event {
    on(instance, start, end, What::Load(seen))
}

/// What is under each id in the end. `None`: nobody looks.
type End = Option<Vec<Seen>>;

#[derive(Clone)]
struct Case {
    name: &'static str,
    /// For each id after the first one: the index of the id before it, and when the delete and the create of the
    /// `cycle_id` began.
    ids: &'static [(usize, Nanos, Nanos)],
    events: Vec<Event>,
    end: End,
    rule: Option<&'static str>,
    is_scoped_only: bool,
}

fn case(name: &'static str, rule: Option<&'static str>, events: Vec<Event>, end: End) -> Case {
    Case { name, ids: &[], events, end, rule, is_scoped_only: true }
}

const BEGIN: [Contained; KEYS] = [Number(FIRST), Nothing, Nothing];
const SECOND: [Contained; KEYS] = [Number(2), Nothing, Nothing];
const BOTH: [Contained; KEYS] = [Number(FIRST), Number(2), Nothing];
const REMOVED: [Contained; KEYS] = [Nothing; KEYS];

fn changes() -> Vec<Case> {
    let merge = Some("merge");
    let end = |keys, views| Some(vec![holds(keys, views)]);
    let two_keys = || vec![create(), save(20, 40, 0, Set(2)), save(25, 45, 1, Set(3))];
    let merged = [Number(2), Number(3), Nothing];
    let third = [Number(3), Nothing, Nothing];
    let overlapping = || vec![create(), save(20, 40, 0, Set(2)), save(25, 45, 0, Set(3))];
    let removed = || vec![create(), save(20, 30, 0, Remove)];
    let unsure = || vec![create(), unknown(20, 30, 0, Set(2))];
    let seen = || [unsure(), vec![saw(B, 40, 50, holds(SECOND, 1))]].concat();
    let followed = || [seen(), vec![save(60, 70, 0, Set(3))]].concat();
    let unsure_first = || vec![create(), unknown(20, 30, 0, Set(2)), save(60, 70, 0, Set(3))];
    let expiring = |expires| {
        let saved = Save { keys: [Set(2), Remove, Remove], views: 0, expires, ok: true };
        vec![create(), on(A, 20, 30, What::Save(saved))]
    };
    vec![
        case("two requests keep each other's changes", None, two_keys(), end(merged, 2)),
        case("a change is lost to one of another key", merge, two_keys(), end(BOTH, 2)),
        case("the first change of two is lost", merge, two_keys(), {
            end([Number(FIRST), Number(3), Nothing], 2)
        }),
        case("of two overlapping changes, the first stays", None, overlapping(), end(SECOND, 2)),
        case("of two overlapping changes, the second stays", None, overlapping(), end(third, 2)),
        case("both overlapping changes are lost", merge, overlapping(), end(BEGIN, 2)),
        case("a removed key is back", merge, removed(), end(BEGIN, 1)),
        case("a removed key stays away", None, removed(), end(REMOVED, 1)),
        case(
            "a removal after an addition is lost",
            merge,
            vec![create(), save(20, 30, 1, Set(2)), save(40, 50, 1, Remove)],
            end(BOTH, 2),
        ),
        case(
            "an addition after a removal is lost",
            merge,
            vec![create(), save(20, 30, 0, Remove), save(40, 50, 0, Set(2))],
            end(REMOVED, 2),
        ),
        case("unknown outcome, carried out", None, unsure(), end(SECOND, 1)),
        case("unknown outcome, not carried out", None, unsure(), end(BEGIN, 0)),
        case("unknown outcome, carried out late", None, unsure_first(), end(SECOND, 2)),
        case("unknown outcome, seen and gone", merge, seen(), end(BEGIN, 0)),
        case("unknown outcome, seen and overwritten", None, followed(), end(third, 2)),
        case("unknown outcome, carried out twice", merge, followed(), end(SECOND, 2)),
        case(
            "a change that nobody made",
            Some("I5"),
            vec![create(), saw(B, 20, 30, holds(SECOND, 0))],
            None,
        ),
        case(
            "a change that nobody had begun",
            Some("I5"),
            vec![create(), saw(B, 20, 30, holds(SECOND, 0)), save(31, 40, 0, Set(2))],
            None,
        ),
        case("another session's data", Some("I5"), vec![create()], Some(vec![Seen::Foreign])),
        case("a later expiry is lost", Some("expiry"), expiring(5), end(SECOND, 0)),
        case("no expiry is lost", None, expiring(0), end(SECOND, 0)),
    ]
}

fn loads() -> Vec<Case> {
    let merge = Some("merge");
    let saved = || vec![create(), save(20, 30, 0, Set(2))];
    let with = |more: &[Event]| [saved(), more.to_vec()].concat();
    let older = holds(BEGIN, 0);
    let newer = holds(SECOND, 1);
    vec![
        case("a load here misses a change", merge, with(&[saw(A, 31, 32, older)]), None),
        case("a load elsewhere may miss it", None, with(&[saw(B, 31, 32, older)]), None),
        case(
            "a load elsewhere may not miss it long",
            merge,
            with(&[saw(B, 131, 132, older)]),
            None,
        ),
        case(
            "a load goes back",
            merge,
            with(&[saw(B, 31, 32, newer), saw(B, 33, 34, older)]),
            None,
        ),
        case(
            "a load here misses an increment",
            merge,
            with(&[saw(A, 31, 32, holds(SECOND, 0))]),
            None,
        ),
        case(
            "a load here misses a removal",
            merge,
            vec![create(), save(20, 30, 0, Remove), saw(A, 31, 32, holds(BEGIN, 1))],
            None,
        ),
        case("None for a live session", Some("I7"), with(&[saw(B, 31, 32, Seen::Absent)]), None),
    ]
}

fn counters() -> Vec<Case> {
    let end = |views| Some(vec![holds(SECOND, views)]);
    let counted = || vec![create(), unknown(20, 30, 1, Remove), save(25, 40, 0, Set(2))];
    let mixed = |case: Case| Case { is_scoped_only: false, ..case };
    let overwritten = || {
        let all = [Set(FIRST), Remove, Remove];
        vec![create(), save(20, 30, 0, Set(2)), overwrite(40, 50, all)]
    };
    vec![
        case("the acknowledged increments", None, counted(), end(1)),
        case("and the unacknowledged one", None, counted(), end(2)),
        case("an increment is lost", Some("merge"), counted(), end(0)),
        case("an increment is counted twice", Some("merge"), counted(), end(3)),
        mixed(case("a save without a scope overwrites", None, overwritten(), {
            Some(vec![holds(BEGIN, 0)])
        })),
        mixed(case("a save without a scope is lost", Some("merge"), overwritten(), end(1))),
    ]
}

fn deleted() -> Vec<Event> {
    vec![create(), delete(20, 30, true)]
}

fn deletes() -> Vec<Case> {
    let absent = Seen::Absent;
    let there = holds(BEGIN, 0);
    let with = |more: &[Event]| [deleted(), more.to_vec()].concat();
    let dropped = with(&[save(40, 50, 0, Set(2))]);
    let seen_gone =
        vec![create(), delete(20, 60, false), saw(B, 30, 31, absent), saw(B, 32, 33, there)];
    vec![
        case("deleted", None, deleted(), Some(vec![absent])),
        case("deleted and there", Some("I4"), deleted(), Some(vec![there])),
        case("brought back by a save", Some("I4"), dropped.clone(), Some(vec![holds(SECOND, 1)])),
        case("a save after the delete is dropped", None, dropped, Some(vec![absent])),
        case("lost", Some("I5"), vec![create()], Some(vec![absent])),
        case("served after a delete here", Some("I1"), with(&[saw(A, 31, 32, there)]), None),
        case("served after a delete elsewhere", None, with(&[saw(B, 31, 32, there)]), None),
        case("served long after it", Some("I1"), with(&[saw(B, 131, 132, there)]), None),
        case("back after it was seen to be gone", Some("I4"), seen_gone, None),
    ]
}

/// The create of a `cycle_id`, which returns the id with index 1.
fn cycled(keys: [KeyChange; KEYS]) -> Event {
    of(1, overwrite(40, 50, keys))
}

/// A session gets another id by one `cycle_id`.
fn renewals() -> Vec<Case> {
    let absent = Seen::Absent;
    let there = holds(BEGIN, 0);
    let second = holds(SECOND, 1);
    let both = holds(BOTH, 0);
    let merge = Some("merge");
    let moved = || {
        let changes = [KeyChange::None, Set(2), KeyChange::None];
        [deleted(), vec![cycled(changes)]].concat()
    };
    let saved = |end| vec![create(), save(11, end, 0, Set(2)), delete(20, 30, true), cycled(NONE)];
    let before = || saved(15);
    let beside = || saved(25);
    let seen_under = |id| [beside(), vec![of(id, saw(B, 60, 61, second))]].concat();
    let pending = || {
        let after = of(1, save(60, 70, 0, Set(3)));
        vec![create(), unknown(11, 15, 0, Set(2)), delete(20, 30, true), cycled(NONE), after]
    };
    let late = || vec![create(), delete(10, 15, true), delete(20, 30, true), cycled(NONE)];
    let seen_late = [late(), vec![of(1, saw(B, 60, 61, there))]].concat();
    let lost_before = Some(vec![absent, holds(BEGIN, 1)]);
    let lost_beside = Some(vec![absent, there]);
    let late_pending = Some(vec![absent, holds(SECOND, 2)]);
    let lost = lost_beside.clone();
    let cases = vec![
        case("moved", None, moved(), Some(vec![absent, both])),
        case("moved without the change of its request", merge, moved(), lost.clone()),
        case("not moved", Some("I5"), moved(), Some(vec![absent, absent])),
        case("copied", Some("I4"), moved(), Some(vec![there, both])),
        case("moved without what was saved before", merge, before(), lost_before),
        case("moved with what was saved before", None, before(), Some(vec![absent, second])),
        case("moved without what was saved meanwhile", None, beside(), lost_beside),
        case("without what was seen under the old id", None, seen_under(0), lost.clone()),
        case("without what was seen under the new id", merge, seen_under(1), lost.clone()),
        case("a pending save of the old id is stored late", merge, pending(), late_pending),
        case("cycle_id after a delete", None, late(), Some(vec![absent, absent])),
        case("cycle_id brings a session back", Some("I4"), late(), lost),
        case("cycle_id has brought a session back", Some("I4"), seen_late, None),
    ];
    cases.into_iter().map(|case| Case { ids: &[(0, 20, 40)], ..case }).collect()
}

/// Two overlapping `cycle_id` of one session return ids.
fn competitions() -> Vec<Case> {
    let absent = Seen::Absent;
    let there = holds(BEGIN, 0);
    let renewal = Some("renewal");
    let two = || {
        let second = of(2, overwrite(42, 52, NONE));
        vec![create(), delete(20, 30, true), delete(25, 35, true), cycled(NONE), second]
    };
    let seen = [of(1, saw(B, 60, 61, there)), of(2, saw(B, 60, 61, there))];
    let seen = [two(), seen.to_vec()].concat();
    let cases = vec![
        case("moved by the first of two", None, two(), Some(vec![absent, there, absent])),
        case("moved by the second of two", None, two(), Some(vec![absent, absent, there])),
        case("moved by both of two", renewal, two(), Some(vec![absent, there, there])),
        case("moved by none of two", renewal, two(), Some(vec![absent; 3])),
        case("both of two were seen", renewal, seen, None),
    ];
    cases.into_iter().map(|case| Case { ids: &[(0, 20, 40), (0, 25, 42)], ..case }).collect()
}

/// Runs all checks. Returns how many histories were judged correctly, or which one was not.
pub(super) fn run() -> Result<usize, String> {
    let all = [changes(), loads(), counters(), deletes(), renewals(), competitions()].concat();
    for Case { name, ids, events, end, rule, is_scoped_only } in &all {
        let origin = |(parent, delete_began, create_began): &(usize, Nanos, Nanos)| {
            let parent = *parent;
            let delete_began = *delete_began;
            let create_began = *create_began;
            Some(Origin { parent, delete_began, create_began })
        };
        let origins = std::iter::once(None).chain(ids.iter().map(origin)).collect();
        let history = History { origins, events: events.clone() };
        let verdict = check(&history, *is_scoped_only, BOUND);
        let mut violations = verdict.violations;
        if let Some(found) = end {
            let expected = &verdict.expected;
            let ends = expected.ids.iter().zip(found).map(|(id, found)| id.check(*found));
            let renewals = std::iter::once(expected.check_renewals(found));
            violations.extend(ends.chain(renewals).filter_map(Result::err));
        }
        let rules: Vec<_> = violations.iter().map(|violation| violation.rule).collect();
        if rules != Vec::from_iter(*rule) {
            return Err(format!("`{name}`: {rules:?} instead of {rule:?}: {violations:?}"));
        }
    }
    Ok(all.len())
}
