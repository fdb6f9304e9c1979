//! The sessions of a run, and their data, which shows the writer to each reader.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use serde_json::{Value, json};
use time::{Duration, OffsetDateTime};
use tower_sessions::session::{Id, Record};
use tower_sessions_moka_mongodb_store::StoredSession;

use crate::history::{Event, Nanos, Seen, State};
use crate::shared::{self, Contents};

/// One session, alive or not, and its whole history.
pub(crate) struct Session {
    /// Tells sessions apart in texts that may not show an id.
    pub(crate) number: u64,
    pub(crate) id: Id,
    /// The state of the latest write. The task that writes holds the lock.
    pub(crate) turn: tokio::sync::Mutex<State>,
    /// From this time on, only a delete may write.
    pub(crate) ends: Nanos,
    /// Whether the session is deleted then.
    pub(crate) mortal: bool,
    /// The step at which the present version was written.
    pub(crate) version_since: AtomicU32,
    /// The outcome of a write is unknown, so no further writes follow.
    pub(crate) undecided: AtomicBool,
    /// When a delete was acknowledged. 0 before that.
    pub(crate) deleted: AtomicU64,
    history: Mutex<Vec<Event>>,
}

impl Session {
    pub(crate) fn new(number: u64, id: Id, ends: Nanos, mortal: bool, created: Event) -> Self {
        Self {
            number,
            id,
            turn: tokio::sync::Mutex::new(first_state(created.instance)),
            ends,
            mortal,
            version_since: AtomicU32::new(first_state(created.instance).step),
            undecided: AtomicBool::new(false),
            deleted: AtomicU64::new(0),
            history: Mutex::new(vec![created]),
        }
    }

    pub(crate) fn note(&self, event: Event) {
        self.history().push(event);
    }

    pub(crate) fn history(&self) -> MutexGuard<'_, Vec<Event>> {
        self.history.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn deleted(&self) -> Option<Nanos> {
        Some(self.deleted.load(Ordering::SeqCst)).filter(|at| *at > 0)
    }
}

/// The state that a create by this instance leaves.
pub(crate) fn first_state(writer: u8) -> State {
    State { step: 1, version: 1, writer }
}

/// Turns states into records and back. The data contains session, version and writer, the expiry
/// contains the step.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Script {
    expiry: OffsetDateTime,
}

impl Script {
    pub(crate) fn start() -> Self {
        let now = OffsetDateTime::now_utc().replace_nanosecond(0);
        // Nothing expires in any run.
        Self { expiry: now.unwrap_or(OffsetDateTime::UNIX_EPOCH) + Duration::days(30) }
    }

    pub(crate) fn record(&self, number: u64, id: Id, state: State) -> Record {
        let expiry_date = self.expiry + Duration::seconds(i64::from(state.step));
        Record { id, data: data(number, state), expiry_date }
    }

    /// The record of a shared session.
    pub(crate) fn shared_record(&self, number: u64, id: Id, contents: &Contents) -> Record {
        let after = Duration::seconds(i64::try_from(contents.expires).unwrap_or(i64::MAX / 2));
        Record { id, data: contents.data(number), expiry_date: self.expiry + after }
    }

    /// What a load of a shared session has found.
    pub(crate) fn shared_seen(&self, number: u64, id: Id, record: &Record) -> shared::Seen {
        let contents = self.contents(number, &record.data, record.expiry_date);
        let contents = contents.filter(|_| record.id == id);
        contents.map_or(shared::Seen::Foreign, shared::Seen::Contents)
    }

    /// What the document of a shared session has.
    pub(crate) fn shared_stored(&self, number: u64, document: &StoredSession) -> shared::Seen {
        let contents = document.data().ok().zip(expiry(document));
        let contents = contents.and_then(|(data, expiry)| self.contents(number, &data, expiry));
        contents.map_or(shared::Seen::Foreign, shared::Seen::Contents)
    }

    fn contents(
        &self,
        number: u64,
        data: &HashMap<String, Value>,
        expiry: OffsetDateTime,
    ) -> Option<Contents> {
        let expires = u64::try_from((expiry - self.expiry).whole_seconds()).ok()?;
        Contents::read(number, data, expires)
    }

    /// The state in a record that was loaded as this session.
    pub(crate) fn seen(&self, number: u64, id: Id, record: &Record) -> Seen {
        let whole = |name| record.data.get(name).and_then(Value::as_u64);
        let state = self.state(whole("version"), whole("writer"), record.expiry_date);
        match state {
            Some(state) if record.id == id && record.data == data(number, state) => {
                Seen::State(state)
            }
            _ => Seen::Foreign,
        }
    }

    /// The state in a document of the collection.
    pub(crate) fn stored(&self, number: u64, document: &StoredSession) -> Seen {
        let stored = || {
            let stored = document.data().ok()?;
            let whole = |name| stored.get(name).and_then(Value::as_u64);
            let state = self.state(whole("version"), whole("writer"), expiry(document)?)?;
            (stored == data(number, state)).then_some(state)
        };
        stored().map_or(Seen::Foreign, Seen::State)
    }

    fn state(
        &self,
        version: Option<u64>,
        writer: Option<u64>,
        expiry: OffsetDateTime,
    ) -> Option<State> {
        let after = expiry - self.expiry;
        let step = u32::try_from(after.whole_seconds()).ok().filter(|step| *step > 0)?;
        if after.subsec_nanoseconds() != 0 {
            return None;
        }
        let version = u32::try_from(version?).ok()?;
        let writer = u8::try_from(writer?).ok()?;
        Some(State { step, version, writer })
    }
}

fn expiry(document: &StoredSession) -> Option<OffsetDateTime> {
    let nanos = i128::from(document.expires.timestamp_millis()) * 1_000_000;
    OffsetDateTime::from_unix_timestamp_nanos(nanos).ok()
}

/// All data follows from the number and the state, so a mixture of two states is detected.
fn data(number: u64, state: State) -> HashMap<String, Value> {
    let State { version, writer, .. } = state;
    let length = 8 + usize::try_from(version % 23).unwrap_or(0) * 16;
    let fill = char::from(b'a' + u8::try_from((number + u64::from(version)) % 26).unwrap_or(0));
    let fields = [
        ("session", json!(number)),
        ("version", json!(version)),
        ("writer", json!(writer)),
        ("fill", json!(String::from(fill).repeat(length))),
    ];
    fields.into_iter().map(|(name, value)| (name.to_owned(), value)).collect()
}
