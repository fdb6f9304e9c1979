//! How reads and saves leave for the database: at once while it has little to do, together while it
//! is busy, and the saves of one session one after the other.
//!
//! A command costs the driver and the server many times what the document in it does. While as many
//! commands are under way as keep the server busy, or larger ones, what comes then could not be served
//! sooner anyway; it waits, and leaves as one command. No timer runs and nothing waits otherwise.

mod batch_queue;
mod write_queue;

use std::collections::HashMap;
use std::sync::Arc;

use tokio::time::Instant;

pub(crate) use crate::batching::batch_queue::BatchLimits;
use crate::batching::batch_queue::{AdmissionPermit, BatchExecutor, BatchQueue};
use crate::batching::write_queue::{WritePermit, WriteQueue};
use crate::error::{Error, Result};
use crate::runtime::Tasks;
use crate::session::id::SessionKey;
use crate::session::revision::Rev;
use crate::session::{Data, Session};
use crate::store::backend::{Backend, Call};
use crate::time::WallTime;

/// The commands of a database. Private: those of MongoDB, and of a simulated one in tests.
pub(crate) trait Commands: Send + Sync + 'static {
    /// A change of one session that exists, ready to be sent.
    type Update: Send + 'static;

    /// See [`Backend::insert`].
    fn insert(
        &self,
        key: SessionKey,
        rev: Rev,
        data: &Data,
        expires: WallTime,
    ) -> Call<Option<WallTime>>;

    /// The update that gives a session other data and another expiry.
    fn replacement(
        &self,
        key: SessionKey,
        rev: Rev,
        data: &Data,
        expires: WallTime,
    ) -> Result<Self::Update>;

    /// The update that gives a session another expiry, of which no other instance is told.
    fn touch(&self, key: SessionKey, expires: WallTime) -> Self::Update;

    /// About how many bytes an update has.
    fn bytes(update: &Self::Update) -> usize;

    /// Carries out an update, if its session is live; answers with the stored expiry.
    fn update(&self, update: Self::Update) -> Call<Option<WallTime>>;

    /// Carries out updates of different sessions, each of which succeeds or fails by itself.
    fn update_all(&self, updates: Vec<Self::Update>) -> Call<Vec<Result<Option<WallTime>>>>;

    /// See [`Backend::find`].
    fn find(&self, key: SessionKey) -> Call<Option<Session>>;

    /// Finds sessions of different keys. In the order of the keys.
    fn find_all(&self, keys: Vec<SessionKey>) -> Call<Vec<Result<Option<Session>>>>;

    /// See [`Backend::remove`].
    fn remove(&self, key: SessionKey) -> Call<()>;

    /// See [`Backend::clear`].
    fn clear(&self) -> Call<u64>;

    /// See [`Backend::expiry`].
    fn expiry(&self, expires: WallTime) -> WallTime;
}

/// A database whose reads and saves are sent together when there are many. Clones share it.
pub(crate) struct Batcher<C: Commands> {
    commands: Arc<C>,
    write_queue: WriteQueue,
    reads: BatchQueue<Reads<C>>,
    saves: BatchQueue<Saves<C>>,
}

impl<C: Commands> Clone for Batcher<C> {
    fn clone(&self) -> Self {
        Self {
            commands: Arc::clone(&self.commands),
            write_queue: self.write_queue.clone(),
            reads: self.reads.clone(),
            saves: self.saves.clone(),
        }
    }
}

impl<C: Commands> Batcher<C> {
    pub(crate) fn new(commands: C, tasks: &Tasks, limits: BatchLimits) -> Self {
        let commands = Arc::new(commands);
        Self {
            reads: BatchQueue::new(Reads(Arc::clone(&commands)), tasks.clone(), limits),
            saves: BatchQueue::new(Saves(Arc::clone(&commands)), tasks.clone(), limits),
            write_queue: WriteQueue::default(),
            commands,
        }
    }

    /// Waits in a lane.
    fn wait_for_turn(
        &self,
        seat: AdmissionPermit<Saves<C>>,
        mut place: WritePermit,
    ) -> Call<SavePermit<C>> {
        let timeout = self.saves.timeout();
        Box::pin(async move {
            place.acquire(timeout).await.map(|()| SavePermit { admission: seat, permit: place })
        })
    }

    /// How many commands are under way, how many calls there are, how many of them wait, and how
    /// many lanes somebody is in.
    #[cfg(test)]
    pub(crate) fn load(&self) -> [usize; 4] {
        let (reads, saves) = (self.reads.load(), self.saves.load());
        [reads[0] + saves[0], reads[1] + saves[1], reads[2] + saves[2], self.write_queue.len()]
    }

