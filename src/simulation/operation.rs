//! What a database is asked for, and what it answers.

use crate::invalidation::source::{Fault, PrimaryTime};
use crate::mongo::change_stream::cursor::ResumeToken;
use crate::session::Session;
use crate::session::id::SessionKey;
use crate::session::revision::Rev;
use crate::simulation::database::Database;
use crate::simulation::sign_out::{Floors, Found};
use crate::simulation::stream::{Cursor, Reply};
use crate::time::WallTime;

#[derive(Clone, Debug)]
pub(crate) enum Operation {
    Insert(SessionKey, Session),
    Replace(SessionKey, Rev, Session),
    Touch(SessionKey, WallTime),
    Find(SessionKey),
    Remove(SessionKey),
    Clear,
    Open(Option<ResumeToken>),
    /// Finds a page of the sessions of an owner, behind the one of this number.
    FindOwned(u64, Option<usize>),
    /// Removes those of these sessions that are an owner's.
    RemoveOwned(Vec<SessionKey>, u64),
    More(Cursor),
    Fence,
}

#[derive(Clone, Debug)]
pub(crate) enum Outcome {
    Written(Option<WallTime>),
    Found(Option<Session>),
    Removed,
    Cleared(u64),
    Handed(Cursor, Reply),
    Time(PrimaryTime),
    Owned(Found),
    /// How many were removed, and what all that were asked for are by now.
    Ended(u64, Floors),
}

impl Operation {
    /// In words that are the same in each replay: keys and revs are not.
    pub(crate) fn told(&self, database: &mut Database) -> String {
        match self {
            Self::Insert(key, session) => {
                format!(
                    "insert {} {}",
                    database.number(*key),
                    crate::simulation::version(&session.data)
                )
            }
            Self::Replace(key, _, session) => {
                format!(
                    "replace {} {}",
                    database.number(*key),
                    crate::simulation::version(&session.data)
                )
            }
            Self::Touch(key, _) => format!("touch {}", database.number(*key)),
            Self::Find(key) => format!("find {}", database.number(*key)),
            Self::Remove(key) => format!("remove {}", database.number(*key)),
            Self::Clear => "clear".to_owned(),
            Self::FindOwned(owner, after) => format!("find those of {owner} behind {after:?}"),
            Self::RemoveOwned(keys, owner) => {
                let numbers: Vec<_> = keys.iter().map(|key| database.number(*key)).collect();
                format!("remove {numbers:?} of {owner}")
            }
            Self::Open(after) => format!("open after {after:?}"),
            Self::More(cursor) => format!("more {cursor:?}"),
            Self::Fence => "fence".to_owned(),
        }
    }

    pub(crate) fn is_of_a_stream(&self) -> bool {
        matches!(self, Self::Open(_) | Self::More(_) | Self::Fence)
    }

    /// Whether it is a step of a call of many steps, which keeps to no deadline here.
    pub(crate) fn is_paged(&self) -> bool {
        matches!(self, Self::Clear | Self::FindOwned(..) | Self::RemoveOwned(..))
    }

    /// Whether it comes through queues, so that what the store knows of it is an
    /// [errand](crate::simulation::pending_calls)'s.
    pub(crate) fn is_queued(&self) -> bool {
        matches!(self, Self::Find(_) | Self::Replace(..) | Self::Touch(..))
    }
}

/// In words that are the same in each replay.
pub(crate) fn told(outcome: &Result<Outcome, Fault>) -> String {
    match outcome {
        Ok(Outcome::Found(found)) => {
            let version = found.as_ref().map(|session| crate::simulation::version(&session.data));
            format!("{version:?}")
        }
        Ok(Outcome::Handed(cursor, reply)) => {
            format!("{} changes, token {:?}, {cursor:?}", reply.events.len(), reply.token)
        }
        Ok(Outcome::Owned(found)) => {
            let numbers: Vec<_> = found.sessions.iter().map(|(number, ..)| number).collect();
            format!("{numbers:?}")
        }
        other => format!("{other:?}"),
    }
}
