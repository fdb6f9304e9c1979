//! How expired sessions leave the collection: by a TTL index, by a sweeper, or not at all.
//!
//! An expired session is never served, whichever it is; this is about the space.

use std::time::Duration;

use bson::{Bson, Document, doc};
use mongodb::IndexModel;
use mongodb::options::IndexOptions;

use crate::error::{Error, ErrorKind, Result};
use crate::mongo::collection::SessionCollection;
use crate::mongo::error;
use crate::mongo::server_errors::{Meaning, has_meaning};
use crate::runtime::Tasks;
use crate::telemetry::metrics::{Outcome, Verb};

/// The name that an index on `expires` has if nobody gave it one.
const NAME: &str = "expires_1";

/// Who removes expired sessions from the collection.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum ExpiredRemoval {
    /// MongoDB itself, by a
    /// [TTL index](https://www.mongodb.com/docs/manual/core/index-ttl/), within a minute or so.
    /// The default.
    #[default]
    TtlIndex,
    /// A background task of this store: at once when the store is built, and then each time so much
    /// time (more than zero) has passed. Every instance of the app sweeps. The task goes on after
    /// errors, which it logs. Judges by this machine's clock, so keep it right.
    Sweep(Duration),
    /// Nobody, or a job of yours that calls `ExpiredDeletion::delete_expired`.
    Off,
}

/// The one index: sessions by expiry. Counting needs it whoever removes the expired ones.
pub(crate) async fn ensure_index(
    sessions: SessionCollection,
    removal: ExpiredRemoval,
) -> Result<()> {
    let standing = list_indexes(&sessions).await?;
    if let Some(verdict) = judge_all(&sessions, &standing, removal) {
        return verdict;
    }
    let timer = sessions.timer(Verb::Index);
    let expire_after = (removal == ExpiredRemoval::TtlIndex).then_some(Duration::ZERO);
    let options = IndexOptions::builder().expire_after(expire_after).build();
    let index = IndexModel::builder().keys(doc! { "expires": 1 }).options(options).build();
    match sessions.documents.create_index(index).await {
        Ok(_) => timer.finish(Outcome::Ok, Ok(())),
        Err(error) if has_meaning(&error, Meaning::IndexConflict) => {
            drop(timer.finish(Outcome::Failed(ErrorKind::Index), Ok(())));
            conflict(&sessions, removal, &error).await
        }
        Err(error) => timer.finish(
            Outcome::Failed(ErrorKind::Index),
            Err(refused(&sessions, expire_after, &error)),
        ),
    }
}

/// Says of a timeout that the index may be on its way.
pub(crate) fn build_timed_out(error: &Error, field: &str) -> Error {
    if error.kind() != ErrorKind::Timeout {
        return error.clone();
    }
    Error::new(
        ErrorKind::Timeout,
        format!(
            "{error}. If it is building the index on `{field}` over many sessions, that goes on on \
             the server: wait for its end and start the app again, or give a longer \
             operation_timeout"
        ),
    )
}

/// What the indexes on `expires` are worth: one that fits is enough, and of others the first is to
/// be mended. `None` if there is no such index.
pub(crate) fn judge_all(
    sessions: &SessionCollection,
    standing: &[IndexModel],
    removal: ExpiredRemoval,
) -> Option<Result<()>> {
    let mut ours = standing.iter().filter(|index| is_by_expiry(&index.keys));
    let first = judge(sessions, ours.next()?, removal);
    let fits = first.is_ok() || ours.any(|index| judge(sessions, index, removal).is_ok());
    Some(if fits { Ok(()) } else { first })
}

/// Whether these are `{ expires: 1 }`, with whatever type of number a shell or driver has sent.
fn is_by_expiry(keys: &Document) -> bool {
    let ascending = match keys.get("expires") {
        Some(Bson::Int32(direction)) => *direction > 0,
        Some(Bson::Int64(direction)) => *direction > 0,
        Some(Bson::Double(direction)) => *direction > 0.0,
        _ => false,
    };
    keys.len() == 1 && ascending
}

