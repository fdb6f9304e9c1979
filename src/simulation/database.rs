//! The simulated database: what it holds, the log of its changes, and all that was ever true.

use std::collections::HashMap;
use std::time::Duration;

use crate::session::Session;
use crate::session::id::SessionKey;
use crate::session::revision::Rev;
use crate::simulation::oplog::Oplog;
use crate::simulation::sign_out::{Floors, PAGE};
use crate::time::WallTime;
use crate::time::{Clock, Moment};

/// Sessions are told apart by their numbers, in the order in which they were first spoken of:
/// keys are random.
pub(crate) struct Database {
    clock: Clock,
    numbers: HashMap<SessionKey, usize>,
    keys: Vec<SessionKey>,
    histories: Vec<Vec<State>>,
    /// What sessions were prolonged to, or were to end later than already.
    touched: Vec<(usize, WallTime)>,
    pub(crate) oplog: Oplog,
    /// Whether changes that are made together are one entry of the oplog.
    pub(crate) is_bulk: bool,
    steps: u64,
}

/// What was true of a session from some moment on.
pub(crate) struct State {
    from: Moment,
    held: Option<Held>,
    /// The call that brought it about, if it was a store's.
    by: Option<usize>,
}

pub(crate) struct Held {
    pub(crate) version: u64,
    /// The expiries that it had, the present one last.
    pub(crate) expiries: Vec<WallTime>,
}

/// A span in which one thing was true of a session.
pub(crate) struct Span<'a> {
    /// Grows with each change; odd once a session has expired.
    pub(crate) rank: usize,
    pub(crate) held: Option<&'a Held>,
    pub(crate) from: Moment,
    pub(crate) until: Option<Moment>,
    /// The call that ended it.
    pub(crate) ended_by: Option<usize>,
}

impl Database {
    pub(crate) fn new(clock: Clock, shards: usize) -> Self {
        Self {
            clock,
            numbers: HashMap::new(),
            keys: Vec::new(),
            histories: Vec::new(),
            touched: Vec::new(),
            oplog: Oplog::new(shards),
            is_bulk: false,
            steps: 0,
        }
    }

    pub(crate) fn now(&self) -> Moment {
        self.clock.now()
    }

    /// The place of a new event in the order of all that happens.
    pub(crate) fn step(&mut self) -> u64 {
        self.steps += 1;
        self.steps
    }

    pub(crate) fn number(&mut self, key: SessionKey) -> usize {
        let Self { numbers, keys, histories, .. } = self;
        *numbers.entry(key).or_insert_with(|| {
            keys.push(key);
            histories.push(vec![State { from: Moment::from_nanos(0), held: None, by: None }]);
            keys.len() - 1
        })
    }

    pub(crate) fn sessions(&self) -> usize {
        self.keys.len()
    }

    /// Stores a new session; `false` if one is there, were it expired.
    pub(crate) fn insert(&mut self, key: SessionKey, session: &Session, by: Option<usize>) -> bool {
        let number = self.number(key);
        if self.current(number).held.is_some() {
            return false;
        }
        self.oplog.tick(self.oplog.home(number));
        self.becomes(number, Some(session), by);
        true
    }

    pub(crate) fn replace(
        &mut self,
        key: SessionKey,
        rev: Option<Rev>,
        session: &Session,
        by: Option<usize>,
    ) -> bool {
        let number = self.number(key);
        if !self.is_live(number) {
            return false;
        }
        self.oplog.tick(self.oplog.home(number));
        self.change(number, rev, Some(session), by);
        true
    }

    pub(crate) fn find(&mut self, key: SessionKey) -> Option<Session> {
        let number = self.number(key);
        let live = self.is_live(number);
        let held = self.current(number).held.as_ref().filter(|_| live)?;
        Some(Session { data: crate::simulation::data(held.version), expires: held.expires() })
    }

    pub(crate) fn remove(&mut self, key: SessionKey, by: Option<usize>) {
        let number = self.number(key);
        if self.current(number).held.is_some() {
            self.oplog.tick(self.oplog.home(number));
            self.change(number, None, None, by);
        }
    }

