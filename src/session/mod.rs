//! A session as both tiers hold it: without its id, and without types of tower-sessions 0.15 or 0.14.

pub(crate) mod handle;
pub(crate) mod id;
pub(crate) mod number;
pub(crate) mod owner;
pub(crate) mod revision;
#[cfg(test)]
pub(crate) mod samples;
pub(crate) mod snapshot;

use std::collections::HashMap;
use std::fmt;

use serde_json::Value;

use crate::session::revision::Rev;
use crate::time::WallTime;

/// What an app keeps in a session. tower-sessions-core 0.15 and 0.14 use the same type.
pub(crate) type Data = HashMap<String, Value>;

/// Whether both have the same text as JSON. Unlike `==`, it distinguishes `0.0` from `-0.0`.
#[cfg(any(test, fuzzing))]
pub(crate) fn same(one: &Data, other: &Data) -> bool {
    let sorted = |data: &Data| {
        serde_json::to_string(&data.iter().collect::<std::collections::BTreeMap<_, _>>()).ok()
    };
    one == other && sorted(one) == sorted(other)
}

/// How many levels of arrays and objects a value in a session may have. Every data format checks it when it
/// encodes and when it decodes, so no session can overflow a stack.
///
/// MongoDB stores documents of [at most 100 levels][limit]. The document and its `data` take two of them.
/// The text format has the same bound, so that a session can be stored in either format.
///
/// [limit]: https://www.mongodb.com/docs/manual/reference/limits/#mongodb-limit-Nested-Depth-for-BSON-Documents
pub(crate) const MAX_DEPTH: usize = 98;

/// Whether both are stored as the same. Unlike `==`, it distinguishes `0.0` from `-0.0`.
pub(crate) fn is_same_data(one: &Data, other: &Data) -> bool {
    one.len() == other.len()
        && one
            .iter()
            .all(|(key, value)| other.get(key).is_some_and(|other| is_same_value(value, other)))
}

/// [`is_same_data`] for one value.
pub(crate) fn is_same_value(one: &Value, other: &Value) -> bool {
    match (one, other) {
        (Value::Number(one), Value::Number(other)) => {
            one == other
                && (!one.is_f64()
                    || one.as_f64().map(f64::to_bits) == other.as_f64().map(f64::to_bits))
        }
        (Value::Array(one), Value::Array(other)) => {
            one.len() == other.len()
                && one.iter().zip(other).all(|(one, other)| is_same_value(one, other))
        }
        // Compares the order of the members too: with `preserve_order` of `serde_json`, a map has one.
        (Value::Object(one), Value::Object(other)) => {
            let is_same_member = |(one, other): ((&String, &Value), (&String, &Value))| {
                one.0 == other.0 && is_same_value(one.1, other.1)
            };
            one.len() == other.len() && one.iter().zip(other).all(is_same_member)
        }
        (one, other) => one == other,
    }
}

/// A session without its id.
#[derive(Clone, PartialEq)]
pub(crate) struct Session {
    pub(crate) data: Data,
    pub(crate) expires: WallTime,
    /// `None` if the stored document has no valid `rev`.
    pub(crate) rev: Option<Rev>,
    /// When the session began, if that is known. A session that gets a new id keeps it.
    pub(crate) created: Option<WallTime>,
}

impl Session {
    /// A session of which nothing else is known.
    pub(crate) fn new(data: Data, expires: WallTime) -> Self {
        Self { data, expires, rev: None, created: None }
    }
}

impl fmt::Debug for Session {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Session").field("expires", &self.expires).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn data_differs_by_the_sign_of_zero_and_by_the_type_of_a_value() {
        let data = |value: Value| Data::from([("a".to_owned(), json!([{ "b": value }]))]);
        for (one, other) in
            [(json!(0.0), json!(-0.0)), (json!(1), json!(1.0)), (json!(1), json!("1"))]
        {
            assert!(!is_same_data(&data(one.clone()), &data(other.clone())), "{one} {other}");
            assert!(is_same_data(&data(one.clone()), &data(one)));
            assert!(is_same_data(&data(other.clone()), &data(other)));
        }
        assert!(!is_same_data(&data(json!(1)), &Data::new()));
        assert!(!is_same_data(&data(json!([])), &data(json!([1]))));
    }
}
