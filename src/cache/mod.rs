//! The memory tier: a moka cache whose entries are placed under the rules of [`freshness`].
//!
//! This is the only file that names moka. Reads take no lock of ours; whatever leaves or removes an
//! entry does so under its key's lock in [`VersionTable`].

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

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;

use crate::availability::Availability;
use crate::cache::capacity::{Capacity, Usage};
use crate::cache::coherence::lease::Lease;
pub(crate) use crate::cache::coherence::own_writes::ChangeOrigin;
use crate::cache::coherence::own_writes::OwnWrites;
use crate::cache::coherence::versions::{Flight, VersionTable};
pub(crate) use crate::cache::config::CacheConfig;
pub use crate::cache::config::EvictionPolicy;
pub(crate) use crate::cache::entry::Entry;
pub(crate) use crate::cache::fill_guard::{FillGuard, Leader};
use crate::cache::grace::OutageGrace;
pub(crate) use crate::cache::idle_fill::{IdleFill, NoRoom};
pub(crate) use crate::cache::stats::CacheStats;
use crate::cache::wall_clock::WallClock;
use crate::error::{Error, Result};
use crate::invalidation::source::Change;
use crate::session::id::{KeyHashing, SessionKey};
use crate::session::revision::Rev;
use crate::sync::moka::{self, notification::RemovalCause};
use crate::sync::{AtomicU64, Ordering};
use crate::telemetry::metrics::{CacheMetrics, Eviction, Invalidation, Series};
use crate::time::{Clock, Moment};

/// The cache. Clones share it.
#[derive(Clone, Debug)]
pub(crate) struct Cache(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    sessions: moka::sync::Cache<SessionKey, Entry, KeyHashing>,
    absent: moka::sync::Cache<SessionKey, Absent, KeyHashing>,
    capacity: Capacity,
    usage: Usage,
    versions: VersionTable<Waiter>,
    own_writes: OwnWrites,
    lease: Lease,
    /// Never renewed: insertions are not reported, so nothing vouches for an absence, nor for a read
    /// under way that may bring one.
    lease_of_reads: Lease,
    /// How many calls of `clear` are under way. An atomic, since nothing else changes with it.
    clears: AtomicU64,
    availability: Availability,
    grace: OutageGrace,
    compact: bool,
    clock: Clock,
    wall: WallClock,
    metrics: CacheMetrics,
}

/// An id that the database does not know. Not renewed by anything: it holds for the time that an
/// entry of the same age would.
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
    /// There, and past its lease.
    Expired,
    /// Past its lease, within the grace, and the database does not answer.
    Grace(Entry),
}

/// The answer of a read that several loads wait for, once it is there.
type Answer = Option<Result<Option<Entry>>>;
type Waiter = watch::Receiver<Answer>;

impl Cache {
    pub(crate) fn new(
        limits: &CacheConfig,
        clock: Clock,
        availability: Availability,
        series: &Series,
    ) -> Self {
        let metrics = CacheMetrics::new(series);
        let lease = || Lease::new((!limits.exclusive).then_some(limits.max_staleness));
        metrics.set_max_staleness(lease().bound());
        let (bound, account) = (Capacity::of(limits), Usage::new(&metrics, limits));
        let policy = match limits.policy {
            EvictionPolicy::Lru => moka::policy::EvictionPolicy::lru(),
            EvictionPolicy::TinyLfu => moka::policy::EvictionPolicy::tiny_lfu(),
        };
        let (counted, causes) = (account.clone(), metrics.clone());
        let sessions = moka::sync::Cache::builder()
            .max_capacity(bound.capacity)
            .weigher(move |_: &SessionKey, entry: &Entry| bound.weigh(entry.weight()))
            .eviction_policy(policy)
            .eviction_listener(move |_, entry: Entry, cause| {
                counted.subtract(entry.weight());
                match cause {
                    RemovalCause::Size => causes.count_eviction(Eviction::Size),
                    RemovalCause::Expired | RemovalCause::Explicit | RemovalCause::Replaced => {}
                }
            })
            .build_with_hasher(KeyHashing::default());
        let absent = moka::sync::Cache::builder()
            .max_capacity(limits.max_absent_ids)
            .eviction_policy(moka::policy::EvictionPolicy::lru())
            .time_to_live(limits.max_staleness.clamp(Duration::from_millis(1), A_CENTURY))
            .build_with_hasher(KeyHashing::default());
        Self(Arc::new(Shared {
            sessions,
            absent,
            capacity: bound,
            usage: account,
            versions: VersionTable::new(),
            own_writes: OwnWrites::default(),
            lease: lease(),
            lease_of_reads: lease(),
            clears: AtomicU64::new(0),
            grace: OutageGrace::new(limits.outage_grace, availability.clone()),
            availability,
            compact: limits.compact,
            clock,
            wall: WallClock::default(),
            metrics,
        }))
    }

