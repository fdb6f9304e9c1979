//! Converts the driver's errors into errors of this crate.
//!
//! The server's error texts and the driver's `Debug` quote documents and key values, and the driver quotes a
//! malformed URI with its password. So of a server's reply only the code and its name are kept. The rest of each
//! message is written here.

use mongodb::error::{ErrorKind as Driver, WriteFailure};

use crate::error::{Error, ErrorKind};
use crate::mongo::server_errors::{self, Meaning, meaning_of, name_of};

/// Converts an error of the driver. `doing` says what was tried, as in "load the session".
pub(crate) fn to_error(doing: &str, error: &mongodb::error::Error) -> Error {
    if let Driver::ServerSelection { message, .. } = &*error.kind
        && let Some(incompatible) = crate::mongo::connect::probe::incompatible(message)
    {
        return incompatible;
    }
    if let Driver::Authentication { message, .. } = &*error.kind
        && let Some(missing) = crate::mongo::connect::uri_options::missing_feature(message)
    {
        return missing;
    }
    let kind = match &*error.kind {
        Driver::Authentication { .. } => ErrorKind::Authentication,
        Driver::Io(_)
        | Driver::ServerSelection { .. }
        | Driver::ConnectionPoolCleared { .. }
        | Driver::DnsResolve { .. } => ErrorKind::Connection,
        Driver::InvalidArgument { .. } | Driver::InvalidTlsConfig { .. } => ErrorKind::Config,
        Driver::Shutdown => return Error::client_closed(),
        _ => server_errors::meaning(error).map_or(ErrorKind::Server, Meaning::kind),
    };
    if kind == ErrorKind::Overloaded {
        let why = code(error).map_or_else(String::new, |code| answer(code, code_name(error)));
        return Error::server_overloaded(
            format!("MongoDB is overloaded and refused to {doing}: it answered with {why}"),
            server_errors::was_rejected(error),
        );
    }
    let message = match (kind, code(error)) {
        (ErrorKind::Authentication, _) => format!(
            "MongoDB refused the credentials while trying to {doing}: check the user name, the \
             password and the authSource. The authSource is the database in which the user is \
             defined. By default it is the database in the URI's path, but most users are defined \
             in `admin`, which needs ?authSource=admin"
        ),
        (ErrorKind::Permission, _) if wants_credentials(error) => format!(
            "MongoDB wants a user name and a password to {doing}, and none were given: put them \
             into the URI, mongodb://user:password@host/database?authSource=admin, or give \
             `username` and `password`"
        ),
        (ErrorKind::Permission, _) => format!(
            "the MongoDB user is not allowed to {doing}: grant it the role `readWrite` on the \
             database"
        ),
        (ErrorKind::Connection, _) => {
            format!("could not reach MongoDB to {doing}: {}", unreachable(error))
        }
        (ErrorKind::Timeout, _) => format!("MongoDB gave up at its time limit, trying to {doing}"),
        (_, Some(code)) => {
            let answer = answer(code, code_name(error));
            format!("MongoDB answered with {answer} when asked to {doing}")
        }
        (ErrorKind::Config, None) => format!("the driver refused to {doing}: {}", argument(error)),
        _ => format!("the MongoDB driver failed to {doing}"),
    };
    Error::new(kind, message)
}

/// The error of a statement of a command that the server refused with this code.
pub(crate) fn refused(doing: &str, code: i32) -> Error {
    of_code(doing, code, meaning_of(code))
}

/// The error of a write that was executed, but whose write concern failed with this code.
pub(crate) fn unacknowledged(doing: &str, code: i32) -> Error {
    of_code(doing, code, meaning_of(code).of_a_write_concern())
}

fn of_code(doing: &str, code: i32, meaning: Meaning) -> Error {
    let answer = answer(code, None);
    match meaning.kind() {
        ErrorKind::Connection => {
            let why = of_the_cluster(code);
            Error::new(ErrorKind::Connection, format!("could not reach MongoDB to {doing}: {why}"))
        }
        ErrorKind::Overloaded => Error::server_overloaded(
            format!("MongoDB is overloaded and refused to {doing}: it answered with {answer}"),
            true,
        ),
        kind => Error::new(kind, format!("MongoDB answered with {answer} when asked to {doing}")),
    }
}

/// Formats a code of the server, with its name if that is known.
fn answer(code: i32, name: Option<&str>) -> String {
    match name.or_else(|| name_of(code)) {
        Some(name) => format!("error {code} ({name})"),
        None => format!("error {code}"),
    }
}

fn of_the_cluster(code: i32) -> String {
    match meaning_of(code) {
        Meaning::Unreachable => format!("its members do not reach each other (error {code})"),
        _ => format!("it is electing a new primary or shutting down (error {code})"),
    }
}

