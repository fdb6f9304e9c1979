//! The compact form: session data encoded into one block of memory.
//!
//! It is similar to `MessagePack`, with one difference: the whole block is valid UTF-8, since everything
//! but texts is written in bytes below 128. So a text is a slice of the block, and a hit does not validate
//! it again.
//!
//! | first byte | what follows |
//! |---|---|
//! | `NULL`, `FALSE`, `TRUE` | nothing |
//! | `UNSIGNED` | the number as a [varint](Writer::varint) |
//! | `NEGATIVE` | the number as a varint of its complement: 0 is -1, 1 is -2 |
//! | `FLOAT` | the 64 bits, 7 in each byte |
//! | `DIGITS` | a length and a text: any other number (`arbitrary_precision` of `serde_json`) |
//! | `TEXT` | its length in bytes, then the text |
//! | `ARRAY` | the number of values, then the values |
//! | `OBJECT` | the number of members, then a text and a value for each |
//! | `TEXT_OF`, `ARRAY_OF`, `OBJECT_OF` plus a small length | the same without the length |
//! | `SMALL` plus a small number | nothing: it is that number |

use std::sync::Arc;

use serde_json::{Map, Number, Value};

use crate::session::number;
use crate::session::revision::Rev;
use crate::session::{Data, MAX_DEPTH};
use crate::time::WallTime;

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

/// The flags of an [`Origin`].
const HAS_REV: u8 = 0x01;
const HAS_CREATED: u8 = 0x02;
/// How many bytes its parts take: 128 bits and 64 bits.
const REV_BYTES: usize = 19;
const CREATED_BYTES: usize = 10;

/// Arrays and objects shorter than this have a first byte for each length.
const FEW: usize = 8;
/// Texts shorter than this have a first byte for each length.
const SHORT: usize = 32;
/// Numbers below this have a first byte each.
const SMALL_NUMBERS: u64 = 64;

/// What an entry knows of its session beside the data and the expiry. It comes before the data: a byte that says
/// which of the two there are, and then their bits, 7 in each byte. So its length follows from its first byte, and
/// a hit skips it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Origin {
    pub(crate) rev: Option<Rev>,
    pub(crate) created: Option<WallTime>,
}

/// Encodes data with its origin. `None` if a value has more than [`MAX_DEPTH`] levels.
pub(crate) fn encode_with(origin: Origin, data: &Data) -> Option<Arc<str>> {
    let mut writer = Writer(String::with_capacity(256));
    writer.origin(origin);
    writer.data(data)?;
    Some(writer.0.into())
}

/// Decodes the data in what [`encode_with`] has written.
pub(crate) fn decode_with(encoded: &str) -> Option<Data> {
    let which = *encoded.as_bytes().first()?;
    let rev = if which & HAS_REV == 0 { 0 } else { REV_BYTES };
    let created = if which & HAS_CREATED == 0 { 0 } else { CREATED_BYTES };
    Reader { encoded, position: 1 + rev + created }.data()
}

/// Decodes the origin in what [`encode_with`] has written.
pub(crate) fn origin(encoded: &str) -> Option<Origin> {
    Reader { encoded, position: 0 }.origin()
}

/// Encodes data alone. `None` if a value has more than [`MAX_DEPTH`] levels.
#[cfg(any(test, fuzzing, feature = "internals"))]
pub(crate) fn encode(data: &Data) -> Option<Arc<str>> {
    let mut writer = Writer(String::with_capacity(256));
    writer.data(data)?;
    Some(writer.0.into())
}

/// Decodes what [`encode`] has written. `None` for any other text.
#[cfg(any(test, fuzzing))]
pub(crate) fn decode(encoded: &str) -> Option<Data> {
    Reader { encoded, position: 0 }.data()
}

struct Writer(String);

impl Writer {
    fn origin(&mut self, Origin { rev, created }: Origin) {
        let has = |is_there: bool, flag: u8| if is_there { flag } else { 0 };
        self.byte(has(rev.is_some(), HAS_REV) | has(created.is_some(), HAS_CREATED));
        if let Some(rev) = rev {
            self.bits(u128::from_le_bytes(*rev.as_bytes()), REV_BYTES);
        }
        if let Some(created) = created {
            self.bits(created.millis().cast_unsigned().into(), CREATED_BYTES);
        }
    }

    fn bits(&mut self, bits: u128, bytes: usize) {
        for group in 0..bytes {
            #[allow(clippy::cast_possible_truncation, reason = "the mask leaves seven bits")]
            self.byte((bits >> (7 * group) & 0x7f) as u8);
        }
    }

    fn data(&mut self, data: &Data) -> Option<()> {
        self.varint(data.len() as u64);
        for (key, value) in data {
            self.text(key);
            self.value(value, MAX_DEPTH)?;
        }
        Some(())
    }

    /// Writes a value of at most `levels` levels. The limit bounds the recursion.
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

    /// Writes a number in the first form that restores it exactly. With the feature `arbitrary_precision`
    /// of `serde_json`, a number is a text, and many texts read as the same float.
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
                self.masked_byte(bits >> (7 * group), 0x7f);
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

    /// Writes 6 bits in each byte, the lowest first. The seventh bit says that another byte follows.
    fn varint(&mut self, mut number: u64) {
        while number >= 64 {
            self.masked_byte(number | 0x40, 0x7f);
            number >>= 6;
        }
        self.masked_byte(number, 0x3f);
    }

    fn masked_byte(&mut self, bits: u64, mask: u64) {
        #[allow(clippy::cast_possible_truncation, reason = "the mask leaves seven bits")]
        self.byte((bits & mask) as u8);
    }

    fn byte(&mut self, byte: u8) {
        self.0.push(char::from(byte));
    }
}

