//! [`Batcher`]: decides when reads and saves are sent, and which are sent in one command.
//!
//! A command costs the driver and the server many times what one document in it does. While few commands
//! are in flight, each call is sent at once. While the server is busy, the next calls could not be served
//! sooner anyway: they wait in a [`BatchQueue`] and are sent as one command. The saves of one session are
//! sent one after the other, in the order of the calls: see [`WriteQueue`].

mod batch_queue;
mod merge;
mod write_queue;

use std::collections::HashMap;
use std::sync::Arc;

use tokio::time::Instant;

use crate::backend::{Backend, BeginDelete, Call, MergeCall, MergeTurn, NewSession};
pub(crate) use crate::batching::batch_queue::BatchLimits;
use crate::batching::batch_queue::{AdmissionPermit, BatchExecutor, BatchQueue};
use crate::batching::write_queue::{MergePlace, WritePermit, WriteQueue};
use crate::error::{Error, Result};
use crate::request_scope::changes::{OnConflict, ScopedSave};
use crate::runtime::{Tasks, timed_out};
use crate::session::id::SessionKey;
use crate::session::revision::Rev;
use crate::session::{Data, Session};
use crate::sync::Mutex;
use crate::time::WallTime;

/// On which state of a session an update is carried out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Condition {
    /// On each live one.
    IsLive,
    /// On the live one that has this `rev`, or no valid one.
    HasRev(Option<Rev>),
}

/// The expiry that an update stores.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum NewExpiry {
    Exactly(WallTime),
    /// The stored one stays if it is later. A touch may have stored it, which leaves the `rev` as it is.
    AtLeast(WallTime),
}

impl NewExpiry {
    pub(crate) fn time(self) -> WallTime {
        match self {
            Self::Exactly(time) | Self::AtLeast(time) => time,
        }
    }
}

/// What became of an update.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Updated {
    /// The session now expires then.
    Stored(WallTime),
    /// There is no live session.
    Gone,
    /// The session does not have the `rev` that was the condition.
    Changed,
}

/// How a merge ended, for the metrics.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum MergeEnd {
    /// Nobody else had changed the session.
    Unchanged,
    Merged,
    Gone,
    Failed,
}

/// The commands of a database. MongoDB implements it, and the simulation.
pub(crate) trait Commands: Send + Sync + 'static {
    /// A change of one existing session, ready to be sent.
    type Update: Send + 'static;

    /// See [`Backend::insert`].
    fn insert(&self, new: NewSession<'_>, begin_evict: BeginDelete) -> Call<Option<WallTime>>;

    /// See [`Backend::discard_late_insert`].
    fn discard_late_insert(&self, key: SessionKey);

    /// Returns the update that replaces the data and the expiry of a session.
    fn replacement(
        &self,
        key: SessionKey,
        rev: Rev,
        data: &Data,
        expires: NewExpiry,
        condition: Condition,
    ) -> Result<Self::Update>;

    /// Returns the update that stores another expiry. Other instances are not notified of it.
    fn touch(&self, key: SessionKey, expires: WallTime) -> Self::Update;

    /// About how many bytes an update adds to a command.
    fn bytes(update: &Self::Update) -> usize;

    /// Carries out an update.
    fn update(&self, update: Self::Update) -> Call<Updated>;

    /// Carries out updates of different sessions. Each one succeeds or fails by itself.
    fn update_all(&self, updates: Vec<Self::Update>) -> Call<Vec<Result<Updated>>>;

    /// See [`Backend::cap`].
    fn cap(&self, expires: WallTime, created: Option<WallTime>) -> Option<WallTime>;

    /// See [`Backend::have_same_owner`].
    fn have_same_owner(&self, one: &Data, other: &Data) -> Result<bool>;

    /// The app's function for values that two requests have changed.
    fn on_conflict(&self) -> Option<&OnConflict>;

    /// Counts a merge, with the number of its attempts and of the keys that had changed on both sides.
    fn record_merge(&self, end: MergeEnd, attempts: u32, conflicts: u64);

    /// Counts a save that found no live session.
    fn record_dropped_save(&self);

    /// See [`Backend::find`].
    fn find(&self, key: SessionKey) -> Call<Option<Session>>;

    /// Finds the sessions of different keys, and returns them in the order of the keys.
    fn find_all(&self, keys: Vec<SessionKey>) -> Call<Vec<Result<Option<Session>>>>;

    /// See [`Backend::remove`].
    fn remove(&self, key: SessionKey) -> Call<()>;

    /// See [`Backend::take`].
    fn take(&self, key: SessionKey) -> Call<Option<Session>>;

    /// See [`Backend::clear`].
    fn clear(&self) -> Call<u64>;

    /// See [`Backend::expiry`].
    fn expiry(&self, expires: WallTime) -> WallTime;
}

