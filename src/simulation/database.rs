//! `Database`: the simulated MongoDB, with the history of each session.
//!
//! The history is what the [`Oracle`](crate::simulation::oracle::Oracle) judges answers by. It has every state of a
//! session since the start of the walk, and the call that caused it.

use std::collections::HashMap;
use std::time::Duration;

use crate::batching::{Condition, Updated};
use crate::session::id::SessionKey;
use crate::session::revision::{Rev, RevSource};
use crate::session::{Data, Session};
use crate::simulation::operation::Update;
use crate::simulation::oplog::Oplog;
use crate::simulation::types::{self, Floors, PAGE, owner_of, version};
use crate::time::{Clock, Moment, WallTime};

/// Keys are random, so traces and the oracle use numbers: sessions are numbered in the order of their first use.
pub(crate) struct Database {
    clock: Clock,
    numbers: HashMap<SessionKey, usize>,
    keys: Vec<SessionKey>,
    histories: Vec<Vec<State>>,
    /// The data of each version that is a digest.
    data: HashMap<u64, Data>,
    /// The expiries of all touches, also of those that did not prolong their session.
    touched: Vec<(usize, WallTime)>,
    pub(crate) oplog: Oplog,
    /// Changes that are made together share one entry of the oplog.
    pub(crate) is_bulk: bool,
    steps: u64,
    /// For the changes of other instances.
    revs: RevSource,
}

/// A state of a session, which lasts until the next one begins.
pub(crate) struct State {
    from: Moment,
    /// `None`: the session does not exist.
    doc: Option<StoredDoc>,
    /// The store's call that caused the state. `None`: another instance did.
    by: Option<usize>,
}

/// A stored session.
pub(crate) struct StoredDoc {
    pub(crate) version: u64,
    pub(crate) data: Data,
    pub(crate) rev: Rev,
    pub(crate) created: Option<WallTime>,
    /// All expiries that touches have given this version. The last one is the current one.
    pub(crate) expiries: Vec<WallTime>,
}

