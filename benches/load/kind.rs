//! The stores that are compared.

use serde::{Deserialize, Serialize};

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Kind {
    InMemory,
    Mongo,
    Naive,
    Ours,
    Compact,
}

impl Kind {
    pub(crate) const ALL: [Self; 5] =
        [Self::InMemory, Self::Mongo, Self::Naive, Self::Ours, Self::Compact];

    /// Its name on the command line.
    pub(crate) fn key(self) -> &'static str {
        match self {
            Self::InMemory => "in-memory",
            Self::Mongo => "mongo",
            Self::Naive => "naive",
            Self::Ours => "ours",
            Self::Compact => "compact",
        }
    }

    /// Its name in tables and plots.
    pub(crate) fn title(self) -> &'static str {
        match self {
            Self::InMemory => "in-memory",
            Self::Mongo => "Mongo alone",
            Self::Naive => "naive pair",
            Self::Ours => "ours",
            Self::Compact => "ours, compact",
        }
    }

    /// Whether a second instance, and a restart, finds what the first instance stored.
    pub(crate) fn is_persistent(self) -> bool {
        self != Self::InMemory
    }

    /// Whether the store bounds how stale a read on another instance may be. The naive pair does
    /// not: its cache keeps its entries.
    pub(crate) fn bounds_staleness(self) -> bool {
        self != Self::Naive
    }
}
