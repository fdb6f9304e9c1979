//! The findings so far: the counts, the judged sessions and the rules that they broke.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use tower_sessions::session::Id;

use crate::checker::{Expected, Violation, check, shared};
use crate::history::{Event, Nanos, notable};
use crate::session::Session;
use crate::shared::{Event as SharedEvent, SharedSession};

/// How many operations there were of each kind.
#[derive(Default)]
pub(crate) struct Counts {
    pub(crate) creates: AtomicU64,
    pub(crate) saves: AtomicU64,
    pub(crate) touches: AtomicU64,
    pub(crate) deletes: AtomicU64,
    pub(crate) loads: AtomicU64,
    /// The saves and the `cycle_id` of requests that share a session.
    pub(crate) requests: AtomicU64,
    pub(crate) cycles: AtomicU64,
    /// The operations that failed.
    pub(crate) failed: AtomicU64,
    /// The operations that ended after their caller had given up.
    pub(crate) abandoned: AtomicU64,
    /// The writes among the failed and the abandoned operations: their outcome is unknown.
    pub(crate) undecided: AtomicU64,
    /// The longest operation.
    pub(crate) slowest: AtomicU64,
}

impl Counts {
    pub(crate) fn operations(&self) -> u64 {
        let writes = [&self.creates, &self.saves, &self.touches, &self.deletes, &self.requests];
        writes.iter().chain(&[&self.loads]).map(|count| count.load(Ordering::Relaxed)).sum()
    }
}

/// A session that was judged, since no task uses it any longer.
pub(crate) struct Judged {
    pub(crate) number: u64,
    pub(crate) id: Id,
    pub(crate) expected: Expected,
    /// The end of its history.
    pub(crate) story: Vec<Event>,
}

/// A shared session that was judged.
pub(crate) struct JudgedShared {
    pub(crate) number: u64,
    /// In the order of their indexes.
    pub(crate) ids: Vec<Id>,
    pub(crate) expected: shared::Expected,
    /// The end of its history.
    pub(crate) story: Vec<String>,
}

/// A rule that was broken, and the history that shows it.
pub(crate) struct Broken {
    pub(crate) number: u64,
    pub(crate) violation: Violation,
    /// The lines of the history.
    pub(crate) story: Vec<String>,
}

#[derive(Default)]
pub(crate) struct Findings {
    pub(crate) judged: Vec<Judged>,
    pub(crate) shared: Vec<JudgedShared>,
    pub(crate) broken: Vec<Broken>,
    pub(crate) staleness: Nanos,
}

/// Collects the findings.
pub(crate) struct Ledger {
    pub(crate) counts: Counts,
    pub(crate) findings: Mutex<Findings>,
    max_staleness: Nanos,
}

/// How many events of a broken session are shown, and how many events are kept of a session that
/// may yet be found broken.
const SHOWN: usize = 200;
const KEPT: usize = 40;

/// The lines of a history.
pub(crate) fn lines(story: &[Event]) -> Vec<String> {
    story.iter().map(Event::line).collect()
}

impl Ledger {
    pub(crate) fn new(max_staleness: Nanos) -> Self {
        Self { counts: Counts::default(), findings: Mutex::default(), max_staleness }
    }

    /// Judges a session that no task uses any longer. After that its history is not needed.
    pub(crate) fn judge(&self, session: &Session) {
        let mut events = std::mem::take(&mut *session.history());
        events.sort_by_key(|event| (event.end, event.start));
        let verdict = check(&events, self.max_staleness);
        let story = |always, limit| {
            let kept = notable(&events, always, limit).into_iter();
            kept.map(|index| events[index]).collect::<Vec<_>>()
        };
        let broken = verdict.violations.into_iter().enumerate().map(|(count, violation)| Broken {
            number: session.number,
            // A broken session is broken many times: the first times show why.
            story: if count < 2 { lines(&story(violation.event, SHOWN)) } else { Vec::new() },
            violation,
        });
        let broken: Vec<_> = broken.collect();
        let judged = Judged {
            number: session.number,
            id: session.id,
            expected: verdict.expected,
            story: story(None, KEPT),
        };
        let mut findings = self.findings.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        findings.staleness = findings.staleness.max(verdict.staleness);
        findings.broken.extend(broken);
        findings.judged.push(judged);
    }

    /// Judges a shared session that no task uses any longer.
    pub(crate) fn judge_shared(&self, session: &SharedSession) {
        let (ids, mut history) = {
            let mut state = session.state();
            let ids = state.ids.iter().map(|(id, _)| *id).collect();
            (ids, std::mem::take(&mut state.history))
        };
        history.events.sort_by_key(|event| (event.end, event.start));
        let verdict = shared::check(&history, session.is_scoped_only, self.max_staleness);
        let story = |until: Option<usize>| {
            let end = until.map_or(history.events.len(), |index| index + 1);
            let begin = end.saturating_sub(SHOWN);
            history.events[begin..end].iter().map(SharedEvent::line).collect::<Vec<_>>()
        };
        let broken = verdict.violations.into_iter().enumerate().map(|(count, violation)| Broken {
            number: session.number,
            story: if count < 2 { story(violation.event) } else { Vec::new() },
            violation,
        });
        let broken: Vec<_> = broken.collect();
        let expected = verdict.expected;
        let judged = JudgedShared { number: session.number, ids, expected, story: story(None) };
        let mut findings = self.findings.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        findings.broken.extend(broken);
        findings.shared.push(judged);
    }

    /// Records another broken rule.
    pub(crate) fn broken(&self, number: u64, violation: Violation, story: &[String]) {
        let broken = Broken { number, violation, story: story.to_vec() };
        let mut findings = self.findings.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        findings.broken.push(broken);
    }
}