/// A span of time in which a load that reads the database returns one version, or nothing.
pub(crate) struct Span<'a> {
    /// Grows with each change. An odd rank means that the session has expired.
    pub(crate) rank: usize,
    pub(crate) doc: Option<&'a StoredDoc>,
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
            data: HashMap::new(),
            touched: Vec::new(),
            oplog: Oplog::new(shards),
            is_bulk: false,
            steps: 0,
            revs: RevSource::new(),
        }
    }

    pub(crate) fn now(&self) -> Moment {
        self.clock.now()
    }

    /// The position of a new event in the order of all events.
    pub(crate) fn step(&mut self) -> u64 {
        self.steps += 1;
        self.steps
    }

    pub(crate) fn number(&mut self, key: SessionKey) -> usize {
        let Self { numbers, keys, histories, .. } = self;
        *numbers.entry(key).or_insert_with(|| {
            keys.push(key);
            histories.push(vec![State { from: Moment::from_nanos(0), doc: None, by: None }]);
            keys.len() - 1
        })
    }

    pub(crate) fn sessions(&self) -> usize {
        self.keys.len()
    }

    /// Stores a new session. Returns `false` if a session exists under this key, even an expired one.
    pub(crate) fn insert(&mut self, key: SessionKey, session: &Session, by: Option<usize>) -> bool {
        let number = self.number(key);
        if self.current(number).doc.is_some() {
            return false;
        }
        self.oplog.tick(self.oplog.home(number));
        self.push_state(number, session.rev, Some(session), by);
        true
    }

    pub(crate) fn replace(
        &mut self,
        key: SessionKey,
        rev: Option<Rev>,
        session: &Session,
        by: Option<usize>,
    ) -> bool {
        let updated = self.replace_if(key, Update::default(), rev, session, by);
        matches!(updated, Updated::Stored(_))
    }

    pub(crate) fn replace_if(
        &mut self,
        key: SessionKey,
        update: Update,
        rev: Option<Rev>,
        session: &Session,
        by: Option<usize>,
    ) -> Updated {
        let number = self.number(key);
        let Some(doc) = &self.current(number).doc else { return Updated::Gone };
        let is_live = self.is_live(number);
        match update.condition {
            Condition::HasRev(expected) if expected != Some(doc.rev) || !is_live => {
                return Updated::Changed;
            }
            Condition::IsLive if !is_live => return Updated::Gone,
            _ => {}
        }
        let earlier = doc.expires();
        self.oplog.tick(self.oplog.home(number));
        self.change(number, rev, Some(session), by);
        if update.keeps_later && earlier > session.expires {
            // The store knows only of the expiry that it has sent.
            let state = self.histories[number].last_mut().unwrap();
            state.doc.as_mut().unwrap().expiries.push(earlier);
        }
        Updated::Stored(session.expires)
    }

    pub(crate) fn find(&mut self, key: SessionKey) -> Option<Session> {
        let number = self.number(key);
        let live = self.is_live(number);
        let doc = self.current(number).doc.as_ref().filter(|_| live)?;
        let data = doc.data.clone();
        Some(Session { data, expires: doc.expires(), rev: Some(doc.rev), created: doc.created })
    }

    pub(crate) fn remove(&mut self, key: SessionKey, by: Option<usize>) {
        let number = self.number(key);
        if self.current(number).doc.is_some() {
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

    /// Replaces these sessions in one transaction, those that are live.
    pub(crate) fn replace_in_transaction(&mut self, sessions: &[(SessionKey, Session)]) {
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

    /// Begins the one entry of a bulk write, on each shard that it changes.
    fn tick_for_all(&mut self, numbers: &[usize]) {
        for shard in 0..self.oplog.shards() {
            let concerns = |number: &usize| self.oplog.home(*number) == shard;
            if self.is_bulk && numbers.iter().any(concerns) {
                self.oplog.tick(shard);
            }
        }
    }

    /// Removes all sessions. Returns how many.
    pub(crate) fn clear(&mut self, by: Option<usize>) -> u64 {
        let exists = |number: &usize| self.current(*number).doc.is_some();
        let existing: Vec<_> = (0..self.sessions()).filter(exists).collect();
        self.remove_all(&existing, by);
        existing.len() as u64
    }

    /// The page of an owner's sessions that comes after the session of this number, and whether each is live.
    pub(crate) fn owned(&self, owner: u64, after: Option<usize>) -> Vec<(usize, SessionKey, bool)> {
        let first = after.map_or(0, |after| after + 1);
        let numbers = (first..self.sessions()).filter(|number| self.is_of(*number, owner));
        let found = numbers.map(|number| (number, self.keys[number], self.is_live(number)));
        found.take(PAGE).collect()
    }

    /// Removes these sessions, if they belong to this owner. Returns how many.
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
        let doc = self.current(number).doc.as_ref();
        doc.is_some_and(|doc| owner_of(doc.version) == owner)
    }

    /// The current rank of each of these sessions.
    pub(crate) fn ranks(&mut self, keys: &[SessionKey]) -> Floors {
        let numbers: Vec<_> = keys.iter().map(|key| self.number(*key)).collect();
        numbers.into_iter().map(|number| (number, self.rank(number))).collect()
    }

    /// The latest rank of a session that one of these calls caused.
    pub(crate) fn rank_by(&self, number: usize, by: impl Fn(usize) -> bool) -> Option<usize> {
        let mut states = self.histories[number].iter();
        states.rposition(|state| state.by.is_some_and(&by)).map(|index| 2 * index)
    }

    /// Prolongs a live session. Streams do not report that. Returns `false` if no such session is live.
    pub(crate) fn touch(&mut self, key: SessionKey, expires: WallTime) -> bool {
        let number = self.number(key);
        if !self.is_live(number) {
            return false;
        }
        self.oplog.tick(self.oplog.home(number));
        let state = self.histories[number].last_mut().unwrap();
        let doc = state.doc.as_mut().unwrap();
        if doc.expires() < expires {
            doc.expiries.push(expires);
        }
        self.touched.push((number, expires));
        true
    }

    /// Removes the expired sessions, as MongoDB's TTL index does.
    pub(crate) fn sweep(&mut self) {
        let is_over =
            |number: &usize| self.current(*number).doc.is_some() && !self.is_live(*number);
        let over: Vec<_> = (0..self.sessions()).filter(is_over).collect();
        self.remove_all(&over, None);
    }

    /// Drops the collection.
    pub(crate) fn drop_collection(&mut self) {
        for number in 0..self.sessions() {
            if self.current(number).doc.is_some() {
                self.push_state(number, None, None, None);
            }
        }
        let shard = self.oplog.tick_anywhere();
        self.oplog.log(shard, None);
    }

    /// A write of another client. Streams report it if it is to a session, though no simulated session changes.
    pub(crate) fn write_elsewhere(&mut self, session: Option<SessionKey>) {
        let shard = self.oplog.tick_anywhere();
        if let Some(key) = session {
            self.oplog.log(shard, Some((key, None)));
        }
    }

    pub(crate) fn is_live(&self, number: usize) -> bool {
        let doc = self.current(number).doc.as_ref();
        doc.is_some_and(|doc| doc.expires() > self.clock.wall())
    }

    /// The current version of a session. `None` if it does not exist or has expired.
    pub(crate) fn version(&self, number: usize) -> Option<u64> {
        let doc = self.current(number).doc.as_ref();
        doc.filter(|_| self.is_live(number)).map(|doc| doc.version)
    }

    /// The data of a version.
    pub(crate) fn data_of(&self, version: u64) -> Data {
        self.data.get(&version).cloned().unwrap_or_else(|| types::data(version))
    }

    /// The expiries with which touches of a session were acknowledged. A store may return such an expiry together
    /// with older data: a touch does not read the data that another store has saved meanwhile.
    pub(crate) fn touched(&self, number: usize) -> impl Iterator<Item = &WallTime> {
        let its_own = move |(whose, _): &&(usize, WallTime)| *whose == number;
        self.touched.iter().filter(its_own).map(|(_, expires)| expires)
    }

    /// Whether a session was stored under this key at some time.
    pub(crate) fn was_ever_stored(&self, number: usize) -> bool {
        self.histories[number].len() > 1
    }

    pub(crate) fn rank(&self, number: usize) -> usize {
        self.spans(number).last().map_or(0, |span| span.rank)
    }

    /// The rank of a session right before a moment.
    pub(crate) fn rank_before(&self, number: usize, moment: Moment) -> usize {
        let before = self.spans(number).filter(|span| span.from < moment);
        before.last().map_or(0, |span| span.rank)
    }

    /// The history of a session up to now, oldest first.
    pub(crate) fn spans(&self, number: usize) -> impl Iterator<Item = Span<'_>> {
        let states = &self.histories[number];
        let now = self.clock.now();
        let spans = states.iter().enumerate().flat_map(move |(index, state)| {
            let next = states.get(index + 1);
            let until = next.map(|next| next.from);
            let ended_by = next.and_then(|next| next.by);
            let rank = 2 * index;
            let from = state.from;
            let doc = state.doc.as_ref();
            let expiry = doc.map(|doc| moment_of(doc.expires()));
            let expires = expiry.filter(|at| until.is_none_or(|until| *at < until));
            let whole = Span { rank, doc, from, until, ended_by };
            let (first, rest) = match expires {
                None => (whole, None),
                Some(at) => (
                    Span { until: Some(at), ended_by: None, ..whole },
                    Some(Span { rank: rank + 1, doc: None, from: at, until, ended_by }),
                ),
            };
            [Some(first), rest].into_iter().flatten()
        });
        spans.filter(move |span| span.from <= now)
    }

    fn current(&self, number: usize) -> &State {
        self.histories[number].last().unwrap()
    }

    fn push_state(
        &mut self,
        number: usize,
        rev: Option<Rev>,
        session: Option<&Session>,
        by: Option<usize>,
    ) {
        let earlier = self.current(number).doc.as_ref().and_then(|doc| doc.created);
        let now = self.clock.wall();
        let doc = session.map(|session| StoredDoc {
            version: version(&session.data),
            data: session.data.clone(),
            rev: rev.unwrap_or_else(|| self.revs.next()),
            created: earlier.or(session.created).or(Some(now)),
            expiries: vec![session.expires],
        });
        if let Some(doc) = doc.as_ref().filter(|doc| doc.data.len() > 1) {
            self.data.entry(doc.version).or_insert_with(|| doc.data.clone());
        }
        self.histories[number].push(State { from: self.clock.now(), doc, by });
    }

    /// Changes a session and logs that in the newest entry of the oplog.
    fn change(
        &mut self,
        number: usize,
        rev: Option<Rev>,
        session: Option<&Session>,
        by: Option<usize>,
    ) {
        self.push_state(number, rev, session, by);
        self.oplog.log(self.oplog.home(number), Some((self.keys[number], rev)));
    }
}

impl StoredDoc {
    pub(crate) fn expires(&self) -> WallTime {
        *self.expiries.last().unwrap()
    }
}

/// The moment of the steady clock at which the wall clock of a test shows this time.
fn moment_of(wall: WallTime) -> Moment {
    let since_the_start = u64::try_from(wall.millis() - 1_000_000_000_000).unwrap_or(0);
    Moment::from_nanos(3_600_000_000_000).after(Duration::from_millis(since_the_start))
}
