//! The text format: data as JSON text. It is the fastest to encode and decode, a single field to the server, and
//! readable for an operator who looks into the collection.
//!
//! `serde_json` writes the text, but the parser in this file reads it, because `serde_json` may read something else
//! than was stored. If any crate of the app enables its feature `raw_value` or `arbitrary_precision` (axum does),
//! `serde_json` takes an object with the key `$serde_json::private::RawValue` or `$serde_json::private::Number` for a
//! value of its own, and parses the string in it again. Any client may send such JSON. A serde `Visitor` could not
//! distinguish a number from such an object, because inside `serde_json` a number calls `visit_map` with that key. To
//! this parser, every key is a key.

use serde_json::{Map, Value};

use crate::error::{Error, Result};
use crate::mongo::codec::{
    MAX_BYTES, too_deep, too_deep_to_read, too_large, unreadable, unstorable,
};
use crate::session::number;
use crate::session::{Data, MAX_DEPTH};

pub(crate) fn encode(data: &Data) -> Result<String> {
    // The encoder recurses without a limit, so the depth is checked first.
    if !data.values().all(|value| fits(value, MAX_DEPTH)) {
        return Err(too_deep());
    }
    let text = serde_json::to_string(data)
        .map_err(|_| unstorable("JSON cannot represent a value in it"))?;
    if text.len() > MAX_BYTES { Err(too_large("JSON")) } else { Ok(text) }
}

fn fits(value: &Value, levels: usize) -> bool {
    match value {
        Value::Array(items) => levels > 0 && items.iter().all(|item| fits(item, levels - 1)),
        Value::Object(map) => levels > 0 && map.values().all(|value| fits(value, levels - 1)),
        _ => true,
    }
}

/// Reads a JSON object. If it has a key twice, the last value counts, as for `serde_json`.
///
/// # Errors
///
/// `Decode`. The error says what is wrong with the text, and does not quote it.
pub(crate) fn decode(text: &str) -> Result<Data> {
    let mut parser = Parser { text, at: 0 };
    parser.skip_space();
    if parser.peek().is_some_and(|byte| byte != b'{') {
        return Err(unreadable("its JSON is no object"));
    }
    parser.expect(b'{')?;
    let mut data = Data::new();
    let mut next = parser.open(b'}')?;
    while next {
        let key = parser.key()?;
        data.insert(key, parser.value(MAX_DEPTH)?);
        next = parser.advance(b'}')?;
    }
    parser.skip_space();
    if parser.peek().is_some() { Err(malformed()) } else { Ok(data) }
}

/// A parser of [JSON](https://www.rfc-editor.org/rfc/rfc8259), as strict as the standard.
struct Parser<'a> {
    text: &'a str,
    /// The index of the next byte. Always at the start of a character.
    at: usize,
}

impl<'a> Parser<'a> {
    /// Reads a value with at most this many levels. This bounds the depth of the calls.
    fn value(&mut self, levels: usize) -> Result<Value> {
        self.skip_space();
        match self.peek().ok_or_else(truncated)? {
            b'"' => self.string().map(Value::String),
            b'{' => self.object(levels),
            b'[' => self.array(levels),
            b'-' | b'0'..=b'9' => self.number(),
            b'n' => self.word("null", Value::Null),
            b't' => self.word("true", Value::Bool(true)),
            b'f' => self.word("false", Value::Bool(false)),
            _ => Err(malformed()),
        }
    }

    fn object(&mut self, levels: usize) -> Result<Value> {
        let levels = levels.checked_sub(1).ok_or_else(too_deep_to_read)?;
        self.at += 1;
        let mut map = Map::new();
        let mut next = self.open(b'}')?;
        while next {
            let key = self.key()?;
            map.insert(key, self.value(levels)?);
            next = self.advance(b'}')?;
        }
        Ok(Value::Object(map))
    }

