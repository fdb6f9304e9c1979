//! Decides who may leave an entry in the cache. Pure logic: no I/O, no clock of its own.
//!
//! Each key has a *generation*. A load, save or delete takes a [`Version`] of it before its round
//! trip to the database. **Whoever finishes bumps the generation; only a finisher whose stamp was
//! current may leave an entry; every other removes what is there.** So of all operations on a key
//! that overlap, at most the first to finish leaves an entry, and one that began before a change
//! was known never leaves one after it (invariants I1 to I3 in `ARCHITECTURE.md`).
//!
//! A generation is kept only while somebody holds a stamp of it: nobody can tell the difference,
//! and an idle table is empty. Loads of one key that overlap share one *flight*, which hangs on the
//! same slot; a load that begins after a change does not join a flight from before it.

mod idle;

use std::collections::HashMap;
use std::collections::hash_map::Entry as MapEntry;
use std::hash::BuildHasher;

use crate::session::id::{KeyHashing, SessionKey};
use crate::sync::{AtomicU64, Mutex, MutexGuard, Ordering, lock};
use crate::time::Moment;

const SHARDS: usize = 64;

/// The generations of all keys that somebody works on, and the flights under way.
#[derive(Debug)]
pub(crate) struct VersionTable<F> {
    shards: Box<[Mutex<Shard<F>>]>,
    hashing: KeyHashing,
    epoch: AtomicU64,
}

type Shard<F> = HashMap<SessionKey, KeyState<F>, KeyHashing>;

#[derive(Debug)]
struct KeyState<F> {
    generation: u64,
    versions: usize,
    /// How many of the stamps may change the session's data.
    writers: usize,
    flights_started: u64,
    flight: Option<InFlight<F>>,
}

#[derive(Debug)]
struct InFlight<F> {
    number: u64,
    generation: u64,
    epoch: u64,
    started_at: Moment,
    flight: F,
}

impl<F> KeyState<F> {
    fn remove_version(&mut self, stamp: &Version) {
        self.versions -= 1;
        self.writers -= usize::from(stamp.changes);
    }
}

/// A key's generation as it was when an operation began. Must be handed back to
/// [`finish`](Freshness::finish) or [`release`](Freshness::release), which is why it cannot be copied.
#[derive(Debug)]
#[must_use = "a stamp holds its slot until it is finished"]
pub(crate) struct Version {
    key: SessionKey,
    generation: u64,
    epoch: u64,
    /// The number of the flight that it leads.
    leads: Option<u64>,
    /// Whether its operation may change the session's data.
    changes: bool,
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

    /// Makes the stamp of a write one of the generation that began when the database was seen to
    /// hold that write.
    pub(crate) fn advance_to(&mut self, generation: u64) {
        self.generation = generation;
    }
}

/// What a load is to do about a key that the cache did not answer for.
#[derive(Debug)]
pub(crate) enum Flight<T, S, F> {
    /// The cache has it by now.
    Found(T),
    /// Another load of the same generation is under way: wait for it.
    Join(F),
    /// Read it, and finish the stamp.
    Lead(S, F),
}

impl<F: Clone> VersionTable<F> {
    pub(crate) fn new() -> Self {
        let hashing = KeyHashing::default();
        let shards = (0..SHARDS).map(|_| Mutex::new(HashMap::with_hasher(hashing.clone())));
        Self { shards: shards.collect(), hashing, epoch: AtomicU64::new(0) }
    }

    /// The epoch that entries must be of to be served. Each [`invalidate_all`](Self::invalidate_all) ends one.
    pub(crate) fn epoch(&self) -> u64 {
        self.epoch.load(Ordering::Acquire)
    }

    /// Takes a stamp for an operation that is about to begin, and whether that may change the
    /// session's data.
    pub(crate) fn take_version(&self, key: SessionKey, changes: bool) -> Version {
        let mut shard = self.shard(key);
        self.insert_version(&mut shard, key, changes)
    }

    /// Whether an operation that has begun may still change the session's data.
    pub(crate) fn has_pending_write(&self, key: SessionKey) -> bool {
        self.shard(key).get(&key).is_some_and(|state| state.writers > 0)
    }

    /// Joins the flight of a load of `key`, or starts one `now`. What departed at a moment that is
    /// not `fresh` any more is not joined: what it brings would be too old for a load that begins
    /// now. `look` asks the cache once more, under the lock, since a flight may have landed since
    /// it was asked last.
    pub(crate) fn join_or_lead<T>(
        &self,
        key: SessionKey,
        now: Moment,
        fresh: impl FnOnce(Moment) -> bool,
        look: impl FnOnce() -> Option<T>,
        depart: impl FnOnce() -> F,
    ) -> Flight<T, Version, F> {
        let mut shard = self.shard(key);
        let epoch = self.epoch();
        if let Some(slot) = shard.get(&key)
            && let Some(flying) = &slot.flight
            && (flying.generation, flying.epoch) == (slot.generation, epoch)
            && fresh(flying.started_at)
        {
            return Flight::Join(flying.flight.clone());
        }
        if let Some(found) = look() {
            return Flight::Found(found);
        }
        let mut stamp = self.insert_version(&mut shard, key, false);
        let flight = depart();
        if let Some(slot) = shard.get_mut(&key) {
            let (number, generation) = (slot.flights_started, slot.generation);
            slot.flights_started += 1;
            stamp.leads = Some(number);
            let departed = now;
            slot.flight = Some(InFlight {
                number,
                generation,
                epoch,
                started_at: departed,
                flight: flight.clone(),
            });
        }
        Flight::Lead(stamp, flight)
    }

