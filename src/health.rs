//! How a store is, for the app to show.

use std::time::Duration;

use serde::{Serialize, Serializer};

use crate::cache;
use crate::telemetry::metrics::{Beat, Phase, StreamState};
use crate::time::Moment;

/// How a store is, as far as it knows without asking anybody: from
/// [`CachedMongoStore::health`](crate::CachedMongoStore::health) or
/// [`MongoStore::health`](crate::MongoStore::health).
///
/// It holds no ids and serializes, so that an app can return it as JSON. Durations are seconds there:
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
    /// Whether the store takes calls: neither it nor the client that was handed to it was shut down.
    pub open: bool,
    /// Whether MongoDB answers.
    pub mongo: MongoHealth,
    /// The change stream by which the cache hears of what other instances change.
    pub stream: StreamHealth,
    /// Until when what is cached may be served. `None` without a cache, and once it is shut down.
    pub lease: Option<LeaseHealth>,
    /// What is cached. `None` without a cache.
    pub cache: Option<CacheHealth>,
}

/// Whether MongoDB answers, as the operations show that were sent anyway.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(tag = "state", rename_all = "snake_case")]
#[non_exhaustive]
pub enum MongoHealth {
    /// What was asked last was answered, were it with a refusal.
    #[non_exhaustive]
    Answers {
        /// How long ago.
        #[serde(rename = "last_answer_seconds", serialize_with = "seconds")]
        last_answer: Duration,
    },
    /// What was asked last was not answered in time, or nobody was reached.
    #[non_exhaustive]
    Unresponsive {
        /// How long ago the first question was asked that nobody has answered.
        #[serde(rename = "for_seconds", serialize_with = "seconds")]
        lasting: Duration,
    },
    /// Nobody asks any more: the store, or the client that was handed to it, was shut down.
    Closed,
}

/// The change stream of a cached store.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(tag = "state", rename_all = "snake_case")]
#[non_exhaustive]
pub enum StreamHealth {
    /// There is none, by choice: no cache, [`Coherence::TimeBound`](crate::Coherence::TimeBound) or `SoleWriter`, or
    /// a `max_staleness` of zero. Or the store was shut down.
    Off,
    /// It is about to be opened for the first time.
    #[non_exhaustive]
    Opening {
        /// For how long now.
        #[serde(rename = "for_seconds", serialize_with = "seconds")]
        lasting: Duration,
    },
    /// It is open.
    #[non_exhaustive]
    Open {
        /// For how long now.
        #[serde(rename = "for_seconds", serialize_with = "seconds")]
        lasting: Duration,
        /// How long ago the moment is up to which every change is known to have reached the cache.
        #[serde(rename = "lag_seconds", serialize_with = "seconds")]
        lag: Duration,
    },
    /// It has broken off and is not open again.
    #[non_exhaustive]
    Lost {
        /// For how long now.
        #[serde(rename = "for_seconds", serialize_with = "seconds")]
        lasting: Duration,
        /// As of an open one.
        #[serde(rename = "lag_seconds", serialize_with = "seconds")]
        lag: Duration,
    },
    /// MongoDB has no change streams (a standalone server, or any that refuses one), or does not let the
    /// user open one. The log says which.
    #[non_exhaustive]
    Unavailable {
        /// For how long now.
        #[serde(rename = "for_seconds", serialize_with = "seconds")]
        lasting: Duration,
    },
}

/// Until when cached sessions may be served that nobody is known to have changed.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(tag = "state", rename_all = "snake_case")]
#[non_exhaustive]
pub enum LeaseHealth {
    /// It never ends: [`Coherence::SoleWriter`](crate::Coherence::SoleWriter).
    Unbounded,
    /// For some time yet, without being told of changes again.
    #[non_exhaustive]
    Fresh {
        /// For how long.
        #[serde(rename = "left_seconds", serialize_with = "seconds")]
        left: Duration,
    },
    /// Past `max_staleness`, since MongoDB does not answer: within `outage_grace`.
    #[non_exhaustive]
    Grace {
        /// For how long.
        #[serde(rename = "left_seconds", serialize_with = "seconds")]
        left: Duration,
    },
    /// No longer, but for what was read less than `max_staleness` ago.
    #[non_exhaustive]
    Expired {
        /// Since when.
        #[serde(rename = "for_seconds", serialize_with = "seconds")]
        lasting: Duration,
    },
    /// Each for `max_staleness` from when it was read: no stream vouches for them all.
    PerSession,
}

