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

pub(crate) use self::cache::CacheMetrics;
#[cfg(test)]
pub(crate) use self::handles::Counter;
pub(crate) use self::handles::Gauge;
pub(crate) use self::labels::{Eviction, Fill, Gap, Invalidation, Retry, Verb};
pub(crate) use self::mongo::{MongoMetrics, Outcome};
pub(crate) use self::pulse::{Beat, Question};
pub(crate) use self::series::{Portion, Series};
pub(crate) use self::stream::{Phase, StreamMetrics, StreamState};
