//! What the clients do in each scenario.

use serde::Serialize;

use crate::kind::Kind;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Scenario {
    Bare,
    Read,
    ReadZipf,
    ReadMostly,
    Write,
    AlwaysSave,
    LogIn,
    Stampede,
    Tenfold,
    TenfoldZipf,
    Flood,
    TwoInstances,
}

/// One step of a client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// A request that uses no session.
    Bare,
    /// Reads a session on this instance.
    Read(usize),
    Write,
    /// Reads a session with a layer that saves it each time.
    Touch,
    /// Logs in, then cycles the id.
    LogIn,
    Invent,
}

impl Scenario {
    pub(crate) const ALL: [Self; 12] = [
        Self::Bare,
        Self::Read,
        Self::ReadZipf,
        Self::ReadMostly,
        Self::Write,
        Self::AlwaysSave,
        Self::LogIn,
        Self::Stampede,
        Self::Tenfold,
        Self::TenfoldZipf,
        Self::Flood,
        Self::TwoInstances,
    ];

    /// Its name on the command line.
    pub(crate) fn key(self) -> &'static str {
        match self {
            Self::Bare => "bare",
            Self::Read => "read",
            Self::ReadZipf => "read-zipf",
            Self::ReadMostly => "read-mostly",
            Self::Write => "write",
            Self::AlwaysSave => "always-save",
            Self::LogIn => "log-in",
            Self::Stampede => "stampede",
            Self::Tenfold => "tenfold",
            Self::TenfoldZipf => "tenfold-zipf",
            Self::Flood => "flood",
            Self::TwoInstances => "two-instances",
        }
    }

    /// Its description in the report.
    pub(crate) fn about(self) -> &'static str {
        match self {
            Self::Bare => "no session at all: what the clients and HTTP allow at most",
            Self::Read => "each request reads a session",
            Self::ReadZipf => "each request reads a session, some far more often than others",
            Self::ReadMostly => "95 requests read, 5 change a session",
            Self::Write => "each request changes a session",
            Self::AlwaysSave => "each request reads a session and the layer saves it",
            Self::LogIn => "log-ins: a session is created, then its id cycled",
            Self::Stampede => "cold start: all clients at once ask for the same session",
            Self::Tenfold => "reads, ten times as many sessions as the cache holds",
            Self::TenfoldZipf => "the same, some sessions read far more often than others",
            Self::Flood => "reads among a flood of invented ids",
            Self::TwoInstances => "one in ten changes a session on A, the rest read on A and B",
        }
    }

    pub(crate) fn is_zipf(self) -> bool {
        matches!(self, Self::ReadZipf | Self::TenfoldZipf)
    }

    /// Whether all clients ask for the same session at the same time.
    pub(crate) fn is_stampede(self) -> bool {
        self == Self::Stampede
    }

    pub(crate) fn instances(self) -> usize {
        if self == Self::TwoInstances { 2 } else { 1 }
    }

    /// How many sessions the cache may hold, if the scenario limits it.
    pub(crate) fn max_entries(self, sessions: usize) -> Option<u64> {
        matches!(self, Self::Tenfold | Self::TenfoldZipf).then_some((sessions as u64 / 10).max(1))
    }

    /// Whether the scenario is useful for this store.
    pub(crate) fn suits(self, kind: Kind) -> bool {
        match self {
            Self::Bare => kind == Kind::InMemory,
            Self::Stampede | Self::TwoInstances => kind.is_persistent(),
            _ => true,
        }
    }

    /// The next step, chosen by a random number from 0 to 99. `invented` is the share of invented ids
    /// in percent.
    pub(crate) fn step(self, drawn: u32, invented: u32) -> Step {
        match self {
            Self::Bare => Step::Bare,
            Self::ReadMostly if drawn < 5 => Step::Write,
            Self::Write => Step::Write,
            Self::AlwaysSave => Step::Touch,
            Self::LogIn => Step::LogIn,
            Self::Flood if drawn < invented => Step::Invent,
            Self::TwoInstances if drawn < 10 => Step::Write,
            Self::TwoInstances if drawn < 55 => Step::Read(1),
            _ => Step::Read(0),
        }
    }

    /// The goal for the ratio of `ours` to a peer.
    pub(crate) fn goal(self, peer: Kind) -> Option<f64> {
        match (self, peer) {
            (Self::Read | Self::ReadZipf, Kind::InMemory) => Some(0.97),
            (Self::Read | Self::ReadZipf, Kind::Naive) => Some(1.0),
            (Self::Write, Kind::Naive) => Some(1.5),
            (Self::Tenfold, Kind::Naive) => Some(2.0),
            _ => None,
        }
    }
}
