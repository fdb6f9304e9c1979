//! The end of a walk. All faults end, and the stores must recover without a restart.
//!
//! The checks, by the name that a violation has:
//!
//! - `hang`: every operation ends, every stream reports changes again, and every store shuts down.
//! - `convergence`: every store returns what the database has, also after one more change.
//! - `I8`: no store keeps anything of an operation that has ended.

use std::time::Duration;

use tokio::time::{sleep, timeout};

use crate::invalidation::reconnect::UNSUPPORTED_RETRY;
use crate::simulation::types::version;
use crate::simulation::walk::Walk;
use crate::time::Moment;

/// Longer than a listener waits between two attempts to open a stream.
const PATIENCE: Duration = Duration::from_secs(4);

impl Walk {
    /// Ends all faults, serves every call at once from now on, and checks that the stores recover.
    pub(crate) async fn recover(&mut self) {
        self.note(|| "recover".to_owned());
        self.fleet.judge_overload();
        let wire = self.fleet.wire.clone();
        wire.state().faults.recovered = true;
        for call in wire.waiting() {
            let unapplied =
                wire.state().calls.get(&call).is_some_and(|waiting| waiting.outcome.is_none());
            if unapplied {
                wire.apply(call);
            }
            wire.answer(call);
        }
        let plan = self.fleet.plan.clone();
        let recovered_at = self.fleet.clock.now();
        // An operation that waits for an abandoned call ends at its own deadline.
        let of_requests = if plan.requests > 0.0 { &[plan.tick, plan.timeout][..] } else { &[] };
        let patience = [Duration::ZERO, Duration::from_millis(1), plan.timeout];
        for patience in patience.iter().chain(of_requests) {
            sleep(*patience).await;
            for _ in 0..200 {
                if self.scheduler.running() == 0 {
                    break;
                }
                tokio::task::yield_now().await;
            }
        }
        if let Some(hung) = self.scheduler.first_running() {
            return self.report_violation(format!("hang: {hung}"));
        }
        if plan.has_streams() {
            self.wait_for_streams(recovered_at).await;
        }
        // Nothing renews an absence, and without a stream nothing renews an entry. So all older ones have expired now.
        sleep(plan.promise.max_staleness + Duration::from_millis(1)).await;
        self.check_convergence().await;
        self.change_once_more().await;
        self.check_rest().await;
    }

    /// Waits until the stream of each store has passed the moment of recovery.
    async fn wait_for_streams(&self, recovered_at: Moment) {
        let plan = &self.fleet.plan;
        let pause = plan.timeout / 4 + plan.promise.max_staleness / 10;
        let mut patience = PATIENCE + plan.timeout * 2 + plan.promise.max_staleness;
        if self.fleet.wire.state().oracle.tally.contains_key("refused a fresh stream") {
            patience += UNSUPPORTED_RETRY;
        }
        let mut waited = Duration::ZERO;
        while waited < patience {
            if self.fleet.stores.iter().all(|store| store.cache.synced_through() > recovered_at) {
                return;
            }
            sleep(pause).await;
            waited += pause;
        }
        self.report_violation("hang: a store has no working change stream".to_owned());
    }

    /// Checks that each store returns what the database has.
    async fn check_convergence(&self) {
        for node in 0..self.fleet.plan.stores {
            for id in self.fleet.ids() {
                self.fleet.load(node, id).await;
                let loaded = timeout(PATIENCE, self.fleet.stores[node].load(id)).await;
                let number = self.fleet.wire.state().database.number(id.key());
                let truth = self.fleet.wire.state().database.version(number);
                let loaded = match loaded {
                    Ok(Ok(loaded)) => loaded.map(|session| version(&session.data)),
                    failed => {
                        return self.report_violation(format!(
                            "convergence: a load has failed: {failed:?}"
                        ));
                    }
                };
                if loaded != truth {
                    let text = format!(
                        "convergence: store {node} has {loaded:?} for session {number}, and the \
                         database has {truth:?}"
                    );
                    self.report_violation(text);
                }
            }
        }
    }

    /// Removes all sessions as another instance does. The change streams must report that soon.
    async fn change_once_more(&self) {
        if !self.fleet.plan.has_streams() || self.is_broken() {
            return;
        }
        for id in self.fleet.ids() {
            self.fleet.wire.state().database.remove(id.key(), None);
        }
        let poll_interval = self.fleet.wire.state().faults.poll_interval;
        sleep(poll_interval * 3).await;
        self.check_convergence().await;
    }

    /// Checks that the stores keep nothing of operations that have ended, and that they shut down.
    async fn check_rest(&self) {
        for store in self.fleet.stores.iter() {
            let keys = store.cache.tracked_keys();
            let own_writes = store.cache.own_writes();
            if (keys, own_writes) != (0, 0) {
                self.report_violation(format!(
                    "I8: at rest, {keys} tracked keys and {own_writes} own writes are left"
                ));
            }
            let load = store.backend.load();
            if load != [0; 4] {
                self.report_violation(format!(
                    "I8: at rest, {load:?} commands, calls, queued calls and write queues are left"
                ));
            }
            let (entries, absent) = store.cache.entries();
            let most = self.fleet.plan.max_entries.unwrap_or(u64::MAX);
            if entries > most || absent > self.fleet.plan.max_absent_ids {
                self.report_violation(format!(
                    "I8: the cache has {entries} entries and {absent} absent ids"
                ));
            }
        }
        self.fleet.wire.state().oracle.closing = true;
        for store in self.fleet.stores.iter() {
            let patience = self.fleet.plan.timeout * 3;
            if timeout(patience, store.tasks.shutdown()).await.is_err() {
                self.report_violation("hang: a store does not shut down".to_owned());
            }
        }
    }

    fn report_violation(&self, text: String) {
        self.fleet.wire.state().oracle.report_violation(text);
    }
}
