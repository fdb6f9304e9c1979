//! A session store for [tower-sessions](https://docs.rs/tower-sessions) 0.15 and 0.14 (Axum 0.8): a
//! write-through [moka](https://docs.rs/moka) cache in front of MongoDB, kept true by a change stream.
//! [`CachedMongoStore`] is the store for most apps. [`MongoStore`] is its MongoDB tier, and a complete
//! store by itself.
//!
//! ```no_run
//! use axum::{Router, routing::get};
//! use tower_sessions::{Session, SessionManagerLayer};
//! use tower_sessions_moka_mongodb_store::{CachedMongoStore, RequestScopeLayer};
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
//!     let app = Router::new()
//!         .route("/", get(views))
//!         .layer(SessionManagerLayer::new(store.clone()))
//!         .layer(RequestScopeLayer::new()); // parallel requests keep each other's changes
//!     let listener = tokio::net::TcpListener::bind("127.0.0.1:3000").await?;
//!     // A container sends SIGTERM: the guide's page `getting_started` handles it as well.
//!     let stop = async { tokio::signal::ctrl_c().await.unwrap_or(()) };
//!     axum::serve(listener, app).with_graceful_shutdown(stop).await?;
//!     store.shutdown().await;
//!     Ok(())
//! }
//! ```
//!
//! # The guarantee
//!
//! - A log-out is final: once it has returned, no later request on this instance sees the session.
//! - A change stream invalidates the cached entries of the other instances, usually within milliseconds.
//!   Whatever the network does, no instance serves a session as it was longer than
//!   [`max_staleness`](CachedMongoStoreBuilder::max_staleness) ago.
//! - A save never brings a deleted session back.
//! - An id that a client chose is never stored.
//! - With [`RequestScopeLayer`], parallel requests of one session keep each other's changes, on every instance.
//! - An outage is an error, never "not logged in".
//!
//! [`CachedMongoStore`] states the guarantee in full, with its exceptions.
//!
//! # The guide
//!
//! [`guide`] has a page for each question: [getting started](guide::getting_started),
//! [choosing settings](guide::choosing), [several instances](guide::instances),
//! [parallel requests](guide::parallel_requests), [deployments](guide::deployments),
//! [outages](guide::outages), [security](guide::security),
//! [metrics](guide::metrics) for the engineer on call, [coming from](guide::coming_from) another store,
//! [troubleshooting](guide::troubleshooting) and [plots](guide::plots).
//!
//! # Features
//!
//! | feature | what it adds |
//! |---|---|
//! | `tower-sessions-014` | The same stores also implement `SessionStore` of tower-sessions-core 0.14, which axum-login 0.18 and axum-messages 0.8 use. |
//! | `encryption` | `MongoStoreBuilder::encryption` encrypts the data of sessions before it is stored. |
//! | `import` | `import::tower_sessions_mongodb_store` imports the sessions that tower-sessions-mongodb-store 0.11 has written. |
//!
//! No feature is on by default. A feature adds to the crate and changes nothing else in it.
//!
//! # Layout
//!
//! These are the modules of `src/`.
//!
//! - `tower` implements the `SessionStore` trait of tower-sessions 0.15 and 0.14 for both stores.
//! - `store` holds [`CachedMongoStore`], its builder, owners, warm-up and events, and the order in which a
//!   call asks and changes the two tiers.
//! - `cache` keeps sessions in memory within a bound in bytes. Its module `coherence` decides whether an
//!   entry may be inserted and served.
//! - `request_scope` holds [`RequestScopeLayer`]. It notes what a request has loaded, computes what the request
//!   has changed, and applies the changes to a newer state.
//! - `invalidation` follows the change stream, invalidates the entries that it reports, and computes the
//!   watermark, the point up to which the stream has reported every change.
//! - `backend` says what the stores ask of a persistence tier.
//! - `batching` sends concurrent loads and saves to MongoDB in batches, and keeps the saves of one session
//!   in order.
//! - `mongo` holds [`MongoStore`], its builder, the operations on the collection, the stored format, the
//!   indexes and the change stream's cursor.
//! - `import` imports the sessions of another store.
//! - `session` defines a session, its id, key, handle, owner and revision, without I/O.
//! - `availability` decides whether MongoDB answers, for `outage_grace`, [`Health`] and the log.
//! - `health` defines [`Health`], the snapshot that both stores return.
//! - `runtime` runs every call in a task of its own, under the operation timeout.
//! - `telemetry` defines every metric and span.
//! - `error`, `time` and `sync` define the errors, the two clocks, and the locks that the model check
//!   replaces with loom's.
//! - `guide` holds the guide's pages.
//! - `simulation` and `model_check` test the store, and are compiled for tests only.
//! - `internals` and `fuzzing` are what benches and fuzz targets may call.
//!
//! `ARCHITECTURE.md` in the repository describes how the parts work together, and `docs/decisions` says why
//! they are so.
//!
//! # Metrics
//!
//! The store counts through the [`metrics`](https://docs.rs/metrics) facade. Install the recorder before
//! you build the store.
//!
//! - Once a store is built, every series of its tiers exists, at zero, with each value of its labels.
//!   A histogram may appear with its first value only.
//! - An app with several stores gives each a [name](MongoStoreBuilder::name). All series of a store carry
//!   its name as the label `store`. Stores without a name add up in the same series. Two gauges cannot add
//!   up, `session_store_stream_lag_seconds` and `session_store_max_staleness_seconds`: they show the store
//!   that reported last.
//! - With metrics-exporter-prometheus, durations are histograms only if you give the exporter buckets
//!   (`set_buckets`). Without its HTTP listener, your app must call `run_upkeep` regularly.
//!
#![doc = include_str!("metrics.md")]
//!
//! # Traces and logs
//!
//! Each call of tower-sessions and each call of the stores' own has a span at level debug, such as
//! `session_store.load`. The streams have none: those that list sessions, and `reencrypt`. Below the span of
//! a call, each command to MongoDB has a span with the attributes of OpenTelemetry's
//! [conventions](https://opentelemetry.io/docs/specs/semconv/database/mongodb/). Its `error.type` is the
//! server's error code, or else the [kind](ErrorKind) in lower case. The span of a command that carries the
//! calls of several requests is a root. No span or event contains an id or session data.
//!
//! These events are warnings, since an operator must know of them:
//!
//! - a save was dropped;
//! - [`RequestScopeLayer`] is inside of the `SessionManagerLayer`;
//! - an outage began or ended;
//! - a change stream was lost, is back, has a gap, or cannot be opened;
//! - an expiry index is not as it should be;
//! - a sweep of expired sessions failed.
//!
//! # Known limits
//!
#![doc = include_str!("limits.md")]
#![cfg_attr(docsrs, feature(doc_cfg))]

