//! What the driver's errors become.
//!
//! The server's error texts and the driver's `Debug` quote documents and key values, and a
//! malformed URI is quoted with its password. So for an answer of the server only the code and its
//! name are kept, and the rest is said in our own words.

use mongodb::error::{ErrorKind as Driver, WriteFailure};

use crate::error::{Error, ErrorKind};

/// The server's code for a duplicate key.
pub(super) const DUPLICATE_KEY: i32 = 11000;
/// The server's code for a namespace that does not exist.
const NAMESPACE_NOT_FOUND: i32 = 26;

/// Turns a driver's error into ours; `doing` says what was tried, as in "load the session".
pub(super) fn failure(doing: &str, error: &mongodb::error::Error) -> Error {
    let kind = match &*error.kind {
        Driver::Authentication { .. } => ErrorKind::Authentication,
        Driver::Io(_)
        | Driver::ServerSelection { .. }
        | Driver::ConnectionPoolCleared { .. }
        | Driver::DnsResolve { .. } => ErrorKind::Connection,
        Driver::InvalidArgument { .. } | Driver::InvalidTlsConfig { .. } => ErrorKind::Config,
        Driver::Shutdown => return Error::closed(),
        _ => code(error).map_or(ErrorKind::Server, kind_of),
    };
    let message = match (kind, code(error)) {
        (ErrorKind::Authentication, _) => format!(
            "MongoDB refused the credentials while trying to {doing}: check the user name, the \
             password and the authSource"
        ),
        (ErrorKind::Permission, _) => format!(
            "the MongoDB user is not allowed to {doing}: grant it the role `readWrite` on the \
             database"
        ),
        (ErrorKind::Connection, _) => {
            format!("could not reach MongoDB to {doing}: {}", unreachable(error))
        }
        (ErrorKind::Timeout, _) => format!("MongoDB gave up at its time limit, trying to {doing}"),
        (_, Some(code)) => format!(
            "MongoDB answered with error {code}{} when asked to {doing}",
            code_name(error).map(|name| format!(" ({name})")).unwrap_or_default()
        ),
        (ErrorKind::Config, None) => format!("the driver refused to {doing}: {}", argument(error)),
        _ => format!("the MongoDB driver failed to {doing}"),
    };
    Error::new(kind, message)
}

/// What one operation of a command became that the server refused with this code.
pub(super) fn refused(doing: &str, code: i32) -> Error {
    match kind_of(code) {
        ErrorKind::Connection => {
            let why = of_the_cluster(code);
            Error::new(ErrorKind::Connection, format!("could not reach MongoDB to {doing}: {why}"))
        }
        kind => {
            Error::new(kind, format!("MongoDB answered with error {code} when asked to {doing}"))
        }
    }
}

fn kind_of(code: i32) -> ErrorKind {
    match code {
        18 | 334 => ErrorKind::Authentication,
        13 => ErrorKind::Permission,
        50 => ErrorKind::Timeout,
        // ShutdownInProgress, PrimarySteppedDown, NotWritablePrimary, InterruptedAtShutdown,
        // InterruptedDueToReplStateChange, NotPrimaryNoSecondaryOk, NotPrimaryOrSecondary: an outage,
        // though somebody answers. NetworkTimeout and SocketException: of a router or a member that
        // does not reach the others.
        89 | 91 | 189 | 9001 | 10107 | 11600 | 11602 | 13435 | 13436 => ErrorKind::Connection,
        _ => ErrorKind::Server,
    }
}

fn of_the_cluster(code: i32) -> String {
    match code {
        89 | 9001 => format!("its members do not reach each other (error {code})"),
        _ => format!("it is electing a new primary or shutting down (error {code})"),
    }
}

/// Whether an insert met a document with the same key.
pub(super) fn is_duplicate(error: &mongodb::error::Error) -> bool {
    code(error) == Some(DUPLICATE_KEY)
}

/// Whether the collection does not exist yet.
pub(super) fn is_missing_namespace(error: &mongodb::error::Error) -> bool {
    code(error) == Some(NAMESPACE_NOT_FOUND)
}

pub(super) fn code(error: &mongodb::error::Error) -> Option<i32> {
    match &*error.kind {
        Driver::Command(command) => Some(command.code),
        Driver::Write(WriteFailure::WriteError(write)) => Some(write.code),
        Driver::Write(WriteFailure::WriteConcernError(concern)) => Some(concern.code),
        Driver::BulkWrite(bulk) => bulk.write_concern_errors.first().map(|concern| concern.code),
        _ => None,
    }
}

fn code_name(error: &mongodb::error::Error) -> Option<&str> {
    let name = match &*error.kind {
        Driver::Command(command) => command.code_name.as_str(),
        Driver::Write(WriteFailure::WriteError(write)) => write.code_name.as_deref()?,
        Driver::Write(WriteFailure::WriteConcernError(concern)) => concern.code_name.as_str(),
        _ => return None,
    };
    Some(name).filter(|name| !name.is_empty())
}

/// Texts about the network and the topology hold addresses and no data.
fn unreachable(error: &mongodb::error::Error) -> String {
    match &*error.kind {
        Driver::Io(source) => source.to_string(),
        Driver::ServerSelection { message, .. } => servers(message),
        Driver::DnsResolve { message, .. } => message.clone(),
        _ => code(error).map_or_else(|| "the connection was lost".to_owned(), of_the_cluster),
    }
}

/// The servers and what each said, out of the driver's description of the whole topology.
fn servers(topology: &str) -> String {
    let (mut said, mut answered, mut silent) = (Vec::new(), false, false);
    for server in topology.split("Address: ").skip(1) {
        let address = server.split(',').next().unwrap_or_default();
        let error = server
            .split_once("Error: Kind: ")
            .map(|(_, error)| error.split(", labels: ").next().unwrap_or(error));
        match error {
            Some(error) => {
                silent |= error.starts_with("I/O error") || error.contains("DNS resolution");
                said.push(format!("{address} ({error})"));
            }
            None if server.contains("Type: Unknown") => {
                silent = true;
                said.push(format!("{address} (no answer yet)"));
            }
            None => {
                answered = true;
                said.push(format!("{address} (answers, but takes no writes)"));
            }
        }
    }
    let advice = match (answered, silent) {
        _ if said.is_empty() => {
            return "no server was found: does the replica set have the name that was given?"
                .to_owned();
        }
        (true, _) => {
            "no primary is among them: has the replica set a majority of its members, and are its \
             other members given or reachable?"
        }
        (false, true) => "is it running, and is the address right?",
        (false, false) => "it answers, but not as the connection's options would have it",
    };
    format!("{}: {advice}", said.join(", "))
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
        for code in [89, 91, 189, 9001, 10107, 11600, 11602, 13435, 13436] {
            let error = refused("save a session", code);
            assert_eq!(error.kind(), ErrorKind::Connection, "{error}");
            assert!(error.is_outage() && error.to_string().contains(&code.to_string()), "{error}");
        }
        for (code, kind) in [
            (2, ErrorKind::Server),
            (13, ErrorKind::Permission),
            (18, ErrorKind::Authentication),
            (50, ErrorKind::Timeout),
            (11000, ErrorKind::Server),
        ] {
            assert_eq!(refused("save a session", code).kind(), kind, "{code}");
        }
    }

    #[test]
    fn an_unreachable_server_is_named_with_what_it_said() {
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
    fn servers_that_answer_are_not_called_unreachable() {
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
}
