//! The memory tier: a moka cache whose entries are placed under the rules of [`freshness`].
//!
//! This is the only file that names moka. Reads take no lock of ours; whatever leaves or removes an
//! entry does so under its key's lock in [`Freshness`].

mod bounds;
mod echoes;
mod ended;
mod entry;
mod expiry;
pub(crate) mod freshness;
mod lease;
mod limits;
mod outage;
mod packed;
mod standing;
mod ticket;
mod warming;

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;

use self::bounds::{Account, Bound};
use self::echoes::Echoes;
pub(crate) use self::echoes::Report;
pub(crate) use self::entry::Entry;
use self::expiry::WallClock;
use self::freshness::{Boarding, Freshness};
use self::lease::Lease;
pub use self::limits::EvictionPolicy;
pub(crate) use self::limits::Limits;
use self::outage::{Outage, State};
#[cfg(any(test, fuzzing, feature = "internals"))]
pub(crate) use self::packed::pack;
#[cfg(any(test, fuzzing))]
pub(crate) use self::packed::unpack;
pub(crate) use self::standing::Standing;
pub(crate) use self::ticket::{Landing, Ticket};
pub(crate) use self::warming::{NoRoom, Offer};
use crate::backend::{Change, Rev};
use crate::clock::{Clock, Moment};
use crate::error::{Error, Result};
use crate::key::{KeyHashing, SessionKey};
use crate::metrics::{CacheMetrics, Eviction, Series, Void};
use crate::sync::moka::{self, notification::RemovalCause};
use crate::sync::{AtomicU64, Ordering};

/// The cache. Clones share it.
#[derive(Clone, Debug)]
pub(crate) struct Cache(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    sessions: moka::sync::Cache<SessionKey, Entry, KeyHashing>,
    absent: moka::sync::Cache<SessionKey, Absent, KeyHashing>,
    bound: Bound,
    account: Account,
    freshness: Freshness<Flight>,
    echoes: Echoes,
    lease: Lease,
    /// Never renewed: insertions are not reported, so nothing vouches for an absence, nor for a read
    /// under way that may bring one.
    lease_of_reads: Lease,
    /// How many calls of `clear` are under way. An atomic, since nothing else changes with it.
    clears: AtomicU64,
    outage: Outage,
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
    Lapsed,
    /// Past its lease, within the grace, and the database does not answer.
    Grace(Entry),
}

/// The answer of a read that several loads wait for, once it is there.
type Answer = Option<Result<Option<Entry>>>;
type Flight = watch::Receiver<Answer>;