    fn array(&mut self, levels: usize) -> Result<Value> {
        let levels = levels.checked_sub(1).ok_or_else(too_deep_to_read)?;
        self.at += 1;
        let mut items = Vec::new();
        let mut next = self.open(b']')?;
        while next {
            items.push(self.value(levels)?);
            next = self.advance(b']')?;
        }
        Ok(Value::Array(items))
    }

    /// After an opening bracket: returns whether there is a first element. If not, takes the closing bracket.
    fn open(&mut self, close: u8) -> Result<bool> {
        self.skip_space();
        let is_empty = self.peek().ok_or_else(truncated)? == close;
        self.at += usize::from(is_empty);
        Ok(!is_empty)
    }

    /// After an element: takes the comma or the closing bracket, and returns whether there is another element.
    fn advance(&mut self, close: u8) -> Result<bool> {
        self.skip_space();
        let byte = self.peek().ok_or_else(truncated)?;
        self.at += 1;
        match byte {
            b',' => Ok(true),
            byte if byte == close => Ok(false),
            _ => Err(malformed()),
        }
    }

    /// Reads a key and the colon after it.
    fn key(&mut self) -> Result<String> {
        self.skip_space();
        let key = self.string()?;
        self.skip_space();
        self.expect(b':')?;
        Ok(key)
    }

    fn string(&mut self) -> Result<String> {
        self.expect(b'"')?;
        let plain = self.plain()?;
        if self.peek() == Some(b'"') {
            self.at += 1;
            return Ok(plain.to_owned());
        }
        let mut string = plain.to_owned();
        loop {
            match self.peek().ok_or_else(truncated)? {
                b'"' => {
                    self.at += 1;
                    return Ok(string);
                }
                b'\\' => string.push(self.escape()?),
                // A control character must be escaped.
                0..0x20 => return Err(malformed()),
                _ => string.push_str(self.plain()?),
            }
        }
    }