    /// Removes all of these sessions.
    fn remove_all(&mut self, numbers: &[usize], by: Option<usize>) {
        self.tick_for_all(numbers);
        for number in numbers {
            if !self.is_bulk {
                self.oplog.tick(self.oplog.home(*number));
            }
            self.change(*number, None, None, by);
        }
    }

    /// Replaces all that are live of these sessions, in one transaction.
    pub(crate) fn replace_together(&mut self, sessions: &[(SessionKey, Session)]) {
        let mut live = Vec::new();
        for (key, session) in sessions {
            let number = self.number(*key);
            if self.is_live(number) {
                live.push((number, session));
            }
        }
        self.is_bulk = true;
        self.tick_for_all(&live.iter().map(|(number, _)| *number).collect::<Vec<_>>());
        for (number, session) in live {
            self.change(number, None, Some(session), None);
        }
    }

    /// Begins the one entry of a bulk, on each shard that it concerns.
    fn tick_for_all(&mut self, numbers: &[usize]) {
        for shard in 0..self.oplog.shards() {
            let concerns = |number: &usize| self.oplog.home(*number) == shard;
            if self.is_bulk && numbers.iter().any(concerns) {
                self.oplog.tick(shard);
            }
        }
    }

    /// Removes all sessions, or the first few; answers with how many.
    pub(crate) fn clear(&mut self, most: usize, by: Option<usize>) -> u64 {
        let there = (0..self.sessions()).filter(|number| self.current(*number).held.is_some());
        let there: Vec<_> = there.take(most).collect();
        self.remove_all(&there, by);
        there.len() as u64
    }

    /// A page of the sessions of an owner, behind the one of this number, and whether each is live.
    pub(crate) fn owned(&self, owner: u64, after: Option<usize>) -> Vec<(usize, SessionKey, bool)> {
        let first = after.map_or(0, |after| after + 1);
        let numbers = (first..self.sessions()).filter(|number| self.is_of(*number, owner));
        let found = numbers.map(|number| (number, self.keys[number], self.is_live(number)));
        found.take(PAGE).collect()
    }

    /// Removes those of these sessions that are an owner's; answers with how many.
    pub(crate) fn remove_owned(
        &mut self,
        keys: &[SessionKey],
        owner: u64,
        by: Option<usize>,
    ) -> u64 {
        let mut removed = 0;
        for key in keys {
            let number = self.number(*key);
            if self.is_of(number, owner) {
                self.remove(*key, by);
                removed += 1;
            }
        }
        removed
    }

    fn is_of(&self, number: usize, owner: u64) -> bool {
        let held = self.current(number).held.as_ref();
        held.is_some_and(|held| crate::simulation::sign_out::owner(held.version) == owner)
    }

    /// What these sessions are now.
    pub(crate) fn ranks(&mut self, keys: &[SessionKey]) -> Floors {
        let numbers: Vec<_> = keys.iter().map(|key| self.number(*key)).collect();
        numbers.into_iter().map(|number| (number, self.rank(number))).collect()
    }

    /// What the last of these calls that has changed a session has made of it.
    pub(crate) fn rank_by(&self, number: usize, by: impl Fn(usize) -> bool) -> Option<usize> {
        let mut states = self.histories[number].iter();
        states.rposition(|state| state.by.is_some_and(&by)).map(|index| 2 * index)
    }

    /// Prolongs a live session, of which the log does not tell; `false` if there is none.
    pub(crate) fn touch(&mut self, key: SessionKey, expires: WallTime) -> bool {
        let number = self.number(key);
        if !self.is_live(number) {
            return false;
        }
        self.oplog.tick(self.oplog.home(number));
        let state = self.histories[number].last_mut().unwrap();
        let held = state.held.as_mut().unwrap();
        if held.expires() < expires {
            held.expiries.push(expires);
        }
        self.touched.push((number, expires));
        true
    }

    /// Removes what has expired, as the database does by itself.
    pub(crate) fn sweep(&mut self) {
        let is_over =
            |number: &usize| self.current(*number).held.is_some() && !self.is_live(*number);
        let over: Vec<_> = (0..self.sessions()).filter(is_over).collect();
        self.remove_all(&over, None);
    }

