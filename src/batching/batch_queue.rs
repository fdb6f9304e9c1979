//! [`BatchQueue`]: sends calls of one kind one by one while few commands are in flight, and in batches
//! while the server is busy.
//!
//! A queued call is sent as soon as both are true:
//!
//! - Fewer than [`max_commands`](BatchLimits::max_commands) commands are in flight.
//! - The queue has at least as many calls as the average command in flight.
//!
//! So a few calls go one by one, side by side. Under load the commands have similar sizes. Without the
//! second rule, one large command would be followed by many small ones, for the calls that queued up
//! behind it.
//!
//! A call waits at most [`max_wait`](BatchLimits::max_wait). When that expires, the whole queue is
//! flushed, and the sizes of the commands in flight no longer count. So a few stalled connections delay
//! nobody else, and a distant server gets as many commands as it can take.

use std::collections::VecDeque;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::oneshot;
use tokio::time::{Instant, timeout, timeout_at};

use crate::backend::Call;
use crate::error::{Error, ErrorKind, Result};
use crate::runtime::{Tasks, timed_out};
use crate::sync::{Mutex, MutexGuard, lock};

/// When calls are sent, and how many in one command.
#[derive(Clone, Copy, Debug)]
#[allow(clippy::struct_field_names, reason = "the builder's options have the same names")]
pub(crate) struct BatchLimits {
    /// The number of commands in flight that keeps the server busy. Calls beyond it wait.
    pub(crate) max_commands: usize,
    /// The most calls in a batch.
    pub(crate) max_batch: usize,
    /// The most bytes in a batch. A single larger item is sent alone.
    pub(crate) max_bytes: usize,
    /// The longest wait of a call. It doubles for each further
    /// [`max_commands`](Self::max_commands) in flight, up to an eighth of the timeout. It is never more
    /// than half of the time that the call has left.
    pub(crate) max_wait: Duration,
    /// The most calls at a time, in flight and queued.
    pub(crate) max_calls: usize,
}

impl BatchLimits {
    pub(crate) const fn of(max_commands: usize, max_calls: usize) -> Self {
        Self {
            max_commands,
            max_batch: 128,
            max_bytes: 4 << 20,
            max_wait: Duration::from_millis(5),
            max_calls,
        }
    }
}

/// Sends the items of a [`BatchQueue`].
pub(crate) trait BatchExecutor: Send + Sync + 'static {
    type Item: Send + 'static;
    type Answer: Send + 'static;

    fn run_one(&self, item: Self::Item) -> Call<Self::Answer>;

    /// Sends two or more items as one command, and returns an answer for each, in their order. An error
    /// of the command is the error of each item.
    fn run_batch(&self, items: Vec<Self::Item>) -> Call<Vec<Result<Self::Answer>>>;

    /// About how many bytes an item adds to a command.
    fn bytes(item: &Self::Item) -> usize;
}

/// The calls of one kind. Clones share it.
pub(crate) struct BatchQueue<E: BatchExecutor>(Arc<Shared<E>>);

struct Shared<E: BatchExecutor> {
    executor: E,
    tasks: Tasks,
    limits: BatchLimits,
    /// A blocking lock, since nothing awaits while it is held.
    state: Mutex<State<E>>,
}

struct State<E: BatchExecutor> {
    /// The number of commands in flight.
    commands: usize,
    /// The number of calls in those commands that were sent in this epoch. [`BatchQueue::flush_all`]
    /// begins a new epoch, so that stalled commands no longer count.
    calls_in_flight: usize,
    epoch: u64,
    /// The number of commands that have ended since the last flush.
    finished_since_flush: usize,
    /// The number of calls that were admitted and have not ended.
    calls: usize,
    /// Whether a flush is running. It looks at the queue again after each batch, so another one is not
    /// needed.
    flushing: bool,
    /// The number of the next queued call.
    next_number: u64,
    queued: VecDeque<QueuedCall<E>>,
}

struct QueuedCall<E: BatchExecutor> {
    item: E::Item,
    /// Greater than those of all calls that were queued before.
    number: u64,
    /// When the call began. Its deadline counts from here.
    began: Instant,
    queued_at: Instant,
    answer: oneshot::Sender<Result<E::Answer>>,
}

/// The right of a call to be queued and sent. The call counts until this is dropped.
pub(crate) struct AdmissionPermit<E: BatchExecutor>(BatchQueue<E>);

/// A command in flight. Dropping it ends the command, and flushes what may then be sent.
struct CommandSlot<E: BatchExecutor> {
    queue: BatchQueue<E>,
    calls: usize,
    epoch: u64,
}

enum Enqueued<E: BatchExecutor> {
    SendNow(E::Item, CommandSlot<E>),
    Wait { answer: oneshot::Receiver<Result<E::Answer>>, max_wait: Duration, number: u64 },
}

