//! What one entry of the cache holds, and what it weighs.

use std::collections::BTreeMap;
use std::fmt;
use std::mem::size_of;
use std::sync::Arc;

use serde_json::{Map, Value};

use crate::cache::compact;
use crate::error::{Error, ErrorKind, Result};
use crate::session::{Data, Session};
use crate::time::Moment;
use crate::time::WallTime;

/// A cached session. Cheap to clone: the cache, a flight and its followers share what it holds.
#[derive(Clone)]
pub(crate) struct Entry {
    times: Times,
    expires: WallTime,
    held: Payload,
}

#[derive(Clone)]
enum Payload {
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
}

impl Entry {
    pub(crate) fn new(session: Session, times: Times) -> Self {
        let Session { data, expires } = session;
        let weight = u32::try_from(OVERHEAD + PLAIN + heap_of(&data)).unwrap_or(u32::MAX);
        Self { times, expires, held: Payload::Plain(Arc::new(Plain { data, weight })) }
    }

    /// The same entry in the form that takes the least room.
    pub(crate) fn compacted(&self) -> Self {
        let mut entry = self.clone();
        if let Payload::Plain(plain) = &self.held
            && let Some(packed) = compact::encode(&plain.data)
        {
            entry.held = Payload::Compact(packed);
        }
        entry
    }

    /// A copy of the session's data, and its expiry.
    pub(crate) fn session(&self) -> Result<Session> {
        let data = match &self.held {
            Payload::Plain(plain) => plain.data.clone(),
            Payload::Compact(packed) => compact::decode(packed).ok_or_else(unreadable)?,
        };
        Ok(Session { data, expires: self.expires })
    }

    /// The same session with another expiry.
    pub(crate) fn with_expiry(&self, expires: WallTime, times: Times) -> Self {
        Self { times, expires, held: self.held.clone() }
    }

    /// Whether its session has this data.
    pub(crate) fn has_data(&self, data: &Data) -> bool {
        match &self.held {
            Payload::Plain(plain) => same_data(&plain.data, data),
            Payload::Compact(packed) => {
                compact::decode(packed).is_some_and(|held| same_data(&held, data))
            }
        }
    }

    /// The expiry of its session.
    pub(crate) fn expires(&self) -> WallTime {
        self.expires
    }

    pub(crate) fn times(&self) -> &Times {
        &self.times
    }

    /// Bytes of heap that the entry takes, its place in the cache's tables included.
    pub(crate) fn weight(&self) -> u32 {
        match &self.held {
            Payload::Plain(plain) => plain.weight,
            Payload::Compact(packed) => {
                let bytes = OVERHEAD + COMPACT_SLACK + block(packed.len() + 2 * size_of::<usize>());
                u32::try_from(bytes).unwrap_or(u32::MAX)
            }
        }
    }
}

/// Whether two are the same as they are stored: unlike `==`, this tells `0.0` from `-0.0`.
fn same_data(one: &Data, other: &Data) -> bool {
    one.len() == other.len()
        && one.iter().all(|(key, value)| other.get(key).is_some_and(|other| same(value, other)))
}

fn same(one: &Value, other: &Value) -> bool {
    match (one, other) {
        (Value::Number(one), Value::Number(other)) => {
            one == other
                && (!one.is_f64()
                    || one.as_f64().map(f64::to_bits) == other.as_f64().map(f64::to_bits))
        }
        (Value::Array(one), Value::Array(other)) => {
            one.len() == other.len() && one.iter().zip(other).all(|(one, other)| same(one, other))
        }
        // In the same order too, where a map has one.
        (Value::Object(one), Value::Object(other)) => {
            let same = |(one, other): ((&String, &Value), (&String, &Value))| {
                one.0 == other.0 && same(one.1, other.1)
            };
            one.len() == other.len() && one.iter().zip(other).all(same)
        }
        (one, other) => one == other,
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

/// What an entry takes beside what it holds: moka's own nodes and table, and what stands in them.
/// As measured with 50,000 to 1,000,000 entries.
const OVERHEAD: usize = 378;

/// What the blocks of a load leave free beside a packed one, which stays among them: 0 to 300 bytes, by
/// the shape of the session. A plain entry is itself what the load has made, so it leaves nothing.
const COMPACT_SLACK: usize = 72;

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
    table(buckets(data.capacity()), size_of::<(String, Value)>())
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
            map_of(map.len())
                + map
                    .iter()
                    .map(|(key, value)| block(key.capacity()) + heap_in(value))
                    .sum::<usize>()
        }
    }
}

/// The table of a hash map, as hashbrown has it: a control byte for each bucket, and a group of 16 more.
fn table(buckets: usize, of: usize) -> usize {
    if buckets == 0 { 0 } else { block(buckets * (of + 1) + 16) }
}

