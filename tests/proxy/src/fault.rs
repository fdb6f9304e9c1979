//! Errors that a MongoDB server sends, and how a proxy injects them.

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use bson::{Document, doc};
use tokio::sync::watch;

use crate::message::number;

/// An error of the server: a code with its name, and the labels by which drivers classify it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServerError {
    code: i32,
    name: String,
    /// `None`: the labels that MongoDB sets for the code and the command.
    labels: Option<Vec<String>>,
}

impl ServerError {
    /// The error with this code, with the name and the labels that MongoDB gives it.
    ///
    /// The names are those of
    /// [error_codes.yml](https://github.com/mongodb/mongo/blob/master/src/mongo/base/error_codes.yml).
    #[must_use]
    pub fn new(code: i32) -> Self {
        let name = NAMES.iter().find(|(known, _)| *known == code);
        let name = name.map_or_else(|| format!("Location{code}"), |(_, name)| (*name).to_owned());
        Self { code, name, labels: None }
    }

    /// Sets exactly these labels.
    #[must_use]
    pub fn with_labels<'a>(mut self, labels: impl IntoIterator<Item = &'a str>) -> Self {
        self.labels = Some(labels.into_iter().map(str::to_owned).collect());
        self
    }

    /// Sets another name than MongoDB's.
    #[must_use]
    pub fn with_name(mut self, name: &str) -> Self {
        name.clone_into(&mut self.name);
        self
    }

    /// The reply that refuses `command`.
    pub(crate) fn reply(&self, command: &Document) -> Document {
        let mut reply = doc! {
            "ok": 0.0,
            "errmsg": format!("{} (put in by a test)", self.name),
            "code": self.code,
            "codeName": &self.name,
        };
        let labels = self.labels.clone().unwrap_or_else(|| {
            labels_of(self.code, command).into_iter().map(str::to_owned).collect()
        });
        if !labels.is_empty() {
            reply.insert("errorLabels", labels);
        }
        reply
    }

    /// The reply that refuses each of a command's `statements`.
    fn write_errors(&self, command: &Document, statements: usize) -> Document {
        let refuse = |index| doc! { "index": index, "code": self.code, "errmsg": &self.name };
        // An ordered command ends with its first error.
        let ordered = command.get_bool("ordered").unwrap_or(true);
        let count = i32::try_from(statements).unwrap_or(i32::MAX);
        let errors = (0..if ordered { count.min(1) } else { count }).map(refuse);
        let mut reply = doc! { "n": 0, "writeErrors": errors.collect::<Vec<_>>(), "ok": 1.0 };
        if command.contains_key("update") {
            reply.insert("nModified", 0);
        }
        reply
    }

    /// The server's own `reply`, with a write concern that was not satisfied.
    fn write_concern(&self, command: &Document, mut reply: Document) -> Document {
        let error = self.reply(command);
        reply.insert(
            "writeConcernError",
            doc! { "code": self.code, "codeName": &self.name, "errmsg": &self.name },
        );
        if let Some(labels) = error.get("errorLabels") {
            reply.insert("errorLabels", labels);
        }
        reply
    }
}

const NAMES: [(i32, &str); 37] = [
    (1, "InternalError"),
    (6, "HostUnreachable"),
    (7, "HostNotFound"),
    (8, "UnknownError"),
    (13, "Unauthorized"),
    (18, "AuthenticationFailed"),
    (20, "IllegalOperation"),
    (43, "CursorNotFound"),
    (50, "MaxTimeMSExpired"),
    (64, "WriteConcernTimeout"),
    (72, "InvalidOptions"),
    (73, "InvalidNamespace"),
    (89, "NetworkTimeout"),
    (91, "ShutdownInProgress"),
    (112, "WriteConflict"),
    (115, "CommandNotSupported"),
    (133, "FailedToSatisfyReadPreference"),
    (134, "ReadConcernMajorityNotAvailableYet"),
    (136, "CappedPositionLost"),
    (175, "QueryPlanKilled"),
    (189, "PrimarySteppedDown"),
    (202, "NetworkInterfaceExceededTimeLimit"),
    (234, "RetryChangeStream"),
    (262, "ExceededTimeLimit"),
    (280, "ChangeStreamFatalError"),
    (286, "ChangeStreamHistoryLost"),
    (433, "AdmissionQueueOverflow"),
    (449, "RateLimitExceeded"),
    (450, "PooledConnectionAcquisitionRejected"),
    (462, "IngressRequestRateLimitExceeded"),
    (9001, "SocketException"),
    (10107, "NotWritablePrimary"),
    (11600, "InterruptedAtShutdown"),
    (11602, "InterruptedDueToReplStateChange"),
    (13388, "StaleConfig"),
    (13435, "NotPrimaryNoSecondaryOk"),
    (13436, "NotPrimaryOrSecondary"),
];

