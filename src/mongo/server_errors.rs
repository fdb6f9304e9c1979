//! The meaning of each error of the server. Streams, reads, writes, the statements of a batch and `build` all use
//! this table, so they judge the same error in the same way.
//!
//! A label counts more than a code: MongoDB labels errors by category, so a label also covers codes that are newer
//! than this table.

use mongodb::error::{ErrorKind as Driver, RESUMABLE_CHANGE_STREAM_ERROR, RETRYABLE_ERROR};
use mongodb::error::{SYSTEM_OVERLOADED_ERROR, WriteFailure};

use crate::error::ErrorKind;
use crate::invalidation::source::{Fault, Refusal};
use crate::mongo::error::{code, code_name};

/// The meaning of an error of the server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Meaning {
    /// The server is overloaded and rejects calls.
    Overloaded,
    /// An election or a shutdown: no primary takes this call.
    NoPrimary,
    /// A router or a member does not reach the others.
    Unreachable,
    /// The server's own time limit has ended the call.
    TimeLimit,
    /// Something else on the server ended this call or its cursor. The same call may succeed if it is sent again.
    Interrupted,
    /// The user name, the password or the mechanism is wrong.
    Authentication,
    /// The user lacks the right to do this.
    Permission,
    /// A change stream cannot resume from its position.
    HistoryLost,
    /// For a change stream: the server has no change streams. For any other call: the call is refused.
    NoChangeStreams,
    /// The server does not know the command or the stage.
    UnknownCommand,
    /// The server does not support the command, or something in it.
    Unsupported,
    /// A document with the same key exists.
    DuplicateKey,
    /// The update would change a field that cannot change. The store sends such an update on purpose: see
    /// [`replace_update`](crate::mongo::schema::replace_update).
    ImmutableField,
    /// The collection does not exist.
    MissingNamespace,
    /// An index with the same name or the same keys exists, with other options.
    IndexConflict,
    /// Atlas refuses the call, in some cases because of a missing right.
    AtlasRefusal,
    /// Any other error.
    Other,
}

/// What a change stream was doing when an error came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum StreamStart {
    /// It was being opened without a position.
    Fresh,
    /// It was being opened after a position.
    Resumed,
    /// It was open, or the call was not about a stream.
    Open,
}

/// The code for a duplicate key.
pub(crate) const DUPLICATE_KEY: i32 = 11000;
pub(crate) const IMMUTABLE_FIELD: i32 = 66;
/// In MongoDB: the oplog does not reach back to the position any longer. In Amazon `DocumentDB`: change streams are
/// not enabled.
const CAPPED_POSITION_LOST: i32 = 136;
const ATLAS_ERROR: i32 = 8000;

