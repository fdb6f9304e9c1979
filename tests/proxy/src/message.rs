//! One message of the
//! [wire protocol](https://www.mongodb.com/docs/manual/reference/mongodb-wire-protocol/).

use std::io;
use std::ops::Range;

use bson::raw::RawDocument;
use bson::{Bson, Document};
use tokio::io::{AsyncRead, AsyncReadExt};

const HEADER: usize = 16;
const OP_MSG: i32 = 2013;
/// The flag of a message that ends with a checksum.
const CHECKSUM_PRESENT: u32 = 1;
/// MongoDB's `maxMessageSizeBytes`, with room for the header.
const LONGEST: usize = 48_000_000 + HEADER;

/// The field of a read concern that makes the server wait for a time.
pub(crate) const AFTER_CLUSTER_TIME: &str = "afterClusterTime";

/// A whole message, as it is sent.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Message(Vec<u8>);

/// A section of an `OP_MSG`.
enum Section {
    /// Kind 0: the command or the reply.
    Body(Range<usize>),
    /// Kind 1: documents that belong to a field of the command.
    Sequence { name: Range<usize>, documents: Range<usize> },
}

impl Message {
    /// The reply to the request of this id.
    pub(crate) fn reply(request: i32, body: &Document) -> io::Result<Self> {
        let mut bytes = vec![0; 4];
        bytes.extend([1, request, OP_MSG, 0].iter().flat_map(|word| word.to_le_bytes()));
        bytes.push(0);
        bytes.extend(body.to_vec().map_err(io::Error::other)?);
        Self::of(bytes)
    }

    /// The same message with another body. The other sections stay, the checksum is removed.
    pub(crate) fn with_body(&self, body: &Document) -> io::Result<Self> {
        let mut bytes = self.0[..HEADER].to_vec();
        bytes.extend((self.flags() & !CHECKSUM_PRESENT).to_le_bytes());
        for section in self.sections()? {
            match section {
                Section::Body(_) => {
                    bytes.push(0);
                    bytes.extend(body.to_vec().map_err(io::Error::other)?);
                }
                Section::Sequence { name, documents } => {
                    // The kind and the length come before the name.
                    bytes.extend(&self.0[name.start - 5..documents.end]);
                }
            }
        }
        Self::of(bytes)
    }

    fn of(mut bytes: Vec<u8>) -> io::Result<Self> {
        let length = i32::try_from(bytes.len()).map_err(io::Error::other)?;
        bytes[..4].copy_from_slice(&length.to_le_bytes());
        Ok(Self(bytes))
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        &self.0
    }

    pub(crate) fn id(&self) -> i32 {
        word(&self.0, 4)
    }

    /// The id of the request to which this message is the reply.
    pub(crate) fn answers(&self) -> i32 {
        word(&self.0, 8)
    }

    /// Whether it is an `OP_MSG`. The driver sends no other message unless it compresses.
    fn is_readable(&self) -> bool {
        word(&self.0, 12) == OP_MSG && self.0.len() >= HEADER + 4
    }

    fn flags(&self) -> u32 {
        word(&self.0, HEADER).cast_unsigned()
    }

    fn sections(&self) -> io::Result<Vec<Section>> {
        if !self.is_readable() {
            return Err(malformed("it is no OP_MSG"));
        }
        let checksum = if self.flags() & CHECKSUM_PRESENT == 0 { 0 } else { 4 };
        let end = self.0.len() - checksum;
        let mut sections = Vec::new();
        let mut at = HEADER + 4;
        while at < end {
            let kind = self.0[at];
            at += 1;
            let length = self.0.get(at..at + 4).map_or(0, |bytes| word(bytes, 0));
            let length = usize::try_from(length).unwrap_or(0);
            if length < 5 || length > end - at {
                return Err(malformed("a section is longer than the message"));
            }
            let whole = at..at + length;
            sections.push(match kind {
                0 => Section::Body(whole.clone()),
                1 => {
                    let name = at + 4;
                    let terminator = self.0[name..whole.end].iter().position(|byte| *byte == 0);
                    let terminator =
                        name + terminator.ok_or_else(|| malformed("a name has no end"))?;
                    Section::Sequence {
                        name: name..terminator,
                        documents: terminator + 1..whole.end,
                    }
                }
                _ => return Err(malformed("a section of an unknown kind")),
            });
            at = whole.end;
        }
        Ok(sections)
    }

