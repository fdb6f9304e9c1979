//! The two clocks. Sessions expire by the wall clock ([`WallTime`]), entries of the cache age by the steady
//! clock ([`Moment`]). The types differ, so a time of one clock cannot be compared with one of the other.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use time::OffsetDateTime;

/// A moment of the steady clock, in nanoseconds since that clock began. 64 bits hold 584 years of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Moment(u64);

impl Moment {
    /// The time from `earlier` to `self`. Zero if `earlier` is the later one.
    pub(crate) fn since(self, earlier: Self) -> Duration {
        Duration::from_nanos(self.0.saturating_sub(earlier.0))
    }

    #[cfg(test)]
    pub(crate) fn after(self, duration: Duration) -> Self {
        Self(self.0.saturating_add(nanos(duration)))
    }

    pub(crate) fn before(self, duration: Duration) -> Self {
        Self(self.0.saturating_sub(nanos(duration)))
    }

    pub(crate) fn as_nanos(self) -> u64 {
        self.0
    }

    pub(crate) const fn from_nanos(nanos: u64) -> Self {
        Self(nanos)
    }
}

/// Reads both clocks. Tests replace them.
#[derive(Clone, Debug)]
pub(crate) enum Clock {
    System,
    /// Both clocks follow tokio's clock, which a test can pause. The steady clock begins at one hour. The
    /// wall clock begins in 2001, plus the milliseconds by which the test has stepped it.
    #[cfg(test)]
    Tokio(tokio::time::Instant, std::sync::Arc<std::sync::atomic::AtomicI64>),
    /// The model check moves the steady clock. The wall clock is always at zero.
    #[cfg(all(test, model_check))]
    Model(crate::model_check::ModelClock),
}

impl Clock {
    pub(crate) fn system() -> Self {
        Self::System
    }

    #[cfg(test)]
    pub(crate) fn tokio() -> Self {
        Self::Tokio(tokio::time::Instant::now(), std::sync::Arc::default())
    }

    /// Steps the wall clock of this clock and of its clones.
    #[cfg(test)]
    pub(crate) fn step_wall(&self, by: time::Duration) {
        let by = i64::try_from(by.whole_milliseconds()).unwrap_or(0);
        if let Self::Tokio(_, stepped) = self {
            stepped.fetch_add(by, std::sync::atomic::Ordering::SeqCst);
        }
    }

    pub(crate) fn now(&self) -> Moment {
        match self {
            Self::System => Moment(steady()),
            #[cfg(test)]
            Self::Tokio(start, _) => Moment(nanos(Duration::from_secs(3_600) + start.elapsed())),
            #[cfg(all(test, model_check))]
            Self::Model(clock) => clock.now(),
        }
    }

    pub(crate) fn wall(&self) -> WallTime {
        let since_1970 = match self {
            Self::System => SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default(),
            #[cfg(test)]
            Self::Tokio(start, stepped) => {
                let stepped = stepped.load(std::sync::atomic::Ordering::SeqCst);
                let since_2001 = time::Duration::seconds(1_000_000_000) + start.elapsed();
                let wall = since_2001 + time::Duration::milliseconds(stepped);
                wall.try_into().unwrap_or_default()
            }
            #[cfg(all(test, model_check))]
            Self::Model(_) => Duration::ZERO,
        };
        WallTime::from_millis(i64::try_from(since_1970.as_millis()).unwrap_or(i64::MAX))
    }
}

fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

/// Reads the steady clock that also counts while the machine sleeps, so that entries age during a
/// suspension. On these systems [`std::time::Instant`] does not count that time.
#[cfg(any(target_os = "linux", target_os = "android", target_vendor = "apple"))]
fn steady() -> u64 {
    let time = rustix::time::clock_gettime(CLOCK);
    let seconds = u64::try_from(time.tv_sec).unwrap_or(0);
    let nanos = u64::try_from(time.tv_nsec).unwrap_or(0);
    seconds.saturating_mul(1_000_000_000).saturating_add(nanos)
}

#[cfg(target_vendor = "apple")]
const CLOCK: rustix::time::ClockId = rustix::time::ClockId::Monotonic;
#[cfg(any(target_os = "linux", target_os = "android"))]
const CLOCK: rustix::time::ClockId = rustix::time::ClockId::Boottime;

