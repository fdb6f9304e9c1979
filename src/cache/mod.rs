//! The memory tier: a moka cache whose entries are placed under the rules of [`freshness`].
//!
//! This is the only file that names moka. Reads take no lock of ours; whatever leaves or removes an
//! entry does so under its key's lock in [`Freshness`].

mod bounds;
mod entry;
mod freshness;

use std::sync::Arc;
use std::time::{Duration, Instant};

use moka::notification::RemovalCause;
use tokio::sync::watch;

use self::bounds::{Account, Bound};
pub(crate) use self::entry::Entry;
use self::entry::Times;
use self::freshness::{Boarding, Freshness, Lease, Stamp};
use crate::clock::{Clock, Moment};
use crate::error::{Error, Result};
use crate::key::{KeyHashing, SessionKey};
use crate::metrics::CacheMetrics;
use crate::record::Session;

/// Which entry goes when the cache is full.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum EvictionPolicy {
    /// The least recently used. The default: a session that was just made is the one most likely
    /// to be asked for next.
    #[default]
    Lru,
    /// A new entry must have been asked for more often than those it would displace
    /// ([TinyLFU](https://arxiv.org/abs/1512.00727)). For loads in which few sessions get most of
    /// the requests.
    TinyLfu,
}

/// The bounds of a cache.
#[derive(Clone, Debug)]
pub(crate) struct Limits {
    pub(crate) max_bytes: u64,
    pub(crate) max_entries: Option<u64>,
    pub(crate) max_absent: u64,
    pub(crate) policy: EvictionPolicy,
    pub(crate) max_staleness: Duration,
}

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
    lease: Lease,
    clock: Clock,
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
}

/// The answer of a read that several loads wait for.
type Flight = watch::Receiver<Option<Result<Option<Entry>>>>;

impl Cache {
    pub(crate) fn new(limits: &Limits, clock: Clock) -> Self {
        let metrics = CacheMetrics::new();
        let (bound, account) = (Bound::of(limits), Account::new(&metrics, limits.max_bytes));
        let policy = match limits.policy {
            EvictionPolicy::Lru => moka::policy::EvictionPolicy::lru(),
            EvictionPolicy::TinyLfu => moka::policy::EvictionPolicy::tiny_lfu(),
        };
        let (counted, causes) = (account.clone(), metrics.clone());
        let sessions = moka::sync::Cache::builder()
            .max_capacity(bound.capacity)
            .weigher(move |_: &SessionKey, entry: &Entry| bound.weigh(entry.weight()))
            .eviction_policy(policy)
            .expire_after(AtRecordExpiry { at_most: limits.max_staleness.min(A_CENTURY) })
            .eviction_listener(move |_, entry: Entry, cause| {
                counted.subtract(entry.weight());
                match cause {
                    RemovalCause::Size => causes.evicted_for_size.increment(1),
                    RemovalCause::Expired => causes.evicted_as_expired.increment(1),
                    RemovalCause::Explicit | RemovalCause::Replaced => {}
                }
            })
            .build_with_hasher(KeyHashing::default());
        let absent = moka::sync::Cache::builder()
            .max_capacity(limits.max_absent)
            .eviction_policy(moka::policy::EvictionPolicy::lru())
            .time_to_live(limits.max_staleness.clamp(Duration::from_millis(1), A_CENTURY))
            .build_with_hasher(KeyHashing::default());
        let (freshness, lease) = (Freshness::new(), Lease::new(limits.max_staleness));
        Self(Arc::new(Shared {
            sessions,
            absent,
            bound,
            account,
            freshness,
            lease,
            clock,
            metrics,
        }))
    }

    /// What may be answered for `key` now without asking the database.
    pub(crate) fn get(&self, key: SessionKey) -> Lookup {
        let found = self.look(key);
        match &found {
            Lookup::Hit(_) => self.0.metrics.hits.increment(1),
            Lookup::Absent => self.0.metrics.absent.increment(1),
            Lookup::Miss => {}
        }
        found
    }

    /// The session of `key`, by one read that all who ask for it meanwhile share. `read` starts it
    /// and must not wait for it; nobody's cancellation ends it.
    pub(crate) async fn fill(
        &self,
        key: SessionKey,
        read: impl FnOnce(Landing),
    ) -> Result<Option<Entry>> {
        let (shared, now) = (&self.0, self.0.clock.now());
        let fresh = |departed| shared.lease.holds(departed, now);
        let look = || match self.look(key) {
            Lookup::Hit(entry) => Some(Some(entry)),
            Lookup::Absent => Some(None),
            Lookup::Miss => None,
        };
        let mut lands = None;
        let depart = || {
            let (sender, flight) = watch::channel(None);
            lands = Some(sender);
            flight
        };
        let mut flight = match shared.freshness.board(key, now, fresh, look, depart) {
            Boarding::Found(found) => {
                match &found {
                    Some(_) => shared.metrics.hits.increment(1),
                    None => shared.metrics.absent.increment(1),
                }
                return Ok(found);
            }
            Boarding::Follow(flight) => {
                shared.metrics.shared.increment(1);
                flight
            }
            Boarding::Lead(stamp, flight) => {
                shared.metrics.misses.increment(1);
                if let Some(lands) = lands {
                    read(Landing { ticket: self.ticket_of(stamp, now), lands });
                }
                flight
            }
        };
        let landed = flight.wait_for(Option::is_some).await;
        landed.ok().and_then(|outcome| outcome.clone()).unwrap_or_else(|| Err(Error::cut_off()))
    }

