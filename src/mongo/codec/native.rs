//! The native format: data as a document that MongoDB can query.
//!
//! | JSON | BSON |
//! |---|---|
//! | null, true, text, array, object | the same |
//! | whole number that fits `i64` | Int64 |
//! | whole number above `i64::MAX` | Decimal128 |
//! | number with a fraction or exponent | Double |
//!
//! If the app enables the feature `arbitrary_precision` of `serde_json`, a number is its text. If none of these types
//! gives back that text, the number is stored as another type:
//!
//! | JSON | BSON |
//! |---|---|
//! | text of a Decimal128: `1.10`, `1e+5`, up to 34 digits | Decimal128 |
//! | any other | Binary of the subtype 128: the text |
//!
//! In keys, `%`, `.`, NUL and a leading `$` are percent-escaped, so every server and query language takes them.
//! Nothing is read as extended JSON: `{"$oid": …}` stays an object.

use std::borrow::Cow;

use bson::spec::BinarySubtype;
use bson::{Binary, Bson, Decimal128, Document, RawBsonRef, RawDocument};
use serde_json::{Map, Number, Value};

use crate::error::{Error, Result};
use crate::mongo::codec::{
    MALFORMED, MAX_BYTES, too_deep, too_deep_to_read, too_large, unreadable,
};
use crate::session::number;
use crate::session::{Data, MAX_DEPTH};

/// The subtype of a Binary with the text of a number: the first subtype that MongoDB leaves to apps.
const NUMBER_TEXT: BinarySubtype = BinarySubtype::UserDefined(0x80);

/// Encodes a session's data. Also returns its size in bytes of BSON.
pub(crate) fn encode(data: &Data) -> Result<(Document, usize)> {
    let mut encoder = Encoder { bytes: 5 };
    let mut document = Document::new();
    for (key, value) in data {
        let key = encoder.key(key)?;
        document.insert(key, encoder.value(value, 1)?);
    }
    Ok((document, encoder.bytes))
}

/// Encodes one value of a session's data.
pub(crate) fn encode_value(value: &Value) -> Result<Bson> {
    Encoder { bytes: 5 }.value(value, 1)
}

struct Encoder {
    /// The size of the BSON so far.
    bytes: usize,
}

impl Encoder {
    fn take(&mut self, bytes: usize) -> Result<()> {
        self.bytes = self.bytes.saturating_add(bytes);
        if self.bytes <= MAX_BYTES {
            return Ok(());
        }
        Err(too_large("BSON"))
    }

    /// Accounts for an element's type, key and the key's end.
    fn key(&mut self, key: &str) -> Result<String> {
        let escaped = escape(key).into_owned();
        self.take(escaped.len() + 2)?;
        Ok(escaped)
    }

    fn value(&mut self, value: &Value, depth: usize) -> Result<Bson> {
        match value {
            Value::Null => Ok(Bson::Null),
            Value::Bool(value) => {
                self.take(1)?;
                Ok(Bson::Boolean(*value))
            }
            Value::Number(number) => self.number(number),
            Value::String(text) => {
                self.take(text.len() + 5)?;
                Ok(Bson::String(text.clone()))
            }
            Value::Array(items) => {
                self.nest(depth)?;
                let mut array = Vec::with_capacity(items.len());
                for (index, item) in items.iter().enumerate() {
                    self.take(2 + index.checked_ilog10().unwrap_or(0) as usize + 1)?;
                    array.push(self.value(item, depth + 1)?);
                }
                Ok(Bson::Array(array))
            }
            Value::Object(map) => {
                self.nest(depth)?;
                let mut document = Document::new();
                for (key, value) in map {
                    let key = self.key(key)?;
                    document.insert(key, self.value(value, depth + 1)?);
                }
                Ok(Bson::Document(document))
            }
        }
    }

    fn nest(&mut self, depth: usize) -> Result<()> {
        if depth > MAX_DEPTH {
            return Err(too_deep());
        }
        self.take(5)
    }

    /// Takes the first type from which the same number is read back. With `arbitrary_precision`, two numbers are the
    /// same only if their texts are.
    fn number(&mut self, number: &Number) -> Result<Bson> {
        if let Some(whole) = number.as_i64()
            && Number::from(whole) == *number
        {
            self.take(8)?;
            return Ok(Bson::Int64(whole));
        }
        if let Some(whole) = number.as_u64()
            && Number::from(whole) == *number
        {
            self.take(16)?;
            return Ok(Bson::Decimal128(decimal(whole)));
        }
        if let Some(double) = number.as_f64()
            && Number::from_f64(double).as_ref() == Some(number)
        {
            self.take(8)?;
            return Ok(Bson::Double(double));
        }
        let text = number.to_string();
        if let Ok(decimal) = text.parse::<Decimal128>()
            && text_of(decimal) == text
        {
            self.take(16)?;
            return Ok(Bson::Decimal128(decimal));
        }
        self.take(5 + text.len())?;
        Ok(Bson::Binary(Binary { subtype: NUMBER_TEXT, bytes: text.into_bytes() }))
    }
}

