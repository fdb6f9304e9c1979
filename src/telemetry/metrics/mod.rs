//! Every metric: what is counted, and the handles that the tiers hold.
//!
//! [`catalogue`] is the one list of names, labels, units and texts; what describes them to the recorder
//! and what documents them is made of it. Handles are resolved once, when a store is built, from the
//! recorder that is installed at that moment: install the exporter first.

mod cache;
mod catalogue;
mod handles;
mod labels;
mod mongo;
mod pulse;
mod series;
mod stream;
#[cfg(test)]
mod tests;

pub(crate) use crate::telemetry::metrics::cache::CacheMetrics;
#[cfg(test)]
pub(crate) use crate::telemetry::metrics::handles::Counter;
pub(crate) use crate::telemetry::metrics::handles::Gauge;
pub(crate) use crate::telemetry::metrics::labels::{
    Eviction, Fill, Gap, Invalidation, Retry, Verb,
};
pub(crate) use crate::telemetry::metrics::mongo::{MongoMetrics, Outcome};
pub(crate) use crate::telemetry::metrics::pulse::{Beat, Question};
pub(crate) use crate::telemetry::metrics::series::{Portion, Series};
pub(crate) use crate::telemetry::metrics::stream::{Phase, StreamMetrics, StreamState};
