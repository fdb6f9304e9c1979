//! What is remembered of sessions, to tell by it how they ended.

use std::collections::HashMap;

use crate::session::id::{KeyHashing, SessionKey};
use crate::time::WallTime;

/// Of how many sessions the expiry is remembered.
const MAX_TRACKED: usize = 131_072;

/// When sessions end, of those that were heard of last: in two halves, of which the older one goes
/// when the newer one is full.
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

    #[test]
    fn the_latest_expiries_are_remembered_and_no_more_than_so_many() {
        let mut known = ExpiryTracker::default();
        let key = |n: usize| SessionKey::of(i128::try_from(n).unwrap());
        let at = |n: usize| WallTime::from_millis(i64::try_from(n).unwrap());
        known.insert(key(0), at(7));
        for n in 0..2 * MAX_TRACKED {
            known.insert(key(n), at(n));
            assert!(known.newer.len() + known.older.len() <= MAX_TRACKED);
        }
        let last = 2 * MAX_TRACKED - 1;
        for n in last - MAX_TRACKED / 2 + 1..=last {
            assert_eq!(known.remove(key(n)), Some(at(n)));
            assert_eq!(known.remove(key(n)), None);
        }
        assert_eq!(known.remove(key(0)), None);
    }

    #[test]
    fn of_two_expiries_of_a_session_the_one_told_last_counts() {
        let mut known = ExpiryTracker::default();
        let key = |n: usize| SessionKey::of(i128::try_from(n).unwrap());
        known.insert(key(0), WallTime::from_millis(7));
        for n in 1..=MAX_TRACKED / 2 {
            known.insert(key(n), WallTime::from_millis(1));
        }
        known.insert(key(0), WallTime::from_millis(9));
        assert_eq!(known.remove(key(0)), Some(WallTime::from_millis(9)));
        assert_eq!(known.remove(key(0)), None);
    }
}
