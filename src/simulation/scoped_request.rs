//! The requests of a walk: each loads a session in a request scope, changes some keys and saves.

use std::time::Duration;

use serde_json::{Value, json};
use tokio::time::sleep;

use crate::error::Error;
use crate::request_scope::in_request_scope;
use crate::session::id::RawId;
use crate::session::{Data, Session};
use crate::simulation::fleet::Fleet;
use crate::simulation::merge_oracle::{COUNTER, Wanted};
use crate::simulation::types::{Begun, version};
use crate::simulation::wire::State;
use crate::time::WallTime;

/// The keys that requests change, beside [`COUNTER`]. Each session always has a `version`.
const KEYS: [&str; 4] = ["a", "b", "c", "version"];
/// A request stores at most this number of new values.
pub(crate) const MAX_VALUES: u64 = 16;

/// A request of one session.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Request {
    pub(crate) id: RawId,
    pub(crate) seed: u64,
    /// The first of its new values. No other request has one of them.
    pub(crate) first_value: u64,
    /// The expiries of its saves.
    pub(crate) expiries: [WallTime; 3],
}

/// A request, and the session as its app holds it.
struct Running<'a> {
    fleet: &'a Fleet,
    node: usize,
    id: RawId,
    rng: fastrand::Rng,
    next_value: u64,
    held: Wanted,
}

impl Fleet {
    pub(crate) async fn request(&self, node: usize, request: Request) {
        let mut rng = fastrand::Rng::with_seed(request.seed);
        let run = async {
            let Some(found) = self.load(node, request.id).await else { return };
            let Session { data, expires, .. } = found;
            let held = Wanted { seen: data.clone(), seen_expires: expires, data, expires };
            let mut running = Running {
                fleet: self,
                node,
                id: request.id,
                next_value: request.first_value,
                held,
                rng: rng.fork(),
            };
            let saves = rng.choice([1, 1, 1, 2, 2, 0]).unwrap_or(1);
            for expires in request.expiries.into_iter().take(saves) {
                running.wait().await;
                running.change();
                running.held.expires = expires;
                if !running.save().await && rng.bool() {
                    return;
                }
            }
            let [.., expires] = request.expiries;
            running.held.expires = expires;
            match rng.u32(..10) {
                0..2 => running.renew(true).await,
                2 => running.renew(false).await,
                3 => drop(running.remove().await),
                _ => {}
            }
        };
        in_request_scope(run).await;
    }
}

