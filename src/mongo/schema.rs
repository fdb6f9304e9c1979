//! The stored document: one session as MongoDB keeps it.
//!
//! ```text
//! { _id: Binary(32), format: 1, data: "{…}" or {…} or Binary, expires: Date, rev: Binary(16), created: Date,
//! updated: Date }
//! ```
//!
//! A session with an owner also has `owner: String`. A session that had an owner and has none now may have
//! `owner: null`.

use bson::spec::BinarySubtype;
use bson::{Binary, Bson, DateTime, Document, RawBsonRef, RawDocument, doc};

use crate::batching::{Condition, NewExpiry};
use crate::error::{Error, Result};
use crate::mongo::codec::{self, DataFormat, MALFORMED, unreadable};
use crate::mongo::lifetime::AbsoluteLifetime;
use crate::mongo::owner_field::OwnerUpdate;
use crate::mongo::types::LiveSession;
use crate::session::handle::SessionHandle;
use crate::session::id::SessionKey;
use crate::session::owner::Owner;
use crate::session::revision::Rev;
use crate::session::{Data, Session};
use crate::time::WallTime;

/// The version of the stored format that this release writes.
pub(crate) const FORMAT: i32 = 1;

/// The `_id` of the session with this key.
pub(crate) fn id(key: SessionKey) -> Binary {
    binary(key.as_bytes())
}

pub(crate) fn binary(bytes: &[u8]) -> Binary {
    Binary { subtype: BinarySubtype::Generic, bytes: bytes.to_vec() }
}

/// The first and the last possible key of a session in the index on `_id`. No session has one of these two. Keys are
/// binaries of 32 bytes, and MongoDB
/// [orders](https://www.mongodb.com/docs/manual/reference/bson-type-comparison-order/#binary-data) binaries by their
/// length first.
pub(crate) const FIRST_KEY: [u8; 32] = [0; 32];
const LAST_KEY: [u8; 32] = [0xff; 32];

/// The condition on `_id` for the keys after `last`, or for all keys. Documents of other programs, whose `_id` has
/// another type or length, do not match.
pub(crate) fn keys_after(last: Option<Bson>) -> Document {
    let end = binary(&LAST_KEY);
    match last {
        None => doc! { "$gte": binary(&FIRST_KEY), "$lte": end },
        Some(last) => doc! { "$gt": last, "$lte": end },
    }
}

/// Matches the documents of other programs: those whose `_id` is not the key of a session. A comparison matches only
/// values of one type, so the other types are listed. Each is a range of the index on `_id`, so the cost grows with
/// the number of these documents, not with the number of sessions.
pub(crate) fn foreign_filter() -> Document {
    let types = ["null", "number", "string", "object", "objectId", "bool", "date", "timestamp"];
    doc! { "$or": [
        { "_id": { "$type": types.to_vec() } },
        { "_id": { "$lt": binary(&FIRST_KEY) } },
        { "_id": { "$gt": binary(&LAST_KEY) } },
    ] }
}

pub(crate) fn date(at: WallTime) -> DateTime {
    DateTime::from_millis(at.millis())
}

/// The document of a new session.
pub(crate) fn insert_document(
    key: SessionKey,
    rev: Rev,
    (data, format): (&Data, &DataFormat),
    expires: WallTime,
    now: WallTime,
) -> Result<Document> {
    Ok(doc! {
        "_id": id(key),
        "format": FORMAT,
        "data": codec::encode(data, format, key.as_bytes())?.0,
        "expires": date(expires),
        "rev": binary(rev.as_bytes()),
        "created": date(now),
        "updated": date(now),
    })
}

/// The fields that a touch changes. The change stream leaves such a change out: a cache entry that is past its own
/// expiry is a miss, so other instances read the later expiry by themselves.
pub(crate) const TOUCH_FIELDS: [&str; 2] = ["expires", "updated"];

/// The fields that a re-encryption changes. The change stream leaves this change out too, since the decrypted data is
/// the same. The second field distinguishes it from a change of data.
pub(crate) const REENCRYPT_FIELDS: [&str; 2] = ["data", "reencrypted"];

/// The field with the expiry of a session that an import has staged and not activated yet.
pub(crate) const IMPORTING: &str = "importing";

