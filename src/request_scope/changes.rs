//! What a request has changed in a session, and how it is applied to a newer state.

use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use serde_json::Value;

use crate::error::{Error, ErrorKind, Result};
use crate::session::revision::Rev;
use crate::session::snapshot::{SharedData, Snapshot};
use crate::session::{Data, Session, is_same_data, is_same_value};
use crate::time::WallTime;

/// What a request knows of a session that it has loaded.
#[derive(Clone)]
pub(crate) struct Base {
    /// What the database had when the request loaded the session, or saved it last.
    pub(crate) stored: Snapshot,
    /// The expiry as the request loaded it, or as it saved it last.
    pub(crate) seen_expires: WallTime,
    /// The data as the request knows it. `None` if that is what was stored. It differs if the last save was merged
    /// with the changes of another request.
    differing: Option<Arc<dyn SharedData>>,
}

impl Base {
    pub(crate) fn loaded(stored: Snapshot) -> Self {
        let seen_expires = stored.expires;
        Self { stored, seen_expires, differing: None }
    }

    /// What is known after a save with this expiry. `differing` is the data of the request, if other data was stored.
    pub(crate) fn saved(
        stored: Snapshot,
        expires: WallTime,
        differing: Option<Arc<dyn SharedData>>,
    ) -> Self {
        Self { stored, seen_expires: expires, differing }
    }

    /// The data as the request loaded it, or as it saved it last. The request's changes count from here.
    fn seen(&self) -> &Arc<dyn SharedData> {
        self.differing.as_ref().unwrap_or(&self.stored.data)
    }

    /// Whether a state has the data that the request has seen, as far as that is known without a comparison. While
    /// the `rev` stays, the data does.
    fn is_seen(&self, state: &Snapshot) -> bool {
        let has_same_rev = state.rev.is_some() && state.rev == self.stored.rev;
        has_same_rev && self.differing.is_none()
            || std::ptr::addr_eq(Arc::as_ptr(self.seen()), Arc::as_ptr(&state.data))
    }

    /// Whether a save of `data` changes no data, and does not end the session sooner than the request found it.
    pub(crate) fn is_touch(&self, data: &Data, expires: WallTime) -> Result<bool> {
        Ok(expires >= self.seen_expires && is_same_data(self.seen().data()?.as_ref(), data))
    }

    /// Whether the data has a key of this session. If the session cannot be read, it may have.
    pub(crate) fn shares_a_key(&self, data: &Data) -> bool {
        self.seen().data().map_or(true, |seen| seen.keys().any(|key| data.contains_key(key)))
    }

    /// Whether the data has a key of this session with the same value. If the session cannot be read, it may have.
    pub(crate) fn shares_a_value(&self, data: &Data) -> bool {
        let is_shared = |(key, value): (&String, &Value)| is_same(data.get(key), Some(value));
        self.seen().data().map_or(true, |seen| seen.iter().any(is_shared))
    }
}

/// The function of the app that merges a value that two requests have changed.
#[derive(Clone)]
pub(crate) struct OnConflict(pub(crate) Arc<Resolve>);

pub(crate) type Resolve =
    dyn Fn(&str, Option<&Value>, Option<&Value>, Option<&Value>) -> Option<Value> + Send + Sync;

impl OnConflict {
    fn resolve(
        &self,
        key: &str,
        base: Option<&Value>,
        theirs: Option<&Value>,
        ours: Option<&Value>,
    ) -> Result<Option<Value>> {
        let resolve = AssertUnwindSafe(|| (self.0)(key, base, theirs, ours));
        catch_unwind(resolve).map_err(|_| {
            Error::new(
                ErrorKind::Panic,
                "the `on_conflict` function panicked, so the save was not sent: make it return \
                 `ours.cloned()` for values that it does not expect. The app's panic hook has the \
                 panic's message",
            )
        })
    }
}

impl fmt::Debug for OnConflict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("OnConflict(..)")
    }
}

/// A save of what a request has changed.
#[derive(Clone)]
pub(crate) struct ScopedSave {
    base: Base,
    data: Arc<Data>,
    expires: WallTime,
    /// A newer state than the request has loaded, if the caller has one.
    newer: Option<Snapshot>,
}

