//! `FillGuard`: the right of one operation to insert an entry for its key.

use tokio::sync::watch;

use crate::cache::coherence::versions::Version;
use crate::cache::entry::{Entry, Times};
use crate::cache::grace::Probe;
use crate::cache::{Absent, Answer, Cache, NoRoom};
use crate::error::{ErrorKind, Result};
use crate::session::Session;
use crate::session::revision::Rev;
use crate::telemetry::metrics::{Fill, Invalidation};
use crate::time::{Moment, WallTime};

/// The right to insert an entry, if no other operation on the key finishes first.
///
/// An operation takes it before its I/O, and ends it with [`publish`](Self::publish),
/// [`prolong`](Self::prolong), [`evict`](Self::evict) or [`release`](Self::release). A guard that is
/// dropped removes the entry, since the outcome of its operation is unknown.
#[derive(Debug)]
pub(crate) struct FillGuard {
    cache: Cache,
    /// `None` once the operation has ended.
    version: Option<Version>,
    read_at: Moment,
    /// The write that the change stream will report.
    rev: Option<Rev>,
    /// How the removal of an entry is counted if the guard is dropped.
    drop_cause: Invalidation,
}

impl Cache {
    /// Makes the guard of an operation that took its version at `read_at` or later.
    pub(crate) fn fill_guard(&self, version: Version, read_at: Moment) -> FillGuard {
        FillGuard {
            cache: self.clone(),
            version: Some(version),
            read_at,
            rev: None,
            drop_cause: Invalidation::UnknownOutcome,
        }
    }

    /// Whether a session that expires at `expires` has expired by now. Reads both clocks.
    fn has_expired(&self, expires: WallTime) -> bool {
        let now = self.0.clock.now();
        self.0.wall.measure(now, self.0.clock.wall());
        self.0.wall.is_past(expires, now)
    }
}

impl FillGuard {
    pub(crate) fn with_rev(mut self, rev: Rev) -> Self {
        self.rev = Some(rev);
        self
    }

    pub(crate) fn generation(&self) -> Option<u64> {
        self.version.as_ref().map(Version::generation)
    }

    /// Inserts an entry of `session` if the version is current. Otherwise removes the entry. Returns the entry
    /// that it made.
    pub(crate) fn publish(self, session: Session) -> Option<Entry> {
        self.insert(session).map(|(entry, _)| entry)
    }

    /// Does what [`publish`](Self::publish) does. Returns the entry for the callers that wait for it, and
    /// how the cache was filled. `None` if the guard has no version any longer.
    fn insert(self, session: Session) -> Option<(Entry, Fill)> {
        let expires = session.expires;
        let read_at = self.read_at;
        let compact = self.cache.0.compact;
        self.insert_with(expires, read_at, |times| {
            let entry = Entry::new(session, times);
            let stored = if compact { entry.compacted() } else { entry.clone() };
            (entry, stored)
        })
    }

    /// Inserts `entry` with another expiry, if the version is current. Otherwise removes the entry.
    ///
    /// `entry` must have been looked up after the version was taken. It keeps its `read_at`, since a
    /// touch shows nothing about the session's data.
    pub(crate) fn prolong(self, entry: &Entry, expires: WallTime) {
        self.insert_with(expires, entry.times().read_at, |times| {
            let prolonged = entry.with_expiry(expires, times);
            (prolonged.clone(), prolonged)
        });
    }

    /// Inserts the second entry that `make` returns, and returns the first one.
    fn insert_with(
        mut self,
        expires: WallTime,
        read_at: Moment,
        make: impl FnOnce(Times) -> (Entry, Entry),
    ) -> Option<(Entry, Fill)> {
        let mut version = self.version.take()?;
        let shared = &self.cache.0;
        if let Some(generation) = self.rev.and_then(|rev| shared.own_writes.seen_generation(rev)) {
            version.advance_to(generation);
        }
        let has_expired = self.cache.has_expired(expires);
        let (entry, stored) = make(Times { epoch: version.epoch(), read_at });
        let key = version.key();
        let weight = stored.weight();
        // A session that has expired during the read is an answer for the loads that asked before. It is
        // not cached for later loads, since another instance may have extended it in between.
        let fits = shared.capacity.admits(weight) && !has_expired;
        let fill = shared.versions.finish(version, |is_current| {
            if !is_current {
                shared.remove(key, Invalidation::Overtaken);
                return Fill::Overtaken;
            }
            if !fits {
                shared.remove(key, Invalidation::Unfit);
                return Fill::Unfit;
            }
            shared.absent.invalidate(&key);
            shared.sessions.insert(key, stored);
            shared.usage.add(weight);
            Fill::Stored
        });
        if let Some(rev) = self.rev.take() {
            shared.own_writes.record_acked(rev);
        }
        if shared.capacity.is_large(weight) {
            shared.sessions.run_pending_tasks();
        }
        Some((entry, fill))
    }

    /// Inserts an entry of `session` if the version is current, no other operation on the key is in
    /// progress, and the entry weighs at most `room`. Otherwise changes nothing.
    ///
    /// Returns the weight of an inserted entry, and `None` if another operation was first or the session
    /// has expired.
    pub(crate) fn publish_if_idle(
        mut self,
        session: Session,
        room: u64,
    ) -> Result<Option<u64>, NoRoom> {
        let Some(version) = self.version.take() else { return Ok(None) };
        let shared = &self.cache.0;
        let has_expired = self.cache.has_expired(session.expires);
        let times = Times { epoch: version.epoch(), read_at: self.read_at };
        let mut entry = Entry::new(session, times);
        if shared.compact {
            entry = entry.compacted();
        }
        let key = version.key();
        let weight = entry.weight();
        let capacity_used = u64::from(shared.capacity.weigh(weight));
        if has_expired || capacity_used > room {
            shared.versions.release(version);
            return if has_expired { Ok(None) } else { Err(NoRoom) };
        }
        let is_inserted = shared.versions.finish_if_idle(version, || {
            shared.absent.invalidate(&key);
            shared.sessions.insert(key, entry);
            shared.usage.add(weight);
        });
        Ok(is_inserted.then_some(capacity_used))
    }

