//! The memory tier: a moka cache whose entries follow the rules of [`coherence`].
//!
//! A hit takes no lock of this crate. Inserting or removing an entry takes its key's lock in
//! [`VersionTable`]. Only this file uses moka's types.
//!
//! The life of an entry, in the order of this file:
//!
//! 1. [`Cache::get`] misses, and [`Cache::fill`] has one load read the session for all that wait.
//! 2. The read, or a write that took a [`FillGuard`] with [`Cache::begin`], inserts the entry
//!    (`fill_guard`).
//! 3. [`Cache::get`] serves the entry while its [`Lease`] lasts. [`Cache::renew`] extends the lease.
//! 4. A write of this store, a reported change ([`Cache::apply_change`]), or [`Cache::clear`] invalidates
//!    the entry. Otherwise moka evicts it, or [`Cache::run_sweeper`] removes it after it has expired.

mod capacity;
pub(crate) mod coherence;
pub(crate) mod compact;
mod config;
mod entry;
mod expiry_sweeper;
mod fill_guard;
mod grace;
mod idle_fill;
mod stats;
mod wall_clock;
mod weight;

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;

use crate::availability::Availability;
use crate::cache::capacity::{Capacity, Usage};
use crate::cache::coherence::lease::Lease;
pub(crate) use crate::cache::coherence::own_writes::ChangeOrigin;
use crate::cache::coherence::own_writes::OwnWrites;
use crate::cache::coherence::versions::{Effect, Flight, VersionTable};
pub(crate) use crate::cache::config::CacheConfig;
pub use crate::cache::config::{Coherence, EvictionPolicy};
pub(crate) use crate::cache::entry::Entry;
pub(crate) use crate::cache::fill_guard::{FillGuard, Leader};
use crate::cache::grace::OutageGrace;
pub(crate) use crate::cache::idle_fill::{IdleFill, NoRoom};
pub(crate) use crate::cache::stats::CacheStats;
use crate::cache::wall_clock::WallClock;
use crate::error::{Error, Result};
use crate::session::id::{KeyHashing, SessionKey};
use crate::session::revision::{Change, Rev};
use crate::sync::moka::{self, notification::RemovalCause};
use crate::sync::{AtomicU64, Ordering};
use crate::telemetry::metrics::{CacheMetrics, Eviction, Invalidation, Series};
use crate::time::{Clock, Moment};

/// Bounds the time to live of absent ids: moka panics if it is above 1,000 years.
const A_CENTURY: Duration = Duration::from_secs(100 * 365 * 24 * 60 * 60);

/// The cache. Clones share it.
#[derive(Clone, Debug)]
pub(crate) struct Cache(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    sessions: moka::sync::Cache<SessionKey, Entry, KeyHashing>,
    /// Apart from the sessions, so that a flood of invented ids evicts no session.
    absent: moka::sync::Cache<SessionKey, Absent, KeyHashing>,
    capacity: Capacity,
    usage: Usage,
    versions: VersionTable<Waiter>,
    own_writes: OwnWrites,
    lease: Lease,
    /// A lease that is never renewed, for absences and for reads in flight. The stream does not report
    /// inserts, so it does not show that an id is still absent.
    read_lease: Lease,
    /// How many calls of `clear` are in progress. An atomic, since it is not changed together with
    /// anything else.
    clears: AtomicU64,
    availability: Availability,
    grace: OutageGrace,
    compact: bool,
    clock: Clock,
    wall: WallClock,
    metrics: CacheMetrics,
}

/// Remembers that the database has no session for an id. Nothing renews it: it is as old as the read
/// that found no session.
#[derive(Clone, Copy, Debug)]
struct Absent {
    epoch: u64,
    read_at: Moment,
}

/// What the cache knows of a key.
#[derive(Debug)]
pub(crate) enum Lookup {
    Hit(Entry),
    Absent,
    Miss,
    /// An entry that is older than its lease permits.
    Expired,
    /// Such an entry, which the outage grace permits while the database does not answer.
    Grace(Entry),
}

/// The result of a read that loads share. `None` until the read has ended.
type Answer = Option<Result<Option<Entry>>>;
type Waiter = watch::Receiver<Answer>;