    /// Ends the operation of `take_version`. `act` is told whether the stamp was current: only then may it
    /// leave an entry (of the stamp's epoch), otherwise it must remove what is there. It runs under
    /// the key's lock.
    #[allow(clippy::needless_pass_by_value, reason = "a stamp is finished once")]
    pub(crate) fn finish<R>(&self, stamp: Version, act: impl FnOnce(bool) -> R) -> R {
        let mut shard = self.shard(stamp.key);
        let mut current = false;
        if let MapEntry::Occupied(mut slot) = shard.entry(stamp.key) {
            let state = slot.get_mut();
            current = (state.generation, self.epoch()) == (stamp.generation, stamp.epoch);
            state.generation += 1;
            state.remove_version(&stamp);
            if state.versions == 0 {
                slot.remove();
            }
        }
        act(current)
    }

    /// Ends an operation that has learned nothing, as if it had not been: what is cached stays, and
    /// nobody joins its flight any more.
    #[allow(clippy::needless_pass_by_value, reason = "a stamp is released once")]
    pub(crate) fn release(&self, stamp: Version) {
        let mut shard = self.shard(stamp.key);
        if let MapEntry::Occupied(mut slot) = shard.entry(stamp.key) {
            let state = slot.get_mut();
            if state.flight.as_ref().map(|flying| flying.number) == stamp.leads {
                state.flight = None;
            }
            state.remove_version(&stamp);
            if state.versions == 0 {
                slot.remove();
            }
        }
    }

    /// Voids the stamps of one key, because the database has changed it. `act` must remove its
    /// entry. Answers with the generation that begins.
    pub(crate) fn invalidate(&self, key: SessionKey, act: impl FnOnce()) -> u64 {
        let mut shard = self.shard(key);
        let mut generation = 0;
        if let Some(slot) = shard.get_mut(&key) {
            slot.generation += 1;
            generation = slot.generation;
        }
        act();
        generation
    }

    /// Voids the stamps of each key on which an operation is under way that may change the session's data.
    /// `remove` must remove the key's entry; it runs under the key's lock.
    pub(crate) fn invalidate_pending_writes(&self, mut remove: impl FnMut(SessionKey)) {
        for shard in &self.shards {
            for (key, slot) in lock(shard).iter_mut().filter(|(_, slot)| slot.writers > 0) {
                slot.generation += 1;
                remove(*key);
            }
        }
    }

    /// Runs `act` under the key's lock. It may remove what nobody would be served, and nothing else:
    /// every stamp stays as current as it is.
    pub(crate) fn with_key_locked<R>(&self, key: SessionKey, act: impl FnOnce() -> R) -> R {
        let _shard = self.shard(key);
        act()
    }

    /// Voids every stamp and ends the epoch. `act` must empty the cache.
    pub(crate) fn invalidate_all<R>(&self, act: impl FnOnce() -> R) -> R {
        let _every_key: Vec<_> = self.shards.iter().map(lock).collect();
        self.epoch.fetch_add(1, Ordering::Release);
        act()
    }