    /// Remembers that the database has no session for the key, if the version is current.
    fn publish_absence(mut self) -> Fill {
        let Some(version) = self.version.take() else { return Fill::Overtaken };
        let shared = &self.cache.0;
        let key = version.key();
        let absent = Absent { epoch: version.epoch(), read_at: self.read_at };
        shared.versions.finish(version, |is_current| {
            if !is_current {
                shared.remove(key, Invalidation::Overtaken);
                return Fill::Overtaken;
            }
            shared.remove(key, Invalidation::Gone);
            shared.absent.insert(key, absent);
            Fill::Absent
        })
    }

    /// Removes the entry: the session is gone, or its state is unknown.
    pub(crate) fn evict(mut self, cause: Invalidation) {
        self.drop_cause = cause;
        drop(self);
    }

    /// Changes nothing: the operation has learned nothing, and has written no data.
    pub(crate) fn release(mut self) {
        if let Some(version) = self.version.take() {
            self.cache.0.versions.release(version);
        }
    }
}

impl Drop for FillGuard {
    fn drop(&mut self) {
        let shared = &self.cache.0;
        if let Some(rev) = self.rev.take() {
            shared.own_writes.record_unknown(rev);
        }
        if let Some(version) = self.version.take() {
            let key = version.key();
            shared.versions.finish(version, |_| shared.remove(key, self.drop_cause));
        }
    }
}

/// The load that reads for all loads of one key. It gives the result to the cache and to the waiters.
#[derive(Debug)]
pub(crate) struct Leader {
    guard: FillGuard,
    result: watch::Sender<Answer>,
    /// Held until the read has ended, so that an outage is probed by one read at a time.
    probe: Option<Probe>,
}

impl Leader {
    pub(crate) fn new(guard: FillGuard, result: watch::Sender<Answer>) -> Self {
        Self { guard, result, probe: None }
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
            // The stored state cannot be read, and it is not the cached state.
            Err(error) if error.kind() == ErrorKind::Decode => {
                self.guard.evict(Invalidation::UnknownOutcome);
                (Err(error), Fill::Failed)
            }
            // The read has learned nothing. The entry stays for as long as its lease or the grace lasts.
            Err(error) => {
                self.guard.release();
                (Err(error), Fill::Failed)
            }
        };
        // Counted before the waiters get the answer, since a waiter may look at the count.
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
    use crate::cache::{CacheConfig, Coherence, EvictionPolicy, Lookup};
    use crate::error::Error;
    use crate::session::Data;
    use crate::session::id::SessionKey;
    use crate::telemetry::metrics::Series;
    use crate::time::Clock;

    /// A recorder whose gauges panic once the flag is set.
    #[derive(Clone, Default)]
    struct PanickingRecorder(Arc<AtomicBool>);

    impl GaugeFn for PanickingRecorder {
        fn increment(&self, _: f64) {
            assert!(!self.0.load(Ordering::SeqCst), "on purpose");
        }

        fn decrement(&self, _: f64) {}

        fn set(&self, _: f64) {}
    }

    impl metrics::Recorder for PanickingRecorder {
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

    fn config() -> CacheConfig {
        CacheConfig {
            max_bytes: 1 << 20,
            max_entries: None,
            max_absent_ids: 0,
            policy: EvictionPolicy::Lru,
            max_staleness: Duration::from_secs(5),
            coherence: Coherence::SoleWriter,
            outage_grace: Duration::ZERO,
            compact: false,
        }
    }

    #[test]
    fn a_failed_read_keeps_the_entry_unless_the_stored_document_cannot_be_decoded() {
        let clock = Clock::system();
        let expires = WallTime::from_millis(clock.wall().millis() + 60_000);
        let rejected = Error::server_overloaded("error 462", true);
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
        for error in errors.into_iter().chain([rejected, interrupted]) {
            let availability = Availability::new(clock.clone());
            let cache = Cache::new(&config(), clock.clone(), availability, &Series::default());
            let key = SessionKey::of(1);
            cache.begin(key).publish(Session::new(Data::new(), expires));
            let (result, _waiter) = watch::channel(None);
            Leader::new(cache.begin(key), result).complete(Err(error.clone()));
            let is_cached = matches!(cache.get(key), Lookup::Hit(_));
            assert_eq!(is_cached, error.kind() != ErrorKind::Decode, "{error:?}");
            assert_eq!(cache.tracked_keys(), 0);
        }
    }

    #[test]
    fn a_panic_of_the_metrics_recorder_leaves_the_new_entry_cached() {
        let recorder = PanickingRecorder::default();
        let clock = Clock::system();
        let cache = metrics::with_local_recorder(&recorder, || {
            let availability = Availability::new(clock.clone());
            Cache::new(&config(), clock.clone(), availability, &Series::default())
        });
        let expires = WallTime::from_millis(clock.wall().millis() + 60_000);
        let key = SessionKey::of(1);
        let save = |version: u32| {
            let data = Data::from([("version".to_owned(), json!(version))]);
            cache.begin(key).publish(Session::new(data, expires));
        };
        save(1);
        recorder.0.store(true, Ordering::SeqCst);
        save(2);
        match cache.get(key) {
            Lookup::Hit(entry) => assert_eq!(entry.session().unwrap().data["version"], json!(2)),
            found => panic!("{found:?}"),
        }
    }
}
