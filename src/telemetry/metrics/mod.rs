//! Every metric, and the handles by which the tiers record values.
//!
//! [`catalogue`] is the one list of names, labels, units and texts. The descriptions for the recorder and
//! `metrics.md` are made from it. A store resolves its handles once, when it is built, from the recorder that is
//! installed at that time. So the app installs its exporter first.

mod cache;
mod catalogue;
mod handles;
mod labels;
mod mongo;
mod series;
mod stream;
#[cfg(test)]
mod tests;

pub(crate) use crate::telemetry::metrics::cache::CacheMetrics;
#[cfg(test)]
pub(crate) use crate::telemetry::metrics::handles::Counter;
pub(crate) use crate::telemetry::metrics::handles::Gauge;
pub(crate) use crate::telemetry::metrics::labels::{
    Eviction, Fill, Gap, Invalidation, MergeResult, OverLimit, Retry, Verb,
};
pub(crate) use crate::telemetry::metrics::mongo::{MongoMetrics, Outcome};
pub(crate) use crate::telemetry::metrics::series::{Portion, Series};
pub(crate) use crate::telemetry::metrics::stream::{Phase, StreamMetrics, StreamState};
