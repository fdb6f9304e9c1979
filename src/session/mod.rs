//! A session as both tiers hold it: without its id, and without types of tower-sessions 0.15 or 0.14.

pub(crate) mod handle;
pub(crate) mod id;
pub(crate) mod number;
pub(crate) mod owner;
pub(crate) mod revision;
#[cfg(test)]
pub(crate) mod samples;

use std::collections::HashMap;
use std::fmt;

use serde_json::Value;

use crate::time::WallTime;

/// What an app keeps in a session. tower-sessions-core 0.15 and 0.14 use the same type.
pub(crate) type Data = HashMap<String, Value>;

/// Whether both have the same text as JSON. Unlike `==`, it distinguishes `0.0` from `-0.0`.
#[cfg(any(test, fuzzing))]
pub(crate) fn same(one: &Data, other: &Data) -> bool {
    let sorted = |data: &Data| {
        serde_json::to_string(&data.iter().collect::<std::collections::BTreeMap<_, _>>()).ok()
    };
    one == other && sorted(one) == sorted(other)
}

/// How many levels of arrays and objects a value in a session may have. Every data format checks it when it
/// encodes and when it decodes, so no session can overflow a stack.
///
/// MongoDB stores documents of [at most 100 levels][limit]. The document and its `data` take two of them.
/// The text format has the same bound, so that a session can be stored in either format.
///
/// [limit]: https://www.mongodb.com/docs/manual/reference/limits/#mongodb-limit-Nested-Depth-for-BSON-Documents
pub(crate) const MAX_DEPTH: usize = 98;

/// A session without its id.
#[derive(Clone, PartialEq)]
pub(crate) struct Session {
    pub(crate) data: Data,
    pub(crate) expires: WallTime,
}

impl fmt::Debug for Session {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Session").field("expires", &self.expires).finish_non_exhaustive()
    }
}