/// Each code with its name and its meaning. The name is empty for a code of another engine, if that engine has no
/// name for it or another name than MongoDB.
///
/// Sources:
/// [E] [`error_codes.yml`](https://github.com/mongodb/mongo/blob/007ba93486927dc7162c9b0f9d719e86b87fd8fe/src/mongo/base/error_codes.yml),
/// which has the names, and the categories from which the labels are made.
/// [S] The
/// [specification of change streams](https://github.com/mongodb/specifications/blob/master/source/change-streams/change-streams.md#resumable-error):
/// a driver resumes after these errors.
/// [R] The codes after which the driver repeats a read, and those by which it recognizes an election
/// (`RETRYABLE_READ_CODES`, `RECOVERING_CODES` and `NOTWRITABLEPRIMARY_CODES` of mongodb 3.9.1).
/// [L] The server labels them `ResumableChangeStreamError`, as it labels each `RetriableError`,
/// `NetworkError` and `NeedRetargettingError` (`error_labels.cpp`).
const TABLE: [(i32, &str, Meaning); 66] = [
    // [E] SystemOverloadedError. With all four, the server rejects a call before executing it.
    (433, "AdmissionQueueOverflow", Meaning::Overloaded),
    (449, "RateLimitExceeded", Meaning::Overloaded),
    (450, "PooledConnectionAcquisitionRejected", Meaning::Overloaded),
    (462, "IngressRequestRateLimitExceeded", Meaning::Overloaded),
    // [E] NotPrimaryError and ShutdownError, [S], [R].
    (91, "ShutdownInProgress", Meaning::NoPrimary),
    (189, "PrimarySteppedDown", Meaning::NoPrimary),
    (10058, "LegacyNotPrimary", Meaning::NoPrimary),
    (10107, "NotWritablePrimary", Meaning::NoPrimary),
    (11600, "InterruptedAtShutdown", Meaning::NoPrimary),
    (11602, "InterruptedDueToReplStateChange", Meaning::NoPrimary),
    (13435, "NotPrimaryNoSecondaryOk", Meaning::NoPrimary),
    (13436, "NotPrimaryOrSecondary", Meaning::NoPrimary),
    // [S] A router finds no primary of a shard.
    (133, "FailedToSatisfyReadPreference", Meaning::NoPrimary),
    // [R], [L] A new primary does not know yet which changes a majority has.
    (134, "ReadConcernMajorityNotAvailableYet", Meaning::NoPrimary),
    // [E] NetworkError, [S], [R].
    (6, "HostUnreachable", Meaning::Unreachable),
    (7, "HostNotFound", Meaning::Unreachable),
    (89, "NetworkTimeout", Meaning::Unreachable),
    (9001, "SocketException", Meaning::Unreachable),
    // [E] NetworkTimeoutError; RetriableError and ExceededTimeLimitError, [L].
    (202, "NetworkInterfaceExceededTimeLimit", Meaning::Unreachable),
    (407, "PooledConnectionAcquisitionExceededTimeLimit", Meaning::Unreachable),
    // [E] NetworkError, [L]. Servers use them among themselves; a router may pass one on.
    (317, "ConnectionPoolExpired", Meaning::Unreachable),
    (384, "ConnectionError", Meaning::Unreachable),
    // [E] ExceededTimeLimitError, [R].
    (50, "MaxTimeMSExpired", Meaning::TimeLimit),
    (262, "ExceededTimeLimit", Meaning::TimeLimit),
    // [S]
    (43, "CursorNotFound", Meaning::Interrupted),
    (63, "StaleShardVersion", Meaning::Interrupted),
    (150, "StaleEpoch", Meaning::Interrupted),
    (234, "RetryChangeStream", Meaning::Interrupted),
    (13388, "StaleConfig", Meaning::Interrupted),
    // [E] CursorInvalidatedError. "In a step down the changeStream may return QueryPlanKilled, which can
    // be recovered" (the server's own tests of change streams).
    (96, "OperationFailed", Meaning::Interrupted),
    (175, "QueryPlanKilled", Meaning::Interrupted),
    (237, "CursorKilled", Meaning::Interrupted),
    (314, "ObjectIsBusy", Meaning::Interrupted),
    // [E] Interruption, by an operator's `killOp`.
    (11601, "Interrupted", Meaning::Interrupted),
    // [E] The server is short of cache or of another resource. RetriableError for the second, [L].
    (365, "TemporarilyUnavailable", Meaning::Interrupted),
    (402, "ResourceExhausted", Meaning::Interrupted),
    // [E] RetriableError, [L].
    (358, "InternalTransactionNotSupported", Meaning::Interrupted),
    (406, "MigrationBlockingOperationCoordinatorCleaningUp", Meaning::Interrupted),
    (412, "UpdatesStillPending", Meaning::Interrupted),
    (453, "InterruptedDueToReshardingCriticalSection", Meaning::Interrupted),
    (91331, "RetriableRemoteCommandFailure", Meaning::Interrupted),
    (10_045_600, "InterruptedDueToFCVChange", Meaning::Interrupted),
    // [E]
    (18, "AuthenticationFailed", Meaning::Authentication),
    (334, "MechanismUnavailable", Meaning::Authentication),
    (13, "Unauthorized", Meaning::Permission),
    // [E] NonResumableChangeStreamError.
    (280, "ChangeStreamFatalError", Meaning::HistoryLost),
    (286, "ChangeStreamHistoryLost", Meaning::HistoryLost),
    // The first: the oplog does not reach back to the position any longer (`collection_scan.cpp`). The second: the
    // position belongs to another deployment or to a stream that was invalidated
    // (`document_source_change_stream.cpp`).
    (CAPPED_POSITION_LOST, "CappedPositionLost", Meaning::HistoryLost),
    (260, "InvalidResumeToken", Meaning::HistoryLost),
    // The next change does not fit into a message. A second attempt would fail in the same way
    // (https://www.mongodb.com/docs/manual/administration/change-streams-production-recommendations/).
    (10334, "BSONObjectTooLarge", Meaning::HistoryLost),
    // A standalone server: "The $changeStream stage is only supported on replica sets".
    (40573, "Location40573", Meaning::NoChangeStreams),
    // [E]
    (20, "IllegalOperation", Meaning::NoChangeStreams),
    (376, "ChangeStreamNotEnabled", Meaning::NoChangeStreams),
    // [E]
    (59, "CommandNotFound", Meaning::UnknownCommand),
    // "Unrecognized pipeline stage name" (`document_source.cpp`).
    (40324, "Location40324", Meaning::UnknownCommand),
    // [E] A server before 4.2 cannot parse a pipeline in an update.
    (9, "FailedToParse", Meaning::Unsupported),
    // [E]
    (115, "CommandNotSupported", Meaning::Unsupported),
    (238, "NotImplemented", Meaning::Unsupported),
    // Amazon DocumentDB: "Feature not supported" and "Aggregation stage not supported"
    // (https://docs.aws.amazon.com/documentdb/latest/developerguide/mongo-apis.html).
    (303, "", Meaning::Unsupported),
    (304, "", Meaning::Unsupported),
    // [E]
    (DUPLICATE_KEY, "DuplicateKey", Meaning::DuplicateKey),
    (IMMUTABLE_FIELD, "ImmutableField", Meaning::ImmutableField),
    (26, "NamespaceNotFound", Meaning::MissingNamespace),
    (85, "IndexOptionsConflict", Meaning::IndexConflict),
    (86, "IndexKeySpecsConflict", Meaning::IndexConflict),
    // [E] "Error codes 4000-8999 are reserved": Atlas replies with this one to a call that it does not allow
    // (https://www.mongodb.com/docs/atlas/unsupported-commands/).
    (ATLAS_ERROR, "AtlasError", Meaning::AtlasRefusal),
];

