//! What an operation on a session holds from its beginning to its end: the right to leave an entry.

use tokio::sync::watch;

use crate::cache::coherence::versions::Version;
use crate::cache::entry::{Entry, Times};
use crate::cache::grace::Probe;
use crate::cache::{Absent, Answer, Cache, NoRoom};
use crate::error::{ErrorKind, Result};
use crate::session::Session;
use crate::session::revision::Rev;
use crate::telemetry::metrics::{Fill, Invalidation};
use crate::time::Moment;
use crate::time::WallTime;

/// The right to leave an entry, if nothing else finishes first. Dropped unused, it removes the
/// entry: an operation of which the end is not known must leave none.
#[derive(Debug)]
pub(crate) struct FillGuard {
    cache: Cache,
    version: Option<Version>,
    read_at: Moment,
    writes: Option<Rev>,
    /// What it is counted as if it removes the entry unasked.
    drop_cause: Invalidation,
}

impl Cache {
    /// A ticket of an operation whose stamp was taken at `read_at` or later.
    pub(crate) fn fill_guard(&self, stamp: Version, read_at: Moment) -> FillGuard {
        let (cache, stamp, unused) = (self.clone(), Some(stamp), Invalidation::UnknownOutcome);
        FillGuard { cache, version: stamp, read_at, writes: None, drop_cause: unused }
    }

    /// Whether a session that expires then has expired, by a fresh look at both clocks.
    fn has_expired_by_now(&self, expires: WallTime) -> bool {
        let now = self.0.clock.now();
        self.0.wall.measure(now, self.0.clock.wall());
        self.0.wall.is_past(expires, now)
    }
}

impl FillGuard {
    pub(crate) fn with_rev(mut self, rev: Rev) -> Self {
        self.writes = Some(rev);
        self
    }

    pub(crate) fn generation(&self) -> Option<u64> {
        self.version.as_ref().map(Version::generation)
    }

    /// Leaves `session` in the cache if the ticket is current, and removes the entry if it is not.
    pub(crate) fn publish(self, session: Session) -> Option<Entry> {
        self.insert(session).map(|(entry, _)| entry)
    }

    fn insert(self, session: Session) -> Option<(Entry, Fill)> {
        let (expires, read_at, compact) = (session.expires, self.read_at, self.cache.0.compact);
        self.insert_as(expires, read_at, |times| {
            let entry = Entry::new(session, times);
            let placed = if compact { entry.compacted() } else { entry.clone() };
            (entry, placed)
        })
    }

    /// Leaves `entry` with another expiry, on the same terms. It was looked up under this ticket;
    /// what it knows of the session's data grows no younger.
    pub(crate) fn prolong(self, entry: &Entry, expires: WallTime) {
        self.insert_as(expires, entry.times().read_at, |times| {
            let prolonged = entry.with_expiry(expires, times);
            (prolonged.clone(), prolonged)
        });
    }

    /// Leaves the second of what `make` makes, and answers with the first.
    fn insert_as(
        mut self,
        expires: WallTime,
        read_at: Moment,
        make: impl FnOnce(Times) -> (Entry, Entry),
    ) -> Option<(Entry, Fill)> {
        let mut stamp = self.version.take()?;
        let shared = &self.cache.0;
        if let Some(generation) = self.writes.and_then(|rev| shared.own_writes.seen_generation(rev))
        {
            stamp.advance_to(generation);
        }
        let is_over = self.cache.has_expired_by_now(expires);
        let (entry, placed) = make(Times { epoch: stamp.epoch(), read_at });
        let (key, weight) = (stamp.key(), placed.weight());
        // What has expired on the way is an answer to those who asked before, and none for later:
        // it may have been prolonged meanwhile.
        let admitted = shared.capacity.admits(weight) && !is_over;
        let fill = shared.versions.finish(stamp, |current| {
            if !current {
                shared.remove(key, Invalidation::Overtaken);
                return Fill::Overtaken;
            }
            if !admitted {
                shared.remove(key, Invalidation::Unfit);
                return Fill::Unfit;
            }
            shared.absent.invalidate(&key);
            shared.sessions.insert(key, placed);
            shared.usage.add(weight);
            Fill::Stored
        });
        if let Some(rev) = self.writes.take() {
            shared.own_writes.record_acked(rev);
        }
        if shared.capacity.is_large(weight) {
            shared.sessions.run_pending_tasks();
        }
        Some((entry, fill))
    }

