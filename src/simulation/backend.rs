//! The two seams of a store, on the simulated network.
//!
//! Between the moment at which a call is applied and that at which it is answered lies the network,
//! so every order of events that a real server and a real network can bring about can be played.

use super::chance::Chance;
use super::stream::{Cursor, Handed};
use super::wire::{Manners, Operation, Outcome, Wire};
use crate::backend::{Asked, Backend, Call, Changes, Fault, Opened, Rev, ServerTime};
use crate::clock::Clock;
use crate::error::{Error, ErrorKind};
use crate::key::SessionKey;
use crate::record::{Data, Session, WallTime};

/// One store's connection to the database.
#[derive(Clone)]
pub(crate) struct FakeBackend {
    pub(super) wire: Wire,
    node: usize,
}

impl FakeBackend {
    pub(super) fn new(wire: Wire, node: usize) -> Self {
        Self { wire, node }
    }

    /// A database of its own, where nothing happens by chance.
    pub(super) fn alone(clock: Clock) -> Self {
        Self::new(Wire::new(clock, Chance::of(0), Manners::default()), 0)
    }

    /// Waits for the next call that `wanted` accepts, applied or not.
    pub(super) async fn arrival(&self, wanted: impl Fn(&Operation) -> bool) -> usize {
        loop {
            let arrived = self.wire.arrived.notified();
            let found = self.waiting().into_iter().find(|(_, operation)| wanted(operation));
            if let Some((call, _)) = found {
                return call;
            }
            arrived.await;
        }
    }

    /// The calls that have not been answered.
    pub(super) fn waiting(&self) -> Vec<(usize, Operation)> {
        let state = self.wire.state();
        state.calls.iter().map(|(call, it)| (*call, it.operation.clone())).collect()
    }

    /// How many calls were made in all.
    pub(super) fn made(&self) -> usize {
        self.wire.state().records.len()
    }

    pub(super) fn apply(&self, call: usize) {
        self.wire.apply(call);
    }

    pub(super) fn answer(&self, call: usize) {
        self.wire.answer(call);
    }

    /// Answers a call with an error, whatever came of it.
    pub(super) fn fail(&self, call: usize) {
        self.wire.fail(call, Fault::Passing);
    }

    /// Applies and answers.
    pub(super) fn serve(&self, call: usize) {
        self.apply(call);
        self.answer(call);
    }

    /// What the database holds under a key.
    pub(super) fn stored(&self, key: SessionKey) -> Option<Session> {
        self.wire.state().database.find(key)
    }

    /// Changes the database behind the store's back, as another instance would.
    pub(super) fn put(&self, key: SessionKey, session: Option<Session>) {
        let database = &mut self.wire.state().database;
        match session {
            Some(session) if database.find(key).is_some() => {
                database.replace(key, None, &session, None);
            }
            Some(session) => drop(database.insert(key, &session, None)),
            None => database.remove(key, None),
        }
    }

    fn call<T: Send + 'static>(
        &self,
        operation: Operation,
        convert: impl FnOnce(Outcome) -> Option<T> + Send + 'static,
    ) -> Call<T> {
        let call = self.wire.clone().call(self.node, operation);
        Box::pin(
            async move { convert(call.await.map_err(error)?).ok_or_else(|| error(Fault::Lost)) },
        )
    }

    fn ask<T: Send + 'static>(
        &self,
        operation: Operation,
        convert: impl FnOnce(Outcome) -> Option<T> + Send + 'static,
    ) -> Asked<T> {
        let call = self.wire.clone().call(self.node, operation);
        Box::pin(async move { convert(call.await?).ok_or(Fault::Refused) })
    }
}

/// What a fault is to a call that is not about a stream.
fn error(fault: Fault) -> Error {
    match fault {
        Fault::Passing => Error::new(ErrorKind::Connection, "the connection was cut"),
        _ => Error::new(ErrorKind::Server, "the server refused"),
    }
}

#[allow(clippy::option_option, reason = "what another outcome is not, and what this one says")]
#[allow(clippy::needless_pass_by_value, reason = "as a conversion is handed on")]
fn written(outcome: Outcome) -> Option<Option<WallTime>> {
    match outcome {
        Outcome::Written(written) => Some(written),
        _ => None,
    }
}

impl Backend for FakeBackend {
    type Place = ();

    fn insert(
        &self,
        key: SessionKey,
        _rev: Rev,
        data: &Data,
        expires: WallTime,
    ) -> Call<Option<WallTime>> {
        self.call(Operation::Insert(key, Session { data: data.clone(), expires }), written)
    }

    fn replace(
        &self,
        key: SessionKey,
        rev: Rev,
        data: &Data,
        expires: WallTime,
    ) -> Call<Option<WallTime>> {
        self.call(Operation::Replace(key, rev, Session { data: data.clone(), expires }), written)
    }

    fn turn_to_touch(&self, _: SessionKey) -> Option<Call<()>> {
        Some(Box::pin(async { Ok(()) }))
    }

    fn touch(&self, (): (), key: SessionKey, expires: WallTime) -> Call<Option<WallTime>> {
        self.call(Operation::Touch(key, expires), written)
    }

    fn is_settled(&self, _: SessionKey) -> bool {
        true
    }

    fn expiry(&self, expires: WallTime) -> WallTime {
        expires
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

impl Changes for FakeBackend {
    type Stream = Cursor;
    type Position = usize;

    fn open(&self, after: Option<usize>) -> Opened<Cursor, usize> {
        self.ask(Operation::Open(after), handed)
    }

    fn more(&self, stream: Cursor) -> Opened<Cursor, usize> {
        self.ask(Operation::More(stream), handed)
    }

    fn fence(&self) -> Asked<ServerTime> {
        self.ask(Operation::Fence, |outcome| match outcome {
            Outcome::Time(time) => Some(time),
            _ => None,
        })
    }
}

fn handed(outcome: Outcome) -> Option<(Cursor, Handed)> {
    match outcome {
        Outcome::Handed(cursor, batch) => Some((cursor, batch)),
        _ => None,
    }
}
