//! Where a store ends and its queues begin: each call is watched to its end in the store's own
//! task, in the same turn in which the store takes what came of it.

use crate::backend::{Backend, Call};
use crate::batching::{BatchLimits, Batcher};
use crate::error::{Error, ErrorKind, Result};
use crate::runtime::Tasks;
use crate::session::id::SessionKey;
use crate::session::revision::Rev;
use crate::session::{Data, Session};
use crate::simulation::backend::{FakeBackend, UPDATE_BYTES};
use crate::simulation::operation::Operation;
use crate::simulation::oracle::End;
use crate::simulation::wire::Wire;
use crate::time::WallTime;

/// A store's way to the database. Clones share it.
#[derive(Clone)]
pub(crate) struct TracedBackend {
    dispatch: Batcher<FakeBackend>,
    wire: Wire,
    node: usize,
    calls: usize,
}

/// A call under way.
pub(crate) struct Errand {
    number: usize,
    edge: TracedBackend,
    /// It may be dropped at any time.
    idle: bool,
    ended: bool,
}

impl TracedBackend {
    pub(crate) fn new(wire: &Wire, node: usize, tasks: &Tasks, limits: BatchLimits) -> Self {
        let commands = FakeBackend::new(wire.clone(), node);
        let dispatch = Batcher::new(commands, tasks, limits);
        Self { dispatch, wire: wire.clone(), node, calls: limits.max_calls }
    }

    /// What is kept of what is under way: nothing, at rest.
    pub(crate) fn under_way(&self) -> [usize; 4] {
        self.dispatch.load()
    }

    fn begins(&self, operation: Operation) -> Errand {
        let now = self.wire.clock.now();
        let mut state = self.wire.state();
        let state = &mut *state;
        let number = state.notes(self.node, operation, now);
        state.errands.begins(number, &state.records[number]);
        state.oracle.begins(self.node, number);
        Errand { number, edge: self.clone(), idle: false, ended: false }
    }
}

impl Errand {
    async fn watch<T: Send + 'static>(mut self, call: Call<T>) -> Result<T> {
        let wire = self.edge.wire.clone();
        let outcome = call.await;
        let laziness = wire.state().manners.laziness;
        wire.chance.dawdle(laziness).await;
        self.ends(match &outcome {
            Ok(_) => End::Answered,
            Err(error) if error.is_server_overload() => End::TurnedAway,
            Err(error) if error.was_not_carried_out() => self.refused(error),
            Err(error) => End::Failed { outage: error.is_outage() },
        });
        outcome
    }

    /// Whether it was right not to send it.
    fn refused(&self, error: &Error) -> End {
        let mut state = self.edge.wire.state();
        if error.kind() == ErrorKind::Overloaded {
            state.oracle.count("overloaded");
            let others = state.errands.ends(self.number).unwrap_or_default();
            if others < self.edge.calls {
                state.oracle.violated(format!("refused, and there were {others} calls"));
            }
        }
        End::NotSent
    }

    fn ends(&mut self, end: End) {
        self.ended = true;
        let now = self.edge.wire.clock.now();
        let mut state = self.edge.wire.state();
        let state = &mut *state;
        let (number, step) = (self.number, state.database.step());
        state.trace.note(|| format!("errand {number}: {end:?}"));
        state.errands.ends(number);
        let record = &mut state.records[number];
        record.ended = Some(step);
        state.oracle.ends(record, number, end, &mut state.database, &state.manners, (step, now));
    }
}

impl Drop for Errand {
    fn drop(&mut self) {
        if !self.ended && !std::thread::panicking() {
            self.ends(if self.idle { End::NotSent } else { End::GivenUp });
        }
    }
}

impl Backend for TracedBackend {
    type TouchPermit = (<Batcher<FakeBackend> as Backend>::TouchPermit, Errand);

    fn insert(
        &self,
        key: SessionKey,
        rev: Rev,
        data: &Data,
        expires: WallTime,
    ) -> Call<Option<WallTime>> {
        self.dispatch.insert(key, rev, data, expires)
    }

    fn replace(
        &self,
        key: SessionKey,
        rev: Rev,
        data: &Data,
        expires: WallTime,
    ) -> Call<Option<WallTime>> {
        // Whether there is room is seen at once.
        let session = Session { data: data.clone(), expires };
        let errand = self.begins(Operation::Replace(key, rev, session));
        Box::pin(errand.watch(self.dispatch.replace(key, rev, data, expires)))
    }

    fn acquire_touch(&self, key: SessionKey) -> Option<Call<Self::TouchPermit>> {
        let turn = self.dispatch.acquire_touch(key)?;
        let mut errand = self.begins(Operation::Touch(key, WallTime::from_millis(0)));
        Some(Box::pin(async move {
            match turn.await {
                Ok(place) => {
                    errand.idle = true;
                    Ok((place, errand))
                }
                Err(error) => errand.watch(Box::pin(async { Err(error) })).await,
            }
        }))
    }

    fn touch(
        &self,
        (place, mut errand): Self::TouchPermit,
        key: SessionKey,
        expires: WallTime,
    ) -> Call<Option<WallTime>> {
        errand.idle = false;
        Box::pin(errand.watch(self.dispatch.touch(place, key, expires)))
    }

    fn has_pending_write(&self, key: SessionKey) -> bool {
        self.dispatch.has_pending_write(key)
    }

    fn expiry(&self, expires: WallTime) -> WallTime {
        self.dispatch.expiry(expires)
    }

    fn find(&self, key: SessionKey) -> Call<Option<Session>> {
        let errand = self.begins(Operation::Find(key));
        Box::pin(errand.watch(self.dispatch.find(key)))
    }

    fn remove(&self, key: SessionKey) -> Call<()> {
        self.dispatch.remove(key)
    }

    fn clear(&self) -> Call<u64> {
        self.dispatch.clear()
    }
}

/// Room for so many updates in one command.
pub(crate) const fn bytes_of(updates: usize) -> usize {
    updates * UPDATE_BYTES
}