    /// What may be answered for `key` now without asking the database.
    pub(crate) fn get(&self, key: SessionKey) -> Lookup {
        let found = self.look(key);
        match &found {
            Lookup::Hit(_) => self.0.metrics.hits.increment(1),
            Lookup::Absent => self.0.metrics.count_absent(),
            Lookup::Grace(_) => self.0.metrics.count_grace(),
            // Counted where it is filled.
            Lookup::Expired | Lookup::Miss => {}
        }
        found
    }

    /// The session of `key`, by one read that all who ask for it meanwhile share. `read` starts it
    /// and must not wait for it; it is told how long the caller has waited by then. Nobody's
    /// cancellation ends it.
    pub(crate) async fn fill(
        &self,
        key: SessionKey,
        read: impl FnOnce(Leader, Duration),
    ) -> Result<Option<Entry>> {
        let (mut load, clock) = (self.0.metrics.begin_load(), &self.0.clock);
        let (began, began_at, mut read) = (clock.wall(), clock.now(), Some(read));
        let mut may_join = true;
        loop {
            let mut lapsed = false;
            let (mut flight, joined) = match self.join_or_lead(key, may_join, &mut lapsed) {
                Flight::Found(found) => {
                    load.found(found.is_some());
                    return Ok(found);
                }
                Flight::Join(flight) => {
                    load.joined();
                    (flight, true)
                }
                Flight::Lead(landing, flight) => {
                    load.missed(lapsed);
                    if let Some(read) = read.take() {
                        read(landing, clock.now().since(began_at));
                    }
                    (flight, false)
                }
            };
            let landed = flight.wait_for(Option::is_some).await;
            let answer = landed.ok().and_then(|outcome| outcome.clone());
            return match answer.unwrap_or_else(|| Err(Error::cut_off())) {
                // Read before it expired, and asked for after: it may have been prolonged between,
                // so it is read once more, within the same deadline.
                Ok(Some(entry)) if joined && entry.expires() <= began => {
                    may_join = false;
                    continue;
                }
                Err(error) if error.is_outage() => match self.look(key) {
                    Lookup::Grace(entry) => {
                        load.served_in_grace();
                        Ok(Some(entry))
                    }
                    _ => Err(error),
                },
                answer => answer,
            };
        }
    }

    /// In an outage: starts a read of `key`, whether the database answers again, unless somebody
    /// else's is under way.
    pub(crate) fn probe(&self, key: SessionKey, read: impl FnOnce(Leader)) {
        let Some(probe) = self.0.grace.begin_probe() else { return };
        if let Flight::Lead(landing, _) = self.join_or_lead(key, true, &mut false) {
            read(landing.with_probe(probe));
        }
    }

    /// `lapsed` becomes true if there is an entry that is too old.
    fn join_or_lead(
        &self,
        key: SessionKey,
        may_join: bool,
        lapsed: &mut bool,
    ) -> Flight<Option<Entry>, Leader, Waiter> {
        let (shared, now) = (&self.0, self.0.clock.now());
        let fresh = |departed| may_join && shared.lease_of_reads.snapshot().permits(departed, now);
        let look = || match self.look(key) {
            Lookup::Hit(entry) => Some(Some(entry)),
            Lookup::Absent => Some(None),
            Lookup::Miss => None,
            Lookup::Expired | Lookup::Grace(_) => {
                *lapsed = true;
                None
            }
        };
        let (lands, flight) = watch::channel(None);
        match shared.versions.join_or_lead(key, now, fresh, look, || flight) {
            Flight::Found(found) => Flight::Found(found),
            Flight::Join(flight) => Flight::Join(flight),
            Flight::Lead(stamp, flight) => {
                Flight::Lead(Leader::new(self.fill_guard(stamp, now), lands), flight)
            }
        }
    }

    /// A ticket for an operation that is about to begin.
    pub(crate) fn begin(&self, key: SessionKey) -> FillGuard {
        let now = self.0.clock.now();
        self.fill_guard(self.0.versions.take_version(key, true), now)
    }

    /// A ticket for an operation that changes no more than the session's expiry.
    pub(crate) fn begin_touch(&self, key: SessionKey) -> FillGuard {
        let now = self.0.clock.now();
        self.fill_guard(self.0.versions.take_version(key, false), now)
    }

    /// Whether no operation that may change the session's data is under way here.
    pub(crate) fn is_settled(&self, key: SessionKey) -> bool {
        self.0.versions.is_settled(key)
    }

    /// What a load would be served now. Counts as no load.
    pub(crate) fn peek(&self, key: SessionKey) -> Option<Entry> {
        match self.look(key) {
            Lookup::Hit(entry) => Some(entry),
            _ => None,
        }
    }

    /// A touch was not sent, since it was not worth it.
    pub(crate) fn count_skipped_touch(&self) {
        self.0.metrics.touches_skipped.increment(1);
    }

    /// A ticket for a write that is about to begin, and that the database will report as `rev`.
    pub(crate) fn begin_write(&self, key: SessionKey, rev: Rev) -> FillGuard {
        let ticket = self.begin(key);
        if let Some(generation) = ticket.generation() {
            self.0.own_writes.record_sent(rev, generation);
        }
        ticket.with_rev(rev)
    }

