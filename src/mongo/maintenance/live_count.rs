//! The number of live sessions, told now and then.

use std::time::Duration;

use tokio::time::MissedTickBehavior;

use crate::error::ErrorKind;
use crate::mongo::collection::SessionCollection;
use crate::runtime::Tasks;

/// Counts the live sessions again and again, until the store is closed. A count that fails is counted
/// as any operation that does, and the figure stays as it was.
pub(crate) fn count_periodically(sessions: SessionCollection, every: Duration, tasks: &Tasks) {
    let (closed, calls) = (tasks.closed().clone(), tasks.clone());
    tasks.spawn(async move {
        // Taken back when the store is closed.
        let mut live = sessions.metrics.live();
        let mut ticks = tokio::time::interval(every);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let counted = async {
                ticks.tick().await;
                calls.run(sessions.clone().count(), |counted| counted, || ()).await
            };
            match closed.run_until_cancelled(counted).await {
                Some(Ok(count)) => live.set(count),
                Some(Err(error)) if error.kind() == ErrorKind::Closed => return,
                Some(Err(error)) => tracing::debug!(%error, "could not count the live sessions"),
                None => return,
            }
        }
    });
}
