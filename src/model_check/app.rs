//! `App`: an app that saves through the shipped `src/store/write_through.rs`.
//!
//! The write queue and the database below it are small ones. Each of their calls is one step of the model.

use std::sync::{Arc, PoisonError};
use std::time::Duration;

use loom::sync::Condvar;
use tokio_util::sync::CancellationToken;

use crate::backend::{
    Backend, BeginDelete, Call, MergeAnswer, MergeCall, MergeOutcome, MergeTurn, NewSession,
};
use crate::cache::Cache;
use crate::error::{Error, ErrorKind, Result};
use crate::model_check::database::{Conditional, Database, EXPIRES, data_of, number_in};
use crate::model_check::tasks;
use crate::request_scope::ScopedStore;
use crate::request_scope::changes::{Base, Merged, OnConflict, Saved, ScopedSave};
use crate::session::id::{RawId, SessionKey};
use crate::session::revision::{Rev, RevSource};
use crate::session::{Data, Session};
use crate::store::write_through::{TouchPolicy, WriteThrough};
use crate::sync::{Mutex, lock};
use crate::time::{Clock, WallTime};

/// The id of the one session.
const ID: RawId = RawId(1);
const TOUCH_AFTER: Duration = Duration::from_secs(60);

/// The app's store.
pub(crate) struct App {
    tiers: WriteThrough<Persistence>,
    queue: Arc<WriteQueue>,
}

/// The database, behind the write queue of its one session.
#[derive(Clone)]
struct Persistence {
    database: Arc<Database>,
    queue: Arc<WriteQueue>,
    clock: Clock,
}

/// `WriteQueue`: sends the saves of the session one after the other.
///
/// The shipped queue waits for tokio's channels. This one blocks its thread, so that loom sees the wait.
#[derive(Default)]
struct WriteQueue {
    state: Mutex<Queued>,
    released: Condvar,
}

#[derive(Default)]
struct Queued {
    /// How many saves were ever queued.
    count: u64,
    /// The queued saves in order: the number of each, and whether it is a touch.
    saves: Vec<(u64, bool)>,
    /// The data of all replaces that were ever queued.
    saved: Vec<u64>,
}

/// The right to send a save, once it is the first in the queue.
struct WritePermit {
    number: u64,
    queue: Arc<WriteQueue>,
}

impl WriteQueue {
    /// Queues a replace of the session's data, or a touch if there is no data. `None`: a replace is queued, so a touch
    /// is not allowed.
    fn enqueue(self: &Arc<Self>, data: Option<u64>) -> Option<WritePermit> {
        let mut queued = lock(&self.state);
        let is_touch = data.is_none();
        if is_touch && queued.saves.iter().any(|(_, is_touch)| !is_touch) {
            return None;
        }
        let number = queued.count;
        queued.count += 1;
        queued.saves.push((number, is_touch));
        queued.saved.extend(data);
        drop(queued);
        Some(WritePermit { number, queue: Arc::clone(self) })
    }

    fn has_pending_write(&self) -> bool {
        lock(&self.state).saves.iter().any(|(_, is_touch)| !is_touch)
    }

    fn saved(&self) -> Vec<u64> {
        lock(&self.state).saved.clone()
    }
}

