//! The stored document: one session as MongoDB keeps it.
//!
//! ```text
//! { _id: Binary(32), format: 1, data: "{…}" or {…}, expires: Date, rev: Binary(16), created: Date, updated: Date }
//! ```

use bson::spec::BinarySubtype;
use bson::{Binary, Bson, DateTime, Document, RawBson, RawBsonRef, RawDocument, doc};
use serde::{Deserialize, Serialize};

use super::codec::{self, Form};
use crate::backend::Rev;
use crate::error::{Error, ErrorKind, Result};
use crate::key::SessionKey;
use crate::record::{Data, Session, WallTime};

/// The version of the stored format that this release writes.
pub(crate) const FORMAT: i32 = 1;

/// A session as it stands in the collection, for operators who query it.
///
/// [`MongoStore::collection`](crate::MongoStore::collection) is typed with it. Caches hear of any
/// change that is made to it, but for one that touches `expires` and `updated` alone, which is how a
/// session is prolonged.
#[derive(Clone, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct StoredSession {
    /// SHA-256 of the session's id, 32 bytes.
    #[serde(rename = "_id")]
    pub key: Binary,
    /// The version of this format; 1.
    pub format: i32,
    /// The session's data: JSON text, or a document of a store that is
    /// [`queryable`](crate::MongoStoreBuilder::queryable), in whose keys `%`, `.`, NUL and a leading
    /// `$` are percent-escaped. [`data`](Self::data) reads both.
    pub data: Bson,
    /// When the session ends.
    pub expires: DateTime,
    /// New on each write of a store that other instances must hear of, 16 bytes.
    pub rev: Binary,
    /// When the session was created under its present id, by the creating app's clock: a new id,
    /// as at each log-in, begins anew.
    pub created: DateTime,
    /// When the session was last written, by the writing app's clock.
    pub updated: DateTime,
}

impl StoredSession {
    /// Reads the session's data.
    ///
    /// # Errors
    ///
    /// [`Decode`](ErrorKind::Decode) if it is in no form that this release writes.
    pub fn data(&self) -> Result<Data> {
        let stored = RawBson::try_from(self.data.clone());
        codec::decode(stored.map_err(|_| unreadable("its BSON is malformed"))?.as_raw_bson_ref())
    }
}

impl std::fmt::Debug for StoredSession {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("StoredSession")
            .field("format", &self.format)
            .field("expires", &self.expires)
            .field("created", &self.created)
            .field("updated", &self.updated)
            .finish_non_exhaustive()
    }
}

/// A live session in a list: all but what would let somebody use it.
#[derive(Clone, PartialEq)]
#[non_exhaustive]
pub struct LiveSession {
    /// The session's data.
    pub data: Data,
    /// When the session ends.
    pub expires: time::OffsetDateTime,
    /// When the session was created under its present id, by the creating app's clock: a new id,
    /// as at each log-in, begins anew.
    pub created: time::OffsetDateTime,
    /// When the session was last written, by the writing app's clock.
    pub updated: time::OffsetDateTime,
}

impl std::fmt::Debug for LiveSession {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("LiveSession")
            .field("expires", &self.expires)
            .field("created", &self.created)
            .field("updated", &self.updated)
            .finish_non_exhaustive()
    }
}

pub(super) fn id(key: SessionKey) -> Binary {
    binary(key.as_bytes())
}

fn binary(bytes: &[u8]) -> Binary {
    Binary { subtype: BinarySubtype::Generic, bytes: bytes.to_vec() }
}

pub(super) fn date(at: WallTime) -> DateTime {
    DateTime::from_millis(at.millis())
}

/// The document of a new session.
pub(super) fn insertion(
    key: SessionKey,
    rev: Rev,
    (data, form): (&Data, Form),
    expires: WallTime,
    now: WallTime,
) -> Result<Document> {
    Ok(doc! {
        "_id": id(key),
        "format": FORMAT,
        "data": codec::encode(data, form)?.0,
        "expires": date(expires),
        "rev": binary(rev.as_bytes()),
        "created": date(now),
        "updated": date(now),
    })
}

/// What a write that only prolongs a session changes; no instance needs to hear of it, since an
/// entry past the expiry that it knows is a miss.
pub(super) const TOUCHED: [&str; 2] = ["expires", "updated"];

