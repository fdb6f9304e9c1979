//! `World`: one store over the database of a model, the steps that threads take, and the checks of every answer.
//!
//! The steps use the cache as `src/store/write_through.rs` and `src/invalidation/mod.rs` do.

use std::fmt;
use std::sync::{Arc, PoisonError};
use std::task::{Context, Poll, Wake, Waker};
use std::time::Duration;

use loom::sync::Condvar;

use crate::availability::Availability;
use crate::cache::{Cache, CacheConfig, Coherence, EvictionPolicy, Leader, Lookup};
use crate::error::{Error, ErrorKind, Result};
use crate::model_check::app::App;
use crate::model_check::clock::ModelClock;
use crate::model_check::database::{Database, GONE, Rank, Written, key, session};
use crate::session::Session;
use crate::session::revision::Change;
use crate::session::revision::RevSource;
use crate::sync::{AtomicU64, Mutex, Ordering, lock};
use crate::telemetry::metrics::{Invalidation, Series};
use crate::time::Clock;

/// `max_staleness`, where the clock moves by the second.
const BOUND: Duration = Duration::from_secs(1);
/// `outage_grace`, in the models that have one.
const GRACE: Duration = Duration::from_secs(1);

pub(crate) struct World {
    cache: Cache,
    pub(crate) database: Arc<Database>,
    pub(crate) app: App,
    revs: RevSource,
    /// The revs of another instance.
    foreign_revs: RevSource,
    /// Moves `clock`.
    model: ModelClock,
    clock: Clock,
    pub(crate) bell: Arc<Bell>,
    /// How much older than `BOUND` an answer may be in an outage, if the clock moves.
    grace: Option<Duration>,
    /// Whether there was an outage. A std atomic, because reading it must not be a step.
    outage: std::sync::atomic::AtomicBool,
    /// The oldest state that a load may return from now on. A thread that learns of a state raises this number with
    /// `Release`, and a load reads it with `Acquire`. So "from now on" means "happens after", and nothing more.
    known: AtomicU64,
    /// The steps so far, for the message of a failure. A std lock, because writing to it must not be a step.
    story: std::sync::Mutex<Vec<String>>,
}

impl World {
    pub(crate) fn new() -> Self {
        Self::with(ModelClock::default(), None, false)
    }

    /// A store that skips touches which are not worth a write.
    pub(crate) fn with_skips() -> Self {
        Self::with(ModelClock::default(), None, true)
    }

    pub(crate) fn with_time() -> Self {
        Self::with(ModelClock::moving(), Some(Duration::ZERO), false)
    }

    pub(crate) fn with_grace() -> Self {
        Self::with(ModelClock::moving(), Some(GRACE), false)
    }

    fn with(model: ModelClock, grace: Option<Duration>, skips: bool) -> Self {
        let clock = Clock::Model(model.clone());
        let config = CacheConfig {
            max_bytes: 1 << 20,
            max_entries: None,
            max_absent_ids: 10,
            policy: EvictionPolicy::Lru,
            max_staleness: BOUND,
            coherence: Coherence::ChangeStream,
            outage_grace: grace.unwrap_or_default(),
            compact: false,
        };
        // The model checks no times of it, so reading them is not a step of the model.
        let availability = Availability::new(Clock::system());
        let cache = Cache::new(&config, clock.clone(), availability, &Series::default());
        cache.reset(true);
        let database = Arc::new(Database::new());
        let app = App::new(cache.clone(), Arc::clone(&database), clock.clone(), skips);
        Self {
            cache,
            database,
            app,
            revs: RevSource::new(),
            foreign_revs: RevSource::new(),
            model,
            clock,
            bell: Arc::default(),
            grace,
            outage: false.into(),
            known: AtomicU64::new(0),
            story: std::sync::Mutex::default(),
        }
    }

    pub(crate) fn load(&self) {
        self.load_over(|| Ok(self.database.find()));
    }

    /// A load that must not fail, because no read that can fail runs when it begins.
    pub(crate) fn load_without_failure(&self) {
        let answered = self.load_over(|| Ok(self.database.find()));
        self.check(answered, "a load got the error of one that had ended before");
    }

    /// A load whose read, if it makes one, gets no answer from the database.
    pub(crate) fn load_in_an_outage(&self) {
        self.outage.store(true, Ordering::Relaxed);
        self.load_over(|| Err(Error::new(ErrorKind::Timeout, "no answer")));
    }