    /// Takes the text up to the next quotation mark, backslash or control character.
    fn plain(&mut self) -> Result<&'a str> {
        let rest = self.text.as_bytes().get(self.at..).ok_or_else(truncated)?;
        let end = self.at + plain_bytes(rest);
        let plain = self.text.get(self.at..end).ok_or_else(malformed)?;
        self.at = end;
        Ok(plain)
    }

    fn escape(&mut self) -> Result<char> {
        self.at += 1;
        let byte = self.peek().ok_or_else(truncated)?;
        if byte == b'u' {
            return self.escaped_unicode();
        }
        let char = match byte {
            b'"' | b'\\' | b'/' => char::from(byte),
            b'b' => '\u{8}',
            b'f' => '\u{c}',
            b'n' => '\n',
            b'r' => '\r',
            b't' => '\t',
            _ => return Err(malformed()),
        };
        self.at += 1;
        Ok(char)
    }

    /// Reads `uXXXX`, or `uXXXX\uXXXX` for a character that is a surrogate pair in UTF-16.
    fn escaped_unicode(&mut self) -> Result<char> {
        let first = self.utf16()?;
        if let Some(char) = char::from_u32(first.into()) {
            return Ok(char);
        }
        self.expect(b'\\')?;
        let second = self.utf16()?;
        match char::decode_utf16([first, second]).next() {
            Some(Ok(char)) => Ok(char),
            _ => Err(malformed()),
        }
    }

    fn utf16(&mut self) -> Result<u16> {
        self.expect(b'u')?;
        let mut unit = 0;
        for _ in 0..4 {
            let digit = char::from(self.peek().ok_or_else(truncated)?).to_digit(16);
            // Four hexadecimal digits fit into 16 bits.
            unit = unit * 16 + u16::try_from(digit.ok_or_else(malformed)?).unwrap_or(0);
            self.at += 1;
        }
        Ok(unit)
    }

    fn number(&mut self) -> Result<Value> {
        if let Some(whole) = self.small_number() {
            return Ok(Value::from(whole));
        }
        let rest = self.text.get(self.at..).ok_or_else(malformed)?;
        let is_part = |byte: &u8| matches!(byte, b'0'..=b'9' | b'-' | b'+' | b'.' | b'e' | b'E');
        let length = rest.bytes().take_while(is_part).count();
        let text = rest.get(..length).ok_or_else(malformed)?;
        self.at += length;
        match number::parse(text) {
            Some(number) => Ok(Value::Number(number)),
            None if self.peek().is_none() => Err(truncated()),
            None => Err(unreadable(
                "a number in its JSON is malformed, or too large for a 64-bit float",
            )),
        }
    }

    /// Takes a whole number of up to 18 digits, as most numbers are. It does not take `-0`, which is a float.
    fn small_number(&mut self) -> Option<i64> {
        let rest = self.text.as_bytes().get(self.at..)?;
        let is_negative = rest.first() == Some(&b'-');
        let sign = usize::from(is_negative);
        let digits = rest.get(sign..)?;
        let mut whole = 0_i64;
        let mut length = 0;
        while let Some(digit @ b'0'..=b'9') = digits.get(length) {
            if length == 18 {
                return None;
            }
            whole = 10 * whole + i64::from(digit - b'0');
            length += 1;
        }
        let is_longer = matches!(digits.get(length), Some(b'.' | b'e' | b'E' | b'+' | b'-'));
        let has_leading_zero = digits.first() == Some(&b'0') && (length > 1 || is_negative);
        if length == 0 || is_longer || has_leading_zero {
            return None;
        }
        self.at += sign + length;
        Some(if is_negative { -whole } else { whole })
    }

    fn word(&mut self, word: &str, value: Value) -> Result<Value> {
        let rest = self.text.get(self.at..).unwrap_or_default();
        if rest.starts_with(word) {
            self.at += word.len();
            return Ok(value);
        }
        Err(if word.starts_with(rest) { truncated() } else { malformed() })
    }

    fn expect(&mut self, wanted: u8) -> Result<()> {
        if self.peek().ok_or_else(truncated)? != wanted {
            return Err(malformed());
        }
        self.at += 1;
        Ok(())
    }

    fn skip_space(&mut self) {
        while let Some(b' ' | b'\n' | b'\t' | b'\r') = self.peek() {
            self.at += 1;
        }
    }

    fn peek(&self) -> Option<u8> {
        self.text.as_bytes().get(self.at).copied()
    }
}

/// The number of bytes before the first quotation mark, backslash or control character.
///
/// It checks eight bytes at a time: a byte is below `n` if its highest bit is not set, and subtracting `n` borrows
/// from that bit. The borrow may spread to higher bytes, so only the lowest byte that is found counts.
fn plain_bytes(bytes: &[u8]) -> usize {
    const ONES: u64 = u64::from_ne_bytes([1; 8]);
    const HIGHEST: u64 = ONES << 7;
    let (chunks, _) = bytes.as_chunks::<8>();
    for (index, chunk) in chunks.iter().enumerate() {
        let chunk = u64::from_le_bytes(*chunk);
        let below = |bytes: u64, n: u64| bytes.wrapping_sub(ONES * n) & !bytes;
        let control = below(chunk, 0x20);
        let quote = below(chunk ^ (ONES * u64::from(b'"')), 1);
        let backslash = below(chunk ^ (ONES * u64::from(b'\\')), 1);
        let found = (control | quote | backslash) & HIGHEST;
        if found != 0 {
            return 8 * index + found.trailing_zeros() as usize / 8;
        }
    }
    let rest = bytes.get(8 * chunks.len()..).unwrap_or_default();
    let is_plain = |byte: &&u8| !matches!(byte, b'"' | b'\\' | 0..0x20);
    8 * chunks.len() + rest.iter().take_while(is_plain).count()
}

#[cold]
fn truncated() -> Error {
    unreadable("its JSON is truncated")
}

#[cold]
fn malformed() -> Error {
    unreadable("its JSON is malformed")
}

#[cfg(test)]
mod tests;
