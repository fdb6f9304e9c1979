//! The two indexes of the collection: their creation, their check, and their repair while the store runs.
//!
//! Dropping the collection, the database or an index drops more than sessions: without the TTL index, expired
//! sessions stay for good. A store without a change stream is not notified of a drop, so each store checks its
//! indexes once a minute. A check is one `listIndexes`, and no request waits for it.

pub(crate) mod expiry;
pub(crate) mod owner;

use std::time::Duration;

use bson::{Bson, Document};
use mongodb::IndexModel;

use crate::error::{Error, ErrorKind, Result};
use crate::mongo::ExpiredRemoval;
use crate::mongo::collection::SessionCollection;
use crate::mongo::error;
use crate::runtime::Tasks;
use crate::telemetry::metrics::{Outcome, Verb};

/// The longest time between two checks. The shortest is half of it, at random, so that the instances of an app
/// do not all check at once. If two instances create the same index, the server creates one.
const CHECK_INTERVAL: Duration = Duration::from_secs(60);

/// Starts the task that checks the indexes until the store is closed.
pub(crate) fn start(sessions: &SessionCollection, removal: ExpiredRemoval, tasks: &Tasks) {
    let sessions = sessions.clone();
    let calls = tasks.clone();
    tasks.spawn(async move {
        let mut last_problem = None;
        let closed = calls.closed().clone();
        let checks = async {
            loop {
                let share = 0.5 + fastrand::f64() / 2.0;
                tokio::time::sleep(CHECK_INTERVAL.mul_f64(share)).await;
                let check = recreate_missing(sessions.clone(), removal);
                let result = calls.run_in_background(check).await;
                report(&mut last_problem, result.err());
            }
        };
        // The loop has no end of its own.
        let _: Option<()> = closed.run_until_cancelled(checks).await;
    });
}

/// Creates the indexes that the collection lacks. A collection that does not exist gets none: its first session
/// creates it, and the next check creates the indexes.
async fn recreate_missing(sessions: SessionCollection, removal: ExpiredRemoval) -> Result<()> {
    let existing = list_indexes(&sessions).await?;
    if existing.is_empty() {
        return Ok(());
    }
    if let Some(verdict) = expiry::judge(&sessions, &existing, removal) {
        verdict?;
    } else {
        expiry::ensure_index(sessions.clone(), removal).await?;
        warn_of_recreation(&sessions, "expires");
    }
    if sessions.owner.is_none() {
        return Ok(());
    }
    if let Some(verdict) = owner::judge(&sessions, &existing) {
        return verdict;
    }
    owner::ensure_index(sessions.clone()).await?;
    warn_of_recreation(&sessions, "owner");
    Ok(())
}

fn warn_of_recreation(sessions: &SessionCollection, field: &str) {
    tracing::warn!(
        "the index on `{field}` of {} was dropped while the store runs, and was created again",
        sessions.documents.namespace()
    );
}

/// Warns of each problem once. An outage is logged by the calls that fail because of it.
fn report(last: &mut Option<String>, problem: Option<Error>) {
    let Some(error) = problem else {
        *last = None;
        return;
    };
    let message = error.to_string();
    if error.is_outage() || error.is_ours() || last.as_deref() == Some(&*message) {
        tracing::debug!(%error, "could not check the indexes");
        return;
    }
    tracing::warn!("an index was changed while the store runs: {message}");
    *last = Some(message);
}

/// Reads the indexes of the collection; empty if the collection does not exist.
async fn list_indexes(sessions: &SessionCollection) -> Result<Vec<IndexModel>> {
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

/// Creates an index. The driver's error is returned as it is, because an index of the same name may fit.
async fn create_index(
    sessions: &SessionCollection,
    index: IndexModel,
) -> std::result::Result<(), mongodb::error::Error> {
    let timer = sessions.timer(Verb::Index);
    let created = sessions.documents.create_index(index).await;
    let outcome = match &created {
        Ok(_) => Outcome::Ok,
        Err(error) => {
            let error = error::to_error("create an index", error);
            // An outage is not an answer about the index.
            let kind = if error.is_outage() { error.kind() } else { ErrorKind::Index };
            Outcome::Failed(kind)
        }
    };
    let _ = timer.finish(outcome, Ok(()));
    created.map(drop)
}

/// Judges the indexes whose keys fit. One index that fits is enough; if none does, the error says how to mend
/// the first one. `None`: no index has such keys.
fn judge_all<'a>(
    mut indexes: impl Iterator<Item = &'a IndexModel>,
    judge: impl Fn(&IndexModel) -> Result<()>,
) -> Option<Result<()>> {
    let first = judge(indexes.next()?);
    let fits = first.is_ok() || indexes.any(|index| judge(index).is_ok());
    Some(if fits { Ok(()) } else { first })
}

/// Whether the keys of an index are these fields in this order, all ascending. A shell or driver may have sent
/// the direction as a number of any type.
fn has_keys(keys: &Document, fields: &[&str]) -> bool {
    let is_ascending = |direction: &Bson| match direction {
        Bson::Int32(direction) => *direction > 0,
        Bson::Int64(direction) => *direction > 0,
        Bson::Double(direction) => *direction > 0.0,
        _ => false,
    };
    keys.keys().eq(fields) && keys.values().all(is_ascending)
}