/// The fields of a session with new data and a new expiry, and the approximate size of the data in bytes.
pub(crate) fn replacement_fields(
    key: SessionKey,
    rev: Rev,
    (data, format): (&Data, &DataFormat),
    expires: WallTime,
    now: WallTime,
) -> Result<(Document, usize)> {
    let (data, bytes) = codec::encode(data, format, key.as_bytes())?;
    let fields = doc! {
        "format": FORMAT,
        "data": data,
        "expires": date(expires),
        "rev": binary(rev.as_bytes()),
        "updated": date(now),
    };
    Ok((fields, bytes))
}

/// The stage of an update that stores other fields in a live session. It does not modify a session that has expired,
/// nor one whose `expires` is not a date: such a session cannot be loaded and is not counted, and a save must not
/// make it live.
///
/// The type is checked too, because a comparison in an expression also holds between types: a timestamp, a regular
/// expression and `MaxKey` are greater than each date.
///
/// The condition is in the stage and not in the filter, because a filter by `_id` alone is the server's fast path.
/// With another field in the filter, an update took a quarter longer.
///
/// If an update has a [condition](Condition::HasRev), and its session is not live or does not meet the condition, the
/// stage would change the `_id`. The server refuses that with error 66 (`ImmutableField`), for this statement alone. So the reply to a batch tells which
/// statements were not carried out. The number of modified documents would not: a document with another `rev` may
/// have been modified by the statement, and by somebody else since.
pub(crate) fn replace_update(
    fields: Document,
    owned: OwnerUpdate,
    now: WallTime,
    condition: Condition,
    expiry: NewExpiry,
    lifetime: AbsoluteLifetime,
) -> Document {
    let keeps_later = matches!(expiry, NewExpiry::AtLeast(_));
    let expires = fields.get("expires").cloned();
    let mut merged = vec![Bson::from("$$ROOT"), doc! { "$literal": fields }.into()];
    if let Some(expires) = expires.filter(|_| keeps_later || lifetime.0.is_some()) {
        let later = doc! { "$max": ["$expires", &expires] };
        let expires = if keeps_later { later.into() } else { expires };
        merged.push(doc! { "expires": lifetime.cap_expression(expires) }.into());
    }
    if owned == OwnerUpdate::Clear {
        // Null in place of a removed field: removing it made a batch of saves a fifth more expensive, and some
        // servers do not know `$unsetField`. A session that never had an owner gets no null, because nulls are in
        // the index.
        let had_one = doc! { "$gt": ["$owner", Bson::Null] };
        let nobody = doc! { "$cond": [had_one, Bson::Null, "$$REMOVE"] };
        merged.push(doc! { "owner": nobody }.into());
    }
    let mut is_live = vec![
        doc! { "$gt": ["$expires", date(now)] },
        doc! { "$eq": [{ "$type": "$expires" }, "date"] },
    ];
    is_live.extend(lifetime.condition(now).into_iter().flatten());
    let is_live = doc! { "$and": is_live };
    let stored = doc! { "$mergeObjects": merged };
    let Condition::HasRev(rev) = condition else {
        return doc! { "$replaceWith": { "$cond": [is_live, stored, "$$ROOT"] } };
    };
    let has_rev = rev.map_or_else(no_valid_rev, |rev| {
        doc! { "$eq": ["$rev", binary(rev.as_bytes())] }
    });
    let refused = doc! { "$literal": { "_id": 0 } };
    doc! { "$replaceWith": { "$cond": [{ "$and": [is_live, has_rev] }, stored, refused] } }
}

/// The size of each [`Rev`].
const REV_BYTES: i32 = 16;

/// Whether a document has no `rev` that a store writes: somebody has edited it by hand. The server refuses the size of
/// what is not a binary.
fn no_valid_rev() -> Document {
    let is_binary = doc! { "$eq": [{ "$type": "$rev" }, "binData"] };
    let has_other_size = doc! { "$ne": [{ "$binarySize": "$rev" }, REV_BYTES] };
    doc! { "$cond": [is_binary, has_other_size, true] }
}

/// The stage of an update that only prolongs a session. If two touches overlap, the later expiry stays.
pub(crate) fn touch_update(
    expires: WallTime,
    now: WallTime,
    lifetime: AbsoluteLifetime,
) -> Document {
    let [expiry, updated] = TOUCH_FIELDS;
    let latest = doc! { "$max": ["$expires", date(expires)] };
    doc! { "$set": { expiry: lifetime.cap_expression(latest), updated: date(now) } }
}

