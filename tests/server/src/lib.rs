//! A MongoDB server for tests, examples and benches. The crate finds or installs one automatically.
//!
//! It tries these, in this order:
//!
//! 1. the server of `MONGODB_URI`, if that is set,
//! 2. a `mongod` on PATH,
//! 3. `secantusd-rs` on PATH or in the cache,
//! 4. `secantusd-py`, the same server in Python, in the cache,
//! 5. `secantusd-py`, installed into the cache with pip, which takes about a minute,
//! 6. `secantusd-rs`, built into the cache with cargo, which takes some minutes and needs `cmake`.
//!
//! With [`Builder::fast`], which tests and benches use, 6 comes before 4 and 5. If one fails, the
//! crate tries the next one. One line on stderr says what was done and why. The variable
//! `SESSION_TEST_SERVER` names one kind to use: `mongod`, `rust` or `python`. The cache is
//! `$SESSION_TEST_SERVER_CACHE`, else `tower-sessions-moka-mongodb-store` in `$XDG_CACHE_HOME` or
//! `~/.cache`.
//!
//! ```no_run
//! # fn main() -> Result<(), session_test_server::Error> {
//! let server = session_test_server::shared()?;
//! let uri = server.uri_for(&session_test_server::fresh_database());
//! # Ok(())
//! # }
//! ```
//!
//! A started server listens on loopback only, and acts as a replica set of one member, so change
//! streams and transactions work. It ends with the process, however the process ends.
//!
//! All functions block the thread. That does not matter in a `#[tokio::test]`, which has its own
//! runtime. Elsewhere, call them inside `tokio::task::spawn_blocking`.

#![allow(clippy::doc_markdown, reason = "MongoDB is a name and not code")]

mod error;
mod server;
mod uri;

#[cfg(unix)]
mod find;
#[cfg(unix)]
mod hello;
#[cfg(unix)]
mod install;
#[cfg(unix)]
mod process;
#[cfg(unix)]
mod shell;
#[cfg(unix)]
mod wire;

#[cfg(not(unix))]
mod other;

use std::hash::{BuildHasher, RandomState};
use std::io::Write;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};

#[cfg(not(unix))]
use other as process;

pub use error::Error;
pub use server::{Builder, TestServer};
pub use uri::with_option;

/// The user of a server with [`Builder::auth`].
pub const USER: &str = "tester";
/// The password of [`USER`]. It is not secret: it only protects test data on loopback.
pub const PASSWORD: &str = "loopback-only";

/// The prefix of all names of [`fresh_database`]. It tells leftovers on a server that stays
/// (`MONGODB_URI`) from real data.
pub const DATABASE_PREFIX: &str = "session_test_";

/// The kinds of servers this crate can start.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Kind {
    /// MongoDB's own server.
    Mongod,
    /// `secantusd-rs`, a compatible server in Rust.
    SecantusRs,
    /// `secantusd-py`, the same server in Python.
    SecantusPy,
}

/// The server that all users in this process share. The first call starts it.
///
/// It cannot be stopped or paused. [`TestServer::builder`] makes a server that can.
///
/// # Errors
///
/// If `MONGODB_URI` is set and no server answers there, or no server could be found, installed or
/// started. All later calls return the same error.
pub fn shared() -> Result<&'static TestServer, Error> {
    shared_of(TestServer::builder())
}

/// The [`shared`] server for tests and benches: see [`Builder::fast`].
///
/// # Errors
///
/// Those of [`shared`].
pub fn shared_fast() -> Result<&'static TestServer, Error> {
    shared_of(TestServer::builder().fast(true))
}

/// The first call decides which server it is.
fn shared_of(builder: Builder) -> Result<&'static TestServer, Error> {
    static SHARED: OnceLock<Result<TestServer, Error>> = OnceLock::new();

    let server = SHARED.get_or_init(|| match std::env::var("MONGODB_URI") {
        Ok(uri) if !uri.trim().is_empty() => TestServer::external(uri.trim().to_owned()),
        Err(std::env::VarError::NotUnicode(_)) => {
            Err(Error::External("it is not UTF-8".to_owned()))
        }
        _ => builder.start(),
    });
    server.as_ref().map_err(Clone::clone)
}

/// The connection string of the [`shared`] server.
///
/// # Errors
///
/// Those of [`shared`].
pub fn uri() -> Result<String, Error> {
    shared().map(|server| server.uri().to_owned())
}

/// A database name that no other test, process or machine uses.
#[must_use]
pub fn fresh_database() -> String {
    static PROCESS: OnceLock<u64> = OnceLock::new();
    static COUNT: AtomicU32 = AtomicU32::new(0);

    // The standard library has only this source of randomness. The id and the time are for systems
    // where it is weak.
    let process = PROCESS.get_or_init(|| {
        RandomState::new().hash_one((std::process::id(), std::time::SystemTime::now()))
    });
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    format!("{DATABASE_PREFIX}{process:016x}_{count}")
}

/// Finds the program of an own server of this kind, or of the best kind, and installs it if needed.
/// Does not start it. Returns its name and version.
///
/// # Errors
///
/// If there is none and none can be installed.
pub fn install(kind: Option<Kind>) -> Result<String, Error> {
    #[cfg(unix)]
    return find::program(kind, false).map(|program| program.title);
    #[cfg(not(unix))]
    return Builder { kind, ..Builder::default() }.start().map(|server| server.description());
}

/// Writes one line to stderr.
///
/// It does not use `eprintln!`: the test harness would capture that until the test fails, but the
/// user should see an installation of several minutes while it runs.
fn say(text: &str) {
    let line = format!("session-test-server: {text}\n");
    let _ = std::io::stderr().write_all(line.as_bytes());
}
