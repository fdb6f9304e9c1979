//! Whether a session has expired by the wall clock, at the price of one addition at each hit.
//!
//! Sessions expire by the wall clock, which an operator, NTP or a resumed virtual machine may step. A
//! hit reads the steady clock alone, for the lease. So the difference between the two clocks is kept
//! here, and measured again with each entry that is placed and
//! [every second](crate::cache::Cache::tidy): by then at the latest, the cache follows a step in either
//! direction.

// Not those of `crate::sync`: any value that was measured is good enough, so nothing hangs on the order
// of its steps.
use std::sync::atomic::{AtomicI64, Ordering};

use crate::time::Moment;
use crate::time::WallTime;

const NANOS_IN_A_MILLI: i64 = 1_000_000;

/// The wall clock, as the steady clock tells it.
#[derive(Debug, Default)]
pub(crate) struct WallClock {
    /// In nanoseconds: the wall clock's time since 1970, less the steady clock's.
    ahead: AtomicI64,
}

impl WallClock {
    /// Measures the difference between the clocks. `now` must be read before `wall`: what comes between
    /// the two readings then ends a session early, which costs one read, and never late.
    pub(crate) fn measure(&self, now: Moment, wall: WallTime) {
        let wall = wall.millis().saturating_mul(NANOS_IN_A_MILLI);
        self.ahead.store(wall.saturating_sub(steady(now)), Ordering::Relaxed);
    }

    /// Whether a session that expires then has expired by `now`.
    pub(crate) fn is_past(&self, expires: WallTime, now: Moment) -> bool {
        let wall = steady(now).saturating_add(self.ahead.load(Ordering::Relaxed));
        // One more: the reading of the wall clock has left out a part of a millisecond, and an entry
        // must not live longer than its session by that.
        expires.millis() <= wall / NANOS_IN_A_MILLI + 1
    }
}

/// Five centuries fit into a moment, and half of them into this.
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
    fn a_session_expires_by_the_wall_clock_as_it_was_measured_last() {
        let clock = WallClock::default();
        clock.measure(at(100), wall(1_000_000));
        assert!(!clock.is_past(wall(1_000_052), at(150)));
        assert!(clock.is_past(wall(1_000_051), at(150)), "by a millisecond that was left out");
        // Stepped forward, and back.
        clock.measure(at(200), wall(8_200_000));
        assert!(clock.is_past(wall(1_002_000), at(200)));
        clock.measure(at(300), wall(500_000));
        assert!(!clock.is_past(wall(1_000_000), at(300)));
        assert!(clock.is_past(wall(1_000_000), at(500_300)));
    }

    #[test]
    fn times_at_the_ends_of_their_types_are_compared() {
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
