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
//!     // In a container SIGTERM as well: see the guide.
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
//! # The guide
//!
//! [`guide`] has long answers: [getting started](guide::getting_started),
//! [choosing settings](guide::choosing), [several instances](guide::instances),
//! [deployments](guide::deployments), [outages](guide::outages), [security](guide::security),
//! [metrics](guide::metrics) for who is on call, [coming from](guide::coming_from) another store,
//! [troubleshooting](guide::troubleshooting) and [plots](guide::plots).
//!
//! # Features
//!
//! | feature | what it adds |
//! |---|---|
//! | `import` | `import::tower_sessions_mongodb_store`: takes over the sessions that tower-sessions-mongodb-store 0.11 has written |
//! | `tower-sessions-014` | the same stores also implement `SessionStore` of tower-sessions-core 0.14, on which axum-login 0.18 and axum-messages 0.8 stand |
//! | `encryption` | `MongoStoreBuilder::encryption`: sessions' data is encrypted before it is stored |
//!
//! None is on by default, and none changes what the rest does.
//!
//! # Metrics
//!
//! Counted through the [`metrics`](https://docs.rs/metrics) facade. Install the recorder before the
//! store is built. From then on every series of its tiers is there, at zero, with each value of its
//! labels; histograms may be shown with their first value only. An app with several stores gives each a
//! [name](MongoStoreBuilder::name), which all its series carry as the label `store`; what unnamed ones
//! count adds up, but for `session_store_stream_lag_seconds` and `session_store_max_staleness_seconds`,
//! of which the one told last is seen. With metrics-exporter-prometheus, the durations are histograms
//! once you give it buckets (`set_buckets`), and without its HTTP listener your app must call
//! `run_upkeep` now and then.
//!
#![doc = include_str!("metrics.md")]
//!
//! # Traces and logs
//!
//! The calls of tower-sessions and those of the stores' own have a span each at debug (not the streams: those that list
//! sessions, and `reencrypt`), `session_store.load` say, and below it each command to MongoDB one
//! with the attributes of OpenTelemetry's
//! [conventions](https://opentelemetry.io/docs/specs/semconv/database/mongodb/); their `error.type` is
//! the server's error code, or else the [kind](ErrorKind) in small letters. A command that carries the
//! calls of several requests is a root. No span or event has an id or session data. What an operator must
//! know is a warning: a dropped save, an outage's begin and end, a stream that is lost, back, has a gap
//! or cannot be had, an expiry index that is not as it should be, a sweep that failed.
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
//! `ARCHITECTURE.md` in the repository has the invariants, and `docs/decisions` has the reasons.
#![cfg_attr(docsrs, feature(doc_cfg))]

mod backend;
mod cache;
mod clock;
mod contract;
mod dispatch;
mod error;
mod follow;
#[cfg(any(test, fuzzing))]
#[doc(hidden)]
pub mod fuzzing;
#[cfg(any(doc, doctest))]
pub mod guide;
mod handle;
mod health;
#[cfg(feature = "import")]
#[cfg_attr(docsrs, doc(cfg(feature = "import")))]
pub mod import;
#[cfg(feature = "internals")]
#[doc(hidden)]
pub mod internals;
mod key;
mod metrics;
mod mongo;
mod number;
mod owner;
mod record;
mod removals;
#[cfg(test)]
mod samples;
#[cfg(test)]
mod simulation;
mod store;
mod sync;
mod tasks;
mod tiers;
mod trace;

/// The driver, whose `Client`, `Database` and `Collection` the builder takes.
pub use mongodb;

pub use self::cache::EvictionPolicy;
pub use self::error::{Error, ErrorKind, Result};
pub use self::handle::SessionHandle;
pub use self::health::{CacheHealth, Health, LeaseHealth, MongoHealth, StreamHealth};
pub use self::key::SessionKey;
pub use self::mongo::{
    ExpiredRemoval, LiveSession, LiveSessions, MongoStore, MongoStoreBuilder, StoredSession,
    data_equals, data_path, owner_equals,
};
#[cfg(feature = "encryption")]
#[cfg_attr(docsrs, doc(cfg(feature = "encryption")))]
pub use self::mongo::{Key, Keys, Reencrypted, Reencryption};
pub use self::owner::Owner;
pub use self::store::{
    CachedMongoStore, CachedMongoStoreBuilder, Event, EventKind, Events, SessionEvent, WarmUp,
    WarmUpLimit, Warmed,
};

/// The README's programs are compiled as doctests.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