    /// Drops the collection.
    pub(crate) fn drop_all(&mut self) {
        for number in 0..self.sessions() {
            if self.current(number).held.is_some() {
                self.becomes(number, None, None);
            }
        }
        let shard = self.oplog.tick_anywhere();
        self.oplog.log(shard, None);
    }

    /// A write to something else, which the log tells if it is to a session.
    pub(crate) fn another_write(&mut self, session: Option<SessionKey>) {
        let shard = self.oplog.tick_anywhere();
        if let Some(key) = session {
            self.oplog.log(shard, Some((key, None)));
        }
    }

    pub(crate) fn is_live(&self, number: usize) -> bool {
        let held = self.current(number).held.as_ref();
        held.is_some_and(|held| held.expires() > self.clock.wall())
    }

    /// What is true of a session now.
    pub(crate) fn version(&self, number: usize) -> Option<u64> {
        let held = self.current(number).held.as_ref();
        held.filter(|_| self.is_live(number)).map(|held| held.version)
    }

    /// The expiries with which touches of a session were acknowledged. Who sent them need not know
    /// by then what another store has made of the session's data.
    pub(crate) fn touched(&self, number: usize) -> impl Iterator<Item = &WallTime> {
        let its_own = move |(whose, _): &&(usize, WallTime)| *whose == number;
        self.touched.iter().filter(its_own).map(|(_, expires)| expires)
    }

    /// Whether a session was stored under this key at some time.
    pub(crate) fn has_held_anything(&self, number: usize) -> bool {
        self.histories[number].len() > 1
    }

    pub(crate) fn rank(&self, number: usize) -> usize {
        self.spans(number).last().map_or(0, |span| span.rank)
    }

    /// What was true last before a moment.
    pub(crate) fn rank_before(&self, number: usize, moment: Moment) -> usize {
        let before = self.spans(number).filter(|span| span.from < moment);
        before.last().map_or(0, |span| span.rank)
    }

    /// All that was true of a session, up to now.
    pub(crate) fn spans(&self, number: usize) -> impl Iterator<Item = Span<'_>> {
        let (states, now) = (&self.histories[number], self.clock.now());
        let spans = states.iter().enumerate().flat_map(move |(index, state)| {
            let next = states.get(index + 1);
            let (until, ended_by) = (next.map(|next| next.from), next.and_then(|next| next.by));
            let (rank, from, held) = (2 * index, state.from, state.held.as_ref());
            let expiry = held.map(|held| moment_of(held.expires()));
            let expires = expiry.filter(|at| until.is_none_or(|until| *at < until));
            let whole = Span { rank, held, from, until, ended_by };
            let (first, rest) = match expires {
                None => (whole, None),
                Some(at) => (
                    Span { until: Some(at), ended_by: None, ..whole },
                    Some(Span { rank: rank + 1, held: None, from: at, until, ended_by }),
                ),
            };
            [Some(first), rest].into_iter().flatten()
        });
        spans.filter(move |span| span.from <= now)
    }

    fn current(&self, number: usize) -> &State {
        self.histories[number].last().unwrap()
    }

    fn becomes(&mut self, number: usize, session: Option<&Session>, by: Option<usize>) {
        let held = session.map(|session| Held {
            version: crate::simulation::version(&session.data),
            expiries: vec![session.expires],
        });
        self.histories[number].push(State { from: self.clock.now(), held, by });
    }

    /// A change that streams report, in the newest entry of the oplog.
    fn change(
        &mut self,
        number: usize,
        rev: Option<Rev>,
        session: Option<&Session>,
        by: Option<usize>,
    ) {
        self.becomes(number, session, by);
        self.oplog.log(self.oplog.home(number), Some((self.keys[number], rev)));
    }
}

impl Held {
    pub(crate) fn expires(&self) -> WallTime {
        *self.expiries.last().unwrap()
    }
}

/// The moment of the steady clock at which a test's wall clock shows this.
fn moment_of(wall: WallTime) -> Moment {
    let since_the_start = u64::try_from(wall.millis() - 1_000_000_000_000).unwrap_or(0);
    Moment::from_nanos(3_600_000_000_000).after(Duration::from_millis(since_the_start))
}
