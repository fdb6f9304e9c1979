//! Server-side sessions for [tower-sessions](https://docs.rs/tower-sessions) 0.15 (Axum 0.8) that
//! are kept in MongoDB and read at memory speed.
//!
//! - [`CachedMongoStore`]: a write-through cache in front of MongoDB. What most apps take.
//! - [`MongoStore`]: the MongoDB tier, a complete store by itself.
//!
//! ```no_run
//! use axum::{Router, routing::get};
//! use tower_sessions::{Session, SessionManagerLayer};
//! use tower_sessions_moka_mongodb_store::CachedMongoStore;
//!
//! async fn views(session: Session) -> Result<String, axum::http::StatusCode> {
//!     let failed = |_| axum::http::StatusCode::INTERNAL_SERVER_ERROR;
//!     let views = session.get::<u64>("views").await.map_err(failed)?.unwrap_or(0) + 1;
//!     session.insert("views", views).await.map_err(failed)?;
//!     Ok(format!("{views} views"))
//! }
//!
//! #[tokio::main]
//! async fn main() -> Result<(), Box<dyn std::error::Error>> {
//!     let store = CachedMongoStore::connect("mongodb://localhost/app").await?;
//!     let app = Router::new().route("/", get(views)).layer(SessionManagerLayer::new(store.clone()));
//!     let listener = tokio::net::TcpListener::bind("127.0.0.1:3000").await?;
//!     let stop = async { tokio::signal::ctrl_c().await.unwrap_or(()) };
//!     axum::serve(listener, app).with_graceful_shutdown(stop).await?;
//!     store.shutdown().await;
//!     Ok(())
//! }
//! ```
//!
//! # The guarantee
//!
//! After a log-out has returned, no later request on this instance sees the session. The other
//! instances hear of it through a MongoDB change stream, as a rule within milliseconds, and whatever
//! happens to the network, none serves a session as it was more than
//! [`max_staleness`](CachedMongoStoreBuilder::max_staleness) ago (but for the options that say
//! otherwise, `outage_grace` and `exclusive`, and a primary that is cut off from its set, until it steps
//! down). A save never brings a deleted
//! session back, an id that a client chose is never stored, and an outage is an error, never
//! "not logged in". [`CachedMongoStore`] says it in full.
//!
//! # Features
//!
//! | feature | what it adds |
//! |---|---|
//! | `import` | [`import`]: takes over the sessions that tower-sessions-mongodb-store 0.11 has written |
//! | `tower-sessions-014` | the same stores also implement `SessionStore` of tower-sessions-core 0.14, on which axum-login 0.18 and axum-messages 0.8 stand |
//!
//! None is on by default, and none changes what the rest does.
//!
//! # Metrics
//!
//! Counted through the [`metrics`](https://docs.rs/metrics) facade. Install the recorder before the
//! store is built. Every series is there from the start, at zero, but for those of the
//! change stream where none is followed (`session_store_stream_*` and
//! `session_store_cache_flushes_total`), and for histograms, which exporters may show with their first
//! value. With metrics-exporter-prometheus,
//! the durations are histograms once you give it buckets
//! (`set_buckets`), and without its HTTP listener your app must call `run_upkeep` now and then. Two
//! stores in one process add up in the same series, but for `session_store_stream_lag_seconds`, which
//! shows the one that was told last.
//!
//! | metric | labels | what |
//! |---|---|---|
//! | `session_store_loads_total` | `result`: `hit`, `miss`, `absent`, `shared`, `grace` | sessions asked for; `shared` waited for another load's read, `grace` was served at once in an outage |
//! | `session_store_lease_refusals_total` | | loads that found a session too old to be served, and so asked MongoDB |
//! | `session_store_grace_served_total` | | sessions served past their lease in an outage, as `outage_grace` allows: those of `result="grace"`, and those whose own read had failed |
//! | `session_store_cache_evictions_total` | `cause`: `size`, `expired` | entries that the cache let go by itself |
//! | `session_store_cache_flushes_total` | | how often the cache was emptied: a change stream was opened anew (once at the start), the collection is gone, or the stream may not be opened any more. A `clear()` is not counted |
//! | `session_store_cache_entries` | | sessions held |
//! | `session_store_cache_bytes`, `session_store_cache_limit_bytes` | | heap that they take, and may take |
//! | `session_store_stream_open` | | change streams that are open, one for each cached store |
//! | `session_store_stream_lag_seconds` | | how long ago the moment is up to which every change is known to have reached the cache; past `max_staleness`, cached sessions are refused |
//! | `session_store_stream_events_total` | `origin`: `own`, `other` | changes reported; an `other` evicts |
//! | `session_store_stream_resumes_total` | | streams that went on where they had broken off |
//! | `session_store_stream_gaps_total` | `cause`: `history_lost`, `collection_gone`, `refused` | streams that could not; `refused` says that the server would not go on from there, or not within the operation timeout |
//! | `session_store_touches_skipped_total` | | saves that were not sent: unchanged data, and an expiry within `touch_after` of the stored one |
//! | `session_store_mongo_together_size` | `verb`: `find`, `bulk` | how many calls left as one command since MongoDB was busy |
//! | `session_store_mongo_operations_total` | `verb`: `insert`, `replace`, `touch`, `bulk`, `find`, `remove`, `clear`, `count`, `list`, `expire`, `index`, `ping`; `outcome`: `ok`, `duplicate`, `timeout`, `unreachable`, `error` | operations sent to MongoDB |
//! | `session_store_mongo_operation_duration_seconds` | `verb` | how long they took |
//! | `session_store_saves_dropped_total` | | saves of a session that was gone |
//!
//! # Known limits
//!
#![doc = include_str!("limits.md")]
//!
//! # Where things are
//!
//! `tiers` joins the tiers, and `store` is what a user sees of that; `cache` is the memory tier, and
//! `cache/freshness` the rules by which an entry may stand there; `dispatch` decides what is sent at once and what together; `mongo` is the persistence tier;
//! `follow` keeps the one true to the other; `contract` speaks to tower-sessions.
//! `DESIGN.md` in the repository has the reasons.
#![cfg_attr(docsrs, feature(doc_cfg))]

mod backend;
mod cache;
mod clock;
mod contract;
mod dispatch;
mod error;
mod follow;
#[cfg(feature = "import")]
#[cfg_attr(docsrs, doc(cfg(feature = "import")))]
pub mod import;
mod key;
mod metrics;
mod mongo;
mod record;
#[cfg(test)]
mod simulation;
mod store;
mod sync;
mod tasks;
mod tiers;

/// The driver, whose `Client`, `Database` and `Collection` the builder takes.
pub use mongodb;

pub use self::cache::EvictionPolicy;
pub use self::error::{Error, ErrorKind, Result};
pub use self::key::SessionKey;
pub use self::mongo::{
    ExpiredRemoval, LiveSession, LiveSessions, MongoStore, MongoStoreBuilder, StoredSession,
};
pub use self::store::{
    CachedMongoStore, CachedMongoStoreBuilder, Event, EventKind, Events, SessionEvent, WarmUp,
    WarmUpLimit, Warmed,
};

/// The README's programs are compiled as doctests.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
