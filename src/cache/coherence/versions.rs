//! `VersionTable`: decides which operation may insert an entry, and lets concurrent loads of one key
//! share one read (single flight).
//!
//! Each key has a *generation*. A load, save or delete takes a [`Version`] of it before its round trip
//! to the database. **Each operation that finishes begins a new generation. It may insert an entry only
//! if its version is current. Otherwise it must remove the entry.** So of all operations on a key that
//! overlap, only the first to finish can insert an entry, and an operation that began before a change
//! was known cannot insert one after it (invariants I1 to I3 in `ARCHITECTURE.md`). An operation that has
//! learned nothing, such as a failed read, is released instead of finished, and changes nothing.
//!
//! The table has a key only while an operation holds a version of it. Nobody can observe that a
//! generation begins at zero again, since no older version is left to compare it with. So an idle table
//! is empty.

use std::collections::HashMap;
use std::collections::hash_map::Entry as MapEntry;
use std::hash::BuildHasher;

use crate::session::id::{KeyHashing, SessionKey};
use crate::sync::{AtomicU64, Mutex, MutexGuard, Ordering, lock};
use crate::time::Moment;

const SHARDS: usize = 64;

/// The generations of all keys with an operation in progress, and their single flights. `W` is what a
/// load gets to wait for the read of another load.
#[derive(Debug)]
pub(crate) struct VersionTable<W> {
    /// "The key's lock" in this module is the lock of the key's shard. A std mutex, since nothing awaits
    /// while it is held. Many of them, so that operations on different keys seldom wait for each other.
    shards: Box<[Mutex<Shard<W>>]>,
    hashing: KeyHashing,
    /// An atomic, since a hit compares epochs without any lock. It changes only while every shard is
    /// locked.
    epoch: AtomicU64,
}

type Shard<W> = HashMap<SessionKey, KeyState<W>, KeyHashing>;

#[derive(Debug)]
struct KeyState<W> {
    generation: u64,
    /// How many versions are held.
    versions: usize,
    /// How many of them belong to operations that may change the session's data.
    writers: usize,
    flights_started: u64,
    /// The read that a load may join.
    flight: Option<InFlight<W>>,
}

#[derive(Debug)]
struct InFlight<W> {
    number: u64,
    generation: u64,
    epoch: u64,
    started_at: Moment,
    waiter: W,
}

impl<W> KeyState<W> {
    fn new() -> Self {
        Self { generation: 0, versions: 0, writers: 0, flights_started: 0, flight: None }
    }

    fn remove_version(&mut self, version: &Version) {
        self.versions -= 1;
        self.writers -= usize::from(version.effect == Effect::MayChangeData);
    }
}

/// What an operation can do to a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Effect {
    /// It may change or remove the data.
    MayChangeData,
    /// It reads, or it changes no more than the expiry.
    KeepsData,
}

/// A key's generation and the epoch, as they were when an operation began.
///
/// Not `Clone`: the operation must hand it back to [`finish`](VersionTable::finish),
/// [`finish_if_idle`](VersionTable::finish_if_idle) or [`release`](VersionTable::release), exactly once.
#[derive(Debug)]
#[must_use = "a version keeps its key in the table until it is handed back"]
pub(crate) struct Version {
    key: SessionKey,
    generation: u64,
    epoch: u64,
    /// The number of the flight that the operation leads.
    flight_number: Option<u64>,
    effect: Effect,
}

impl Version {
    pub(crate) fn key(&self) -> SessionKey {
        self.key
    }

    pub(crate) fn epoch(&self) -> u64 {
        self.epoch
    }

    pub(crate) fn generation(&self) -> u64 {
        self.generation
    }

    /// Moves the version of a write to the generation that began when the change stream reported that
    /// write.
    pub(crate) fn advance_to(&mut self, generation: u64) {
        self.generation = generation;
    }
}

/// What a load must do about a key that it did not find in the cache: use the entry `T` that is there by
/// now, wait for another load with `W`, or read as the leader `L`.
#[derive(Debug)]
pub(crate) enum Flight<T, L, W> {
    /// The cache has it by now.
    Found(T),
    /// Another load of the same generation is reading it: wait for that read.
    Join(W),
    /// No read can be joined: read it, then finish the version. Other loads may join this read.
    Lead(L, W),
}