impl Cache {
    pub(crate) fn new(limits: &Limits, clock: Clock, series: &Series) -> Self {
        let metrics = CacheMetrics::new(series);
        let lease = || Lease::new((!limits.exclusive).then_some(limits.max_staleness));
        metrics.max_staleness(lease().bound());
        let (bound, account) = (Bound::of(limits), Account::new(&metrics, limits));
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
                    RemovalCause::Size => causes.evicts(Eviction::Size),
                    RemovalCause::Expired | RemovalCause::Explicit | RemovalCause::Replaced => {}
                }
            })
            .build_with_hasher(KeyHashing::default());
        let absent = moka::sync::Cache::builder()
            .max_capacity(limits.max_absent)
            .eviction_policy(moka::policy::EvictionPolicy::lru())
            .time_to_live(limits.max_staleness.clamp(Duration::from_millis(1), A_CENTURY))
            .build_with_hasher(KeyHashing::default());
        Self(Arc::new(Shared {
            sessions,
            absent,
            bound,
            account,
            freshness: Freshness::new(),
            echoes: Echoes::default(),
            lease: lease(),
            lease_of_reads: lease(),
            clears: AtomicU64::new(0),
            outage: Outage::new(limits.outage_grace),
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
            Lookup::Absent => self.0.metrics.absent(),
            Lookup::Grace(_) => self.0.metrics.grace(),
            // Counted where it is filled.
            Lookup::Lapsed | Lookup::Miss => {}
        }
        found
    }

    /// The session of `key`, by one read that all who ask for it meanwhile share. `read` starts it
    /// and must not wait for it; it is told how long the caller has waited by then. Nobody's
    /// cancellation ends it.
    pub(crate) async fn fill(
        &self,
        key: SessionKey,
        read: impl FnOnce(Landing, Duration),
    ) -> Result<Option<Entry>> {
        let (mut load, clock) = (self.0.metrics.load(), &self.0.clock);
        let (began, began_at, mut read) = (clock.wall(), clock.now(), Some(read));
        let mut may_join = true;
        loop {
            let mut lapsed = false;
            let (mut flight, joined) = match self.board(key, may_join, &mut lapsed) {
                Boarding::Found(found) => {
                    load.finds(found.is_some());
                    return Ok(found);
                }
                Boarding::Follow(flight) => {
                    load.follows();
                    (flight, true)
                }
                Boarding::Lead(landing, flight) => {
                    load.reads(lapsed);
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
                        load.is_graced();
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
    pub(crate) fn probe(&self, key: SessionKey, read: impl FnOnce(Landing)) {
        let Some(probe) = self.0.outage.probe() else { return };
        if let Boarding::Lead(landing, _) = self.board(key, true, &mut false) {
            read(landing.holding(probe));
        }
    }

    /// `lapsed` becomes true if there is an entry that is too old.
    fn board(
        &self,
        key: SessionKey,
        may_join: bool,
        lapsed: &mut bool,
    ) -> Boarding<Option<Entry>, Landing, Flight> {
        let (shared, now) = (&self.0, self.0.clock.now());
        let fresh = |departed| may_join && shared.lease_of_reads.stands().holds(departed, now);
        let look = || match self.look(key) {
            Lookup::Hit(entry) => Some(Some(entry)),
            Lookup::Absent => Some(None),
            Lookup::Miss => None,
            Lookup::Lapsed | Lookup::Grace(_) => {
                *lapsed = true;
                None
            }
        };
        let (lands, flight) = watch::channel(None);
        match shared.freshness.board(key, now, fresh, look, || flight) {
            Boarding::Found(found) => Boarding::Found(found),
            Boarding::Follow(flight) => Boarding::Follow(flight),
            Boarding::Lead(stamp, flight) => {
                Boarding::Lead(Landing::new(self.ticket_of(stamp, now), lands), flight)
            }
        }
    }

    /// A ticket for an operation that is about to begin.
    pub(crate) fn ticket(&self, key: SessionKey) -> Ticket {
        let now = self.0.clock.now();
        self.ticket_of(self.0.freshness.stamp(key, true), now)
    }

    /// A ticket for an operation that changes no more than the session's expiry.
    pub(crate) fn ticket_to_touch(&self, key: SessionKey) -> Ticket {
        let now = self.0.clock.now();
        self.ticket_of(self.0.freshness.stamp(key, false), now)
    }

    /// Whether no operation that may change the session's data is under way here.
    pub(crate) fn is_settled(&self, key: SessionKey) -> bool {
        self.0.freshness.is_settled(key)
    }

    /// What a load would be served now. Counts as no load.
    pub(crate) fn peek(&self, key: SessionKey) -> Option<Entry> {
        match self.look(key) {
            Lookup::Hit(entry) => Some(entry),
            _ => None,
        }
    }

    /// A touch was not sent, since it was not worth it.
    pub(crate) fn skips_touch(&self) {
        self.0.metrics.touches_skipped.increment(1);
    }

    /// A ticket for a write that is about to begin, and that the database will report as `rev`.
    pub(crate) fn ticket_for(&self, key: SessionKey, rev: Rev) -> Ticket {
        let ticket = self.ticket(key);
        if let Some(generation) = ticket.generation() {
            self.0.echoes.sends(rev, generation);
        }
        ticket.writing(rev)
    }

    /// Removes an entry and voids the tickets of its key: it changed in a way not known here.
    pub(crate) fn forget(&self, key: SessionKey) {
        self.0.freshness.void(key, || self.0.remove(key, Void::Doubt));
    }

    /// Forgets each session that a write from here may have changed already, though its answer is not here
    /// yet: what is cached may be from before that write. To be called after MongoDB was asked which
    /// sessions a filter finds: it does not find those, and says nothing about them.
    pub(crate) fn forget_pending_writes(&self) {
        if self.0.clears.load(Ordering::Acquire) > 0 {
            // It may have removed any session.
            return self.clear();
        }
        self.0.freshness.void_pending_writes(|key| self.0.remove(key, Void::Doubt));
    }

    /// To be called before the database is cleared. The cache is emptied when the guard is dropped, however
    /// the call ends.
    pub(crate) fn begin_clear(&self) -> Clearing {
        self.0.clears.fetch_add(1, Ordering::AcqRel);
        Clearing(self.clone())
    }

    /// Takes a change that the database reports.
    pub(crate) fn hear(&self, change: &Change) -> Report {
        let (shared, key) = (&self.0, change.key);
        shared
            .echoes
            .reports(change.rev, |cause| shared.freshness.void(key, || shared.remove(key, cause)))
    }

    /// Begins anew, with nothing: what the database reported may have been lost. `follows` says
    /// whether reports come from now on.
    pub(crate) fn restart(&self, follows: bool) {
        self.0.echoes.restart(follows);
        self.clear();
    }

    /// Every change that the database made before `at` has been [heard](Self::hear).
    pub(crate) fn renew(&self, at: Moment) {
        self.0.lease.renew(at);
    }

    /// The latest moment up to which every change has been heard.
    pub(crate) fn synced_at(&self) -> Moment {
        self.0.lease.synced_at()
    }

    /// Takes note of whether the database answers. A call that was not sent tells nothing.
    pub(crate) fn note<T>(&self, outcome: &Result<T>) {
        if let Some(state) = State::after(outcome.as_ref().err()) {
            self.0.outage.note(state);
        }
    }

    /// Takes note that the primary has answered a question that is no verb.
    pub(crate) fn answers_hello(&self) {
        self.0.outage.answers_hello();
    }

    /// Counts that the cache was emptied.
    pub(crate) fn was_emptied(&self, cause: Void) {
        self.0.metrics.void(cause);
    }

    /// Empties the cache and voids every ticket.
    pub(crate) fn clear(&self) {
        let shared = &self.0;
        shared.freshness.void_all(|| {
            shared.sessions.invalidate_all();
            shared.absent.invalidate_all();
        });
        shared.sessions.run_pending_tasks();
        shared.absent.run_pending_tasks();
    }

    #[cfg(test)]
    pub(crate) fn tickets(&self) -> usize {
        self.0.freshness.slots()
    }

    #[cfg(test)]
    pub(crate) fn echoes(&self) -> usize {
        self.0.echoes.len()
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
        let (epoch, lease) = (shared.freshness.epoch(), shared.lease.stands());
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
            if lease.holds(times.read_at, now) {
                return Lookup::Hit(entry);
            }
            let grace = shared.outage.grace();
            if grace.is_some_and(|grace| lease.holds_for(grace, times.read_at, now)) {
                return Lookup::Grace(entry);
            }
            return Lookup::Lapsed;
        }
        let lease = shared.lease_of_reads.stands();
        match shared.absent.get(&key) {
            Some(absent) if absent.epoch == epoch && lease.holds(absent.read_at, now) => {
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
        self.0.was_emptied(Void::Clear);
        // Not earlier: a sign-out that does not find what this has removed must know of it.
        self.0.0.clears.fetch_sub(1, Ordering::Release);
    }
}

impl Shared {
    fn remove(&self, key: SessionKey, cause: Void) {
        self.absent.invalidate(&key);
        if self.sessions.remove(&key).is_some() {
            self.metrics.void(cause);
        }
    }
}

/// Longer than anything is kept; keeps times far from the ends of their types.
const A_CENTURY: Duration = Duration::from_secs(100 * 365 * 24 * 60 * 60);
