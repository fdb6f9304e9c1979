//! `TracedBackend`: the backend of a simulated store. It passes each call to the real batcher and reports the end of
//! the call to the oracle.
//!
//! The report happens in the store's own task, in the turn in which the store receives the outcome. So the oracle
//! learns of an outcome at the same time as the store.

use crate::backend::{Backend, BeginDelete, Call, MergeAnswer, MergeCall, MergeTurn, NewSession};
use crate::batching::{BatchLimits, Batcher};
use crate::error::{Error, ErrorKind, Result};
use crate::request_scope::changes::{OnConflict, ScopedSave};
use crate::runtime::Tasks;
use crate::session::id::SessionKey;
use crate::session::revision::Rev;
use crate::session::{Data, Session};
use crate::simulation::backend::FakeBackend;
use crate::simulation::operation::{Operation, Update};
use crate::simulation::types::End;
use crate::simulation::wire::Wire;
use crate::time::WallTime;

#[derive(Clone)]
pub(crate) struct TracedBackend {
    batcher: Batcher<FakeBackend>,
    wire: Wire,
    node: usize,
    /// More calls than this in one queue are refused.
    max_calls: usize,
}

/// A store call that has not ended. Dropping it counts as abandoning the call.
pub(crate) struct TracedCall {
    number: usize,
    backend: TracedBackend,
    /// The touch has its permit and is not sent yet, so the store may drop it at any time.
    idle: bool,
    is_merge: bool,
    ended: bool,
}

impl TracedBackend {
    pub(crate) fn new(
        wire: &Wire,
        node: usize,
        tasks: &Tasks,
        limits: BatchLimits,
        rng: fastrand::Rng,
    ) -> Self {
        let commands = FakeBackend::new(wire.clone(), node);
        let batcher = Batcher::new(commands, tasks, limits, rng);
        Self { batcher, wire: wire.clone(), node, max_calls: limits.max_calls }
    }

    /// What the batcher keeps of calls: four zeros once all calls have ended.
    pub(crate) fn load(&self) -> [usize; 4] {
        self.batcher.load()
    }

    fn watch_permit(
        &self,
        key: SessionKey,
        permit: Call<<Batcher<FakeBackend> as Backend>::TouchPermit>,
    ) -> Call<<Self as Backend>::TouchPermit> {
        let mut call = self.begin(Operation::Touch(key, WallTime::from_millis(0)));
        Box::pin(async move {
            match permit.await {
                Ok(permit) => {
                    call.idle = true;
                    Ok((permit, call))
                }
                Err(error) => call.watch(Box::pin(async { Err(error) })).await,
            }
        })
    }

    fn begin(&self, operation: Operation) -> TracedCall {
        let now = self.wire.clock.now();
        let is_merge = operation.is_merge();
        let mut state = self.wire.state();
        let state = &mut *state;
        let number = state.record(self.node, operation, now);
        state.pending.begin(number, &state.records[number]);
        state.oracle.begin_call(self.node, number);
        TracedCall { number, backend: self.clone(), idle: false, is_merge, ended: false }
    }
}

impl TracedCall {
    async fn watch<T: Send + 'static>(mut self, call: Call<T>) -> Result<T> {
        let wire = self.backend.wire.clone();
        let outcome = call.await;
        let laziness = wire.state().faults.laziness;
        wire.chance.dawdle(laziness).await;
        self.finish(match &outcome {
            Ok(_) => End::Answered,
            Err(error) if error.is_server_overload() => End::Rejected,
            Err(error) if error.was_not_carried_out() => {
                self.check_refusal(error);
                End::NotSent
            }
            Err(error) => End::Failed { outage: error.is_outage() },
        });
        outcome
    }

    /// Watches the answer of a merge.
    async fn watch_merge(
        self,
        key: SessionKey,
        answer: impl Future<Output = MergeAnswer> + Send + 'static,
    ) -> MergeAnswer {
        let number = self.number;
        let wire = self.backend.wire.clone();
        let answer = async move {
            let saved = answer.await?;
            if saved.is_none() {
                // The last call may have been a read, which has no rank.
                let state = &mut *wire.state();
                state.records[number].ranks = state.database.ranks(&[key]);
            }
            Ok(saved)
        };
        self.watch(Box::pin(answer)).await
    }

    /// The batcher may refuse a call only if its queue was full. A merge also needs room in the queue of reads.
    fn check_refusal(&self, error: &Error) {
        if error.kind() != ErrorKind::Overloaded || self.is_merge {
            return;
        }
        let mut state = self.backend.wire.state();
        state.oracle.count("overloaded");
        let others = state.pending.finish(self.number).unwrap_or_default();
        if others < self.backend.max_calls {
            let text = format!("a call was refused, and only {others} calls were pending");
            state.oracle.report_violation(text);
        }
    }

    fn finish(&mut self, end: End) {
        self.ended = true;
        let number = self.number;
        let now = self.backend.wire.clock.now();
        let mut state = self.backend.wire.state();
        let state = &mut *state;
        let step = state.database.step();
        state.trace.note(|| format!("store call {number}: {end:?}"));
        state.pending.finish(number);
        let record = &mut state.records[number];
        record.ended = Some(step);
        state.oracle.finish_call(
            record,
            number,
            end,
            &mut state.database,
            &state.faults,
            (step, now),
        );
    }
}

