//! `FakeBackend`: one store's connection to the simulated database.
//!
//! It implements the traits through which a store reaches MongoDB: `Commands` (what the batcher sends), `Backend`
//! (the same without a batcher) and `ChangeSource` (the change stream). Time passes between the moment at which a
//! call is applied and the moment at which it is answered, so a test can play every order of events that a real
//! server and network can cause.

use futures::future::join_all;

use crate::backend::{Backend, BeginDelete, Call, MergeCall, MergeTurn, NewSession};
use crate::batching::{Commands, Condition, MergeEnd, NewExpiry, Updated};
use crate::error::{Error, ErrorKind, Result};
use crate::invalidation::source::{
    ChangeSource, Fault, PrimaryTime, Refusal, SourceCall, StreamCall,
};
use crate::mongo::change_stream::cursor::ResumeToken;
use crate::mongo::change_stream::reader::InvalidationReader;
use crate::request_scope::changes::{OnConflict, ScopedSave};
use crate::session::id::SessionKey;
use crate::session::revision::Rev;
use crate::session::{Data, Session};
use crate::simulation::chance::Chance;
use crate::simulation::merge_oracle;
use crate::simulation::operation::{Operation, Outcome, Update};
use crate::simulation::stream::{Cursor, Reply};
use crate::simulation::types::{FaultConfig, Floors, UNSTORABLE, UPDATE_BYTES, version};
use crate::simulation::wire::Wire;
use crate::time::{Clock, WallTime};

#[derive(Clone)]
pub(crate) struct FakeBackend {
    pub(crate) wire: Wire,
    node: usize,
    /// The app's function for values that two requests have changed.
    on_conflict: Option<OnConflict>,
}

impl FakeBackend {
    pub(crate) fn new(wire: Wire, node: usize) -> Self {
        let adds_up = wire.state().merges.adds_up;
        let on_conflict = adds_up.then(merge_oracle::on_conflict);
        Self { wire, node, on_conflict }
    }

    pub(crate) fn with_on_conflict(self, on_conflict: OnConflict) -> Self {
        Self { on_conflict: Some(on_conflict), ..self }
    }

    /// Connects to a new database without any faults. Every call waits for the test.
    pub(crate) fn alone(clock: Clock) -> Self {
        Self::new(Wire::new(clock, Chance::of(0), FaultConfig::default()), 0)
    }

    /// Waits until a call that `wanted` accepts has arrived. Returns the oldest such call, applied or not.
    pub(crate) async fn arrival(&self, wanted: impl Fn(&Operation) -> bool) -> usize {
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
    pub(crate) fn waiting(&self) -> Vec<(usize, Operation)> {
        let state = self.wire.state();
        state.calls.iter().map(|(call, it)| (*call, it.operation.clone())).collect()
    }

    /// The number of calls so far.
    pub(crate) fn made(&self) -> usize {
        self.wire.state().records.len()
    }

    pub(crate) fn apply(&self, call: usize) {
        self.wire.apply(call);
    }

    pub(crate) fn answer(&self, call: usize) {
        self.wire.answer(call);
    }

    /// Answers a call with an error, whether it was applied or not.
    pub(crate) fn fail(&self, call: usize) {
        self.wire.fail(call, Fault::Passing);
    }

    /// Applies a call and answers it.
    pub(crate) fn serve(&self, call: usize) {
        self.apply(call);
        self.answer(call);
    }

    /// The session that is stored under a key.
    pub(crate) fn stored(&self, key: SessionKey) -> Option<Session> {
        self.wire.state().database.find(key)
    }

    /// Changes the database as another instance does.
    pub(crate) fn put(&self, key: SessionKey, session: Option<Session>) {
        let database = &mut self.wire.state().database;
        match session {
            Some(session) if database.find(key).is_some() => {
                database.replace(key, None, &session, None);
            }
            Some(session) => {
                database.insert(key, &session, None);
            }
            None => database.remove(key, None),
        }
    }

    /// The current rank of each of these sessions.
    pub(crate) fn ranks(&self, keys: &[SessionKey]) -> Floors {
        self.wire.state().database.ranks(keys)
    }

    pub(crate) fn call<T: Send + 'static>(
        &self,
        operation: Operation,
        convert: impl FnOnce(Outcome) -> Option<T> + Send + 'static,
    ) -> Call<T> {
        self.send(None, operation, convert)
    }

