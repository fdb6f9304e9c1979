//! What several tests use.

use std::time::{Duration, Instant};

pub(crate) use session_test_support::PATIENCE;

/// A URI with a new database, on the server that all tests of this process share.
pub(crate) fn uri() -> String {
    let server = session_test_server::shared_fast().expect("a server to test on");
    server.uri_for(&session_test_server::fresh_database())
}

/// Polls `is_so` until it returns true. Fails after `PATIENCE`.
pub(crate) async fn eventually(what: &str, mut is_so: impl AsyncFnMut() -> bool) {
    let start = Instant::now();
    while !is_so().await {
        assert!(start.elapsed() < PATIENCE, "not within {PATIENCE:?}: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}