struct Reader<'a> {
    encoded: &'a str,
    position: usize,
}

impl<'a> Reader<'a> {
    fn origin(&mut self) -> Option<Origin> {
        let which = self.byte()?;
        let mut origin = Origin::default();
        if which & HAS_REV != 0 {
            origin.rev = Rev::from_bytes(&self.bits(REV_BYTES)?.to_le_bytes());
        }
        if which & HAS_CREATED != 0 {
            let millis = u64::try_from(self.bits(CREATED_BYTES)?).ok()?;
            origin.created = Some(WallTime::from_millis(millis.cast_signed()));
        }
        Some(origin)
    }

    fn bits(&mut self, bytes: usize) -> Option<u128> {
        let groups = self.slice(bytes)?.bytes().enumerate();
        Some(groups.fold(0, |bits, (group, byte)| bits | u128::from(byte) << (7 * group)))
    }

    /// Reads data, up to the end.
    fn data(&mut self) -> Option<Data> {
        let count = self.length()?;
        // Bounded by what is left to read, since a wrong count could ask for any amount of memory.
        let mut data = Data::with_capacity(count.min(self.remaining()));
        for _ in 0..count {
            let key = self.key()?;
            data.insert(key, self.value(MAX_DEPTH)?);
        }
        self.is_at_end().then_some(data)
    }

    /// Reads a value of at most `levels` levels. The limit bounds the recursion.
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
            first_byte => Value::String(self.text(first_byte)?),
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
        let first_byte = self.byte()?;
        self.text(first_byte)
    }

    fn text(&mut self, first_byte: u8) -> Option<String> {
        let length = match first_byte {
            TEXT => self.length()?,
            TEXT_OF..SMALL => (first_byte - TEXT_OF).into(),
            _ => return None,
        };
        self.slice(length).map(str::to_owned)
    }

    fn slice(&mut self, length: usize) -> Option<&'a str> {
        let end = self.position.checked_add(length)?;
        let slice = self.encoded.get(self.position..end)?;
        self.position = end;
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

    /// How many bytes are left to read. They hold at most as many values.
    fn remaining(&self) -> usize {
        self.encoded.len().saturating_sub(self.position)
    }

    fn is_at_end(&self) -> bool {
        self.position == self.encoded.len()
    }

    fn byte(&mut self) -> Option<u8> {
        let byte = *self.encoded.as_bytes().get(self.position)?;
        self.position += 1;
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

    /// Includes the keys that `serde_json` uses internally.
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

    #[test]
    fn an_origin_is_restored_and_hides_nothing_of_the_data() {
        let data = Data::from([("a".to_owned(), json!(["é", 1.5]))]);
        let revs = [[0; 16], [0xff; 16], std::array::from_fn(|n| u8::try_from(17 * n).unwrap())];
        let revs = revs.iter().map(|rev| Rev::from_bytes(rev)).chain([None]);
        let times = [0, 1, -1, 1_800_000_000_000, i64::MAX, i64::MIN];
        let times = times.map(|time| Some(WallTime::from_millis(time))).into_iter().chain([None]);
        for rev in revs {
            for created in times.clone() {
                let expected = Origin { rev, created };
                let encoded = encode_with(expected, &data).unwrap();
                assert_eq!(origin(&encoded), Some(expected));
                assert_eq!(decode_with(&encoded).as_ref(), Some(&data));
            }
        }
        for cut_off in ["", "\x01", "\x02", "\x03\x01"] {
            assert_eq!((origin(cut_off), decode_with(cut_off)), (None, None));
        }
    }

    fn data() -> impl Strategy<Value = Data> {
        prop::collection::hash_map(key(), value(), 0..12)
    }

    /// The data as JSON, which distinguishes `0.0` from `-0.0`, and `1` from `1.0`.
    fn to_json(data: &Data) -> String {
        serde_json::to_string(&data.iter().collect::<BTreeMap<_, _>>()).unwrap()
    }

    proptest! {
        #[test]
        fn any_json_decodes_to_what_was_encoded(data in data()) {
            let back = decode(&encode(&data).unwrap()).unwrap();
            prop_assert_eq!(to_json(&data), to_json(&back));
            prop_assert_eq!(data, back);
        }

        #[test]
        fn decoding_any_text_does_not_panic(garbage in text()) {
            let _ = decode(&garbage);
        }

        #[test]
        fn a_truncated_text_does_not_decode(data in data(), end in any::<prop::sample::Index>()) {
            let encoded = encode(&data).unwrap();
            let truncated = encoded.get(..end.index(encoded.len())).unwrap_or_default();
            prop_assert_eq!(decode(truncated), None);
        }
    }

    #[test]
    fn a_text_with_trailing_bytes_does_not_decode() {
        let encoded = encode(&Data::from([("a".to_owned(), json!(1))])).unwrap();
        assert_eq!(decode(&format!("{encoded}\0")), None);
    }

    #[test]
    fn data_is_encoded_up_to_the_maximum_depth() {
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
    fn a_text_that_is_nested_too_deeply_does_not_decode() {
        let array_of_one = char::from(ARRAY_OF + 1).to_string();
        let object_of_one = format!("{}!k", char::from(OBJECT_OF + 1));
        for level in [array_of_one, object_of_one] {
            for (levels, is_data) in [(MAX_DEPTH, true), (MAX_DEPTH + 1, false), (100_000, false)] {
                let encoded = format!("\u{1}!a{}\0", level.repeat(levels));
                let decodes = move || assert_eq!(decode(&encoded).is_some(), is_data, "{levels}");
                let thread = std::thread::Builder::new().stack_size(2 << 20).spawn(decodes);
                thread.unwrap().join().unwrap();
            }
        }
    }
}
