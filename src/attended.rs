//! A call that its caller runs, and that goes on in a task of its own if the caller leaves.
//!
//! A task for each call would do as well, but who waits for another task waits for a thread to wake
//! up, which takes as long as a good part of a round trip to the database.

use std::future::Future;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::task::{Context, Poll};

use tokio::runtime::Handle;
use tokio_util::task::task_tracker::TaskTrackerToken;

/// The rest of a call. Dropped before its end, it is spawned.
pub(crate) struct Attended<R: Send + 'static> {
    rest: Option<Rest<R>>,
    runtime: Handle,
    /// What is answered if the call panics.
    or: fn() -> R,
}

struct Rest<R> {
    call: Pin<Box<dyn Future<Output = R> + Send>>,
    counted: TaskTrackerToken,
}

impl<R: Send + 'static> Attended<R> {
    pub(super) fn new(
        call: impl Future<Output = R> + Send + 'static,
        counted: TaskTrackerToken,
        runtime: Handle,
        or: fn() -> R,
    ) -> Self {
        Self { rest: Some(Rest { call: Box::pin(call), counted }), runtime, or }
    }
}

impl<R: Send + 'static> Future for Attended<R> {
    type Output = R;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<R> {
        let this = &mut *self;
        let Some(rest) = &mut this.rest else { return Poll::Ready((this.or)()) };
        // The caller may be on another runtime, or on none.
        let entered = this.runtime.enter();
        let polled = catch_unwind(AssertUnwindSafe(|| rest.call.as_mut().poll(context)));
        drop(entered);
        match polled {
            Ok(Poll::Pending) => Poll::Pending,
            Ok(Poll::Ready(outcome)) => {
                this.rest = None;
                Poll::Ready(outcome)
            }
            Err(_) => {
                this.rest = None;
                Poll::Ready((this.or)())
            }
        }
    }
}

impl<R: Send + 'static> Drop for Attended<R> {
    fn drop(&mut self) {
        if let Some(Rest { call, counted }) = self.rest.take() {
            drop(self.runtime.spawn(async move {
                drop(call.await);
                drop(counted);
            }));
        }
    }
}
