//! What several test programs share: the example apps as processes, and the proxies in front of the
//! shared server.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "helpers of tests, which may panic")]
#![allow(
    missing_docs,
    missing_debug_implementations,
    clippy::missing_errors_doc,
    clippy::missing_panics_doc,
    clippy::must_use_candidate,
    clippy::new_without_default,
    reason = "the tests of this workspace alone use it"
)]

use std::time::Duration;

#[cfg(unix)]
pub mod app;
pub mod proxy;

/// Longer than any operation takes on a slow machine. After this time, a test fails.
pub const PATIENCE: Duration = Duration::from_secs(60);
