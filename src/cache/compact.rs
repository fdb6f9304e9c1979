//! Session data in one block of memory: the compact form of an entry.
//!
//! Like `MessagePack`, with one difference. All of it is valid UTF-8: what is no text is written in
//! bytes below 128. So a text is a slice of it, and none is validated again at each hit.
//!
//! | byte | what follows |
//! |---|---|
//! | `NULL`, `FALSE`, `TRUE` | nothing |
//! | `UNSIGNED`, `NEGATIVE` | a [varint](Writer::varint): the number, or how far it is below -1 |
//! | `FLOAT` | the 64 bits, seven to a byte |
//! | `DIGITS` | length, text: a number that is none of these (`arbitrary_precision`) |
//! | `TEXT`, `ARRAY`, `OBJECT` | length or count, and so many bytes, values, or texts and values |
//! | the same plus a small length, and `SMALL` plus a small number | as above, without the length |

use std::sync::Arc;

use serde_json::{Map, Number, Value};

use crate::session::number;
use crate::session::{Data, MAX_DEPTH};

const NULL: u8 = 0x00;
const FALSE: u8 = 0x01;
const TRUE: u8 = 0x02;
const UNSIGNED: u8 = 0x03;
const NEGATIVE: u8 = 0x04;
const FLOAT: u8 = 0x05;
const DIGITS: u8 = 0x06;
const TEXT: u8 = 0x07;
const ARRAY: u8 = 0x08;
const OBJECT: u8 = 0x09;
const ARRAY_OF: u8 = 0x0a;
const OBJECT_OF: u8 = 0x12;
const TEXT_OF: u8 = 0x20;
const SMALL: u8 = 0x40;

/// How many lengths have a byte of their own.
const FEW: usize = 8;
const SHORT: usize = 32;
const SMALL_NUMBERS: u64 = 64;

/// `None` for what is nested too deeply.
pub(crate) fn encode(data: &Data) -> Option<Arc<str>> {
    let mut writer = Writer(String::with_capacity(256));
    writer.varint(data.len() as u64);
    for (key, value) in data {
        writer.text(key);
        writer.value(value, MAX_DEPTH)?;
    }
    Some(writer.0.into())
}

/// `None` for what [`encode`] has not written.
pub(crate) fn decode(packed: &str) -> Option<Data> {
    let mut reader = Reader { packed, at: 0 };
    let count = reader.length()?;
    // No more is set aside than there can be, whatever the count says.
    let mut data = Data::with_capacity(count.min(reader.remaining()));
    for _ in 0..count {
        let key = reader.key()?;
        data.insert(key, reader.value(MAX_DEPTH)?);
    }
    reader.is_at_end().then_some(data)
}

struct Writer(String);

impl Writer {
    /// Packs a value with at most this many levels. This bounds the depth of the calls.
    fn value(&mut self, value: &Value, levels: usize) -> Option<()> {
        match value {
            Value::Null => self.byte(NULL),
            Value::Bool(false) => self.byte(FALSE),
            Value::Bool(true) => self.byte(TRUE),
            Value::Number(number) => self.number(number),
            Value::String(text) => self.text(text),
            Value::Array(items) => {
                let levels = levels.checked_sub(1)?;
                self.length(ARRAY, ARRAY_OF, FEW, items.len());
                for item in items {
                    self.value(item, levels)?;
                }
            }
            Value::Object(map) => {
                let levels = levels.checked_sub(1)?;
                self.length(OBJECT, OBJECT_OF, FEW, map.len());
                for (key, value) in map {
                    self.text(key);
                    self.value(value, levels)?;
                }
            }
        }
        Some(())
    }

    /// A number comes back as it was, which is checked here: with the feature `arbitrary_precision` of
    /// `serde_json` it may
    /// be any text, and one that reads as a float may be written in many ways.
    fn number(&mut self, number: &Number) {
        if let Some(unsigned) = number.as_u64()
            && Number::from(unsigned) == *number
        {
            if unsigned < SMALL_NUMBERS {
                #[allow(clippy::cast_possible_truncation, reason = "it is below 64")]
                return self.byte(SMALL + unsigned as u8);
            }
            self.byte(UNSIGNED);
            self.varint(unsigned);
        } else if let Some(signed) = number.as_i64()
            && Number::from(signed) == *number
        {
            self.byte(NEGATIVE);
            self.varint(!signed.cast_unsigned());
        } else if let Some(float) = number.as_f64()
            && Number::from_f64(float).as_ref() == Some(number)
        {
            self.byte(FLOAT);
            let bits = float.to_bits();
            for group in 0..10 {
                self.low(bits >> (7 * group), 0x7f);
            }
        } else {
            let digits = number.to_string();
            self.byte(DIGITS);
            self.varint(digits.len() as u64);
            self.0.push_str(&digits);
        }
    }

