//! The codec: encodes a session's data for the field `data`, and decodes it, without loss.
//!
//! There are three formats: JSON text, a native document that MongoDB can query, and JSON text in an encrypted
//! envelope. A store writes one of them and reads all, so the choice may change at any time. Reading an envelope
//! needs its key.

#[cfg(feature = "encryption")]
mod encrypted;
mod envelope;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzzing;
#[cfg(feature = "encryption")]
mod keys;
mod native;
mod text;

use std::borrow::Cow;
#[cfg(feature = "encryption")]
use std::sync::Arc;

use bson::{Bson, RawBsonRef};
use serde_json::Value;

#[cfg(feature = "encryption")]
pub use crate::mongo::codec::keys::{Key, Keys};

use crate::error::{Error, ErrorKind, Result};
use crate::session::{Data, MAX_DEPTH};

/// The most bytes of data. The server stores documents of at most 16 MiB; this leaves room for the other fields.
/// <https://www.mongodb.com/docs/manual/reference/limits/#mongodb-limit-BSON-Document-Size>
const MAX_BYTES: usize = (16 << 20) - (16 << 10);

/// The format in which a store writes data, and the keys with which it reads data.
#[derive(Clone, Debug, Default)]
pub(crate) enum DataFormat {
    #[default]
    Text,
    Native,
    #[cfg(feature = "encryption")]
    Encrypted(Arc<Keys>),
}

/// Encodes the data of the session whose document has this `_id`. Also returns the approximate size in bytes.
#[cfg_attr(
    not(feature = "encryption"),
    allow(unused_variables, reason = "only encryption uses them")
)]
pub(crate) fn encode(data: &Data, format: &DataFormat, id: &[u8]) -> Result<(Bson, usize)> {
    match format {
        DataFormat::Text => {
            let text = text::encode(data)?;
            let bytes = text.len();
            Ok((Bson::String(text), bytes))
        }
        DataFormat::Native => {
            let (document, bytes) = native::encode(data)?;
            Ok((Bson::Document(document), bytes))
        }
        #[cfg(feature = "encryption")]
        DataFormat::Encrypted(keys) => {
            let envelope = encrypted::encrypt(keys, id, text::encode(data)?.as_bytes())?;
            let bytes = envelope.len();
            Ok((binary(envelope), bytes))
        }
    }
}

/// Encodes one value of the data, in the native format.
pub(crate) fn encode_value(value: &Value) -> Result<Bson> {
    native::encode_value(value)
}

/// Decodes the data of the session whose document has this `_id`, in any format.
pub(crate) fn decode(stored: RawBsonRef<'_>, format: &DataFormat, id: &[u8]) -> Result<Data> {
    match stored {
        RawBsonRef::String(_) | RawBsonRef::Document(_) if format.requires_encrypted() => {
            Err(unreadable("its data is not encrypted, and this store refuses plain sessions"))
        }
        RawBsonRef::String(text) => text::decode(text),
        RawBsonRef::Document(document) => native::decode(document),
        RawBsonRef::Binary(envelope) => text::decode(&format.decrypt(envelope.bytes, id)?),
        other => Err(unreadable(format!(
            "its `data` should be a text, a document or a binary and is a {:?}",
            other.element_type()
        ))),
    }
}

/// Escapes a key of the data, as the native format stores it.
pub(crate) fn escape(key: &str) -> Cow<'_, str> {
    native::escape(key)
}

/// Encrypts the stored data of the session whose document has this `_id` with the newest key. `None` if the newest
/// key already encrypts it.
#[cfg(feature = "encryption")]
pub(crate) fn reencode(
    stored: RawBsonRef<'_>,
    keys: &Arc<Keys>,
    id: &[u8],
) -> Result<Option<Bson>> {
    let format = DataFormat::Encrypted(keys.clone());
    let envelope = match stored {
        RawBsonRef::Binary(old) if envelope::Envelope::of(old.bytes)?.key == keys.newest().0 => {
            // If the data cannot be decrypted, the caller must know.
            format.decrypt(old.bytes, id)?;
            return Ok(None);
        }
        RawBsonRef::Binary(old) => {
            encrypted::encrypt(keys, id, format.decrypt(old.bytes, id)?.as_bytes())?
        }
        plain => {
            return encode(&decode(plain, &format, id)?, &format, id).map(|(data, _)| Some(data));
        }
    };
    Ok(Some(binary(envelope)))
}

#[cfg(feature = "encryption")]
fn binary(bytes: Vec<u8>) -> Bson {
    Bson::Binary(bson::Binary { subtype: bson::spec::BinarySubtype::Generic, bytes })
}

impl DataFormat {
    /// Whether the data can be stored, as far as that is up to the data.
    #[cfg(feature = "import")]
    pub(crate) fn holds(&self, data: &Data) -> bool {
        match self {
            Self::Native => native::encode(data).is_ok(),
            Self::Text => text::encode(data).is_ok(),
            // The text is what is encrypted.
            #[cfg(feature = "encryption")]
            Self::Encrypted(_) => text::encode(data).is_ok(),
        }
    }

    fn requires_encrypted(&self) -> bool {
        match self {
            #[cfg(feature = "encryption")]
            Self::Encrypted(keys) => keys.requires_encrypted(),
            Self::Text | Self::Native => false,
        }
    }

    /// Decrypts the text in an envelope.
    #[cfg_attr(
        not(feature = "encryption"),
        allow(unused_variables, reason = "only encryption uses them")
    )]
    fn decrypt(&self, envelope: &[u8], id: &[u8]) -> Result<String> {
        match self {
            #[cfg(feature = "encryption")]
            Self::Encrypted(keys) => encrypted::decrypt(keys, id, envelope),
            Self::Text | Self::Native => {
                let key = envelope::Envelope::of(envelope)?.key;
                Err(unreadable(format!(
                    "its data is encrypted with key {key}, and this store was built without keys \
                     (the feature `encryption` and MongoStoreBuilder::encryption)"
                )))
            }
        }
    }
}

fn too_deep() -> Error {
    unstorable(&format!("its data is nested deeper than {MAX_DEPTH} levels"))
}

#[cold]
fn too_deep_to_read() -> Error {
    unreadable(format!("its data is nested deeper than {MAX_DEPTH} levels"))
}

fn too_large(encoding: &str) -> Error {
    unstorable(&format!("its data is larger than {MAX_BYTES} bytes of {encoding}"))
}

fn unstorable(why: &str) -> Error {
    Error::new(ErrorKind::Encode, format!("the session cannot be stored: {why}"))
}

pub(crate) const MALFORMED: &str = "its BSON is truncated or malformed";

pub(crate) fn unreadable(why: impl AsRef<str>) -> Error {
    Error::new(ErrorKind::Decode, format!("the stored session cannot be read: {}", why.as_ref()))
}
