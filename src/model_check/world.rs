//! One store over a database, as `src/tiers.rs` and `src/follow.rs` put them together, and what
//! must be true of every answer.

use std::fmt;
use std::sync::{Arc, PoisonError};
use std::task::{Context, Poll, Wake, Waker};
use std::time::Duration;

use loom::sync::Condvar;

use crate::availability::Availability;
use crate::cache::{Cache, CacheConfig, EvictionPolicy, Leader, Lookup};
use crate::error::{Error, ErrorKind, Result};
use crate::invalidation::source::Change;
use crate::model_check::app::App;
use crate::model_check::clock::ModelClock;
use crate::model_check::database::{Database, GONE, Rank, Written, key, session};
use crate::session::Session;
use crate::session::revision::RevSource;
use crate::sync::{AtomicU64, Mutex, Ordering, lock};
use crate::telemetry::metrics::{Invalidation, Series};
use crate::time::Clock;

/// `max_staleness`, where the clock moves by the second.
const BOUND: Duration = Duration::from_secs(1);
/// `outage_grace`, in the models that have one.
const GRACE: Duration = Duration::from_secs(1);

/// The store and those who use it.
pub(crate) struct World {
    cache: Cache,
    pub(crate) database: Arc<Database>,
    pub(crate) app: App,
    revs: RevSource,
    others: RevSource,
    /// What the clock of `clock` is moved by.
    model: ModelClock,
    clock: Clock,
    pub(crate) bell: Arc<Bell>,
    /// How much older than `BOUND` an answer may be in an outage, if the clock moves.
    grace: Option<Duration>,
    /// Whether there was an outage. Not seen by loom, as the story.
    outage: std::sync::atomic::AtomicBool,
    /// The oldest state that a load may answer with from now on. Whoever learns of a state raises
    /// it, releasing, and whoever reads it acquires: so "later" is "happens after", and not more.
    known: AtomicU64,
    /// What happened, in the order in which it did. Not seen by loom, and no step.
    story: std::sync::Mutex<Vec<String>>,
}

impl World {
    pub(crate) fn new() -> Self {
        Self::with(ModelClock::default(), None, false)
    }