impl Drop for TracedCall {
    fn drop(&mut self) {
        if !self.ended && !std::thread::panicking() {
            self.finish(if self.idle { End::NotSent } else { End::Abandoned });
        }
    }
}

impl Backend for TracedBackend {
    type TouchPermit = (<Batcher<FakeBackend> as Backend>::TouchPermit, TracedCall);
    type MergePermit = (<Batcher<FakeBackend> as Backend>::MergePermit, TracedCall);

    fn insert(&self, new: NewSession<'_>, begin_evict: BeginDelete) -> Call<Option<WallTime>> {
        self.wire.state().merges.record_insert(new.rev);
        self.batcher.insert(new, begin_evict)
    }

    fn discard_late_insert(&self, key: SessionKey) {
        Backend::discard_late_insert(&self.batcher, key);
    }

    fn replace(
        &self,
        key: SessionKey,
        rev: Rev,
        data: &Data,
        expires: WallTime,
    ) -> Call<Option<WallTime>> {
        // The call must be pending before the batcher decides, right here, whether its queue has room.
        let session = Session::new(data.clone(), expires);
        let call = self.begin(Operation::Replace(key, rev, session, Update::default()));
        Box::pin(call.watch(self.batcher.replace(key, rev, data, expires)))
    }

    fn acquire_merge(
        &self,
        key: SessionKey,
        save: ScopedSave,
    ) -> Call<MergeTurn<Self::MergePermit>> {
        let session = Session::new(Data::clone(save.data()), save.expected().expires);
        let call = self.begin(Operation::Merge(key, session));
        let turn = self.batcher.acquire_merge(key, save);
        Box::pin(async move {
            match turn.await {
                Ok(MergeTurn::Comes(permit)) => Ok(MergeTurn::Comes((permit, call))),
                Ok(MergeTurn::IsOver(answer)) => {
                    Ok(MergeTurn::IsOver(call.watch_merge(key, async { answer }).await))
                }
                Err(error) => call.watch(Box::pin(async { Err(error) })).await,
            }
        })
    }

    fn merge(&self, (permit, call): Self::MergePermit, key: SessionKey, rev: Rev) -> MergeCall {
        self.wire.state().pending.begin_merge(call.number, rev, permit.joined());
        let merge = self.batcher.merge(permit, key, rev);
        Box::pin(async move {
            let mut outcome = merge.await;
            let own = std::mem::replace(&mut outcome.own, Ok(None));
            outcome.own = call.watch_merge(key, async { own }).await;
            outcome
        })
    }

    fn acquire_touch(&self, key: SessionKey) -> Call<Self::TouchPermit> {
        self.watch_permit(key, self.batcher.acquire_touch(key))
    }

    fn acquire_touch_of_cached(&self, key: SessionKey) -> Option<Call<Self::TouchPermit>> {
        let permit = self.batcher.acquire_touch_of_cached(key)?;
        Some(self.watch_permit(key, permit))
    }

    fn touch(
        &self,
        (permit, mut call): Self::TouchPermit,
        key: SessionKey,
        expires: WallTime,
    ) -> Call<Option<WallTime>> {
        call.idle = false;
        Box::pin(call.watch(self.batcher.touch(permit, key, expires)))
    }

    fn has_pending_write(&self, key: SessionKey) -> bool {
        self.batcher.has_pending_write(key)
    }

    fn expiry(&self, expires: WallTime) -> WallTime {
        self.batcher.expiry(expires)
    }

    fn find(&self, key: SessionKey) -> Call<Option<Session>> {
        let call = self.begin(Operation::Find(key));
        Box::pin(call.watch(self.batcher.find(key)))
    }

    fn remove(&self, key: SessionKey) -> Call<()> {
        self.batcher.remove(key)
    }

    fn take(&self, key: SessionKey) -> Call<Option<Session>> {
        let removal = self.wire.state().merges.take_removal();
        let take = self.batcher.take(key);
        let wire = self.wire.clone();
        Box::pin(async move {
            if let Some(removal) = removal {
                wire.state().merges.send_removal(removal);
            }
            take.await
        })
    }

    fn clear(&self) -> Call<u64> {
        self.batcher.clear()
    }

    fn cap(&self, expires: WallTime, created: Option<WallTime>) -> Option<WallTime> {
        Backend::cap(&self.batcher, expires, created)
    }

    fn have_same_owner(&self, one: &Data, other: &Data) -> Result<bool> {
        Backend::have_same_owner(&self.batcher, one, other)
    }

    fn on_conflict(&self) -> Option<OnConflict> {
        Backend::on_conflict(&self.batcher)
    }

    fn record_dropped_save(&self) {
        Backend::record_dropped_save(&self.batcher);
    }
}
