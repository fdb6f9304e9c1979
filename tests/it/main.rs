//! The integration tests. They are one binary, since each binary links the driver again.
#![allow(clippy::expect_used, clippy::unwrap_used, reason = "a test ends where it fails")]

mod absolute_lifetime;
mod batches;
mod bounds;
mod build;
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
mod filters;
mod follow;
mod foreign;
mod frozen;
mod grace;
mod guide;
mod handed_in;
mod health;
mod http;
mod index_upkeep;
mod likeness;
mod merges;
mod messages;
mod metrics;
mod observability;
mod order;
mod outage;
mod owner;
mod process_end;
mod queries;
mod races;
mod runtimes;
mod secrets;
mod server_errors;
mod stored_data;
mod stored_types;
mod touch;
mod trace;
mod user_code;
mod verbs;
mod warming;

#[cfg(all(unix, feature = "tower-sessions-014"))]
use session_test_support::app;
use session_test_support::proxy;