impl<W: Clone> VersionTable<W> {
    pub(crate) fn new() -> Self {
        let hashing = KeyHashing::default();
        let shards = (0..SHARDS).map(|_| Mutex::new(HashMap::with_hasher(hashing.clone())));
        Self { shards: shards.collect(), hashing, epoch: AtomicU64::new(0) }
    }

    /// The epoch of the entries that may be served. Each [`invalidate_all`](Self::invalidate_all) begins
    /// the next one.
    pub(crate) fn epoch(&self) -> u64 {
        self.epoch.load(Ordering::Acquire)
    }

    /// Takes a version for an operation that is about to begin.
    pub(crate) fn take_version(&self, key: SessionKey, effect: Effect) -> Version {
        let mut shard = self.shard(key);
        self.insert_version(&mut shard, key, effect)
    }

    /// Takes a version for a read that is about to begin, if no other operation on the key is in
    /// progress.
    pub(crate) fn take_version_if_idle(&self, key: SessionKey) -> Option<Version> {
        let mut shard = self.shard(key);
        if shard.contains_key(&key) {
            return None;
        }
        Some(self.insert_version(&mut shard, key, Effect::KeepsData))
    }

    /// Whether an operation in progress may still change the session's data.
    pub(crate) fn has_pending_write(&self, key: SessionKey) -> bool {
        self.shard(key).get(&key).is_some_and(|state| state.writers > 0)
    }

    /// Joins the read of another load of `key`, or takes a version to lead a new one.
    ///
    /// - `is_fresh` gets the moment at which the other read started. If it returns false, the load does
    ///   not join: what that read returns is too old for a load that begins now.
    /// - `look_up` looks in the cache once more, under the key's lock, since another read may have
    ///   completed after the load last looked.
    /// - `new_waiter` makes what later loads wait with.
    pub(crate) fn join_or_lead<T>(
        &self,
        key: SessionKey,
        now: Moment,
        is_fresh: impl FnOnce(Moment) -> bool,
        look_up: impl FnOnce() -> Option<T>,
        new_waiter: impl FnOnce() -> W,
    ) -> Flight<T, Version, W> {
        let mut shard = self.shard(key);
        let epoch = self.epoch();
        if let Some(state) = shard.get(&key)
            && let Some(flight) = &state.flight
            && (flight.generation, flight.epoch) == (state.generation, epoch)
            && is_fresh(flight.started_at)
        {
            return Flight::Join(flight.waiter.clone());
        }
        if let Some(found) = look_up() {
            return Flight::Found(found);
        }
        let mut version = self.insert_version(&mut shard, key, Effect::KeepsData);
        let waiter = new_waiter();
        if let Some(state) = shard.get_mut(&key) {
            let number = state.flights_started;
            state.flights_started += 1;
            version.flight_number = Some(number);
            state.flight = Some(InFlight {
                number,
                generation: state.generation,
                epoch,
                started_at: now,
                waiter: waiter.clone(),
            });
        }
        Flight::Lead(version, waiter)
    }

    /// Ends an operation and begins a new generation.
    ///
    /// `act` gets whether the version was current. If so, it may insert an entry of the version's epoch.
    /// Otherwise it must remove the entry. It runs under the key's lock.
    #[allow(clippy::needless_pass_by_value, reason = "a version is finished once")]
    pub(crate) fn finish<R>(&self, version: Version, act: impl FnOnce(bool) -> R) -> R {
        let mut shard = self.shard(version.key);
        let mut is_current = false;
        if let MapEntry::Occupied(mut slot) = shard.entry(version.key) {
            let state = slot.get_mut();
            is_current = self.is_current(&version, state);
            state.generation += 1;
            state.remove_version(&version);
            if state.versions == 0 {
                slot.remove();
            }
        }
        act(is_current)
    }

    /// Ends a read that must give way to every other operation on its key.
    ///
    /// If the version is current and no other version of the key is held, runs `act`, which may insert
    /// an entry, under the key's lock, and returns true. Otherwise the read ends like one that is
    /// [released](Self::release): it inserts nothing, so the versions of the others stay current.
    #[allow(clippy::needless_pass_by_value, reason = "a version is finished once")]
    pub(crate) fn finish_if_idle(&self, version: Version, act: impl FnOnce()) -> bool {
        let mut shard = self.shard(version.key);
        let MapEntry::Occupied(mut slot) = shard.entry(version.key) else { return false };
        let state = slot.get_mut();
        let is_current = self.is_current(&version, state);
        state.remove_version(&version);
        if state.versions > 0 {
            return false;
        }
        slot.remove();
        if is_current {
            act();
        }
        is_current
    }

