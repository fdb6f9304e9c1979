//! The fuzz target for documents of another store.
#![allow(
    clippy::missing_panics_doc,
    clippy::unwrap_used,
    reason = "a panic is what a fuzzer looks for"
)]

use bson::spec::BinarySubtype;
use bson::{Binary, DateTime, RawDocument, RawDocumentBuf, doc};

use crate::fuzzing::comes_back;
use crate::import::read;

/// The id of the record. In a cookie it is `AAAAAAAAAAAAAAAAAAAABw`.
pub(crate) const NUMBER: i128 = 7;

/// Reads these bytes as a document of the old collection, and as the record in one.
pub fn import(bytes: &[u8]) {
    if let Ok(raw) = RawDocument::from_bytes(bytes) {
        take(raw);
    }
    take(&old(bytes));
}

fn take(document: &RawDocument) {
    if let Ok(old) = read(document) {
        // The data may be deeper than what can be stored.
        if crate::cache::compact::encode(&old.data).is_some() {
            comes_back(&old.data);
        }
    }
}

/// Returns a document of the old collection with this record.
pub(crate) fn old(record: &[u8]) -> RawDocumentBuf {
    let document = doc! {
        "_id": tower_sessions_core::session::Id(NUMBER).to_string(),
        "data": Binary { subtype: BinarySubtype::Generic, bytes: record.to_vec() },
        "expireAt": DateTime::from_millis(1),
    };
    RawDocumentBuf::try_from(&document).unwrap()
}
