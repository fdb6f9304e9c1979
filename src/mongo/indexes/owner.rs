//! The index by which the sessions of an owner are found.
//!
//! Its second field is the key, so that a removal walks along it, and so that no write of a session
//! touches it unless its owner changes. With the time of the last write in it, each touch would write
//! two indexes, and a walk along it could miss a session that is used meanwhile: it would move past the
//! cursor. An owner has few sessions, which the server sorts as they are asked for.

use bson::{Bson, Document, doc};
use mongodb::IndexModel;
use mongodb::options::IndexOptions;

use crate::error::{Error, ErrorKind, Result};
use crate::mongo::collection::SessionCollection;
use crate::mongo::error;
use crate::mongo::indexes::expiry::{drop_command, list_indexes};
use crate::mongo::server_errors::{Meaning, has_meaning};
use crate::telemetry::metrics::{Outcome, Verb};

/// The name that the index has if nobody gave it another one.
const NAME: &str = "owner_1__id_1";

fn keys() -> Document {
    doc! { "owner": 1, "_id": 1 }
}

/// The sessions that have an owner.
fn has_owner_filter() -> Document {
    doc! { "owner": { "$exists": true } }
}

/// Creates the index if it is missing.
pub(crate) async fn ensure_index(sessions: SessionCollection) -> Result<()> {
    let standing = list_indexes(&sessions).await?;
    check_collation(&sessions, &standing)?;
    if let Some(verdict) = judge_all(&sessions, &standing) {
        return verdict;
    }
    let timer = sessions.timer(Verb::Index);
    let options = IndexOptions::builder().partial_filter_expression(has_owner_filter()).build();
    let index = IndexModel::builder().keys(keys()).options(options).build();
    let Err(error) = sessions.documents.create_index(index).await else {
        return timer.finish(Outcome::Ok, Ok(()));
    };
    drop(timer.finish(Outcome::Failed(ErrorKind::Index), Ok(())));
    if has_meaning(&error, Meaning::IndexConflict)
        // It may have come meanwhile, from another instance.
        && let Some(verdict) = judge_all(&sessions, &crate::mongo::indexes::owner::list_indexes(&sessions).await?)
    {
        return verdict;
    }
    Err(refused(&sessions, &error))
}

/// Owners that a collation takes for the same would end each other's sessions.
fn check_collation(sessions: &SessionCollection, standing: &[IndexModel]) -> Result<()> {
    let by_key =
        standing.iter().find(|index| index.keys.len() == 1 && index.keys.contains_key("_id"));
    if !by_key.is_some_and(has_collation) {
        return Ok(());
    }
    Err(Error::new(
        ErrorKind::Index,
        format!(
            "the collection {} has a default collation, which may take the ids of two users for the \
             same: keep sessions that have owners in a collection without one",
            sessions.documents.namespace()
        ),
    ))
}

fn has_collation(index: &IndexModel) -> bool {
    let collation = index.options.as_ref().and_then(|options| options.collation.as_ref());
    collation.is_some_and(|collation| collation.locale != "simple")
}

/// What the indexes on the owner are worth: one that fits is enough, and of others the first is to be
/// mended. `None` if there is no such index.
pub(crate) fn judge_all(
    sessions: &SessionCollection,
    standing: &[IndexModel],
) -> Option<Result<()>> {
    let mut ours = standing.iter().filter(|index| is_by_owner(&index.keys)).peekable();
    let first = *ours.peek()?;
    let Some(found) = unusable_option(first) else { return Some(Ok(())) };
    if ours.any(|index| unusable_option(index).is_none()) {
        return Some(Ok(()));
    }
    let name = first.options.as_ref().and_then(|options| options.name.as_deref()).unwrap_or(NAME);
    Some(Err(Error::new(
        ErrorKind::Index,
        format!(
            "the index {name:?} on {} {found}, and this store was built for an index of all sessions \
             that have an owner. To mend it, run this in mongosh and start the app again: {}",
            sessions.documents.namespace(),
            drop_command(sessions, name),
        ),
    )))
}

