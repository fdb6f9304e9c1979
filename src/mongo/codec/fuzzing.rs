//! The properties that the fuzzer checks for any bytes in the place of a session's data.
#![allow(
    clippy::missing_panics_doc,
    clippy::unwrap_used,
    reason = "a panic is what a fuzzer looks for"
)]

use bson::RawBson;
use bson::RawDocument;
#[cfg(feature = "encryption")]
use bson::spec::BinarySubtype;
#[cfg(feature = "encryption")]
use bson::{RawBinaryRef, RawBsonRef};

use crate::cache::compact;
use crate::mongo::codec::{DataFormat, decode, encode, native, text};
use crate::session::{Data, same};

pub(crate) const ID: [u8; 32] = [7; 32];

/// Reads JSON text.
///
/// `serde_json` reads the same, unless the text has an object that `serde_json` takes for a value of its own.
pub fn text(bytes: &[u8]) {
    let Ok(json) = std::str::from_utf8(bytes) else { return };
    let data = text::decode(json);
    if !json.contains("private") && !json.contains("\\u") {
        match (&data, serde_json::from_str::<Data>(json)) {
            (Ok(ours), Ok(theirs)) => assert!(same(ours, &theirs)),
            (Ok(_), Err(error)) => panic!("serde_json refuses this text: {error}"),
            // `serde_json` reads 127 levels.
            (Err(error), Ok(_)) => assert!(error.to_string().contains("98 levels"), "{error}"),
            (Err(_), Err(_)) => {}
        }
    }
    if let Ok(data) = data {
        comes_back(&data);
    }
}

/// Reads a native document.
pub fn native(bytes: &[u8]) {
    let Ok(document) = RawDocument::from_bytes(bytes) else { return };
    if let Ok(data) = native::decode(document) {
        comes_back(&data);
    }
}

/// Reads the bytes as an envelope, and as the decrypted text of one.
#[cfg(feature = "encryption")]
pub fn envelope(bytes: &[u8]) {
    for format in formats() {
        let envelope = RawBinaryRef { subtype: BinarySubtype::Generic, bytes };
        if let Ok(data) = decode(RawBsonRef::Binary(envelope), &format, &ID) {
            comes_back(&data);
        }
        if let DataFormat::Encrypted(keys) = &format {
            let encrypted = crate::mongo::codec::encrypted::encrypt(keys, &ID, bytes).unwrap();
            let envelope = RawBinaryRef { subtype: BinarySubtype::Generic, bytes: &encrypted };
            let opened = decode(RawBsonRef::Binary(envelope), &format, &ID).ok();
            let plain = std::str::from_utf8(bytes).ok().and_then(|text| text::decode(text).ok());
            match (opened, plain) {
                (Some(opened), Some(plain)) => assert!(same(&opened, &plain)),
                (opened, plain) => assert!(opened.is_none() && plain.is_none()),
            }
            let _ = crate::mongo::codec::reencode(RawBsonRef::Binary(envelope), keys, &ID);
        }
    }
}

/// Checks that data, once read, can be stored in every format and is read back unchanged. The encrypted format stores
/// the text, so it needs no check of its own.
pub(crate) fn comes_back(data: &Data) {
    for format in [DataFormat::Text, DataFormat::Native] {
        let stored = match encode(data, &format, &ID) {
            Ok((stored, _)) => RawBson::try_from(stored).unwrap(),
            Err(error) => {
                assert!(error.to_string().contains("larger than"), "{error}");
                continue;
            }
        };
        let decoded = decode(stored.as_raw_bson_ref(), &format, &ID).unwrap();
        assert!(same(data, &decoded), "{format:?}");
    }
    let compact = compact::encode(data).unwrap();
    assert!(same(data, &compact::decode(&compact).unwrap()));
}

pub(crate) fn formats() -> Vec<DataFormat> {
    vec![
        DataFormat::Text,
        DataFormat::Native,
        #[cfg(feature = "encryption")]
        DataFormat::Encrypted(std::sync::Arc::new(keys())),
    ]
}

#[cfg(feature = "encryption")]
pub(crate) fn keys() -> crate::mongo::codec::Keys {
    let key = |byte| crate::mongo::codec::Key::from_bytes(&[byte; 32]);
    crate::mongo::codec::Keys::new(2, key(2)).and_old(1, key(1))
}