/// What the cache holds and may hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct CacheHealth {
    /// How many sessions are held.
    pub entries: u64,
    /// How much heap they take.
    pub bytes: u64,
    /// How much they may take.
    pub limit_bytes: u64,
    /// How many they may be, if that is bounded.
    pub limit_entries: Option<u64>,
}

impl Health {
    /// Whether this store can answer for sessions: it is open, and MongoDB answers, or what is cached
    /// may be served without it. For a readiness probe: no, and requests with a session are errors.
    ///
    /// When MongoDB is down for every instance at once, none is serving for long. A load balancer that
    /// takes out all of them then leaves nobody to say so, so let the pages that need no session work.
    #[must_use]
    pub fn is_serving(&self) -> bool {
        let answers = matches!(self.mongo, MongoHealth::Answers { .. });
        self.open && (answers || self.lease.is_some_and(LeaseHealth::holds))
    }

    /// Whether anything is not as it should be, whether users see it or not: MongoDB does not answer,
    /// the stream is not open, or the lease has lapsed. For an alarm, or a page of the operator's.
    ///
    /// A stream that is [`Off`](StreamHealth::Off) or [`Unavailable`](StreamHealth::Unavailable) is
    /// none that could be mended by waiting, and does not count.
    #[must_use]
    pub fn is_degraded(&self) -> bool {
        let stream =
            matches!(self.stream, StreamHealth::Opening { .. } | StreamHealth::Lost { .. });
        let lease =
            matches!(self.lease, Some(LeaseHealth::Grace { .. } | LeaseHealth::Expired { .. }));
        let answers = matches!(self.mongo, MongoHealth::Answers { .. });
        !self.open || !answers || stream || lease
    }

    pub(crate) fn new(open: bool, beat: Beat) -> Self {
        let mongo = match beat {
            _ if !open => MongoHealth::Closed,
            Beat::Answers(last_answer) => MongoHealth::Answers { last_answer },
            Beat::Silent(lasting) => MongoHealth::Unresponsive { lasting },
        };
        Self { open, mongo, stream: StreamHealth::Off, lease: None, cache: None }
    }

    /// Adds what is known of the cache, and of the stream that it follows.
    pub(crate) fn with_cache(
        self,
        cache: &cache::CacheStats,
        stream: Option<&StreamState>,
    ) -> Self {
        let held = CacheHealth {
            entries: cache.entries,
            bytes: cache.bytes,
            limit_bytes: cache.max_bytes,
            limit_entries: cache.max_entries,
        };
        let stream = stream.filter(|_| self.open);
        let is_told = stream.is_some_and(|stream| stream.phase().0 != Phase::Unavailable);
        let lease = self.open.then(|| LeaseHealth::of(cache, is_told));
        let stream = stream.map_or(StreamHealth::Off, |stream| StreamHealth::of(cache, stream));
        Self { stream, lease, cache: Some(held), ..self }
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
    fn of(cache: &cache::CacheStats, is_told: bool) -> Self {
        let Some(bound) = cache.max_staleness else { return Self::Unbounded };
        if !is_told || cache.synced_through == Moment::from_nanos(0) {
            return Self::PerSession;
        }
        let age = cache.now.since(cache.synced_through);
        if let Some(left) = bound.checked_sub(age) {
            return Self::Fresh { left };
        }
        let graced = cache.grace.and_then(|grace| bound.saturating_add(grace).checked_sub(age));
        graced.map_or(Self::Expired { lasting: age.saturating_sub(bound) }, |left| Self::Grace {
            left,
        })
    }

    /// Whether what is cached may be served though MongoDB does not answer.
    fn holds(self) -> bool {
        matches!(self, Self::Unbounded | Self::Fresh { .. } | Self::Grace { .. })
    }
}

fn seconds<S: Serializer>(duration: &Duration, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_f64(duration.as_secs_f64())
}
