//! [`Tasks`]: runs each call to MongoDB in a task of its own, under the operation timeout.
//!
//! An axum handler may be dropped at any await, when its client goes away. The driver asks that its
//! futures be polled to completion. So no caller holds a future of the driver: it waits for a task. What
//! must happen at the end of a call happens in that task, even if the caller has gone.
//!
//! Only the change streams drop futures of the driver, at their deadline and when they end. Those futures
//! only read. At most they leave a connection, which the driver closes, and a cursor, which times out.
//!
//! A caller may be polled by an executor that has no timer, or on another runtime. So everything that
//! needs a timer or a socket runs in a task on the runtime that the store was built on. Callers wait for
//! channels only.

use std::future::{Future, poll_fn};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::Poll;
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{Instrument, Span};

use crate::availability::Availability;
use crate::error::{Error, ErrorKind, Result};
use crate::sync;

/// Starts the tasks of a store, and ends them at shutdown. Clones share them.
#[derive(Clone, Debug)]
pub(crate) struct Tasks {
    runtime: Handle,
    running: TaskTracker,
    /// The same as `closed`, for each load: reading it takes no lock, unlike reading the token.
    is_shut_down: Arc<AtomicBool>,
    /// Cancelled when the store is shut down, or its last handle was dropped.
    closed: CancellationToken,
    /// Cancelled when the app shuts down the client that it handed in.
    client_closed: CancellationToken,
    timeout: Duration,
    availability: Availability,
}

impl Tasks {
    pub(crate) fn new(runtime: Handle, timeout: Duration, availability: Availability) -> Self {
        Self {
            runtime,
            running: TaskTracker::new(),
            is_shut_down: Arc::default(),
            closed: CancellationToken::new(),
            client_closed: CancellationToken::new(),
            timeout,
            availability,
        }
    }

