//! What an operator sees: metrics, spans and log messages.

pub(crate) mod metrics;
pub(crate) mod spans;