impl<E: BatchExecutor> BatchQueue<E> {
    pub(crate) fn new(executor: E, tasks: Tasks, limits: BatchLimits) -> Self {
        let state = State {
            commands: 0,
            calls_in_flight: 0,
            epoch: 0,
            finished_since_flush: 0,
            calls: 0,
            flushing: false,
            next_number: 0,
            queued: VecDeque::new(),
        };
        Self(Arc::new(Shared { executor, tasks, limits, state: Mutex::new(state) }))
    }

    /// Counts a call until the permit is dropped. That includes the time before it is queued here.
    pub(crate) fn admit(&self) -> Result<AdmissionPermit<E>> {
        let mut state = self.lock();
        if state.calls >= self.0.limits.max_calls {
            return Err(overloaded(state.calls));
        }
        state.calls += 1;
        drop(state);
        Ok(AdmissionPermit(self.clone()))
    }

    /// Sends an item of an [admitted](Self::admit) call that began at `began`, and waits for its answer. Runs
    /// in the task of the call. If this future is dropped while the item is queued, the item is not sent.
    pub(crate) async fn send(&self, item: E::Item, began: Instant) -> Result<E::Answer> {
        match self.enqueue(item, began) {
            Enqueued::SendNow(item, slot) => {
                let outcome = self.0.executor.run_one(item).await;
                drop(slot);
                outcome
            }
            Enqueued::Wait { mut answer, max_wait, number } => {
                let in_time = timeout(max_wait, &mut answer).await;
                let outcome = if let Ok(outcome) = in_time {
                    outcome
                } else {
                    self.flush_all(number);
                    answer.await
                };
                outcome.unwrap_or_else(|_| Err(Error::cut_off()))
            }
        }
    }

    /// How long a call may take.
    pub(crate) fn timeout(&self) -> Duration {
        self.0.tasks.timeout()
    }

    /// The numbers of commands in flight, of calls, and of queued calls.
    #[cfg(test)]
    pub(crate) fn load(&self) -> [usize; 3] {
        let state = self.lock();
        [state.commands, state.calls, state.queued.len()]
    }

    fn enqueue(&self, item: E::Item, began: Instant) -> Enqueued<E> {
        let mut state = self.lock();
        if state.queued.is_empty() && self.is_worth_a_command(&state, 1) {
            return Enqueued::SendNow(item, self.take_slot(&mut state, 1));
        }
        let max_wait = self.max_wait(&state, began);
        let (sender, answer) = oneshot::channel();
        let number = state.next_number;
        state.next_number += 1;
        let queued_at = Instant::now();
        state.queued.push_back(QueuedCall { item, number, began, queued_at, answer: sender });
        self.try_flush(state);
        Enqueued::Wait { answer, max_wait, number }
    }

    fn max_wait(&self, state: &State<E>, began: Instant) -> Duration {
        let limits = &self.0.limits;
        let timeout = self.0.tasks.timeout();
        let doublings = (state.commands / limits.max_commands.max(1)).saturating_sub(1).min(16);
        // A call that has waited in a write queue before has less time left.
        let time_left = timeout.saturating_sub(began.elapsed());
        let longest = limits.max_wait.max(timeout / 8).min(time_left / 2);
        limits.max_wait.saturating_mul(1 << doublings).min(longest)
    }

    /// Whether a command of this many calls may be sent: few enough commands are in flight, and their
    /// average size is not larger.
    fn is_worth_a_command(&self, state: &State<E>, calls: usize) -> bool {
        let commands = state.commands;
        commands < self.0.limits.max_commands
            && calls.saturating_mul(commands) >= state.calls_in_flight
    }

    fn take_slot(&self, state: &mut State<E>, calls: usize) -> CommandSlot<E> {
        state.commands += 1;
        state.calls_in_flight += calls;
        CommandSlot { queue: self.clone(), calls, epoch: state.epoch }
    }