/// Where the expiry stands of a session that an import has stored and not made live yet.
pub(super) const ARRIVED: &str = "importing";

/// The fields of a session with new data and a new expiry, and about how many bytes they have.
pub(super) fn replacement(
    rev: Rev,
    (data, form): (&Data, Form),
    expires: WallTime,
    now: WallTime,
) -> Result<(Document, usize)> {
    let (data, bytes) = codec::encode(data, form)?;
    let fields = doc! {
        "format": FORMAT,
        "data": data,
        "expires": date(expires),
        "rev": binary(rev.as_bytes()),
        "updated": date(now),
    };
    Ok((fields, bytes))
}

/// The stage of an update that gives a session other fields, and leaves one that has expired as it
/// is: that is to say, does not modify it.
///
/// The condition stands here and not beside `_id` in the filter, since a filter by `_id` alone is
/// the server's fast path: with another field in it an update took a quarter longer.
pub(super) fn replaces(fields: &Document, now: WallTime) -> Document {
    doc! { "$replaceWith": { "$cond": [
        { "$gt": ["$expires", date(now)] },
        { "$mergeObjects": ["$$ROOT", { "$literal": fields.clone() }] },
        "$$ROOT",
    ] } }
}

/// The stage of an update that prolongs a session and does nothing else. Of two that cross, the one that lasts
/// longer stays.
pub(super) fn touch(expires: WallTime, now: WallTime) -> Document {
    let [expiry, updated] = TOUCHED;
    doc! { "$set": { expiry: { "$max": ["$expires", date(expires)] }, updated: date(now) } }
}

/// The key of a document, if it has one of ours.
pub(super) fn key(document: &RawDocument) -> Option<SessionKey> {
    let id = document.get_binary("_id").ok()?;
    SessionKey::from_bytes(id.bytes)
}

/// Whether a document has an expiry, and one that is later than `now`.
pub(super) fn expires_after(document: &RawDocument, now: WallTime) -> bool {
    document.get_datetime("expires").is_ok_and(|at| at > date(now))
}

/// The bytes of a document's `rev`; none if it has none.
pub(super) fn rev(document: &RawDocument) -> &[u8] {
    document.get_binary("rev").map_or(&[], |rev| rev.bytes)
}

/// Reads a session back.
pub(super) fn session(document: &RawDocument) -> Result<Session> {
    let fields = Fields::of(document)?;
    Ok(Session {
        data: codec::decode(fields.data()?)?,
        expires: WallTime::from_millis(fields.expires()?.timestamp_millis()),
    })
}

/// Reads a session for a list.
pub(super) fn live_session(document: &RawDocument) -> Result<LiveSession> {
    let fields = Fields::of(document)?;
    Ok(LiveSession {
        data: codec::decode(fields.data()?)?,
        expires: calendar(fields.expires()?)?,
        created: calendar(Fields::date("created", fields.created)?)?,
        updated: calendar(Fields::date("updated", fields.updated)?)?,
    })
}

/// The fields of a document whose format is ours.
struct Fields<'a> {
    data: Option<RawBsonRef<'a>>,
    expires: Option<RawBsonRef<'a>>,
    created: Option<RawBsonRef<'a>>,
    updated: Option<RawBsonRef<'a>>,
}

impl<'a> Fields<'a> {
    fn of(document: &'a RawDocument) -> Result<Self> {
        let mut fields = Self { data: None, expires: None, created: None, updated: None };
        let mut format = None;
        for element in document {
            let Ok((key, value)) = element else {
                return Err(unreadable("its BSON is truncated or malformed"));
            };
            match key.as_str() {
                "format" => format = Some(value),
                "data" => fields.data = Some(value),
                "expires" => fields.expires = Some(value),
                "created" => fields.created = Some(value),
                "updated" => fields.updated = Some(value),
                _ => {}
            }
        }
        match format {
            Some(RawBsonRef::Int32(FORMAT)) => Ok(fields),
            Some(RawBsonRef::Int64(n)) if n == i64::from(FORMAT) => Ok(fields),
            Some(RawBsonRef::Int32(n)) => Err(foreign_format(i64::from(n))),
            Some(RawBsonRef::Int64(n)) => Err(foreign_format(n)),
            Some(other) => Err(wrong_type("format", "a whole number", other)),
            None => Err(unreadable(
                "it has no `format`, so this store did not write it; does another program use the \
                 same collection?",
            )),
        }
    }