/// The codes of an overloaded server.
const OVERLOADED: [i32; 4] = [433, 449, 450, 462];
/// The codes after which a write may be sent again.
const RETRYABLE: [i32; 12] = [6, 7, 89, 91, 189, 262, 9001, 10107, 11600, 11602, 13435, 13436];
/// The codes after which a change stream resumes from its token: the categories `RetriableError`,
/// `NetworkError` and `NeedRetargettingError`, and the errors of a cursor after a step-down.
const RESUMABLE: [i32; 23] = [
    6, 7, 63, 89, 91, 133, 134, 150, 175, 189, 234, 262, 402, 406, 407, 412, 9001, 10107, 11600,
    11602, 13388, 13435, 13436,
];

/// The labels that MongoDB sets, as in
/// [error_labels.cpp](https://github.com/mongodb/mongo/blob/master/src/mongo/db/error_labels.cpp)
/// and in the
/// [specification of overload](https://github.com/mongodb/specifications/blob/master/source/client-backpressure/client-backpressure.md).
fn labels_of(code: i32, command: &Document) -> Vec<&'static str> {
    if OVERLOADED.contains(&code) {
        return vec!["SystemOverloadedError", "RetryableError"];
    }
    let mut labels = Vec::new();
    if RETRYABLE.contains(&code) && command.contains_key("txnNumber") {
        labels.push("RetryableWriteError");
    }
    if RESUMABLE.contains(&code) && is_of_a_change_stream(command) {
        labels.push("ResumableChangeStreamError");
    }
    labels
}

pub(crate) fn is_of_a_change_stream(command: &Document) -> bool {
    if command.contains_key("getMore") {
        // `getMore` accepts a time limit only for a cursor that waits for data.
        return command.contains_key("maxTimeMS");
    }
    let first = command.get_array("pipeline").ok().and_then(|stages| stages.first());
    first.and_then(|stage| stage.as_document()).is_some_and(|it| it.contains_key("$changeStream"))
}

/// What happens to a command that is not simply answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Injection {
    /// The server refuses the command and does not carry it out.
    Refuse(ServerError),
    /// The server carries the command out, and an error comes instead of the reply.
    RefuseAfterwards(ServerError),
    /// The server refuses the statements of a write, and carries none out.
    WriteErrors(ServerError),
    /// The server carries a write out, and its write concern is not satisfied.
    WriteConcern(ServerError),
}

impl Injection {
    /// The reply, if the server does not receive the command at all.
    pub(crate) fn instead(&self, command: &Document, statements: usize) -> Option<Document> {
        match self {
            Self::Refuse(error) => Some(error.reply(command)),
            Self::WriteErrors(error) => Some(error.write_errors(command, statements)),
            Self::RefuseAfterwards(_) | Self::WriteConcern(_) => None,
        }
    }

    /// The reply that the client gets instead of the server's own reply.
    pub(crate) fn afterwards(&self, command: &Document, reply: Document) -> Document {
        match self {
            Self::RefuseAfterwards(error) => error.reply(command),
            Self::WriteConcern(error) if number(reply.get("ok")) == Some(1) => {
                error.write_concern(command, reply)
            }
            _ => reply,
        }
    }
}

/// The commands to which an [`Injection`] applies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Commands {
    /// All commands of an application, but not those that keep the connections: `hello`, log-ins,
    /// the end of sessions. A real server answers those even if it is overloaded.
    All,
    /// The commands of these names.
    Named(Vec<&'static str>),
}

impl From<&'static str> for Commands {
    fn from(name: &'static str) -> Self {
        Self::Named(vec![name])
    }
}

impl From<&[&'static str]> for Commands {
    fn from(names: &[&'static str]) -> Self {
        Self::Named(names.to_vec())
    }
}

impl Commands {
    fn has(&self, name: &str) -> bool {
        const OF_CONNECTIONS: [&str; 7] = [
            "hello",
            "isMaster",
            "ismaster",
            "saslStart",
            "saslContinue",
            "authenticate",
            "endSessions",
        ];

        match self {
            Self::All => !OF_CONNECTIONS.contains(&name),
            Self::Named(names) => names.contains(&name),
        }
    }
}

/// How long an [`Injection`] lasts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lasts {
    /// For this number of commands.
    Times(u32),
    /// For this time.
    For(Duration),
    /// Until it is [stopped](Injected::stop).
    UntilStopped,
}

/// An injection that is active, or has ended.
#[derive(Debug)]
pub(crate) struct Active {
    commands: Commands,
    injection: Injection,
    left: AtomicU32,
    until: Option<Instant>,
    hits: watch::Sender<u32>,
}

impl Active {
    pub(crate) fn new(commands: Commands, injection: Injection, lasts: Lasts) -> Self {
        let left = if let Lasts::Times(times) = lasts { times } else { u32::MAX };
        let until =
            if let Lasts::For(time) = lasts { Instant::now().checked_add(time) } else { None };
        let hits = watch::Sender::new(0);
        Self { commands, injection, left: AtomicU32::new(left), until, hits }
    }

    pub(crate) fn has_ended(&self) -> bool {
        self.left.load(Ordering::SeqCst) == 0
            || self.until.is_some_and(|until| Instant::now() >= until)
    }

