//! A queue of calls of one kind: each leaves at once while few commands are under way, and with the
//! others that wait while many are, or large ones.
//!
//! A command leaves once as many calls wait as one of those under way has, on average. So a few calls
//! go one by one, side by side; and where there are many, each command is as large as those before it,
//! instead of one large one that is followed by many small ones of those whom it kept waiting.
//!
//! Nobody waits here for long. Who has waited for [`Limits::max_wait`] leaves anyway, with all who wait,
//! and how large the commands under way are counts no more: so a few connections that stand still
//! hold up nobody else, and a far server gets as many commands as it takes.

use std::collections::VecDeque;
use std::pin::pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::oneshot;
use tokio::time::{Instant, timeout, timeout_at};

use crate::backend::Call;
use crate::error::{Error, ErrorKind, Result};
use crate::runtime::{Tasks, timed_out};

/// When calls leave, and how many.
#[derive(Clone, Copy, Debug)]
pub(crate) struct BatchLimits {
    /// So many commands under way keep the server busy: what comes then waits.
    pub(crate) max_commands: usize,
    /// How many calls leave together at most.
    pub(crate) max_batch: usize,
    /// How many bytes they may be, unless it is one alone.
    pub(crate) max_bytes: usize,
    /// How long a call waits. Doubles for each further [`commands`](Self::commands) under way, up to an
    /// eighth of the timeout, and is never more than half of what is left of it.
    pub(crate) max_wait: Duration,
    /// How many calls there may be at a time, under way and waiting.
    pub(crate) max_calls: usize,
}

impl BatchLimits {
    pub(crate) const fn of(commands: usize, calls: usize) -> Self {
        let patience = Duration::from_millis(5);
        Self {
            max_commands: commands,
            max_batch: 128,
            max_bytes: 4 << 20,
            max_wait: patience,
            max_calls: calls,
        }
    }
}

/// What is sent: alone, or together with others of its kind.
pub(crate) trait BatchExecutor: Send + Sync + 'static {
    type Item: Send + 'static;
    type Answer: Send + 'static;

    fn run_one(&self, item: Self::Item) -> Call<Self::Answer>;

    /// One command for two items or more, and an answer for each, in their order. The command's own
    /// failure is that of all.
    fn run_batch(&self, items: Vec<Self::Item>) -> Call<Vec<Result<Self::Answer>>>;

    /// About how large an item is on its way.
    fn bytes(item: &Self::Item) -> usize;
}

/// Clones share it.
pub(crate) struct BatchQueue<F: BatchExecutor>(Arc<Shared<F>>);

struct Shared<F: BatchExecutor> {
    executor: F,
    tasks: Tasks,
    limits: BatchLimits,
    state: Mutex<State<F>>,
}

struct State<F: BatchExecutor> {
    commands: usize,
    /// How many calls those commands carry that began in this era, which ends when somebody has waited
    /// in vain.
    calls_in_flight: usize,
    epoch: u64,
    /// Commands that have ended since those who wait were looked at.
    finished_since_flush: usize,
    calls: usize,
    /// Somebody lets go those who wait, and looks again after each group.
    flushing: bool,
    /// How many have waited so far.
    next_number: u64,
    queued: VecDeque<QueuedCall<F>>,
}

struct QueuedCall<F: BatchExecutor> {
    item: F::Item,
    /// Grows from one to the next.
    number: u64,
    /// When its call began, from which its deadline counts.
    began: Instant,
    since: Instant,
    answer: oneshot::Sender<Result<F::Answer>>,
}

/// A call that is counted.
pub(crate) struct AdmissionPermit<F: BatchExecutor>(BatchQueue<F>);

/// A command under way, of so many calls. Where it ends, those who wait may leave.
struct CommandSlot<F: BatchExecutor> {
    queue: BatchQueue<F>,
    calls: usize,
    epoch: u64,
}

enum Enqueued<F: BatchExecutor> {
    SendNow(F::Item, CommandSlot<F>),
    /// For so long, under this number.
    Wait(oneshot::Receiver<Result<F::Answer>>, Duration, u64),
}

impl<F: BatchExecutor> BatchQueue<F> {
    pub(crate) fn new(freight: F, tasks: Tasks, limits: BatchLimits) -> Self {
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
        Self(Arc::new(Shared { executor: freight, tasks, limits, state: Mutex::new(state) }))
    }

