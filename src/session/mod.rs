//! A session as both tiers hold it, apart from its id and from either generation of the contract.

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

/// What an app keeps in a session. The type that both generations of tower-sessions-core use.
pub(crate) type Data = HashMap<String, Value>;

/// Whether two are the same to the last character: `==` does not tell `0.0` from `-0.0`.
#[cfg(any(test, fuzzing))]
pub(crate) fn same(one: &Data, other: &Data) -> bool {
    let sorted = |data: &Data| {
        serde_json::to_string(&data.iter().collect::<std::collections::BTreeMap<_, _>>()).ok()
    };
    one == other && sorted(one) == sorted(other)
}

/// How many levels of arrays and objects a value in a session may have, in every form and in both
/// directions. So no session can overflow a stack.
///
/// The server keeps documents of at most 100 levels; the document and its `data` take two of them. A
/// text has the same bound, so that what is stored in one form can be stored in the other.
/// <https://www.mongodb.com/docs/manual/reference/limits/#mongodb-limit-Nested-Depth-for-BSON-Documents>
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
