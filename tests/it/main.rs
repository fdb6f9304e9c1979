//! The integration tests: one binary, since each relinks the driver.
#![allow(clippy::expect_used, clippy::unwrap_used, reason = "a test ends where it fails")]

#[cfg(feature = "tower-sessions-014")]
mod account;
mod app;
mod batches;
mod bounds;
mod cancellation;
mod catalogue;
mod common;
mod connect;
mod contract;
mod credentials;
mod examples;
mod expiry;
mod follow;
mod grace;
mod health;
mod http;
mod metrics;
mod observability;
mod order;
mod outage;
mod owner;
mod proxy;
mod queries;
mod races;
mod secrets;
mod touch;
mod trace;
mod verbs;
