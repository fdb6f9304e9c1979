//! Creates the indexes again where they were dropped while the store runs.
//!
//! Whoever drops the collection, the database or an index drops more than sessions: without the TTL index,
//! expired sessions stay for good. Nothing tells a store without a change stream of a drop, so each store
//! looks once a minute. That is one `listIndexes`, away from any request.

pub(crate) mod expiry;
pub(crate) mod owner;

use std::time::Duration;

use crate::error::{Error, Result};
use crate::mongo::ExpiredRemoval;
use crate::mongo::collection::SessionCollection;
use crate::runtime::Tasks;

/// The longest time between two looks. The shortest is half of it, by chance, so that the instances of an
/// app do not all look at once. If two create the same index all the same, the server creates one.
const CHECK_INTERVAL: Duration = Duration::from_secs(60);

/// Looks after the indexes until the store is closed.
pub(crate) fn start(sessions: &SessionCollection, removal: ExpiredRemoval, tasks: &Tasks) {
    let sessions = sessions.clone();
    let calls = tasks.clone();
    tasks.spawn(async move {
        let mut last_trouble = None;
        let closed = calls.closed().clone();
        let upkeep = async {
            loop {
                let share = 0.5 + fastrand::f64() / 2.0;
                tokio::time::sleep(CHECK_INTERVAL.mul_f64(share)).await;
                let look = recreate_missing(sessions.clone(), removal);
                let looked = calls.run(look, |looked| looked, || ()).await;
                report(&mut last_trouble, looked.err());
            }
        };
        // Ends with the store alone.
        let _: Option<()> = closed.run_until_cancelled(upkeep).await;
    });
}

/// Creates the indexes that a collection lacks. One that does not exist gets none: its first session
/// creates it, and the next look the indexes.
async fn recreate_missing(sessions: SessionCollection, removal: ExpiredRemoval) -> Result<()> {
    let standing = expiry::list_indexes(&sessions).await?;
    if standing.is_empty() {
        return Ok(());
    }
    if let Some(verdict) = expiry::judge_all(&sessions, &standing, removal) {
        verdict?;
    } else {
        expiry::ensure_index(sessions.clone(), removal).await?;
        created_again(&sessions, "expires");
    }
    if sessions.owner.is_none() {
        return Ok(());
    }
    if let Some(verdict) = owner::judge_all(&sessions, &standing) {
        return verdict;
    }
    owner::ensure_index(sessions.clone()).await?;
    created_again(&sessions, "owner");
    Ok(())
}

fn created_again(sessions: &SessionCollection, field: &str) {
    tracing::warn!(
        "the index on `{field}` of {} was dropped while the store runs, and was created again",
        sessions.documents.namespace()
    );
}

/// Warns of each trouble once. An outage is logged by the calls that meet it.
fn report(last: &mut Option<String>, trouble: Option<Error>) {
    let Some(error) = trouble else {
        *last = None;
        return;
    };
    let message = error.to_string();
    if error.is_outage() || error.is_ours() || last.as_deref() == Some(&*message) {
        tracing::debug!(%error, "could not look at the indexes");
        return;
    }
    tracing::warn!("an index was changed while the store runs: {message}");
    *last = Some(message);
}
