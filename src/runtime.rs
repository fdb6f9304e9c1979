//! Runs calls to MongoDB in tasks of their own, each under the operation timeout.
//!
//! A handler may be dropped at any await (its client left), and the driver asks that its futures be
//! polled to their end. So no caller ever holds a driver future: it waits for a task, and what must
//! happen at the end of the call happens in the task, whether the caller is still there or not. The
//! follower of the changes alone drops its futures at their deadline, and when it ends: they only read,
//! so nothing is left half done but a connection, which the driver closes, and a cursor, which times
//! out.
//!
//! A caller may also be polled where there is no timer, or no runtime at all: by another executor, or
//! in another runtime. So whatever needs a timer or a socket runs in a task on the runtime that the store
//! was built on, and callers wait for channels alone.

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

/// Where a store's calls run, and how long they may take.
#[derive(Clone, Debug)]
pub(crate) struct Tasks {
    runtime: Handle,
    running: TaskTracker,
    is_shut_down: Arc<AtomicBool>,
    closed: CancellationToken,
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

    /// Starts `call` in a task and hands its outcome to `end`, exactly once unless the runtime itself
    /// goes away: the result, a timeout error at the deadline, or an error if the call panics. The
    /// caller waits no longer than `patience`.
    ///
    /// A call that has passed its deadline is not dropped at once: it may run for twice the timeout, so
    /// that the driver can bring its connection and session to a clean end. `late` is run then,
    /// since the call may have done its work after all.
    ///
    /// The outcome is reported to [`availability`](Self::availability) before `end` gets it.
    pub(crate) fn start_for<T: Send + 'static>(
        &self,
        patience: Duration,
        call: impl Future<Output = Result<T>> + Send + 'static,
        end: impl FnOnce(Result<T>) + Send + 'static,
        late: impl FnOnce() + Send + 'static,
    ) {
        self.start_observed(|_| true, patience, call, end, late);
    }

    /// [`start_for`](Self::start_for), where `is_telling` decides whether the outcome is reported.
    fn start_observed<T: Send + 'static>(
        &self,
        is_telling: impl FnOnce(&Result<T>) -> bool + Send + 'static,
        patience: Duration,
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
            let began = availability.now();
            let mut call = pin!(caught(call));
            let in_time = sync::timeout(patience, &mut call).await;
            let is_late = in_time.is_err();
            let outcome = in_time.unwrap_or_else(|_| Err(timed_out(timeout)));
            if is_telling(&outcome) {
                availability.observe_call(began, &outcome);
            }
            end(outcome);
            if !is_late {
                return;
            }
            let longer = timeout.saturating_mul(2).saturating_sub(patience);
            tokio::select! {
                _ = sync::timeout(longer, call) => {}
                () = closed.cancelled() => {}
            }
            late();
        };
        // Whoever has called sees what is done for it, and what is warned of, in its own span.
        self.spawn(task.instrument(Span::current()));
    }

    /// [`start_for`](Self::start_for) the operation timeout, and the wait for what `end` makes of the outcome.
    pub(crate) async fn run<T: Send + 'static, R: Send + 'static>(
        &self,
        call: impl Future<Output = Result<T>> + Send + 'static,
        end: impl FnOnce(Result<T>) -> Result<R> + Send + 'static,
        late: impl FnOnce() + Send + 'static,
    ) -> Result<R> {
        self.run_observed(|_| true, call, end, late).await
    }

    /// [`run`](Self::run) for a call that may send nothing. `is_telling` decides whether the outcome says
    /// anything about MongoDB.
    pub(crate) async fn run_observed<T: Send + 'static, R: Send + 'static>(
        &self,
        is_telling: impl FnOnce(&Result<T>) -> bool + Send + 'static,
        call: impl Future<Output = Result<T>> + Send + 'static,
        end: impl FnOnce(Result<T>) -> Result<R> + Send + 'static,
        late: impl FnOnce() + Send + 'static,
    ) -> Result<R> {
        let (reply, answer) = oneshot::channel();
        let end = move |outcome| {
            // The caller may have gone, which is no error: the work is done all the same.
            let _ = reply.send(end(outcome));
        };
        self.start_observed(is_telling, self.timeout, call, end, late);
        answer.await.unwrap_or_else(|_| Err(Error::cut_off()))
    }

    /// [`run`](Self::run) for a call of many steps, each of which keeps to the timeout by itself and
    /// looks whether the store is [closed](Self::closed).
    pub(crate) async fn run_paged<T: Send + 'static, R: Send + 'static>(
        &self,
        call: impl Future<Output = Result<T>> + Send + 'static,
        end: impl FnOnce(Result<T>) -> Result<R> + Send + 'static,
    ) -> Result<R> {
        self.run_paged_observed(|_| true, call, end).await
    }

    /// [`run_paged`](Self::run_paged), where `is_telling` decides whether the outcome says anything about this
    /// store's MongoDB.
    pub(crate) async fn run_paged_observed<T: Send + 'static, R: Send + 'static>(
        &self,
        is_telling: impl FnOnce(&Result<T>) -> bool + Send + 'static,
        call: impl Future<Output = Result<T>> + Send + 'static,
        end: impl FnOnce(Result<T>) -> Result<R> + Send + 'static,
    ) -> Result<R> {
        if let Some(refusal) = self.refusal() {
            return end(Err(refusal));
        }
        let (reply, answer) = oneshot::channel();
        let availability = self.availability.clone();
        let task = async move {
            let began = availability.now();
            let outcome = caught(call).await;
            if is_telling(&outcome) {
                availability.observe_call(began, &outcome);
            }
            let _ = reply.send(end(outcome));
        };
        self.spawn(task.instrument(Span::current()));
        answer.await.unwrap_or_else(|_| Err(Error::cut_off()))
    }

    /// Waits on the store's runtime for something that is not a call to MongoDB, for at most the
    /// operation timeout and not past the store's end.
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

    /// Runs the last work of a store that is shut down on its runtime, for at most the operation
    /// timeout. Nothing is done if the runtime is gone.
    pub(crate) async fn finish(&self, work: impl Future<Output = ()> + Send + 'static) {
        let timeout = self.timeout;
        let finished = self.runtime.spawn(async move {
            let _ = sync::timeout(timeout, work).await;
        });
        let _ = finished.await;
    }

    /// Starts a task that lives until it ends by itself or [`closed`](Self::closed) tells it to.
    pub(crate) fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        sync::spawn(&self.runtime, self.running.track_future(task));
    }

    /// Whether the store is shut down, or all its handles were dropped.
    pub(crate) fn is_closed(&self) -> bool {
        self.closed.is_cancelled()
    }

    /// [`is_closed`](Self::is_closed) for who has a handle, without the token's lock.
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

    /// Why nothing may be sent any more, if that is so.
    pub(crate) fn refusal(&self) -> Option<Error> {
        if self.is_closed() {
            return Some(Error::closed());
        }
        self.client_closed.is_cancelled().then(Error::client_closed)
    }

    /// Done once the app shuts down the client that it handed in. The store itself is still open.
    pub(crate) fn client_closed(&self) -> &CancellationToken {
        &self.client_closed
    }

    /// Done once the store is shut down.
    pub(crate) fn closed(&self) -> &CancellationToken {
        &self.closed
    }

    /// Refuses new calls, ends the background tasks and waits for the calls under way, each of
    /// which ends by its deadline (one of many steps: with the step it is at).
    pub(crate) async fn shutdown(&self) {
        self.is_shut_down.store(true, Ordering::Release);
        self.closed.cancel();
        self.running.close();
        self.running.wait().await;
    }
}

