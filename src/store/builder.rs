//! [`CachedMongoStoreBuilder`]: the options of the cache, and how a store is put together.

use std::sync::Arc;
use std::time::Duration;

use crate::cache::{Cache, CacheConfig, Coherence, EvictionPolicy};
use crate::error::{Error, ErrorKind, Result};
use crate::invalidation::{self, InvalidationListener};
use crate::mongo::{self, MongoStore};
use crate::session::revision::RevSource;
use crate::store::CachedMongoStore;
use crate::store::events::EventBroadcaster;
use crate::store::write_through::{TouchPolicy, WriteThrough};
use crate::telemetry::metrics::{Retry, StreamMetrics};
use crate::time::Clock;

/// Builds a [`CachedMongoStore`]. Setters never fail; [`build`](Self::build) checks everything.
#[derive(Clone, Debug)]
#[must_use = "a builder does nothing until it is built"]
pub struct CachedMongoStoreBuilder {
    mongo: MongoStore,
    config: CacheConfig,
    touch_after: Duration,
    name: Option<String>,
}

impl CachedMongoStoreBuilder {
    pub(crate) fn new(mongo: MongoStore) -> Self {
        Self {
            mongo,
            touch_after: Duration::ZERO,
            name: None,
            config: CacheConfig {
                max_bytes: 64 << 20,
                max_entries: None,
                max_absent_ids: 10_000,
                policy: EvictionPolicy::Lru,
                max_staleness: Duration::from_secs(5),
                coherence: Coherence::ChangeStream,
                outage_grace: Duration::ZERO,
                compact: false,
            },
        }
    }

    /// The most heap memory that cached sessions may take, in bytes. Default: 64 MiB. Zero caches
    /// nothing.
    ///
    /// An entry counts with what its decoded record takes on the heap. For nested data that is many
    /// times the size of its JSON.
    pub fn max_bytes(mut self, bytes: u64) -> Self {
        self.config.max_bytes = bytes;
        self
    }

    /// The most sessions that may be cached, besides [`max_bytes`](Self::max_bytes). Default: no
    /// bound. At least 1.
    ///
    /// Each entry counts with at least `max_bytes / max_entries` bytes. So fewer sessions fit if some
    /// are larger than that.
    pub fn max_entries(mut self, entries: u64) -> Self {
        self.config.max_entries = Some(entries);
        self
    }

    /// How many ids the cache remembers as absent, each for
    /// [`max_staleness`](Self::max_staleness). Default: 10,000, besides
    /// [`max_bytes`](Self::max_bytes). Zero remembers none.
    ///
    /// A flood of invented ids is then answered from memory, and evicts no session.
    pub fn max_absent_ids(mut self, ids: u64) -> Self {
        self.config.max_absent_ids = ids;
        self
    }

    /// How the cache learns that a cached session is out of date. Default:
    /// [`Coherence::ChangeStream`].
    #[doc(alias = "change_stream")]
    #[doc(alias = "exclusive")]
    pub fn coherence(mut self, coherence: Coherence) -> Self {
        self.config.coherence = coherence;
        self
    }

    /// How old the state of a session may be that is served from the cache. Default: 5 s. Zero reads
    /// MongoDB for each load.
    ///
    /// This bounds for how long a log-out on another instance may go unseen here when the change
    /// stream is behind. It does not bound:
    ///
    /// - sessions that [`outage_grace`](Self::outage_grace) serves;
    /// - sessions of a store with [`Coherence::SoleWriter`], where this is only the time for which an
    ///   id is remembered as absent;
    /// - what an old primary answers that is cut off from its replica set but not from this instance,
    ///   until it steps down;
    /// - a load that waits for its own slow read of MongoDB: it gets a state as old as that wait,
    ///   which the operation timeout bounds.
    ///
    /// # Cost
    ///
    /// While the change stream runs, the store knows the time up to which it has received every
    /// change. Sessions are served while that time is at most this old, so a session that nobody
    /// changes is read once. To advance that time, the store sends the primary a `hello` and reads an
    /// empty batch of the stream, about ten times within this bound:
    ///
    /// | `max_staleness` | of each, a second |
    /// |---|--:|
    /// | 5 s and more | 2 |
    /// | 1 s | 10 |
    /// | 100 ms and less | 100 |
    ///
    /// The store gives up a `hello` that has waited for half of the bound, or for 2.5 s if that is less,
    /// and sends the next one. So with a bound below two round trips the time never advances, and each
    /// session is read again once it is that old.
    pub fn max_staleness(mut self, bound: Duration) -> Self {
        self.config.max_staleness = bound;
        self
    }

    /// How much longer than [`max_staleness`](Self::max_staleness) a cached session may be served
    /// while MongoDB does not answer (stale-if-error). Default: zero, and a load of an older session
    /// is an error. Refused with [`Coherence::SoleWriter`], which has no age bound to extend.
    ///
    /// The choice is between a log-out elsewhere that goes unseen for that long, and users who are
    /// turned away while the database is down. A session is served if its state was known to be true
    /// at most `max_staleness` plus this time ago.
    ///
    /// The first load that fails waits for its error, for at most the operation timeout. From then on,
    /// until MongoDB answers again, sessions within the grace are served at once. A session is never
    /// served if it is known to be gone, or if a write of it here had an unknown outcome. Each one
    /// served is counted as `session_store_loads_total{result="grace"}`.
    #[doc(alias = "stale_if_error")]
    pub fn outage_grace(mut self, grace: Duration) -> Self {
        self.config.outage_grace = grace;
        self
    }

