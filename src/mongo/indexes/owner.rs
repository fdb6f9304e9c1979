//! The index by which the store finds the sessions of an owner.
//!
//! The fields are `owner` and `_id`. A page of a delete reads along `_id`, and a write changes the index only if
//! the owner changes. An index with the time of the last write would be worse in two ways: each touch would
//! update a second index, and a scan along it could miss a session that is used meanwhile, because the session
//! would move to a place that the scan has passed. An owner has few sessions, so the server can sort them
//! when they are listed.

use bson::{Document, doc};
use mongodb::IndexModel;
use mongodb::options::IndexOptions;

use crate::error::{Error, ErrorKind, Result};
use crate::mongo::collection::SessionCollection;
use crate::mongo::indexes;
use crate::mongo::indexes::{drop_command, in_mongosh, list_indexes};
use crate::mongo::server_errors::{Meaning, has_meaning};

/// The name that MongoDB gives the index by default.
const NAME: &str = "owner_1__id_1";

fn keys() -> Document {
    doc! { "owner": 1, "_id": 1 }
}

/// Matches the sessions that have an owner.
fn has_owner_filter() -> Document {
    doc! { "owner": { "$exists": true } }
}

/// Creates the index if it is missing, and checks it if it exists.
pub(crate) async fn ensure_index(sessions: SessionCollection) -> Result<()> {
    let existing = list_indexes(&sessions).await?;
    check_collation(&sessions, &existing)?;
    if let Some(verdict) = judge(&sessions, &existing) {
        return verdict;
    }
    let options = IndexOptions::builder().partial_filter_expression(has_owner_filter()).build();
    let index = IndexModel::builder().keys(keys()).options(options).build();
    let Err(error) = indexes::create_index(&sessions, index).await else { return Ok(()) };
    if has_meaning(&error, Meaning::IndexConflict) {
        return resolve_conflict(&sessions, &error).await;
    }
    let by_hand = format!(
        "{}.createIndex({}, {{ partialFilterExpression: {} }})",
        in_mongosh(&sessions),
        keys(),
        has_owner_filter(),
    );
    Err(indexes::not_created(&sessions, "owner", &by_hand, &error))
}

/// The server refused the index because of another one: either an instance has just created the same index, or
/// an index with other keys has its name.
async fn resolve_conflict(
    sessions: &SessionCollection,
    error: &mongodb::error::Error,
) -> Result<()> {
    let existing = list_indexes(sessions).await?;
    if let Some(verdict) = judge(sessions, &existing) {
        return verdict;
    }
    Err(Error::new(
        ErrorKind::Index,
        format!(
            "{}: another index with the name {NAME:?} exists on {}. To mend it, run this in mongosh \
             and start the app again: {}",
            indexes::failed_to_create("owner", error),
            sessions.documents.namespace(),
            drop_command(sessions, NAME)
        ),
    ))
}

/// Refuses a default collation of the collection. If it took two owners for the same, one of them could end the
/// other's sessions.
fn check_collation(sessions: &SessionCollection, existing: &[IndexModel]) -> Result<()> {
    let by_key =
        existing.iter().find(|index| index.keys.len() == 1 && index.keys.contains_key("_id"));
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

/// Judges the existing indexes on the owner; `None` if there is no such index.
pub(crate) fn judge(sessions: &SessionCollection, existing: &[IndexModel]) -> Option<Result<()>> {
    let ours = existing.iter().filter(|index| indexes::has_keys(&index.keys, &["owner", "_id"]));
    indexes::judge_all(ours, |index| {
        let Some(fault) = unusable_option(index) else { return Ok(()) };
        let options = index.options.as_ref();
        let name = options.and_then(|options| options.name.as_deref()).unwrap_or(NAME);
        let wanted = "an index of all sessions that have an owner";
        Err(indexes::misfit(sessions, name, fault, wanted, &drop_command(sessions, name)))
    })
}

/// Why the store cannot use an index with the right keys.
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
}
