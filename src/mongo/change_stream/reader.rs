//! `InvalidationReader`: reads the replies of the invalidation stream, and judges what they prove.
//!
//! It does no I/O, so the simulation runs the same code over a server that follows MongoDB's rules.

use bson::spec::BinarySubtype;
use bson::{Bson, Document};

use crate::invalidation::source::{Batch, ServerTime};
use crate::invalidation::watermark::{Proof, StreamSource, Watermark};
use crate::mongo::change_stream::cursor::{ResumeToken, StreamReply};
use crate::session::id::SessionKey;
use crate::session::revision::Change;
use crate::session::revision::Rev;

/// Reads the replies of one open change stream, in their order.
#[derive(Clone, Debug)]
pub(crate) struct InvalidationReader {
    watermark: Watermark,
}

/// What one reply contains.
#[derive(Debug)]
pub(crate) struct StreamReading {
    pub(crate) batch: Batch<ResumeToken>,
    /// The time of the newest change in the reply.
    pub(crate) newest_change: Option<ServerTime>,
}

impl InvalidationReader {
    /// For a stream that was just opened.
    pub(crate) fn new(source: StreamSource) -> Self {
        Self { watermark: Watermark::new(source) }
    }

    /// Reads the next reply: first the one to `aggregate`, then each one to `getMore`.
    pub(crate) fn read(&mut self, reply: StreamReply) -> StreamReading {
        let StreamReply { events, after } = reply;
        let mut changes = Vec::with_capacity(events.len());
        let mut ended = false;
        let mut newest_change = None;
        for event in &events {
            if let Ok(at) = event.get_timestamp("at") {
                newest_change = newest_change.max(Some(ServerTime::from(at)));
            }
            ended |= event.get_bool("ends").unwrap_or(false);
            changes.extend(change(event));
        }
        let of_last_event = || events.last()?.get_document("_id").ok().cloned();
        let position = after.or_else(of_last_event);
        let token = position.as_ref().and_then(time_in);
        let Proof { reached, complete_on } =
            self.watermark.judge(token, newest_change, events.is_empty());
        let batch = Batch { changes, ended, position, reached, complete_on };
        StreamReading { batch, newest_change }
    }
}

/// The session that an event is about. `None` if its key has another form: another program's document.
pub(crate) fn change(event: &Document) -> Option<Change> {
    let Bson::Binary(key) = event.get("key")? else {
        return None;
    };
    if key.subtype != BinarySubtype::Generic {
        return None;
    }
    let rev = event.get_binary_generic("rev").ok().and_then(|rev| Rev::from_bytes(rev));
    Some(Change { key: SessionKey::from_bytes(&key.bytes)?, rev })
}

/// The time in a resume token. A token of
/// [MongoDB](https://github.com/mongodb/mongo/blob/master/src/mongo/db/pipeline/README-change-streams.md) is a
/// hexadecimal key string that begins with the type 0x82 and a timestamp. `None` for another server's tokens.
pub(crate) fn time_in(token: &ResumeToken) -> Option<ServerTime> {
    let text = token.get_str("_data").ok()?.get(..18)?;
    let time = text.strip_prefix("82")?;
    u64::from_str_radix(time, 16).ok().map(ServerTime)
}

#[cfg(test)]
mod tests;