    fn data(&self) -> Result<RawBsonRef<'a>> {
        self.data.ok_or_else(|| unreadable("it has no `data`"))
    }

    fn expires(&self) -> Result<DateTime> {
        Self::date("expires", self.expires)
    }

    fn date(name: &str, value: Option<RawBsonRef<'a>>) -> Result<DateTime> {
        match value {
            Some(RawBsonRef::DateTime(date)) => Ok(date),
            Some(other) => Err(wrong_type(name, "a date", other)),
            None => Err(unreadable(&format!("it has no `{name}`"))),
        }
    }
}

fn calendar(date: DateTime) -> Result<time::OffsetDateTime> {
    WallTime::from_millis(date.timestamp_millis())
        .to_datetime()
        .ok_or_else(|| unreadable("a date in it is beyond the year 9999"))
}

fn foreign_format(found: i64) -> Error {
    unreadable(&format!(
        "its format is {found} and this version reads format {FORMAT}; a newer version may have \
         written it"
    ))
}

fn wrong_type(field: &str, wanted: &str, found: RawBsonRef<'_>) -> Error {
    unreadable(&format!("its `{field}` should be {wanted} and is a {:?}", found.element_type()))
}

fn unreadable(what: &str) -> Error {
    Error::new(ErrorKind::Decode, format!("the stored session cannot be read: {what}"))
}

#[cfg(test)]
mod tests {
    use bson::RawDocumentBuf;
    use serde_json::json;

    use super::*;
    use crate::backend::RevSource;

    fn stored() -> Document {
        let data = Data::from([("views".to_owned(), json!(3))]);
        let (at, now) = (WallTime::from_millis(2_000), WallTime::from_millis(1_000));
        insertion(SessionKey::of(7), RevSource::new().next(), (&data, Form::Native), at, now)
            .unwrap()
    }

    fn read(document: &Document) -> Result<Session> {
        session(&RawDocumentBuf::try_from(document).unwrap())
    }

    #[test]
    fn what_is_written_is_read() {
        let session = read(&stored()).unwrap();
        assert_eq!(session.data["views"], json!(3));
        assert_eq!(session.expires.millis(), 2_000);
    }

    #[test]
    fn the_typed_document_has_the_fields_that_are_written() {
        let typed: StoredSession = bson::deserialize_from_document(stored()).unwrap();
        assert_eq!(bson::serialize_to_document(&typed).unwrap(), stored_like(&typed));
        assert_eq!(typed.key.bytes, SessionKey::of(7).as_bytes());
    }

    fn stored_like(typed: &StoredSession) -> Document {
        let mut document = stored();
        document.insert("rev", typed.rev.clone());
        document
    }

    #[test]
    fn no_field_holds_the_id() {
        let id = 0x0123_4567_89ab_cdef_0123_4567_89ab_cdef_i128;
        let data = Data::new();
        let at = WallTime::from_millis(2_000);
        let document =
            insertion(SessionKey::of(id), RevSource::new().next(), (&data, Form::Text), at, at)
                .unwrap();
        let bytes = document.to_vec().unwrap();
        assert!(!bytes.windows(16).any(|window| window == id.to_le_bytes()));
    }

    #[test]
    fn foreign_newer_and_broken_documents_say_what_was_found() {
        for (field, value, said) in [
            ("format", None, "another program"),
            ("format", Some(Bson::Int32(2)), "its format is 2"),
            ("format", Some(Bson::String("1".into())), "String"),
            ("data", None, "no `data`"),
            ("data", Some(Bson::Int32(1)), "should be a text or a document and is a Int32"),
            ("data", Some(Bson::String("{".into())), "JSON is truncated"),
            ("expires", None, "no `expires`"),
            ("expires", Some(Bson::Int64(5)), "should be a date and is a Int64"),
        ] {
            let mut document = stored();
            match value {
                Some(value) => drop(document.insert(field, value)),
                None => drop(document.remove(field)),
            }
            let error = read(&document).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Decode);
            assert!(error.to_string().contains(said), "{field}: {error}");
        }
    }
}
