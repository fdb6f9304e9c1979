//! `Series`: registers the metrics of the catalogue for one store, with the store's name as a label.

use std::sync::Arc;

use metrics::{Label, counter, gauge, histogram};

use crate::telemetry::metrics::catalogue::Metric;
use crate::telemetry::metrics::handles::{Counter, Gauge, Histogram};

/// The label of a store's series: its name, if it has one.
#[derive(Clone, Debug, Default)]
pub(crate) struct Series(Option<Arc<str>>);

impl Series {
    pub(crate) fn of(store: Option<&str>) -> Self {
        Self(store.map(Arc::from))
    }

    pub(crate) fn counter(&self, metric: &Metric) -> Counter {
        self.counter_of(metric, &[])
    }

    pub(crate) fn gauge(&self, metric: &Metric) -> Gauge {
        Gauge::new(|| gauge!(metric.name, self.labels(metric, &[])))
    }

    /// One counter for each value of the metric's only label.
    pub(crate) fn counters<const N: usize>(&self, metric: &Metric) -> [Counter; N] {
        std::array::from_fn(|value| self.counter_of(metric, &[value]))
    }

    /// The counter for one value of each label. `values` are their indexes.
    pub(crate) fn counter_of(&self, metric: &Metric, values: &[usize]) -> Counter {
        Counter::new(|| counter!(metric.name, self.labels(metric, values)))
    }

    pub(crate) fn histogram(&self, metric: &Metric) -> Histogram {
        Histogram::new(|| histogram!(metric.name, self.labels(metric, &[])))
    }

    /// One histogram for each value of the metric's only label.
    pub(crate) fn histograms<const N: usize>(&self, metric: &Metric) -> [Histogram; N] {
        let of = |value| Histogram::new(|| histogram!(metric.name, self.labels(metric, &[value])));
        std::array::from_fn(of)
    }

    fn labels(&self, metric: &Metric, values: &[usize]) -> Vec<Label> {
        let of_metric = metric.labels.iter().zip(values).filter_map(|(label, value)| {
            Some(Label::from_static_parts(label.name, label.values.get(*value)?.0))
        });
        let of_store = self.0.iter().map(|name| Label::new("store", Arc::clone(name)));
        of_metric.chain(of_store).collect()
    }
}

/// This store's part of a gauge that other stores may share. Dropping it subtracts the part again.
#[derive(Debug)]
pub(crate) struct Portion {
    gauge: Gauge,
    held: f64,
}

impl Portion {
    pub(crate) fn new(gauge: Gauge, value: u64) -> Self {
        let mut portion = Self { gauge, held: 0.0 };
        portion.set(value);
        portion
    }

    pub(crate) fn set(&mut self, value: u64) {
        #[allow(clippy::cast_precision_loss, reason = "a gauge is a float")]
        let value = value as f64;
        self.gauge.increment(value - self.held);
        self.held = value;
    }
}

impl Drop for Portion {
    fn drop(&mut self) {
        self.gauge.decrement(self.held);
    }
}