    /// By how much a save must extend the expiry to be sent, if it changes nothing else. Default:
    /// zero, each later expiry is stored.
    ///
    /// An app that saves on every request (`with_always_save(true)`) to keep sessions alive writes as
    /// often as it reads. With one minute here it writes each session at most once a minute. A session
    /// may then expire up to a minute early, never late. A session never loses more than a tenth of its
    /// lifetime.
    ///
    /// A save that is sent for its expiry stores the expiry alone, and other instances are not
    /// notified. That does not depend on this option.
    #[doc(alias = "touchAfter")]
    pub fn touch_after(mut self, duration: Duration) -> Self {
        self.touch_after = duration;
        self
    }

    /// Whether the cache keeps each session encoded in one block of memory, and decodes it at each
    /// load. Default: no.
    ///
    /// A session of five small objects takes 690 bytes instead of 5,670, so more sessions fit into
    /// [`max_bytes`](Self::max_bytes). A hit takes about 1.4 times as long.
    pub fn compact(mut self, compact: bool) -> Self {
        self.config.compact = compact;
        self
    }

    /// The rule by which a full cache evicts an entry. Default: [`EvictionPolicy::Lru`].
    pub fn eviction_policy(mut self, policy: EvictionPolicy) -> Self {
        self.config.policy = policy;
        self
    }

    /// The name of this store: the label `store` of the metrics of its cache and its change stream.
    /// Not empty. Default: the [name of its `MongoStore`](crate::MongoStoreBuilder::name), if that
    /// has one.
    pub fn name(mut self, name: impl Into<String>) -> Self {
        self.name = Some(name.into());
        self
    }

    /// Builds the store. With [`Coherence::ChangeStream`] it also opens the change stream.
    ///
    /// Waits until the change stream is open, for at most the operation timeout. If the stream is not
    /// open by then, the store starts without it and keeps trying. A server that refuses a change
    /// stream three times in a row counts as a server without change streams: the store no longer
    /// waits for it.
    ///
    /// # Errors
    ///
    /// - [`Config`](ErrorKind::Config) for options that make no sense, alone or together.
    /// - [`Closed`](ErrorKind::Closed) if the `MongoStore`, its runtime or its client was shut down.
    ///
    /// # Cancel safety
    ///
    /// May be dropped at any time.
    pub async fn build(self) -> Result<CachedMongoStore> {
        self.check()?;
        let config = self.config;
        let mongo_metrics = self.mongo.metrics();
        let series = match self.name.as_deref() {
            None => mongo_metrics.series().clone(),
            name => mongo::series(name)?,
        };
        let clock = Clock::system();
        let availability = self.mongo.tasks().availability().clone();
        let cache = Cache::new(&config, clock.clone(), availability, &series);
        let retries = mongo_metrics.retries(Retry::Stream).clone();
        // Created with each choice of coherence, so that the series exist.
        let metrics = StreamMetrics::new(&series, retries, clock.clone());
        let tasks = self.mongo.tasks().clone();
        let stop = tasks.closed().child_token();
        // Created before the first await: if this future is dropped, the listener must end.
        let stop_guard = stop.clone().drop_guard();
        let mut stream = None;
        let mut opened = None;
        // With a bound of zero nothing is served from the cache, so there is nothing to invalidate.
        if config.coherence == Coherence::ChangeStream && !config.max_staleness.is_zero() {
            stream = Some(metrics.stream_state());
            let poll_interval = invalidation::poll_interval(config.max_staleness);
            let listener = InvalidationListener {
                source: self.mongo.invalidation_stream(poll_interval, stop.clone())?,
                cache: cache.clone(),
                clock: clock.clone(),
                poll_interval,
                timeout: tasks.timeout(),
                metrics,
                rng: fastrand::Rng::new(),
            };
            opened = Some(listener.start(&tasks, stop.clone()));
        }
        let wait_until_open = async move {
            let Some(opened) = opened else { return Ok(()) };
            // A listener that ends without an answer has logged why.
            opened.await.unwrap_or(Ok(()))
        };
        // A task waits, since the executor that polls this future may have no timer. It runs without a
        // stream too: it fails if the store's runtime is gone.
        match tasks.wait_for(wait_until_open).await {
            Ok(outcome) => outcome?,
            // The listener keeps trying.
            Err(error) if error.kind() == ErrorKind::Timeout => {}
            Err(error) => return Err(error),
        }
        tasks.spawn(cache.clone().run_sweeper(stop));
        let tiers = WriteThrough {
            backend: self.mongo.backend().clone(),
            cache,
            tasks,
            revs: RevSource::new(),
            touch_policy: TouchPolicy { after: self.touch_after, clock },
            _stops_listener: stop_guard,
        };
        let events = EventBroadcaster::new(config.coherence != Coherence::TimeBound);
        Ok(CachedMongoStore { tiers: Arc::new(tiers), mongo: self.mongo, stream, events })
    }

    fn check(&self) -> Result<()> {
        if self.config.max_entries == Some(0) {
            return Err(Error::config(
                "`max_entries` is zero, which caches nothing: leave it out, or use the MongoStore \
                 by itself",
            ));
        }
        let has_grace = !self.config.outage_grace.is_zero();
        if self.config.coherence == Coherence::SoleWriter && has_grace {
            return Err(Error::config(
                "`outage_grace` has no effect with Coherence::SoleWriter, which serves cached \
                 sessions without an age bound: leave it out",
            ));
        }
        Ok(())
    }
}
