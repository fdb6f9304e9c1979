//! The load of the shared sessions: requests that load, change and save, most of them in a request scope.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use rand::Rng;
use rand_chacha::ChaCha8Rng;
use tokio::task::JoinSet;
use tower_sessions::SessionStore;
use tower_sessions::session::{Id, Record};
use tower_sessions_moka_mongodb_store::in_request_scope;

use crate::actions::{Patience, Run};
use crate::history::Nanos;
use crate::shared::{Contained, Contents, Event, KEYS, KeyChange, Origin, Save, Seen};
use crate::shared::{SharedSession, What};
use crate::workload::{AFTERMATH, now_and_then, random};

/// How many shared sessions are in use at a time. The first few of them are used most.
const SESSIONS: usize = 12;
const HOT: usize = 3;
/// The number of tasks for each instance.
const REQUESTERS: u64 = 12;

/// Starts all tasks. They end when the run has ended.
pub(crate) fn start(run: &Arc<Run>, tasks: &mut JoinSet<()>) {
    let mut stream = 1_000_000;
    for instance in 0..run.settings.instances {
        for _ in 0..REQUESTERS {
            stream += 1;
            tasks.spawn(requester(run.clone(), instance, random(run.settings.seed, stream)));
        }
    }
}

async fn requester(run: Arc<Run>, instance: u8, mut rng: ChaCha8Rng) {
    while !run.has_ended() {
        tokio::time::sleep(Duration::from_micros(rng.random_range(0..20_000))).await;
        let plan = Plan::draw(&mut rng);
        if run.shared().len() < SESSIONS {
            create(&run, instance, &plan).await;
            continue;
        }
        let session = {
            let pool = run.shared();
            let among = if plan.is_hot { pool.len().min(HOT) } else { pool.len() };
            pool.get(plan.pick % among.max(1)).cloned()
        };
        if let Some(session) = session {
            act(&run, instance, &session, &plan).await;
        }
    }
}

/// What one round of a task does. All of it is drawn at once, so that the next round draws the same numbers
/// whatever happens in this one.
#[allow(clippy::struct_excessive_bools, reason = "each one is drawn by itself")]
struct Plan {
    pick: usize,
    is_hot: bool,
    /// A new session: how long it lives, whether it is deleted then, and whether all its saves are in a scope.
    lives: Duration,
    mortal: bool,
    is_scoped_only: bool,
    /// The request has an old cookie.
    is_late: bool,
    deletes: bool,
    saves_without_scope: bool,
    loads_afterwards: bool,
    saves: Vec<Change>,
    cycles: bool,
    patience: Patience,
}

/// What a request changes before a save.
struct Change {
    /// How long the handler works before it.
    works: Duration,
    keys: [Draw; KEYS],
    counts: bool,
}

#[derive(Clone, Copy)]
enum Draw {
    Nothing,
    Set,
    Remove,
}

impl Plan {
    fn draw(rng: &mut ChaCha8Rng) -> Self {
        let saves = if rng.random_ratio(1, 5) { 2 } else { 1 };
        Self {
            pick: rng.random_range(0..10_000),
            is_hot: rng.random_ratio(2, 3),
            lives: Duration::from_millis(rng.random_range(2_000..8_000)),
            mortal: rng.random_ratio(1, 2),
            is_scoped_only: rng.random_ratio(2, 3),
            is_late: rng.random_ratio(1, 8),
            deletes: rng.random_ratio(1, 6),
            saves_without_scope: rng.random_ratio(1, 4),
            loads_afterwards: rng.random_ratio(1, 2),
            saves: (0..saves).map(|_| Change::draw(rng)).collect(),
            cycles: rng.random_ratio(1, 8),
            patience: now_and_then(rng, 200),
        }
    }
}

impl Change {
    fn draw(rng: &mut ChaCha8Rng) -> Self {
        let slow = rng.random_ratio(1, 10);
        let works = rng.random_range(0..if slow { 300_000 } else { 4_000 });
        let mut keys = [Draw::Nothing; KEYS];
        let some = if rng.random_ratio(1, 12) { 0 } else { rng.random_range(1..=2) };
        for _ in 0..some {
            let key = rng.random_range(0..KEYS);
            keys[key] = if rng.random_ratio(1, 4) { Draw::Remove } else { Draw::Set };
        }
        Self { works: Duration::from_micros(works), keys, counts: rng.random_ratio(1, 2) }
    }

