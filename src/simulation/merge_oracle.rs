//! `MergeOracle`: judges what the saves and the new ids of request scopes store.
//!
//! A request tells the oracle what it has seen and what it saves, right before it calls the store. The oracle compares
//! that with the document before and after the database has carried out the save. The rules, by the name that a
//! violation has:
//!
//! - `merge`: a save changes the keys that its request has changed, and no other key. A key that somebody else has
//!   changed too gets what `on_conflict` returns. The later expiry stays, unless the request has shortened the life of
//!   the session. The changes are stored once at most, once if the save was acknowledged, and never if the save was
//!   reported as not carried out.
//! - `renewal`: after a `cycle_id`, the new session has the changes of the request on top of the state in which the
//!   request has removed the old one. It does not exist if somebody else has removed the old one. After a `flush`, the
//!   new session has only new data.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use serde_json::{Value, json};

use crate::request_scope::changes::OnConflict;
use crate::session::revision::Rev;
use crate::session::{Data, Session, is_same_data};
use crate::time::WallTime;

/// Two requests that change it add up, if the app has an `on_conflict`.
pub(crate) const COUNTER: &str = "n";

/// What a request knows of its session, and what it wants to store.
#[derive(Clone, Debug)]
pub(crate) struct Wanted {
    pub(crate) seen: Data,
    pub(crate) seen_expires: WallTime,
    pub(crate) data: Data,
    pub(crate) expires: WallTime,
}

/// A save of a request.
struct ScopedSave {
    wanted: Wanted,
    /// How often the database has carried it out.
    applied: u32,
    /// The store has reported that nothing was stored.
    refused: bool,
}

/// The creation of a session by a request that has removed an earlier one.
struct Renewal {
    wanted: Wanted,
    /// The removal before it. `None` after a `flush` that needs no old state.
    removal: usize,
    is_cycle: bool,
    stored: bool,
}

/// The removal of a session by a request that has loaded it.
#[derive(Default)]
struct Removal {
    /// What the database has removed.
    taken: Option<Session>,
    acknowledged: bool,
}

#[derive(Default)]
pub(crate) struct MergeOracle {
    /// The app has an `on_conflict`.
    pub(crate) adds_up: bool,
    saves: Vec<ScopedSave>,
    /// By the number of the save in `PendingCalls`.
    by_save: BTreeMap<usize, usize>,
    removals: Vec<Removal>,
    /// A removal that the store has not sent yet.
    beginning_removal: Option<usize>,
    by_take: BTreeMap<usize, usize>,
    renewals: Vec<Renewal>,
    /// A renewal that the store has not sent yet.
    beginning_renewal: Option<usize>,
    by_rev: HashMap<Rev, usize>,
}

impl Wanted {
    pub(crate) fn changes_data(&self) -> bool {
        !is_same_data(&self.seen, &self.data)
    }

    pub(crate) fn shortens(&self) -> bool {
        self.expires < self.seen_expires
    }

    /// What is stored on top of a state. The second value is the number of keys that were changed on both sides.
    fn on_top_of(&self, state: &Session, adds_up: bool) -> (Data, WallTime, usize) {
        let mut stored = state.data.clone();
        let mut conflicts = 0;
        let keys: BTreeSet<_> = self.seen.keys().chain(self.data.keys()).collect();
        for key in keys {
            let base = self.seen.get(key);
            let theirs = state.data.get(key);
            let ours = self.data.get(key);
            if base == ours {
                continue;
            }
            conflicts += usize::from(base != theirs);
            let value = match ours {
                _ if base != theirs && adds_up => resolve(key, base, theirs, ours),
                ours => ours.cloned(),
            };
            match value {
                Some(value) => stored.insert(key.clone(), value),
                None => stored.remove(key),
            };
        }
        let expires = if self.shortens() { self.expires } else { self.expires.max(state.expires) };
        (stored, expires, conflicts)
    }
}

/// What the simulated app does with a value that two requests have changed.
pub(crate) fn resolve(
    key: &str,
    base: Option<&Value>,
    theirs: Option<&Value>,
    ours: Option<&Value>,
) -> Option<Value> {
    if key != COUNTER {
        return ours.cloned();
    }
    let number = |value: Option<&Value>| value.and_then(Value::as_i64).unwrap_or(0);
    Some(json!(number(theirs) + number(ours) - number(base)))
}

pub(crate) fn on_conflict() -> OnConflict {
    OnConflict(std::sync::Arc::new(resolve))
}

impl MergeOracle {
    /// A request saves. `save` is its number in `PendingCalls`.
    pub(crate) fn begin_save(&mut self, save: usize, wanted: Wanted) {
        self.by_save.insert(save, self.saves.len());
        self.saves.push(ScopedSave { wanted, applied: 0, refused: false });
    }

