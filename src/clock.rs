//! Where the time comes from. Two clocks, which never mix: the wall clock, by which sessions
//! expire, and the steady clock, by which the cache ages.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use crate::record::WallTime;

/// A moment of the steady clock: the time since this clock was made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Moment(Duration);

impl Moment {
    /// The time from `earlier` to `self`; zero if `earlier` is the later one.
    pub(crate) fn since(self, earlier: Self) -> Duration {
        self.0.saturating_sub(earlier.0)
    }

    pub(crate) fn after(self, duration: Duration) -> Self {
        Self(self.0.saturating_add(duration))
    }
}

/// Tells the time; a test may tell it what to say.
#[derive(Clone, Debug)]
pub(crate) enum Clock {
    System(Instant),
    /// Both clocks follow tokio's, which a test can pause; the wall starts in 2001.
    #[cfg(test)]
    Tokio(tokio::time::Instant),
}

impl Clock {
    pub(crate) fn system() -> Self {
        Self::System(Instant::now())
    }

    #[cfg(test)]
    pub(crate) fn tokio() -> Self {
        Self::Tokio(tokio::time::Instant::now())
    }

    pub(crate) fn now(&self) -> Moment {
        match self {
            Self::System(start) => Moment(start.elapsed()),
            #[cfg(test)]
            Self::Tokio(start) => Moment(start.elapsed()),
        }
    }

    pub(crate) fn wall(&self) -> WallTime {
        let since_1970 = match self {
            Self::System(_) => SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default(),
            #[cfg(test)]
            Self::Tokio(start) => Duration::from_secs(1_000_000_000) + start.elapsed(),
        };
        WallTime::from_millis(i64::try_from(since_1970.as_millis()).unwrap_or(i64::MAX))
    }
}
