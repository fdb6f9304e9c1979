//! A queue of calls of one kind: each leaves at once while few commands are under way, and with the
//! others that wait while many are, or large ones.
//!
//! A command leaves once as many calls wait as one of those under way has, on average. So a few calls
//! go one by one, side by side; and where there are many, each command is as large as those before it,
//! instead of one large one that is followed by many small ones of those whom it kept waiting.
//!
//! Nobody waits here for long. Who has waited for [`Limits::patience`] leaves anyway, with all who wait,
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
use crate::tasks::{Tasks, timed_out};

/// When calls leave, and how many.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    /// So many commands under way keep the server busy: what comes then waits.
    pub(crate) commands: usize,
    /// How many calls leave together at most.
    pub(crate) together: usize,
    /// How many bytes they may be, unless it is one alone.
    pub(crate) bytes: usize,
    /// How long a call waits. Doubles for each further [`commands`](Self::commands) under way, up to an
    /// eighth of the timeout, and is never more than half of what is left of it.
    pub(crate) patience: Duration,
    /// How many calls there may be at a time, under way and waiting.
    pub(crate) calls: usize,
}

impl Limits {
    pub(crate) const fn of(commands: usize, calls: usize) -> Self {
        let patience = Duration::from_millis(5);
        Self { commands, together: 128, bytes: 4 << 20, patience, calls }
    }
}

/// What is sent: alone, or together with others of its kind.
pub(super) trait Freight: Send + Sync + 'static {
    type Item: Send + 'static;
    type Answer: Send + 'static;

    fn alone(&self, item: Self::Item) -> Call<Self::Answer>;

    /// One command for two items or more, and an answer for each, in their order. The command's own
    /// failure is that of all.
    fn together(&self, items: Vec<Self::Item>) -> Call<Vec<Result<Self::Answer>>>;

    /// About how large an item is on its way.
    fn bytes(item: &Self::Item) -> usize;
}

/// Clones share it.
pub(super) struct Queue<F: Freight>(Arc<Shared<F>>);

struct Shared<F: Freight> {
    freight: F,
    tasks: Tasks,
    limits: Limits,
    state: Mutex<State<F>>,
}

struct State<F: Freight> {
    commands: usize,
    /// How many calls those commands carry that began in this era, which ends when somebody has waited
    /// in vain.
    carried: usize,
    era: u64,
    /// Commands that have ended since those who wait were looked at.
    ended: usize,
    calls: usize,
    /// Somebody lets go those who wait, and looks again after each group.
    leaving: bool,
    /// How many have waited so far.
    waited: u64,
    waiting: VecDeque<Waiting<F>>,
}

struct Waiting<F: Freight> {
    item: F::Item,
    /// Grows from one to the next.
    number: u64,
    /// When its call began, from which its deadline counts.
    began: Instant,
    since: Instant,
    answer: oneshot::Sender<Result<F::Answer>>,
}

/// A call that is counted.
pub(super) struct Seat<F: Freight>(Queue<F>);

/// A command under way, of so many calls. Where it ends, those who wait may leave.
struct Slot<F: Freight> {
    queue: Queue<F>,
    calls: usize,
    era: u64,
}

enum Entered<F: Freight> {
    Goes(F::Item, Slot<F>),
    /// For so long, under this number.
    Waits(oneshot::Receiver<Result<F::Answer>>, Duration, u64),
}

impl<F: Freight> Queue<F> {
    pub(super) fn new(freight: F, tasks: Tasks, limits: Limits) -> Self {
        let state = State {
            commands: 0,
            carried: 0,
            era: 0,
            ended: 0,
            calls: 0,
            leaving: false,
            waited: 0,
            waiting: VecDeque::new(),
        };
        Self(Arc::new(Shared { freight, tasks, limits, state: Mutex::new(state) }))
    }

    /// Sends an item of a call that began at `began`, and waits for its answer. To be run in the
    /// call's own task: one that is dropped while it waits is not sent.
    pub(super) async fn send(
        &self,
        _seat: Seat<F>,
        item: F::Item,
        began: Instant,
    ) -> Result<F::Answer> {
        let (mut answer, patience, number) = match self.enter(item, began) {
            Entered::Goes(item, slot) => {
                let outcome = self.0.freight.alone(item).await;
                drop(slot);
                return outcome;
            }
            Entered::Waits(answer, patience, number) => (answer, patience, number),
        };
        let outcome = if let Ok(outcome) = timeout(patience, &mut answer).await {
            outcome
        } else {
            self.leave_with_all(number);
            answer.await
        };
        outcome.unwrap_or_else(|_| Err(Error::cut_off()))
    }

    /// How long a call may take.
    pub(super) fn timeout(&self) -> Duration {
        self.0.tasks.timeout()
    }

    /// How many commands are under way, how many calls there are, and how many of them wait.
    #[cfg(test)]
    pub(super) fn under_way(&self) -> [usize; 3] {
        let state = self.lock();
        [state.commands, state.calls, state.waiting.len()]
    }

    /// Counts a call, from here to its end: what it waits for before it is sent is part of that.
    pub(super) fn sit(&self) -> Result<Seat<F>> {
        let mut state = self.lock();
        if state.calls >= self.0.limits.calls {
            return Err(overloaded(state.calls));
        }
        state.calls += 1;
        drop(state);
        Ok(Seat(self.clone()))
    }

