//! What the fuzz targets in `fuzz/` call. Each function takes any bytes, and panics if they break a
//! rule. No part of the public API: there only for `--cfg fuzzing` and for the tests, which replay the
//! corpus.
#![allow(clippy::missing_panics_doc, reason = "a panic is what a fuzzer looks for")]

use std::collections::BTreeMap;

#[cfg(feature = "import")]
pub use crate::import::fuzzing::import;
pub(crate) use crate::mongo::fuzzing::comes_back;
#[cfg(feature = "encryption")]
pub use crate::mongo::fuzzing::envelope;
pub use crate::mongo::fuzzing::{document, native, report, text, uri};
use crate::record::Data;

/// Reads a compact entry.
pub fn compact(bytes: &[u8]) {
    let Ok(packed) = std::str::from_utf8(bytes) else { return };
    if let Some(data) = crate::cache::unpack(packed) {
        comes_back(&data);
    }
}

/// Whether two are the same to the last character: `==` does not tell `0.0` from `-0.0`.
pub(crate) fn same(one: &Data, other: &Data) -> bool {
    let text = |data: &Data| serde_json::to_string(&data.iter().collect::<BTreeMap<_, _>>()).ok();
    one == other && text(one) == text(other)
}

#[cfg(test)]
mod tests;