impl WritePermit {
    /// Waits until all saves before this one have been released.
    fn acquire(&self) {
        let mut queued = lock(&self.queue.state);
        while queued.saves.first().is_some_and(|(first, _)| *first != self.number) {
            queued = self.queue.released.wait(queued).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl Drop for WritePermit {
    fn drop(&mut self) {
        lock(&self.queue.state).saves.retain(|(number, _)| *number != self.number);
        self.queue.released.notify_all();
    }
}

impl Persistence {
    fn attempt_all(&self, save: &ScopedSave, rev: Rev) -> MergeAnswer {
        let mut state = save.expected().clone();
        loop {
            let Merged { data, expires, keeps_others: is_merged, .. } = save.apply(&state, None)?;
            match self.database.replace_if(state.rev, number_in(&data), rev, &self.clock) {
                Conditional::Stored => {
                    return Ok(Some(Saved { data, expires, rev, created: None, is_merged }));
                }
                Conditional::Gone => return Ok(None),
                Conditional::Changed => {}
            }
            let Some(newest) = self.database.find() else { return Ok(None) };
            state = newest.into();
        }
    }
}

impl Backend for Persistence {
    type TouchPermit = WritePermit;
    type MergePermit = (WritePermit, ScopedSave);

    fn insert(&self, _: NewSession<'_>, _: BeginDelete) -> Call<Option<WallTime>> {
        Box::pin(async { Ok(None) })
    }

    fn discard_late_insert(&self, _: SessionKey) {}

    fn replace(
        &self,
        _: SessionKey,
        rev: Rev,
        data: &Data,
        expires: WallTime,
    ) -> Call<Option<WallTime>> {
        let number = number_in(data);
        let to = self.clone();
        let permit = self.queue.enqueue(Some(number));
        Box::pin(async move {
            let permit = permit.ok_or_else(|| Error::new(ErrorKind::Server, "no permit"))?;
            permit.acquire();
            let written = to.database.replace_with(Some(number), rev, true, &to.clock);
            drop(permit);
            Ok(written.map(|_| expires))
        })
    }

    fn acquire_merge(&self, _: SessionKey, save: ScopedSave) -> Call<MergeTurn<Self::MergePermit>> {
        let permit = self.queue.enqueue(Some(number_in(save.data())));
        Box::pin(async move {
            let permit = permit.ok_or_else(|| Error::new(ErrorKind::Server, "no permit"))?;
            permit.acquire();
            Ok(MergeTurn::Comes((permit, save)))
        })
    }

    fn merge(&self, (permit, save): Self::MergePermit, _: SessionKey, rev: Rev) -> MergeCall {
        let to = self.clone();
        Box::pin(async move {
            let answer = to.attempt_all(&save, rev);
            drop(permit);
            MergeOutcome { sent: Some(answer.clone()), own: answer, joined: Vec::new() }
        })
    }

    fn acquire_touch(&self, _: SessionKey) -> Call<WritePermit> {
        Box::pin(async { Err(Error::cut_off()) })
    }

    fn acquire_touch_of_cached(&self, _: SessionKey) -> Option<Call<WritePermit>> {
        let permit = self.queue.enqueue(None)?;
        Some(Box::pin(async move {
            permit.acquire();
            Ok(permit)
        }))
    }

    fn touch(
        &self,
        permit: WritePermit,
        _: SessionKey,
        expires: WallTime,
    ) -> Call<Option<WallTime>> {
        let to = self.clone();
        Box::pin(async move {
            let exists = to.database.find().is_some();
            drop(permit);
            Ok(exists.then_some(expires))
        })
    }

    fn has_pending_write(&self, _: SessionKey) -> bool {
        self.queue.has_pending_write()
    }

    fn expiry(&self, expires: WallTime) -> WallTime {
        expires
    }

    fn find(&self, _: SessionKey) -> Call<Option<Session>> {
        let to = self.clone();
        Box::pin(async move { Ok(to.database.find()) })
    }

    fn remove(&self, _: SessionKey) -> Call<()> {
        let to = self.clone();
        Box::pin(async move {
            to.database.remove(&to.clock);
            Ok(())
        })
    }

    fn take(&self, _: SessionKey) -> Call<Option<Session>> {
        let to = self.clone();
        Box::pin(async move {
            let taken = to.database.find();
            to.database.remove(&to.clock);
            Ok(taken)
        })
    }

    fn on_conflict(&self) -> Option<OnConflict> {
        None
    }

    fn record_dropped_save(&self) {}

    fn cap(&self, expires: WallTime, _: Option<WallTime>) -> Option<WallTime> {
        Some(expires)
    }

    fn have_same_owner(&self, _: &Data, _: &Data) -> Result<bool> {
        Ok(true)
    }

    fn clear(&self) -> Call<u64> {
        Box::pin(async { Ok(0) })
    }
}

impl App {
    pub(crate) fn new(
        cache: Cache,
        database: Arc<Database>,
        clock: Clock,
        skips_touches: bool,
    ) -> Self {
        let queue = Arc::<WriteQueue>::default();
        let after = if skips_touches { TOUCH_AFTER } else { Duration::ZERO };
        let tasks = tasks::tasks(cache.availability().clone());
        let tiers = WriteThrough {
            backend: Persistence { database, queue: Arc::clone(&queue), clock: clock.clone() },
            cache,
            tasks,
            revs: RevSource::new(),
            touch_policy: TouchPolicy { after, clock },
            _stops_listener: CancellationToken::new().drop_guard(),
        };
        Self { tiers, queue }
    }

    pub(crate) async fn load(&self) -> Result<Option<Session>> {
        self.tiers.load(ID).await
    }

    pub(crate) async fn save(&self, data: u64) -> Result<()> {
        self.tiers.save(ID, &data_of(data), EXPIRES).await
    }

    /// Saves `data` as a request that has loaded `found`. Returns what is then stored.
    ///
    /// It calls the store below the task-local scope: the threads of loom share one thread of the system, and so its
    /// thread-locals.
    pub(crate) async fn merge(&self, found: Session, data: &Data) -> Result<Option<u64>> {
        let save = ScopedSave::new(Base::loaded(found.into()), data, EXPIRES);
        let saved = self.tiers.merge(ID.key(), save).await?;
        let stored = saved.and_then(|(stored, _)| stored);
        stored.map(|stored| Ok(number_in(stored.data.data()?.as_ref()))).transpose()
    }

    pub(crate) async fn delete(&self) -> Result<()> {
        self.tiers.delete(ID).await
    }

    /// The data of all replaces that were ever queued.
    pub(crate) fn saved(&self) -> Vec<u64> {
        self.queue.saved()
    }
}
