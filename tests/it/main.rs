//! The integration tests: one binary, since each relinks the driver.
#![allow(clippy::expect_used, clippy::unwrap_used, reason = "a test ends where it fails")]

mod batches;
mod bounds;
mod cancellation;
mod common;
mod connect;
mod contract;
mod credentials;
mod examples;
mod expiry;
mod first_minutes;
mod follow;
mod grace;
mod guide;
mod http;
mod metrics;
mod order;
mod outage;
mod proxy;
mod races;
mod secrets;
mod touch;
mod verbs;