    /// Starts `call` in a task and passes its outcome to `end`: its result, a timeout error at the
    /// deadline, or an error if the call panics. `end` runs exactly once, unless the runtime goes away.
    /// The caller waits at most `time_left`.
    ///
    /// A call that passes its deadline is not dropped at once. It may run for up to twice the timeout, so
    /// that the driver can end its connection and session cleanly. Then `late` runs, since the call may
    /// have changed something after all.
    ///
    /// The outcome is reported to [`availability`](Self::availability) before `end` gets it.
    pub(crate) fn start_for<T: Send + 'static>(
        &self,
        time_left: Duration,
        call: impl Future<Output = Result<T>> + Send + 'static,
        end: impl FnOnce(Result<T>) + Send + 'static,
        late: impl FnOnce() + Send + 'static,
    ) {
        self.start_observed(|_| true, time_left, call, end, late);
    }

    /// [`start_for`](Self::start_for), where `is_evidence` decides whether the outcome is reported.
    fn start_observed<T: Send + 'static>(
        &self,
        is_evidence: impl FnOnce(&Result<T>) -> bool + Send + 'static,
        time_left: Duration,
        call: impl Future<Output = Result<T>> + Send + 'static,
        end: impl FnOnce(Result<T>) + Send + 'static,
        late: impl FnOnce() + Send + 'static,
    ) {
        if let Some(refusal) = self.refusal() {
            return end(Err(refusal));
        }
        let timeout = self.timeout;
        let closed = self.closed.clone();
        let availability = self.availability.clone();
        let task = async move {
            let started_at = availability.now();
            let mut call = pin!(catch_panic(call));
            let in_time = sync::timeout(time_left, &mut call).await;
            let is_late = in_time.is_err();
            let outcome = in_time.unwrap_or_else(|_| Err(timed_out(timeout)));
            if is_evidence(&outcome) {
                availability.observe_call(started_at, &outcome);
            }
            end(outcome);
            if !is_late {
                return;
            }
            let extra_time = timeout.saturating_mul(2).saturating_sub(time_left);
            tokio::select! {
                _ = sync::timeout(extra_time, call) => {}
                () = closed.cancelled() => {}
            }
            late();
        };
        // Commands and warnings of the call belong to the span of its caller.
        self.spawn(task.instrument(Span::current()));
    }

    /// Runs a call as [`start_for`](Self::start_for) does, under the operation timeout, and returns what `end`
    /// returns.
    pub(crate) async fn run<T: Send + 'static, R: Send + 'static>(
        &self,
        call: impl Future<Output = Result<T>> + Send + 'static,
        end: impl FnOnce(Result<T>) -> Result<R> + Send + 'static,
        late: impl FnOnce() + Send + 'static,
    ) -> Result<R> {
        self.run_observed(|_| true, call, end, late).await
    }

    /// [`run`](Self::run) for a call that may send nothing. `is_evidence` decides whether the outcome says
    /// anything about MongoDB.
    pub(crate) async fn run_observed<T: Send + 'static, R: Send + 'static>(
        &self,
        is_evidence: impl FnOnce(&Result<T>) -> bool + Send + 'static,
        call: impl Future<Output = Result<T>> + Send + 'static,
        end: impl FnOnce(Result<T>) -> Result<R> + Send + 'static,
        late: impl FnOnce() + Send + 'static,
    ) -> Result<R> {
        let (reply, answer) = oneshot::channel();
        let end = move |outcome| {
            // Fails if the caller has gone. The work is done all the same.
            let _ = reply.send(end(outcome));
        };
        self.start_observed(is_evidence, self.timeout, call, end, late);
        answer.await.unwrap_or_else(|_| Err(Error::cut_off()))
    }

    /// [`run`](Self::run) for a call of a background task. No request waits for it, and it may take long while MongoDB
    /// answers every other call, so its outcome is not reported. Its commands are.
    pub(crate) async fn run_in_background<T: Send + 'static>(
        &self,
        call: impl Future<Output = Result<T>> + Send + 'static,
    ) -> Result<T> {
        self.run_observed(|_| false, call, |outcome| outcome, || ()).await
    }

    /// As [`run`](Self::run), for a call of many steps. Each step keeps to the timeout by itself, and
    /// ends when the store is [closed](Self::closed).
    pub(crate) async fn run_paged<T: Send + 'static, R: Send + 'static>(
        &self,
        call: impl Future<Output = Result<T>> + Send + 'static,
        end: impl FnOnce(Result<T>) -> Result<R> + Send + 'static,
    ) -> Result<R> {
        self.run_paged_observed(|_| true, call, end).await
    }

    /// [`run_paged`](Self::run_paged), where `is_evidence` decides whether the outcome says anything about this
    /// store's MongoDB.
    pub(crate) async fn run_paged_observed<T: Send + 'static, R: Send + 'static>(
        &self,
        is_evidence: impl FnOnce(&Result<T>) -> bool + Send + 'static,
        call: impl Future<Output = Result<T>> + Send + 'static,
        end: impl FnOnce(Result<T>) -> Result<R> + Send + 'static,
    ) -> Result<R> {
        if let Some(refusal) = self.refusal() {
            return end(Err(refusal));
        }
        let (reply, answer) = oneshot::channel();
        let availability = self.availability.clone();
        let task = async move {
            let started_at = availability.now();
            let outcome = catch_panic(call).await;
            if is_evidence(&outcome) {
                availability.observe_call(started_at, &outcome);
            }
            let _ = reply.send(end(outcome));
        };
        self.spawn(task.instrument(Span::current()));
        answer.await.unwrap_or_else(|_| Err(Error::cut_off()))
    }

    /// Waits on the store's runtime for something other than a call to MongoDB. Ends with an error after
    /// the operation timeout, or when the store is closed.
    pub(crate) async fn wait_for<T: Send + 'static>(
        &self,
        awaited: impl Future<Output = T> + Send + 'static,
    ) -> Result<T> {
        if self.is_closed() {
            return Err(Error::closed());
        }
        let (reply, answer) = oneshot::channel();
        let timeout = self.timeout;
        let closed = self.closed.clone();
        self.spawn(async move {
            let outcome = tokio::select! {
                awaited = sync::timeout(timeout, awaited) => {
                    awaited.map_err(|_| timed_out(timeout))
                }
                () = closed.cancelled() => Err(Error::closed()),
            };
            let _ = reply.send(outcome);
        });
        answer.await.unwrap_or_else(|_| Err(Error::cut_off()))
    }

    /// Runs the last work of a store that is shut down, for at most the operation timeout. Does nothing if
    /// the runtime is gone.
    pub(crate) async fn finish(&self, work: impl Future<Output = ()> + Send + 'static) {
        let timeout = self.timeout;
        let finished = self.runtime.spawn(async move {
            let _ = sync::timeout(timeout, work).await;
        });
        let _ = finished.await;
    }

    /// Starts a background task. It must end when [`closed`](Self::closed) is cancelled.
    pub(crate) fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        sync::spawn(&self.runtime, self.running.track_future(task));
    }

    /// Whether the store is shut down, or its last handle was dropped.
    pub(crate) fn is_closed(&self) -> bool {
        self.closed.is_cancelled()
    }

    /// As [`is_closed`](Self::is_closed), for a caller that has a handle. Takes no lock.
    pub(crate) fn is_shut_down(&self) -> bool {
        self.is_shut_down.load(Ordering::Acquire)
    }

    /// Whether MongoDB answers. Every call reports to it how it has ended.
    pub(crate) fn availability(&self) -> &Availability {
        &self.availability
    }

    pub(crate) fn timeout(&self) -> Duration {
        self.timeout
    }

    /// Returns the error of each call from now on, if the store or its client is shut down.
    pub(crate) fn refusal(&self) -> Option<Error> {
        if self.is_closed() {
            return Some(Error::closed());
        }
        self.client_closed.is_cancelled().then(Error::client_closed)
    }

    /// Cancelled when the app shuts down the client that it handed in. The store itself is still open.
    pub(crate) fn client_closed(&self) -> &CancellationToken {
        &self.client_closed
    }

    /// Cancelled when the store is shut down.
    pub(crate) fn closed(&self) -> &CancellationToken {
        &self.closed
    }

    /// Refuses new calls, ends the background tasks, and waits for the running calls. Each of them ends
    /// at its deadline, and a call of many steps ends after its current step.
    pub(crate) async fn shutdown(&self) {
        self.is_shut_down.store(true, Ordering::Release);
        self.closed.cancel();
        self.running.close();
        self.running.wait().await;
    }
}