/// The persistence tier over the commands of a database. Clones share it.
pub(crate) struct Batcher<C: Commands> {
    commands: Arc<C>,
    write_queue: WriteQueue,
    reads: BatchQueue<Reads<C>>,
    saves: BatchQueue<Saves<C>>,
    /// For the random waits between the attempts of a merge.
    rng: Arc<Mutex<fastrand::Rng>>,
}

impl<C: Commands> Clone for Batcher<C> {
    fn clone(&self) -> Self {
        Self {
            commands: Arc::clone(&self.commands),
            write_queue: self.write_queue.clone(),
            reads: self.reads.clone(),
            saves: self.saves.clone(),
            rng: Arc::clone(&self.rng),
        }
    }
}

impl<C: Commands> Batcher<C> {
    pub(crate) fn new(commands: C, tasks: &Tasks, limits: BatchLimits, rng: fastrand::Rng) -> Self {
        let commands = Arc::new(commands);
        Self {
            reads: BatchQueue::new(Reads(Arc::clone(&commands)), tasks.clone(), limits),
            saves: BatchQueue::new(Saves(Arc::clone(&commands)), tasks.clone(), limits),
            write_queue: WriteQueue::default(),
            rng: Arc::new(Mutex::new(rng)),
            commands,
        }
    }

    /// Waits until the earlier saves of the session have ended.
    fn acquire(
        &self,
        admission: AdmissionPermit<Saves<C>>,
        mut write: WritePermit,
    ) -> Call<SavePermit<C>> {
        let timeout = self.saves.timeout();
        Box::pin(async move {
            write.acquire(timeout).await?;
            Ok(SavePermit { _admission: admission, write: Arc::new(write) })
        })
    }

    /// Finds a session for a call that began at `began`.
    fn find_for(&self, key: SessionKey, began: Instant) -> Call<Option<Session>> {
        let reads = self.reads.clone();
        match reads.admit() {
            Ok(admission) => Box::pin(async move {
                let found = reads.send(key, began).await;
                drop(admission);
                found
            }),
            Err(error) => failed(error),
        }
    }

    /// Sends an update of a call that began at `began`.
    async fn send(
        &self,
        update: C::Update,
        permit: &SavePermit<C>,
        began: Instant,
    ) -> Result<Updated> {
        self.saves.send((update, Arc::clone(&permit.write)), began).await
    }

    /// Sends an update that has no condition.
    async fn send_any(self, update: C::Update, permit: SavePermit<C>) -> Result<Option<WallTime>> {
        let SavePermit { _admission: admission, write } = permit;
        let began = write.enqueued_at();
        // The write permit is given away. So the next save of the session goes as soon as this one has ended, and
        // does not wait until this task runs.
        let updated = self.saves.send((update, write), began).await;
        drop(admission);
        match updated? {
            Updated::Stored(expires) => Ok(Some(expires)),
            Updated::Gone | Updated::Changed => Ok(None),
        }
    }