impl Running<'_> {
    /// Waits for some steps of the walk.
    async fn wait(&mut self) {
        for _ in 0..self.rng.u32(..6) {
            if self.state().faults.recovered {
                return;
            }
            sleep(self.fleet.plan.tick).await;
        }
    }

    /// Changes some keys, or none.
    fn change(&mut self) {
        for _ in 0..self.rng.choice([0, 1, 1, 2, 3]).unwrap_or(1) {
            let value = self.next_value;
            self.next_value += 1;
            if self.rng.u32(..4) == 0 {
                let count = self.held.data.get(COUNTER).and_then(Value::as_i64).unwrap_or(0);
                self.held.data.insert(COUNTER.to_owned(), json!(count + 1));
                continue;
            }
            let key = KEYS[self.rng.usize(..KEYS.len())];
            if self.rng.bool() && key != "version" && self.held.data.contains_key(key) {
                self.held.data.remove(key);
            } else {
                self.held.data.insert(key.to_owned(), json!(value));
            }
        }
    }

    /// Saves, and returns whether that was acknowledged.
    async fn save(&mut self) -> bool {
        let begun = self.fleet.begin();
        let save = {
            let mut state = self.state();
            let number = state.database.number(self.id.key());
            let Wanted { data, expires, .. } = &self.held;
            let what = (version(data), *expires);
            state.trace.note(|| format!("a request saves {} of session {number}", what.0));
            let save = state.pending.begin_scoped_save((self.node, number), what, begun);
            state.merges.begin_save(save, self.held.clone());
            save
        };
        let store = &self.fleet.stores[self.node];
        let saved = store.save(self.id, &self.held.data, self.held.expires).await;
        match saved {
            Ok(()) => {
                self.check_saved(save, begun);
                self.held.seen = self.held.data.clone();
                self.held.seen_expires = self.held.expires;
                true
            }
            Err(error) => {
                self.check_failed(save, begun, &error);
                false
            }
        }
    }

    fn check_saved(&self, save: usize, begun: Begun) {
        let mut state = self.state();
        let state = &mut *state;
        let number = state.database.number(self.id.key());
        let since = |until: Option<_>| until.is_none_or(|until| until >= begun.at);
        let was_gone =
            state.database.spans(number).any(|span| span.doc.is_none() && since(span.until));
        state.pending.record_scoped_acknowledged(save);
        let is_right = state.merges.record_acknowledged(save, was_gone);
        state.oracle.violations.extend(is_right.err());
        // A touch must leave an expiry that is late enough.
        let slack = self.fleet.plan.touch_after.min(self.held.expires.since(begun.wall) / 10);
        let stored = state.database.spans(number).filter_map(|span| span.doc);
        let latest = stored.flat_map(|doc| &doc.expiries).chain(state.database.touched(number));
        let latest = latest.max().map_or(Duration::MAX, |it| self.held.expires.since(*it));
        // The expiry of a replace has been judged already.
        if latest > slack && !was_gone && !state.merges.is_applied(save) {
            state.oracle.report_violation(format!(
                "expiry: save {save} of a request expires {latest:?} too early"
            ));
        }
        self.fleet.check_deadline(begun, state);
    }

    fn check_failed(&self, save: usize, begun: Begun, error: &Error) {
        let is_replace = {
            let mut state = self.state();
            if error.was_not_carried_out() {
                let is_right = state.merges.record_refused(save);
                state.oracle.violations.extend(is_right.err());
            }
            state.pending.is_replace(save)
        };
        self.fleet.record_failure(self.node, is_replace.then_some(self.id), begun, error);
    }

    /// Removes the session. Returns the number of the removal, and whether it was acknowledged.
    async fn remove(&self) -> (usize, bool) {
        let removal = self.state().merges.begin_removal();
        let removed = self.fleet.delete(self.node, self.id).await;
        let mut state = self.state();
        // If the store has sent no removal that returns the session, it must not take a later one for this one.
        state.merges.take_removal();
        if removed {
            state.merges.acknowledge_removal(removal);
        }
        (removal, removed)
    }

    /// Does what `cycle_id` does, or `flush` and a new session after it.
    async fn renew(&mut self, is_cycle: bool) {
        self.wait().await;
        if is_cycle {
            self.change();
        }
        let (removal, removed) = self.remove().await;
        if !removed && self.rng.bool() {
            return;
        }
        if !is_cycle {
            self.held.data = Data::from([("version".to_owned(), json!(self.next_value))]);
        }
        self.wait().await;
        let renewal = self.state().merges.begin_renewal(removal, is_cycle, self.held.clone());
        let begun = self.fleet.begin();
        // After `flush`, the app's record still has the old id.
        let record_id = if is_cycle { RawId::random() } else { self.id };
        let store = &self.fleet.stores[self.node];
        let created = store.create(record_id, &self.held.data, self.held.expires).await;
        let mut state = self.state();
        state.merges.begin_creation();
        match created {
            Ok(id) => match state.merges.record_renewed(renewal) {
                Ok(true) => self.fleet.ids.lock().unwrap().push(id),
                Ok(false) => state.oracle.count("not renewed, since it had ended"),
                Err(violation) => state.oracle.report_violation(violation),
            },
            Err(error) => {
                drop(state);
                self.fleet.record_failure(self.node, None, begun, &error);
            }
        }
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.fleet.wire.state()
    }
}
