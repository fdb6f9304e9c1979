//! Handles of the app's metrics recorder. The recorder is the app's code: if it panics, the value is lost, and no call
//! of the store fails.

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
    /// The counter that `register` returns, or one that counts nothing if the recorder panics.
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
    /// The gauge that `register` returns, or one that shows nothing if the recorder panics.
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
    /// The histogram that `register` returns, or one that records nothing if the recorder panics.
    pub(crate) fn new(register: impl FnOnce() -> metrics::Histogram) -> Self {
        Self(guarded(register).unwrap_or_else(metrics::Histogram::noop))
    }

    pub(crate) fn record(&self, value: impl IntoF64) {
        let _ = guarded(|| self.0.record(value));
    }
}

/// Calls the recorder. `None` if it panics.
pub(crate) fn guarded<T>(call: impl FnOnce() -> T) -> Option<T> {
    let answer = catch_unwind(AssertUnwindSafe(call));
    answer.inspect_err(|_| log_first_panic()).ok()
}

/// Logs the first panic of the process. The app's panic hook gets every one.
#[cold]
fn log_first_panic() {
    static IS_LOGGED: AtomicBool = AtomicBool::new(false);
    if !IS_LOGGED.swap(true, Ordering::Relaxed) {
        tracing::error!(
            "the app's metrics recorder panicked: the value is lost, and no session is affected. \
             Logged once"
        );
    }
}