    /// Removes an entry and voids the tickets of its key: it changed in a way not known here.
    pub(crate) fn evict(&self, key: SessionKey) {
        self.0.versions.invalidate(key, || self.0.remove(key, Invalidation::UnknownOutcome));
    }

    /// Forgets each session that a write from here may have changed already, though its answer is not here
    /// yet: what is cached may be from before that write. To be called after MongoDB was asked which
    /// sessions a filter finds: it does not find those, and says nothing about them.
    pub(crate) fn evict_pending_writes(&self) {
        if self.0.clears.load(Ordering::Acquire) > 0 {
            // It may have removed any session.
            return self.clear();
        }
        self.0
            .versions
            .invalidate_pending_writes(|key| self.0.remove(key, Invalidation::UnknownOutcome));
    }

    /// To be called before the database is cleared. The cache is emptied when the guard is dropped, however
    /// the call ends.
    pub(crate) fn begin_clear(&self) -> Clearing {
        self.0.clears.fetch_add(1, Ordering::AcqRel);
        Clearing(self.clone())
    }

    /// Takes a change that the database reports.
    pub(crate) fn apply_change(&self, change: &Change) -> ChangeOrigin {
        let (shared, key) = (&self.0, change.key);
        shared.own_writes.record_seen(change.rev, |cause| {
            shared.versions.invalidate(key, || shared.remove(key, cause))
        })
    }

    /// Begins anew, with nothing: what the database reported may have been lost. `follows` says
    /// whether reports come from now on.
    pub(crate) fn reset(&self, follows: bool) {
        self.0.own_writes.reset(follows);
        self.clear();
    }

    /// Every change that the database made before `at` has been [heard](Self::hear).
    pub(crate) fn renew(&self, at: Moment) {
        self.0.lease.renew(at);
    }

    /// The latest moment up to which every change has been heard.
    pub(crate) fn synced_through(&self) -> Moment {
        self.0.lease.synced_through()
    }

    /// Whether MongoDB answers, which decides about the grace.
    pub(crate) fn availability(&self) -> &Availability {
        &self.0.availability
    }

    /// Counts that the cache was emptied.
    pub(crate) fn count_invalidation(&self, cause: Invalidation) {
        self.0.metrics.count_invalidation(cause);
    }

    /// Empties the cache and voids every ticket.
    pub(crate) fn clear(&self) {
        let shared = &self.0;
        shared.versions.invalidate_all(|| {
            shared.sessions.invalidate_all();
            shared.absent.invalidate_all();
        });
        shared.sessions.run_pending_tasks();
        shared.absent.run_pending_tasks();
    }

    #[cfg(test)]
    pub(crate) fn tracked_keys(&self) -> usize {
        self.0.versions.tracked_keys()
    }

    #[cfg(test)]
    pub(crate) fn own_writes(&self) -> usize {
        self.0.own_writes.len()
    }

    /// How many sessions and how many absent ids are held.
    #[cfg(test)]
    pub(crate) fn entries(&self) -> (u64, u64) {
        self.0.sessions.run_pending_tasks();
        self.0.absent.run_pending_tasks();
        (self.0.sessions.entry_count(), self.0.absent.entry_count())
    }

    fn look(&self, key: SessionKey) -> Lookup {
        let shared = &self.0;
        let (epoch, lease) = (shared.versions.epoch(), shared.lease.snapshot());
        // Before the look-up: a load is to be answered as of when it asked, and a processor waits at a
        // reading of the clock for all that it has begun.
        let now = shared.clock.now();
        if let Some(entry) = shared.sessions.get(&key) {
            let times = *entry.times();
            // An entry past its expiry is a miss and no answer: another instance may have
            // prolonged the session, of which nobody tells us.
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
        let lease = shared.lease_of_reads.snapshot();
        match shared.absent.get(&key) {
            Some(absent) if absent.epoch == epoch && lease.permits(absent.read_at, now) => {
                Lookup::Absent
            }
            _ => Lookup::Miss,
        }
    }
}

/// A `clear` of the database that is under way.
#[derive(Debug)]
pub(crate) struct Clearing(Cache);

impl Drop for Clearing {
    fn drop(&mut self) {
        self.0.clear();
        self.0.count_invalidation(Invalidation::Clear);
        // Not earlier: a sign-out that does not find what this has removed must know of it.
        self.0.0.clears.fetch_sub(1, Ordering::Release);
    }
}

impl Shared {
    fn remove(&self, key: SessionKey, cause: Invalidation) {
        self.absent.invalidate(&key);
        if self.sessions.remove(&key).is_some() {
            self.metrics.count_invalidation(cause);
        }
    }
}

/// Longer than anything is kept; keeps times far from the ends of their types.
const A_CENTURY: Duration = Duration::from_secs(100 * 365 * 24 * 60 * 60);
