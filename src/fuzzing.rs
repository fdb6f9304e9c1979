//! What the fuzz targets in `fuzz/` call. Each function takes any bytes, and panics if they break a
//! rule. No part of the public API: there only for `--cfg fuzzing` and for the tests, which replay the
//! corpus.

#[cfg(feature = "import")]
pub use crate::import::fuzzing::import;
pub(crate) use crate::mongo::fuzzing::comes_back;
#[cfg(feature = "encryption")]
pub use crate::mongo::fuzzing::envelope;
pub use crate::mongo::fuzzing::{document, native, report, text, uri};

/// Reads a compact entry.
pub fn compact(bytes: &[u8]) {
    let Ok(packed) = std::str::from_utf8(bytes) else { return };
    if let Some(data) = crate::cache::compact::decode(packed) {
        comes_back(&data);
    }
}

#[cfg(test)]
mod tests;
