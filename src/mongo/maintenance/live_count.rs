//! The gauge of live sessions, which a background task updates at an interval.

use std::time::Duration;

use tokio::time::MissedTickBehavior;

use crate::error::ErrorKind;
use crate::mongo::collection::SessionCollection;
use crate::runtime::Tasks;

/// Starts the task that counts the live sessions at each interval until the store is closed. If a count fails, the
/// metrics record it as any failed operation, and the gauge keeps its value.
pub(crate) fn count_periodically(sessions: SessionCollection, every: Duration, tasks: &Tasks) {
    let closed = tasks.closed().clone();
    let calls = tasks.clone();
    tasks.spawn(async move {
        // Its drop, when the store is closed, removes the count of this store from the gauge.
        let mut live = sessions.metrics.live();
        let mut ticks = tokio::time::interval(every);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let counted = async {
                ticks.tick().await;
                calls.run_in_background(sessions.clone().count()).await
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