/// Reads the steady clock of the standard library. On Windows it counts the time asleep, on the BSDs it may
/// not.
#[cfg(not(any(target_os = "linux", target_os = "android", target_vendor = "apple")))]
fn steady() -> u64 {
    static START: std::sync::OnceLock<std::time::Instant> = std::sync::OnceLock::new();
    nanos(START.get_or_init(std::time::Instant::now).elapsed())
}

/// A moment of the wall clock, in whole milliseconds since 1970.
///
/// BSON dates have milliseconds, and the cache uses them too, so that both tiers return the same expiry. A
/// finer time is rounded down: a session may expire up to a millisecond early, and never late.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct WallTime(i64);

impl WallTime {
    /// The last moment of the year 9999. `OffsetDateTime` holds no later one.
    const LAST: Self = Self(253_402_300_799_999);

    pub(crate) const fn from_millis(millis: i64) -> Self {
        Self(millis)
    }

    pub(crate) const fn millis(self) -> i64 {
        self.0
    }

    pub(crate) fn after(self, duration: Duration) -> Self {
        let millis = i64::try_from(duration.as_millis()).unwrap_or(i64::MAX);
        Self(self.0.saturating_add(millis).min(Self::LAST.0))
    }

    pub(crate) fn before(self, duration: Duration) -> Self {
        let millis = i64::try_from(duration.as_millis()).unwrap_or(i64::MAX);
        Self(self.0.saturating_sub(millis))
    }

    /// The time from `earlier` to `self`. Zero if `earlier` is the later one.
    pub(crate) fn since(self, earlier: Self) -> Duration {
        let millis = self.0.saturating_sub(earlier.0);
        Duration::from_millis(u64::try_from(millis).unwrap_or(0))
    }

    pub(crate) fn from_datetime(at: OffsetDateTime) -> Self {
        // A date on the last day of the year 9999 may be in the year 10000 in UTC.
        let millis = at.unix_timestamp_nanos().div_euclid(1_000_000).min(Self::LAST.0.into());
        Self(i64::try_from(millis).unwrap_or(i64::MIN))
    }

    /// `None` for a time outside of the years -9999 to 9999, which `OffsetDateTime` holds.
    pub(crate) fn to_datetime(self) -> Option<OffsetDateTime> {
        // Not by way of nanoseconds: their 128-bit division would take most of the time of a hit.
        let seconds = self.0.div_euclid(1_000);
        let millis = self.0.rem_euclid(1_000);
        let at = OffsetDateTime::from_unix_timestamp(seconds).ok()?;
        at.replace_millisecond(u16::try_from(millis).ok()?).ok()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_steady_clock_never_goes_back_and_is_not_slower_than_the_standard_one() {
        let clock = Clock::system();
        let first = clock.now();
        let start = std::time::Instant::now();
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
        // The comparison below holds for the other clocks too, if the machine has never slept.
        assert!(matches!(CLOCK, rustix::time::ClockId::Boottime));
        // The first figure of this file is the seconds since boot, including suspensions.
        let uptime = std::fs::read_to_string("/proc/uptime").unwrap();
        let uptime: f64 = uptime.split(' ').next().unwrap().parse().unwrap();
        let ours = Duration::from_nanos(Clock::system().now().as_nanos()).as_secs_f64();
        assert!((ours - uptime).abs() < 5.0, "{ours} {uptime}");
    }

    proptest! {
        #[test]
        fn an_expiry_is_rounded_down_to_the_millisecond(nanos in -377_705_116_800_000_000_000_i128..=253_402_300_799_999_999_999) {
            let at = OffsetDateTime::from_unix_timestamp_nanos(nanos).unwrap();
            let back = WallTime::from_datetime(at).to_datetime().unwrap();
            prop_assert!(back <= at && at - back < time::Duration::MILLISECOND);
        }
    }

    #[test]
    fn a_time_beyond_the_calendar_has_no_date() {
        assert_eq!(WallTime::from_millis(i64::MAX).to_datetime(), None);
        assert_eq!(WallTime::from_millis(i64::MIN).to_datetime(), None);
    }
}
