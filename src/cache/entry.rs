//! What one entry of the cache holds, and what it weighs.

use std::fmt;
use std::mem::size_of;
use std::sync::Arc;
use std::time::Duration;

use serde_json::Value;

use super::packed;
use crate::clock::Moment;
use crate::error::{Error, ErrorKind, Result};
use crate::record::{Data, Session, WallTime};

/// A cached session. Cheap to clone: the cache, a flight and its followers share what it holds.
#[derive(Clone)]
pub(crate) struct Entry {
    times: Times,
    expires: WallTime,
    held: Held,
}

#[derive(Clone)]
enum Held {
    Plain(Arc<Plain>),
    /// [Packed](packed), to be unpacked by each who asks.
    Compact(Arc<str>),
}

struct Plain {
    data: Data,
    weight: u32,
}

/// When and under what an entry was made.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Times {
    /// The epoch in which it may be served.
    pub(crate) epoch: u64,
    /// When its read, or the write that it comes from, began.
    pub(crate) read_at: Moment,
    /// The record's expiry, on the steady clock: a step of the wall clock neither prolongs nor
    /// shortens what is held.
    pub(crate) expires_at: Moment,
}

impl Entry {
    pub(crate) fn new(session: Session, times: Times) -> Self {
        let Session { data, expires } = session;
        let weight = u32::try_from(OVERHEAD + PLAIN + heap_of(&data)).unwrap_or(u32::MAX);
        Self { times, expires, held: Held::Plain(Arc::new(Plain { data, weight })) }
    }

    /// The same entry in the form that takes the least room.
    pub(crate) fn compacted(&self) -> Self {
        let mut entry = self.clone();
        if let Held::Plain(plain) = &self.held
            && let Some(packed) = packed::pack(&plain.data)
        {
            entry.held = Held::Compact(packed);
        }
        entry
    }

    /// A copy of the session's data, and its expiry.
    pub(crate) fn session(&self) -> Result<Session> {
        let data = match &self.held {
            Held::Plain(plain) => plain.data.clone(),
            Held::Compact(packed) => packed::unpack(packed).ok_or_else(unreadable)?,
        };
        Ok(Session { data, expires: self.expires })
    }

    /// Whether its session has this data.
    pub(crate) fn holds(&self, data: &Data) -> bool {
        match &self.held {
            Held::Plain(plain) => plain.data == *data,
            Held::Compact(packed) => packed::unpack(packed).is_some_and(|held| held == *data),
        }
    }

    /// The expiry of its session.
    pub(crate) fn expires(&self) -> WallTime {
        self.expires
    }

    /// From when its read began until its session ends.
    pub(crate) fn lifetime(&self) -> Duration {
        self.times.expires_at.since(self.times.read_at)
    }

    pub(crate) fn times(&self) -> &Times {
        &self.times
    }

    /// Bytes of heap that the entry takes, its place in the cache's tables included.
    pub(crate) fn weight(&self) -> u32 {
        match &self.held {
            Held::Plain(plain) => plain.weight,
            Held::Compact(packed) => {
                let bytes = OVERHEAD + block(packed.len() + 2 * size_of::<usize>());
                u32::try_from(bytes).unwrap_or(u32::MAX)
            }
        }
    }
}

#[cold]
fn unreadable() -> Error {
    Error::new(ErrorKind::Decode, "a cached session cannot be read")
}

impl fmt::Debug for Entry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Entry")
            .field("times", &self.times)
            .field("weight", &self.weight())
            .finish_non_exhaustive()
    }
}

/// What an entry takes beside what it holds: moka's own nodes and table.
const OVERHEAD: usize = 420;

/// The shared block of the plain form.
const PLAIN: usize = block(size_of::<Plain>() + 2 * size_of::<usize>());

/// What an allocator of the usual kind takes for a block of `bytes`.
const fn block(bytes: usize) -> usize {
    if bytes == 0 {
        return 0;
    }
    let rounded = (bytes + size_of::<usize>()).next_multiple_of(16);
    if rounded < 32 { 32 } else { rounded }
}

fn heap_of(data: &Data) -> usize {
    // hashbrown: a power of two of buckets, seven eighths of which may be full; a control byte for
    // each, and a group of 16 more.
    let buckets = match data.capacity() {
        0 => 0,
        1..=3 => 4,
        4..=7 => 8,
        capacity => (capacity * 8 / 7).next_power_of_two(),
    };
    let table = if buckets == 0 { 0 } else { buckets * (size_of::<(String, Value)>() + 1) + 16 };
    block(table)
        + data.iter().map(|(key, value)| block(key.capacity()) + heap_in(value)).sum::<usize>()
}

fn heap_in(value: &Value) -> usize {
    match value {
        Value::Null | Value::Bool(_) | Value::Number(_) => 0,
        Value::String(text) => block(text.capacity()),
        Value::Array(items) => {
            block(items.capacity() * size_of::<Value>()) + items.iter().map(heap_in).sum::<usize>()
        }
        Value::Object(map) => {
            tree(map.len())
                + map
                    .iter()
                    .map(|(key, value)| block(key.capacity()) + heap_in(value))
                    .sum::<usize>()
        }
    }
}

/// The nodes of a B-tree map of so many values: eleven fit in a node, about seven are there.
fn tree(len: usize) -> usize {
    const LEAF: usize = 11 * (size_of::<String>() + size_of::<Value>()) + 16;
    const INTERNAL: usize = LEAF + 12 * size_of::<usize>();
    match len {
        0 => 0,
        1..=11 => block(LEAF),
        _ => {
            let leaves = len.div_ceil(7);
            leaves * block(LEAF) + leaves.div_ceil(7) * block(INTERNAL)
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::clock::Clock;

    fn weigh(value: &Value) -> u32 {
        let data: Data = value.as_object().unwrap().clone().into_iter().collect();
        let now = Clock::system().now();
        let times = Times { epoch: 0, read_at: now, expires_at: now };
        Entry::new(Session { data, expires: WallTime::from_millis(0) }, times).weight()
    }

    #[test]
    fn an_entry_weighs_more_than_the_text_it_holds_and_grows_with_it() {
        let empty = weigh(&json!({}));
        let text = weigh(&json!({ "name": "x".repeat(10_000) }));
        assert!(text - empty > 10_000 && text - empty < 11_000, "{empty} {text}");
        let nested =
            weigh(&json!({ "list": (0..1000).map(|n| json!({"n": n})).collect::<Vec<_>>() }));
        assert!(nested > 600_000, "a map of one value takes a whole node: {nested}");
    }

    #[test]
    fn debug_shows_no_data() {
        let now = Clock::system().now();
        let times = Times { epoch: 0, read_at: now, expires_at: now };
        let data = Data::from([("card".to_owned(), json!("4111"))]);
        let text =
            format!("{:?}", Entry::new(Session { data, expires: WallTime::from_millis(0) }, times));
        assert!(!text.contains("card") && !text.contains("4111"), "{text}");
    }
}