/// The error for an index that does not fit. `found` says what is wrong with it, and `mend` is a command.
fn misfit(
    sessions: &SessionCollection,
    name: &str,
    found: &str,
    wanted: &str,
    mend: &str,
) -> Error {
    Error::new(
        ErrorKind::Index,
        format!(
            "the index {name:?} on {} {found}, and this store was built for {wanted}. To mend it, \
             run this in mongosh and start the app again: {mend}",
            sessions.documents.namespace(),
        ),
    )
}

/// The error for an index that the server did not create. `by_hand` is the command that creates it.
fn not_created(
    sessions: &SessionCollection,
    field: &str,
    by_hand: &str,
    error: &mongodb::error::Error,
) -> Error {
    let failure = failed_to_create(field, error);
    match failure.kind() {
        ErrorKind::Permission => Error::new(
            ErrorKind::Permission,
            format!(
                "the MongoDB user may not create the index on `{field}` of {}: grant it \
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

fn failed_to_create(field: &str, error: &mongodb::error::Error) -> Error {
    error::to_error(&format!("create the index on `{field}`"), error)
}

/// Adds to a timeout that the server may still build the index.
pub(crate) fn build_timed_out(error: &Error, field: &str) -> Error {
    if error.kind() != ErrorKind::Timeout {
        return error.clone();
    }
    Error::new(
        ErrorKind::Timeout,
        format!(
            "{error}. If it is building the index on `{field}` over many sessions, that continues on \
             the server: wait for its end and start the app again, or give a longer \
             operation_timeout"
        ),
    )
}

/// Warns that an index is not as it should be. `cost` says what that costs.
pub(crate) fn warn_of_problem(error: &Error, cost: &str) {
    if matches!(error.kind(), ErrorKind::Index | ErrorKind::Permission) {
        tracing::warn!(%error, "{cost}");
    }
}

/// The collection, as mongosh names it.
fn in_mongosh(sessions: &SessionCollection) -> String {
    let namespace = sessions.documents.namespace();
    format!("db.getSiblingDB({:?}).getCollection({:?})", namespace.db, namespace.coll)
}

fn drop_command(sessions: &SessionCollection, index: &str) -> String {
    format!("{}.dropIndex({index:?})", in_mongosh(sessions))
}

#[cfg(test)]
mod tests {
    use bson::doc;
    use mongodb::options::IndexOptions;

    use super::*;

    #[test]
    fn keys_are_compared_in_order_and_as_numbers() {
        for keys in [doc! { "expires": 1 }, doc! { "expires": 1_i64 }, doc! { "expires": 1.0 }] {
            assert!(has_keys(&keys, &["expires"]), "{keys}");
        }
        for keys in [
            doc! {},
            doc! { "expires": -1 },
            doc! { "expires": "hashed" },
            doc! { "expires": 1, "rev": 1 },
            doc! { "rev": 1 },
        ] {
            assert!(!has_keys(&keys, &["expires"]), "{keys}");
        }
        for keys in [doc! { "owner": 1, "_id": 1 }, doc! { "owner": 1_i64, "_id": 1.0 }] {
            assert!(has_keys(&keys, &["owner", "_id"]), "{keys}");
        }
        for keys in [
            doc! { "owner": 1 },
            doc! { "_id": 1, "owner": 1 },
            doc! { "owner": 1, "_id": -1 },
            doc! { "owner": "hashed", "_id": 1 },
            doc! { "owner": 1, "_id": 1, "rev": 1 },
        ] {
            assert!(!has_keys(&keys, &["owner", "_id"]), "{keys}");
        }
    }

    #[test]
    fn one_index_that_fits_is_enough_and_otherwise_the_first_fault_is_reported() {
        let named = |name: &str| {
            let options = IndexOptions::builder().name(name.to_owned()).build();
            IndexModel::builder().keys(doc! { "expires": 1 }).options(options).build()
        };
        let judged = |names: &[&str]| {
            let indexes: Vec<_> = names.iter().map(|name| named(name)).collect();
            judge_all(indexes.iter(), |index| {
                match index.options.as_ref().unwrap().name.as_deref().unwrap() {
                    "fits" => Ok(()),
                    other => Err(Error::new(ErrorKind::Index, other.to_owned())),
                }
            })
        };
        assert!(judged(&[]).is_none());
        assert!(judged(&["fits", "first"]).unwrap().is_ok());
        assert!(judged(&["first", "fits"]).unwrap().is_ok());
        let error = judged(&["first", "second"]).unwrap().unwrap_err();
        assert_eq!(error.to_string(), "first");
    }

    #[test]
    fn a_timeout_says_that_the_server_may_still_build_the_index() {
        let said = build_timed_out(&crate::runtime::timed_out(Duration::from_secs(5)), "expires");
        assert_eq!(said.kind(), ErrorKind::Timeout);
        assert!(said.to_string().contains("within 5s. If it is building"), "{said}");
        assert_eq!(build_timed_out(&Error::closed(), "expires").kind(), ErrorKind::Closed);
    }
}
