//! The weight of an entry: the bytes of heap that it takes, with what moka and the allocator need for it.

use std::collections::BTreeMap;
use std::mem::size_of;

use serde_json::{Map, Value};

use crate::session::Data;

/// What an entry takes beside its payload: the nodes and the table of moka, and the entry in them.
/// Measured with 50,000 to 1,000,000 entries.
const OVERHEAD: usize = 378;

/// What a load leaves free beside a compact entry: blocks of the decoded data, between which the entry
/// stays. Measured as 0 to 300 bytes, by the shape of the session. A plain entry is itself the data that
/// the load has decoded, so nothing is left free beside it.
const COMPACT_SLACK: usize = 72;

/// The two counts of an `Arc`.
const ARC_COUNTS: usize = 2 * size_of::<usize>();

/// The weight of an entry with this data in the plain form. `arc_content` is the size of the value in its
/// `Arc`.
pub(crate) fn of_plain(data: &Data, arc_content: usize) -> u32 {
    let bytes = OVERHEAD + block(arc_content + ARC_COUNTS) + data_heap(data);
    u32::try_from(bytes).unwrap_or(u32::MAX)
}

/// The weight of an entry in the compact form, which takes `length` bytes.
pub(crate) fn of_compact(length: usize) -> u32 {
    let bytes = OVERHEAD + COMPACT_SLACK + block(length + ARC_COUNTS);
    u32::try_from(bytes).unwrap_or(u32::MAX)
}

/// What a common allocator takes for a block of `bytes`.
const fn block(bytes: usize) -> usize {
    if bytes == 0 {
        return 0;
    }
    let rounded = (bytes + size_of::<usize>()).next_multiple_of(16);
    if rounded < 32 { 32 } else { rounded }
}

fn data_heap(data: &Data) -> usize {
    let table = hash_table(buckets(data.capacity()), size_of::<(String, Value)>());
    let members = data.iter().map(|(key, value)| member_heap(key, value));
    table + members.sum::<usize>()
}

fn member_heap(key: &String, value: &Value) -> usize {
    block(key.capacity()) + value_heap(value)
}

fn value_heap(value: &Value) -> usize {
    match value {
        Value::Null | Value::Bool(_) | Value::Number(_) => 0,
        Value::String(text) => block(text.capacity()),
        Value::Array(items) => {
            let list = block(items.capacity() * size_of::<Value>());
            list + items.iter().map(value_heap).sum::<usize>()
        }
        Value::Object(map) => {
            let members = map.iter().map(|(key, value)| member_heap(key, value));
            json_map(map.len()) + members.sum::<usize>()
        }
    }
}

/// The table of a hashbrown map: one control byte for each bucket, and a group of 16 more.
fn hash_table(buckets: usize, item: usize) -> usize {
    if buckets == 0 { 0 } else { block(buckets * (item + 1) + 16) }
}

/// The number of buckets in which `capacity` items fit: a power of two, of which 7/8 may be full.
fn buckets(capacity: usize) -> usize {
    match capacity {
        0 => 0,
        1..=3 => 4,
        4..=7 => 8,
        capacity => (capacity * 8 / 7).next_power_of_two(),
    }
}

/// What a map of `serde_json` with `len` members takes beside them. Its type depends on the feature
/// `preserve_order`, which any crate of the app may switch on. The size of the map tells which type it is.
fn json_map(len: usize) -> usize {
    const IS_TREE: bool = size_of::<Map<String, Value>>() == size_of::<BTreeMap<String, Value>>();
    if IS_TREE { tree_map(len, size_of::<Value>()) } else { ordered_map(len, size_of::<Value>()) }
}

/// A map that keeps the order of its members: a list of hashes, keys and values, and a hash table of
/// positions in the list. Both grow by doubling.
fn ordered_map(len: usize, value: usize) -> usize {
    let buckets = buckets(len);
    let room = if buckets < 16 { buckets.saturating_sub(1) } else { buckets / 8 * 7 };
    let list = block(room * (size_of::<u64>() + size_of::<String>() + value));
    list + hash_table(buckets, size_of::<usize>())
}

/// The nodes of a B-tree map whose members were inserted in order, as a decoder does. A node holds 11
/// members. A full node is split: 6 members stay in it, and 1 moves up. A map that was filled in another
/// order may take a third less.
fn tree_map(len: usize, value: usize) -> usize {
    let leaf = 11 * (size_of::<String>() + value) + 16;
    let inner = leaf + 12 * size_of::<usize>();
    let nodes_for = |most: usize, items: usize| 1 + items.saturating_sub(most).div_ceil(7);
    if len == 0 {
        return 0;
    }
    let mut nodes = nodes_for(11, len);
    let mut bytes = nodes * block(leaf);
    while nodes > 1 {
        nodes = nodes_for(12, nodes);
        bytes += nodes * block(inner);
    }
    bytes
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn weigh(value: &Value) -> u32 {
        let data: Data = value.as_object().unwrap().clone().into_iter().collect();
        of_plain(&data, size_of::<(Data, u32)>())
    }

    #[test]
    fn the_weight_is_above_the_length_of_the_text_and_grows_with_it() {
        let empty = weigh(&json!({}));
        let text = weigh(&json!({ "name": "x".repeat(10_000) }));
        assert!(text - empty > 10_000 && text - empty < 11_000, "{empty} {text}");
        let nested =
            weigh(&json!({ "list": (0..1000).map(|n| json!({"n": n})).collect::<Vec<_>>() }));
        assert!(nested > 400_000, "a map takes far more than its one value: {nested}");
    }

    /// The figures were counted by an allocator that rounds as `block` does, with `serde_json` 1.0 on 64
    /// bits, with and without `preserve_order`. The maps were read from a text and hold `len` numbers.
    #[test]
    #[cfg(target_pointer_width = "64")]
    fn the_weight_of_a_map_is_what_an_allocator_counted() {
        for (len, tree_bytes, ordered_bytes) in [
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
            assert_eq!(tree_map(len, 32), tree_bytes, "{len}");
            assert_eq!(ordered_map(len, 72), ordered_bytes, "{len}");
        }
        let map = if size_of::<Value>() == 32 { tree_map(5, 32) } else { ordered_map(5, 72) };
        assert_eq!(json_map(5), map);
    }
}