    fn text(&mut self, text: &str) {
        self.length(TEXT, TEXT_OF, SHORT, text.len());
        self.0.push_str(text);
    }

    fn length(&mut self, long: u8, short: u8, limit: usize, length: usize) {
        if length < limit {
            #[allow(clippy::cast_possible_truncation, reason = "it is below the limit")]
            return self.byte(short + length as u8);
        }
        self.byte(long);
        self.varint(length as u64);
    }

    /// Six bits to a byte, the lowest first; a seventh says that there are more.
    fn varint(&mut self, mut number: u64) {
        while number >= 64 {
            self.low(number | 0x40, 0x7f);
            number >>= 6;
        }
        self.low(number, 0x3f);
    }

    fn low(&mut self, bits: u64, mask: u64) {
        #[allow(clippy::cast_possible_truncation, reason = "the mask leaves seven bits")]
        self.byte((bits & mask) as u8);
    }

    fn byte(&mut self, byte: u8) {
        self.0.push(char::from(byte));
    }
}

struct Reader<'a> {
    packed: &'a str,
    at: usize,
}

impl<'a> Reader<'a> {
    /// Unpacks a value with at most this many levels. This bounds the depth of the calls.
    fn value(&mut self, levels: usize) -> Option<Value> {
        Some(match self.byte()? {
            NULL => Value::Null,
            FALSE => Value::Bool(false),
            TRUE => Value::Bool(true),
            UNSIGNED => self.varint()?.into(),
            NEGATIVE => (!self.varint()?).cast_signed().into(),
            FLOAT => {
                let mut bits = 0;
                for group in 0..10 {
                    bits |= u64::from(self.byte()?) << (7 * group);
                }
                Value::Number(Number::from_f64(f64::from_bits(bits))?)
            }
            DIGITS => {
                let length = self.length()?;
                Value::Number(number::parse(self.slice(length)?)?)
            }
            ARRAY => {
                let count = self.length()?;
                self.array(count, levels)?
            }
            OBJECT => {
                let count = self.length()?;
                self.object(count, levels)?
            }
            few @ ARRAY_OF..OBJECT_OF => self.array((few - ARRAY_OF).into(), levels)?,
            few @ OBJECT_OF..0x1a => self.object((few - OBJECT_OF).into(), levels)?,
            small @ SMALL.. => (small - SMALL).into(),
            text => Value::String(self.text(text)?),
        })
    }

    fn array(&mut self, count: usize, levels: usize) -> Option<Value> {
        let levels = levels.checked_sub(1)?;
        let mut items = Vec::with_capacity(count.min(self.remaining()));
        for _ in 0..count {
            items.push(self.value(levels)?);
        }
        Some(Value::Array(items))
    }

    fn object(&mut self, count: usize, levels: usize) -> Option<Value> {
        let levels = levels.checked_sub(1)?;
        let mut map = Map::new();
        for _ in 0..count {
            let key = self.key()?;
            map.insert(key, self.value(levels)?);
        }
        Some(Value::Object(map))
    }

    fn key(&mut self) -> Option<String> {
        let byte = self.byte()?;
        self.text(byte)
    }

    fn text(&mut self, byte: u8) -> Option<String> {
        let length = match byte {
            TEXT => self.length()?,
            TEXT_OF..SMALL => (byte - TEXT_OF).into(),
            _ => return None,
        };
        self.slice(length).map(str::to_owned)
    }

