//! Types and constants that several files of the simulation share.
//!
//! A simulated session is one number, its *version*. Each save stores a new version. The owner of a session is
//! part of its version, so a save can change the owner. A request scope changes single keys: the version of a session
//! with other keys is a digest of all of them.

use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::time::Duration;

use serde_json::json;

use crate::invalidation::source::{Fault, Refusal};
use crate::session::Data;
use crate::session::id::SessionKey;
use crate::time::{Moment, WallTime};

/// A version whose data cannot be encoded, so its save fails before it is sent.
pub(crate) const UNSTORABLE: u64 = u64::MAX;
/// The bytes that each update counts towards the limit of a batch.
pub(crate) const UPDATE_BYTES: usize = 100;
/// The number of sessions on one page of a sign-out.
pub(crate) const PAGE: usize = 2;
const OWNERS: u64 = 2;

/// The byte limit of a batch that has room for `updates`.
pub(crate) const fn bytes_of(updates: usize) -> usize {
    updates * UPDATE_BYTES
}

pub(crate) fn data(version: u64) -> Data {
    Data::from([("version".to_owned(), json!(version))])
}

pub(crate) fn version(data: &Data) -> u64 {
    if data.len() == 1
        && let Some(version) = data.get("version")
    {
        return version.as_u64().unwrap();
    }
    let mut digest = DefaultHasher::new();
    let sorted: BTreeMap<_, _> = data.iter().map(|(key, value)| (key, value.as_i64())).collect();
    sorted.hash(&mut digest);
    // Other versions are small numbers, and `UNSTORABLE`.
    (digest.finish() | 1 << 62) & !(1 << 63)
}

pub(crate) fn owner_of(version: u64) -> u64 {
    version % OWNERS
}

/// The error with which the server refuses a change stream.
pub(crate) fn refused() -> Fault {
    Fault::Refused(Refusal::default())
}

/// Numbers of sessions, each with the oldest [rank](crate::simulation::database::Span::rank) that a load may
/// still return.
pub(crate) type Floors = Vec<(usize, usize)>;

/// A page of one owner's sessions, as the database finds it.
#[derive(Clone, Debug)]
pub(crate) struct OwnedPage {
    /// The number and the key of each session, and whether it is live.
    pub(crate) sessions: Vec<(usize, SessionKey, bool)>,
    /// What writes of the asking store have stored while their answers were still on the way.
    pub(crate) pending: Floors,
}

/// When an operation began.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Begun {
    /// Its place in the order of all events.
    pub(crate) step: u64,
    pub(crate) at: Moment,
    pub(crate) wall: WallTime,
}

/// How a call ended, as its store sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// The store dropped the call.
    Abandoned,
    Answered,
    Failed {
        outage: bool,
    },
    /// The store did not send the call.
    NotSent,
    /// The database is overloaded and carried nothing out.
    Rejected,
}

/// What a store promises about the age of what it serves.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Promise {
    pub(crate) max_staleness: Duration,
    pub(crate) grace: Duration,
    pub(crate) exclusive: bool,
}

/// `FaultConfig`: how the network and the database behave during one walk.
///
/// The `f64` fields are probabilities.
#[derive(Clone, Debug, Default)]
#[allow(clippy::struct_excessive_bools, reason = "the faults are independent of each other")]
pub(crate) struct FaultConfig {
    /// A future that can go on lets other futures run first.
    pub(crate) laziness: f64,
    /// A call is carried out and answered without any wait.
    pub(crate) immediate: f64,
    /// A call takes up to `longest` in one direction.
    pub(crate) slow: f64,
    pub(crate) longest: Duration,
    pub(crate) timeout: Duration,
    /// The database never carries out a call that its store has abandoned.
    pub(crate) drops_abandoned_calls: bool,
    /// How long a `getMore` waits for changes once all calls are answered at once.
    pub(crate) poll_interval: Duration,
    /// The database has change streams.
    pub(crate) streams: bool,
    /// Resume tokens contain a time, as MongoDB's do.
    pub(crate) tokens_have_times: bool,
    /// The number of shards. With more than one, the database is behind a router.
    pub(crate) shards: usize,
    /// Each `getMore` finds a new change of this session, so the stream never pauses.
    pub(crate) busy_stream: Option<SessionKey>,
    /// An unrelated write comes before the answer to a question for the primary's time.
    pub(crate) unrelated_writes: f64,
    /// Changes that are made together share one entry of the oplog.
    pub(crate) bulk_writes: f64,
    /// A batch of the stream has at most one change, although more are there.
    pub(crate) small_batches: f64,
    /// All faults are over: every call is answered at once. See [recovery](crate::simulation::recovery).
    pub(crate) recovered: bool,
}
