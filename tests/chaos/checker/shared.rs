//! Judges the history of one shared session, by the rules that the parent module states.

use std::collections::HashMap;
use std::ops::RangeInclusive;

use crate::checker::Violation;
use crate::history::{Nanos, name};
use crate::shared::{Contained, Contents, Event, History, KEYS, Origin, Save, Seen, What};

/// The result of judging a history.
#[derive(Clone, Debug)]
pub(crate) struct Verdict {
    pub(crate) violations: Vec<Violation>,
    pub(crate) expected: Expected,
}

/// What may be in the database in the end.
#[derive(Clone, Debug)]
pub(crate) struct Expected {
    pub(crate) ids: Vec<ExpectedId>,
    /// Of the ids of each list, exactly one must have a session.
    one_of: Vec<Vec<usize>>,
    /// Of the ids of each list, at most one may have a session.
    at_most_one_of: Vec<Vec<usize>>,
}

/// What may be under one id in the end.
#[derive(Clone, Debug)]
pub(crate) struct ExpectedId {
    may_live: bool,
    may_be_gone: bool,
    /// What each key may have.
    keys: [Vec<Contained>; KEYS],
    /// `None` if a save without a scope may have overwritten the counter.
    views: Option<RangeInclusive<u64>>,
    least_expires: u64,
}

/// A save, and what the history tells of it.
struct Known<'a> {
    event: &'a Event,
    save: &'a Save,
    /// Whether it was carried out for certain, if its id had a session at all.
    certain: bool,
    /// If it was carried out, then by this time. `Nanos::MAX` if nothing tells.
    applied_by: Nanos,
    /// When each instance saw it first.
    seen: HashMap<u8, Nanos>,
    /// The ids under which it was seen.
    seen_under: Vec<usize>,
    /// When the first delete of its id began.
    delete_began: Nanos,
}

/// A delete.
#[derive(Clone, Copy)]
struct Ending {
    instance: u8,
    start: Nanos,
    end: Nanos,
    ok: bool,
}

/// The saves that may be visible under an id: its own, and those of the ids that it was made from.
struct Line {
    id: usize,
    /// The indexes of the saves.
    saves: Vec<usize>,
    /// For each id: the time after which no save of it can be carried out. `None` if the id is not of this line.
    last: Vec<Option<Nanos>>,
}

struct Judge<'a> {
    history: &'a History,
    is_scoped_only: bool,
    max_staleness: Nanos,
    saves: Vec<Known<'a>>,
    /// For each id.
    endings: Vec<Vec<Ending>>,
    /// For each id: the loads that found no session.
    absences: Vec<Vec<&'a Event>>,
    lines: Vec<Line>,
}

/// Judges the events of one shared session.
pub(crate) fn check(history: &History, is_scoped_only: bool, max_staleness: Nanos) -> Verdict {
    let mut judge = Judge::of(history, is_scoped_only, max_staleness);
    judge.learn_from_loads();
    let mut violations = Vec::new();
    for (index, event) in history.events.iter().enumerate() {
        let What::Load(seen) = event.what else { continue };
        if let Err((rule, text)) = judge.load(event, seen) {
            let text = format!("{text}, says {} of id {}", name(event.instance), event.id);
            violations.push(Violation { rule, event: Some(index), text });
        }
    }
    let expected = judge.expected();
    for ids in &expected.at_most_one_of {
        if ids.iter().filter(|id| judge.was_seen(**id)).count() > 1 {
            violations.push(two_sessions(ids));
        }
    }
    Verdict { violations, expected }
}

fn two_sessions(ids: &[usize]) -> Violation {
    let text = format!("one session has become two, by the ids {ids:?}");
    Violation { rule: "renewal", event: None, text }
}

