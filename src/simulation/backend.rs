//! A database in memory that answers when it is told to.
//!
//! Each call of the store waits here until a test [applies](FakeBackend::apply) it, which changes
//! or reads the data, and [answers](FakeBackend::answer) it. Between the two lies the network, so
//! every order of events that a real server and a real network can bring about can be played.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard};

use tokio::sync::{Notify, oneshot};

use crate::backend::{Backend, Call, Rev};
use crate::clock::Clock;
use crate::error::{Error, ErrorKind, Result};
use crate::key::SessionKey;
use crate::record::{Data, Session, WallTime};

#[derive(Clone)]
pub(crate) struct FakeBackend {
    state: Arc<Mutex<State>>,
    arrived: Arc<Notify>,
    clock: Clock,
}

#[derive(Default)]
struct State {
    sessions: HashMap<SessionKey, Session>,
    calls: BTreeMap<u64, Waiting>,
    made: u64,
}

struct Waiting {
    operation: Operation,
    outcome: Option<Outcome>,
    reply: oneshot::Sender<Result<Outcome>>,
}

#[derive(Clone, Debug)]
pub(crate) enum Operation {
    Insert(SessionKey, Session),
    Replace(SessionKey, Session),
    Find(SessionKey),
    Remove(SessionKey),
    Clear,
}

#[derive(Clone, Debug)]
enum Outcome {
    Written(Option<WallTime>),
    Found(Option<Session>),
    Removed,
    Cleared(u64),
}

impl FakeBackend {
    pub(crate) fn new(clock: Clock) -> Self {
        Self { state: Arc::default(), arrived: Arc::default(), clock }
    }

    /// Waits for the next call that `wanted` accepts, applied or not.
    pub(crate) async fn arrival(&self, wanted: impl Fn(&Operation) -> bool) -> u64 {
        loop {
            let arrived = self.arrived.notified();
            let found = self.waiting().into_iter().find(|(_, operation)| wanted(operation));
            if let Some((call, _)) = found {
                return call;
            }
            arrived.await;
        }
    }

    /// The calls that have not been answered.
    pub(crate) fn waiting(&self) -> Vec<(u64, Operation)> {
        self.state().calls.iter().map(|(call, it)| (*call, it.operation.clone())).collect()
    }

    /// How many calls were made in all.
    pub(crate) fn made(&self) -> u64 {
        self.state().made
    }

    /// Carries a call out, without answering.
    pub(crate) fn apply(&self, call: u64) {
        let mut state = self.state();
        let Some(waiting) = state.calls.get(&call) else { return };
        assert!(waiting.outcome.is_none(), "applied twice");
        let operation = waiting.operation.clone();
        let outcome = state.perform(operation, self.clock.wall());
        if let Some(waiting) = state.calls.get_mut(&call) {
            waiting.outcome = Some(outcome);
        }
    }

    /// Answers a call with what came of it, which is an error if it was not applied.
    pub(crate) fn answer(&self, call: u64) {
        let Some(waiting) = self.state().calls.remove(&call) else { return };
        drop(waiting.reply.send(waiting.outcome.ok_or_else(unreachable)));
    }

    /// Answers a call with an error, whatever came of it.
    pub(crate) fn fail(&self, call: u64) {
        let Some(waiting) = self.state().calls.remove(&call) else { return };
        drop(waiting.reply.send(Err(unreachable())));
    }

    /// Applies and answers.
    pub(crate) fn serve(&self, call: u64) {
        self.apply(call);
        self.answer(call);
    }

    /// What the database holds under a key.
    pub(crate) fn stored(&self, key: SessionKey) -> Option<Session> {
        self.state().sessions.get(&key).cloned()
    }

    /// Changes the database behind the store's back, as another instance would.
    pub(crate) fn put(&self, key: SessionKey, session: Option<Session>) {
        let mut state = self.state();
        match session {
            Some(session) => drop(state.sessions.insert(key, session)),
            None => drop(state.sessions.remove(&key)),
        }
    }

    fn call<T: Send + 'static>(
        &self,
        operation: Operation,
        convert: impl FnOnce(Outcome) -> Option<T> + Send + 'static,
    ) -> Call<T> {
        let this = self.clone();
        Box::pin(async move {
            let (reply, answer) = oneshot::channel();
            {
                let mut state = this.state();
                state.made += 1;
                let call = state.made;
                state.calls.insert(call, Waiting { operation, outcome: None, reply });
            }
            this.arrived.notify_waiters();
            let outcome = answer.await.map_err(|_| unreachable())??;
            convert(outcome).ok_or_else(unreachable)
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }
}

impl State {
    fn perform(&mut self, operation: Operation, now: WallTime) -> Outcome {
        match operation {
            Operation::Insert(key, session) => {
                let expires = session.expires;
                let free = !self.sessions.contains_key(&key);
                if free {
                    self.sessions.insert(key, session);
                }
                Outcome::Written(free.then_some(expires))
            }
            Operation::Replace(key, session) => {
                let expires = session.expires;
                let live = self.sessions.get_mut(&key).filter(|old| old.expires > now);
                Outcome::Written(live.map(|old| {
                    *old = session;
                    expires
                }))
            }
            Operation::Find(key) => {
                let found = self.sessions.get(&key).filter(|session| session.expires > now);
                Outcome::Found(found.cloned())
            }
            Operation::Remove(key) => {
                self.sessions.remove(&key);
                Outcome::Removed
            }
            Operation::Clear => {
                let count = self.sessions.len();
                self.sessions.clear();
                Outcome::Cleared(count as u64)
            }
        }
    }
}

fn unreachable() -> Error {
    Error::new(ErrorKind::Connection, "the connection was cut")
}

impl Backend for FakeBackend {
    fn insert(
        &self,
        key: SessionKey,
        _rev: Rev,
        data: &Data,
        expires: WallTime,
    ) -> Call<Option<WallTime>> {
        let session = Session { data: data.clone(), expires };
        self.call(Operation::Insert(key, session), |outcome| match outcome {
            Outcome::Written(written) => Some(written),
            _ => None,
        })
    }

    fn replace(
        &self,
        key: SessionKey,
        _rev: Rev,
        data: &Data,
        expires: WallTime,
    ) -> Call<Option<WallTime>> {
        let session = Session { data: data.clone(), expires };
        self.call(Operation::Replace(key, session), |outcome| match outcome {
            Outcome::Written(written) => Some(written),
            _ => None,
        })
    }

    fn find(&self, key: SessionKey) -> Call<Option<Session>> {
        self.call(Operation::Find(key), |outcome| match outcome {
            Outcome::Found(found) => Some(found),
            _ => None,
        })
    }

    fn remove(&self, key: SessionKey) -> Call<()> {
        self.call(Operation::Remove(key), |outcome| {
            matches!(outcome, Outcome::Removed).then_some(())
        })
    }

    fn clear(&self) -> Call<u64> {
        self.call(Operation::Clear, |outcome| match outcome {
            Outcome::Cleared(count) => Some(count),
            _ => None,
        })
    }
}