/// The server would not create the index beside one that has come meanwhile, or that has its name.
async fn conflict(
    sessions: &SessionCollection,
    removal: ExpiredRemoval,
    error: &mongodb::error::Error,
) -> Result<()> {
    let standing = list_indexes(sessions).await?;
    if let Some(verdict) = judge_all(sessions, &standing, removal) {
        return verdict;
    }
    let named = standing.iter().filter_map(|index| index.options.as_ref()?.name.as_deref());
    let said = error::to_error("create the index on `expires`", error);
    let namespace = sessions.documents.namespace();
    let message = if named.clone().any(|name| name == NAME) {
        format!(
            "{said}: an index {NAME:?} stands on {namespace} with other keys. To mend it, run this \
             in mongosh and start the app again: {}",
            drop_command(sessions, NAME)
        )
    } else {
        let named: Vec<_> = named.map(|name| format!("{name:?}")).collect();
        format!(
            "{said}: it conflicts with one of the indexes on {namespace}, which are {}. To mend it, \
             drop that one in mongosh, with db.getSiblingDB({:?}).getCollection({:?}).dropIndex(…), \
             and start the app again",
            named.join(", "),
            namespace.db,
            namespace.coll,
        )
    };
    Err(Error::new(ErrorKind::Index, message))
}

pub(crate) async fn list_indexes(sessions: &SessionCollection) -> Result<Vec<IndexModel>> {
    let timer = sessions.timer_of(Verb::Index, "listIndexes");
    let read = async {
        let mut cursor = sessions.documents.list_indexes().await?;
        let mut indexes = Vec::new();
        while cursor.advance().await? {
            indexes.push(cursor.deserialize_current()?);
        }
        Ok(indexes)
    };
    match read.await {
        Ok(indexes) => timer.finish(Outcome::Ok, Ok(indexes)),
        Err(error) if error::is_missing_namespace(&error) => {
            timer.finish(Outcome::Ok, Ok(Vec::new()))
        }
        Err(error) => timer.fail("connect and look at the indexes of the sessions", &error),
    }
}

fn judge(sessions: &SessionCollection, index: &IndexModel, removal: ExpiredRemoval) -> Result<()> {
    let options = index.options.clone().unwrap_or_default();
    let name = options.name.as_deref().unwrap_or(NAME);
    let (found, wanted, mend) = match (options.expire_after, removal) {
        _ if unusable_option(&options).is_some() => (
            unusable_option(&options).unwrap_or_default().to_owned(),
            "an index of all sessions",
            drop_command(sessions, name),
        ),
        (Some(Duration::ZERO), ExpiredRemoval::TtlIndex)
        | (None, ExpiredRemoval::Sweep(_) | ExpiredRemoval::Off) => return Ok(()),
        (Some(after), ExpiredRemoval::TtlIndex) => (
            format!("removes a session {} s after it has expired", after.as_secs()),
            "a TTL index with expireAfterSeconds: 0",
            format!(
                "db.getSiblingDB({:?}).runCommand({{ collMod: {:?}, index: {{ name: {name:?}, \
                 expireAfterSeconds: 0 }} }})",
                sessions.documents.namespace().db,
                sessions.documents.name(),
            ),
        ),
        (None, ExpiredRemoval::TtlIndex) => (
            "is no TTL index".to_owned(),
            "a TTL index with expireAfterSeconds: 0",
            drop_command(sessions, name),
        ),
        (Some(after), ExpiredRemoval::Sweep(_) | ExpiredRemoval::Off) => (
            format!("is a TTL index with expireAfterSeconds: {}", after.as_secs()),
            "an index that removes nothing (or ExpiredRemoval::TtlIndex)",
            drop_command(sessions, name),
        ),
    };
    Err(Error::new(
        ErrorKind::Index,
        format!(
            "the index {name:?} on {} {found}, and this store was built for {wanted}. To mend it, \
             run this in mongosh and start the app again: {mend}",
            sessions.documents.namespace(),
        ),
    ))
}

/// Why an index on `expires` alone is of no use, whether it is a TTL index or not. A collation does no harm:
/// it is for texts, and these are dates.
fn unusable_option(options: &IndexOptions) -> Option<&'static str> {
    if options.partial_filter_expression.is_some() || options.sparse == Some(true) {
        return Some("covers only some of the sessions");
    }
    if options.unique == Some(true) {
        return Some("is unique, though two sessions may expire at the same time");
    }
    (options.hidden == Some(true)).then_some("is hidden, so that no query uses it")
}