/// A state that has the changes of a save.
pub(crate) struct Merged {
    pub(crate) data: Arc<Data>,
    pub(crate) expires: WallTime,
    /// Whether the stored expiry must not stay, even if it is later.
    pub(crate) is_shorter: bool,
    /// How many keys of the last save had changed on both sides.
    pub(crate) conflicts: u64,
    /// Whether the state had other data than the request has seen.
    pub(crate) keeps_others: bool,
}

/// What a [`ScopedSave`] has stored. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Saved {
    pub(crate) data: Arc<Data>,
    pub(crate) expires: WallTime,
    pub(crate) rev: Rev,
    pub(crate) created: Option<WallTime>,
    /// Whether the data is not just what the request has.
    pub(crate) is_merged: bool,
}

impl Saved {
    /// A copy of the stored session.
    pub(crate) fn session(&self) -> Session {
        let data = Data::clone(&self.data);
        Session { data, expires: self.expires, rev: Some(self.rev), created: self.created }
    }

    pub(crate) fn snapshot(&self) -> Snapshot {
        let data = Arc::clone(&self.data) as _;
        Snapshot { data, expires: self.expires, rev: Some(self.rev), created: self.created }
    }
}

impl ScopedSave {
    /// The save of `data` by a request that knows `base`.
    pub(crate) fn new(base: Base, data: &Data, expires: WallTime) -> Self {
        Self { base, data: Arc::new(data.clone()), expires, newer: None }
    }

    /// The same save for a caller that has another state of the session.
    pub(crate) fn with_newer(self, newer: Option<Snapshot>) -> Self {
        Self { newer, ..self }
    }

    /// What is probably stored.
    pub(crate) fn expected(&self) -> &Snapshot {
        self.newer.as_ref().unwrap_or(&self.base.stored)
    }

    /// The data as the request has it.
    #[cfg(test)]
    pub(crate) fn data(&self) -> &Arc<Data> {
        &self.data
    }

    /// Whether the request ends the session sooner than it found it.
    pub(crate) fn is_shorter(&self) -> bool {
        self.expires < self.base.seen_expires
    }

    /// Applies the changes to a state.
    ///
    /// The later expiry is kept, unless the request has shortened the life of the session.
    pub(crate) fn apply(
        &self,
        state: &Snapshot,
        on_conflict: Option<&OnConflict>,
    ) -> Result<Merged> {
        let expires =
            if self.is_shorter() { self.expires } else { self.expires.max(state.expires) };
        let is_shorter = self.is_shorter();
        if self.base.is_seen(state) {
            let data = Arc::clone(&self.data);
            return Ok(Merged { data, expires, is_shorter, conflicts: 0, keeps_others: false });
        }
        let mut merged = state.data.data()?.into_owned();
        let conflicts = self.change(&mut merged, on_conflict)?;
        let data = Arc::new(merged);
        Ok(Merged { data, expires, is_shorter, conflicts, keeps_others: true })
    }

    /// Applies the changes to what another save makes of a state. That one must be sent together with this one.
    pub(crate) fn apply_after(
        &self,
        earlier: &Merged,
        on_conflict: Option<&OnConflict>,
    ) -> Result<Merged> {
        let mut data = Data::clone(&earlier.data);
        let conflicts = self.change(&mut data, on_conflict)?;
        let is_kept = !self.is_shorter() && earlier.expires > self.expires;
        let expires = if is_kept { earlier.expires } else { self.expires };
        let is_shorter = self.is_shorter() || earlier.is_shorter;
        Ok(Merged { data: Arc::new(data), expires, is_shorter, conflicts, keeps_others: true })
    }

    /// Applies the changes to data, and returns how many of its keys had changed on both sides.
    fn change(&self, data: &mut Data, on_conflict: Option<&OnConflict>) -> Result<u64> {
        let seen = self.base.seen().data()?;
        let added_or_kept = self.data.iter().map(|(key, ours)| (key, Some(ours)));
        let removed = seen.keys().filter(|key| !self.data.contains_key(*key));
        let mut conflicts = 0;
        for (key, ours) in added_or_kept.chain(removed.map(|key| (key, None))) {
            let base = seen.get(key);
            let theirs = data.get(key);
            if is_same(base, ours) {
                continue;
            }
            let value = if is_same(base, theirs) {
                ours.cloned()
            } else {
                // Also if both sides have the same value: two requests that count from 5 to 6 make 7.
                conflicts += 1;
                match on_conflict {
                    Some(on_conflict) => on_conflict.resolve(key, base, theirs, ours)?,
                    None => ours.cloned(),
                }
            };
            match value {
                Some(value) => data.insert(key.clone(), value),
                None => data.remove(key),
            };
        }
        Ok(conflicts)
    }
}