/// Whether these are the index's keys, with whatever type of number a shell or driver has sent.
fn is_by_owner(keys: &Document) -> bool {
    let ascending = |value: &Bson| match value {
        Bson::Int32(direction) => *direction > 0,
        Bson::Int64(direction) => *direction > 0,
        Bson::Double(direction) => *direction > 0.0,
        _ => false,
    };
    keys.iter().map(|(key, _)| key.as_str()).eq(["owner", "_id"])
        && keys.iter().all(|(_, value)| ascending(value))
}

/// Why an index with the right keys is of no use.
fn unusable_option(index: &IndexModel) -> Option<&'static str> {
    let options = index.options.as_ref()?;
    let covered =
        options.partial_filter_expression.as_ref().is_none_or(|only| *only == has_owner_filter());
    if !covered {
        return Some("covers only some of the sessions that have an owner");
    }
    if has_collation(index) {
        return Some("has a collation");
    }
    (options.hidden == Some(true)).then_some("is hidden, so that no query uses it")
}

fn refused(sessions: &SessionCollection, error: &mongodb::error::Error) -> Error {
    let namespace = sessions.documents.namespace();
    let by_hand = format!(
        "db.getSiblingDB({:?}).getCollection({:?}).createIndex({}, {{ partialFilterExpression: {} }})",
        namespace.db,
        namespace.coll,
        keys(),
        has_owner_filter(),
    );
    let failure = error::to_error("create the index on `owner`", error);
    match failure.kind() {
        ErrorKind::Permission => Error::new(
            ErrorKind::Permission,
            format!(
                "the MongoDB user may not create the index on `owner` of {namespace}: grant it \
                 `createIndex`, or run this in mongosh as one who may, and build the store with \
                 create_indexes(false): {by_hand}"
            ),
        ),
        ErrorKind::Server if has_meaning(error, Meaning::IndexConflict) => Error::new(
            ErrorKind::Index,
            format!(
                "{failure}: another index stands on {namespace} under the name {NAME:?}. To mend \
                     it, run this in mongosh and start the app again: {}",
                drop_command(sessions, NAME)
            ),
        ),
        ErrorKind::Server => {
            Error::new(ErrorKind::Index, format!("{failure}. What the store wanted: {by_hand}"))
        }
        _ => failure,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_index_that_cannot_be_used_is_not_ours() {
        let found = |options: IndexOptions| {
            unusable_option(&IndexModel::builder().keys(keys()).options(options).build())
        };
        let builder = IndexOptions::builder;
        let collation = mongodb::options::Collation::builder().locale("en").build();
        assert!(found(builder().hidden(true).build()).unwrap().contains("hidden"));
        assert!(found(builder().collation(collation).build()).unwrap().contains("collation"));
        let some_owners = doc! { "owner": { "$gt": "m" } };
        let partial = builder().partial_filter_expression(some_owners).build();
        assert!(found(partial).unwrap().contains("only some"));
        // With `_id` in it each document has a field of it, and no two have the same.
        for harmless in [
            builder().build(),
            builder().partial_filter_expression(has_owner_filter()).build(),
            builder().unique(true).build(),
            builder().sparse(true).build(),
        ] {
            assert_eq!(found(harmless.clone()), None, "{harmless:?}");
        }
    }

    #[test]
    fn the_keys_are_compared_in_order_and_as_numbers() {
        for keys in [keys(), doc! { "owner": 1_i64, "_id": 1.0 }] {
            assert!(is_by_owner(&keys), "{keys}");
        }
        for keys in [
            doc! {},
            doc! { "owner": 1 },
            doc! { "_id": 1, "owner": 1 },
            doc! { "owner": 1, "_id": -1 },
            doc! { "owner": "hashed", "_id": 1 },
            doc! { "owner": 1, "_id": 1, "rev": 1 },
        ] {
            assert!(!is_by_owner(&keys), "{keys}");
        }
    }
}