    /// Leaves `session` in the cache if it takes no more than `room` and nobody else works on its key,
    /// and otherwise everything as it is. Answers with what it takes.
    pub(crate) fn publish_if_idle(
        mut self,
        session: Session,
        room: u64,
    ) -> Result<Option<u64>, NoRoom> {
        let Some(stamp) = self.version.take() else { return Ok(None) };
        let shared = &self.cache.0;
        let is_over = self.cache.has_expired_by_now(session.expires);
        let times = Times { epoch: stamp.epoch(), read_at: self.read_at };
        let mut entry = Entry::new(session, times);
        if shared.compact {
            entry = entry.compacted();
        }
        let (key, weight) = (stamp.key(), entry.weight());
        let takes = u64::from(shared.capacity.weigh(weight));
        if is_over || takes > room {
            shared.versions.release(stamp);
            return if is_over { Ok(None) } else { Err(NoRoom) };
        }
        let settled = shared.versions.finish_if_idle(stamp, || {
            shared.absent.invalidate(&key);
            shared.sessions.insert(key, entry);
            shared.usage.add(weight);
        });
        Ok(settled.then_some(takes))
    }

    /// Remembers, if the ticket is current, that the database does not know the key.
    fn publish_absence(mut self) -> Fill {
        let Some(stamp) = self.version.take() else { return Fill::Overtaken };
        let shared = &self.cache.0;
        let (key, absent) = (stamp.key(), Absent { epoch: stamp.epoch(), read_at: self.read_at });
        shared.versions.finish(stamp, |current| {
            shared.remove(key, if current { Invalidation::Gone } else { Invalidation::Overtaken });
            if current {
                shared.absent.insert(key, absent);
                return Fill::Absent;
            }
            Fill::Overtaken
        })
    }

    /// Removes the entry: the session is gone, or nobody knows how it stands.
    pub(crate) fn evict(mut self, cause: Invalidation) {
        self.drop_cause = cause;
        drop(self);
    }

    /// Leaves everything as it is: nothing was learned, and no data was written.
    pub(crate) fn release(mut self) {
        if let Some(stamp) = self.version.take() {
            self.cache.0.versions.release(stamp);
        }
    }

    fn remove(&self, stamp: Version) {
        let (shared, key) = (&self.cache.0, stamp.key());
        shared.versions.finish(stamp, |_| shared.remove(key, self.drop_cause));
    }
}

impl Drop for FillGuard {
    fn drop(&mut self) {
        if let Some(rev) = self.writes.take() {
            self.cache.0.own_writes.record_unknown(rev);
        }
        if let Some(stamp) = self.version.take() {
            self.remove(stamp);
        }
    }
}

/// The end of a shared read: what it found goes to the cache and to all who wait.
#[derive(Debug)]
pub(crate) struct Leader {
    guard: FillGuard,
    result: watch::Sender<Answer>,
    probe: Option<Probe>,
}

impl Leader {
    pub(crate) fn new(ticket: FillGuard, lands: watch::Sender<Answer>) -> Self {
        Self { guard: ticket, result: lands, probe: None }
    }

    pub(crate) fn with_probe(mut self, probe: Probe) -> Self {
        self.probe = Some(probe);
        self
    }

