//! The functions that the fuzz targets in `fuzz/` call. Each one decodes any bytes and panics if a rule is broken.
//!
//! The module is not part of the public API. It exists under `--cfg fuzzing`, and in tests, which replay the corpus.

#[cfg(feature = "import")]
pub use crate::import::fuzzing::import;
pub(crate) use crate::mongo::fuzzing::comes_back;
#[cfg(feature = "encryption")]
pub use crate::mongo::fuzzing::envelope;
pub use crate::mongo::fuzzing::{document, native, report, text, uri};

/// Reads a compact entry.
pub fn compact(bytes: &[u8]) {
    let Ok(compact) = std::str::from_utf8(bytes) else { return };
    if let Some(data) = crate::cache::compact::decode(compact) {
        comes_back(&data);
    }
}

#[cfg(test)]
mod tests;