impl Cache {
    pub(crate) fn new(
        config: &CacheConfig,
        clock: Clock,
        availability: Availability,
        series: &Series,
    ) -> Self {
        let metrics = CacheMetrics::new(series);
        let has_bound = config.coherence != Coherence::SoleWriter;
        let new_lease = || Lease::new(has_bound.then_some(config.max_staleness));
        metrics.set_max_staleness(new_lease().bound());
        let capacity = Capacity::of(config);
        let usage = Usage::new(&metrics, config);
        let policy = match config.policy {
            EvictionPolicy::Lru => moka::policy::EvictionPolicy::lru(),
            EvictionPolicy::TinyLfu => moka::policy::EvictionPolicy::tiny_lfu(),
        };
        let evicted_from = usage.clone();
        let evicted_by = metrics.clone();
        let sessions = moka::sync::Cache::builder()
            .max_capacity(capacity.capacity)
            .weigher(move |_: &SessionKey, entry: &Entry| capacity.weigh(entry.weight()))
            .eviction_policy(policy)
            .eviction_listener(move |_, entry: Entry, cause| {
                evicted_from.subtract(entry.weight());
                match cause {
                    RemovalCause::Size => evicted_by.count_eviction(Eviction::Size),
                    RemovalCause::Expired | RemovalCause::Explicit | RemovalCause::Replaced => {}
                }
            })
            .build_with_hasher(KeyHashing::default());
        let absent = moka::sync::Cache::builder()
            .max_capacity(config.max_absent_ids)
            .eviction_policy(moka::policy::EvictionPolicy::lru())
            .time_to_live(config.max_staleness.clamp(Duration::from_millis(1), A_CENTURY))
            .build_with_hasher(KeyHashing::default());
        Self(Arc::new(Shared {
            sessions,
            absent,
            capacity,
            usage,
            versions: VersionTable::new(),
            own_writes: OwnWrites::default(),
            lease: new_lease(),
            read_lease: new_lease(),
            clears: AtomicU64::new(0),
            grace: OutageGrace::new(config.outage_grace, availability.clone()),
            availability,
            compact: config.compact,
            clock,
            wall: WallClock::default(),
            metrics,
        }))
    }

    /// Looks a key up for a load, and counts how the load was answered.
    pub(crate) fn get(&self, key: SessionKey) -> Lookup {
        let found = self.look_up(key);
        match &found {
            Lookup::Hit(_) => self.0.metrics.hits.increment(1),
            Lookup::Absent => self.0.metrics.count_absent(),
            Lookup::Grace(_) => self.0.metrics.count_grace(),
            // `fill` counts these.
            Lookup::Expired | Lookup::Miss => {}
        }
        found
    }

    /// The entry that a load would be served now. Not counted as a load.
    pub(crate) fn peek(&self, key: SessionKey) -> Option<Entry> {
        match self.look_up(key) {
            Lookup::Hit(entry) => Some(entry),
            _ => None,
        }
    }

    fn look_up(&self, key: SessionKey) -> Lookup {
        let shared = &self.0;
        let epoch = shared.versions.epoch();
        let lease = shared.lease.snapshot();
        // Read before the look-up, for two reasons: the load is answered as of the moment at which it
        // asked, and reading the clock makes the processor wait for all instructions before it.
        let now = shared.clock.now();
        if let Some(entry) = shared.sessions.get(&key) {
            let times = *entry.times();
            // An expired entry is a miss, not an absence: another instance may have extended the
            // session by a touch, which the stream does not report.
            if times.epoch != epoch || shared.wall.is_past(entry.expires(), now) {
                return Lookup::Miss;
            }
            if lease.permits(times.read_at, now) {
                return Lookup::Hit(entry);
            }
            let grace = shared.grace.current();
            if grace.is_some_and(|grace| lease.permits_with_grace(grace, times.read_at, now)) {
                return Lookup::Grace(entry);
            }
            return Lookup::Expired;
        }
        let lease = shared.read_lease.snapshot();
        match shared.absent.get(&key) {
            Some(absent) if absent.epoch == epoch && lease.permits(absent.read_at, now) => {
                Lookup::Absent
            }
            _ => Lookup::Miss,
        }
    }