    fn slice(&mut self, length: usize) -> Option<&'a str> {
        let end = self.at.checked_add(length)?;
        let slice = self.packed.get(self.at..end)?;
        self.at = end;
        Some(slice)
    }

    fn length(&mut self) -> Option<usize> {
        self.varint()?.try_into().ok()
    }

    fn varint(&mut self) -> Option<u64> {
        let mut number = 0;
        for group in 0..11 {
            let byte = self.byte()?;
            number |= u64::from(byte & 0x3f) << (6 * group);
            if byte < 0x40 {
                return Some(number);
            }
        }
        None
    }

    /// How many bytes are left to read, which is at least the number of values in them.
    fn remaining(&self) -> usize {
        self.packed.len() - self.at
    }

    fn is_at_end(&self) -> bool {
        self.at == self.packed.len()
    }

    fn byte(&mut self) -> Option<u8> {
        let byte = *self.packed.as_bytes().get(self.at)?;
        self.at += 1;
        Some(byte)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    fn text() -> impl Strategy<Value = String> {
        prop_oneof![any::<String>(), "[a-z]{0,40}", "[\\x00-\\x7f]{28,36}", "é{60,70}"]
    }

    /// Some are those that `serde_json` uses for values of its own.
    fn key() -> impl Strategy<Value = String> {
        prop_oneof![text(), "\\$serde_json::private::(RawValue|Number)",]
    }

    fn value() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            any::<u64>().prop_map(Value::from),
            (0..70_u64).prop_map(Value::from),
            (-70..0_i64).prop_map(Value::from),
            any::<f64>().prop_filter("JSON has no others", |n| n.is_finite()).prop_map(Value::from),
            Just(json!(i64::MIN)),
            Just(json!(u64::MAX)),
            Just(json!(1.0)),
            Just(json!(-0.0)),
            Just(json!(5e-324)),
            "-?(0|[1-9][0-9]{0,60})(\\.[0-9]{1,40})?([eE][+-]?[0-9]{1,4})?"
                .prop_filter_map("it is beyond a 64-bit float", |text| text.parse().ok())
                .prop_map(Value::Number),
            text().prop_map(Value::from),
        ];
        leaf.prop_recursive(6, 64, 12, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..12).prop_map(Value::from),
                prop::collection::btree_map(key(), inner, 0..12)
                    .prop_map(|map| Value::Object(map.into_iter().collect())),
            ]
        })
    }

    fn data() -> impl Strategy<Value = Data> {
        prop::collection::hash_map(key(), value(), 0..12)
    }

    /// Which keeps `0.0` and `-0.0` apart, and `1` from `1.0`.
    fn written(data: &Data) -> String {
        serde_json::to_string(&data.iter().collect::<BTreeMap<_, _>>()).unwrap()
    }

    proptest! {
        #[test]
        fn whatever_json_is_packed_comes_out(data in data()) {
            let back = decode(&encode(&data).unwrap()).unwrap();
            prop_assert_eq!(written(&data), written(&back));
            prop_assert_eq!(data, back);
        }

        #[test]
        fn what_nobody_packed_is_no_data_and_no_panic(garbage in text()) {
            drop(decode(&garbage));
        }

        #[test]
        fn a_part_of_it_is_no_data(data in data(), part in any::<prop::sample::Index>()) {
            let packed = encode(&data).unwrap();
            let part = packed.get(..part.index(packed.len())).unwrap_or_default();
            prop_assert_eq!(decode(part), None);
        }
    }

    #[test]
    fn more_behind_it_is_no_data() {
        let packed = encode(&Data::from([("a".to_owned(), json!(1))])).unwrap();
        assert_eq!(decode(&format!("{packed}\0")), None);
    }

    #[test]
    fn what_is_nested_as_deeply_as_the_database_takes_is_packed_and_what_is_deeper_is_not() {
        let nested = |levels| {
            let value = (0..levels).fold(json!(1), |inside, level| match level % 2 {
                0 => json!([inside]),
                _ => json!({ "in": inside }),
            });
            Data::from([("deep".to_owned(), value)])
        };
        let deep = nested(MAX_DEPTH);
        assert_eq!(decode(&encode(&deep).unwrap()).unwrap(), deep);
        assert_eq!(encode(&nested(MAX_DEPTH + 1)), None);
    }

    #[test]
    fn what_is_deeper_than_it_is_packed_is_no_data() {
        let array_of_one = char::from(ARRAY_OF + 1).to_string();
        let object_of_one = format!("{}!k", char::from(OBJECT_OF + 1));
        for level in [array_of_one, object_of_one] {
            for (levels, is_data) in [(MAX_DEPTH, true), (MAX_DEPTH + 1, false), (100_000, false)] {
                let packed = format!("\u{1}!a{}\0", level.repeat(levels));
                let unpacks = move || assert_eq!(decode(&packed).is_some(), is_data, "{levels}");
                let thread = std::thread::Builder::new().stack_size(2 << 20).spawn(unpacks);
                thread.unwrap().join().unwrap();
            }
        }
    }
}