    /// The injection, if it applies to this command.
    pub(crate) fn hits(&self, command: &str) -> Option<&Injection> {
        if self.has_ended() || !self.commands.has(command) {
            return None;
        }
        let one_less = |left: u32| left.checked_sub(1);
        self.left.fetch_update(Ordering::SeqCst, Ordering::SeqCst, one_less).ok()?;
        self.hits.send_modify(|hits| *hits += 1);
        Some(&self.injection)
    }
}

/// The test's handle of an injection. If it is dropped, the injection stays active.
#[derive(Debug)]
pub struct Injected(pub(crate) std::sync::Arc<Active>);

impl Injected {
    /// The number of commands that it was applied to.
    #[must_use]
    pub fn count(&self) -> u32 {
        *self.0.hits.borrow()
    }

    /// Waits until it was applied to `count` commands.
    ///
    /// # Panics
    ///
    /// If that takes more than a minute.
    pub async fn reached(&self, count: u32) {
        let mut hits = self.0.hits.subscribe();
        let reached = tokio::time::timeout(crate::PATIENCE, hits.wait_for(|hits| *hits >= count));
        let found = reached.await.map(drop);
        assert!(found.is_ok(), "it hit {} commands and not {count}", self.count());
    }

    /// Ends the injection.
    pub fn stop(&self) {
        self.0.left.store(0, Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_have_the_labels_that_mongodb_sets() {
        let get_more = doc! { "getMore": 1_i64, "maxTimeMS": 500 };
        let stream = doc! { "aggregate": "sessions", "pipeline": [{ "$changeStream": {} }] };
        let list = doc! { "aggregate": "sessions", "pipeline": [{ "$match": {} }] };
        let write = doc! { "insert": "sessions", "txnNumber": 1_i64 };
        let batch = doc! { "update": "sessions" };
        let overload = ["SystemOverloadedError", "RetryableError"];
        let resumable = ["ResumableChangeStreamError"];
        let cases: [(i32, &Document, &[&str]); 12] = [
            (462, &get_more, &overload),
            (433, &batch, &overload),
            (175, &get_more, &resumable),
            (10107, &get_more, &resumable),
            (134, &stream, &resumable),
            (11600, &list, &[]),
            (11600, &write, &["RetryableWriteError"]),
            (91, &batch, &[]),
            (43, &get_more, &[]),
            (286, &get_more, &[]),
            (13, &stream, &[]),
            (134, &doc! { "find": "sessions" }, &[]),
        ];
        for (code, command, labels) in cases {
            let reply = ServerError::new(code).reply(command);
            let found = reply.get_array("errorLabels").cloned().unwrap_or_default();
            let found: Vec<_> = found.iter().filter_map(|label| label.as_str()).collect();
            assert_eq!(found, labels, "{code} {command}");
        }
        let bare = ServerError::new(462).with_labels([]).reply(&batch);
        assert!(!bare.contains_key("errorLabels"));
        assert_eq!(bare.get_str("codeName").unwrap(), "IngressRequestRateLimitExceeded");
    }

    #[test]
    fn write_is_refused_as_a_whole_by_statement_or_by_its_concern() {
        let error = ServerError::new(91);
        let command = doc! { "update": "sessions", "ordered": false };
        let refused = Injection::WriteErrors(error.clone()).instead(&command, 2).unwrap();
        let wanted = doc! {
            "n": 0,
            "writeErrors": [
                { "index": 0, "code": 91, "errmsg": "ShutdownInProgress" },
                { "index": 1, "code": 91, "errmsg": "ShutdownInProgress" },
            ],
            "ok": 1.0,
            "nModified": 0,
        };
        assert_eq!(refused, wanted);
        let done = Injection::WriteConcern(error.clone());
        assert_eq!(done.instead(&command, 2), None, "the server gets it");
        let reply = done.afterwards(&command, doc! { "n": 2, "ok": 1.0 });
        assert_eq!(reply.get_i32("n").unwrap(), 2);
        let concern = reply.get_document("writeConcernError").unwrap();
        assert_eq!(concern.get_i32("code").unwrap(), 91);
        let lost = Injection::RefuseAfterwards(error);
        assert_eq!(lost.instead(&command, 2), None, "the server gets it");
        let reply = lost.afterwards(&command, doc! { "n": 2, "ok": 1.0 });
        assert_eq!(number(reply.get("ok")), Some(0));
        assert_eq!(reply.get_i32("code").unwrap(), 91);
    }

    #[test]
    fn injection_ends_after_its_count_or_when_stopped() {
        let refuse = || Injection::Refuse(ServerError::new(91));
        let twice = Active::new("find".into(), refuse(), Lasts::Times(2));
        assert!(twice.hits("insert").is_none());
        assert!(twice.hits("find").is_some() && twice.hits("find").is_some());
        assert!(twice.hits("find").is_none() && twice.has_ended());
        let over = Active::new(Commands::All, refuse(), Lasts::For(Duration::ZERO));
        assert!(over.hits("find").is_none());
        let on = Injected(Active::new(Commands::All, refuse(), Lasts::UntilStopped).into());
        assert!(on.0.hits("find").is_some() && on.0.hits("hello").is_none());
        assert_eq!(on.count(), 1);
        on.stop();
        assert!(on.0.hits("find").is_none());
    }
}