type Outcome = Result<(), (&'static str, String)>;

fn broken(rule: &'static str, text: impl Into<String>) -> Outcome {
    Err((rule, text.into()))
}

impl<'a> Judge<'a> {
    fn of(history: &'a History, is_scoped_only: bool, max_staleness: Nanos) -> Self {
        let ids = 0..history.origins.len();
        let endings_of = |id| {
            let ending = move |event: &Event| match event.what {
                What::Delete { ok } if event.id == id => {
                    let Event { instance, start, end, .. } = *event;
                    Some(Ending { instance, start, end, ok })
                }
                _ => None,
            };
            history.events.iter().filter_map(ending).collect::<Vec<_>>()
        };
        let endings: Vec<_> = ids.clone().map(endings_of).collect();
        let known = |event: &'a Event| {
            let What::Save(save) = &event.what else { return None };
            // A save beside a delete is acknowledged too if it finds no session.
            let certain =
                save.ok && endings[event.id].iter().all(|ending| event.end < ending.start);
            let applied_by = if save.ok { event.end } else { Nanos::MAX };
            let delete_began = endings[event.id].iter().map(|ending| ending.start).min();
            let delete_began = delete_began.unwrap_or(Nanos::MAX);
            let seen = HashMap::new();
            let seen_under = Vec::new();
            Some(Known { event, save, certain, applied_by, seen, seen_under, delete_began })
        };
        let saves: Vec<_> = history.events.iter().filter_map(known).collect();
        let line = |id: usize| {
            let mut last = vec![None; history.origins.len()];
            last[id] = Some(Nanos::MAX);
            let mut before = id;
            while let Some(origin) = history.origins[before] {
                before = origin.parent;
                last[before] = Some(origin.create_began);
            }
            let is_of_line = |index: &usize| last[saves[*index].event.id].is_some();
            Line { id, saves: (0..saves.len()).filter(is_of_line).collect(), last }
        };
        let lines = ids.clone().map(line).collect();
        let absences_of = |id| {
            let is_absence =
                |event: &&Event| event.id == id && event.what == What::Load(Seen::Absent);
            history.events.iter().filter(is_absence).collect()
        };
        let absences = ids.map(absences_of).collect();
        Self { history, is_scoped_only, max_staleness, saves, endings, absences, lines }
    }

    /// The saves that can have left this under a key of an id by that time.
    fn writers(
        &self,
        id: usize,
        key: usize,
        contained: Contained,
        until: Nanos,
    ) -> impl Iterator<Item = usize> {
        self.lines[id].saves.iter().copied().filter(move |index| {
            let known = &self.saves[*index];
            known.save.keys[key].result() == Some(contained) && known.event.start <= until
        })
    }

    /// A load that shows what only one save can have written proves that save.
    fn learn_from_loads(&mut self) {
        for event in &self.history.events {
            let What::Load(Seen::Contents(contents)) = event.what else { continue };
            for key in 0..KEYS {
                let mut writers = self.writers(event.id, key, contents.keys[key], event.end);
                let (Some(writer), None) = (writers.next(), writers.next()) else { continue };
                drop(writers);
                let known = &mut self.saves[writer];
                known.certain = true;
                known.applied_by = known.applied_by.min(event.end);
                let seen = known.seen.entry(event.instance).or_insert(event.end);
                *seen = event.end.min(*seen);
                if !known.seen_under.contains(&event.id) {
                    known.seen_under.push(event.id);
                }
            }
        }
    }

    fn load(&self, event: &Event, seen: Seen) -> Outcome {
        let Event { id, instance, start, end, .. } = *event;
        let contents = match seen {
            Seen::Error => return Ok(()),
            Seen::Foreign => return broken("I5", "data was served that no request wrote"),
            Seen::Absent => {
                let may_be_gone = !self.is_born_for_certain(id)
                    || self.endings[id].iter().any(|ending| ending.start <= end);
                return if may_be_gone { Ok(()) } else { broken("I7", "a live session is absent") };
            }
            Seen::Contents(contents) => contents,
        };
        // The oldest state that a load here may return was stored at this time.
        let is_before = |on: u8, at: Nanos| {
            (on == instance && at < start) || at.saturating_add(self.max_staleness) < start
        };
        if self.is_unborn_for_certain(id) {
            return broken("I4", "cycle_id has brought back a session that was deleted before");
        }
        if self.endings[id].iter().any(|it| it.ok && is_before(it.instance, it.end)) {
            return broken("I1", "a session is served that had been deleted");
        }
        if self.absences[id].iter().any(|it| is_before(it.instance, it.end)) {
            return broken("I4", "a session is served that had been seen to be gone");
        }
        let is_known = |known: &Known<'_>| {
            let acknowledged = known.save.ok && is_before(known.event.instance, known.event.end);
            let applied = known.applied_by.saturating_add(self.max_staleness) < start;
            let seen = known.seen.get(&instance).is_some_and(|at| *at < start);
            acknowledged || applied || seen
        };
        self.contents(id, &contents, end, is_known)
    }

    /// Judges what is under an id, if the saves of `is_known` must be in it or before it.
    fn contents(
        &self,
        id: usize,
        contents: &Contents,
        until: Nanos,
        is_known: impl Fn(&Known<'_>) -> bool,
    ) -> Outcome {
        let line = &self.lines[id];
        for key in 0..KEYS {
            let contained = contents.keys[key];
            let mut writers = self.writers(id, key, contained, until).peekable();
            if writers.peek().is_none() {
                return broken("I5", format!("nobody has stored {contained:?} in key {key}"));
            }
            let newest = self.newest(line, key, &is_known);
            let Some(newest) = newest else { continue };
            if writers.all(|writer| self.is_before(line, writer, newest)) {
                let newest = newest.save.keys[key];
                let text =
                    format!("key {key} has {contained:?}, but the later change {newest:?} is lost");
                return broken("merge", text);
            }
        }
        if self.is_scoped_only {
            let views = self.views(line, until, &is_known);
            if !views.contains(&contents.views) {
                let text = format!("the counter is {} and not in {views:?}", contents.views);
                return broken("merge", text);
            }
        }
        Ok(())
    }

    fn of_line(&self, line: &Line) -> impl Iterator<Item = &Known<'a>> {
        line.saves.iter().map(|index| &self.saves[*index])
    }

    /// The saves that are visible under an id for certain, once they are carried out.
    fn certain(&self, line: &Line) -> impl Iterator<Item = &Known<'a>> {
        // A `cycle_id` takes the state of the old id to the new one. The test server does not do this in one step
        // with the updates of others: of 3,000 updates beside a `findAndModify` that deletes, it acknowledged 2,168
        // although the returned document did not have them. So of the saves under the old id, only those count that
        // were carried out before the delete began, or that were seen under a later id.
        self.of_line(line).filter(|known| {
            let is_own = known.event.id == line.id;
            let is_earlier = known.applied_by < known.delete_began;
            let is_later = |id: &usize| *id != known.event.id && line.last[*id].is_some();
            known.certain && (is_own || is_earlier || known.seen_under.iter().any(is_later))
        })
    }

    /// The known save of a key that began last.
    fn newest(
        &self,
        line: &Line,
        key: usize,
        is_known: impl Fn(&Known<'_>) -> bool,
    ) -> Option<&Known<'a>> {
        let changes =
            |known: &&Known<'_>| known.save.keys[key].result().is_some() && is_known(known);
        self.certain(line).filter(changes).max_by_key(|known| known.event.start)
    }

    /// Whether a save was carried out before another one began, or never.
    fn is_before(&self, line: &Line, save: usize, other: &Known<'_>) -> bool {
        let known = &self.saves[save];
        let last = line.last[known.event.id].unwrap_or(0);
        known.applied_by.min(last) < other.event.start
    }

    /// What the counter may be.
    fn views(
        &self,
        line: &Line,
        until: Nanos,
        is_known: impl Fn(&Known<'_>) -> bool,
    ) -> RangeInclusive<u64> {
        let least = self.certain(line).filter(|known| is_known(known));
        let most = self.of_line(line).filter(|known| known.event.start <= until);
        least.map(|known| known.save.views).sum()..=most.map(|known| known.save.views).sum()
    }

    /// Whether the `cycle_id` that returned an id was the only one that could end the id before it.
    fn is_born_for_certain(&self, id: usize) -> bool {
        self.history.origins[id].is_none_or(|Origin { parent, .. }| {
            self.endings[parent].len() == 1 && self.is_born_for_certain(parent)
        })
    }

    /// Whether the id before this one had been ended before its `cycle_id` began to end it.
    fn is_unborn_for_certain(&self, id: usize) -> bool {
        self.history.origins[id].is_some_and(|Origin { parent, delete_began, .. }| {
            self.is_unborn_for_certain(parent)
                || self.endings[parent].iter().any(|it| it.ok && it.end < delete_began)
        })
    }

    /// Whether a load has found a session under this id.
    fn was_seen(&self, id: usize) -> bool {
        let is_seen =
            |event: &Event| event.id == id && matches!(event.what, What::Load(Seen::Contents(_)));
        self.history.events.iter().any(is_seen)
    }

    fn expected(&self) -> Expected {
        let count = self.history.origins.len();
        let children = |parent: usize| -> Vec<usize> {
            let is_child = |id: &usize| {
                self.history.origins[*id].is_some_and(|origin| origin.parent == parent)
            };
            (0..count).filter(is_child).collect()
        };
        let families: Vec<_> = (0..count).map(children).collect();
        // If each delete of an id was the acknowledged one of a `cycle_id` that returned an id, one of them
        // has the session.
        let has_one = |parent: &usize| {
            let family = &families[*parent];
            let endings = &self.endings[*parent];
            family.len() > 1
                && self.is_born_for_certain(*parent)
                && family.len() == endings.len()
                && endings.iter().all(|ending| ending.ok)
                && family.iter().all(|id| self.endings[*id].is_empty())
        };
        let one_of = (0..count).filter(has_one).map(|parent| families[parent].clone()).collect();
        Expected {
            ids: (0..count).map(|id| self.expected_id(id)).collect(),
            one_of,
            at_most_one_of: families.into_iter().filter(|ids| ids.len() > 1).collect(),
        }
    }

    fn expected_id(&self, id: usize) -> ExpectedId {
        let line = &self.lines[id];
        let is_known = |_: &Known<'_>| true;
        let keys = std::array::from_fn(|key| {
            let newest = self.newest(line, key, is_known);
            let mut possible = Vec::new();
            for index in line.saves.iter().copied() {
                let Some(contained) = self.saves[index].save.keys[key].result() else { continue };
                let is_possible = newest.is_none_or(|newest| !self.is_before(line, index, newest));
                if is_possible && !possible.contains(&contained) {
                    possible.push(contained);
                }
            }
            possible
        });
        let changes = |known: &&Known<'_>| {
            let save = known.save;
            let is_touch = save.views == 0 && save.keys.iter().all(|key| key.result().is_none());
            !is_touch
        };
        let expiries = self.certain(line).filter(changes).map(|known| known.save.expires);
        let is_gone = self.is_unborn_for_certain(id)
            || self.endings[id].iter().any(|ending| ending.ok)
            || !self.absences[id].is_empty();
        ExpectedId {
            may_live: !is_gone,
            may_be_gone: !self.is_born_for_certain(id) || !self.endings[id].is_empty(),
            keys,
            views: self.is_scoped_only.then(|| self.views(line, Nanos::MAX, is_known)),
            // A save without a scope may shorten the life of its session.
            least_expires: expiries.max().filter(|_| self.is_scoped_only).unwrap_or(0),
        }
    }
}