mod availability;
mod backend;
mod batching;
mod cache;
mod error;
#[cfg(any(test, fuzzing))]
#[doc(hidden)]
pub mod fuzzing;
#[cfg(any(doc, doctest))]
pub mod guide;
mod health;
#[cfg(feature = "import")]
#[cfg_attr(docsrs, doc(cfg(feature = "import")))]
pub mod import;
#[cfg(feature = "internals")]
#[doc(hidden)]
pub mod internals;
mod invalidation;
#[cfg(all(test, model_check))]
mod model_check;
mod mongo;
mod request_scope;
mod runtime;
mod session;
#[cfg(test)]
mod simulation;
mod store;
mod sync;
mod telemetry;
mod time;
mod tower;

/// The driver, whose `Client`, `Database` and `Collection` the builder takes.
pub use mongodb;

pub use crate::cache::{Coherence, EvictionPolicy};
pub use crate::error::{Error, ErrorKind, Result};
pub use crate::health::{CacheHealth, Health, LeaseHealth, MongoHealth, StreamHealth};
pub use crate::mongo::{
    ExpiredRemoval, LiveSession, LiveSessions, MongoStore, MongoStoreBuilder, StoredSession,
    data_equals, data_path, owner_equals,
};
#[cfg(feature = "encryption")]
#[cfg_attr(docsrs, doc(cfg(feature = "encryption")))]
pub use crate::mongo::{Key, Keys, Reencrypted, Reencryption};
pub use crate::request_scope::{RequestScope, RequestScopeLayer, in_request_scope};
pub use crate::session::handle::SessionHandle;
pub use crate::session::id::SessionKey;
pub use crate::session::owner::Owner;
pub use crate::store::{
    CachedMongoStore, CachedMongoStoreBuilder, Event, EventKind, Events, SessionEvent, WarmUp,
    WarmUpLimit, Warmed,
};

/// Compiles the README's programs as doctests.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};
    use std::path::Path;
    use std::{fs, mem};

    /// Modules for tests, benches and documentation. They may import any other module.
    const OUTSIDE: [&str; 6] =
        ["fuzzing", "guide", "internals", "lib", "model_check", "simulation"];

    /// Adds each name that follows `crate::` in the code below `path`, tests left out.
    fn add_imports(path: &Path, found: &mut BTreeSet<String>) {
        if path.is_dir() {
            for entry in fs::read_dir(path).unwrap() {
                add_imports(&entry.unwrap().path(), found);
            }
        }
        let name = path.file_stem().unwrap_or_default();
        let is_code = path.extension().is_some_and(|it| it == "rs") && name != "fuzzing";
        if !is_code || path.iter().any(|part| part == "tests" || part == "tests.rs") {
            return;
        }
        let source = fs::read_to_string(path).unwrap();
        let code = source.split("#[cfg(test)]\nmod tests").next().unwrap_or_default();
        for line in code.lines().filter(|line| !line.trim_start().starts_with("//")) {
            let is_in_name = |it: char| it.is_alphanumeric() || it == '_';
            let names = line.split("crate::").skip(1).map(|rest| rest.split(|it| !is_in_name(it)));
            found.extend(names.filter_map(|mut name| name.next().map(str::to_owned)));
        }
    }

    /// `ARCHITECTURE.md` gives the order.
    #[test]
    fn the_modules_import_each_other_in_one_direction() {
        let mut imports = BTreeMap::new();
        for entry in fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("src")).unwrap() {
            let path = entry.unwrap().path();
            let module = path.file_stem().unwrap().to_str().unwrap().to_owned();
            let found: &mut BTreeSet<String> = imports.entry(module.clone()).or_default();
            add_imports(&path, found);
            found.remove(&module);
        }
        for outside in OUTSIDE {
            imports.remove(outside);
        }
        for (module, found) in &imports {
            // `crate::Name` would import from `lib.rs`, which imports every module.
            let is_known = |name: &str| imports.contains_key(name) || OUTSIDE.contains(&name);
            let unknown: Vec<_> = found.iter().filter(|name| !is_known(name)).collect();
            assert!(unknown.is_empty(), "{module}: import {unknown:?} from their modules");
        }
        // Takes away the modules that import nothing, until none is left, or only a circle and its users.
        let mut left = 0;
        while mem::replace(&mut left, imports.len()) != imports.len() {
            let modules: BTreeSet<_> = imports.keys().cloned().collect();
            imports.retain(|_, found| found.iter().any(|name| modules.contains(name)));
        }
        assert!(imports.is_empty(), "there is a circle among these modules: {imports:#?}");
    }
}
