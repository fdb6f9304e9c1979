//! `App`: an app that saves through the shipped `src/store/write_through.rs`.
//!
//! The write queue and the database below it are small ones. Each of their calls is one step of the model.

use std::pin::pin;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use loom::sync::Condvar;
use tokio_util::sync::CancellationToken;

use crate::cache::Cache;
use crate::error::{Error, ErrorKind, Result};
use crate::model_check::database::{Database, EXPIRES, GONE};
use crate::model_check::tasks;
use crate::model_check::world::World;
use crate::session::id::{RawId, SessionKey};
use crate::session::revision::{Rev, RevSource};
use crate::session::{Data, Session};
use crate::store::backend::{Backend, Call};
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

    fn has_only_touches(&self) -> bool {
        lock(&self.state).saves.iter().all(|(_, is_touch)| *is_touch)
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

impl Backend for Persistence {
    type TouchPermit = WritePermit;

    fn insert(&self, _: SessionKey, _: Rev, _: &Data, _: WallTime) -> Call<Option<WallTime>> {
        Box::pin(async { Ok(None) })
    }

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

    fn acquire_touch(&self, _: SessionKey) -> Option<Call<WritePermit>> {
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

    fn is_settled(&self, _: SessionKey) -> bool {
        self.queue.has_only_touches()
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

    fn clear(&self) -> Call<u64> {
        Box::pin(async { Ok(0) })
    }
}

pub(crate) fn number_in(data: &Data) -> u64 {
    data["rank"].as_u64().unwrap_or_default()
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
        let tiers = WriteThrough {
            backend: Persistence { database, queue: Arc::clone(&queue), clock: clock.clone() },
            cache,
            tasks: tasks::tasks(),
            revs: RevSource::new(),
            touch_policy: TouchPolicy { after, clock },
            _stops_listener: CancellationToken::new().drop_guard(),
        };
        Self { tiers, queue }
    }
}

impl World {
    /// An app saves new data.
    pub(crate) fn app_save_new(&self) {
        let data = self.database.new_data();
        self.note(format_args!("the app saves {data}"));
        let saved = self.app_save(data);
        self.check(saved.is_ok(), "a save failed");
        self.note(format_args!("the app has saved {data}"));
        self.learn(self.database.rank_of(data));
    }

    /// An app saves new data. The save times out before it is sent, and the database still carries it out.
    pub(crate) fn app_save_with_unknown_outcome(&self) {
        let data = self.database.new_data();
        self.note(format_args!("the app saves {data}, and the save times out"));
        tasks::expire_next_deadline();
        let saved = self.app_save(data);
        self.check(saved.is_err(), "a save that had timed out was acknowledged");
        self.note(format_args!("the save of {data} has ended"));
    }

    /// An app loads the session, changes nothing, and saves.
    pub(crate) fn app_save_unchanged(&self) {
        let found = self.bell.wait_for(self.app.tiers.load(ID));
        let Ok(Some(found)) = found else {
            return self.note(format_args!("the app finds nothing"));
        };
        let data = number_in(&found.data);
        let before = self.app.queue.saved();
        self.note(format_args!("the app saves {data} again"));
        let written = self.database.times_written(data);
        let saved = self.app_save(data);
        self.check(saved.is_ok(), "a save of what was loaded failed");
        self.note(format_args!("the app has saved {data} again"));
        let rank = self.database.rank_of(data);
        if self.database.times_written(data) == written && !self.database.is_gone() {
            let undone = before.iter().find(|other| {
                **other != data
                    && self.database.rank_if_written(**other).is_some_and(|it| it > rank)
            });
            self.check(
                undone.is_none(),
                "an unchanged save was skipped after a save of newer data",
            );
        }
        self.learn(rank);
    }

    pub(crate) fn app_delete(&self) {
        self.note(format_args!("the app deletes"));
        let deleted = self.bell.wait_for(self.app.tiers.delete(ID));
        self.check(deleted.is_ok(), "a delete failed");
        self.note(format_args!("the app has deleted"));
        self.learn(GONE);
    }

    fn app_save(&self, data: u64) -> Result<()> {
        let data = Data::from([("rank".to_owned(), data.into())]);
        let save = pin!(self.app.tiers.save(ID, &data, EXPIRES));
        self.bell.wait_for(save)
    }
}
