//! Every option of the cache, and how the two tiers are put together.

use std::sync::Arc;
use std::time::Duration;

use crate::cache::{Cache, CacheConfig, EvictionPolicy};
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
    limits: CacheConfig,
    touch_after: Duration,
    follows: bool,
    name: Option<String>,
}

impl CachedMongoStoreBuilder {
    pub(crate) fn new(mongo: MongoStore) -> Self {
        Self {
            mongo,
            touch_after: Duration::ZERO,
            follows: true,
            name: None,
            limits: CacheConfig {
                max_bytes: 64 << 20,
                max_entries: None,
                max_absent_ids: 10_000,
                policy: EvictionPolicy::Lru,
                max_staleness: Duration::from_secs(5),
                exclusive: false,
                outage_grace: Duration::ZERO,
                compact: false,
            },
        }
    }

    /// How much heap the cached sessions may take, in bytes. Default 64 MiB. Zero caches nothing.
    /// An entry weighs what its record takes on the heap, which is many times its JSON where that is
    /// nested.
    pub fn max_bytes(mut self, bytes: u64) -> Self {
        self.limits.max_bytes = bytes;
        self
    }

    /// How many sessions may be cached, besides the bound in bytes. Default: as many as fit. At
    /// least 1. The share of the bytes that so many sessions have each is set aside for each one, so
    /// a few that are larger than their share leave room for fewer.
    pub fn max_entries(mut self, entries: u64) -> Self {
        self.limits.max_entries = Some(entries);
        self
    }

    /// How many ids that do not exist are remembered, for `max_staleness` each, so that a flood of
    /// invented ids is answered from memory and evicts no session. Default 10,000, beside the bound
    /// in bytes. Zero remembers none.
    pub fn max_absent_ids(mut self, ids: u64) -> Self {
        self.limits.max_absent_ids = ids;
        self
    }

    /// How old the state of a session may be that is served from the cache, and so how long a
    /// log-out on another instance may go unseen here if MongoDB cannot tell of it. Default 5 s.
    /// Zero asks MongoDB each time. Not bounded by it are sessions served by
    /// [`outage_grace`](Self::outage_grace) or to an [`exclusive`](Self::exclusive) store, and what an
    /// old primary says that is cut off from its set but not from here, until it steps down.
    ///
    /// While the change stream runs, this cache knows up to when it has heard of every change, and
    /// sessions are served for as long as that moment is no further back than this: a session that
    /// nobody changes is read once. About ten times within this bound, and twice a second at least, it
    /// asks MongoDB how far it is, which costs a `hello` and an empty batch of the stream: 2 of each a
    /// second at 5 s, 10 at 1 s, 100 at 100 ms and less. A question that has waited for half the bound
    /// is given up for the next one, so a bound below twice the time of a round trip renews nothing,
    /// and each session is read anew once it is that old.
    ///
    /// A request that waits for its own slow read of MongoDB gets a state as old as that wait, which
    /// the operation timeout bounds.
    pub fn max_staleness(mut self, bound: Duration) -> Self {
        self.limits.max_staleness = bound;
        self
    }

    /// Whether to follow the changes of other instances through a change stream. Default yes.
    /// Without it each session is read anew once it is `max_staleness` old: for a fleet whose changes
    /// are too many to be told to every instance.
    pub fn change_stream(mut self, follow: bool) -> Self {
        self.follows = follow;
        self
    }

    /// Declares that this store and its clones are the only ones to change these sessions: one
    /// instance of the app, and nobody who edits the collection. Then what is cached needs no bound
    /// on its age and no change stream, and `max_staleness` only says how long an id that does not
    /// exist is remembered.
    ///
    /// With a second writer a log-out there goes unseen here until the session expires. So does a
    /// write of this store that was given up at its deadline, and is carried out by the server after
    /// the session was read again.
    pub fn exclusive(mut self) -> Self {
        self.limits.exclusive = true;
        self
    }

    /// How much longer than [`max_staleness`](Self::max_staleness) a cached session may be served
    /// while MongoDB does not answer. Default zero: then a load is an error, once a session is
    /// older than that. It counts from where the lease ends: a session is served whose state was
    /// known to be true no longer ago than `max_staleness` and this together.
    ///
    /// The choice is between a log-out elsewhere that goes unseen for so long, and users who are
    /// turned away while the database is down. The first load that fails waits for its error up to
    /// the operation timeout; from then on, until MongoDB answers again, sessions within the grace
    /// are served at once. A session that is known to be gone, or of which a write here ended in
    /// doubt, is never served. Each one served is counted as `session_store_loads_total{result="grace"}`.
    pub fn outage_grace(mut self, grace: Duration) -> Self {
        self.limits.outage_grace = grace;
        self
    }

