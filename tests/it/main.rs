//! The integration tests: one binary, since each relinks the driver.

mod common;
mod connect;
mod contract;
mod examples;
mod expiry;
mod http;
mod metrics;
mod verbs;