    /// A ticket for a write that is about to begin.
    pub(crate) fn ticket(&self, key: SessionKey) -> Ticket {
        let now = self.0.clock.now();
        self.ticket_of(self.0.freshness.stamp(key), now)
    }

    /// Removes an entry and voids the tickets of its key: it changed in a way not known here.
    pub(crate) fn forget(&self, key: SessionKey) {
        self.0.freshness.void(key, || self.0.remove(key));
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

    fn ticket_of(&self, stamp: Stamp, read_at: Moment) -> Ticket {
        Ticket { cache: self.clone(), stamp: Some(stamp), read_at }
    }

    fn look(&self, key: SessionKey) -> Lookup {
        let shared = &self.0;
        let epoch = shared.freshness.epoch();
        if let Some(entry) = shared.sessions.get(&key) {
            let now = shared.clock.now();
            let times = entry.times();
            // An entry past its expiry is a miss and no answer: another instance may have
            // prolonged the session, of which nobody tells us.
            if times.epoch == epoch
                && now < times.expires_at
                && shared.lease.holds(times.read_at, now)
            {
                return Lookup::Hit(entry);
            }
            return Lookup::Miss;
        }
        match shared.absent.get(&key) {
            Some(absent)
                if absent.epoch == epoch
                    && shared.lease.holds(absent.read_at, shared.clock.now()) =>
            {
                Lookup::Absent
            }
            _ => Lookup::Miss,
        }
    }
}

/// The right to leave an entry, if nothing else finishes first. Dropped unused, it removes the
/// entry: an operation of which the end is not known must leave none.
#[derive(Debug)]
pub(crate) struct Ticket {
    cache: Cache,
    stamp: Option<Stamp>,
    read_at: Moment,
}

impl Ticket {
    /// Leaves `session` in the cache if the ticket is current, and removes the entry if it is not.
    pub(crate) fn publish(mut self, session: Session) -> Option<Entry> {
        let stamp = self.stamp.take()?;
        let shared = &self.cache.0;
        let left = session.expires.millis().saturating_sub(shared.clock.wall().millis());
        let Some(left) = u64::try_from(left).ok().filter(|left| *left > 0) else {
            self.remove(stamp);
            return None;
        };
        let expires_at = shared.clock.now().after(Duration::from_millis(left).min(A_CENTURY));
        let times = Times { epoch: stamp.epoch(), read_at: self.read_at, expires_at };
        let entry = Entry::new(session, times);
        let (key, placed) = (stamp.key(), entry.clone());
        let admitted = shared.bound.admits(entry.weight());
        shared.freshness.finish(stamp, |current| {
            if current && admitted {
                shared.account.add(placed.weight());
                shared.absent.invalidate(&key);
                shared.sessions.insert(key, placed);
            } else {
                shared.remove(key);
            }
        });
        if shared.bound.is_large(entry.weight()) {
            shared.sessions.run_pending_tasks();
        }
        Some(entry)
    }

    /// Remembers, if the ticket is current, that the database does not know the key.
    fn publish_absence(mut self) {
        let Some(stamp) = self.stamp.take() else { return };
        let shared = &self.cache.0;
        let (key, absent) = (stamp.key(), Absent { epoch: stamp.epoch(), read_at: self.read_at });
        shared.freshness.finish(stamp, |current| {
            shared.remove(key);
            if current {
                shared.absent.insert(key, absent);
            }
        });
    }

    /// Removes the entry: the session is gone, or nobody knows how it stands.
    pub(crate) fn forget(self) {
        drop(self);
    }

    fn remove(&self, stamp: Stamp) {
        let (shared, key) = (&self.cache.0, stamp.key());
        shared.freshness.finish(stamp, |_| shared.remove(key));
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        if let Some(stamp) = self.stamp.take() {
            self.remove(stamp);
        }
    }
}

impl Shared {
    fn remove(&self, key: SessionKey) {
        self.sessions.invalidate(&key);
        self.absent.invalidate(&key);
    }
}

/// The end of a shared read: what it found goes to the cache and to all who wait.
#[derive(Debug)]
pub(crate) struct Landing {
    ticket: Ticket,
    lands: watch::Sender<Option<Result<Option<Entry>>>>,
}

impl Landing {
    pub(crate) fn land(self, found: Result<Option<Session>>) {
        let answer = match found {
            Ok(Some(session)) => Ok(self.ticket.publish(session)),
            Ok(None) => {
                self.ticket.publish_absence();
                Ok(None)
            }
            Err(error) => {
                self.ticket.forget();
                Err(error)
            }
        };
        self.lands.send_replace(Some(answer));
    }
}

/// Longer than anything is kept; keeps times far from the ends of their types.
const A_CENTURY: Duration = Duration::from_secs(100 * 365 * 24 * 60 * 60);

/// Lets moka drop an entry when it will not be served again. Whether an entry *may* be served is not
/// moka's to decide; this only gives the memory back.
struct AtRecordExpiry {
    at_most: Duration,
}

impl AtRecordExpiry {
    fn left(&self, entry: &Entry) -> Duration {
        entry.lifetime().min(self.at_most)
    }
}

impl moka::Expiry<SessionKey, Entry> for AtRecordExpiry {
    fn expire_after_create(&self, _: &SessionKey, entry: &Entry, _: Instant) -> Option<Duration> {
        Some(self.left(entry))
    }

    fn expire_after_update(
        &self,
        _: &SessionKey,
        entry: &Entry,
        _: Instant,
        _: Option<Duration>,
    ) -> Option<Duration> {
        Some(self.left(entry))
    }
}