    async fn send(self, update: C::Update, turn: SavePermit<C>) -> Result<Option<WallTime>> {
        let began = turn.permit.enqueued_at();
        self.saves.send(turn.admission, (update, turn.permit), began).await
    }
}

/// The right to send a save.
pub(crate) struct SavePermit<C: Commands> {
    admission: AdmissionPermit<Saves<C>>,
    permit: WritePermit,
}

impl<C: Commands> Backend for Batcher<C> {
    type TouchPermit = SavePermit<C>;

    fn insert(
        &self,
        key: SessionKey,
        rev: Rev,
        data: &Data,
        expires: WallTime,
    ) -> Call<Option<WallTime>> {
        self.commands.insert(key, rev, data, expires)
    }

    fn replace(
        &self,
        key: SessionKey,
        rev: Rev,
        data: &Data,
        expires: WallTime,
    ) -> Call<Option<WallTime>> {
        let seat = match self.saves.admit() {
            Ok(seat) => seat,
            Err(error) => return failed(error),
        };
        let update = match self.commands.replacement(key, rev, data, expires) {
            Ok(update) => update,
            Err(error) => return failed(error),
        };
        let place = match self.write_queue.enqueue(key) {
            Ok(place) => place,
            Err(error) => return failed(error),
        };
        let (turn, saves) = (self.wait_for_turn(seat, place), self.clone());
        Box::pin(async move { saves.send(update, turn.await?).await })
    }

    fn acquire_touch(&self, key: SessionKey) -> Option<Call<SavePermit<C>>> {
        let seat = match self.saves.admit() {
            Ok(seat) => seat,
            Err(error) => return Some(failed(error)),
        };
        let place = self.write_queue.enqueue_touch(key)?;
        Some(place.map_or_else(failed, |place| self.wait_for_turn(seat, place)))
    }

    fn touch(
        &self,
        turn: SavePermit<C>,
        key: SessionKey,
        expires: WallTime,
    ) -> Call<Option<WallTime>> {
        Box::pin(self.clone().send(self.commands.touch(key, expires), turn))
    }

    fn has_pending_write(&self, key: SessionKey) -> bool {
        self.write_queue.has_pending_write(key)
    }

    fn expiry(&self, expires: WallTime) -> WallTime {
        self.commands.expiry(expires)
    }

    fn find(&self, key: SessionKey) -> Call<Option<Session>> {
        let (reads, began) = (self.reads.clone(), Instant::now());
        match reads.admit() {
            Ok(seat) => Box::pin(async move { reads.send(seat, key, began).await }),
            Err(error) => failed(error),
        }
    }

    fn remove(&self, key: SessionKey) -> Call<()> {
        self.commands.remove(key)
    }

    fn clear(&self) -> Call<u64> {
        self.commands.clear()
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
        // Without a cache above, one session may be asked for several times.
        let mut seen = HashMap::with_capacity(keys.len());
        let mut distinct = Vec::with_capacity(keys.len());
        let places: Vec<_> = keys
            .into_iter()
            .map(|key| {
                *seen.entry(key).or_insert_with(|| {
                    distinct.push(key);
                    distinct.len() - 1
                })
            })
            .collect();
        let all_differ = distinct.len() == places.len();
        let found = self.0.find_all(distinct);
        Box::pin(async move {
            let found = found.await?;
            if all_differ {
                return Ok(found);
            }
            let of = |place: usize| found.get(place).cloned();
            Ok(places
                .into_iter()
                .map(|at| of(at).unwrap_or_else(|| Err(Error::cut_off())))
                .collect())
        })
    }

    fn bytes(_: &SessionKey) -> usize {
        size_of::<SessionKey>()
    }
}

struct Saves<C>(Arc<C>);

impl<C: Commands> BatchExecutor for Saves<C> {
    /// With its place in the lane of its session, which is held until the driver has ended.
    type Item = (C::Update, WritePermit);
    type Answer = Option<WallTime>;

    fn run_one(&self, (update, place): (C::Update, WritePermit)) -> Call<Option<WallTime>> {
        let updated = self.0.update(update);
        Box::pin(async move {
            let updated = updated.await;
            drop(place);
            updated
        })
    }

    fn run_batch(
        &self,
        items: Vec<(C::Update, WritePermit)>,
    ) -> Call<Vec<Result<Option<WallTime>>>> {
        let (updates, places): (Vec<_>, Vec<_>) = items.into_iter().unzip();
        let outcomes = self.0.update_all(updates);
        Box::pin(async move {
            let outcomes = outcomes.await;
            drop(places);
            outcomes
        })
    }

    fn bytes((update, _): &(C::Update, WritePermit)) -> usize {
        C::bytes(update)
    }
}
