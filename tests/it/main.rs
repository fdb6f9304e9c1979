//! The integration tests: one binary, since each relinks the driver.
#![allow(clippy::expect_used, clippy::unwrap_used, reason = "a test ends where it fails")]

mod batches;
mod bounds;
mod cancellation;
mod common;
mod connect;
mod contract;
mod credentials;
mod events;
mod examples;
mod expiry;
mod follow;
mod frozen;
mod grace;
mod http;
mod metrics;
mod order;
mod outage;
mod proxy;
mod races;
mod secrets;
mod touch;
mod verbs;
mod warming;
