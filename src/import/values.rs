//! [`Values`]: reads the data in a record of tower-sessions from `MessagePack`.
//!
//! `serde_json::Value` does not do: if any crate of the app enables its feature `raw_value`, it takes an
//! object with the key `$serde_json::private::RawValue` for JSON text, and parses that text. Here every key
//! is a key.

use std::fmt;

use serde::de::{Deserialize, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Number, Value};

use crate::session::Data;

pub(crate) struct Values(pub(crate) Data);

impl<'de> Deserialize<'de> for Values {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(ValuesVisitor).map(Self)
    }
}

struct ValuesVisitor;

impl<'de> Visitor<'de> for ValuesVisitor {
    type Value = Data;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a map")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Data, A::Error> {
        let mut data = Data::new();
        while let Some((key, Json(value))) = map.next_entry()? {
            data.insert(key, value);
        }
        Ok(data)
    }
}

/// A JSON value. The deserializer bounds its depth.
struct Json(Value);

impl<'de> Deserialize<'de> for Json {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(JsonVisitor).map(Self)
    }
}

struct JsonVisitor;

impl<'de> Visitor<'de> for JsonVisitor {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a value of JSON")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(value.into())
    }

    /// As in `serde_json`, a float that is not finite becomes null.
    fn visit_f64<E>(self, value: f64) -> Result<Value, E> {
        Ok(Number::from_f64(value).map_or(Value::Null, Value::Number))
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut sequence: A) -> Result<Value, A::Error> {
        let mut items = Vec::new();
        while let Some(Json(item)) = sequence.next_element()? {
            items.push(item);
        }
        Ok(Value::Array(items))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Value, A::Error> {
        let mut object = Map::new();
        while let Some((key, Json(value))) = map.next_entry()? {
            object.insert(key, value);
        }
        Ok(Value::Object(object))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;
    use crate::import::{LegacySession, fuzzing, read};
    use crate::session::same;
    use crate::session::samples::{bomb, data, hostile, nested, on_a_small_stack};

    fn imported(data: &Data) -> Result<Data, &'static str> {
        let record = rmp_serde::to_vec(&(fuzzing::NUMBER, data, json!([2026, 1]))).unwrap();
        read(&fuzzing::old(&record)).map(|LegacySession { data, .. }| data)
    }

    /// Returns the data as the other store itself reads it. With `arbitrary_precision`, a number is a struct
    /// of one text for `serde`, and an array in `MessagePack`.
    fn in_the_old_store(data: &Data) -> Data {
        data.iter().map(|(key, value)| (key.clone(), old_value(value))).collect()
    }

    fn old_value(value: &Value) -> Value {
        let is_text = size_of::<Number>() == size_of::<String>();
        match value {
            Value::Number(number) if is_text => json!([number.to_string()]),
            Value::Array(items) => items.iter().map(old_value).collect(),
            Value::Object(map) => {
                map.iter().map(|(key, value)| (key.clone(), old_value(value))).collect()
            }
            other => other.clone(),
        }
    }

    proptest! {
        #[test]
        fn data_that_another_store_wrote_is_read(data in data()) {
            prop_assert!(same(&imported(&data).unwrap(), &in_the_old_store(&data)));
        }
    }

    #[test]
    fn keys_that_serde_json_reserves_are_plain_keys() {
        on_a_small_stack("importing", || {
            for data in hostile().iter().chain(&[bomb(20), nested(98)]) {
                assert!(same(&imported(data).unwrap(), &in_the_old_store(data)), "{data:?}");
            }
        });
    }

    #[test]
    fn a_record_that_is_too_deeply_nested_is_unreadable() {
        on_a_small_stack("importing", || {
            for level in [&[0x91][..], &[0x81, 0xa1, b'k']] {
                for start in [&[0x93, 7, 0x81, 0xa1, b'a'][..], &[0x93, 7, 0x80], &[]] {
                    let record = [start, &level.repeat(100_000)].concat();
                    assert!(read(&fuzzing::old(&record)).is_err());
                }
            }
        });
    }
}