    /// Sends an item of a call that began at `began`, and waits for its answer. To be run in the
    /// call's own task: one that is dropped while it waits is not sent.
    pub(crate) async fn send(
        &self,
        _seat: AdmissionPermit<F>,
        item: F::Item,
        began: Instant,
    ) -> Result<F::Answer> {
        let (mut answer, patience, number) = match self.enqueue(item, began) {
            Enqueued::SendNow(item, slot) => {
                let outcome = self.0.executor.run_one(item).await;
                drop(slot);
                return outcome;
            }
            Enqueued::Wait(answer, patience, number) => (answer, patience, number),
        };
        let outcome = if let Ok(outcome) = timeout(patience, &mut answer).await {
            outcome
        } else {
            self.flush_all(number);
            answer.await
        };
        outcome.unwrap_or_else(|_| Err(Error::cut_off()))
    }

    /// How long a call may take.
    pub(crate) fn timeout(&self) -> Duration {
        self.0.tasks.timeout()
    }

    /// How many commands are under way, how many calls there are, and how many of them wait.
    #[cfg(test)]
    pub(crate) fn load(&self) -> [usize; 3] {
        let state = self.lock();
        [state.commands, state.calls, state.queued.len()]
    }

    /// Counts a call, from here to its end: what it waits for before it is sent is part of that.
    pub(crate) fn admit(&self) -> Result<AdmissionPermit<F>> {
        let mut state = self.lock();
        if state.calls >= self.0.limits.max_calls {
            return Err(overloaded(state.calls));
        }
        state.calls += 1;
        drop(state);
        Ok(AdmissionPermit(self.clone()))
    }

    fn enqueue(&self, item: F::Item, began: Instant) -> Enqueued<F> {
        let limits = &self.0.limits;
        let mut state = self.lock();
        if state.queued.is_empty() && self.is_worth_a_command(&state, 1) {
            return Enqueued::SendNow(item, self.take_slot(&mut state, 1));
        }
        let (answer, answered) = oneshot::channel();
        let number = state.next_number;
        state.next_number += 1;
        state.queued.push_back(QueuedCall { item, number, began, since: Instant::now(), answer });
        let excess = (state.commands / limits.max_commands.max(1)).saturating_sub(1).min(16);
        let timeout = self.0.tasks.timeout();
        // A call that has waited in its lane before has less time left.
        let left = timeout.saturating_sub(began.elapsed());
        let longest = limits.max_wait.max(timeout / 8).min(left / 2);
        let patience = limits.max_wait.saturating_mul(1 << excess).min(longest);
        self.try_flush(state);
        Enqueued::Wait(answered, patience, number)
    }

    /// Whether so many calls, if they left now, were no fewer than a command under way carries on
    /// average, and those commands are few enough.
    fn is_worth_a_command(&self, state: &State<F>, calls: usize) -> bool {
        let commands = state.commands;
        commands < self.0.limits.max_commands
            && calls.saturating_mul(commands) >= state.calls_in_flight
    }

    fn take_slot(&self, state: &mut State<F>, calls: usize) -> CommandSlot<F> {
        state.commands += 1;
        state.calls_in_flight += calls;
        CommandSlot { queue: self.clone(), calls, epoch: state.epoch }
    }