fn refused(
    sessions: &SessionCollection,
    expire_after: Option<Duration>,
    error: &mongodb::error::Error,
) -> Error {
    let options = expire_after.map_or_else(Document::new, |_| doc! { "expireAfterSeconds": 0_i32 });
    let by_hand = format!(
        "db.getSiblingDB({:?}).getCollection({:?}).createIndex({{ expires: 1 }}, {options})",
        sessions.documents.namespace().db,
        sessions.documents.name(),
    );
    let failure = error::to_error("create the index on `expires`", error);
    match failure.kind() {
        ErrorKind::Permission => Error::new(
            ErrorKind::Permission,
            format!(
                "the MongoDB user may not create the index on `expires` of {}: grant it \
                 `createIndex`, or run this in mongosh as one who may, and build the store with \
                 create_indexes(false): {by_hand}",
                sessions.documents.namespace()
            ),
        ),
        ErrorKind::Server => {
            Error::new(ErrorKind::Index, format!("{failure}. What the store wanted: {by_hand}"))
        }
        _ => failure,
    }
}

pub(crate) fn drop_command(sessions: &SessionCollection, index: &str) -> String {
    format!(
        "db.getSiblingDB({:?}).getCollection({:?}).dropIndex({index:?})",
        sessions.documents.namespace().db,
        sessions.documents.name(),
    )
}

/// Removes what has expired, again and again, until the store is closed.
pub(crate) fn sweep(sessions: SessionCollection, every: Duration, tasks: &Tasks) {
    let closed = tasks.closed().clone();
    tasks.spawn(async move {
        let mut ticks = tokio::time::interval(every);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                () = closed.cancelled() => return,
                _ = ticks.tick() => {}
            }
            match sessions.clone().remove_expired().await {
                Ok(removed) => tracing::debug!(removed, "removed expired sessions"),
                Err(error) if error.kind() == ErrorKind::Closed => {
                    if !closed.is_cancelled() {
                        tracing::warn!(%error, "expired sessions are no longer removed");
                    }
                    return;
                }
                Err(error) => {
                    tracing::warn!(%error, "could not remove expired sessions; will try again");
                }
            }
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_keys_are_compared_as_numbers() {
        for keys in [doc! { "expires": 1 }, doc! { "expires": 1_i64 }, doc! { "expires": 1.0 }] {
            assert!(is_by_expiry(&keys), "{keys}");
        }
        for keys in [
            doc! {},
            doc! { "expires": -1 },
            doc! { "expires": "hashed" },
            doc! { "expires": 1, "rev": 1 },
            doc! { "rev": 1 },
        ] {
            assert!(!is_by_expiry(&keys), "{keys}");
        }
    }

    #[test]
    fn an_index_that_cannot_be_used_is_not_ours() {
        let misfit = |options: IndexOptions| unusable_option(&options);
        let builder = IndexOptions::builder;
        assert!(misfit(builder().unique(true).build()).unwrap().contains("unique"));
        assert!(misfit(builder().hidden(true).build()).unwrap().contains("hidden"));
        assert!(misfit(builder().sparse(true).build()).unwrap().contains("only some"));
        let only = doc! { "owner": "a" };
        let partial = builder().partial_filter_expression(only).build();
        assert!(misfit(partial).unwrap().contains("only some"));
        let collation = mongodb::options::Collation::builder().locale("en").build();
        for harmless in [
            builder().build(),
            builder().unique(false).hidden(false).sparse(false).build(),
            builder().name("theirs".to_owned()).expire_after(Duration::ZERO).build(),
            builder().collation(collation).build(),
        ] {
            assert_eq!(misfit(harmless.clone()), None, "{harmless:?}");
        }
    }

    #[test]
    fn a_timeout_tells_that_the_index_may_be_on_its_way() {
        let said = build_timed_out(&crate::runtime::timed_out(Duration::from_secs(5)), "expires");
        assert_eq!(said.kind(), ErrorKind::Timeout);
        assert!(said.to_string().contains("within 5s. If it is building"), "{said}");
        assert_eq!(build_timed_out(&Error::closed(), "expires").kind(), ErrorKind::Closed);
    }
}
