//! A network that can be broken.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::watch;

/// The direction of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// Requests.
    ToServer,
    /// Replies.
    ToClient,
}

/// How a connection is ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// By closing it in both directions, as TCP normally ends.
    Close,
    /// By a reset, on both sides.
    Reset,
}

/// The state of all connections of a proxy.
#[derive(Debug)]
pub(crate) struct Network {
    /// The number of faults that refuse new connections.
    refusing: AtomicU32,
    /// Each change ends all connections.
    pub(crate) broken_off: watch::Sender<Ending>,
    to_server: DirectionState,
    to_client: DirectionState,
}

/// The state of one direction of all connections.
#[derive(Debug)]
pub(crate) struct DirectionState {
    flow: watch::Sender<Flow>,
    /// How to break off the next messages.
    breaks: Mutex<Vec<Ending>>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Flow {
    /// The number of faults that stall this direction.
    stalls: u32,
    delay: Duration,
}

impl Network {
    pub(crate) fn new() -> Self {
        Self {
            refusing: AtomicU32::new(0),
            broken_off: watch::Sender::new(Ending::Close),
            to_server: DirectionState::new(),
            to_client: DirectionState::new(),
        }
    }

    pub(crate) fn refuse(&self, yes: bool) {
        if yes {
            self.refusing.fetch_add(1, Ordering::SeqCst);
        } else {
            let one_less = |refusing: u32| refusing.checked_sub(1);
            let _ = self.refusing.fetch_update(Ordering::SeqCst, Ordering::SeqCst, one_less);
        }
    }

    pub(crate) fn is_refusing(&self) -> bool {
        self.refusing.load(Ordering::SeqCst) > 0
    }

    pub(crate) fn state(&self, direction: Direction) -> &DirectionState {
        match direction {
            Direction::ToServer => &self.to_server,
            Direction::ToClient => &self.to_client,
        }
    }
}

impl DirectionState {
    fn new() -> Self {
        Self { flow: watch::Sender::new(Flow::default()), breaks: Mutex::default() }
    }

    pub(crate) fn stall(&self, yes: bool) {
        self.flow.send_modify(|flow| {
            flow.stalls = if yes { flow.stalls + 1 } else { flow.stalls.saturating_sub(1) };
        });
    }

    pub(crate) fn delay(&self, delay: Duration) {
        self.flow.send_modify(|flow| flow.delay = delay);
    }

    pub(crate) fn break_next(&self, ending: Ending, count: usize) {
        let mut breaks = self.breaks.lock().unwrap_or_else(PoisonError::into_inner);
        breaks.clear();
        breaks.resize(count, ending);
    }

    /// Waits for the delay of a message in this direction, and while the direction is stalled.
    pub(crate) async fn pass(&self) {
        let delay = self.flowing().await;
        if !delay.is_zero() {
            tokio::time::sleep(delay).await;
            self.flowing().await;
        }
    }

    /// Waits while the direction is stalled, and returns the delay.
    async fn flowing(&self) -> Duration {
        let mut flow = self.flow.subscribe();
        let flowing = flow.wait_for(|flow| flow.stalls == 0).await;
        flowing.map(|flow| flow.delay).unwrap_or_default()
    }

    /// How to break off the next message, if at all.
    pub(crate) fn next_break(&self) -> Option<Ending> {
        self.breaks.lock().unwrap_or_else(PoisonError::into_inner).pop()
    }
}