/// Decodes a session's data.
pub(crate) fn decode(document: &RawDocument) -> Result<Data> {
    let mut data = Data::new();
    for element in document.iter_elements() {
        let element = element.map_err(|_| malformed())?;
        let key = unescape(element.key().as_str())?;
        let value = decode_value(element.value().map_err(|_| malformed())?, MAX_DEPTH)?;
        if data.insert(key, value).is_some() {
            return Err(unreadable("its data has a key twice"));
        }
    }
    Ok(data)
}

/// Decodes a value with at most this many levels. This bounds the depth of the calls.
fn decode_value(value: RawBsonRef<'_>, levels: usize) -> Result<Value> {
    match value {
        RawBsonRef::Null => Ok(Value::Null),
        RawBsonRef::Boolean(value) => Ok(Value::Bool(value)),
        RawBsonRef::Int64(whole) => Ok(whole.into()),
        // This store writes 64 bits, but an operator's shell writes others.
        RawBsonRef::Int32(whole) => Ok(whole.into()),
        RawBsonRef::Double(double) => Number::from_f64(double)
            .map(Value::Number)
            .ok_or_else(|| unreadable("its data holds a number that is not finite")),
        RawBsonRef::Decimal128(wide) => {
            let number = match whole(wide) {
                Some(whole) => Some(whole.into()),
                None => number::parse(&text_of(wide)),
            };
            number.map(Value::Number).ok_or_else(|| {
                unreadable(
                    "its data holds a Decimal128 that is not finite, or too large for a 64-bit float",
                )
            })
        }
        RawBsonRef::Binary(text) if text.subtype == NUMBER_TEXT => {
            let number = std::str::from_utf8(text.bytes).ok().and_then(number::parse);
            number.map(Value::Number).ok_or_else(|| {
                unreadable(
                    "its data holds a Binary of the subtype 128 that is no number, or one too large \
                     for a 64-bit float",
                )
            })
        }
        RawBsonRef::String(text) => Ok(Value::String(text.to_owned())),
        RawBsonRef::Array(array) => {
            let levels = levels.checked_sub(1).ok_or_else(too_deep_to_read)?;
            let mut items = Vec::new();
            for item in array {
                items.push(decode_value(item.map_err(|_| malformed())?, levels)?);
            }
            Ok(Value::Array(items))
        }
        RawBsonRef::Document(document) => {
            let levels = levels.checked_sub(1).ok_or_else(too_deep_to_read)?;
            let mut map = Map::new();
            for element in document.iter_elements() {
                let element = element.map_err(|_| malformed())?;
                let key = unescape(element.key().as_str())?;
                let value = element.value().map_err(|_| malformed())?;
                if map.insert(key, decode_value(value, levels)?).is_some() {
                    return Err(unreadable("its data has a key twice"));
                }
            }
            Ok(Value::Object(map))
        }
        other => Err(unreadable(format!(
            "its data holds a {:?}, which JSON does not have",
            other.element_type()
        ))),
    }
}

/// The JSON text of a Decimal128, as `serde_json` writes exponents.
fn text_of(decimal: Decimal128) -> String {
    decimal.to_string().to_ascii_lowercase()
}

/// A Decimal128 with the exponent zero. Its layout by the specification: a sign, 14 bits of exponent with a bias of
/// 6176, and 113 bits of coefficient, little-endian.
/// <https://github.com/mongodb/specifications/blob/master/source/bson-decimal128/decimal128.md>
fn decimal(whole: u64) -> Decimal128 {
    Decimal128::from_bytes((EXPONENT_ZERO | u128::from(whole)).to_le_bytes())
}

fn whole(decimal: Decimal128) -> Option<u64> {
    u64::try_from(u128::from_le_bytes(decimal.bytes()).checked_sub(EXPONENT_ZERO)?).ok()
}

const EXPONENT_ZERO: u128 = 6176 << 113;

pub(crate) fn escape(key: &str) -> Cow<'_, str> {
    if !key.starts_with('$') && !key.contains(['%', '.', '\0']) {
        return Cow::Borrowed(key);
    }
    let mut escaped = String::with_capacity(key.len() + 8);
    for (index, char) in key.char_indices() {
        match char {
            '%' => escaped.push_str("%25"),
            '.' => escaped.push_str("%2E"),
            '\0' => escaped.push_str("%00"),
            '$' if index == 0 => escaped.push_str("%24"),
            other => escaped.push(other),
        }
    }
    Cow::Owned(escaped)
}

fn unescape(key: &str) -> Result<String> {
    let Some((plain, mut rest)) = key.split_once('%') else { return Ok(key.to_owned()) };
    let mut unescaped = String::with_capacity(key.len());
    unescaped.push_str(plain);
    loop {
        let (char, after) = match rest.as_bytes() {
            [b'2', b'5', ..] => ('%', &rest[2..]),
            [b'2', b'E', ..] => ('.', &rest[2..]),
            [b'0', b'0', ..] => ('\0', &rest[2..]),
            [b'2', b'4', ..] => ('$', &rest[2..]),
            _ => {
                return Err(unreadable(
                    "a key of its data holds a `%` that begins no known escape",
                ));
            }
        };
        unescaped.push(char);
        let Some((plain, next)) = after.split_once('%') else {
            unescaped.push_str(after);
            return Ok(unescaped);
        };
        unescaped.push_str(plain);
        rest = next;
    }
}

fn malformed() -> Error {
    unreadable(MALFORMED)
}

#[cfg(test)]
mod tests;