    /// Sends the batches that may be sent now.
    fn try_flush<'a>(&'a self, mut state: MutexGuard<'a, State<E>>) {
        // If the runtime is gone, a command ends inside of `send_batch` and calls this again. The outer
        // loop does the rest, so the stack does not grow.
        if std::mem::replace(&mut state.flushing, true) {
            return;
        }
        while let Some(first) = state.queued.front() {
            // While more than `max_commands` are in flight, each command that ends is replaced by one
            // if a call has waited for it.
            let is_replacement = state.finished_since_flush > 0
                && first.queued_at.elapsed() >= self.0.limits.max_wait;
            if !is_replacement && !self.is_worth_a_command(&state, state.queued.len()) {
                break;
            }
            state.finished_since_flush = state.finished_since_flush.saturating_sub(1);
            let batch = self.take_batch(&mut state);
            if batch.is_empty() {
                break;
            }
            let slot = self.take_slot(&mut state, batch.len());
            drop(state);
            self.send_batch(batch, slot);
            state = self.lock();
        }
        state.finished_since_flush = 0;
        state.flushing = false;
    }

    /// Sends all queued calls, whatever is in flight, since the call of this number has waited too
    /// long. Does nothing if that call was sent meanwhile. Calls that are queued from now on wait.
    fn flush_all(&self, number: u64) {
        let mut state = self.lock();
        if state.queued.front().is_none_or(|first| first.number > number) {
            return;
        }
        state.calls_in_flight = 0;
        state.epoch += 1;
        let end = state.next_number;
        while state.queued.front().is_some_and(|first| first.number < end) {
            let batch = self.take_batch(&mut state);
            if batch.is_empty() {
                return;
            }
            let slot = self.take_slot(&mut state, batch.len());
            drop(state);
            self.send_batch(batch, slot);
            state = self.lock();
        }
    }

    /// Takes the next batch from the queue. Leaves out calls that have ended.
    fn take_batch(&self, state: &mut State<E>) -> Vec<QueuedCall<E>> {
        let limits = &self.0.limits;
        let timeout = self.0.tasks.timeout();
        let mut batch = Vec::new();
        let mut bytes = 0_usize;
        while batch.len() < limits.max_batch
            && let Some(next) = state.queued.pop_front()
        {
            // The caller has got a timeout error by now, or its task is gone.
            if next.answer.is_closed() || next.began.elapsed() >= timeout {
                let _ = next.answer.send(Err(timed_out(timeout)));
                continue;
            }
            bytes = bytes.saturating_add(E::bytes(&next.item));
            if bytes > limits.max_bytes && !batch.is_empty() {
                state.queued.push_front(next);
                break;
            }
            batch.push(next);
        }
        batch
    }

    /// Sends a batch in a task of its own. The task ends at the latest when the task of its oldest call
    /// does: after twice the timeout, or after the timeout if the store is shut down.
    fn send_batch(&self, batch: Vec<QueuedCall<E>>, slot: CommandSlot<E>) {
        let queue = self.clone();
        self.0.tasks.spawn(async move {
            let timeout = queue.0.tasks.timeout();
            let oldest = batch.iter().map(|call| call.began).min();
            let deadline = oldest.unwrap_or_else(Instant::now) + timeout;
            let (items, answers): (Vec<_>, Vec<_>) =
                batch.into_iter().map(|call| (call.item, call.answer)).unzip();
            let mut work = pin!(queue.execute(items));
            let outcome = if let Ok(outcome) = timeout_at(deadline, &mut work).await {
                Ok(outcome)
            } else {
                // As for each single call: see `Tasks::start_for`.
                tokio::select! {
                    outcome = timeout_at(deadline + timeout, work) => outcome,
                    () = queue.0.tasks.closed().cancelled() => Ok(Err(timed_out(timeout))),
                }
            };
            // Before the answers, so that the next batch does not wait for them.
            drop(slot);
            match outcome.unwrap_or_else(|_| Err(timed_out(timeout))) {
                Ok(outcomes) => {
                    for (answer, outcome) in answers.into_iter().zip(outcomes) {
                        let _ = answer.send(outcome);
                    }
                }
                Err(error) => {
                    for answer in answers {
                        let _ = answer.send(Err(error.clone()));
                    }
                }
            }
        });
    }

    async fn execute(&self, mut items: Vec<E::Item>) -> Result<Vec<Result<E::Answer>>> {
        let executor = &self.0.executor;
        match items.pop() {
            Some(only) if items.is_empty() => Ok(vec![executor.run_one(only).await]),
            Some(last) => {
                items.push(last);
                executor.run_batch(items).await
            }
            None => Ok(Vec::new()),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State<E>> {
        lock(&self.0.state)
    }
}

impl<E: BatchExecutor> Drop for AdmissionPermit<E> {
    fn drop(&mut self) {
        self.0.lock().calls -= 1;
    }
}

impl<E: BatchExecutor> Drop for CommandSlot<E> {
    fn drop(&mut self) {
        let mut state = self.queue.lock();
        state.commands -= 1;
        state.finished_since_flush += 1;
        if self.epoch == state.epoch {
            state.calls_in_flight -= self.calls;
        }
        self.queue.try_flush(state);
    }
}

impl<E: BatchExecutor> Clone for BatchQueue<E> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

fn overloaded(calls: usize) -> Error {
    Error::new(
        ErrorKind::Overloaded,
        format!(
            "{calls} calls to MongoDB are queued or in flight, the most that `max_queued_calls` allows: \
             MongoDB is slow or does not answer, or it has less capacity than the app needs"
        ),
    )
}

#[cfg(test)]
mod tests;