    /// How much later a session must end than it does, for a save that changes nothing else to be
    /// sent. Default zero: each later expiry is stored.
    ///
    /// An app that saves on every request (`with_always_save(true)`) to keep sessions alive writes as
    /// often as it reads. With one minute here it writes once a minute for each session, and a
    /// session may end up to a minute early, never late. Of a session's lifetime no more than a
    /// tenth is lost, however much is given here.
    ///
    /// Such a save stores the expiry alone, and no other instance is told, whatever this is.
    pub fn touch_after(mut self, duration: Duration) -> Self {
        self.touch_after = duration;
        self
    }

    /// Whether cached sessions are kept packed, each in one block, and unpacked at each load. Default
    /// no. A session of five small objects takes 590 bytes instead of 4,780, so that many more fit into
    /// the same bytes, and a hit takes about 1.4 times as long.
    pub fn compact(mut self, packed: bool) -> Self {
        self.limits.compact = packed;
        self
    }

    /// Which entry goes when the cache is full. Default [`EvictionPolicy::Lru`].
    pub fn eviction_policy(mut self, policy: EvictionPolicy) -> Self {
        self.limits.policy = policy;
        self
    }

    /// The name of this store in the metrics of its cache and its change stream, whose series carry it
    /// as the label `store`. Not empty. Default: the
    /// [name of its `MongoStore`](crate::MongoStoreBuilder::name), if that has one.
    pub fn name(mut self, name: impl Into<String>) -> Self {
        self.name = Some(name.into());
        self
    }

    /// Builds the store, and begins to follow the changes that other instances make.
    ///
    /// Waits for the change stream to be open, for at most the operation timeout; if it is not open
    /// by then, the store starts without and goes on trying. A server that refuses a change stream three
    /// times in a row is taken for one that has none, and is not waited for.
    ///
    /// # Errors
    ///
    /// [`Config`](ErrorKind::Config) for options that make no sense, alone or together;
    /// [`Closed`](ErrorKind::Closed) if the `MongoStore`, its runtime or its client has been shut down.
    ///
    /// # Cancel safety
    ///
    /// May be dropped at any time.
    pub async fn build(self) -> Result<CachedMongoStore> {
        let limits = &self.limits;
        if limits.max_entries == Some(0) {
            return Err(Error::config(
                "`max_entries` is zero, which caches nothing: leave it out, or use the MongoStore \
                 by itself",
            ));
        }
        if limits.exclusive && !limits.outage_grace.is_zero() {
            return Err(Error::config(
                "`outage_grace` was given to an `exclusive` store, which serves what it has cached \
                 without a bound: leave it out",
            ));
        }
        let of_mongo = self.mongo.metrics();
        let series = match self.name.as_deref() {
            None => of_mongo.series().clone(),
            name => mongo::series(name)?,
        };
        let clock = Clock::system();
        let availability = self.mongo.tasks().availability().clone();
        let cache = Cache::new(limits, clock.clone(), availability, &series);
        let retries = of_mongo.retries(Retry::Stream).clone();
        // Made whether it is needed or not, so that each series is there.
        let metrics = StreamMetrics::new(&series, retries, clock.clone());
        let mut stream = None;
        let mut opened = None;
        let tasks = self.mongo.tasks().clone();
        let following = tasks.closed().child_token();
        // From here on: a call that is dropped must not leave a follower behind.
        let ends_following = following.clone().drop_guard();
        // Where nothing is served from the cache, or nobody else changes it, nobody needs to tell.
        if self.follows && !limits.exclusive && !limits.max_staleness.is_zero() {
            stream = Some(metrics.stream_state());
            let pace = invalidation::poll_interval(limits.max_staleness);
            let follower = InvalidationListener {
                source: self.mongo.invalidation_stream(pace, following.clone())?,
                cache: cache.clone(),
                clock,
                poll_interval: pace,
                timeout: tasks.timeout(),
                metrics,
                rng: fastrand::Rng::new(),
            };
            opened = Some(follower.start(&tasks, following.clone()));
        }
        // In a task, since this may be polled where there is no timer; and with no stream too, to see
        // whether the runtime of the store is still there.
        let starts = async move {
            let Some(opened) = opened else { return Ok(()) };
            // A follower that has ended without a word has said why in the log.
            opened.await.unwrap_or(Ok(()))
        };
        match tasks.wait_for(starts).await {
            Ok(started) => started?,
            // It goes on trying.
            Err(error) if error.kind() == ErrorKind::Timeout => {}
            Err(error) => return Err(error),
        }
        tasks.spawn(cache.clone().run_sweeper(following));
        let tiers = WriteThrough {
            backend: self.mongo.backend().clone(),
            cache,
            tasks,
            revs: RevSource::new(),
            touch_policy: TouchPolicy { after: self.touch_after, clock: Clock::system() },
            _stops_listener: ends_following,
        };
        let events = EventBroadcaster::new(self.follows);
        Ok(CachedMongoStore { tiers: Arc::new(tiers), mongo: self.mongo, stream, events })
    }
}