/// The key of the session in a document; `None` for a document of another program.
pub(crate) fn key(document: &RawDocument) -> Option<SessionKey> {
    let id = document.get_binary("_id").ok()?;
    (id.subtype == BinarySubtype::Generic).then(|| SessionKey::from_bytes(id.bytes)).flatten()
}

/// Whether a session expires later than `now`.
///
/// # Errors
///
/// `Decode`, as for a load, if its `expires` is not a date.
pub(crate) fn is_live(document: &RawDocument, now: WallTime) -> Result<bool> {
    let expires = document.get("expires").map_err(|_| unreadable(MALFORMED))?;
    Ok(Fields::date("expires", expires)? > date(now))
}

/// The condition that a field still has the value that was read in a document.
///
/// With `$eq`, the server does not take a stored document for operators, nor a stored regular expression for a
/// pattern.
///
/// # Errors
///
/// `Decode` for a deprecated type, because some servers do not compare with it.
pub(crate) fn unchanged(document: &RawDocument, field: &str) -> Result<Bson> {
    let condition = match document.get(field).map_err(|_| unreadable(MALFORMED))? {
        None => doc! { "$exists": false },
        // `$eq` with null would match a document without the field too.
        Some(RawBsonRef::Null) => doc! { "$type": "null" },
        Some(
            value @ (RawBsonRef::Undefined | RawBsonRef::Symbol(_) | RawBsonRef::DbPointer(_)),
        ) => return Err(wrong_type(field, "a binary", value)),
        Some(value) => doc! { "$eq": Bson::try_from(value).map_err(|_| unreadable(MALFORMED))? },
    };
    Ok(condition.into())
}

/// The value of a field. Null if the field is missing: a query by null finds such a document.
pub(crate) fn value(document: &RawDocument, field: &str) -> Bson {
    let value = document.get(field).ok().flatten();
    value.and_then(|value| Bson::try_from(value).ok()).unwrap_or(Bson::Null)
}

/// The bytes of a document's `rev`; empty if the document has no `rev`.
pub(crate) fn rev(document: &RawDocument) -> &[u8] {
    document.get_binary("rev").map_or(&[], |rev| rev.bytes)
}

/// Reads a session back.
pub(crate) fn session(document: &RawDocument, format: &DataFormat) -> Result<Session> {
    let fields = Fields::of(document)?;
    Ok(Session {
        data: codec::decode(fields.data()?, format, fields.id)?,
        expires: WallTime::from_millis(fields.expires()?.timestamp_millis()),
        rev: fields.rev(),
        created: fields.created_at(),
    })
}

/// The data of a session as it is stored, and its `_id`.
#[cfg(feature = "encryption")]
pub(crate) fn stored_data(document: &RawDocument) -> Result<(RawBsonRef<'_>, &[u8])> {
    let fields = Fields::of(document)?;
    Ok((fields.data()?, fields.id))
}

/// Reads a session for a list.
pub(crate) fn live_session(document: &RawDocument, format: &DataFormat) -> Result<LiveSession> {
    let fields = Fields::of(document)?;
    let key = key(document).ok_or_else(|| unreadable("its `_id` is no session's key"))?;
    Ok(LiveSession {
        handle: SessionHandle::of(key),
        owner: fields.owner()?,
        data: codec::decode(fields.data()?, format, fields.id)?,
        expires: calendar(fields.expires()?)?,
        created: calendar(Fields::date("created", fields.created)?)?,
        updated: calendar(Fields::date("updated", fields.updated)?)?,
    })
}

/// The fields of a document of this format. It borrows them, so that reading a session copies nothing.
struct Fields<'a> {
    /// Empty if `_id` is not a binary.
    id: &'a [u8],
    data: Option<RawBsonRef<'a>>,
    expires: Option<RawBsonRef<'a>>,
    rev: Option<RawBsonRef<'a>>,
    created: Option<RawBsonRef<'a>>,
    updated: Option<RawBsonRef<'a>>,
    owner: Option<RawBsonRef<'a>>,
}

