//! `Trace`: the steps of a walk, printed for a reader or hashed for a comparison of two runs.

use std::hash::{DefaultHasher, Hash, Hasher};

use tokio::time::Instant;

/// Discards everything by default.
#[derive(Default)]
pub(crate) struct Trace {
    prints: bool,
    hash: Option<DefaultHasher>,
    lines: u64,
    start: Option<Instant>,
}

impl Trace {
    pub(crate) fn printed() -> Self {
        Self { prints: true, ..Self::hashed() }
    }

    pub(crate) fn hashed() -> Self {
        Self { hash: Some(DefaultHasher::new()), start: Some(Instant::now()), ..Self::default() }
    }

    /// `text` runs only if the trace is printed or hashed.
    pub(crate) fn note(&mut self, text: impl FnOnce() -> String) {
        let Some(hash) = &mut self.hash else { return };
        let since = self.start.map_or(0, |start| start.elapsed().as_millis());
        let line = format!("{since:>7} ms  {}", text());
        line.hash(hash);
        self.lines += 1;
        if self.prints {
            eprintln!("{line}");
        }
    }

    /// A hash of all noted lines.
    pub(crate) fn digest(&self) -> u64 {
        self.hash.as_ref().map_or(0, |hash| hash.finish() ^ self.lines)
    }
}
