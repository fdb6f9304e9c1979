//! What every figure is given, and what it answers with.

use std::fmt;
use std::sync::Arc;

use session_test_server::TestServer;
use tokio::sync::OnceCell;

use crate::million::Million;

/// The settings of a run. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Bench {
    pub(crate) server: &'static TestServer,
    pub(crate) rounds: usize,
    pub(crate) quick: bool,
    /// Taken once for the two figures that need it.
    pub(crate) million: Arc<OnceCell<Million>>,
}

/// What came of a figure.
pub(crate) enum Measured {
    Value(f64),
    /// It cannot be taken here, and why.
    Skipped(String),
}

/// What a figure should be.
#[derive(Clone, Copy)]
pub(crate) enum Goal {
    AtMost(f64),
    AtLeast(f64),
    Exactly(f64),
    Within(f64, f64),
}

impl Bench {
    pub(crate) fn new(server: &'static TestServer, rounds: usize, quick: bool) -> Self {
        Self { server, rounds, quick, million: Arc::default() }
    }

    /// A URI with a database of its own.
    pub(crate) fn uri(&self) -> String {
        self.server.uri_for(&session_test_server::fresh_database())
    }

    /// A size: that of a measurement, or one that only shows that everything runs.
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