/// Turns a panic of `call` into an error, so that `end` always runs and the caller gets the reason.
async fn catch_panic<T>(call: impl Future<Output = Result<T>>) -> Result<T> {
    let mut call = pin!(call);
    poll_fn(|context| {
        let polled = catch_unwind(AssertUnwindSafe(|| call.as_mut().poll(context)));
        polled.unwrap_or_else(|_| Poll::Ready(Err(Error::panicked())))
    })
    .await
}

pub(crate) fn timed_out(timeout: Duration) -> Error {
    Error::new(ErrorKind::Timeout, format!("MongoDB did not answer within {timeout:?}"))
}

#[cfg(test)]
mod tests {
    use std::future::pending;

    use super::*;
    use crate::time::Clock;

    const TIMEOUT: Duration = Duration::from_secs(5);

    #[tokio::test(start_paused = true)]
    async fn a_call_ends_at_its_deadline() {
        let tasks = Tasks::new(Handle::current(), TIMEOUT, Availability::new(Clock::tokio()));
        let start = tokio::time::Instant::now();
        let error = tasks.run(pending::<Result<()>>(), |outcome| outcome, || ()).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Timeout);
        assert_eq!(start.elapsed(), TIMEOUT);
    }

    #[tokio::test(start_paused = true)]
    async fn a_call_runs_to_its_end_without_its_caller() {
        let tasks = Tasks::new(Handle::current(), TIMEOUT, Availability::new(Clock::tokio()));
        let (go, gate) = oneshot::channel::<()>();
        let ended = Arc::new(AtomicBool::new(false));
        let seen = ended.clone();
        let mut caller = Box::pin(tasks.run(
            async move {
                let _ = gate.await;
                Ok(())
            },
            move |outcome| {
                seen.store(true, Ordering::SeqCst);
                outcome
            },
            || (),
        ));
        assert!(futures::poll!(&mut caller).is_pending());
        drop(caller);
        go.send(()).unwrap();
        tasks.shutdown().await;
        assert!(ended.load(Ordering::SeqCst));
    }

    #[tokio::test(start_paused = true)]
    async fn a_call_after_shutdown_is_refused() {
        let tasks = Tasks::new(Handle::current(), TIMEOUT, Availability::new(Clock::tokio()));
        assert!(!tasks.clone().is_shut_down());
        tasks.shutdown().await;
        assert!(tasks.is_shut_down() && tasks.is_closed());
        let error = tasks.run(async { Ok(()) }, |outcome| outcome, || ()).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Closed);
    }

    #[tokio::test(start_paused = true)]
    async fn a_call_that_panics_runs_its_end_and_is_an_error() {
        let tasks = Tasks::new(Handle::current(), TIMEOUT, Availability::new(Clock::tokio()));
        let ended = Arc::new(AtomicBool::new(false));
        let seen = ended.clone();
        let end = move |outcome| {
            seen.store(true, Ordering::SeqCst);
            outcome
        };
        let outcome = tasks.run(async { panic!("on purpose") }, end, || ()).await;
        assert_eq!(Result::<()>::unwrap_err(outcome).kind(), ErrorKind::Panic);
        assert!(ended.load(Ordering::SeqCst));
        let outcome = tasks.run_paged(async { panic!("on purpose") }, |outcome| outcome).await;
        assert_eq!(Result::<()>::unwrap_err(outcome).kind(), ErrorKind::Panic);
    }

    #[tokio::test(start_paused = true)]
    async fn a_wait_ends_at_its_deadline_or_with_the_store() {
        let tasks = Tasks::new(Handle::current(), TIMEOUT, Availability::new(Clock::tokio()));
        assert_eq!(tasks.wait_for(async { 7 }).await.unwrap(), 7);
        let error = tasks.wait_for(pending::<()>()).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Timeout);
        let mut wait = Box::pin(tasks.wait_for(pending::<()>()));
        assert!(futures::poll!(&mut wait).is_pending());
        tasks.shutdown().await;
        assert_eq!(wait.await.unwrap_err().kind(), ErrorKind::Closed);
    }

    #[test]
    fn a_call_on_a_runtime_that_is_gone_is_an_error() {
        let gone = tokio::runtime::Runtime::new().unwrap();
        let tasks = Tasks::new(gone.handle().clone(), TIMEOUT, Availability::new(Clock::system()));
        drop(gone);
        let here = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let outcome = here.block_on(tasks.run(async { Ok(()) }, |outcome| outcome, || ()));
        assert_eq!(outcome.unwrap_err().kind(), ErrorKind::Closed);
    }
}