    /// The numbers of commands in flight, of calls, of queued calls, and of sessions with a save in
    /// the write queue.
    #[cfg(test)]
    pub(crate) fn load(&self) -> [usize; 4] {
        let reads = self.reads.load();
        let saves = self.saves.load();
        [reads[0] + saves[0], reads[1] + saves[1], reads[2] + saves[2], self.write_queue.len()]
    }
}

/// The right to send a merge, and those that have joined it.
pub(crate) struct MergePermit<C: Commands> {
    permit: SavePermit<C>,
    save: ScopedSave,
}

#[cfg(test)]
impl<C: Commands> MergePermit<C> {
    /// The number of merges that have joined this one by now.
    pub(crate) fn joined(&self) -> usize {
        self.permit.write.joined()
    }
}

/// The right to send a save.
pub(crate) struct SavePermit<C: Commands> {
    _admission: AdmissionPermit<Saves<C>>,
    /// A save that is being sent shares it, so that it is held until the driver's future has ended.
    write: Arc<WritePermit>,
}

impl<C: Commands> Backend for Batcher<C> {
    type TouchPermit = SavePermit<C>;
    type MergePermit = MergePermit<C>;

    fn insert(&self, new: NewSession<'_>, begin_evict: BeginDelete) -> Call<Option<WallTime>> {
        self.commands.insert(new, begin_evict)
    }

    fn discard_late_insert(&self, key: SessionKey) {
        self.commands.discard_late_insert(key);
    }

    fn replace(
        &self,
        key: SessionKey,
        rev: Rev,
        data: &Data,
        expires: WallTime,
    ) -> Call<Option<WallTime>> {
        let admission = match self.saves.admit() {
            Ok(admission) => admission,
            Err(error) => return failed(error),
        };
        let expires = NewExpiry::Exactly(expires);
        let update = match self.commands.replacement(key, rev, data, expires, Condition::IsLive) {
            Ok(update) => update,
            Err(error) => return failed(error),
        };
        let write = match self.write_queue.enqueue(key) {
            Ok(write) => write,
            Err(error) => return failed(error),
        };
        let permit = self.acquire(admission, write);
        let batcher = self.clone();
        Box::pin(async move { batcher.send_any(update, permit.await?).await })
    }

    fn acquire_merge(&self, key: SessionKey, save: ScopedSave) -> Call<MergeTurn<MergePermit<C>>> {
        let admission = match self.saves.admit() {
            Ok(admission) => admission,
            Err(error) => return failed(error),
        };
        let timeout = self.saves.timeout();
        match self.write_queue.enqueue_merge(key, save, timeout) {
            Ok(MergePlace::Leads(mut write, save)) => Box::pin(async move {
                // If that takes the whole timeout, this merge is not sent, but those that have joined it may be.
                let _ = write.acquire(timeout).await;
                let permit = SavePermit { _admission: admission, write: Arc::new(write) };
                Ok(MergeTurn::Comes(MergePermit { permit, save }))
            }),
            Ok(MergePlace::Joins(answer)) => Box::pin(async move {
                let answer = answer.await.unwrap_or_else(|_| Err(timed_out(timeout)));
                drop(admission);
                Ok(MergeTurn::IsOver(answer))
            }),
            Err(error) => failed(error),
        }
    }

    fn merge(&self, permit: MergePermit<C>, key: SessionKey, rev: Rev) -> MergeCall {
        let joined = permit.permit.write.take_joined();
        Box::pin(self.clone().merge_in_turn(permit, joined, key, rev))
    }

    fn acquire_touch(&self, key: SessionKey) -> Call<SavePermit<C>> {
        let admission = match self.saves.admit() {
            Ok(admission) => admission,
            Err(error) => return failed(error),
        };
        let write = self.write_queue.enqueue_touch(key);
        write.map_or_else(failed, |write| self.acquire(admission, write))
    }

    fn acquire_touch_of_cached(&self, key: SessionKey) -> Option<Call<SavePermit<C>>> {
        let admission = match self.saves.admit() {
            Ok(admission) => admission,
            Err(error) => return Some(failed(error)),
        };
        let write = self.write_queue.enqueue_touch_of_cached(key)?;
        Some(write.map_or_else(failed, |write| self.acquire(admission, write)))
    }