    pub(crate) fn complete(self, found: Result<Option<Session>>) {
        let cache = self.guard.cache.clone();
        let (answer, fill) = match found {
            Ok(Some(session)) => match self.guard.insert(session) {
                Some((entry, fill)) => (Ok(Some(entry)), fill),
                None => (Ok(None), Fill::Overtaken),
            },
            Ok(None) => (Ok(None), self.guard.publish_absence()),
            // What is stored is another state than what is cached, and one that cannot be read.
            Err(error) if error.kind() == ErrorKind::Decode => {
                self.guard.evict(Invalidation::UnknownOutcome);
                (Err(error), Fill::Failed)
            }
            // A read that fails otherwise has learned nothing. What is cached stays, for as long as its
            // lease or the grace lasts.
            Err(error) => {
                self.guard.release();
                (Err(error), Fill::Failed)
            }
        };
        // Before the answer: who has it may look at the count.
        cache.0.metrics.count_fill(fill);
        self.result.send_replace(Some(answer));
        drop(self.probe);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::time::Duration;

    use metrics::{Counter, Gauge, GaugeFn, Histogram, Key, KeyName, Metadata, SharedString, Unit};
    use serde_json::json;

    use super::*;
    use crate::availability::Availability;
    use crate::cache::{CacheConfig, EvictionPolicy, Lookup};
    use crate::error::Error;
    use crate::session::Data;
    use crate::session::id::SessionKey;
    use crate::telemetry::metrics::Series;
    use crate::time::Clock;

    /// A recorder whose gauges panic once they are told to.
    #[derive(Clone, Default)]
    struct Breaks(Arc<AtomicBool>);

    impl GaugeFn for Breaks {
        fn increment(&self, _: f64) {
            assert!(!self.0.load(Ordering::SeqCst), "on purpose");
        }

        fn decrement(&self, _: f64) {}

        fn set(&self, _: f64) {}
    }

    impl metrics::Recorder for Breaks {
        fn describe_counter(&self, _: KeyName, _: Option<Unit>, _: SharedString) {}

        fn describe_gauge(&self, _: KeyName, _: Option<Unit>, _: SharedString) {}

        fn describe_histogram(&self, _: KeyName, _: Option<Unit>, _: SharedString) {}

        fn register_counter(&self, _: &Key, _: &Metadata<'_>) -> Counter {
            Counter::noop()
        }

        fn register_gauge(&self, _: &Key, _: &Metadata<'_>) -> Gauge {
            Gauge::from_arc(Arc::new(self.clone()))
        }

        fn register_histogram(&self, _: &Key, _: &Metadata<'_>) -> Histogram {
            Histogram::noop()
        }
    }

    fn limits() -> CacheConfig {
        CacheConfig {
            max_bytes: 1 << 20,
            max_entries: None,
            max_absent_ids: 0,
            policy: EvictionPolicy::Lru,
            max_staleness: Duration::from_secs(5),
            exclusive: true,
            outage_grace: Duration::ZERO,
            compact: false,
        }
    }

    #[test]
    fn a_read_that_fails_removes_nothing_unless_what_is_stored_cannot_be_read() {
        let clock = Clock::system();
        let expires = WallTime::from_millis(clock.wall().millis() + 60_000);
        let turned_away = Error::server_overloaded("error 462", true);
        let interrupted = Error::server_overloaded("error 999", false);
        let kinds = [
            ErrorKind::Config,
            ErrorKind::Connection,
            ErrorKind::Overloaded,
            ErrorKind::Timeout,
            ErrorKind::Authentication,
            ErrorKind::Permission,
            ErrorKind::Index,
            ErrorKind::Encode,
            ErrorKind::Decode,
            ErrorKind::Server,
            ErrorKind::Closed,
        ];
        let errors = kinds.map(|kind| Error::new(kind, "on purpose"));
        for error in errors.into_iter().chain([turned_away, interrupted]) {
            let cache = Cache::new(
                &limits(),
                clock.clone(),
                Availability::new(clock.clone()),
                &Series::default(),
            );
            let key = SessionKey::of(1);
            cache.begin(key).publish(Session { data: Data::new(), expires });
            let (lands, _answer) = watch::channel(None);
            Leader::new(cache.begin(key), lands).complete(Err(error.clone()));
            let stays = matches!(cache.get(key), Lookup::Hit(_));
            assert_eq!(stays, error.kind() != ErrorKind::Decode, "{error:?}");
            assert_eq!(cache.tracked_keys(), 0);
        }
    }

    #[test]
    fn a_recorder_that_panics_costs_no_entry() {
        let breaks = Breaks::default();
        let clock = Clock::system();
        let cache = metrics::with_local_recorder(&breaks, || {
            Cache::new(
                &limits(),
                clock.clone(),
                Availability::new(clock.clone()),
                &Series::default(),
            )
        });
        let expires = WallTime::from_millis(clock.wall().millis() + 60_000);
        let key = SessionKey::of(1);
        let save = |version: u32| {
            let data = Data::from([("version".to_owned(), json!(version))]);
            cache.begin(key).publish(Session { data, expires });
        };
        save(1);
        breaks.0.store(true, Ordering::SeqCst);
        save(2);
        match cache.get(key) {
            Lookup::Hit(entry) => assert_eq!(entry.session().unwrap().data["version"], json!(2)),
            found => panic!("{found:?}"),
        }
    }
}