    /// Ends an operation that has learned nothing, as if it had never begun: the entry stays, other
    /// versions stay current, and no load joins its flight any longer.
    #[allow(clippy::needless_pass_by_value, reason = "a version is released once")]
    pub(crate) fn release(&self, version: Version) {
        let mut shard = self.shard(version.key);
        if let MapEntry::Occupied(mut slot) = shard.entry(version.key) {
            let state = slot.get_mut();
            if state.flight.as_ref().map(|flight| flight.number) == version.flight_number {
                state.flight = None;
            }
            state.remove_version(&version);
            if state.versions == 0 {
                slot.remove();
            }
        }
    }

    /// Makes all versions of a key outdated, because the database has changed it, and returns the new
    /// generation. `remove` must remove the key's entry. It runs under the key's lock.
    pub(crate) fn invalidate(&self, key: SessionKey, remove: impl FnOnce()) -> u64 {
        let mut shard = self.shard(key);
        let mut generation = 0;
        if let Some(state) = shard.get_mut(&key) {
            state.generation += 1;
            generation = state.generation;
        }
        remove();
        generation
    }

    /// Makes the versions of each key [with a pending write](Self::has_pending_write) outdated. `remove`
    /// must remove the key's entry. It runs under the key's lock.
    pub(crate) fn invalidate_pending_writes(&self, mut remove: impl FnMut(SessionKey)) {
        for shard in &self.shards {
            for (key, state) in lock(shard).iter_mut().filter(|(_, state)| state.writers > 0) {
                state.generation += 1;
                remove(*key);
            }
        }
    }

    /// Makes all versions outdated and begins a new epoch. `empty` must empty the cache. It runs under
    /// the locks of all keys.
    pub(crate) fn invalidate_all<R>(&self, empty: impl FnOnce() -> R) -> R {
        let _all_keys: Vec<_> = self.shards.iter().map(lock).collect();
        self.epoch.fetch_add(1, Ordering::Release);
        empty()
    }

    /// Runs `act` under the key's lock. It may remove an entry that no load would be served, and do
    /// nothing else, since every version stays current.
    pub(crate) fn with_key_locked<R>(&self, key: SessionKey, act: impl FnOnce() -> R) -> R {
        let _shard = self.shard(key);
        act()
    }