    /// Where touches that are not worth it are left out.
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
        let limits = CacheConfig {
            max_bytes: 1 << 20,
            max_entries: None,
            max_absent_ids: 10,
            policy: EvictionPolicy::Lru,
            max_staleness: BOUND,
            exclusive: false,
            outage_grace: grace.unwrap_or_default(),
            compact: false,
        };
        // Its times decide about nothing that is checked here, so reading them is no step of the model.
        let availability = Availability::new(Clock::system());
        let cache = Cache::new(&limits, clock.clone(), availability, &Series::default());
        cache.reset(true);
        let database = Arc::new(Database::new());
        let app = App::new(cache.clone(), Arc::clone(&database), clock.clone(), skips);
        Self {
            cache,
            database,
            app,
            revs: RevSource::new(),
            others: RevSource::new(),
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

    /// A load that begins when no other one's read is under way that may fail.
    pub(crate) fn load_is_answered(&self) {
        let answered = self.load_over(|| Ok(self.database.find()));
        self.check(answered, "a load got the error of one that had ended before");
    }

    /// A load whose read the database does not answer, if it comes to one.
    pub(crate) fn load_in_an_outage(&self) {
        self.outage.store(true, Ordering::Relaxed);
        self.load_over(|| Err(Error::new(ErrorKind::Timeout, "no answer")));
    }

    /// A load whose read comes to a runtime that has gone: nobody brings it to its end.
    pub(crate) fn load_cut_off(&self) {
        self.load_by(drop);
    }

    fn load_over(&self, find: impl FnOnce() -> Result<Option<Session>>) -> bool {
        self.load_by(|landing| {
            let found = find();
            if let Ok(found) = &found {
                self.tell(format_args!(
                    "has read {}",
                    Shown(self.database.rank_found(found.as_ref()))
                ));
            }
            let availability = self.cache.availability();
            availability.observe_call(availability.now(), &found);
            landing.complete(found);
        })
    }

    /// Whether there was an answer.
    fn load_by(&self, read: impl FnOnce(Leader)) -> bool {
        let mut known = self.known.fetch_add(0, Ordering::Acquire);
        if let Some(grace) = self.grace {
            let outage = self.outage.load(Ordering::Relaxed);
            let bound = BOUND + if outage { grace } else { Duration::ZERO };
            known = known.max(self.database.stood(bound, self.clock.now()));
        }
        self.tell(format_args!("loads, {} or later", Shown(known)));
        let found = match self.cache.get(key()) {
            Lookup::Hit(entry) => entry.session().ok(),
            Lookup::Grace(entry) => {
                self.cache.probe(key(), read);
                entry.session().ok()
            }
            Lookup::Absent => None,
            Lookup::Miss | Lookup::Expired => {
                let Ok(entry) =
                    self.bell.wait_for(self.cache.fill(key(), |landing, _| read(landing)))
                else {
                    self.tell(format_args!("has no answer"));
                    return false;
                };
                entry.and_then(|entry| entry.session().ok())
            }
        };
        let rank = self.database.rank_found(found.as_ref());
        self.tell(format_args!("has loaded {}", Shown(rank)));
        self.check(rank >= known, "a load went back");
        self.knows(rank);
        true
    }

    /// A warm-up comes to the session.
    pub(crate) fn warm(&self) {
        let Some(offer) = self.cache.begin_idle_fill(key()) else { return };
        self.tell(format_args!("reads for nobody"));
        let found = self.database.find();
        self.tell(format_args!("has read {}", Shown(self.database.rank_found(found.as_ref()))));
        if let Some(session) = found {
            let left = offer.publish(session, u64::MAX);
            self.tell(format_args!("has left something: {}", matches!(left, Ok(Some(_)))));
        }
    }

    pub(crate) fn save(&self) {
        let rev = self.revs.next();
        let ticket = self.cache.begin_write(key(), rev);
        self.tell(format_args!("saves"));
        let written = self.database.replace(rev, true, &self.clock);
        if let Some(rank) = written {
            self.tell(format_args!("has written {}", Shown(rank)));
            drop(ticket.publish(session(rank)));
        } else {
            ticket.evict(Invalidation::Gone);
        }
        let rank = written.unwrap_or(GONE);
        self.tell(format_args!("has saved {}", Shown(rank)));
        self.knows(rank);
    }

    /// A save that is given up before the database has carried it out.
    pub(crate) fn save_in_doubt(&self) {
        let rev = self.revs.next();
        let ticket = self.cache.begin_write(key(), rev);
        self.tell(format_args!("saves and gives up"));
        drop(ticket);
        self.database.replace(rev, true, &self.clock);
        self.tell(format_args!("it is written all the same"));
        self.cache.evict(key());
    }

    pub(crate) fn delete(&self) {
        let ticket = self.cache.begin(key());
        self.tell(format_args!("deletes"));
        self.database.remove(&self.clock);
        ticket.evict(Invalidation::Delete);
        self.tell(format_args!("has deleted"));
        self.knows(GONE);
    }

    pub(crate) fn clear(&self) {
        self.tell(format_args!("clears"));
        self.database.remove(&self.clock);
        self.cache.clear();
        self.tell(format_args!("has cleared"));
        self.knows(GONE);
    }

    /// Another instance replaces the session.
    pub(crate) fn foreign_save(&self) {
        let rank = self.database.replace(self.others.next(), false, &self.clock);
        self.tell(format_args!("another instance has written {}", Shown(rank.unwrap_or(GONE))));
    }

    /// Another instance removes the session.
    pub(crate) fn foreign_delete(&self) {
        self.database.remove(&self.clock);
        self.tell(format_args!("another instance has deleted"));
    }

    /// Takes the next change that the database reports, if there is one by now.
    pub(crate) fn hear(&self) {
        self.hears();
    }

    fn hears(&self) -> bool {
        let Some(Written { rank, rev, ours, .. }) = self.database.next_report() else {
            return false;
        };
        self.tell(format_args!("hears of {}", Shown(rank)));
        self.cache.apply_change(&Change { key: key(), rev });
        self.tell(format_args!("has heard of {}", Shown(rank)));
        if !ours {
            self.knows(rank);
        }
        true
    }

    /// A fence: what was changed before it was asked for is taken, and then the lease renewed.
    pub(crate) fn renew(&self) {
        let asked = self.clock.now();
        while self.hears() {}
        self.cache.renew(asked);
        self.tell(format_args!("renewed the lease"));
    }

    /// Loses all reports so far, and begins anew.
    pub(crate) fn gap(&self) {
        let lost = self.database.lose_reports();
        self.tell(format_args!("the reports up to {} are lost", Shown(lost)));
        self.cache.reset(true);
        self.knows(lost);
    }

    pub(crate) fn tick(&self) {
        self.model.tick();
        self.tell(format_args!("a second later"));
    }

    /// All have ended: what is reported is taken, and nothing may be left of them but a cache that
    /// tells the truth.
    pub(crate) fn settle(&self) {
        self.load_is_answered();
        while self.hears() {}
        self.check(self.cache.tracked_keys() == 0, "a slot was left");
        self.check(self.cache.own_writes() == 0, "an echo was left");
        let stands = self.database.rank();
        self.knows(stands);
        self.load_is_answered();
        self.load_is_answered();
        self.check(self.cache.tracked_keys() == 0, "a load has left a slot");
    }

    pub(crate) fn knows(&self, rank: Rank) {
        self.known.fetch_max(rank, Ordering::Release);
    }

    pub(crate) fn tell(&self, what: fmt::Arguments<'_>) {
        let thread = loom::thread::current();
        let who = thread.name().unwrap_or_default();
        let mut story = self.story.lock().unwrap_or_else(PoisonError::into_inner);
        story.push(format!("{who}: {what}"));
    }

    #[track_caller]
    pub(crate) fn check(&self, holds: bool, what: &str) {
        if !holds {
            let story = self.story.lock().unwrap_or_else(PoisonError::into_inner);
            panic!("{what}:\n  {}", story.join("\n  "));
        }
    }
}

/// A state, for people.
struct Shown(Rank);

impl fmt::Display for Shown {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0 == GONE { f.write_str("gone") } else { self.0.fmt(f) }
    }
}

/// Rings for all who wait for something, since tokio wakes them in an order left to chance, and a run
/// must be like the last.
#[derive(Default)]
pub(crate) struct Bell {
    rung: Mutex<u64>,
    rings: Condvar,
}

impl Bell {
    /// Waits for a future, so that loom sees who waits for whom.
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