/// The meaning of an error; `None` if it is not a reply of the server.
pub(crate) fn meaning(error: &mongodb::error::Error) -> Option<Meaning> {
    // The driver also puts the overload label on its own network errors, if it could not establish a connection.
    // These have no code, and are an outage.
    let code = code(error)?;
    let meaning = if error.contains_label(SYSTEM_OVERLOADED_ERROR) {
        Meaning::Overloaded
    } else {
        meaning_of(code)
    };
    match &*error.kind {
        // The write was executed. Only the acknowledgement by enough members failed.
        Driver::Write(WriteFailure::WriteConcernError(_)) => Some(meaning.of_a_write_concern()),
        _ => Some(meaning),
    }
}

/// The meaning of a code without labels, such as that of a statement in a batch.
pub(crate) fn meaning_of(code: i32) -> Meaning {
    row(code).map_or(Meaning::Other, |(_, _, meaning)| *meaning)
}

/// The name of a code in the table, for a reply without a name.
pub(crate) fn name_of(code: i32) -> Option<&'static str> {
    row(code).map(|(_, name, _)| *name).filter(|name| !name.is_empty())
}

/// Whether the error is a reply of the server with this meaning.
pub(crate) fn has_meaning(error: &mongodb::error::Error, expected: Meaning) -> bool {
    meaning(error) == Some(expected)
}

/// Whether the server does not support the command or something in it.
pub(crate) fn is_not_understood(error: &mongodb::error::Error) -> bool {
    let meaning = meaning(error);
    matches!(meaning, Some(Meaning::UnknownCommand | Meaning::Unsupported))
}

/// Whether a call that was refused for overload was certainly not executed.
///
/// The label `RetryableError` says so: such an error is "safely retryable regardless of the type of operation", in
/// the words of the
/// [specification](https://github.com/mongodb/specifications/blob/master/source/client-backpressure/client-backpressure.md).
/// With the overload codes of the table, the server rejects a call before it begins. Any other error may have
/// interrupted it.
pub(crate) fn was_rejected(error: &mongodb::error::Error) -> bool {
    let known = code(error).is_some_and(|code| meaning_of(code) == Meaning::Overloaded);
    known || error.contains_label(RETRYABLE_ERROR)
}