    fn shard(&self, key: SessionKey) -> MutexGuard<'_, Shard<F>> {
        // The map inside uses the hash's low bits and its top seven; these are others.
        #[allow(clippy::cast_possible_truncation, reason = "sixteen bits are left")]
        let index = (self.hashing.hash_one(key) >> 48) as usize % SHARDS;
        lock(&self.shards[index])
    }

    fn insert_version(&self, shard: &mut Shard<F>, key: SessionKey, changes: bool) -> Version {
        let new =
            KeyState { generation: 0, versions: 0, writers: 0, flights_started: 0, flight: None };
        let slot = shard.entry(key).or_insert(new);
        slot.versions += 1;
        slot.writers += usize::from(changes);
        Version { key, generation: slot.generation, epoch: self.epoch(), leads: None, changes }
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

    const KEY: i128 = 1;

    fn key() -> SessionKey {
        SessionKey::of(KEY)
    }

    fn board(
        freshness: &VersionTable<u32>,
        look: impl FnOnce() -> Option<()>,
        depart: impl FnOnce() -> u32,
    ) -> Flight<(), Version, u32> {
        freshness.join_or_lead(key(), Clock::system().now(), |_| true, look, depart)
    }

    #[test]
    fn the_first_to_finish_is_current_and_those_who_overlapped_it_are_not() {
        let freshness = VersionTable::<()>::new();
        let (a, b, c) = (
            freshness.take_version(key(), true),
            freshness.take_version(key(), true),
            freshness.take_version(key(), true),
        );
        assert!(freshness.finish(b, |current| current));
        assert!(!freshness.finish(a, |current| current));
        let d = freshness.take_version(key(), true);
        assert!(!freshness.finish(c, |current| current));
        assert!(!freshness.finish(d, |current| current), "c finished while d was under way");
        assert_eq!(freshness.tracked_keys(), 0);
    }

    #[test]
    fn keys_do_not_disturb_each_other() {
        let freshness = VersionTable::<()>::new();
        let (a, b) =
            (freshness.take_version(key(), true), freshness.take_version(SessionKey::of(2), true));
        assert!(freshness.finish(a, |current| current));
        assert!(freshness.finish(b, |current| current));
    }

    #[test]
    fn a_change_from_elsewhere_voids_the_stamps_of_its_key() {
        let freshness = VersionTable::<()>::new();
        let (a, other) =
            (freshness.take_version(key(), true), freshness.take_version(SessionKey::of(2), true));
        freshness.invalidate(key(), || ());
        assert!(!freshness.finish(a, |current| current));
        assert!(freshness.finish(other, |current| current));
    }

    #[test]
    fn a_void_of_all_ends_the_epoch_and_every_stamp() {
        let freshness = VersionTable::<()>::new();
        let (epoch, stamp) = (freshness.epoch(), freshness.take_version(key(), true));
        freshness.invalidate_all(|| ());
        assert_ne!(freshness.epoch(), epoch);
        assert!(!freshness.finish(stamp, |current| current));
    }

    #[test]
    fn a_flight_is_shared_until_something_finishes() {
        let freshness = VersionTable::new();
        let nothing = || None::<()>;
        let Flight::Lead(first, _) = board(&freshness, nothing, || 1) else { panic!() };
        assert!(matches!(board(&freshness, nothing, || 2), Flight::Join(1)));
        freshness.invalidate(key(), || ());
        let Flight::Lead(second, _) = board(&freshness, nothing, || 3) else { panic!() };
        assert!(matches!(board(&freshness, nothing, || 4), Flight::Join(3)));
        assert!(!freshness.finish(first, |current| current));
        assert!(matches!(board(&freshness, || Some(()), || 5), Flight::Found(())));
        assert!(!freshness.finish(second, |current| current), "the first one's end came first");
        assert_eq!(freshness.tracked_keys(), 0);
    }

    #[test]
    fn a_release_changes_nothing_but_ends_its_own_flight() {
        let freshness = VersionTable::new();
        let write = freshness.take_version(key(), true);
        let Flight::Lead(first, _) = board(&freshness, || None, || 1) else { panic!() };
        freshness.release(first);
        let Flight::Lead(second, 2) = board(&freshness, || None, || 2) else { panic!() };
        let now = Clock::system().now();
        let boarded = freshness.join_or_lead(key(), now, |_| false, || None::<()>, || 3);
        let Flight::Lead(third, 3) = boarded else { panic!() };
        freshness.release(second);
        assert!(matches!(board(&freshness, || None, || 4), Flight::Join(3)));
        assert!(freshness.finish(write, |current| current), "nothing was learned meanwhile");
        freshness.release(third);
        assert_eq!(freshness.tracked_keys(), 0);
    }

    #[test]
    fn a_write_that_was_seen_in_the_database_is_current_until_something_else_changes() {
        for foreign_change_after in [false, true] {
            let freshness = VersionTable::<()>::new();
            let (mut write, load) =
                (freshness.take_version(key(), true), freshness.take_version(key(), true));
            let landed = freshness.invalidate(key(), || ());
            if foreign_change_after {
                freshness.invalidate(key(), || ());
            }
            write.advance_to(landed);
            assert_eq!(freshness.finish(write, |current| current), !foreign_change_after);
            assert!(!freshness.finish(load, |current| current));
        }
    }

    #[test]
    fn a_flight_of_an_ended_epoch_is_not_shared() {
        let freshness = VersionTable::new();
        let Flight::Lead(first, _) = board(&freshness, || None::<()>, || 1) else { panic!() };
        freshness.invalidate_all(|| ());
        let Flight::Lead(second, _) = board(&freshness, || None::<()>, || 2) else { panic!() };
        freshness.finish(first, |_| ());
        freshness.finish(second, |_| ());
        assert_eq!(freshness.tracked_keys(), 0);
    }

    #[test]
    fn a_flight_that_is_too_old_is_not_shared() {
        let freshness = VersionTable::new();
        let now = Clock::system().now();
        let Flight::Lead(first, _) = board(&freshness, || None, || 1) else { panic!() };
        let boarded = freshness.join_or_lead(key(), now, |_| false, || None::<()>, || 2);
        let Flight::Lead(second, 2) = boarded else { panic!() };
        assert!(matches!(board(&freshness, || None, || 3), Flight::Join(2)));
        assert!(freshness.finish(first, |current| current));
        assert!(!freshness.finish(second, |current| current));
        assert_eq!(freshness.tracked_keys(), 0);
    }
}