impl<'a> Fields<'a> {
    fn of(document: &'a RawDocument) -> Result<Self> {
        let mut fields = Self {
            id: &[],
            data: None,
            expires: None,
            rev: None,
            created: None,
            updated: None,
            owner: None,
        };
        let mut format = None;
        for element in document {
            let Ok((key, value)) = element else {
                return Err(unreadable(MALFORMED));
            };
            match key.as_str() {
                "_id" => fields.id = value.as_binary().map_or(&[], |id| id.bytes),
                "format" => format = Some(value),
                "data" => fields.data = Some(value),
                "expires" => fields.expires = Some(value),
                "rev" => fields.rev = Some(value),
                "created" => fields.created = Some(value),
                "updated" => fields.updated = Some(value),
                "owner" => fields.owner = Some(value),
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

    /// `None` if it is not one that a store writes. No load depends on it.
    fn rev(&self) -> Option<Rev> {
        self.rev?.as_binary().and_then(|rev| Rev::from_bytes(rev.bytes))
    }

    /// `None` if it is not a date. No load depends on it.
    fn created_at(&self) -> Option<WallTime> {
        let created = self.created?.as_datetime()?;
        Some(WallTime::from_millis(created.timestamp_millis()))
    }

    fn owner(&self) -> Result<Option<Owner>> {
        match self.owner {
            None | Some(RawBsonRef::Null) => Ok(None),
            Some(RawBsonRef::String(owner)) => Ok(Some(owner.into())),
            Some(other) => Err(wrong_type("owner", "a text", other)),
        }
    }

    fn date(name: &str, value: Option<RawBsonRef<'a>>) -> Result<DateTime> {
        match value {
            Some(RawBsonRef::DateTime(date)) => Ok(date),
            Some(other) => Err(wrong_type(name, "a date", other)),
            None => Err(unreadable(format!("it has no `{name}`"))),
        }
    }
}

fn calendar(date: DateTime) -> Result<time::OffsetDateTime> {
    WallTime::from_millis(date.timestamp_millis())
        .to_datetime()
        .ok_or_else(|| unreadable("a date in it is beyond the year 9999"))
}

fn foreign_format(found: i64) -> Error {
    unreadable(format!(
        "its format is {found} and this version reads format {FORMAT}; a newer version may have \
         written it"
    ))
}

fn wrong_type(field: &str, wanted: &str, found: RawBsonRef<'_>) -> Error {
    unreadable(format!("its `{field}` should be {wanted} and is a {:?}", found.element_type()))
}

#[cfg(test)]
mod tests {
    use bson::RawDocumentBuf;
    use serde_json::json;

    use super::*;
    use crate::StoredSession;
    use crate::error::ErrorKind;
    use crate::session::revision::RevSource;

    fn stored() -> Document {
        let data = Data::from([("views".to_owned(), json!(3))]);
        let at = WallTime::from_millis(2_000);
        let now = WallTime::from_millis(1_000);
        insert_document(
            SessionKey::of(7),
            RevSource::new().next(),
            (&data, &DataFormat::Native),
            at,
            now,
        )
        .unwrap()
    }

    fn read(document: &Document) -> Result<Session> {
        session(&RawDocumentBuf::try_from(document).unwrap(), &DataFormat::Text)
    }

    #[test]
    fn a_written_session_is_read_back() {
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
        let document = insert_document(
            SessionKey::of(id),
            RevSource::new().next(),
            (&data, &DataFormat::Text),
            at,
            at,
        )
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
            ("data", Some(Bson::Int32(1)), "a text, a document or a binary and is a Int32"),
            ("data", Some(Bson::String("{".into())), "JSON is truncated"),
            ("expires", None, "no `expires`"),
            ("expires", Some(Bson::Int64(5)), "should be a date and is a Int64"),
        ] {
            let mut document = stored();
            match value {
                Some(value) => {
                    document.insert(field, value);
                }
                None => {
                    document.remove(field);
                }
            }
            let error = read(&document).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Decode);
            assert!(error.to_string().contains(said), "{field}: {error}");
        }
    }

    /// The bytes that an oplog entry adds to a delta (`kSizeOfDeltaOplogEntryMetadata`).
    const DELTA_METADATA: usize = 15;

    fn bytes(document: &Document) -> usize {
        document.to_vec().unwrap().len()
    }

    /// How much smaller the delta of an update is than the whole document, in bytes.
    ///
    /// MongoDB writes an update by a pipeline into its oplog as a delta, if that is smaller than the whole document
    /// ([`computeOplogDiff`](https://github.com/mongodb/mongo/blob/master/src/mongo/db/update/document_diff_calculator.cpp)).
    /// Then its event is `update`, and names the fields. Otherwise its event is `replace`, without `rev`, and each
    /// instance takes it for a write of another instance. This function counts `data` as changed in full; the real
    /// delta of a document may be smaller.
    fn bytes_to_spare(before: &Document, after: &Document) -> usize {
        let mut updated = Document::new();
        let mut inserted = Document::new();
        for (field, value) in after {
            match before.get(field) {
                Some(old) if old == value => {}
                Some(_) => {
                    updated.insert(field, value.clone());
                }
                None => {
                    inserted.insert(field, value.clone());
                }
            }
        }
        let mut diff = Document::new();
        for (section, fields) in [("u", updated), ("i", inserted)] {
            if !fields.is_empty() {
                diff.insert(section, fields);
            }
        }
        assert!(before.keys().all(|field| after.contains_key(field)), "a delta that removes");
        bytes(after).checked_sub(bytes(&diff) + DELTA_METADATA).unwrap()
    }

    /// The result of `$mergeObjects`.
    fn merge(before: &Document, fields: Document) -> Document {
        let mut after = before.clone();
        after.extend(fields);
        after
    }

    fn formats() -> Vec<DataFormat> {
        vec![
            DataFormat::Text,
            DataFormat::Native,
            #[cfg(feature = "encryption")]
            DataFormat::Encrypted(std::sync::Arc::new(crate::mongo::Keys::new(
                1,
                crate::mongo::Key::from_bytes(&[7; 32]),
            ))),
        ]
    }

    #[test]
    fn the_delta_of_each_write_is_smaller_than_the_document_so_its_event_is_an_update() {
        let revs = RevSource::new();
        let key = SessionKey::of(7);
        let wall = WallTime::from_millis;
        let texts = [0, 1, 100, 100_000];
        for (format, letters) in
            formats().iter().flat_map(|format| texts.map(|letters| (format, letters)))
        {
            let data = |letter: &str| match letters {
                0 => Data::new(),
                _ => Data::from([("text".to_owned(), json!(letter.repeat(letters)))]),
            };
            let old = (&data("a"), format);
            let new = (&data("b"), format);
            let stored = insert_document(key, revs.next(), old, wall(2_000), wall(1_000)).unwrap();
            let save =
                || replacement_fields(key, revs.next(), new, wall(3_000), wall(1_500)).unwrap().0;
            let spare = |before: &Document, fields| bytes_to_spare(before, &merge(before, fields));

            // A save. Only `_id`, `format` and `created` do not change, so they are all that the delta saves.
            let least = 48;
            let saved = merge(&stored, save());
            // Data that stays the same is not in the delta.
            let is_changed = stored.get("data") != saved.get("data");
            let data_bytes =
                if is_changed { 0 } else { bytes(&doc! { "data": &stored["data"] }) - 5 };
            assert_eq!(spare(&stored, save()), least + data_bytes);

            // The owner: a new one, another one, the same, and none after one.
            let owned = |owner: Bson| merge(&save(), doc! { "owner": owner });
            assert_eq!(spare(&stored, owned("one".into())), least - 8 + data_bytes);
            let stored_owned = merge(&stored, doc! { "owner": "one" });
            assert_eq!(spare(&stored_owned, owned("two".into())), least + data_bytes);
            assert!(spare(&stored_owned, owned("one".into())) > least);
            assert_eq!(spare(&stored_owned, owned(Bson::Null)), least + data_bytes);

            // A save after a re-encryption, and a re-encryption.
            let reencrypted = doc! { REENCRYPT_FIELDS[1]: date(wall(1_200)) };
            assert!(spare(&merge(&stored, reencrypted.clone()), save()) > least);
            let data = save().remove("data").unwrap();
            assert!(spare(&stored, merge(&doc! { "data": data }, reencrypted)) > least);

            // A touch.
            let [expiry, updated] = TOUCH_FIELDS;
            let touch = doc! { expiry: date(wall(3_000)), updated: date(wall(1_500)) };
            assert!(spare(&stored, touch) > least);
        }
    }
}
