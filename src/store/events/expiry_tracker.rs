//! `ExpiryTracker`: remembers when sessions expire, to tell an expired session from a deleted one.

use std::collections::HashMap;

use crate::session::id::{KeyHashing, SessionKey};
use crate::time::WallTime;

/// The number of sessions whose expiry is remembered.
const MAX_TRACKED: usize = 131_072;

/// The expiries of the sessions that were reported last.
///
/// It has two halves, and drops the older one when the newer one is full. So it forgets the oldest sessions without
/// a list of their order.
#[derive(Default)]
pub(crate) struct ExpiryTracker {
    newer: HashMap<SessionKey, WallTime, KeyHashing>,
    older: HashMap<SessionKey, WallTime, KeyHashing>,
}

impl ExpiryTracker {
    pub(crate) fn insert(&mut self, key: SessionKey, expires: WallTime) {
        if self.newer.len() >= MAX_TRACKED / 2 {
            self.older = std::mem::take(&mut self.newer);
        }
        self.newer.insert(key, expires);
    }

    pub(crate) fn remove(&mut self, key: SessionKey) -> Option<WallTime> {
        let older = self.older.remove(&key);
        self.newer.remove(&key).or(older)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(n: usize) -> SessionKey {
        SessionKey::of(i128::try_from(n).unwrap())
    }

    fn at(n: usize) -> WallTime {
        WallTime::from_millis(i64::try_from(n).unwrap())
    }

    #[test]
    fn the_latest_expiries_are_remembered_and_their_number_is_bounded() {
        let mut tracker = ExpiryTracker::default();
        tracker.insert(key(0), at(7));
        for n in 0..2 * MAX_TRACKED {
            tracker.insert(key(n), at(n));
            assert!(tracker.newer.len() + tracker.older.len() <= MAX_TRACKED);
        }
        let last = 2 * MAX_TRACKED - 1;
        for n in last - MAX_TRACKED / 2 + 1..=last {
            assert_eq!(tracker.remove(key(n)), Some(at(n)));
            assert_eq!(tracker.remove(key(n)), None);
        }
        assert_eq!(tracker.remove(key(0)), None);
    }

    #[test]
    fn the_last_reported_expiry_of_a_session_counts() {
        let mut tracker = ExpiryTracker::default();
        tracker.insert(key(0), at(7));
        for n in 1..=MAX_TRACKED / 2 {
            tracker.insert(key(n), at(1));
        }
        tracker.insert(key(0), at(9));
        assert_eq!(tracker.remove(key(0)), Some(at(9)));
        assert_eq!(tracker.remove(key(0)), None);
    }
}
