//! Handles of the app's metrics recorder, which is code of the app. A panic in it costs the value that
//! it was told, and nothing else: no call of the store fails for it.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};

use metrics::IntoF64;

/// A counter.
#[derive(Clone, Debug)]
pub(crate) struct Counter(metrics::Counter);

/// A gauge.
#[derive(Clone, Debug)]
pub(crate) struct Gauge(metrics::Gauge);

/// A histogram.
#[derive(Clone, Debug)]
pub(crate) struct Histogram(metrics::Histogram);

impl Counter {
    /// A counter that `register` gets from the recorder, or one that counts nothing.
    pub(crate) fn new(register: impl FnOnce() -> metrics::Counter) -> Self {
        Self(guarded(register).unwrap_or_else(metrics::Counter::noop))
    }

    #[cfg(test)]
    pub(crate) fn noop() -> Self {
        Self(metrics::Counter::noop())
    }

    pub(crate) fn increment(&self, value: u64) {
        let _ = guarded(|| self.0.increment(value));
    }
}

impl Gauge {
    /// A gauge that `register` gets from the recorder, or one that shows nothing.
    pub(crate) fn new(register: impl FnOnce() -> metrics::Gauge) -> Self {
        Self(guarded(register).unwrap_or_else(metrics::Gauge::noop))
    }

    pub(crate) fn increment(&self, value: impl IntoF64) {
        let _ = guarded(|| self.0.increment(value));
    }

    pub(crate) fn decrement(&self, value: impl IntoF64) {
        let _ = guarded(|| self.0.decrement(value));
    }

    pub(crate) fn set(&self, value: impl IntoF64) {
        let _ = guarded(|| self.0.set(value));
    }
}

impl Histogram {
    /// A histogram that `register` gets from the recorder, or one that takes nothing.
    pub(crate) fn new(register: impl FnOnce() -> metrics::Histogram) -> Self {
        Self(guarded(register).unwrap_or_else(metrics::Histogram::noop))
    }

    pub(crate) fn record(&self, value: impl IntoF64) {
        let _ = guarded(|| self.0.record(value));
    }
}

/// What the recorder answers; `None` if it panics.
pub(crate) fn guarded<T>(call: impl FnOnce() -> T) -> Option<T> {
    let answer = catch_unwind(AssertUnwindSafe(call));
    answer.inspect_err(|_| complain()).ok()
}

/// Logs the first panic of the process. The app's panic hook is told of each.
#[cold]
fn complain() {
    static COMPLAINED: AtomicBool = AtomicBool::new(false);
    if !COMPLAINED.swap(true, Ordering::Relaxed) {
        tracing::error!(
            "the app's metrics recorder panicked: what it was told is lost, and no session is. This \
             is logged once"
        );
    }
}
