//! `AbsoluteLifetime`: the longest time that a session may live, however often it is used.

use std::time::Duration;

use bson::{Bson, Document, doc};

use crate::mongo::schema::date;
use crate::time::WallTime;

/// The limit that the app has set, if it has. A session counts from its `created`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct AbsoluteLifetime(pub(crate) Option<Duration>);

impl AbsoluteLifetime {
    /// The expiry of a session that would expire at `expires` without the limit. `None` if the limit cannot be
    /// kept, since nobody knows when the session was created.
    pub(crate) fn cap(self, expires: WallTime, created: Option<WallTime>) -> Option<WallTime> {
        match self.0 {
            None => Some(expires),
            Some(limit) => Some(expires.min(created?.after(limit))),
        }
    }

    /// The condition on `created`, in an expression, that a session is within the limit.
    pub(crate) fn condition(self, now: WallTime) -> Option<[Document; 2]> {
        let oldest = date(now.before(self.0?));
        Some([
            doc! { "$gt": ["$created", oldest] },
            doc! { "$eq": [{ "$type": "$created" }, "date"] },
        ])
    }

    /// Adds the same condition to a query.
    pub(crate) fn add_condition(self, query: &mut Document, now: WallTime) {
        if let Some(limit) = self.0 {
            let oldest = date(now.before(limit));
            query.insert("created", doc! { "$gt": oldest, "$not": { "$type": "array" } });
        }
    }

    /// The expression of an expiry with the limit. `created` must be a date.
    pub(crate) fn cap_expression(self, expires: impl Into<Bson>) -> Bson {
        let expires = expires.into();
        match self.0 {
            None => expires,
            Some(limit) => {
                // All dates are before the year 10,000, so the sum does not overflow.
                let millis = WallTime::from_millis(0).after(limit).millis();
                // Not `$dateAdd`, which servers before 5.0 do not know.
                let end = doc! { "$add": [{ "$toLong": "$created" }, millis] };
                doc! { "$min": [expires, { "$toDate": end }] }.into()
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_earlier_of_expiry_and_limit_counts() {
        let limit = AbsoluteLifetime(Some(Duration::from_millis(100)));
        let at = WallTime::from_millis;
        assert_eq!(limit.cap(at(500), Some(at(450))), Some(at(500)));
        assert_eq!(limit.cap(at(500), Some(at(300))), Some(at(400)));
        assert_eq!(limit.cap(at(500), None), None);
        assert_eq!(AbsoluteLifetime(None).cap(at(500), None), Some(at(500)));
    }
}