    /// The changes of a request that has these contents.
    fn of(&self, run: &Run, contents: &Contents) -> Save {
        let keys = std::array::from_fn(|key| match (self.keys[key], contents.keys[key]) {
            (Draw::Set, _) => KeyChange::Set(run.numbers.fetch_add(1, Ordering::Relaxed)),
            (Draw::Remove, Contained::Number(_)) => KeyChange::Remove,
            (Draw::Remove, Contained::Nothing) | (Draw::Nothing, _) => KeyChange::None,
        });
        let views = u64::from(self.counts);
        Save { keys, views, expires: expires(run), ok: false }
    }
}

/// Each request prolongs the session. One second of the run is one second of the expiry.
fn expires(run: &Run) -> u64 {
    Duration::from_nanos(run.clock.now()).as_secs()
}

async fn create(run: &Run, instance: u8, plan: &Plan) {
    run.ledger.counts.creates.fetch_add(1, Ordering::Relaxed);
    let number = run.numbers.fetch_add(1, Ordering::Relaxed);
    let keys = std::array::from_fn(|key| match plan.saves[0].keys[key] {
        Draw::Set => KeyChange::Set(run.numbers.fetch_add(1, Ordering::Relaxed)),
        Draw::Nothing | Draw::Remove => KeyChange::Remove,
    });
    let save = Save { keys, views: 0, expires: expires(run), ok: true };
    let mut contents = Contents { keys: [Contained::Nothing; KEYS], views: 0, expires: 0 };
    contents.change(&save);
    let mut record = run.script.shared_record(number, Id::default(), &contents);
    let create = run.store(instance).create(&mut record);
    let (start, end, Some(())) = run.timed(None, create).await else { return };
    let created = Event { id: 0, instance, start, end, what: What::Save(save) };
    let ends = end.saturating_add(nanos(plan.lives));
    let session =
        SharedSession::new(number, record.id, plan.is_scoped_only, ends, plan.mortal, created);
    run.shared().push(Arc::new(session));
}

async fn act(run: &Run, instance: u8, session: &SharedSession, plan: &Plan) {
    let (index, id) = {
        let state = session.state();
        let newest = state.ids.iter().rposition(|(_, is_gone)| !is_gone);
        let index = newest.filter(|_| !plan.is_late).unwrap_or(plan.pick % state.ids.len());
        (index, state.ids[index].0)
    };
    let user = User { run, instance, session, index, id };
    let is_over = run.clock.now() >= session.ends;
    if is_over && session.mortal && plan.deletes {
        if user.delete(plan.patience).await.is_some() {
            session.end(run.clock.now());
        }
    } else if is_over && !session.mortal {
        return;
    } else if plan.saves_without_scope && !session.is_scoped_only {
        user.save_without_scope(plan).await;
    } else {
        in_request_scope(user.request(plan)).await;
    }
    if plan.loads_afterwards {
        user.load().await;
    }
}

/// A browser with the cookie of a session, at one instance.
struct User<'a> {
    run: &'a Run,
    instance: u8,
    session: &'a SharedSession,
    /// The index of the id.
    index: usize,
    id: Id,
}

