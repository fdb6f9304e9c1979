//! What an operator sees: metrics and spans.

pub(crate) mod metrics;
pub(crate) mod spans;
