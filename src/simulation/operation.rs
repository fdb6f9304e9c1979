//! What a database is asked for, and what it answers.

use super::database::Database;
use super::stream::{Cursor, Reply};
use crate::backend::{Fault, PrimaryTime, Rev};
use crate::key::SessionKey;
use crate::mongo::cursor::Token;
use crate::record::{Session, WallTime};

#[derive(Clone, Debug)]
pub(crate) enum Operation {
    Insert(SessionKey, Session),
    Replace(SessionKey, Rev, Session),
    Touch(SessionKey, WallTime),
    Find(SessionKey),
    Remove(SessionKey),
    Clear,
    Open(Option<Token>),
    More(Cursor),
    Fence,
}

#[derive(Clone, Debug)]
pub(super) enum Outcome {
    Written(Option<WallTime>),
    Found(Option<Session>),
    Removed,
    Cleared(u64),
    Handed(Cursor, Reply),
    Time(PrimaryTime),
}

impl Operation {
    /// In words that are the same in each replay: keys and revs are not.
    pub(super) fn told(&self, database: &mut Database) -> String {
        match self {
            Self::Insert(key, session) => {
                format!("insert {} {}", database.number(*key), super::version(&session.data))
            }
            Self::Replace(key, _, session) => {
                format!("replace {} {}", database.number(*key), super::version(&session.data))
            }
            Self::Touch(key, _) => format!("touch {}", database.number(*key)),
            Self::Find(key) => format!("find {}", database.number(*key)),
            Self::Remove(key) => format!("remove {}", database.number(*key)),
            Self::Clear => "clear".to_owned(),
            Self::Open(after) => format!("open after {after:?}"),
            Self::More(cursor) => format!("more {cursor:?}"),
            Self::Fence => "fence".to_owned(),
        }
    }

    pub(super) fn is_of_a_stream(&self) -> bool {
        matches!(self, Self::Open(_) | Self::More(_) | Self::Fence)
    }

    /// Whether it comes through queues, so that what the store knows of it is an
    /// [errand](super::errands)'s.
    pub(super) fn is_queued(&self) -> bool {
        matches!(self, Self::Find(_) | Self::Replace(..) | Self::Touch(..))
    }
}

/// In words that are the same in each replay.
pub(super) fn told(outcome: &Result<Outcome, Fault>) -> String {
    match outcome {
        Ok(Outcome::Found(found)) => {
            let version = found.as_ref().map(|session| super::version(&session.data));
            format!("{version:?}")
        }
        Ok(Outcome::Handed(cursor, reply)) => {
            format!("{} changes, token {:?}, {cursor:?}", reply.events.len(), reply.token)
        }
        other => format!("{other:?}"),
    }
}
