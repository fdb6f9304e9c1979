//! The history of one session: which instance wrote what when, and which instance saw what when.

use std::time::Instant;

/// Nanoseconds since the run began. All instances are in this process, so there is one clock.
pub(crate) type Nanos = u64;

/// The clock of a run.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Clock(Instant);

impl Clock {
    pub(crate) fn start() -> Self {
        Self(Instant::now())
    }

    pub(crate) fn now(&self) -> Nanos {
        u64::try_from(self.0.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }
}

/// A state of a session. Each write makes a new step. A write that changes the data also makes a
/// new version.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct State {
    /// The number of writes so far. The expiry encodes it.
    pub(crate) step: u32,
    /// The number of versions so far. The data contains it.
    pub(crate) version: u32,
    /// The instance that wrote this version. The data contains it.
    pub(crate) writer: u8,
}

/// The result of a load.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Seen {
    State(State),
    Absent,
    /// An error, which says nothing about the session.
    Error,
    /// Data that no task wrote under this id.
    Foreign,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum What {
    /// A create, save or touch that leaves this state. If its expiry is not worth storing, it
    /// leaves the same data at any step from `least` on. `ok` if it was acknowledged.
    Write {
        state: State,
        least: u32,
        ok: bool,
    },
    Delete {
        ok: bool,
    },
    Load(Seen),
}

/// One operation, from its call to its result.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Event {
    pub(crate) start: Nanos,
    pub(crate) end: Nanos,
    pub(crate) instance: u8,
    pub(crate) what: What,
}

/// The indexes of the events to show: all events except loads that saw the same as the loads before
/// and after them on the same instance. The index `always` is never left out. Returns at most `limit`
/// indexes: the last ones, up to shortly after `always`.
pub(crate) fn notable(events: &[Event], always: Option<usize>, limit: usize) -> Vec<usize> {
    let mut kept = Vec::new();
    let mut last: [Option<(usize, Seen)>; 256] = [None; 256];
    for (index, event) in events.iter().enumerate() {
        let What::Load(seen) = event.what else {
            kept.push(index);
            continue;
        };
        let before = last[usize::from(event.instance)].replace((index, seen));
        if before.is_none_or(|(_, then)| then != seen) || always == Some(index) {
            kept.extend(before.map(|(index, _)| index));
            kept.push(index);
        }
    }
    kept.extend(last.iter().flatten().map(|(index, _)| *index));
    kept.sort_unstable();
    kept.dedup();
    if let Some(always) = always {
        let after = kept.iter().position(|index| *index > always).unwrap_or(kept.len());
        kept.truncate(after + 20);
    }
    kept.split_off(kept.len().saturating_sub(limit))
}

impl Event {
    /// One line of a history.
    pub(crate) fn line(&self) -> String {
        #[allow(clippy::cast_precision_loss, reason = "shown in milliseconds")]
        let ms = |at: Nanos| at as f64 / 1e6;
        let what = match self.what {
            What::Write { state, ok, .. } => format!("write  {} {}", show(state), verdict(ok)),
            What::Delete { ok } => format!("delete {}", verdict(ok)),
            What::Load(Seen::State(state)) => format!("load   -> {}", show(state)),
            What::Load(seen) => format!("load   -> {seen:?}"),
        };
        format!(
            "{:>12.3} .. {:>12.3}  {}  {what}",
            ms(self.start),
            ms(self.end),
            name(self.instance)
        )
    }
}

/// Instances are shown as letters.
pub(crate) fn name(instance: u8) -> char {
    char::from(b'A'.saturating_add(instance))
}

fn show(state: State) -> String {
    format!("version {} by {} (step {})", state.version, name(state.writer), state.step)
}

fn verdict(ok: bool) -> &'static str {
    if ok { "ok" } else { "undecided" }
}
