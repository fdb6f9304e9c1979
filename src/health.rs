//! `Health`: a snapshot of a store's state, for readiness probes, alarms and operators.

use std::time::Duration;

use serde::{Serialize, Serializer};

use crate::availability::Responsiveness;
use crate::cache;
use crate::telemetry::metrics::{Phase, StreamState};
use crate::time::Moment;

/// A snapshot of a store's state, without I/O: from
/// [`CachedMongoStore::health`](crate::CachedMongoStore::health) or
/// [`MongoStore::health`](crate::MongoStore::health).
///
/// It contains no ids, and an app can return it as JSON. There, durations are in seconds:
///
/// ```json
/// {
///   "open": true,
///   "mongo": { "state": "answers", "last_answer_seconds": 0.31 },
///   "stream": { "state": "open", "for_seconds": 3605.2, "lag_seconds": 0.31 },
///   "lease": { "state": "fresh", "left_seconds": 4.69 },
///   "cache": { "entries": 5120, "bytes": 24473600, "limit_bytes": 67108864, "limit_entries": null }
/// }
/// ```
#[derive(Clone, Debug, PartialEq, Serialize)]
#[non_exhaustive]
pub struct Health {
    /// Whether the store takes calls. It does until it is shut down, or the app shuts down the client that it
    /// handed in.
    pub open: bool,
    /// Whether MongoDB answers.
    pub mongo: MongoHealth,
    /// The change stream that reports changes by other instances.
    pub stream: StreamHealth,
    /// Until when cached sessions may be served. `None` without a cache, and after the shutdown.
    pub lease: Option<LeaseHealth>,
    /// The cache's size. `None` without a cache.
    pub cache: Option<CacheHealth>,
}

/// Whether MongoDB answers. The store sends nothing to find out: it uses the results of its other commands.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(tag = "state", rename_all = "snake_case")]
#[non_exhaustive]
pub enum MongoHealth {
    /// MongoDB answers. An answer may also be an error.
    #[non_exhaustive]
    Answers {
        /// The time since its last answer.
        #[serde(rename = "last_answer_seconds", serialize_with = "seconds")]
        last_answer: Duration,
    },
    /// MongoDB does not answer in time, or cannot be reached.
    #[non_exhaustive]
    Unresponsive {
        /// The time since the first command was sent that MongoDB has not answered.
        #[serde(rename = "for_seconds", serialize_with = "seconds")]
        lasting: Duration,
    },
    /// The store sends nothing more: it was shut down, or the app has shut down the client that it handed in.
    Closed,
}

/// The change stream of a cached store.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(tag = "state", rename_all = "snake_case")]
#[non_exhaustive]
pub enum StreamHealth {
    /// There is no stream, because none was chosen: no cache, [`Coherence::TimeBound`](crate::Coherence::TimeBound) or
    /// `SoleWriter`, or a `max_staleness` of zero. Or the store was shut down.
    Off,
    /// The stream has not been open yet.
    #[non_exhaustive]
    Opening {
        /// For how long now.
        #[serde(rename = "for_seconds", serialize_with = "seconds")]
        lasting: Duration,
    },
    /// The stream is open.
    #[non_exhaustive]
    Open {
        /// For how long now.
        #[serde(rename = "for_seconds", serialize_with = "seconds")]
        lasting: Duration,
        /// The age of the newest moment up to which the cache has every change.
        #[serde(rename = "lag_seconds", serialize_with = "seconds")]
        lag: Duration,
    },
    /// The stream was open and is lost. The store keeps trying to open it.
    #[non_exhaustive]
    Lost {
        /// For how long now.
        #[serde(rename = "for_seconds", serialize_with = "seconds")]
        lasting: Duration,
        /// The age of the newest moment up to which the cache has every change.
        #[serde(rename = "lag_seconds", serialize_with = "seconds")]
        lag: Duration,
    },
    /// MongoDB has no change streams (it is a standalone server, or refuses them), or the user may not open one.
    /// The log says which.
    #[non_exhaustive]
    Unavailable {
        /// For how long now.
        #[serde(rename = "for_seconds", serialize_with = "seconds")]
        lasting: Duration,
    },
}

/// Until when cached sessions may be served.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(tag = "state", rename_all = "snake_case")]
#[non_exhaustive]
pub enum LeaseHealth {
    /// Without an age bound: [`Coherence::SoleWriter`](crate::Coherence::SoleWriter).
    Unbounded,
    /// Within `max_staleness` of the last confirmation that the cache has every change.
    #[non_exhaustive]
    Fresh {
        /// For how long.
        #[serde(rename = "left_seconds", serialize_with = "seconds")]
        left: Duration,
    },
    /// Past `max_staleness` and within `outage_grace`, while MongoDB does not answer.
    #[non_exhaustive]
    Grace {
        /// For how long.
        #[serde(rename = "left_seconds", serialize_with = "seconds")]
        left: Duration,
    },
    /// Past it. Only sessions that were read less than `max_staleness` ago are served.
    #[non_exhaustive]
    Expired {
        /// For how long now.
        #[serde(rename = "for_seconds", serialize_with = "seconds")]
        lasting: Duration,
    },
    /// Each session for `max_staleness` after it was read, because there is no change stream.
    PerSession,
}