    /// A load whose read never ends, because the runtime has shut down.
    pub(crate) fn load_cut_off(&self) {
        self.load_by(drop);
    }

    fn load_over(&self, find: impl FnOnce() -> Result<Option<Session>>) -> bool {
        self.load_by(|leader| {
            let found = find();
            if let Ok(found) = &found {
                self.note(format_args!(
                    "has read {}",
                    Shown(self.database.rank_found(found.as_ref()))
                ));
            }
            let availability = self.cache.availability();
            availability.observe_call(availability.now(), &found);
            leader.complete(found);
        })
    }

    /// Loads the session. Returns whether there was an answer.
    fn load_by(&self, read: impl FnOnce(Leader)) -> bool {
        let mut known = self.known.fetch_add(0, Ordering::Acquire);
        if let Some(grace) = self.grace {
            let outage = self.outage.load(Ordering::Relaxed);
            let bound = BOUND + if outage { grace } else { Duration::ZERO };
            known = known.max(self.database.rank_at(bound, self.clock.now()));
        }
        self.note(format_args!("loads, {} or later", Shown(known)));
        let found = match self.cache.get(key()) {
            Lookup::Hit(entry) => entry.session().ok(),
            Lookup::Grace(entry) => {
                self.cache.probe(key(), read);
                entry.session().ok()
            }
            Lookup::Absent => None,
            Lookup::Miss | Lookup::Expired => {
                let Ok(entry) =
                    self.bell.wait_for(self.cache.fill(key(), |leader, _| read(leader)))
                else {
                    self.note(format_args!("has no answer"));
                    return false;
                };
                entry.and_then(|entry| entry.session().ok())
            }
        };
        let rank = self.database.rank_found(found.as_ref());
        self.note(format_args!("has loaded {}", Shown(rank)));
        self.check(rank >= known, "a load went back");
        self.learn(rank);
        true
    }

    /// A warm-up reads the session.
    pub(crate) fn warm(&self) {
        let Some(offer) = self.cache.begin_idle_fill(key()) else { return };
        self.note(format_args!("warms up"));
        let found = self.database.find();
        self.note(format_args!("has read {}", Shown(self.database.rank_found(found.as_ref()))));
        if let Some(session) = found {
            let inserted = offer.publish(session, u64::MAX);
            self.note(format_args!("has inserted an entry: {}", matches!(inserted, Ok(Some(_)))));
        }
    }

    pub(crate) fn save(&self) {
        let rev = self.revs.next();
        let guard = self.cache.begin_write(key(), rev);
        self.note(format_args!("saves"));
        let written = self.database.replace(rev, true, &self.clock);
        if let Some(rank) = written {
            self.note(format_args!("has written {}", Shown(rank)));
            guard.publish(session(rank));
        } else {
            guard.evict(Invalidation::Gone);
        }
        let rank = written.unwrap_or(GONE);
        self.note(format_args!("has saved {}", Shown(rank)));
        self.learn(rank);
    }

    /// A save that times out before the database has carried it out.
    pub(crate) fn save_with_unknown_outcome(&self) {
        let rev = self.revs.next();
        let guard = self.cache.begin_write(key(), rev);
        self.note(format_args!("saves, and the save times out"));
        drop(guard);
        self.database.replace(rev, true, &self.clock);
        self.note(format_args!("the save is stored late"));
        self.cache.evict(key());
    }

    pub(crate) fn delete(&self) {
        let guard = self.cache.begin(key());
        self.note(format_args!("deletes"));
        self.database.remove(&self.clock);
        guard.evict(Invalidation::Delete);
        self.note(format_args!("has deleted"));
        self.learn(GONE);
    }

    pub(crate) fn clear(&self) {
        self.note(format_args!("clears"));
        self.database.remove(&self.clock);
        self.cache.clear();
        self.note(format_args!("has cleared"));
        self.learn(GONE);
    }

    /// Another instance replaces the session.
    pub(crate) fn foreign_save(&self) {
        let rank = self.database.replace(self.foreign_revs.next(), false, &self.clock);
        self.note(format_args!("another instance has written {}", Shown(rank.unwrap_or(GONE))));
    }

