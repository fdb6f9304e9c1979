//! One command and its reply over MongoDB's wire protocol, without a driver.
//!
//! A server's set-up needs only three plain commands (mostly `hello`), so this spares the crate a
//! driver and an async runtime.

use std::io::{self, Read, Write};

/// A BSON document that is being built.
#[derive(Default)]
pub(crate) struct Doc(Vec<u8>);

impl Doc {
    fn name(&mut self, kind: u8, key: &str) {
        self.0.push(kind);
        self.0.extend_from_slice(key.as_bytes());
        self.0.push(0);
    }

    pub(crate) fn int(mut self, key: &str, value: i32) -> Self {
        self.name(0x10, key);
        self.0.extend_from_slice(&value.to_le_bytes());
        self
    }

    pub(crate) fn text(mut self, key: &str, value: &str) -> Self {
        self.name(0x02, key);
        self.0.extend_from_slice(&length(value.len() + 1));
        self.0.extend_from_slice(value.as_bytes());
        self.0.push(0);
        self
    }

    pub(crate) fn doc(mut self, key: &str, value: &Self) -> Self {
        self.name(0x03, key);
        self.0.extend_from_slice(&value.bytes());
        self
    }

    /// An array is a document whose keys are "0", "1" and so on.
    pub(crate) fn array(mut self, key: &str, value: &Self) -> Self {
        self.name(0x04, key);
        self.0.extend_from_slice(&value.bytes());
        self
    }

    fn bytes(&self) -> Vec<u8> {
        let mut out = length(self.0.len() + 5).to_vec();
        out.extend_from_slice(&self.0);
        out.push(0);
        out
    }
}

/// The lengths of the messages of this file: a few hundred bytes.
fn length(len: usize) -> [u8; 4] {
    u32::try_from(len).unwrap_or(u32::MAX).to_le_bytes()
}

/// The document of a reply.
pub(crate) struct Reply(Vec<u8>);

impl Reply {
    /// Whether the top-level field `key` is true, or a number other than 0.
    pub(crate) fn is_true(&self, key: &str) -> bool {
        match self.field(key) {
            Some((0x08, value)) => value.first() == Some(&1),
            Some((0x01, value)) => {
                value.try_into().is_ok_and(|bytes| f64::from_le_bytes(bytes) != 0.0)
            }
            Some((0x10 | 0x12, value)) => value.iter().any(|byte| *byte != 0),
            _ => false,
        }
    }

    /// The top-level text field `key`.
    pub(crate) fn text(&self, key: &str) -> Option<String> {
        let (kind, value) = self.field(key)?;
        let text = value.get(4..value.len().checked_sub(1)?)?;
        (kind == 0x02).then(|| String::from_utf8_lossy(text).into_owned())
    }

    /// The top-level number field `key`, if it has 32 bits.
    pub(crate) fn int(&self, key: &str) -> Option<i32> {
        match self.field(key)? {
            (0x10, value) => Some(i32::from_le_bytes(value.try_into().ok()?)),
            _ => None,
        }
    }

    /// Type and value of a top-level field. `None` also if a field before it has an unknown type.
    fn field(&self, key: &str) -> Option<(u8, &[u8])> {
        let mut rest = self.0.get(4..)?;
        loop {
            let (&kind, after) = rest.split_first()?;
            let end = after.iter().position(|byte| *byte == 0)?;
            let value = &after[end + 1..];
            let len = match kind {
                0x01 | 0x09 | 0x11 | 0x12 => 8,
                0x02 => int_at(value)?.checked_add(4)?,
                0x03 | 0x04 => int_at(value)?,
                0x05 => int_at(value)?.checked_add(5)?,
                0x07 => 12,
                0x08 => 1,
                0x0A => 0,
                0x10 => 4,
                0x13 => 16,
                _ => return None,
            };
            let value = value.get(..len)?;
            if &after[..end] == key.as_bytes() {
                return Some((kind, value));
            }
            rest = &after[end + 1 + len..];
        }
    }
}

fn int_at(bytes: &[u8]) -> Option<usize> {
    let bytes = bytes.get(..4)?.try_into().ok()?;
    usize::try_from(u32::from_le_bytes(bytes)).ok()
}

/// Sends `command` (without its `$db`) to the admin database and reads the reply.
pub(crate) fn ask(stream: &mut (impl Read + Write), command: Doc) -> io::Result<Reply> {
    const OP_MSG: [u8; 4] = 2013_u32.to_le_bytes();
    // Far more than any reply during the set-up.
    const LONGEST: usize = 1 << 20;

    let body = command.text("$db", "admin").bytes();
    let mut message = length(16 + 4 + 1 + body.len()).to_vec();
    message.extend_from_slice(&[1, 0, 0, 0, 0, 0, 0, 0]); // request 1, answer to none
    message.extend_from_slice(&OP_MSG);
    message.extend_from_slice(&[0; 5]); // no flags; one section, of kind 0
    message.extend_from_slice(&body);
    stream.write_all(&message)?;
    stream.flush()?;

    let mut head = [0; 21];
    stream.read_exact(&mut head)?;
    let total = int_at(&head).unwrap_or_default();
    if head[12..16] != OP_MSG || head[20] != 0 || !(26..LONGEST).contains(&total) {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "the answer is no MongoDB message"));
    }
    let mut body = vec![0; total - head.len()];
    stream.read_exact(&mut body)?;
    Ok(Reply(body))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_document_is_written_as_bson_says() {
        let inner = Doc::default().text("0", "root");
        let doc = Doc::default().int("a", 2).array("r", &inner);
        let inner = b"\x11\0\0\0\x020\0\x05\0\0\0root\0\0";
        let mut expected = b"\x1c\0\0\0\x10a\0\x02\0\0\0\x04r\0".to_vec();
        expected.extend_from_slice(inner);
        expected.push(0);
        expected[0] = u8::try_from(expected.len()).unwrap();
        assert_eq!(doc.bytes(), expected);
    }

    #[test]
    fn fields_are_found_behind_others() {
        let doc = Doc::default()
            .doc("d", &Doc::default().int("ok", 1))
            .int("code", 13)
            .text("errmsg", "no")
            .int("ok", 0);
        let reply = Reply(doc.bytes());
        assert!(!reply.is_true("ok"), "the inner `ok` is not the outer one");
        assert_eq!(reply.int("code"), Some(13));
        assert_eq!(reply.text("errmsg").as_deref(), Some("no"));
        assert_eq!(reply.text("code"), None);
        assert_eq!(reply.text("none"), None);
    }

    #[test]
    fn broken_replies_are_errors_and_not_panics() {
        let whole = Doc::default().text("a", "b").int("ok", 1).bytes();
        for cut in 0..whole.len() - 2 {
            assert!(!Reply(whole[..cut].to_vec()).is_true("ok"), "{cut}");
        }
        let huge = b"\x00\0\0\0\x02a\0\xff\xff\xff\xffz\0".to_vec();
        assert_eq!(Reply(huge).text("a"), None);
    }
}
