//! `Entry`: one cached session.

use std::fmt;
use std::mem::size_of;
use std::sync::Arc;

use serde_json::Value;

use crate::cache::{compact, weight};
use crate::error::{Error, ErrorKind, Result};
use crate::session::{Data, Session};
use crate::time::{Moment, WallTime};

/// A cached session. Cheap to clone, since clones share the payload.
#[derive(Clone)]
pub(crate) struct Entry {
    times: Times,
    expires: WallTime,
    payload: Payload,
}

#[derive(Clone)]
enum Payload {
    Plain(Arc<Plain>),
    /// In the form of [`compact`]. Each load decodes it.
    Compact(Arc<str>),
}

struct Plain {
    data: Data,
    /// Kept, since to compute it visits each value of the data.
    weight: u32,
}

/// What decides for how long an entry may be served.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Times {
    /// The epoch in which the entry may be served.
    pub(crate) epoch: u64,
    /// When the read or the write that the entry comes from began.
    pub(crate) read_at: Moment,
}

impl Entry {
    pub(crate) fn new(session: Session, times: Times) -> Self {
        let Session { data, expires } = session;
        let weight = weight::of_plain(&data, size_of::<Plain>());
        Self { times, expires, payload: Payload::Plain(Arc::new(Plain { data, weight })) }
    }

    /// The same entry in the compact form, or as it is if its data cannot be encoded.
    pub(crate) fn compacted(&self) -> Self {
        let mut entry = self.clone();
        if let Payload::Plain(plain) = &self.payload
            && let Some(encoded) = compact::encode(&plain.data)
        {
            entry.payload = Payload::Compact(encoded);
        }
        entry
    }

    /// A copy of the session.
    pub(crate) fn session(&self) -> Result<Session> {
        let data = match &self.payload {
            Payload::Plain(plain) => plain.data.clone(),
            Payload::Compact(encoded) => compact::decode(encoded).ok_or_else(unreadable)?,
        };
        Ok(Session { data, expires: self.expires })
    }

    /// The same session with another expiry.
    pub(crate) fn with_expiry(&self, expires: WallTime, times: Times) -> Self {
        Self { times, expires, payload: self.payload.clone() }
    }

    /// Whether the session has this data.
    pub(crate) fn has_data(&self, data: &Data) -> bool {
        match &self.payload {
            Payload::Plain(plain) => is_same_data(&plain.data, data),
            Payload::Compact(encoded) => {
                compact::decode(encoded).is_some_and(|decoded| is_same_data(&decoded, data))
            }
        }
    }

    pub(crate) fn expires(&self) -> WallTime {
        self.expires
    }

    pub(crate) fn times(&self) -> &Times {
        &self.times
    }

    /// The bytes of heap that the entry takes, including its part of the cache's tables.
    pub(crate) fn weight(&self) -> u32 {
        match &self.payload {
            Payload::Plain(plain) => plain.weight,
            Payload::Compact(encoded) => weight::of_compact(encoded.len()),
        }
    }
}

/// Whether both are stored as the same. Unlike `==`, it distinguishes `0.0` from `-0.0`.
fn is_same_data(one: &Data, other: &Data) -> bool {
    one.len() == other.len()
        && one
            .iter()
            .all(|(key, value)| other.get(key).is_some_and(|other| is_same_value(value, other)))
}

fn is_same_value(one: &Value, other: &Value) -> bool {
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

#[cold]
fn unreadable() -> Error {
    Error::new(ErrorKind::Decode, "a cached session cannot be read")
}

impl fmt::Debug for Entry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Entry")
            .field("times", &self.times)
            .field("weight", &self.weight())
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::time::Clock;

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

    #[test]
    fn debug_output_has_no_session_data() {
        let times = Times { epoch: 0, read_at: Clock::system().now() };
        let data = Data::from([("card".to_owned(), json!("4111"))]);
        let entry = Entry::new(Session { data, expires: WallTime::from_millis(0) }, times);
        let text = format!("{entry:?}");
        assert!(!text.contains("card") && !text.contains("4111"), "{text}");
    }
}
