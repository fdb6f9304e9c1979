//! The integration tests: one binary, since each relinks the driver.
#![allow(clippy::expect_used, clippy::unwrap_used, reason = "a test ends where it fails")]

#[cfg(feature = "tower-sessions-014")]
mod app;
mod batches;
mod bounds;
mod cancellation;
mod catalogue;
mod common;
mod connect;
mod contract;
mod credentials;
#[cfg(feature = "encryption")]
mod encryption;
mod events;
mod examples;
mod expiry;
mod first_minutes;
mod follow;
mod frozen;
mod grace;
mod guide;
mod health;
mod http;
mod likeness;
mod metrics;
mod observability;
mod order;
mod outage;
mod owner;
mod proxy;
mod queries;
mod races;
mod sabotage;
mod secrets;
mod seen;
mod touch;
mod trace;
mod verbs;
mod warming;
