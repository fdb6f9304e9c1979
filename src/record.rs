//! A session as both tiers hold it, apart from its id and from either generation of the contract.

use std::collections::HashMap;
use std::fmt;
use std::time::Duration;

use serde_json::Value;
use time::OffsetDateTime;

use crate::key::SessionKey;

/// What an app keeps in a session. The type that both generations of tower-sessions-core use.
pub(crate) type Data = HashMap<String, Value>;

/// Whether two are the same to the last character: `==` does not tell `0.0` from `-0.0`.
#[cfg(any(test, fuzzing))]
pub(crate) fn same(one: &Data, other: &Data) -> bool {
    let sorted = |data: &Data| {
        serde_json::to_string(&data.iter().collect::<std::collections::BTreeMap<_, _>>()).ok()
    };
    one == other && sorted(one) == sorted(other)
}

/// How many levels of arrays and objects a value in a session may have, in every form and in both
/// directions. So no session can overflow a stack.
///
/// The server keeps documents of at most 100 levels; the document and its `data` take two of them. A
/// text has the same bound, so that what is stored in one form can be stored in the other.
/// <https://www.mongodb.com/docs/manual/reference/limits/#mongodb-limit-Nested-Depth-for-BSON-Documents>
pub(crate) const MAX_DEPTH: usize = 98;

/// A moment of the wall clock, by which sessions expire: in whole milliseconds since 1970.
///
/// BSON dates have no finer unit, so the cache keeps to it as well and both tiers return the same
/// record. Rounded down: a session ends at most a millisecond early, never late.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct WallTime(i64);

impl WallTime {
    /// The last moment of the year 9999, where calendars end.
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

    /// The time from `earlier` to `self`; zero if `earlier` is the later one.
    pub(crate) fn since(self, earlier: Self) -> Duration {
        let millis = self.0.saturating_sub(earlier.0);
        Duration::from_millis(u64::try_from(millis).unwrap_or(0))
    }

    pub(crate) fn from_datetime(at: OffsetDateTime) -> Self {
        // A date of the last day of the year 9999 may lie past its end in UTC.
        let millis = at.unix_timestamp_nanos().div_euclid(1_000_000).min(Self::LAST.0.into());
        Self(i64::try_from(millis).unwrap_or(i64::MIN))
    }

    /// `None` for a date outside of what `OffsetDateTime` can hold (the years -9999 to 9999).
    pub(crate) fn to_datetime(self) -> Option<OffsetDateTime> {
        // Not through nanoseconds, of which the division in 128 bits is most of what a hit would cost.
        let (seconds, millis) = (self.0.div_euclid(1_000), self.0.rem_euclid(1_000));
        let at = OffsetDateTime::from_unix_timestamp(seconds).ok()?;
        at.replace_millisecond(u16::try_from(millis).ok()?).ok()
    }
}

/// A session's id, on its way between the public edge and its key.
///
/// Lives no longer than a call. `Debug` shows none of it.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct RawId(pub(crate) i128);

impl RawId {
    /// A fresh id: 128 bits from the generator of tower-sessions, which the system's seeds.
    pub(crate) fn random() -> Self {
        Self(tower_sessions_core::session::Id::default().0)
    }

    pub(crate) fn key(self) -> SessionKey {
        SessionKey::of(self.0)
    }
}

impl fmt::Debug for RawId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("RawId(..)")
    }
}

/// A session without its id.
#[derive(Clone, PartialEq)]
pub(crate) struct Session {
    pub(crate) data: Data,
    pub(crate) expires: WallTime,
}

impl fmt::Debug for Session {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Session").field("expires", &self.expires).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn an_expiry_is_rounded_down_to_the_millisecond(nanos in -377_705_116_800_000_000_000_i128..=253_402_300_799_999_999_999) {
            let at = OffsetDateTime::from_unix_timestamp_nanos(nanos).unwrap();
            let back = WallTime::from_datetime(at).to_datetime().unwrap();
            prop_assert!(back <= at && at - back < time::Duration::MILLISECOND);
        }
    }

    #[test]
    fn a_date_beyond_the_calendar_is_none() {
        assert_eq!(WallTime::from_millis(i64::MAX).to_datetime(), None);
        assert_eq!(WallTime::from_millis(i64::MIN).to_datetime(), None);
    }
}
