//! The codec: a session's data to what is stored of it and back, without loss.
//!
//! It is stored as JSON text, or as a native document that MongoDB can query. Both are read, whatever
//! is written, so the choice may change at any time.

mod native;
#[cfg(test)]
mod samples;
mod text;

use std::borrow::Cow;

use bson::{Bson, RawBsonRef};

use crate::error::{Error, ErrorKind, Result};
use crate::record::Data;

/// The server keeps documents of at most 100 levels; two are taken by the document and its `data`. A
/// text has the same bound, so that what is stored in one form can be stored in the other.
/// <https://www.mongodb.com/docs/manual/reference/limits/#mongodb-limit-Nested-Depth-for-BSON-Documents>
const MAX_DEPTH: usize = 98;

/// The server keeps documents of at most 16 MiB; some is left for the fields beside the data.
/// <https://www.mongodb.com/docs/manual/reference/limits/#mongodb-limit-BSON-Document-Size>
const MAX_BYTES: usize = (16 << 20) - (16 << 10);

/// How sessions' data is stored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Form {
    #[default]
    Text,
    Native,
}

/// Encodes a session's data; answers with about how many bytes that is, too.
pub(super) fn encode(data: &Data, form: Form) -> Result<(Bson, usize)> {
    match form {
        Form::Text => {
            let text = text::encode(data)?;
            let bytes = text.len();
            Ok((Bson::String(text), bytes))
        }
        Form::Native => {
            let (document, bytes) = native::encode(data)?;
            Ok((Bson::Document(document), bytes))
        }
    }
}

/// Decodes a session's data, in whichever form it is.
pub(super) fn decode(stored: RawBsonRef<'_>) -> Result<Data> {
    match stored {
        RawBsonRef::String(text) => text::decode(text),
        RawBsonRef::Document(document) => native::decode(document),
        other => Err(unreadable(format!(
            "its `data` should be a text or a document and is a {:?}",
            other.element_type()
        ))),
    }
}

/// A key of the data as it is stored in a document.
pub(super) fn escape(key: &str) -> Cow<'_, str> {
    native::escape(key)
}

fn too_deep() -> Error {
    unstorable(&format!("its data is nested deeper than {MAX_DEPTH} levels"))
}

fn too_large(encoding: &str) -> Error {
    unstorable(&format!("its data is larger than {MAX_BYTES} bytes of {encoding}"))
}

fn unstorable(why: &str) -> Error {
    Error::new(ErrorKind::Encode, format!("the session cannot be stored: {why}"))
}

pub(super) const MALFORMED: &str = "its BSON is truncated or malformed";

pub(super) fn unreadable(what: impl AsRef<str>) -> Error {
    Error::new(ErrorKind::Decode, format!("the stored session cannot be read: {}", what.as_ref()))
}