/// The size of the cache, and its limits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct CacheHealth {
    /// The number of cached sessions.
    pub entries: u64,
    /// The heap memory that they take.
    pub bytes: u64,
    /// The heap memory that they may take.
    pub limit_bytes: u64,
    /// The number of sessions that may be cached. `None` if only the bytes are bounded.
    pub limit_entries: Option<u64>,
}

impl Health {
    /// Whether the store can answer: it is open, and MongoDB answers or cached sessions may be served. Use it for
    /// a readiness probe.
    ///
    /// If MongoDB is down, soon no instance is serving. A load balancer that then removes every instance also
    /// removes the pages that need no session.
    #[must_use]
    pub fn is_serving(&self) -> bool {
        let answers = matches!(self.mongo, MongoHealth::Answers { .. });
        self.open && (answers || self.lease.is_some_and(LeaseHealth::allows_hits))
    }

    /// Whether something is wrong, even if no user notices it: MongoDB does not answer, the stream is not open, or
    /// the lease has expired. Use it for an alarm.
    ///
    /// A stream that is [`Off`](StreamHealth::Off) or [`Unavailable`](StreamHealth::Unavailable) does not count,
    /// because waiting does not change it.
    #[must_use]
    pub fn is_degraded(&self) -> bool {
        let stream =
            matches!(self.stream, StreamHealth::Opening { .. } | StreamHealth::Lost { .. });
        let lease =
            matches!(self.lease, Some(LeaseHealth::Grace { .. } | LeaseHealth::Expired { .. }));
        let answers = matches!(self.mongo, MongoHealth::Answers { .. });
        !self.open || !answers || stream || lease
    }

    pub(crate) fn new(open: bool, responsiveness: Responsiveness) -> Self {
        let mongo = match responsiveness {
            _ if !open => MongoHealth::Closed,
            Responsiveness::Answering(last_answer) => MongoHealth::Answers { last_answer },
            Responsiveness::Unresponsive(lasting) => MongoHealth::Unresponsive { lasting },
        };
        Self { open, mongo, stream: StreamHealth::Off, lease: None, cache: None }
    }

    /// Adds the state of the cache and of its change stream.
    pub(crate) fn with_cache(
        self,
        cache: &cache::CacheStats,
        stream: Option<&StreamState>,
    ) -> Self {
        let size = CacheHealth {
            entries: cache.entries,
            bytes: cache.bytes,
            limit_bytes: cache.max_bytes,
            limit_entries: cache.max_entries,
        };
        let stream = stream.filter(|_| self.open);
        let has_stream = stream.is_some_and(|stream| stream.phase().0 != Phase::Unavailable);
        let lease = self.open.then(|| LeaseHealth::of(cache, has_stream));
        let stream = stream.map_or(StreamHealth::Off, |stream| StreamHealth::of(cache, stream));
        Self { stream, lease, cache: Some(size), ..self }
    }
}

impl StreamHealth {
    fn of(cache: &cache::CacheStats, stream: &StreamState) -> Self {
        let (phase, since) = stream.phase();
        let lasting = cache.now.since(since);
        let lag = cache.now.since(cache.synced_through.max(stream.started_at()));
        match phase {
            Phase::Opening => Self::Opening { lasting },
            Phase::Open => Self::Open { lasting, lag },
            Phase::Lost => Self::Lost { lasting, lag },
            Phase::Unavailable => Self::Unavailable { lasting },
        }
    }
}

impl LeaseHealth {
    fn of(cache: &cache::CacheStats, has_stream: bool) -> Self {
        let Some(bound) = cache.max_staleness else { return Self::Unbounded };
        if !has_stream || cache.synced_through == Moment::from_nanos(0) {
            return Self::PerSession;
        }
        let age = cache.now.since(cache.synced_through);
        if let Some(left) = bound.checked_sub(age) {
            return Self::Fresh { left };
        }
        let left = cache.grace.and_then(|grace| bound.saturating_add(grace).checked_sub(age));
        match left {
            Some(left) => Self::Grace { left },
            None => Self::Expired { lasting: age.saturating_sub(bound) },
        }
    }

    /// Whether cached sessions may be served while MongoDB does not answer.
    fn allows_hits(self) -> bool {
        matches!(self, Self::Unbounded | Self::Fresh { .. } | Self::Grace { .. })
    }
}

fn seconds<S: Serializer>(duration: &Duration, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_f64(duration.as_secs_f64())
}
