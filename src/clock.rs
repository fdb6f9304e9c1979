//! Where the time comes from. Two clocks, which never mix: the wall clock, by which sessions
//! expire, and the steady clock, by which the cache ages.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::record::WallTime;

/// A moment of the steady clock: the time since that clock's own beginning.
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

    /// In nanoseconds, of which 64 bits hold five centuries.
    pub(crate) fn as_nanos(self) -> u64 {
        u64::try_from(self.0.as_nanos()).unwrap_or(u64::MAX)
    }

    pub(crate) const fn from_nanos(nanos: u64) -> Self {
        Self(Duration::from_nanos(nanos))
    }
}

/// Tells the time; a test may tell it what to say.
#[derive(Clone, Debug)]
pub(crate) enum Clock {
    System,
    /// Both clocks follow tokio's, which a test can pause; the wall starts in 2001, and the steady
    /// clock had run for an hour.
    #[cfg(test)]
    Tokio(tokio::time::Instant),
}

impl Clock {
    pub(crate) fn system() -> Self {
        Self::System
    }

    #[cfg(test)]
    pub(crate) fn tokio() -> Self {
        Self::Tokio(tokio::time::Instant::now())
    }

    pub(crate) fn now(&self) -> Moment {
        match self {
            Self::System => Moment(steady()),
            #[cfg(test)]
            Self::Tokio(start) => Moment(Duration::from_secs(3_600) + start.elapsed()),
        }
    }

    pub(crate) fn wall(&self) -> WallTime {
        let since_1970 = match self {
            Self::System => SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default(),
            #[cfg(test)]
            Self::Tokio(start) => Duration::from_secs(1_000_000_000) + start.elapsed(),
        };
        WallTime::from_millis(i64::try_from(since_1970.as_millis()).unwrap_or(i64::MAX))
    }
}

/// The system's steady clock that goes on while the machine sleeps: what was cached before a
/// suspension is old after it. [`std::time::Instant`] stands still meanwhile on these systems.
#[cfg(any(target_os = "linux", target_os = "android", target_vendor = "apple"))]
fn steady() -> Duration {
    use rustix::time::{ClockId, clock_gettime};

    #[cfg(target_vendor = "apple")]
    const CLOCK: ClockId = ClockId::Monotonic;
    #[cfg(not(target_vendor = "apple"))]
    const CLOCK: ClockId = ClockId::Boottime;
    Duration::try_from(clock_gettime(CLOCK)).unwrap_or_default()
}

/// Elsewhere the best there is: on Windows it counts the time asleep, on the BSDs it may not.
#[cfg(not(any(target_os = "linux", target_os = "android", target_vendor = "apple")))]
fn steady() -> Duration {
    static START: std::sync::OnceLock<std::time::Instant> = std::sync::OnceLock::new();
    START.get_or_init(std::time::Instant::now).elapsed()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_steady_clock_never_goes_back_and_keeps_pace_with_the_standard_one() {
        let clock = Clock::system();
        let (first, start) = (clock.now(), std::time::Instant::now());
        let mut last = first;
        while start.elapsed() < Duration::from_millis(20) {
            let now = clock.now();
            assert!(now >= last);
            last = now;
        }
        assert!(clock.now().since(first) >= Duration::from_millis(20));
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn the_steady_clock_counts_the_time_asleep() {
        // The first figure of this file is the time since boot, suspensions included, in seconds.
        let uptime = std::fs::read_to_string("/proc/uptime").unwrap();
        let uptime: f64 = uptime.split(' ').next().unwrap().parse().unwrap();
        let ours = Duration::from_nanos(Clock::system().now().as_nanos()).as_secs_f64();
        assert!((ours - uptime).abs() < 5.0, "{ours} {uptime}");
    }
}
