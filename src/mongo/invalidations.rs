//! `InvalidationReader`: reads the replies of a cache's change stream, and says what they prove.
//!
//! It has no I/O, so the simulation runs this same code over a server that follows MongoDB's rules.

use bson::{Bson, Document};

use super::cursor::{Handed, Token};
use crate::backend::{Batch, Change, Rev, ServerTime};
use crate::key::SessionKey;

/// Which kind of server feeds a change stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum StreamSource {
    /// A member of a replica set, which reads its own oplog.
    Member,
    /// A router (mongos), which merges the streams of all shards.
    Router,
}

/// Reads the replies of one open change stream, in their order.
#[derive(Clone, Debug)]
pub(crate) struct InvalidationReader {
    source: StreamSource,
    is_first: bool,
}

/// What one reply says.
#[derive(Debug)]
pub(crate) struct Reading {
    pub(crate) batch: Batch<Token>,
    /// The time of the newest change in it.
    pub(crate) newest_change: Option<ServerTime>,
}

impl InvalidationReader {
    /// For a stream that has just been opened.
    pub(crate) fn new(source: StreamSource) -> Self {
        Self { source, is_first: true }
    }

    /// Reads the next reply: first the one to `aggregate`, then each one to `getMore`.
    pub(crate) fn read(&mut self, reply: Handed) -> Reading {
        let Handed { events, after } = reply;
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
        let of_last = || events.last()?.get_document("_id").ok().cloned();
        let position = after.or_else(of_last);
        let token = position.as_ref().and_then(time_in);
        let waited = match self.source {
            _ if std::mem::take(&mut self.is_first) => Waited::No,
            StreamSource::Member => Waited::OnOneServer,
            StreamSource::Router => Waited::OnARouter,
        };
        let (reached, complete) = vouched_for(token, newest_change, events.is_empty(), waited);
        let batch = Batch { changes, ended, position, reached, complete };
        Reading { batch, newest_change }
    }
}

/// Whether a batch was waited for on the server's side, and where.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Waited {
    No,
    OnOneServer,
    OnARouter,
}

/// Up to which time all changes have been handed over, and whether all from before the question have:
/// by a batch whose resume token holds the time `at`, and whose last change is that of `last`.
fn vouched_for(
    at: Option<ServerTime>,
    last: Option<ServerTime>,
    empty: bool,
    waited: Waited,
) -> (Option<ServerTime>, bool) {
    match at {
        // On one server, an empty batch has left none behind; through a router, changes at this very
        // time may still come from another shard.
        Some(at) if empty && waited == Waited::OnOneServer => {
            (Some(ServerTime(at.0.saturating_add(1))), false)
        }
        Some(at) => (Some(at.min(last.unwrap_or(at))), false),
        None if empty && waited == Waited::OnOneServer => (None, true),
        None => (last, false),
    }
}

/// The session that a report is about. A key of another form is not one of ours.
fn change(event: &Document) -> Option<Change> {
    let Bson::Binary(key) = event.get("key")? else {
        return None;
    };
    let rev = event.get_binary_generic("rev").ok().and_then(|rev| Rev::from_bytes(rev));
    Some(Change { key: SessionKey::from_bytes(&key.bytes)?, rev })
}

/// The time in a resume token, for a server that writes them as
/// [MongoDB does](https://github.com/mongodb/mongo/blob/master/src/mongo/db/pipeline/README-change-streams.md):
/// a hexadecimal key string that begins with a timestamp, its type 0x82 first. `None` for another
/// server's tokens.
fn time_in(token: &Token) -> Option<ServerTime> {
    let text = token.get_str("_data").ok()?.get(..18)?;
    let time = text.strip_prefix("82")?;
    u64::from_str_radix(time, 16).ok().map(ServerTime)
}

#[cfg(test)]
mod tests;