    /// Sends a call, alone or as a part of a batch.
    fn send<T: Send + 'static>(
        &self,
        batch: Option<usize>,
        operation: Operation,
        convert: impl FnOnce(Outcome) -> Option<T> + Send + 'static,
    ) -> Call<T> {
        let call = self.wire.clone().call(self.node, operation, batch);
        Box::pin(
            async move { convert(call.await.map_err(error)?).ok_or_else(|| error(Fault::Lost)) },
        )
    }

    /// Sends one command of many parts. The database carries out each part at another moment, and a part may fail
    /// alone. The command is answered once all parts are, or it fails as a whole.
    fn send_batch<T: Send + 'static>(
        &self,
        operations: Vec<Operation>,
        convert: impl FnOnce(Outcome) -> Option<T> + Copy + Send + 'static,
    ) -> Call<Vec<Result<T>>> {
        let batch = self.wire.state().begin_batch(operations.len());
        let send = |operation| self.send(Some(batch), operation, convert);
        let parts: Vec<_> = operations.into_iter().map(send).collect();
        let wire = self.wire.clone();
        Box::pin(async move {
            let outcomes = join_all(parts).await;
            let failed = wire.state().failed_batches.get(&batch).cloned();
            failed.map_or(Ok(outcomes), |fault| Err(error(fault)))
        })
    }

    fn ask<T: Send + 'static>(
        &self,
        operation: Operation,
        convert: impl FnOnce(Outcome) -> Option<T> + Send + 'static,
    ) -> SourceCall<T> {
        let call = self.wire.clone().call(self.node, operation, None);
        Box::pin(
            async move { convert(call.await?).ok_or_else(|| Fault::Refused(Refusal::default())) },
        )
    }
}

/// What a fault is to a call that is not about a stream.
#[allow(clippy::needless_pass_by_value, reason = "it converts an owned value")]
fn error(fault: Fault) -> Error {
    match fault {
        Fault::Passing => Error::new(ErrorKind::Connection, "the connection was cut"),
        Fault::Overloaded => Error::server_overloaded("the server is overloaded", true),
        _ => Error::new(ErrorKind::Server, "the server refused"),
    }
}

#[allow(clippy::option_option, reason = "the outer `None` is an outcome of another kind")]
#[allow(clippy::needless_pass_by_value, reason = "it converts an owned value")]
fn inserted(outcome: Outcome) -> Option<Option<WallTime>> {
    match outcome {
        Outcome::Inserted(inserted) => Some(inserted),
        _ => None,
    }
}

#[allow(clippy::needless_pass_by_value, reason = "it converts an owned value")]
fn updated(outcome: Outcome) -> Option<Updated> {
    match outcome {
        Outcome::Updated(updated) => Some(updated),
        _ => None,
    }
}

#[allow(clippy::option_option, reason = "the outer `None` is an outcome of another kind")]
fn stored(outcome: Outcome) -> Option<Option<WallTime>> {
    match updated(outcome)? {
        Updated::Stored(expires) => Some(Some(expires)),
        Updated::Gone | Updated::Changed => Some(None),
    }
}

#[allow(clippy::option_option, reason = "the outer `None` is an outcome of another kind")]
fn found(outcome: Outcome) -> Option<Option<Session>> {
    match outcome {
        Outcome::Found(found) => Some(found),
        _ => None,
    }
}

/// The calls that [`Batcher`](crate::batching::Batcher) sends.
impl Commands for FakeBackend {
    type Update = Operation;

    fn insert(&self, new: NewSession<'_>, begin_evict: BeginDelete) -> Call<Option<WallTime>> {
        Backend::insert(self, new, begin_evict)
    }

    fn discard_late_insert(&self, _: SessionKey) {}

    fn replacement(
        &self,
        key: SessionKey,
        rev: Rev,
        data: &Data,
        expires: NewExpiry,
        condition: Condition,
    ) -> Result<Operation> {
        if version(data) == UNSTORABLE {
            return Err(Error::new(ErrorKind::Encode, "it cannot be stored"));
        }
        let session = Session::new(data.clone(), expires.time());
        let keeps_later = matches!(expires, NewExpiry::AtLeast(_));
        Ok(Operation::Replace(key, rev, session, Update { condition, keeps_later }))
    }

    fn touch(&self, key: SessionKey, expires: WallTime) -> Operation {
        Operation::Touch(key, expires)
    }

    fn bytes(_: &Operation) -> usize {
        UPDATE_BYTES
    }

    fn update(&self, update: Operation) -> Call<Updated> {
        self.call(update, updated)
    }

    fn update_all(&self, updates: Vec<Operation>) -> Call<Vec<Result<Updated>>> {
        self.send_batch(updates, updated)
    }

    fn cap(&self, expires: WallTime, _: Option<WallTime>) -> Option<WallTime> {
        Some(expires)
    }

    fn have_same_owner(&self, _: &Data, _: &Data) -> Result<bool> {
        Ok(true)
    }

    fn on_conflict(&self) -> Option<&OnConflict> {
        self.on_conflict.as_ref()
    }

    fn record_merge(&self, _: MergeEnd, _: u32, _: u64) {}

    fn record_dropped_save(&self) {}

    fn find(&self, key: SessionKey) -> Call<Option<Session>> {
        Backend::find(self, key)
    }