    fn raw_body(&self) -> Option<&RawDocument> {
        let sections = self.sections().ok()?;
        let range = sections.into_iter().find_map(|section| match section {
            Section::Body(range) => Some(range),
            Section::Sequence { .. } => None,
        })?;
        RawDocument::from_bytes(&self.0[range]).ok()
    }

    /// The command's name, which is the first key of the body.
    pub(crate) fn command(&self) -> Option<&str> {
        let (name, _) = self.raw_body()?.iter().next()?.ok()?;
        Some(name.as_str())
    }

    /// The command or the reply. `None` if it cannot be read.
    pub(crate) fn body(&self) -> Option<Document> {
        Document::try_from(self.raw_body()?).ok()
    }

    /// Whether the command must wait for a time of the server.
    pub(crate) fn waits_for_a_time(&self) -> bool {
        let concern = self.raw_body().and_then(|body| body.get_document("readConcern").ok());
        concern.is_some_and(|concern| concern.get_timestamp(AFTER_CLUSTER_TIME).is_ok())
    }

    /// The number of inserts, updates or deletes in a command.
    pub(crate) fn statements(&self) -> usize {
        const FIELDS: [&str; 3] = ["documents", "updates", "deletes"];

        let in_body = self.raw_body().map_or(0, |body| {
            let arrays = FIELDS.iter().filter_map(|field| body.get_array(field).ok());
            arrays.map(|array| array.into_iter().count()).sum()
        });
        let sections = self.sections().unwrap_or_default();
        let in_sequences = sections.into_iter().map(|section| match section {
            Section::Sequence { name, documents }
                if FIELDS.iter().any(|field| field.as_bytes() == &self.0[name.clone()]) =>
            {
                count(&self.0[documents])
            }
            _ => 0,
        });
        in_body + in_sequences.sum::<usize>()
    }
}

/// The number of consecutive documents in `bytes`.
fn count(mut bytes: &[u8]) -> usize {
    let mut count = 0;
    while bytes.len() >= 4 {
        let length = usize::try_from(word(bytes, 0)).unwrap_or(0);
        let Some(rest) = bytes.get(length..).filter(|_| length >= 5) else { break };
        bytes = rest;
        count += 1;
    }
    count
}

/// Reads messages from one end of a connection.
#[derive(Debug)]
pub(crate) struct Reader<R> {
    from: R,
    buffer: Vec<u8>,
}

impl<R: AsyncRead + Unpin> Reader<R> {
    pub(crate) fn new(from: R) -> Self {
        Self { from, buffer: Vec::new() }
    }

    /// The next message, or `None` at the end of the connection. Cancel safe: the bytes of an
    /// incomplete message stay in the buffer.
    pub(crate) async fn next(&mut self) -> io::Result<Option<Message>> {
        loop {
            if self.buffer.len() >= 4 {
                let length = usize::try_from(word(&self.buffer, 0)).unwrap_or(0);
                if !(HEADER..=LONGEST).contains(&length) {
                    return Err(malformed("a message of an impossible length"));
                }
                if self.buffer.len() >= length {
                    let rest = self.buffer.split_off(length);
                    return Ok(Some(Message(std::mem::replace(&mut self.buffer, rest))));
                }
                self.buffer.reserve(length - self.buffer.len());
            }
            if self.from.read_buf(&mut self.buffer).await? == 0 {
                let is_whole = self.buffer.is_empty();
                return if is_whole { Ok(None) } else { Err(io::ErrorKind::UnexpectedEof.into()) };
            }
        }
    }
}

fn word(bytes: &[u8], at: usize) -> i32 {
    bytes.get(at..at + 4).and_then(|word| word.try_into().ok()).map_or(0, i32::from_le_bytes)
}

fn malformed(why: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, why)
}