/// The meaning of an error for a change stream, or for a checkpoint of one.
pub(crate) fn fault(error: &mongodb::error::Error, start: StreamStart) -> Fault {
    if matches!(*error.kind, Driver::Shutdown) {
        return Fault::Closed;
    }
    let Some(meaning) = meaning(error) else { return Fault::Passing };
    if meaning != Meaning::Overloaded && error.contains_label(RESUMABLE_CHANGE_STREAM_ERROR) {
        return Fault::Passing;
    }
    meaning.fault(start).unwrap_or_else(|| Fault::Refused(refusal(error)))
}

fn refusal(error: &mongodb::error::Error) -> Refusal {
    let code = code(error);
    let name = code_name(error).or_else(|| name_of(code?)).unwrap_or_default();
    Refusal { code, name: name.to_owned(), hint: code.and_then(hint) }
}

/// A hint about a code, for a stream that was refused.
fn hint(code: i32) -> Option<&'static str> {
    match code {
        CAPPED_POSITION_LOST => {
            Some("Amazon DocumentDB answers so until they are enabled with modifyChangeStreams")
        }
        ATLAS_ERROR => Some("Flex clusters of Atlas have none"),
        _ => None,
    }
}

fn row(code: i32) -> Option<&'static (i32, &'static str, Meaning)> {
    TABLE.iter().find(|(it, ..)| *it == code)
}

impl Meaning {
    /// The kind of this crate's error.
    pub(crate) fn kind(self) -> ErrorKind {
        match self {
            Self::Overloaded => ErrorKind::Overloaded,
            Self::NoPrimary | Self::Unreachable => ErrorKind::Connection,
            Self::TimeLimit => ErrorKind::Timeout,
            Self::Authentication => ErrorKind::Authentication,
            Self::Permission => ErrorKind::Permission,
            Self::Interrupted
            | Self::HistoryLost
            | Self::NoChangeStreams
            | Self::UnknownCommand
            | Self::Unsupported
            | Self::DuplicateKey
            | Self::ImmutableField
            | Self::MissingNamespace
            | Self::IndexConflict
            | Self::AtlasRefusal
            | Self::Other => ErrorKind::Server,
        }
    }

    /// The meaning if the error is about the write concern: the write was executed, so it was not rejected for
    /// overload.
    pub(crate) fn of_a_write_concern(self) -> Self {
        if self == Self::Overloaded { Self::Other } else { self }
    }

    /// The fault of a change stream; `None` if the server refuses the stream for another reason.
    fn fault(self, start: StreamStart) -> Option<Fault> {
        Some(match (self, start) {
            (Self::Overloaded, _) => Fault::Overloaded,
            // The server needs longer than its time limit to reach the position.
            (Self::TimeLimit, StreamStart::Resumed) => Fault::TooSlow,
            (
                Self::NoPrimary
                | Self::Unreachable
                | Self::TimeLimit
                | Self::Interrupted
                // A new primary may not know the user yet.
                | Self::Authentication,
                _,
            ) => Fault::Passing,
            (Self::Permission, _) => Fault::Unsupported(
                "the MongoDB user may not open a change stream (grant it the role `readWrite`, or \
                 `changeStream` and `find` on the collection)",
            ),
            (Self::NoChangeStreams | Self::UnknownCommand, _) => Fault::Unsupported(
                "this MongoDB server has no change streams (a replica set has them, one of a \
                 single member too: start mongod with --replSet and run rs.initiate())",
            ),
            // A stream that begins now cannot lose a history.
            (Self::HistoryLost, StreamStart::Fresh)
            | (
                Self::Unsupported
                | Self::DuplicateKey
                | Self::ImmutableField
                | Self::MissingNamespace
                | Self::IndexConflict
                | Self::AtlasRefusal
                | Self::Other,
                _,
            ) => return None,
            (Self::HistoryLost, StreamStart::Resumed | StreamStart::Open) => Fault::Lost,
        })
    }
}

#[cfg(test)]
mod tests {
    use bson::{Document, doc};

    use super::*;

    /// The driver's error for a reply of the server. It has no labels, because only the driver can add them.
    fn answer(answer: Document) -> mongodb::error::Error {
        let command = bson::deserialize_from_document(answer).unwrap();
        Driver::Command(command).into()
    }

    fn error(code: i32) -> mongodb::error::Error {
        answer(doc! { "ok": 0, "code": code, "codeName": "Named", "errmsg": "secret" })
    }