    /// The database has carried out a save of a request: the document was `old`, and now is `new`. Returns the
    /// violation, or what has happened.
    pub(crate) fn judge_save(
        &mut self,
        save: usize,
        old: &Session,
        new: &Session,
    ) -> Option<Result<&'static str, String>> {
        let index = *self.by_save.get(&save)?;
        let save = &mut self.saves[index];
        save.applied += 1;
        let (data, expires, conflicts) = save.wanted.on_top_of(old, self.adds_up);
        let whose = format!("merge: request save {index}");
        let wanted = &save.wanted;
        Some(if save.applied > 1 {
            Err(format!("{whose} was stored twice"))
        } else if save.refused {
            Err(format!("{whose} was stored, and reported as not carried out"))
        } else if !wanted.changes_data() && !wanted.shortens() {
            Err(format!("{whose} has changed nothing, and replaced the data"))
        } else if !is_same_data(&new.data, &data) {
            let found = &new.data;
            let before = &old.data;
            Err(format!("{whose}: {wanted:?} on {before:?} made {found:?} and not {data:?}"))
        } else if new.expires != expires {
            let found = (old.expires, new.expires);
            Err(format!("{whose}: {wanted:?} made the expiry {found:?} and not {expires:?}"))
        } else if conflicts > 0 {
            Ok("two requests changed one key")
        } else if !is_same_data(&wanted.seen, &old.data) {
            Ok("merged")
        } else {
            Ok("met no other change")
        })
    }

    /// A save of a request was acknowledged.
    pub(crate) fn record_acknowledged(
        &mut self,
        save: usize,
        was_gone: bool,
    ) -> Result<(), String> {
        let index = self.by_save[&save];
        let save = &self.saves[index];
        let is_due = save.wanted.changes_data() || save.wanted.shortens();
        if is_due && save.applied == 0 && !was_gone {
            return Err(format!("merge: request save {index} was acknowledged and never stored"));
        }
        Ok(())
    }

    /// A save of a request was reported as not carried out.
    pub(crate) fn record_refused(&mut self, save: usize) -> Result<(), String> {
        let index = self.by_save[&save];
        let save = &mut self.saves[index];
        save.refused = true;
        if save.applied > 0 {
            return Err(format!("merge: request save {index} was stored, and reported as refused"));
        }
        Ok(())
    }

    /// A request removes its session. Returns the number of the removal.
    pub(crate) fn begin_removal(&mut self) -> usize {
        self.removals.push(Removal::default());
        self.beginning_removal = Some(self.removals.len() - 1);
        self.removals.len() - 1
    }

    /// The removal that a store call carries out.
    pub(crate) fn take_removal(&mut self) -> Option<usize> {
        self.beginning_removal.take()
    }

    /// The next wire call carries out this removal.
    pub(crate) fn send_removal(&mut self, removal: usize) {
        self.beginning_removal = Some(removal);
    }

    pub(crate) fn record_take_sent(&mut self, wire_call: usize) {
        self.by_take.extend(self.beginning_removal.take().map(|removal| (wire_call, removal)));
    }

    pub(crate) fn record_taken(&mut self, wire_call: usize, taken: Option<&Session>) {
        if let (Some(removal), Some(taken)) = (self.by_take.get(&wire_call), taken) {
            self.removals[*removal].taken = Some(taken.clone());
        }
    }

    pub(crate) fn acknowledge_removal(&mut self, removal: usize) {
        self.removals[removal].acknowledged = true;
    }

    /// A request creates a session after a removal. Returns the number of the renewal.
    pub(crate) fn begin_renewal(
        &mut self,
        removal: usize,
        is_cycle: bool,
        wanted: Wanted,
    ) -> usize {
        self.renewals.push(Renewal { wanted, removal, is_cycle, stored: false });
        self.beginning_renewal = Some(self.renewals.len() - 1);
        self.renewals.len() - 1
    }

    /// A store inserts a session under this rev.
    pub(crate) fn record_insert(&mut self, rev: Rev) {
        self.by_rev.extend(self.beginning_renewal.take().map(|renewal| (rev, renewal)));
    }

    /// No renewal begins: what the store inserts next is another session.
    pub(crate) fn begin_creation(&mut self) {
        self.beginning_renewal = None;
    }

    /// The database has stored a new session. Returns the violation, or what has happened.
    pub(crate) fn judge_insert(&mut self, new: &Session) -> Option<Result<&'static str, String>> {
        let index = *self.by_rev.get(&new.rev?)?;
        let renewal = &mut self.renewals[index];
        let whose = format!("renewal {index}");
        if std::mem::replace(&mut renewal.stored, true) {
            return Some(Err(format!("{whose} was stored twice")));
        }
        let wanted = &renewal.wanted;
        let removal = &self.removals[renewal.removal];
        if !renewal.is_cycle {
            let is_new = is_same_data(&wanted.data, &new.data) && new.expires == wanted.expires;
            let found = &new.data;
            let violation = format!("{whose} after a flush: {wanted:?} made {found:?}");
            return Some(if is_new { Ok("created after a flush") } else { Err(violation) });
        }
        let Some(taken) = removal.taken.as_ref().filter(|_| removal.acknowledged) else {
            return Some(Err(format!("{whose} of a session that somebody else has ended")));
        };
        let (data, expires, _) = wanted.on_top_of(taken, self.adds_up);
        let found = (&new.data, new.expires, new.created);
        Some(if found == (&data, expires, taken.created) {
            Ok(if is_same_data(&wanted.seen, &taken.data) { "renewed" } else { "renewed, merged" })
        } else {
            Err(format!("{whose}: {wanted:?} on {taken:?} made {found:?}"))
        })
    }

    /// A creation after a removal was acknowledged. Returns whether a session was stored.
    pub(crate) fn record_renewed(&self, renewal: usize) -> Result<bool, String> {
        let it = &self.renewals[renewal];
        let removal = &self.removals[it.removal];
        let is_due = removal.acknowledged && removal.taken.is_some();
        if is_due && !it.stored {
            return Err(format!("renewal {renewal} was acknowledged and never stored"));
        }
        Ok(it.stored)
    }
}