    fn shard(&self, key: SessionKey) -> MutexGuard<'_, Shard<W>> {
        // The map in a shard uses the hash's low bits and its top seven bits, so take others.
        #[allow(clippy::cast_possible_truncation, reason = "16 bits are left")]
        let index = (self.hashing.hash_one(key) >> 48) as usize % SHARDS;
        lock(&self.shards[index])
    }

    fn insert_version(&self, shard: &mut Shard<W>, key: SessionKey, effect: Effect) -> Version {
        let state = shard.entry(key).or_insert_with(KeyState::new);
        state.versions += 1;
        state.writers += usize::from(effect == Effect::MayChangeData);
        let generation = state.generation;
        Version { key, generation, epoch: self.epoch(), flight_number: None, effect }
    }

    fn is_current(&self, version: &Version, state: &KeyState<W>) -> bool {
        (state.generation, self.epoch()) == (version.generation, version.epoch)
    }

    #[cfg(test)]
    pub(crate) fn tracked_keys(&self) -> usize {
        self.shards.iter().map(|shard| lock(shard).len()).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::time::Clock;

    fn key() -> SessionKey {
        SessionKey::of(1)
    }

    fn other_key() -> SessionKey {
        SessionKey::of(2)
    }

    fn take(table: &VersionTable<()>, key: SessionKey) -> Version {
        table.take_version(key, Effect::MayChangeData)
    }

    /// Finishes the version, and returns whether it was current.
    fn finish<W: Clone>(table: &VersionTable<W>, version: Version) -> bool {
        table.finish(version, |is_current| is_current)
    }

    fn join_or_lead(
        table: &VersionTable<u32>,
        look_up: impl FnOnce() -> Option<()>,
        waiter: u32,
    ) -> Flight<(), Version, u32> {
        table.join_or_lead(key(), Clock::system().now(), |_| true, look_up, || waiter)
    }

    /// The same for a load that any flight in progress is too old for.
    fn lead(table: &VersionTable<u32>, waiter: u32) -> Flight<(), Version, u32> {
        table.join_or_lead(key(), Clock::system().now(), |_| false, || None, || waiter)
    }

    #[test]
    fn only_the_first_of_overlapping_operations_to_finish_is_current() {
        let table = VersionTable::new();
        let a = take(&table, key());
        let b = take(&table, key());
        let c = take(&table, key());
        assert!(finish(&table, b));
        assert!(!finish(&table, a));
        let d = take(&table, key());
        assert!(!finish(&table, c));
        assert!(!finish(&table, d), "c finished while d was in progress");
        assert_eq!(table.tracked_keys(), 0);
    }

    #[test]
    fn operations_on_different_keys_stay_current() {
        let table = VersionTable::new();
        let a = take(&table, key());
        let b = take(&table, other_key());
        assert!(finish(&table, a));
        assert!(finish(&table, b));
    }

    #[test]
    fn an_invalidation_makes_only_the_versions_of_its_key_outdated() {
        let table = VersionTable::new();
        let a = take(&table, key());
        let other = take(&table, other_key());
        table.invalidate(key(), || ());
        assert!(!finish(&table, a));
        assert!(finish(&table, other));
    }

    #[test]
    fn an_invalidation_of_all_keys_begins_an_epoch_and_makes_every_version_outdated() {
        let table = VersionTable::new();
        let epoch = table.epoch();
        let version = take(&table, key());
        table.invalidate_all(|| ());
        assert_ne!(table.epoch(), epoch);
        assert!(!finish(&table, version));
    }

    #[test]
    fn a_flight_is_shared_until_an_operation_finishes() {
        let table = VersionTable::new();
        let Flight::Lead(first, _) = join_or_lead(&table, || None, 1) else { panic!() };
        assert!(matches!(join_or_lead(&table, || None, 2), Flight::Join(1)));
        table.invalidate(key(), || ());
        let Flight::Lead(second, _) = join_or_lead(&table, || None, 3) else { panic!() };
        assert!(matches!(join_or_lead(&table, || None, 4), Flight::Join(3)));
        assert!(!finish(&table, first));
        assert!(matches!(join_or_lead(&table, || Some(()), 5), Flight::Found(())));
        assert!(!finish(&table, second), "the first one finished before");
        assert_eq!(table.tracked_keys(), 0);
    }

    #[test]
    fn a_release_ends_its_own_flight_and_changes_nothing_else() {
        let table = VersionTable::new();
        let write = table.take_version(key(), Effect::MayChangeData);
        let Flight::Lead(first, _) = join_or_lead(&table, || None, 1) else { panic!() };
        table.release(first);
        let Flight::Lead(second, 2) = join_or_lead(&table, || None, 2) else { panic!() };
        let Flight::Lead(third, 3) = lead(&table, 3) else { panic!() };
        table.release(second);
        assert!(matches!(join_or_lead(&table, || None, 4), Flight::Join(3)));
        assert!(finish(&table, write), "no operation learned anything in between");
        table.release(third);
        assert_eq!(table.tracked_keys(), 0);
    }

    #[test]
    fn a_write_that_advances_is_current_until_the_next_change() {
        for has_foreign_change in [false, true] {
            let table = VersionTable::new();
            let mut write = take(&table, key());
            let load = take(&table, key());
            let reported_in = table.invalidate(key(), || ());
            if has_foreign_change {
                table.invalidate(key(), || ());
            }
            write.advance_to(reported_in);
            assert_eq!(finish(&table, write), !has_foreign_change);
            assert!(!finish(&table, load));
        }
    }

    #[test]
    fn a_flight_of_an_earlier_epoch_is_not_shared() {
        let table = VersionTable::new();
        let Flight::Lead(first, _) = join_or_lead(&table, || None, 1) else { panic!() };
        table.invalidate_all(|| ());
        let Flight::Lead(second, _) = join_or_lead(&table, || None, 2) else { panic!() };
        finish(&table, first);
        finish(&table, second);
        assert_eq!(table.tracked_keys(), 0);
    }

    #[test]
    fn a_flight_that_is_too_old_is_not_shared() {
        let table = VersionTable::new();
        let Flight::Lead(first, _) = join_or_lead(&table, || None, 1) else { panic!() };
        let Flight::Lead(second, 2) = lead(&table, 2) else { panic!() };
        assert!(matches!(join_or_lead(&table, || None, 3), Flight::Join(2)));
        assert!(finish(&table, first));
        assert!(!finish(&table, second));
        assert_eq!(table.tracked_keys(), 0);
    }
}
