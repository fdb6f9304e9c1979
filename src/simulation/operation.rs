//! `Operation` and `Outcome`: what a store asks of the database, and what the database answers.

use crate::batching::{Condition, Updated};
use crate::invalidation::source::{Fault, PrimaryTime};
use crate::mongo::change_stream::cursor::ResumeToken;
use crate::session::Session;
use crate::session::id::SessionKey;
use crate::session::revision::Rev;
use crate::simulation::database::Database;
use crate::simulation::stream::{Cursor, Reply};
use crate::simulation::types::{Floors, OwnedPage, version};
use crate::time::{Moment, WallTime};

#[derive(Clone, Debug)]
pub(crate) enum Operation {
    Insert(SessionKey, Session),
    Replace(SessionKey, Rev, Session, Update),
    /// A store call only: its wire calls are reads and conditional replaces.
    Merge(SessionKey, Session),
    Touch(SessionKey, WallTime),
    Find(SessionKey),
    Remove(SessionKey),
    /// Removes a session and returns it.
    Take(SessionKey),
    Clear,
    /// Finds the page of an owner's sessions that comes after the session of this number.
    FindOwned(u64, Option<usize>),
    /// Removes these sessions, if they still belong to this owner.
    RemoveOwned(Vec<SessionKey>, u64),
    /// Opens a change stream.
    Open(Option<ResumeToken>),
    /// Asks an open change stream for its next batch.
    GetMore(Cursor),
    /// Asks for the primary's time, which a checkpoint needs.
    PrimaryTime,
}

/// How a replace is carried out.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Update {
    pub(crate) condition: Condition,
    /// The stored expiry stays if it is later.
    pub(crate) keeps_later: bool,
}

impl Default for Update {
    fn default() -> Self {
        Self { condition: Condition::IsLive, keeps_later: false }
    }
}

#[derive(Clone, Debug)]
pub(crate) enum Outcome {
    Inserted(Option<WallTime>),
    Updated(Updated),
    Found(Option<Session>),
    Removed,
    Cleared(u64),
    Owned(OwnedPage),
    /// How many sessions were removed, and the rank of each session that was asked for.
    RemovedOwned(u64, Floors),
    Batch(Cursor, Reply),
    Time(PrimaryTime),
}

/// `CallRecord`: what is known of a store call or a wire call. It is kept until the walk ends.
pub(crate) struct CallRecord {
    /// The store that made the call.
    pub(crate) node: usize,
    pub(crate) operation: Operation,
    pub(crate) asked: Moment,
    /// The database's time when the call began.
    pub(crate) asked_time: u64,
    /// The rank of each session that the call wrote to, right after the write.
    pub(crate) ranks: Floors,
    pub(crate) applied: bool,
    /// The step at which the call ended.
    pub(crate) ended: Option<u64>,
}

impl Operation {
    /// The operation in words that are the same in each replay. Keys and revs are not the same.
    pub(crate) fn describe(&self, database: &mut Database) -> String {
        match self {
            Self::Insert(key, session) => {
                format!("insert {} {}", database.number(*key), version(&session.data))
            }
            Self::Replace(key, _, session, _) => {
                format!("replace {} {}", database.number(*key), version(&session.data))
            }
            Self::Merge(key, session) => {
                format!("merge {} {}", database.number(*key), version(&session.data))
            }
            Self::Touch(key, _) => format!("touch {}", database.number(*key)),
            Self::Find(key) => format!("find {}", database.number(*key)),
            Self::Remove(key) => format!("remove {}", database.number(*key)),
            Self::Take(key) => format!("take {}", database.number(*key)),
            Self::Clear => "clear".to_owned(),
            Self::FindOwned(owner, after) => format!("find sessions of {owner} after {after:?}"),
            Self::RemoveOwned(keys, owner) => {
                let numbers: Vec<_> = keys.iter().map(|key| database.number(*key)).collect();
                format!("remove {numbers:?} of {owner}")
            }
            Self::Open(after) => format!("open after {after:?}"),
            Self::GetMore(cursor) => format!("getMore {cursor:?}"),
            Self::PrimaryTime => "primary time".to_owned(),
        }
    }

    /// Whether the operation belongs to a change stream or its checkpoints.
    pub(crate) fn is_of_a_stream(&self) -> bool {
        matches!(self, Self::Open(_) | Self::GetMore(_) | Self::PrimaryTime)
    }

    /// Whether the operation is a save of a request scope.
    pub(crate) fn is_merge(&self) -> bool {
        matches!(self, Self::Merge(..))
    }

    /// Whether the operation is one step of a call that has many steps and, here, no deadline.
    pub(crate) fn is_paged(&self) -> bool {
        matches!(self, Self::Clear | Self::FindOwned(..) | Self::RemoveOwned(..))
    }

    /// Whether the batcher sends the operation. Then the store knows the outcome of its store call, not of the
    /// wire call.
    pub(crate) fn is_queued(&self) -> bool {
        matches!(self, Self::Find(_) | Self::Replace(..) | Self::Touch(..))
    }
}

/// The outcome in words that are the same in each replay.
pub(crate) fn describe(outcome: &Result<Outcome, Fault>) -> String {
    match outcome {
        Ok(Outcome::Found(found)) => {
            let version = found.as_ref().map(|session| version(&session.data));
            format!("{version:?}")
        }
        Ok(Outcome::Batch(cursor, reply)) => {
            format!("{} changes, token {:?}, {cursor:?}", reply.events.len(), reply.token)
        }
        Ok(Outcome::Owned(page)) => {
            let numbers: Vec<_> = page.sessions.iter().map(|(number, ..)| number).collect();
            format!("{numbers:?}")
        }
        other => format!("{other:?}"),
    }
}