    #[test]
    fn each_code_has_one_row() {
        for (at, (code, name, _)) in TABLE.iter().enumerate() {
            let same =
                |row: &&(i32, &str, Meaning)| row.0 == *code || !name.is_empty() && row.1 == *name;
            assert_eq!(TABLE.iter().filter(same).count(), 1, "row {at}: {code} {name}");
        }
    }

    #[test]
    fn each_code_is_the_fault_of_a_stream_that_the_table_says() {
        for code in [136, 260, 280, 286, 10334] {
            for start in [StreamStart::Resumed, StreamStart::Open] {
                assert_eq!(fault(&error(code), start), Fault::Lost, "{code}");
            }
            let fresh = fault(&error(code), StreamStart::Fresh);
            assert!(matches!(fresh, Fault::Refused(_)), "{code}: it has no history to lose");
        }
        for code in [13, 20, 59, 376, 40324, 40573] {
            let fault = fault(&error(code), StreamStart::Fresh);
            assert!(matches!(fault, Fault::Unsupported(_)), "{code}");
        }
        for start in [StreamStart::Fresh, StreamStart::Resumed, StreamStart::Open] {
            // The list of the specification, and the other codes that the server labels.
            for code in [
                6, 7, 43, 63, 89, 91, 96, 133, 134, 150, 175, 189, 202, 234, 237, 314, 358, 365,
                402, 406, 407, 412, 9001, 10107, 11600, 11602, 13388, 13435, 13436, 18, 334,
            ] {
                assert_eq!(fault(&error(code), start), Fault::Passing, "{code}");
            }
            for code in [433, 449, 450, 462] {
                assert_eq!(fault(&error(code), start), Fault::Overloaded, "{code}");
            }
            for code in [1, 2, 9, 26, 72, 73, 115, 238, 303, 304, 8000, 17280] {
                let fault = fault(&error(code), start);
                let is_refused =
                    matches!(&fault, Fault::Refused(refusal) if refusal.code == Some(code));
                assert!(is_refused, "{code}: {fault:?}");
            }
        }
        for code in [50, 262] {
            assert_eq!(fault(&error(code), StreamStart::Resumed), Fault::TooSlow, "{code}");
            assert_eq!(fault(&error(code), StreamStart::Fresh), Fault::Passing, "{code}");
            assert_eq!(fault(&error(code), StreamStart::Open), Fault::Passing, "{code}");
        }
        let no_answer = std::io::Error::from(std::io::ErrorKind::ConnectionReset);
        assert_eq!(fault(&no_answer.into(), StreamStart::Open), Fault::Passing);
    }

    #[test]
    fn a_refusal_has_the_name_of_its_code_and_no_text_of_the_server() {
        let said = |answered: Document| match fault(&answer(answered), StreamStart::Fresh) {
            Fault::Refused(refusal) => refusal.reason(),
            fault => panic!("{fault:?}"),
        };
        let named = said(doc! { "code": 8000, "codeName": "AtlasError", "errmsg": "secret" });
        assert!(named.contains("error 8000 (AtlasError)") && !named.contains("secret"), "{named}");
        assert!(named.ends_with(". Flex clusters of Atlas have none"), "{named}");
        let unnamed = said(doc! { "code": 136, "errmsg": "secret" });
        assert!(unnamed.contains("error 136 (CappedPositionLost)"), "{unnamed}");
        assert!(unnamed.contains("enabled with modifyChangeStreams"), "{unnamed}");
        let unknown = said(doc! { "code": 304, "codeName": "a secret = 1", "errmsg": "secret" });
        assert!(unknown.ends_with("error 304") && !unknown.contains("secret"), "{unknown}");
    }

    #[test]
    fn an_unsupported_command_stage_or_feature_is_not_understood() {
        for code in [9, 59, 115, 238, 303, 304, 40324] {
            assert!(is_not_understood(&error(code)), "{code}");
        }
        for code in [2, 13, 20, 26, 371, 376, 8000, 11000, 14031, 40573] {
            assert!(!is_not_understood(&error(code)), "{code}");
        }
    }

    #[test]
    fn only_the_overload_codes_show_that_a_call_was_not_executed() {
        assert!(was_rejected(&error(462)));
        assert!(!was_rejected(&error(91)));
    }
}
