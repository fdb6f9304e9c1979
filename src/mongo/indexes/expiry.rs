//! How expired sessions leave the collection: by a TTL index, by a sweeper, or not at all.
//!
//! The store never serves an expired session, whichever option is chosen. The choice is about disk space.

use std::time::Duration;

use bson::{Document, doc};
use mongodb::IndexModel;
use mongodb::options::IndexOptions;

use crate::error::{Error, ErrorKind, Result};
use crate::mongo::collection::SessionCollection;
use crate::mongo::indexes;
use crate::mongo::indexes::{drop_command, in_mongosh, list_indexes};
use crate::mongo::server_errors::{Meaning, has_meaning};
use crate::runtime::Tasks;

/// The name that MongoDB gives an index on `expires` by default.
const NAME: &str = "expires_1";

/// The part that removes expired sessions from the collection.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum ExpiredRemoval {
    /// MongoDB itself, by a [TTL index](https://www.mongodb.com/docs/manual/core/index-ttl/), within about a
    /// minute. The default.
    #[default]
    TtlIndex,
    /// A background task of this store, which sweeps once when the store is built, and then at this interval
    /// (more than zero). Every instance of the app sweeps. After an error, which it logs, the task tries again at
    /// the next interval. It uses this machine's clock, so keep the clock right.
    Sweep(Duration),
    /// Nobody, or a job of yours that calls `ExpiredDeletion::delete_expired`.
    Off,
}

/// Creates the index on `expires` if it is missing, and checks it if it exists. Counting uses this index too,
/// whoever removes expired sessions.
pub(crate) async fn ensure_index(
    sessions: SessionCollection,
    removal: ExpiredRemoval,
) -> Result<()> {
    let existing = list_indexes(&sessions).await?;
    if let Some(verdict) = judge(&sessions, &existing, removal) {
        return verdict;
    }
    let expire_after = (removal == ExpiredRemoval::TtlIndex).then_some(Duration::ZERO);
    let options = IndexOptions::builder().expire_after(expire_after).build();
    let index = IndexModel::builder().keys(doc! { "expires": 1 }).options(options).build();
    let Err(error) = indexes::create_index(&sessions, index).await else { return Ok(()) };
    if has_meaning(&error, Meaning::IndexConflict) {
        return resolve_conflict(&sessions, removal, &error).await;
    }
    let options = expire_after.map_or_else(Document::new, |_| doc! { "expireAfterSeconds": 0_i32 });
    let by_hand = format!("{}.createIndex({{ expires: 1 }}, {options})", in_mongosh(&sessions));
    Err(indexes::not_created(&sessions, "expires", &by_hand, &error))
}

/// Judges the existing indexes on `expires`; `None` if there is no such index.
pub(crate) fn judge(
    sessions: &SessionCollection,
    existing: &[IndexModel],
    removal: ExpiredRemoval,
) -> Option<Result<()>> {
    let ours = existing.iter().filter(|index| indexes::has_keys(&index.keys, &["expires"]));
    indexes::judge_all(ours, |index| judge_one(sessions, index, removal))
}

/// The server refused the index because of another one: either an instance has just created the same index, or
/// an index with other keys has its name.
async fn resolve_conflict(
    sessions: &SessionCollection,
    removal: ExpiredRemoval,
    error: &mongodb::error::Error,
) -> Result<()> {
    let existing = list_indexes(sessions).await?;
    if let Some(verdict) = judge(sessions, &existing, removal) {
        return verdict;
    }
    let names = existing.iter().filter_map(|index| index.options.as_ref()?.name.as_deref());
    let failure = indexes::failed_to_create("expires", error);
    let namespace = sessions.documents.namespace();
    let message = if names.clone().any(|name| name == NAME) {
        format!(
            "{failure}: an index {NAME:?} with other keys exists on {namespace}. To mend it, run this \
             in mongosh and start the app again: {}",
            drop_command(sessions, NAME)
        )
    } else {
        let names: Vec<_> = names.map(|name| format!("{name:?}")).collect();
        format!(
            "{failure}: it conflicts with one of the indexes on {namespace}, which are {}. To mend it, \
             drop that one in mongosh, with {}.dropIndex(…), and start the app again",
            names.join(", "),
            in_mongosh(sessions),
        )
    };
    Err(Error::new(ErrorKind::Index, message))
}

fn judge_one(
    sessions: &SessionCollection,
    index: &IndexModel,
    removal: ExpiredRemoval,
) -> Result<()> {
    let options = index.options.clone().unwrap_or_default();
    let name = options.name.as_deref().unwrap_or(NAME);
    let is_ttl_wanted = removal == ExpiredRemoval::TtlIndex;
    let found;
    let wanted;
    let mut mend = drop_command(sessions, name);
    if let Some(fault) = unusable_option(&options) {
        found = fault.to_owned();
        wanted = "an index of all sessions";
    } else {
        match options.expire_after {
            Some(Duration::ZERO) if is_ttl_wanted => return Ok(()),
            None if !is_ttl_wanted => return Ok(()),
            Some(after) if is_ttl_wanted => {
                found = format!("removes a session {} s after it has expired", after.as_secs());
                wanted = "a TTL index with expireAfterSeconds: 0";
                mend = format!(
                    "db.getSiblingDB({:?}).runCommand({{ collMod: {:?}, index: {{ name: {name:?}, \
                     expireAfterSeconds: 0 }} }})",
                    sessions.documents.namespace().db,
                    sessions.documents.name(),
                );
            }
            None => {
                found = "is no TTL index".to_owned();
                wanted = "a TTL index with expireAfterSeconds: 0";
            }
            Some(after) => {
                found = format!("is a TTL index with expireAfterSeconds: {}", after.as_secs());
                wanted = "an index that removes nothing (or ExpiredRemoval::TtlIndex)";
            }
        }
    }
    Err(indexes::misfit(sessions, name, &found, wanted, &mend))
}

/// Why the store cannot use an index on `expires`, whether it is a TTL index or not. A collation does no harm: it
/// is for texts, and the values of `expires` are dates.
fn unusable_option(options: &IndexOptions) -> Option<&'static str> {
    if options.partial_filter_expression.is_some() || options.sparse == Some(true) {
        return Some("covers only some of the sessions");
    }
    if options.unique == Some(true) {
        return Some("is unique, though two sessions may expire at the same time");
    }
    (options.hidden == Some(true)).then_some("is hidden, so that no query uses it")
}

/// Starts the task that removes expired sessions at each interval until the store is closed.
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
}