impl User<'_> {
    fn note(&self, start: Nanos, end: Nanos, what: What) -> Event {
        let event = Event { id: self.index, instance: self.instance, start, end, what };
        self.session.note(event);
        event
    }

    async fn load(&self) -> Option<(Record, Contents)> {
        self.run.ledger.counts.loads.fetch_add(1, Ordering::Relaxed);
        let load = self.run.store(self.instance).load(&self.id);
        let (start, end, answer) = self.run.timed(None, load).await;
        let seen = match &answer {
            None => Seen::Error,
            Some(None) => Seen::Absent,
            Some(Some(record)) => self.run.script.shared_seen(self.session.number, self.id, record),
        };
        self.note(start, end, What::Load(seen));
        match seen {
            Seen::Contents(contents) => answer.flatten().map(|record| (record, contents)),
            _ => None,
        }
    }

    /// A request in a scope.
    async fn request(&self, plan: &Plan) {
        let Some((_, mut contents)) = self.load().await else { return };
        let last = plan.saves.len() - 1;
        for (number, change) in plan.saves.iter().enumerate() {
            tokio::time::sleep(change.works).await;
            let save = change.of(self.run, &contents);
            contents.change(&save);
            // After an error, an app does not know what is stored. A second save could count twice.
            if number == last && plan.cycles {
                self.cycle_id(&contents, save, plan.patience).await;
            } else if !self.save(&contents, save, plan.patience).await {
                return;
            }
        }
    }

    /// Saves. Returns whether the save was acknowledged.
    async fn save(&self, contents: &Contents, save: Save, patience: Patience) -> bool {
        let counts = &self.run.ledger.counts;
        counts.requests.fetch_add(1, Ordering::Relaxed);
        let record = self.run.script.shared_record(self.session.number, self.id, contents);
        let sent = self.run.store(self.instance).save(&record);
        let (start, end, answer) = self.run.timed(patience, sent).await;
        let ok = self.is_decided(answer);
        self.note(start, end, What::Save(Save { ok, ..save }));
        ok
    }

    /// A save without a scope stores all that the request has, so it changes each key. It always sets a key to a new
    /// number: without a change, it would be a touch, which keeps what another instance has stored.
    async fn save_without_scope(&self, plan: &Plan) {
        let Some((_, mut contents)) = self.load().await else { return };
        let change = &plan.saves[0];
        tokio::time::sleep(change.works).await;
        let mut save = change.of(self.run, &contents);
        save.keys[0] = KeyChange::Set(self.run.numbers.fetch_add(1, Ordering::Relaxed));
        contents.change(&save);
        let keys = contents.keys.map(|contained| match contained {
            Contained::Nothing => KeyChange::Remove,
            Contained::Number(number) => KeyChange::Set(number),
        });
        self.save(&contents, Save { keys, ..save }, plan.patience).await;
    }

    async fn delete(&self, patience: Patience) -> Option<Nanos> {
        self.run.ledger.counts.deletes.fetch_add(1, Ordering::Relaxed);
        let delete = self.run.store(self.instance).delete(&self.id);
        let (start, end, answer) = self.run.timed(patience, delete).await;
        let ok = self.is_decided(answer);
        self.note(start, end, What::Delete { ok });
        ok.then_some(start)
    }

    /// What `Session::cycle_id` does: it deletes the session and creates it again under another id.
    async fn cycle_id(&self, contents: &Contents, save: Save, patience: Patience) {
        self.run.ledger.counts.cycles.fetch_add(1, Ordering::Relaxed);
        let Some(delete_began) = self.delete(patience).await else { return };
        let number = self.session.number;
        let mut record = self.run.script.shared_record(number, Id::default(), contents);
        let create = self.run.store(self.instance).create(&mut record);
        let (start, end, answer) = self.run.timed(patience, create).await;
        if self.is_decided(answer) {
            let what = What::Save(Save { ok: true, ..save });
            let created = Event { id: 0, instance: self.instance, start, end, what };
            let origin = Origin { parent: self.index, delete_began, create_began: start };
            self.session.renew(record.id, origin, created);
        }
    }

    /// Whether a write was acknowledged. If not, its outcome is unknown.
    fn is_decided(&self, answer: Option<()>) -> bool {
        if answer.is_none() {
            self.run.ledger.counts.undecided.fetch_add(1, Ordering::SeqCst);
        }
        answer.is_some()
    }
}

fn nanos(time: Duration) -> Nanos {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX / 2)
}

/// Takes shared sessions out of use that are finished, and judges them once no task holds them. With `all`, after
/// every task has ended, it takes all of them.
pub(crate) fn sweep(run: &Run, all: bool) {
    let now = run.clock.now();
    let aftermath = nanos(run.settings.max_staleness + AFTERMATH);
    let is_done = |session: &SharedSession| match session.ended() {
        Some(ended) => now > ended.saturating_add(aftermath),
        None if session.mortal => now > session.ends.saturating_add(4 * aftermath),
        None => now > session.ends,
    };
    let done: Vec<_> = run.shared().extract_if(.., |session| all || is_done(session)).collect();
    let mut leaving = run.shared_leaving();
    leaving.extend(done);
    let unused: Vec<_> =
        leaving.extract_if(.., |session| Arc::strong_count(session) == 1).collect();
    drop(leaving);
    for session in unused {
        run.ledger.judge_shared(&session);
    }
}
