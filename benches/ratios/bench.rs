//! The settings that every figure receives, and the result that it returns.

use std::fmt;

use session_test_server::TestServer;

/// The settings of a run. Cheap to clone.
#[derive(Clone, Copy)]
pub(crate) struct Bench {
    pub(crate) server: &'static TestServer,
    pub(crate) rounds: usize,
    pub(crate) quick: bool,
}

/// The result of a figure.
pub(crate) enum Measured {
    Value(f64),
    /// It cannot be measured on this machine. The text says why.
    Skipped(String),
}

/// The goal of a figure.
#[derive(Clone, Copy)]
pub(crate) enum Goal {
    AtMost(f64),
    AtLeast(f64),
    Exactly(f64),
    Within(f64, f64),
}

impl Bench {
    pub(crate) fn new(server: &'static TestServer, rounds: usize, quick: bool) -> Self {
        Self { server, rounds, quick }
    }

    /// A URI with a new database.
    pub(crate) fn uri(&self) -> String {
        self.server.uri_for(&session_test_server::fresh_database())
    }

    /// `full` for a measurement, `quick` for a run that only shows that everything works.
    pub(crate) fn size(&self, full: usize, quick: usize) -> usize {
        if self.quick { quick } else { full }
    }
}

impl Goal {
    pub(crate) fn is_met(self, value: f64) -> bool {
        match self {
            Self::AtMost(bound) => value <= bound,
            Self::AtLeast(bound) => value >= bound,
            Self::Exactly(number) => (value - number).abs() < f64::EPSILON,
            Self::Within(least, most) => (least..=most).contains(&value),
        }
    }
}

impl fmt::Display for Goal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::AtMost(bound) => write!(f, "<={bound}"),
            Self::AtLeast(bound) => write!(f, ">={bound}"),
            Self::Exactly(number) => write!(f, "={number}"),
            Self::Within(least, most) => write!(f, "{least}..{most}"),
        }
    }
}
