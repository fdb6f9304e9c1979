//! `Snapshot`: a session as it was stored, with its data shared.

use std::borrow::Cow;
use std::sync::Arc;

use crate::error::Result;
use crate::session::revision::Rev;
use crate::session::{Data, Session};
use crate::time::WallTime;

/// The data of a session, shared with whoever else holds it.
pub(crate) trait SharedData: Send + Sync {
    /// The data, decoded if it is held in another form.
    fn data(&self) -> Result<Cow<'_, Data>>;
}

impl SharedData for Data {
    fn data(&self) -> Result<Cow<'_, Data>> {
        Ok(Cow::Borrowed(self))
    }
}

/// A state of a session that the database has, or had. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Snapshot {
    pub(crate) data: Arc<dyn SharedData>,
    pub(crate) expires: WallTime,
    pub(crate) rev: Option<Rev>,
    pub(crate) created: Option<WallTime>,
}

impl From<Session> for Snapshot {
    fn from(session: Session) -> Self {
        let Session { data, expires, rev, created } = session;
        Self { data: Arc::new(data), expires, rev, created }
    }
}
