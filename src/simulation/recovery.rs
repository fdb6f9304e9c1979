//! The end of a walk: all is well again, and so must be the stores, without being started anew.

use std::time::Duration;

use tokio::time::{sleep, timeout};

use crate::invalidation::reconnect::UNSUPPORTED_RETRY;
use crate::simulation::walk::Walk;
use crate::time::Moment;

/// Longer than the longest pause of a follower between two attempts.
const PATIENCE: Duration = Duration::from_secs(4);

impl Walk {
    /// Serves everything at once from now on, and looks whether everything comes to rest.
    pub(crate) async fn heal(&mut self) {
        self.note(|| "heal".to_owned());
        self.fleet.judge_overload();
        let wire = self.fleet.wire.clone();
        wire.state().manners.healed = true;
        for call in wire.waiting() {
            let unapplied =
                wire.state().calls.get(&call).is_some_and(|waiting| waiting.outcome.is_none());
            if unapplied {
                wire.apply(call);
            }
            wire.answer(call);
        }
        let profile = self.fleet.profile.clone();
        let healed_at = self.fleet.clock.now();
        // What waits for a call that was given up ends by its deadline.
        for patience in [Duration::ZERO, Duration::from_millis(1), profile.timeout] {
            sleep(patience).await;
            for _ in 0..200 {
                if self.crew.under_way() == 0 {
                    break;
                }
                tokio::task::yield_now().await;
            }
        }
        if let Some(hung) = self.crew.first() {
            return self.violated(format!("hang: {hung}"));
        }
        if profile.follows() {
            self.recover(healed_at).await;
        }
        // No report renews what is known to be absent, and where none come, nothing is renewed.
        sleep(profile.promise.max_staleness + Duration::from_millis(1)).await;
        self.agree().await;
        self.change_once_more().await;
        self.rest().await;
    }

    /// Each store hears of the changes again.
    async fn recover(&self, healed_at: Moment) {
        let profile = &self.fleet.profile;
        let moment = profile.timeout / 4 + profile.promise.max_staleness / 10;
        let mut patience = PATIENCE + profile.timeout * 2 + profile.promise.max_staleness;
        if self.fleet.wire.state().oracle.tally.contains_key("refused a fresh stream") {
            patience += UNSUPPORTED_RETRY;
        }
        let mut waited = Duration::ZERO;
        while waited < patience {
            if self.fleet.stores.iter().all(|store| store.cache.synced_through() > healed_at) {
                return;
            }
            sleep(moment).await;
            waited += moment;
        }
        self.violated("hang: a store does not follow the changes any more".to_owned());
    }

    /// All stores load what the database holds.
    async fn agree(&self) {
        for node in 0..self.fleet.profile.stores {
            for id in self.fleet.ids() {
                self.fleet.load(node, id).await;
                let loaded = timeout(PATIENCE, self.fleet.stores[node].load(id)).await;
                let number = self.fleet.wire.state().database.number(id.key());
                let truth = self.fleet.wire.state().database.version(number);
                let loaded = match loaded {
                    Ok(Ok(loaded)) => {
                        loaded.map(|session| crate::simulation::version(&session.data))
                    }
                    failed => return self.violated(format!("healed, and a load has {failed:?}")),
                };
                if loaded != truth {
                    let text = format!(
                        "healed, and store {node} has {loaded:?} for session {number}, of which \
                         {truth:?} is true"
                    );
                    self.violated(text);
                }
            }
        }
    }

    /// What is changed elsewhere is heard of at once, where stores follow the changes.
    async fn change_once_more(&self) {
        if !self.fleet.profile.follows() || self.is_broken() {
            return;
        }
        for id in self.fleet.ids() {
            self.fleet.wire.state().database.remove(id.key(), None);
        }
        let pace = self.fleet.wire.state().manners.pace;
        sleep(pace * 3).await;
        self.agree().await;
    }

    /// Nothing is kept of what is over, and the stores come to their ends.
    async fn rest(&self) {
        for store in self.fleet.stores.iter() {
            let (tickets, echoes) = (store.cache.tracked_keys(), store.cache.own_writes());
            if (tickets, echoes) != (0, 0) {
                self.violated(format!("I8: at rest, {tickets} tickets and {echoes} echoes"));
            }
            let under_way = store.backend.under_way();
            if under_way != [0; 4] {
                self.violated(format!(
                    "I8: at rest, {under_way:?} commands, calls, waiting, lanes"
                ));
            }
            let (entries, absent) = store.cache.entries();
            let most = self.fleet.profile.max_entries.unwrap_or(u64::MAX);
            if entries > most || absent > self.fleet.profile.max_absent {
                self.violated(format!("I8: {entries} entries and {absent} absent ids"));
            }
        }
        self.fleet.wire.state().oracle.closing = true;
        for store in self.fleet.stores.iter() {
            let patience = self.fleet.profile.timeout * 3;
            if timeout(patience, store.tasks.shutdown()).await.is_err() {
                self.violated("hang: a store does not end".to_owned());
            }
        }
    }

    fn violated(&self, text: String) {
        self.fleet.wire.state().oracle.violated(text);
    }
}