/// Whether an insert met a document with the same key.
pub(crate) fn is_duplicate(error: &mongodb::error::Error) -> bool {
    server_errors::has_meaning(error, Meaning::DuplicateKey)
}

/// Whether an update did not meet its condition on the `rev`.
pub(crate) fn is_changed(error: &mongodb::error::Error) -> bool {
    server_errors::has_meaning(error, Meaning::ImmutableField)
}

/// Whether the collection does not exist yet.
pub(crate) fn is_missing_namespace(error: &mongodb::error::Error) -> bool {
    server_errors::has_meaning(error, Meaning::MissingNamespace)
}

pub(crate) fn code(error: &mongodb::error::Error) -> Option<i32> {
    match &*error.kind {
        Driver::Command(command) => Some(command.code),
        Driver::Write(WriteFailure::WriteError(write)) => Some(write.code),
        Driver::Write(WriteFailure::WriteConcernError(concern)) => Some(concern.code),
        Driver::BulkWrite(bulk) => bulk.write_concern_errors.first().map(|concern| concern.code),
        _ => None,
    }
}

pub(crate) fn code_name(error: &mongodb::error::Error) -> Option<&str> {
    let name = match &*error.kind {
        Driver::Command(command) => command.code_name.as_str(),
        Driver::Write(WriteFailure::WriteError(write)) => write.code_name.as_deref()?,
        Driver::Write(WriteFailure::WriteConcernError(concern)) => concern.code_name.as_str(),
        _ => return None,
    };
    // A name is one word of letters and digits. A proxy may send anything in its place.
    let is_name = name.len() <= 64 && name.bytes().all(|byte| byte.is_ascii_alphanumeric());
    Some(name).filter(|name| !name.is_empty() && is_name)
}

/// Whether the server refused the call because no user name was given, and not because the user lacks a right. Both
/// have the same code, so this reads the server's text. Nothing of the text is passed on.
fn wants_credentials(error: &mongodb::error::Error) -> bool {
    let text = match &*error.kind {
        Driver::Command(command) => command.message.as_str(),
        _ => return false,
    };
    text.contains("requires authentication")
}

/// Why MongoDB was not reached. Texts about the network and the topology have addresses in them, and no data.
fn unreachable(error: &mongodb::error::Error) -> String {
    match &*error.kind {
        Driver::Io(source) => source.to_string(),
        Driver::ServerSelection { message, .. } => servers(message),
        // Only for a mongodb+srv:// URI. The message does not name the host, because a malformed URI may have a
        // piece of the password in its place.
        Driver::DnsResolve { .. } => "the DNS lookup of the URI's host failed. The host of a \
                                      mongodb+srv:// URI has SRV records; one that has none is \
                                      reached by mongodb://. Is the name right, does DNS work here, \
                                      and do a user name and password end with an @?"
            .to_owned(),
        _ => code(error).map_or_else(|| "the connection was lost".to_owned(), of_the_cluster),
    }
}

/// Lists the servers and the error of each, from the driver's description of the topology, with advice.
fn servers(topology: &str) -> String {
    let mut said = Vec::new();
    let mut worst = ServerState::Mismatched;
    for server in topology.split("Address: ").skip(1) {
        let address = server.split(',').next().unwrap_or_default();
        let error = server
            .split_once("Error: Kind: ")
            .map(|(_, error)| error.split(", labels: ").next().unwrap_or(error));
        let (state, text) = match error {
            Some(error) => (ServerState::of(error), error),
            None if server.contains("Type: Unknown") => (ServerState::Silent, "no answer yet"),
            None => (ServerState::NotPrimary, "answers, but takes no writes"),
        };
        worst = worst.max(state);
        said.push(format!("{address} ({text})"));
    }
    if said.is_empty() {
        return "no server was found: does the replica set have the name that was given?"
            .to_owned();
    }
    let members =
        if topology.contains("Type: ReplicaSetNoPrimary") && worst != ServerState::NotPrimary {
            ". The addresses that you did not give are those by which the replica set knows its \
         members, and they must be reachable from here; directConnection=true uses only the given \
         server"
        } else {
            ""
        };
    format!("{}: {}{members}", said.join(", "), worst.advice())
}

/// Why a server cannot be used. The advice is for the last of these states among the servers, which tells the most.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum ServerState {
    /// It is a MongoDB server, but of a kind that the connection's options do not allow.
    Mismatched,
    /// It is not a MongoDB server.
    NotMongoDb,
    Unreachable,
    /// Its name has no address, or no name server knows the name.
    Unresolved,
    /// It sends nothing, or it closes the connection without a reply.
    Silent,
    /// Its certificate is not trusted.
    Untrusted,
    /// It is a member of a replica set, and not the primary.
    NotPrimary,
}

