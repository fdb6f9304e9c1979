//! `WallClock`: tells whether a session has expired, without a reading of the wall clock at each hit.
//!
//! Sessions expire by the wall clock. An operator, NTP or a resumed virtual machine may step that clock. A
//! hit reads only the steady clock, which it needs for the lease, and adds the difference between the two
//! clocks. The difference is measured for each entry that is inserted, and
//! [every second](crate::cache::Cache::run_sweeper). So the cache notices a step within a second.

// Not the atomics of `crate::sync`: every measured value is good enough, so the model check does not need
// to try each order of the accesses.
use std::sync::atomic::{AtomicI64, Ordering};

use crate::time::{Moment, WallTime};

const NANOS_IN_A_MILLI: i64 = 1_000_000;

/// The wall clock's time, computed from the steady clock's.
#[derive(Debug, Default)]
pub(crate) struct WallClock {
    /// The wall clock's time since 1970 minus the steady clock's time, in nanoseconds.
    difference: AtomicI64,
}

impl WallClock {
    /// Measures the difference between the clocks. Read `now` before `wall`: a pause between the two
    /// readings then makes a session expire early, which costs one read, and never late.
    pub(crate) fn measure(&self, now: Moment, wall: WallTime) {
        let wall = wall.millis().saturating_mul(NANOS_IN_A_MILLI);
        self.difference.store(wall.saturating_sub(steady(now)), Ordering::Relaxed);
    }

    /// Whether a session that expires at `expires` has expired by `now`.
    pub(crate) fn is_past(&self, expires: WallTime, now: Moment) -> bool {
        let wall = steady(now).saturating_add(self.difference.load(Ordering::Relaxed));
        // Plus one, since the reading of the wall clock was rounded down to a millisecond. An entry must
        // not live longer than its session by the part that was cut off.
        expires.millis() <= wall / NANOS_IN_A_MILLI + 1
    }
}

/// Nanoseconds of the steady clock. An `i64` holds 292 years of them.
fn steady(now: Moment) -> i64 {
    i64::try_from(now.as_nanos()).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(millis: u64) -> Moment {
        Moment::from_nanos(millis * 1_000_000)
    }

    fn wall(millis: i64) -> WallTime {
        WallTime::from_millis(millis)
    }

    #[test]
    fn a_session_expires_by_the_last_measurement_of_the_wall_clock() {
        let clock = WallClock::default();
        clock.measure(at(100), wall(1_000_000));
        assert!(!clock.is_past(wall(1_000_052), at(150)));
        assert!(
            clock.is_past(wall(1_000_051), at(150)),
            "the part of a millisecond that was cut off"
        );
        // The clock is stepped forward, and then back.
        clock.measure(at(200), wall(8_200_000));
        assert!(clock.is_past(wall(1_002_000), at(200)));
        clock.measure(at(300), wall(500_000));
        assert!(!clock.is_past(wall(1_000_000), at(300)));
        assert!(clock.is_past(wall(1_000_000), at(500_300)));
    }

    #[test]
    fn the_largest_and_smallest_times_do_not_overflow() {
        let clock = WallClock::default();
        for measured in [i64::MIN, -1, 0, i64::MAX] {
            clock.measure(Moment::from_nanos(u64::MAX), wall(measured));
            clock.measure(at(0), wall(measured));
            let _ = clock.is_past(wall(i64::MAX), Moment::from_nanos(u64::MAX));
            let _ = clock.is_past(wall(i64::MIN), at(0));
        }
        clock.measure(at(0), wall(0));
        assert!(!clock.is_past(wall(i64::MAX), at(1)) && clock.is_past(wall(i64::MIN), at(1)));
    }
}