    /// Returns the session of `key` by a read that concurrent loads share (single flight).
    ///
    /// If this load leads, it calls `read`, which starts the read without waiting for it. `read` gets
    /// how long the load has waited by then. The read runs to completion even if this future is dropped.
    pub(crate) async fn fill(
        &self,
        key: SessionKey,
        read: impl FnOnce(Leader, Duration),
    ) -> Result<Option<Entry>> {
        let clock = &self.0.clock;
        let mut load = self.0.metrics.begin_load();
        let began_on_wall = clock.wall();
        let began_at = clock.now();
        let mut read = Some(read);
        let mut may_join = true;
        loop {
            let mut has_expired_entry = false;
            let (mut waiter, has_joined) =
                match self.join_or_lead(key, may_join, &mut has_expired_entry) {
                    Flight::Found(found) => {
                        load.record_found(found.is_some());
                        return Ok(found);
                    }
                    Flight::Join(waiter) => {
                        load.record_joined();
                        (waiter, true)
                    }
                    Flight::Lead(leader, waiter) => {
                        load.record_missed(has_expired_entry);
                        if let Some(read) = read.take() {
                            read(leader, clock.now().since(began_at));
                        }
                        (waiter, false)
                    }
                };
            let answer = waiter.wait_for(Option::is_some).await.ok().and_then(|it| it.clone());
            return match answer.unwrap_or_else(|| Err(Error::cut_off())) {
                // Another load read this session before it expired, and this load began after that. The
                // session may have been extended in between, so read it once more.
                Ok(Some(entry)) if has_joined && entry.expires() <= began_on_wall => {
                    may_join = false;
                    continue;
                }
                Err(error) if error.is_outage() => match self.look_up(key) {
                    Lookup::Grace(entry) => {
                        load.record_grace();
                        Ok(Some(entry))
                    }
                    _ => Err(error),
                },
                answer => answer,
            };
        }
    }

    /// Starts a read of `key` in an outage, to find out whether the database answers again. Does
    /// nothing while another such read is in progress.
    pub(crate) fn probe(&self, key: SessionKey, read: impl FnOnce(Leader)) {
        let Some(probe) = self.0.grace.begin_probe() else { return };
        if let Flight::Lead(leader, _) = self.join_or_lead(key, true, &mut false) {
            read(leader.with_probe(probe));
        }
    }

    /// Sets `has_expired_entry` if the cache has an entry that is too old.
    fn join_or_lead(
        &self,
        key: SessionKey,
        may_join: bool,
        has_expired_entry: &mut bool,
    ) -> Flight<Option<Entry>, Leader, Waiter> {
        let shared = &self.0;
        let now = shared.clock.now();
        let is_fresh =
            |started_at| may_join && shared.read_lease.snapshot().permits(started_at, now);
        let look_up = || match self.look_up(key) {
            Lookup::Hit(entry) => Some(Some(entry)),
            Lookup::Absent => Some(None),
            Lookup::Miss => None,
            Lookup::Expired | Lookup::Grace(_) => {
                *has_expired_entry = true;
                None
            }
        };
        let (result, waiter) = watch::channel(None);
        match shared.versions.join_or_lead(key, now, is_fresh, look_up, || waiter) {
            Flight::Found(found) => Flight::Found(found),
            Flight::Join(waiter) => Flight::Join(waiter),
            Flight::Lead(version, waiter) => {
                Flight::Lead(Leader::new(self.fill_guard(version, now), result), waiter)
            }
        }
    }

    /// Begins an operation that may change or remove the session's data.
    pub(crate) fn begin(&self, key: SessionKey) -> FillGuard {
        let now = self.0.clock.now();
        self.fill_guard(self.0.versions.take_version(key, Effect::MayChangeData), now)
    }

    /// Begins a write that the change stream will report as `rev`.
    pub(crate) fn begin_write(&self, key: SessionKey, rev: Rev) -> FillGuard {
        let guard = self.begin(key);
        if let Some(generation) = guard.generation() {
            self.0.own_writes.record_sent(rev, generation);
        }
        guard.with_rev(rev)
    }

    /// Begins an operation that changes no more than the session's expiry.
    pub(crate) fn begin_touch(&self, key: SessionKey) -> FillGuard {
        let now = self.0.clock.now();
        self.fill_guard(self.0.versions.take_version(key, Effect::KeepsData), now)
    }

    /// Counts a touch that was left out, because the stored expiry is late enough.
    pub(crate) fn count_skipped_touch(&self) {
        self.0.metrics.touches_skipped.increment(1);
    }

    /// Whether an operation of this instance may still change the session's data.
    pub(crate) fn has_pending_write(&self, key: SessionKey) -> bool {
        self.0.versions.has_pending_write(key)
    }

