//! Resume tokens, in MongoDB's form and in the test server's form.
//!
//! MongoDB's tokens are [key
//! strings](https://github.com/mongodb/mongo/blob/master/src/mongo/db/pipeline/resume_token.h) in
//! hexadecimal digits: a timestamp, the version of the format, the kind of token, and a part that
//! tells events of one time apart. The test server's tokens are a BSON document in hexadecimal
//! digits. The proxy puts that document into the last part of MongoDB's form, so it keeps no list,
//! and can translate every token back.

use bson::{Bson, Document, Timestamp};

/// A timestamp as one number, the seconds first.
pub(crate) type Time = u64;

/// A timestamp's type in a key string, before its 8 bytes.
const TIMESTAMP: &str = "82";
/// Version 2 of the format, then the kind: 128 for an event, 0 for a high-water mark; then `false`, for
/// a token that is not of an `invalidate` event.
const OF_AN_EVENT: &str = "2B042C0100296E";
const HIGH_WATER_MARK: &str = "2B0429296E";
/// Binary data in a key string, before its length and subtype.
const BINARY: &str = "5A";
const END: &str = "04";
/// From this length on, the length itself takes 4 more bytes.
const LONG: usize = 0xFF;

/// The content of the test server's token.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Own {
    /// The position in the oplog.
    pub(crate) position: i64,
    pub(crate) time: Time,
    /// The namespace of the event. Empty for a high-water mark.
    namespace: String,
    /// The `_id` of the document that the event is about.
    pub(crate) key: Option<Bson>,
    data: String,
}

impl Own {
    /// Parses a token. `None` if the token has another form.
    pub(crate) fn read(token: &Document) -> Option<Self> {
        let data = token.get_str("_data").ok()?;
        let inner = Document::from_reader(&*bytes(data)?).ok()?;
        let position = crate::message::number(inner.get("s"))?;
        let time = time(inner.get_timestamp("t").ok()?);
        let namespace = inner.get_str("n").unwrap_or_default().to_owned();
        let key = inner.get_document("k").ok().and_then(|key| key.get("_id")).cloned();
        Some(Self { position, time, namespace, key, data: data.to_owned() })
    }

    pub(crate) fn is_of_an_event(&self) -> bool {
        !self.namespace.is_empty()
    }

    /// The same token in MongoDB's form, with this time.
    pub(crate) fn at(&self, time: Time) -> Document {
        let kind = if self.is_of_an_event() { OF_AN_EVENT } else { HIGH_WATER_MARK };
        let length = self.data.len() / 2;
        let length =
            if length < LONG { format!("{length:02X}") } else { format!("FF{length:08X}") };
        let data = format!("{TIMESTAMP}{time:016X}{kind}{BINARY}{length}00{}{END}", self.data);
        Document::from_iter([("_data".to_owned(), Bson::String(data))])
    }
}

/// The time in a token of MongoDB's form; `None` for another form.
pub(crate) fn time_of(token: &Document) -> Option<Time> {
    let digits = token.get_str("_data").ok()?.strip_prefix(TIMESTAMP)?.get(..16)?;
    Time::from_str_radix(digits, 16).ok()
}

/// The test server's token in one that [`Own::at`] has made.
pub(crate) fn own_in(token: &Document) -> Option<Document> {
    let data = token.get_str("_data").ok()?;
    let rest = data.strip_prefix(TIMESTAMP)?.get(16..)?;
    let rest = rest.strip_prefix(OF_AN_EVENT).or_else(|| rest.strip_prefix(HIGH_WATER_MARK))?;
    let rest = rest.strip_prefix(BINARY)?;
    // The length, and the subtype.
    let rest = rest.get(if rest.starts_with("FF") { 12 } else { 4 }..)?;
    let own = rest.strip_suffix(END)?;
    Some(Document::from_iter([("_data".to_owned(), Bson::String(own.to_owned()))]))
}

pub(crate) fn time(timestamp: Timestamp) -> Time {
    u64::from(timestamp.time) << 32 | u64::from(timestamp.increment)
}

#[allow(clippy::cast_possible_truncation, reason = "the halves are taken apart")]
pub(crate) fn timestamp(time: Time) -> Timestamp {
    Timestamp { time: (time >> 32) as u32, increment: time as u32 }
}

fn bytes(digits: &str) -> Option<Vec<u8>> {
    let digits = digits.as_bytes();
    if digits.is_empty() || !digits.len().is_multiple_of(2) {
        return None;
    }
    let byte = |pair: &[u8]| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok();
    digits.chunks(2).map(byte).collect()
}

/// A token as the test server writes it.
#[cfg(test)]
pub(crate) fn made_by_hand(position: i64, time: Time, namespace: &str, key: &str) -> Document {
    let key = bson::doc! { "_id": key };
    let inner = bson::doc! { "s": position, "t": timestamp(time), "n": namespace, "k": key };
    let digits = inner.to_vec().unwrap().into_iter().map(|byte| format!("{byte:02X}"));
    bson::doc! { "_data": digits.collect::<Vec<_>>().concat() }
}

#[cfg(test)]
mod tests {
    use bson::doc;

    use super::*;

    fn own(namespace: &str, key: &str) -> Own {
        let token = made_by_hand(7, 0x63C1_E0A4_0000_0002, namespace, key);
        assert!(token.get_str("_data").unwrap().contains("12730007000000"), "{token}");
        Own::read(&token).unwrap()
    }

    #[test]
    fn tokens_look_like_mongodbs_and_translate_back() {
        let long = "x".repeat(300);
        for (own, begins) in [
            (own("app.sessions", "k"), "8263C1E0A4000000022B042C0100296E5A"),
            (own("app.sessions", &long), "8263C1E0A4000000022B042C0100296E5AFF"),
            // A high-water mark of MongoDB 6, 8263C1E0A4000000022B0229296E04, and one of a later
            // version.
            (own("", "k"), "8263C1E0A4000000022B0429296E5A"),
        ] {
            let token = own.at(0x63C1_E0A4_0000_0002);
            let data = token.get_str("_data").unwrap();
            assert!(data.starts_with(begins) && data.ends_with("04"), "{data}");
            assert!(data.bytes().all(|digit| b"0123456789ABCDEF".contains(&digit)), "{data}");
            assert_eq!(time_of(&token), Some(0x63C1_E0A4_0000_0002));
            let back = own_in(&token).unwrap();
            assert_eq!(Own::read(&back), Some(own));
            assert_eq!(time_of(&back), None, "the test server's own form holds no time in front");
        }
    }

    #[test]
    fn token_contains_position_time_and_namespace() {
        let read = own("app.sessions", "k");
        assert_eq!((read.position, read.time), (7, 0x63C1_E0A4_0000_0002));
        assert!(read.is_of_an_event() && !own("", "k").is_of_an_event());
        assert_eq!(timestamp(read.time), Timestamp { time: 0x63C1_E0A4, increment: 2 });
    }

    #[test]
    fn tokens_of_other_forms_are_not_parsed() {
        // A token of a real server, and texts that are not tokens.
        for data in ["8263C1E0A4000000022B0229296E04", "82", "", "0", "zz", "8263C1E0A400000002"] {
            let token = doc! { "_data": data };
            assert_eq!((own_in(&token), Own::read(&token)), (None, None), "{data}");
        }
        assert_eq!(own_in(&doc! {}), None);
    }
}