/// A number of any type, as MongoDB reads `ok: 1`.
pub(crate) fn number(value: Option<&Bson>) -> Option<i64> {
    match value? {
        Bson::Int32(number) => Some(i64::from(*number)),
        Bson::Int64(number) => Some(*number),
        #[allow(clippy::cast_possible_truncation, reason = "1.0, or a count")]
        Bson::Double(number) => Some(*number as i64),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use bson::doc;

    use super::*;

    /// An `update` with its statements in a sequence, and a checksum, as an old driver sends it.
    fn update() -> Message {
        let body = doc! { "update": "sessions", "$db": "app" };
        let statements = [doc! { "q": { "_id": 1 } }, doc! { "q": { "_id": 2 } }];
        let documents: Vec<u8> =
            statements.iter().flat_map(|statement| statement.to_vec().unwrap()).collect();
        let mut bytes = vec![0; 4];
        bytes.extend([7, 0, OP_MSG, 1].iter().flat_map(|word: &i32| word.to_le_bytes()));
        bytes.push(1);
        let length = i32::try_from(4 + "updates\0".len() + documents.len()).unwrap();
        bytes.extend(length.to_le_bytes());
        bytes.extend(b"updates\0");
        bytes.extend(documents);
        bytes.push(0);
        bytes.extend(body.to_vec().unwrap());
        bytes.extend([0xAA; 4]);
        Message::of(bytes).unwrap()
    }

    #[test]
    fn command_is_read_with_its_sections_in_any_order() {
        let update = update();
        assert_eq!(update.command(), Some("update"));
        assert_eq!(update.statements(), 2);
        assert_eq!(update.id(), 7);
        assert_eq!(update.body().unwrap().get_str("$db").unwrap(), "app");
    }

    #[test]
    fn another_body_keeps_the_rest_and_removes_the_checksum() {
        let changed = update().with_body(&doc! { "update": "others" }).unwrap();
        assert_eq!(changed.body().unwrap(), doc! { "update": "others" });
        assert_eq!(changed.statements(), 2);
        assert_eq!(changed.flags(), 0);
        assert_eq!(usize::try_from(word(changed.bytes(), 0)).unwrap(), changed.bytes().len());
        assert!(!changed.bytes().ends_with(&[0xAA; 4]));
    }

    #[test]
    fn unreadable_message_is_no_command() {
        let whole = update();
        for end in HEADER..whole.0.len() {
            let cut = Message::of(whole.0[..end].to_vec()).unwrap();
            assert!(cut.statements() <= 2);
            let _ = cut.command();
            let _ = cut.body();
        }
        let mut other = whole.clone();
        other.0[12..16].copy_from_slice(&2012_i32.to_le_bytes());
        assert_eq!((other.command(), other.body()), (None, None), "OP_COMPRESSED");
    }

    #[tokio::test]
    async fn messages_are_read_in_pieces_of_any_size() {
        let one = update();
        let two = Message::reply(7, &doc! { "ok": 1 }).unwrap();
        let bytes = [one.bytes(), two.bytes()].concat();
        for size in [1, 3, bytes.len()] {
            let pieces = bytes.chunks(size).map(|piece| Ok::<_, io::Error>(piece.to_vec()));
            let mut mock = tokio_pieces(pieces.collect());
            assert_eq!(mock.next().await.unwrap(), Some(one.clone()));
            assert_eq!(mock.next().await.unwrap(), Some(two.clone()));
            assert_eq!(mock.next().await.unwrap(), None);
        }
        let mut cut = tokio_pieces(vec![Ok(bytes[..20].to_vec())]);
        assert_eq!(cut.next().await.unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
        let mut absurd = tokio_pieces(vec![Ok(vec![0xFF; 16])]);
        assert_eq!(absurd.next().await.unwrap_err().kind(), io::ErrorKind::InvalidData);
    }

    /// A reader that receives its bytes in these pieces.
    fn tokio_pieces(pieces: Vec<io::Result<Vec<u8>>>) -> Reader<tokio::io::DuplexStream> {
        let (mut to, from) = tokio::io::duplex(64);
        tokio::spawn(async move {
            for piece in pieces {
                let piece = piece.unwrap();
                if tokio::io::AsyncWriteExt::write_all(&mut to, &piece).await.is_err() {
                    return;
                }
            }
        });
        Reader::new(from)
    }
}