    /// Invalidates a key after a write whose outcome is unknown.
    pub(crate) fn evict(&self, key: SessionKey) {
        self.0.versions.invalidate(key, || self.0.remove(key, Invalidation::UnknownOutcome));
    }

    /// Invalidates each key that has a pending write.
    ///
    /// Call it after MongoDB was asked which sessions match a filter. A pending write may have changed a
    /// session already so that the filter no longer matches it, while the cache still has the state from
    /// before.
    pub(crate) fn evict_pending_writes(&self) {
        if self.0.clears.load(Ordering::Acquire) > 0 {
            // The pending `clear` may have removed any session.
            return self.clear();
        }
        self.0
            .versions
            .invalidate_pending_writes(|key| self.0.remove(key, Invalidation::UnknownOutcome));
    }

    /// Begins to clear the database. The cache is emptied when the guard is dropped, however the call
    /// ends.
    pub(crate) fn begin_clear(&self) -> ClearGuard {
        self.0.clears.fetch_add(1, Ordering::AcqRel);
        ClearGuard(self.clone())
    }

    /// Applies a change that the change stream reports.
    pub(crate) fn apply_change(&self, change: &Change) -> ChangeOrigin {
        let shared = &self.0;
        let key = change.key;
        shared.own_writes.record_seen(change.rev, |cause| {
            shared.versions.invalidate(key, || shared.remove(key, cause))
        })
    }

    /// Records that [`apply_change`](Self::apply_change) got every change that the database made before
    /// `at`.
    pub(crate) fn renew(&self, at: Moment) {
        self.0.lease.renew(at);
    }

    /// The latest moment before which the database made no change that was not applied.
    pub(crate) fn synced_through(&self) -> Moment {
        self.0.lease.synced_through()
    }

    /// Empties the cache because changes may have been lost. `listening` says whether the change stream
    /// reports the later ones.
    pub(crate) fn reset(&self, listening: bool) {
        self.0.own_writes.reset(listening);
        self.clear();
    }

    /// Counts an invalidation of the whole cache.
    pub(crate) fn count_invalidation(&self, cause: Invalidation) {
        self.0.metrics.count_invalidation(cause);
    }

    /// Whether MongoDB answers, which decides about the grace.
    pub(crate) fn availability(&self) -> &Availability {
        &self.0.availability
    }

    /// Empties the cache and makes all versions outdated. The store can still be used.
    pub(crate) fn clear(&self) {
        let shared = &self.0;
        shared.versions.invalidate_all(|| {
            shared.sessions.invalidate_all();
            shared.absent.invalidate_all();
        });
        shared.sessions.run_pending_tasks();
        shared.absent.run_pending_tasks();
    }

    /// Empties the cache and frees the memory of every entry, for a store that is not used any longer.
    pub(crate) fn purge(&self) {
        self.clear();
        // One run of moka's tasks frees a part of the entries only.
        let mut left = self.0.usage.totals().0;
        while left > 0 {
            self.0.sessions.run_pending_tasks();
            let now = self.0.usage.totals().0;
            if now >= left {
                return;
            }
            left = now;
        }
    }

    #[cfg(test)]
    pub(crate) fn tracked_keys(&self) -> usize {
        self.0.versions.tracked_keys()
    }

    #[cfg(test)]
    pub(crate) fn own_writes(&self) -> usize {
        self.0.own_writes.len()
    }

    /// The number of sessions and of absent ids.
    #[cfg(test)]
    pub(crate) fn entries(&self) -> (u64, u64) {
        self.0.sessions.run_pending_tasks();
        self.0.absent.run_pending_tasks();
        (self.0.sessions.entry_count(), self.0.absent.entry_count())
    }
}

impl Shared {
    /// Removes what is cached for a key. Call it under the key's lock.
    fn remove(&self, key: SessionKey, cause: Invalidation) {
        self.absent.invalidate(&key);
        if self.sessions.remove(&key).is_some() {
            self.metrics.count_invalidation(cause);
        }
    }
}

/// A call of `clear` in progress. Empties the cache when it is dropped.
#[derive(Debug)]
pub(crate) struct ClearGuard(Cache);

impl Drop for ClearGuard {
    fn drop(&mut self) {
        self.0.clear();
        self.0.count_invalidation(Invalidation::Clear);
        // Last, so that a sign-out which no longer finds the sessions that this call has removed still
        // sees the call as pending.
        self.0.0.clears.fetch_sub(1, Ordering::Release);
    }
}