    fn enter(&self, item: F::Item, began: Instant) -> Entered<F> {
        let limits = &self.0.limits;
        let mut state = self.lock();
        if state.waiting.is_empty() && self.is_worth_a_command(&state, 1) {
            return Entered::Goes(item, self.slot(&mut state, 1));
        }
        let (answer, answered) = oneshot::channel();
        let number = state.waited;
        state.waited += 1;
        state.waiting.push_back(Waiting { item, number, began, since: Instant::now(), answer });
        let excess = (state.commands / limits.commands.max(1)).saturating_sub(1).min(16);
        let timeout = self.0.tasks.timeout();
        // A call that has waited in its lane before has less time left.
        let left = timeout.saturating_sub(began.elapsed());
        let longest = limits.patience.max(timeout / 8).min(left / 2);
        let patience = limits.patience.saturating_mul(1 << excess).min(longest);
        self.let_go(state);
        Entered::Waits(answered, patience, number)
    }

    /// Whether so many calls, if they left now, were no fewer than a command under way carries on
    /// average, and those commands are few enough.
    fn is_worth_a_command(&self, state: &State<F>, calls: usize) -> bool {
        let commands = state.commands;
        commands < self.0.limits.commands && calls.saturating_mul(commands) >= state.carried
    }

    fn slot(&self, state: &mut State<F>, calls: usize) -> Slot<F> {
        state.commands += 1;
        state.carried += calls;
        Slot { queue: self.clone(), calls, era: state.era }
    }

    /// Lets those leave who may.
    fn let_go<'a>(&'a self, mut state: MutexGuard<'a, State<F>>) {
        // Where the runtime is gone a command ends in here, and the one below sees to the rest.
        if std::mem::replace(&mut state.leaving, true) {
            return;
        }
        while let Some(next) = state.waiting.front() {
            // Beyond the usual number, a command that has ended is followed by another one if it is
            // missed.
            let follows = state.ended > 0 && next.since.elapsed() >= self.0.limits.patience;
            if !follows && !self.is_worth_a_command(&state, state.waiting.len()) {
                break;
            }
            state.ended = state.ended.saturating_sub(1);
            let group = self.group(&mut state);
            if group.is_empty() {
                break;
            }
            let slot = self.slot(&mut state, group.len());
            drop(state);
            self.depart(group, slot);
            state = self.lock();
        }
        (state.ended, state.leaving) = (0, false);
    }

    /// All who wait leave, though as many commands are under way as there should be, or larger ones;
    /// unless the one of this number, who has waited in vain, has left already, and waits for the
    /// answer alone. Those who come meanwhile wait themselves.
    fn leave_with_all(&self, number: u64) {
        let mut state = self.lock();
        if state.waiting.front().is_none_or(|first| first.number > number) {
            return;
        }
        (state.carried, state.era) = (0, state.era + 1);
        let last = state.waited;
        while state.waiting.front().is_some_and(|first| first.number < last) {
            let group = self.group(&mut state);
            if group.is_empty() {
                return;
            }
            let slot = self.slot(&mut state, group.len());
            drop(state);
            self.depart(group, slot);
            state = self.lock();
        }
    }

    /// Takes those who leave next, of whom nobody may have been given up.
    fn group(&self, state: &mut State<F>) -> Vec<Waiting<F>> {
        let (limits, timeout) = (&self.0.limits, self.0.tasks.timeout());
        let (mut group, mut bytes) = (Vec::new(), 0_usize);
        while group.len() < limits.together
            && let Some(next) = state.waiting.pop_front()
        {
            // Its caller has been told by now, or is gone with its task: it need not be sent.
            if next.answer.is_closed() || next.began.elapsed() >= timeout {
                drop(next.answer.send(Err(timed_out(timeout))));
                continue;
            }
            bytes = bytes.saturating_add(F::bytes(&next.item));
            if bytes > limits.bytes && !group.is_empty() {
                state.waiting.push_front(next);
                break;
            }
            group.push(next);
        }
        group
    }

    /// Sends a group in a task of its own, which lasts no longer than the most impatient of its
    /// calls does: twice the timeout, or the timeout if the store is shut down.
    fn depart(&self, group: Vec<Waiting<F>>, slot: Slot<F>) {
        let queue = self.clone();
        self.0.tasks.spawn(async move {
            let longest = queue.0.tasks.timeout();
            let oldest = group.iter().map(|waiting| waiting.began).min();
            let deadline = oldest.unwrap_or_else(Instant::now) + longest;
            let (items, answers): (Vec<_>, Vec<_>) =
                group.into_iter().map(|waiting| (waiting.item, waiting.answer)).unzip();
            let mut work = pin!(queue.carry(items));
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

    async fn carry(&self, mut items: Vec<F::Item>) -> Result<Vec<Result<F::Answer>>> {
        let freight = &self.0.freight;
        match items.pop() {
            Some(only) if items.is_empty() => Ok(vec![freight.alone(only).await]),
            Some(last) => {
                items.push(last);
                freight.together(items).await
            }
            None => Ok(Vec::new()),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State<F>> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<F: Freight> Drop for Seat<F> {
    fn drop(&mut self) {
        self.0.lock().calls -= 1;
    }
}

impl<F: Freight> Drop for Slot<F> {
    fn drop(&mut self) {
        let mut state = self.queue.lock();
        state.commands -= 1;
        state.ended += 1;
        if self.era == state.era {
            state.carried -= self.calls;
        }
        self.queue.let_go(state);
    }
}

impl<F: Freight> Clone for Queue<F> {
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