impl ExpectedId {
    /// Whether there may be a session in the end.
    pub(crate) fn may_live(&self) -> bool {
        self.may_live
    }

    /// Judges what is there in the end, in the database or in a cache.
    pub(crate) fn check(&self, found: Seen) -> Result<(), Violation> {
        let broken = |rule, text: String| Err(Violation { rule, event: None, text });
        let contents = match found {
            Seen::Error => return Ok(()),
            Seen::Foreign => {
                return broken("I5", "in the end there is data that no request wrote".to_owned());
            }
            Seen::Absent if self.may_be_gone => return Ok(()),
            Seen::Absent => {
                return broken("I5", "an acknowledged session is lost in the end".to_owned());
            }
            Seen::Contents(_) if !self.may_live => {
                return broken("I4", "in the end a deleted session is there".to_owned());
            }
            Seen::Contents(contents) => contents,
        };
        for (key, (contained, possible)) in contents.keys.iter().zip(&self.keys).enumerate() {
            if !possible.contains(contained) {
                let text = format!(
                    "in the end key {key} has {contained:?}, and should have one of {possible:?}"
                );
                return broken("merge", text);
            }
        }
        if let Some(views) = self.views.as_ref().filter(|views| !views.contains(&contents.views)) {
            let text = format!("in the end the counter is {}, not in {views:?}", contents.views);
            return broken("merge", text);
        }
        if contents.expires < self.least_expires {
            let text = format!("{} is sooner than {}", contents.expires, self.least_expires);
            return broken("expiry", text);
        }
        Ok(())
    }
}

impl Expected {
    /// Judges how many of the ids have a session in the end. `found` has what is under each id in the database.
    pub(crate) fn check_renewals(&self, found: &[Seen]) -> Result<(), Violation> {
        let living = |ids: &[usize]| {
            let is_there = |id: &&usize| matches!(found[**id], Seen::Contents(_));
            ids.iter().filter(is_there).count()
        };
        if let Some(ids) = self.at_most_one_of.iter().find(|ids| living(ids) > 1) {
            return Err(two_sessions(ids));
        }
        match self.one_of.iter().find(|ids| living(ids) == 0) {
            Some(ids) => {
                let text = format!("cycle_id has lost a session: none of the ids {ids:?} has one");
                Err(Violation { rule: "renewal", event: None, text })
            }
            None => Ok(()),
        }
    }
}