    /// Lets those leave who may.
    fn try_flush<'a>(&'a self, mut state: MutexGuard<'a, State<F>>) {
        // Where the runtime is gone a command ends in here, and the one below sees to the rest.
        if std::mem::replace(&mut state.flushing, true) {
            return;
        }
        while let Some(next) = state.queued.front() {
            // Beyond the usual number, a command that has ended is followed by another one if it is
            // missed.
            let follows =
                state.finished_since_flush > 0 && next.since.elapsed() >= self.0.limits.max_wait;
            if !follows && !self.is_worth_a_command(&state, state.queued.len()) {
                break;
            }
            state.finished_since_flush = state.finished_since_flush.saturating_sub(1);
            let group = self.take_batch(&mut state);
            if group.is_empty() {
                break;
            }
            let slot = self.take_slot(&mut state, group.len());
            drop(state);
            self.send_batch(group, slot);
            state = self.lock();
        }
        (state.finished_since_flush, state.flushing) = (0, false);
    }

    /// All who wait leave, though as many commands are under way as there should be, or larger ones;
    /// unless the one of this number, who has waited in vain, has left already, and waits for the
    /// answer alone. Those who come meanwhile wait themselves.
    fn flush_all(&self, number: u64) {
        let mut state = self.lock();
        if state.queued.front().is_none_or(|first| first.number > number) {
            return;
        }
        (state.calls_in_flight, state.epoch) = (0, state.epoch + 1);
        let last = state.next_number;
        while state.queued.front().is_some_and(|first| first.number < last) {
            let group = self.take_batch(&mut state);
            if group.is_empty() {
                return;
            }
            let slot = self.take_slot(&mut state, group.len());
            drop(state);
            self.send_batch(group, slot);
            state = self.lock();
        }
    }

    /// Takes those who leave next, of whom nobody may have been given up.
    fn take_batch(&self, state: &mut State<F>) -> Vec<QueuedCall<F>> {
        let (limits, timeout) = (&self.0.limits, self.0.tasks.timeout());
        let (mut group, mut bytes) = (Vec::new(), 0_usize);
        while group.len() < limits.max_batch
            && let Some(next) = state.queued.pop_front()
        {
            // Its caller has been told by now, or is gone with its task: it need not be sent.
            if next.answer.is_closed() || next.began.elapsed() >= timeout {
                drop(next.answer.send(Err(timed_out(timeout))));
                continue;
            }
            bytes = bytes.saturating_add(F::bytes(&next.item));
            if bytes > limits.max_bytes && !group.is_empty() {
                state.queued.push_front(next);
                break;
            }
            group.push(next);
        }
        group
    }

    /// Sends a group in a task of its own, which lasts no longer than the most impatient of its
    /// calls does: twice the timeout, or the timeout if the store is shut down.
    fn send_batch(&self, group: Vec<QueuedCall<F>>, slot: CommandSlot<F>) {
        let queue = self.clone();
        self.0.tasks.spawn(async move {
            let longest = queue.0.tasks.timeout();
            let oldest = group.iter().map(|waiting| waiting.began).min();
            let deadline = oldest.unwrap_or_else(Instant::now) + longest;
            let (items, answers): (Vec<_>, Vec<_>) =
                group.into_iter().map(|waiting| (waiting.item, waiting.answer)).unzip();
            let mut work = pin!(queue.execute(items));
            let outcome = if let Ok(outcome) = timeout_at(deadline, &mut work).await {
                Ok(outcome)
            } else {
                // As each call does by itself.
                tokio::select! {
                    outcome = timeout_at(deadline + longest, work) => outcome,
                    () = queue.0.tasks.closed().cancelled() => Ok(Err(timed_out(longest))),
                }
            };
            // The next ones leave before these are answered.
            drop(slot);
            match outcome.unwrap_or_else(|_| Err(timed_out(longest))) {
                Ok(outcomes) => {
                    for (answer, outcome) in answers.into_iter().zip(outcomes) {
                        drop(answer.send(outcome));
                    }
                }
                Err(error) => {
                    for answer in answers {
                        drop(answer.send(Err(error.clone())));
                    }
                }
            }
        });
    }

    async fn execute(&self, mut items: Vec<F::Item>) -> Result<Vec<Result<F::Answer>>> {
        let freight = &self.0.executor;
        match items.pop() {
            Some(only) if items.is_empty() => Ok(vec![freight.run_one(only).await]),
            Some(last) => {
                items.push(last);
                freight.run_batch(items).await
            }
            None => Ok(Vec::new()),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State<F>> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<F: BatchExecutor> Drop for AdmissionPermit<F> {
    fn drop(&mut self) {
        self.0.lock().calls -= 1;
    }
}

impl<F: BatchExecutor> Drop for CommandSlot<F> {
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

impl<F: BatchExecutor> Clone for BatchQueue<F> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

fn overloaded(calls: usize) -> Error {
    Error::new(
        ErrorKind::Overloaded,
        format!(
            "{calls} calls to MongoDB are under way or wait, which `max_waiting` does not let grow: it is \
             slow or stands still, or has less capacity than the app needs"
        ),
    )
}

#[cfg(test)]
mod tests;