    /// A request at another instance adds a key.
    pub(crate) fn foreign_add(&self) {
        let rank = self.database.add_elsewhere("c", self.foreign_revs.next(), &self.clock);
        self.note(format_args!("another instance has added c: {}", Shown(rank.unwrap_or(GONE))));
    }

    /// Another instance removes the session.
    pub(crate) fn foreign_delete(&self) {
        self.database.remove(&self.clock);
        self.note(format_args!("another instance has deleted"));
    }

    /// Receives the next change of the stream, if there is one.
    pub(crate) fn receive_change(&self) {
        self.receive_next();
    }

    fn receive_next(&self) -> bool {
        let Some(Written { rank, rev, ours, .. }) = self.database.next_report() else {
            return false;
        };
        self.note(format_args!("receives the change to {}", Shown(rank)));
        self.cache.apply_change(&Change { key: key(), rev });
        self.note(format_args!("has applied the change to {}", Shown(rank)));
        if !ours {
            self.learn(rank);
        }
        true
    }

    /// Renews the lease as a checkpoint does: first the store receives all changes from before the checkpoint.
    pub(crate) fn renew(&self) {
        let asked = self.clock.now();
        while self.receive_next() {}
        self.cache.renew(asked);
        self.note(format_args!("renewed the lease"));
    }

    /// The stream has a gap: all reports so far are lost, and the cache is emptied.
    pub(crate) fn gap(&self) {
        let lost = self.database.lose_reports();
        self.note(format_args!("the changes up to {} are lost", Shown(lost)));
        self.cache.reset(true);
        self.learn(lost);
    }

    pub(crate) fn tick(&self) {
        self.model.tick();
        self.note(format_args!("a second later"));
    }

    /// Checks the store after all threads have ended: no key is tracked, no own write is left, and loads return the
    /// current state.
    pub(crate) fn check_rest(&self) {
        self.load_without_failure();
        while self.receive_next() {}
        self.check(self.cache.tracked_keys() == 0, "a key is still tracked");
        self.check(self.cache.own_writes() == 0, "an own write is still tracked");
        self.learn(self.database.rank());
        self.load_without_failure();
        self.load_without_failure();
        self.check(self.cache.tracked_keys() == 0, "a load has left a tracked key");
    }

    /// A caller learns of a state: no later load may return an older one.
    pub(crate) fn learn(&self, rank: Rank) {
        self.known.fetch_max(rank, Ordering::Release);
    }

    pub(crate) fn note(&self, what: fmt::Arguments<'_>) {
        let thread = loom::thread::current();
        let name = thread.name().unwrap_or_default();
        let mut story = self.story.lock().unwrap_or_else(PoisonError::into_inner);
        story.push(format!("{name}: {what}"));
    }

    #[track_caller]
    pub(crate) fn check(&self, holds: bool, what: &str) {
        if !holds {
            let story = self.story.lock().unwrap_or_else(PoisonError::into_inner);
            panic!("{what}:\n  {}", story.join("\n  "));
        }
    }
}

/// A state, as the message of a failure shows it.
struct Shown(Rank);

impl fmt::Display for Shown {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0 == GONE { f.write_str("gone") } else { self.0.fmt(f) }
    }
}

/// `Bell`: wakes all threads that wait for a future.
///
/// tokio wakes the waiters of one answer in a random order, and each run of a model must take the same schedules. So
/// all of them wake up and poll again.
#[derive(Default)]
pub(crate) struct Bell {
    rung: Mutex<u64>,
    rings: Condvar,
}

impl Bell {
    /// Waits for a future with loom's lock and condition variable, so that loom sees the wait.
    pub(crate) fn wait_for<T>(self: &Arc<Self>, future: impl Future<Output = T>) -> T {
        let mut future = std::pin::pin!(future);
        let waker = Waker::from(Arc::clone(self));
        loop {
            let before = *lock(&self.rung);
            if let Poll::Ready(outcome) = future.as_mut().poll(&mut Context::from_waker(&waker)) {
                return outcome;
            }
            let mut rung = lock(&self.rung);
            while *rung == before {
                rung = self.rings.wait(rung).unwrap_or_else(PoisonError::into_inner);
            }
        }
    }
}

impl Wake for Bell {
    fn wake(self: Arc<Self>) {
        *lock(&self.rung) += 1;
        self.rings.notify_all();
    }
}