/// `call`, with an error in the place of a panic. So `end` has its turn whatever happens, and the
/// caller learns what it was.
async fn caught<T>(call: impl Future<Output = Result<T>>) -> Result<T> {
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
    async fn the_end_of_a_call_is_seen_though_its_caller_has_gone() {
        let tasks = Tasks::new(Handle::current(), TIMEOUT, Availability::new(Clock::tokio()));
        let (go, gate) = oneshot::channel::<()>();
        let ended = Arc::new(AtomicBool::new(false));
        let seen = ended.clone();
        let mut caller = Box::pin(tasks.run(
            async move {
                gate.await.ok();
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
    async fn nothing_starts_after_shutdown() {
        let tasks = Tasks::new(Handle::current(), TIMEOUT, Availability::new(Clock::tokio()));
        assert!(!tasks.clone().is_shut_down());
        tasks.shutdown().await;
        assert!(tasks.is_shut_down() && tasks.is_closed());
        let error = tasks.run(async { Ok(()) }, |outcome| outcome, || ()).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Closed);
    }

    #[tokio::test(start_paused = true)]
    async fn a_call_that_panics_has_an_end_and_is_an_error_of_its_own() {
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
    async fn a_wait_ends_at_its_deadline_and_with_the_store() {
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
    fn a_runtime_that_went_away_is_an_error_and_no_hang() {
        let gone = tokio::runtime::Runtime::new().unwrap();
        let tasks = Tasks::new(gone.handle().clone(), TIMEOUT, Availability::new(Clock::system()));
        drop(gone);
        let here = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let outcome = here.block_on(tasks.run(async { Ok(()) }, |outcome| outcome, || ()));
        assert_eq!(outcome.unwrap_err().kind(), ErrorKind::Closed);
    }
}