fn is_same(one: Option<&Value>, other: Option<&Value>) -> bool {
    match (one, other) {
        (None, None) => true,
        (Some(one), Some(other)) => is_same_value(one, other),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::session::revision::RevSource;

    fn data(value: Value) -> Data {
        serde_json::from_value(value).unwrap()
    }

    fn snapshot(value: Value, expires: i64) -> Snapshot {
        Session::new(data(value), WallTime::from_millis(expires)).into()
    }

    fn save(base: Value, ours: Value, expires: i64) -> ScopedSave {
        let base = Base::loaded(snapshot(base, 10));
        ScopedSave::new(base, &data(ours), WallTime::from_millis(expires))
    }

    fn sum() -> OnConflict {
        OnConflict(Arc::new(|_, base, theirs, ours| {
            let number = |value: Option<&Value>| value.and_then(Value::as_i64).unwrap_or(0);
            Some(json!(number(theirs) + number(ours) - number(base)))
        }))
    }

    fn merge(
        base: Value,
        theirs: Value,
        ours: Value,
        resolve: Option<&OnConflict>,
    ) -> (Value, u64) {
        let merged = save(base, ours, 20).apply(&snapshot(theirs, 10), resolve).unwrap();
        (json!(*merged.data), merged.conflicts)
    }

    #[test]
    fn each_side_keeps_what_it_added_changed_and_removed() {
        let base = json!({ "same": 0, "a": 1, "b": 1, "gone_here": 1, "gone_there": 1 });
        let theirs = json!({ "same": 0, "a": 2, "b": 1, "gone_here": 1, "new_there": 3 });
        let ours = json!({ "same": 0, "a": 1, "b": 4, "gone_there": 1, "new_here": 5 });
        let merged = json!({ "same": 0, "a": 2, "b": 4, "new_there": 3, "new_here": 5 });
        assert_eq!(merge(base, theirs, ours, None), (merged, 0));
    }

    #[test]
    fn the_later_save_wins_a_key_that_both_changed_and_counts_it() {
        for (base, theirs, ours, merged, conflicts) in [
            (json!({ "k": 1 }), json!({ "k": 2 }), json!({ "k": 3 }), json!({ "k": 3 }), 1),
            (json!({ "k": 1 }), json!({ "k": 2 }), json!({}), json!({}), 1),
            (json!({ "k": 1 }), json!({}), json!({ "k": 3 }), json!({ "k": 3 }), 1),
            (json!({}), json!({ "k": 2 }), json!({ "k": 3 }), json!({ "k": 3 }), 1),
            (json!({ "k": 1 }), json!({ "k": 3 }), json!({ "k": 3 }), json!({ "k": 3 }), 1),
            (json!({ "k": 1 }), json!({}), json!({}), json!({}), 1),
            (json!({ "k": 0.0 }), json!({ "k": -0.0 }), json!({ "k": 1 }), json!({ "k": 1 }), 1),
        ] {
            assert_eq!(merge(base, theirs, ours, None), (merged, conflicts));
        }
    }

    #[test]
    fn on_conflict_decides_a_key_that_both_changed_and_no_other() {
        let base = json!({ "views": 5, "mine": 0, "theirs": 0 });
        let theirs = json!({ "views": 7, "mine": 0, "theirs": 9 });
        let ours = json!({ "views": 6, "mine": 9, "theirs": 0 });
        let merged = json!({ "views": 8, "mine": 9, "theirs": 9 });
        assert_eq!(merge(base, theirs, ours, Some(&sum())), (merged, 1));
        let base = json!({ "views": 5 });
        let both = json!({ "views": 6 });
        let seven = json!({ "views": 7 });
        assert_eq!(merge(base, both.clone(), both, Some(&sum())), (seven, 1), "both counted");
        let forget = OnConflict(Arc::new(|_, _, _, _| None));
        let removed = merge(json!({}), json!({ "k": 1 }), json!({ "k": 2 }), Some(&forget));
        assert_eq!(removed, (json!({}), 1));
    }

    #[test]
    fn a_panic_of_on_conflict_is_an_error() {
        let panics = OnConflict(Arc::new(|_, _, _, _| panic!("on purpose")));
        let save = save(json!({}), json!({ "k": 2 }), 20);
        let error = save.apply(&snapshot(json!({ "k": 1 }), 10), Some(&panics)).err().unwrap();
        assert_eq!(error.kind(), ErrorKind::Panic);
        assert!(!error.to_string().contains("on purpose"));
    }

    #[test]
    fn a_second_save_of_a_request_keeps_what_the_first_one_was_merged_with() {
        // The request loaded { a: 0 } and saved { a: 1 }. Another one had added `b` meanwhile.
        let stored = snapshot(json!({ "a": 1, "b": 2 }), 10);
        let seen = Arc::new(data(json!({ "a": 1 })));
        let base = Base::saved(stored.clone(), stored.expires, Some(seen));
        let again = ScopedSave::new(base, &data(json!({ "a": 3 })), WallTime::from_millis(20));
        assert_eq!(json!(*again.apply(&stored, None).unwrap().data), json!({ "a": 3, "b": 2 }));
    }

    #[test]
    fn a_state_with_the_same_rev_is_not_merged() {
        let rev = RevSource::new().next();
        let state = Snapshot { rev: Some(rev), ..snapshot(json!({ "a": 1 }), 10) };
        let copy = Snapshot { data: Arc::new(data(json!({ "a": 1 }))), ..state.clone() };
        let ours = data(json!({ "a": 2 }));
        let is_merged = |base: Base, state: &Snapshot| {
            let save = ScopedSave::new(base, &ours, WallTime::from_millis(20));
            save.apply(state, None).unwrap().keeps_others
        };
        assert!(!is_merged(Base::loaded(state.clone()), &copy));
        let other = Snapshot { rev: Some(RevSource::new().next()), ..copy.clone() };
        assert!(is_merged(Base::loaded(state.clone()), &other));
        let seen = Arc::new(data(json!({})));
        assert!(is_merged(Base::saved(state, copy.expires, Some(seen)), &copy));
    }

    #[test]
    fn a_second_save_of_a_request_keeps_the_later_expiry_that_the_first_one_met() {
        // The request loaded an expiry of 10 and saved 20. Another one had stored 100 meanwhile.
        let stored = snapshot(json!({ "a": 1 }), 100);
        let seen_expires = WallTime::from_millis(20);
        let a = data(json!({ "a": 1 }));
        let base = Base::saved(stored, seen_expires, Some(Arc::new(a.clone())));
        let is_touch = |expires| base.is_touch(&a, WallTime::from_millis(expires)).unwrap();
        assert!(is_touch(21), "it is no shorter than what the request has seen");
        assert!(!is_touch(19));
        let save = ScopedSave::new(base.clone(), &a, WallTime::from_millis(21));
        let kept = save.apply(&snapshot(json!({ "a": 1 }), 100), None).unwrap();
        assert_eq!(kept.expires.millis(), 100);
    }

    #[test]
    fn the_later_expiry_is_kept_unless_the_request_shortens_it() {
        let state = snapshot(json!({ "k": 1 }), 30);
        let expiry = |expires| save(json!({}), json!({}), expires).apply(&state, None).unwrap();
        assert_eq!(expiry(20).expires.millis(), 30);
        assert_eq!(expiry(40).expires.millis(), 40);
        assert_eq!(expiry(5).expires.millis(), 5, "the request found 10");
        let base = Base::loaded(snapshot(json!({ "k": 1 }), 10));
        let is_touch =
            |ours, expires| base.is_touch(&data(ours), WallTime::from_millis(expires)).unwrap();
        assert!(is_touch(json!({ "k": 1 }), 10));
        assert!(!is_touch(json!({ "k": 1 }), 9));
        assert!(!is_touch(json!({ "k": 2 }), 10));
    }

    #[test]
    fn debug_output_shows_nothing_of_the_function() {
        assert_eq!(format!("{:?}", sum()), "OnConflict(..)");
    }
}
