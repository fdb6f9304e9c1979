//! `SessionCollection`: the collection, and what every operation on it needs.

use std::sync::Arc;
use std::time::Duration;

use bson::Document;
use mongodb::Collection;
use tokio_util::sync::CancellationToken;

use crate::mongo::causal::CausalSessions;
use crate::mongo::codec::DataFormat;
use crate::mongo::owner_field::OwnerFn;
use crate::runtime::Tasks;
use crate::telemetry::metrics::MongoMetrics;
use crate::time::Clock;

/// The collection and what every operation on it needs. Cheap to clone into a task.
#[derive(Clone)]
pub(crate) struct SessionCollection {
    pub(crate) documents: Collection<Document>,
    pub(crate) timeout: Duration,
    pub(crate) ttl: Option<Duration>,
    pub(crate) format: DataFormat,
    pub(crate) owner: Option<OwnerFn>,
    pub(crate) clock: Clock,
    pub(crate) metrics: Arc<MongoMetrics>,
    pub(crate) causal: CausalSessions,
    pub(crate) tasks: Tasks,
    pub(crate) closed: CancellationToken,
}