/// A power of two of them, seven eighths of which may be full.
fn buckets(capacity: usize) -> usize {
    match capacity {
        0 => 0,
        1..=3 => 4,
        4..=7 => 8,
        capacity => (capacity * 8 / 7).next_power_of_two(),
    }
}

/// What one of `serde_json`'s maps of so many values takes beside them. It is another one wherever any
/// crate of the app switches on `preserve_order`, which its size tells.
fn map_of(len: usize) -> usize {
    const IS_TREE: bool = size_of::<Map<String, Value>>() == size_of::<BTreeMap<String, Value>>();
    if IS_TREE { tree(len, size_of::<Value>()) } else { ordered(len, size_of::<Value>()) }
}

/// The two blocks of a map that keeps its order: a list of hashes, keys and values, and a hash table of
/// places in it, which both grow by doubling.
fn ordered(len: usize, value: usize) -> usize {
    let buckets = buckets(len);
    let room = if buckets < 16 { buckets.saturating_sub(1) } else { buckets / 8 * 7 };
    block(room * (size_of::<u64>() + size_of::<String>() + value))
        + table(buckets, size_of::<usize>())
}

/// The nodes of a B-tree map of so many values, put there in order, as a decoder does: eleven fit in a
/// node, and one that is full leaves six behind, and one above. Put there in another way they may take
/// a third less.
fn tree(len: usize, value: usize) -> usize {
    let leaf = 11 * (size_of::<String>() + value) + 16;
    let internal = leaf + 12 * size_of::<usize>();
    let over = |most: usize, nodes: usize| 1 + nodes.saturating_sub(most).div_ceil(7);
    if len == 0 {
        return 0;
    }
    let mut nodes = over(11, len);
    let mut bytes = nodes * block(leaf);
    while nodes > 1 {
        nodes = over(12, nodes);
        bytes += nodes * block(internal);
    }
    bytes
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::time::Clock;

    fn weigh(value: &Value) -> u32 {
        let data: Data = value.as_object().unwrap().clone().into_iter().collect();
        let now = Clock::system().now();
        let times = Times { epoch: 0, read_at: now };
        Entry::new(Session { data, expires: WallTime::from_millis(0) }, times).weight()
    }

    #[test]
    fn an_entry_weighs_more_than_the_text_it_holds_and_grows_with_it() {
        let empty = weigh(&json!({}));
        let text = weigh(&json!({ "name": "x".repeat(10_000) }));
        assert!(text - empty > 10_000 && text - empty < 11_000, "{empty} {text}");
        let nested =
            weigh(&json!({ "list": (0..1000).map(|n| json!({"n": n})).collect::<Vec<_>>() }));
        assert!(nested > 400_000, "a map takes far more than its one value: {nested}");
    }

    /// As an allocator counted them that rounds as `block` does, of `serde_json` 1.0 on 64 bits: with and
    /// without `preserve_order`, maps of so many numbers that were read from a text.
    #[test]
    #[cfg(target_pointer_width = "64")]
    fn a_map_weighs_what_it_takes_whether_it_keeps_its_order_or_not() {
        for (len, sorted, in_order) in [
            (0, 0, 0),
            (1, 640, 384),
            (3, 640, 384),
            (4, 640, 832),
            (7, 640, 832),
            (8, 640, 1_648),
            (12, 2_016, 1_648),
            (15, 2_016, 3_248),
            (29, 3_296, 6_448),
            (50, 5_216, 6_448),
            (57, 5_856, 12_848),
            (100, 11_168, 12_848),
            (200, 21_600, 25_648),
            (1_000, 109_184, 204_848),
        ] {
            assert_eq!((tree(len, 32), ordered(len, 72)), (sorted, in_order), "{len}");
        }
        let map = if size_of::<Value>() == 32 { tree(5, 32) } else { ordered(5, 72) };
        assert_eq!(map_of(5), map);
    }

    #[test]
    fn the_same_data_is_the_same_to_the_sign_of_zero() {
        let data = |value: Value| Data::from([("a".to_owned(), json!([{ "b": value }]))]);
        for (one, other) in
            [(json!(0.0), json!(-0.0)), (json!(1), json!(1.0)), (json!(1), json!("1"))]
        {
            assert!(!same_data(&data(one.clone()), &data(other.clone())), "{one} {other}");
            assert!(same_data(&data(one.clone()), &data(one)));
            assert!(same_data(&data(other.clone()), &data(other)));
        }
        assert!(!same_data(&data(json!(1)), &Data::new()));
        assert!(!same_data(&data(json!([])), &data(json!([1]))));
    }

    #[test]
    fn debug_shows_no_data() {
        let now = Clock::system().now();
        let times = Times { epoch: 0, read_at: now };
        let data = Data::from([("card".to_owned(), json!("4111"))]);
        let text =
            format!("{:?}", Entry::new(Session { data, expires: WallTime::from_millis(0) }, times));
        assert!(!text.contains("card") && !text.contains("4111"), "{text}");
    }
}
