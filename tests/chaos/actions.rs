//! The operations of a run. Each one records its history.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::MutexGuard as Turn;
use tower_sessions::SessionStore;
use tower_sessions::session::Id;
use tower_sessions_moka_mongodb_store::CachedMongoStore;

use crate::args::Settings;
use crate::history::{Clock, Event, Nanos, Seen, State, What};
use crate::ledger::Ledger;
use crate::session::{Script, Session, first_state};
use crate::shared::SharedSession;

/// What all tasks of a run share.
pub(crate) struct Run {
    pub(crate) settings: Settings,
    pub(crate) clock: Clock,
    pub(crate) script: Script,
    pub(crate) instances: Vec<CachedMongoStore>,
    pub(crate) ledger: Ledger,
    /// The sessions in use, and those that are judged once no task uses them.
    pub(crate) pool: Mutex<Vec<Arc<Session>>>,
    pub(crate) leaving: Mutex<Vec<Arc<Session>>>,
    pub(crate) shared: Mutex<Vec<Arc<SharedSession>>>,
    pub(crate) shared_leaving: Mutex<Vec<Arc<SharedSession>>>,
    pub(crate) ended: AtomicBool,
    pub(crate) numbers: AtomicU64,
}

/// How long the caller waits before it gives up. `None`: until the operation ends.
pub(crate) type Patience = Option<Duration>;

impl Run {
    pub(crate) fn new(settings: Settings, instances: Vec<CachedMongoStore>) -> Self {
        let bound = u64::try_from(settings.max_staleness.as_nanos()).unwrap_or(u64::MAX);
        Self {
            settings,
            clock: Clock::start(),
            script: Script::start(),
            instances,
            ledger: Ledger::new(bound),
            pool: Mutex::default(),
            leaving: Mutex::default(),
            shared: Mutex::default(),
            shared_leaving: Mutex::default(),
            ended: AtomicBool::new(false),
            numbers: AtomicU64::new(0),
        }
    }

    pub(crate) fn pool(&self) -> MutexGuard<'_, Vec<Arc<Session>>> {
        self.pool.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn leaving(&self) -> MutexGuard<'_, Vec<Arc<Session>>> {
        self.leaving.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn shared(&self) -> MutexGuard<'_, Vec<Arc<SharedSession>>> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn shared_leaving(&self) -> MutexGuard<'_, Vec<Arc<SharedSession>>> {
        self.shared_leaving.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn has_ended(&self) -> bool {
        self.ended.load(Ordering::SeqCst)
    }

    pub(crate) fn store(&self, instance: u8) -> &CachedMongoStore {
        &self.instances[usize::from(instance)]
    }

    /// Runs one operation. Returns when it began and ended, and its result if the caller did not
    /// give up.
    pub(crate) async fn timed<T>(
        &self,
        patience: Patience,
        operation: impl Future<Output = tower_sessions::session_store::Result<T>>,
    ) -> (Nanos, Nanos, Option<T>) {
        let counts = &self.ledger.counts;
        let start = self.clock.now();
        let answer = match patience {
            None => Some(operation.await),
            Some(patience) => tokio::time::timeout(patience, operation).await.ok(),
        };
        let end = self.clock.now();
        counts.slowest.fetch_max(end - start, Ordering::Relaxed);
        let failed = match &answer {
            None => Some(&counts.abandoned),
            Some(Err(_)) => Some(&counts.failed),
            Some(Ok(_)) => None,
        };
        if let Some(count) = failed {
            count.fetch_add(1, Ordering::Relaxed);
        }
        (start, end, answer.and_then(Result::ok))
    }

    /// Creates a session, which is in no pool yet. Returns `None` if the outcome is unknown.
    pub(crate) async fn create(
        &self,
        instance: u8,
        lives: Duration,
        mortal: bool,
    ) -> Option<Arc<Session>> {
        self.ledger.counts.creates.fetch_add(1, Ordering::Relaxed);
        let number = self.numbers.fetch_add(1, Ordering::Relaxed);
        let state = first_state(instance);
        let mut record = self.script.record(number, Id::default(), state);
        let create = self.store(instance).create(&mut record);
        let (start, end, answer) = self.timed(None, create).await;
        answer?;
        let what = What::Write { state, least: state.step, ok: true };
        let created = Event { start, end, instance, what };
        let ends = end + u64::try_from(lives.as_nanos()).unwrap_or(u64::MAX / 2);
        Some(Arc::new(Session::new(number, record.id, ends, mortal, created)))
    }

    /// Saves new data, or with `touch` the same data with a later expiry. Returns whether the save
    /// was acknowledged.
    pub(crate) async fn save(
        &self,
        instance: u8,
        session: &Session,
        mut turn: Turn<'_, State>,
        touch: bool,
        patience: Patience,
    ) -> bool {
        let counts = &self.ledger.counts;
        if touch { &counts.touches } else { &counts.saves }.fetch_add(1, Ordering::Relaxed);
        turn.step += 1;
        if !touch {
            turn.version += 1;
            turn.writer = instance;
            session.version_since.store(turn.step, Ordering::Relaxed);
        }
        let state = *turn;
        let least = if touch {
            // One step is one second of the expiry. A change below `touch_after` is not sent.
            let spare = Settings::touch_after(instance).as_secs().saturating_sub(1);
            let spare = u32::try_from(spare).unwrap_or(u32::MAX);
            let since = session.version_since.load(Ordering::Relaxed);
            state.step.saturating_sub(spare).max(since)
        } else {
            state.step
        };
        let record = self.script.record(session.number, session.id, state);
        let save = self.store(instance).save(&record);
        let (start, end, answer) = self.timed(patience, save).await;
        let ok = answer.is_some();
        if !ok {
            counts.undecided.fetch_add(1, Ordering::SeqCst);
            session.undecided.store(true, Ordering::SeqCst);
        }
        session.note(Event { start, end, instance, what: What::Write { state, least, ok } });
        ok
    }

    /// Deletes a session. Returns when the delete was acknowledged.
    pub(crate) async fn delete(
        &self,
        instance: u8,
        session: &Session,
        patience: Patience,
    ) -> Option<Nanos> {
        self.ledger.counts.deletes.fetch_add(1, Ordering::Relaxed);
        // From now on, the outcome of every write is unknown, whatever this delete does.
        session.undecided.store(true, Ordering::SeqCst);
        let delete = self.store(instance).delete(&session.id);
        let (start, end, answer) = self.timed(patience, delete).await;
        let ok = answer.is_some();
        if !ok {
            self.ledger.counts.undecided.fetch_add(1, Ordering::SeqCst);
        }
        session.note(Event { start, end, instance, what: What::Delete { ok } });
        if ok {
            // The first acknowledgement counts.
            let _ = session.deleted.compare_exchange(0, end, Ordering::SeqCst, Ordering::SeqCst);
        }
        ok.then_some(end)
    }

    /// Loads a session, and counts the operation.
    pub(crate) async fn load(&self, instance: u8, session: &Session, patience: Patience) -> Event {
        self.ledger.counts.loads.fetch_add(1, Ordering::Relaxed);
        self.look(instance, session, patience).await
    }

    /// Loads a session.
    pub(crate) async fn look(&self, instance: u8, session: &Session, patience: Patience) -> Event {
        let load = self.store(instance).load(&session.id);
        let (start, end, answer) = self.timed(patience, load).await;
        let seen = match answer {
            None => Seen::Error,
            Some(None) => Seen::Absent,
            Some(Some(record)) => self.script.seen(session.number, session.id, &record),
        };
        let event = Event { start, end, instance, what: What::Load(seen) };
        session.note(event);
        event
    }
}