    fn touch(
        &self,
        permit: SavePermit<C>,
        key: SessionKey,
        expires: WallTime,
    ) -> Call<Option<WallTime>> {
        Box::pin(self.clone().send_any(self.commands.touch(key, expires), permit))
    }

    fn has_pending_write(&self, key: SessionKey) -> bool {
        self.write_queue.has_pending_write(key)
    }

    fn expiry(&self, expires: WallTime) -> WallTime {
        self.commands.expiry(expires)
    }

    fn find(&self, key: SessionKey) -> Call<Option<Session>> {
        self.find_for(key, Instant::now())
    }

    fn remove(&self, key: SessionKey) -> Call<()> {
        self.commands.remove(key)
    }

    fn take(&self, key: SessionKey) -> Call<Option<Session>> {
        self.commands.take(key)
    }

    fn clear(&self) -> Call<u64> {
        self.commands.clear()
    }

    fn cap(&self, expires: WallTime, created: Option<WallTime>) -> Option<WallTime> {
        self.commands.cap(expires, created)
    }

    fn have_same_owner(&self, one: &Data, other: &Data) -> Result<bool> {
        self.commands.have_same_owner(one, other)
    }

    fn on_conflict(&self) -> Option<OnConflict> {
        self.commands.on_conflict().cloned()
    }

    fn record_dropped_save(&self) {
        self.commands.record_dropped_save();
    }
}

fn failed<T: Send + 'static>(error: Error) -> Call<T> {
    Box::pin(async move { Err(error) })
}

struct Reads<C>(Arc<C>);

impl<C: Commands> BatchExecutor for Reads<C> {
    type Item = SessionKey;
    type Answer = Option<Session>;

    fn run_one(&self, key: SessionKey) -> Call<Option<Session>> {
        self.0.find(key)
    }

    fn run_batch(&self, keys: Vec<SessionKey>) -> Call<Vec<Result<Option<Session>>>> {
        // Without a cache above, one batch may ask for a session several times. The command asks once.
        let mut index_of = HashMap::with_capacity(keys.len());
        let mut distinct = Vec::with_capacity(keys.len());
        let indexes: Vec<usize> = keys
            .into_iter()
            .map(|key| {
                *index_of.entry(key).or_insert_with(|| {
                    distinct.push(key);
                    distinct.len() - 1
                })
            })
            .collect();
        let all_differ = distinct.len() == indexes.len();
        let found = self.0.find_all(distinct);
        Box::pin(async move {
            let found = found.await?;
            if all_differ {
                return Ok(found);
            }
            let answer =
                |index: usize| found.get(index).cloned().unwrap_or_else(|| Err(Error::cut_off()));
            Ok(indexes.into_iter().map(answer).collect())
        })
    }

    fn bytes(_: &SessionKey) -> usize {
        size_of::<SessionKey>()
    }
}

struct Saves<C>(Arc<C>);

impl<C: Commands> BatchExecutor for Saves<C> {
    /// The write permit is held until the driver's future has ended.
    type Item = (C::Update, Arc<WritePermit>);
    type Answer = Updated;

    fn run_one(&self, (update, permit): (C::Update, Arc<WritePermit>)) -> Call<Updated> {
        let update = self.0.update(update);
        Box::pin(async move {
            let outcome = update.await;
            drop(permit);
            outcome
        })
    }

    fn run_batch(&self, items: Vec<(C::Update, Arc<WritePermit>)>) -> Call<Vec<Result<Updated>>> {
        let (updates, permits): (Vec<_>, Vec<_>) = items.into_iter().unzip();
        let update_all = self.0.update_all(updates);
        Box::pin(async move {
            let outcomes = update_all.await;
            drop(permits);
            outcomes
        })
    }

    fn bytes((update, _): &(C::Update, Arc<WritePermit>)) -> usize {
        C::bytes(update)
    }
}