    fn find_all(&self, keys: Vec<SessionKey>) -> Call<Vec<Result<Option<Session>>>> {
        self.send_batch(keys.into_iter().map(Operation::Find).collect(), found)
    }

    fn remove(&self, key: SessionKey) -> Call<()> {
        Backend::remove(self, key)
    }

    fn take(&self, key: SessionKey) -> Call<Option<Session>> {
        Backend::take(self, key)
    }

    fn clear(&self) -> Call<u64> {
        Backend::clear(self)
    }

    fn expiry(&self, expires: WallTime) -> WallTime {
        expires
    }
}

/// The calls of a store that has no batcher.
impl Backend for FakeBackend {
    type TouchPermit = ();
    type MergePermit = ();

    fn insert(&self, new: NewSession<'_>, _: BeginDelete) -> Call<Option<WallTime>> {
        let NewSession { key, rev, data, expires, created } = new;
        let session = Session { data: data.clone(), expires, rev: Some(rev), created };
        self.call(Operation::Insert(key, session), inserted)
    }

    fn discard_late_insert(&self, _: SessionKey) {}

    fn replace(
        &self,
        key: SessionKey,
        rev: Rev,
        data: &Data,
        expires: WallTime,
    ) -> Call<Option<WallTime>> {
        let session = Session::new(data.clone(), expires);
        self.call(Operation::Replace(key, rev, session, Update::default()), stored)
    }

    fn acquire_merge(&self, _: SessionKey, _: ScopedSave) -> Call<MergeTurn<()>> {
        unreachable!("a merge needs the write queue of a batcher")
    }

    fn merge(&self, (): (), _: SessionKey, _: Rev) -> MergeCall {
        unreachable!("a merge needs the write queue of a batcher")
    }

    fn acquire_touch(&self, _: SessionKey) -> Call<()> {
        Box::pin(async { Ok(()) })
    }

    fn acquire_touch_of_cached(&self, key: SessionKey) -> Option<Call<()>> {
        Some(self.acquire_touch(key))
    }

    fn touch(&self, (): (), key: SessionKey, expires: WallTime) -> Call<Option<WallTime>> {
        self.call(Operation::Touch(key, expires), stored)
    }

    fn has_pending_write(&self, _: SessionKey) -> bool {
        false
    }

    fn expiry(&self, expires: WallTime) -> WallTime {
        expires
    }

    fn find(&self, key: SessionKey) -> Call<Option<Session>> {
        self.call(Operation::Find(key), found)
    }

    fn remove(&self, key: SessionKey) -> Call<()> {
        self.call(Operation::Remove(key), |outcome| {
            matches!(outcome, Outcome::Removed).then_some(())
        })
    }

    fn take(&self, key: SessionKey) -> Call<Option<Session>> {
        self.call(Operation::Take(key), found)
    }

    fn cap(&self, expires: WallTime, _: Option<WallTime>) -> Option<WallTime> {
        Some(expires)
    }

    fn have_same_owner(&self, _: &Data, _: &Data) -> Result<bool> {
        Ok(true)
    }

    fn on_conflict(&self) -> Option<OnConflict> {
        self.on_conflict.clone()
    }

    fn record_dropped_save(&self) {}

    fn clear(&self) -> Call<u64> {
        self.call(Operation::Clear, |outcome| match outcome {
            Outcome::Cleared(count) => Some(count),
            _ => None,
        })
    }
}

/// An open stream, with the shipped code that reads its replies.
pub(crate) struct Stream {
    cursor: Cursor,
    reader: InvalidationReader,
}

impl ChangeSource for FakeBackend {
    type Stream = Stream;
    type Position = ResumeToken;

    fn open(&self, after: Option<ResumeToken>) -> StreamCall<Stream, ResumeToken> {
        let reply = self.ask(Operation::Open(after), batch_reply);
        Box::pin(async move {
            let (cursor, reply) = reply.await?;
            let mut reader = InvalidationReader::new(cursor.source());
            let batch = reader.read(reply.into()).batch;
            Ok((Stream { cursor, reader }, batch))
        })
    }

    fn next_batch(&self, stream: Stream) -> StreamCall<Stream, ResumeToken> {
        let Stream { cursor, mut reader } = stream;
        let reply = self.ask(Operation::GetMore(cursor), batch_reply);
        Box::pin(async move {
            let (cursor, reply) = reply.await?;
            let batch = reader.read(reply.into()).batch;
            Ok((Stream { cursor, reader }, batch))
        })
    }

    fn primary_time(&self) -> SourceCall<PrimaryTime> {
        self.ask(Operation::PrimaryTime, |outcome| match outcome {
            Outcome::Time(time) => Some(time),
            _ => None,
        })
    }
}

fn batch_reply(outcome: Outcome) -> Option<(Cursor, Reply)> {
    match outcome {
        Outcome::Batch(cursor, reply) => Some((cursor, reply)),
        _ => None,
    }
}