impl ServerState {
    fn of(error: &str) -> Self {
        let hung_up = ["unexpected end of file", "reset by peer", "corrupt message", "timed out"];
        if error.contains("certificate") {
            Self::Untrusted
        } else if error.contains("invalid reply") {
            Self::NotMongoDb
        } else if error.contains("failed to lookup address") || error.contains("DNS resolution") {
            Self::Unresolved
        } else if !error.starts_with("I/O error") {
            Self::Mismatched
        } else if hung_up.iter().any(|text| error.contains(text)) {
            Self::Silent
        } else {
            Self::Unreachable
        }
    }

    fn advice(self) -> &'static str {
        match self {
            Self::Mismatched => "it answers, but the connection's options do not fit it",
            Self::NotMongoDb => "something else than MongoDB answers there: is the port right?",
            Self::Unreachable => "is it running, and is the address right?",
            Self::Unresolved => "its name was not resolved: is it right, and does DNS work here?",
            Self::Silent => {
                "is it running, is the address right, does a firewall let you through, and is TLS \
                 switched on (tls=true) just as it is at the server?"
            }
            Self::Untrusted => {
                "its certificate is not trusted: give the file of the authority that signed it as \
                 `tls_ca_file`, and the host as the certificate names it"
            }
            Self::NotPrimary => {
                "no primary is among them: has the replica set a majority of its members, and are \
                 its other members given or reachable?"
            }
        }
    }
}

fn argument(error: &mongodb::error::Error) -> String {
    match &*error.kind {
        Driver::InvalidArgument { message, .. } | Driver::InvalidTlsConfig { message, .. } => {
            message.clone()
        }
        _ => "an option is invalid".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_server_that_steps_down_is_an_outage() {
        for code in [6, 7, 89, 91, 133, 134, 189, 202, 407, 9001, 10107, 11600, 11602, 13435, 13436]
        {
            let error = refused("save a session", code);
            assert_eq!(error.kind(), ErrorKind::Connection, "{error}");
            assert!(error.is_outage() && error.to_string().contains(&code.to_string()), "{error}");
            assert!(!error.was_not_carried_out(), "{error}");
        }
        for (code, kind) in [
            (2, ErrorKind::Server),
            (13, ErrorKind::Permission),
            (18, ErrorKind::Authentication),
            (50, ErrorKind::Timeout),
            (262, ErrorKind::Timeout),
            (11000, ErrorKind::Server),
        ] {
            assert_eq!(refused("save a session", code).kind(), kind, "{code}");
        }
    }

    #[test]
    fn a_statement_rejected_for_overload_was_not_carried_out_and_one_with_a_failed_write_concern_was()
     {
        for code in [433, 449, 450, 462] {
            let error = refused("save a session", code);
            assert_eq!(error.kind(), ErrorKind::Overloaded, "{error}");
            assert!(
                error.is_outage() && error.was_not_carried_out() && !error.is_ours(),
                "{error}"
            );
            let written = unacknowledged("save a session", code);
            assert_eq!(written.kind(), ErrorKind::Server, "{written}");
            assert!(!written.was_not_carried_out(), "{written}");
        }
        assert_eq!(unacknowledged("save a session", 91).kind(), ErrorKind::Connection);
    }

    #[test]
    fn an_unreachable_server_is_named_with_its_error() {
        let topology = "Server selection timeout: No available servers. Topology: { Type: Unknown, \
                        Servers: [ { Address: 127.0.0.1:1, Type: Unknown, Error: Kind: I/O error: \
                        Connection refused (os error 111), labels: {}, source: None, server \
                        response: None } ] }";
        assert_eq!(
            servers(topology),
            "127.0.0.1:1 (I/O error: Connection refused (os error 111)): is it running, and is \
             the address right?"
        );
    }

    #[test]
    fn servers_that_answer_are_not_reported_as_unreachable() {
        let said = servers(
            "Topology: { Type: ReplicaSetNoPrimary, Servers: [ { Address: a:1, Type: RsSecondary, \
             Average RTT: 1ms }, { Address: b:1, Type: Unknown, Error: Kind: I/O error: timed out, \
             labels: {}, source: None, server response: None } ] }",
        );
        assert!(
            said.starts_with("a:1 (answers, but takes no writes), b:1 (I/O error: timed out): ")
        );
        assert!(said.contains("no primary") && !said.contains("is it running"), "{said}");
        assert!(servers("Topology: { Type: Unknown }").contains("no server was found"));
    }

    #[test]
    fn members_that_only_the_replica_set_can_reach_are_explained() {
        let said = servers(
            "Topology: { Type: ReplicaSetNoPrimary, Servers: [ { Address: mongo1:27017, Type: \
             Unknown, Error: Kind: I/O error: failed to lookup address information: Name or \
             service not known, labels: {}, source: None, server response: None } ] }",
        );
        assert!(said.contains("its name was not resolved"), "{said}");
        assert!(said.contains("directConnection=true"), "{said}");
    }
}
