//! `Entry`: one cached session.

use std::borrow::Cow;
use std::fmt;
use std::mem::size_of;
use std::sync::Arc;

use crate::cache::compact::{self, Origin};
use crate::cache::weight;
use crate::error::{Error, ErrorKind, Result};
use crate::session::snapshot::{SharedData, Snapshot};
use crate::session::{Data, Session, is_same_data};
use crate::time::{Moment, WallTime};

/// A cached session. Cheap to clone, since clones share the payload.
#[derive(Clone)]
pub(crate) struct Entry {
    times: Times,
    expires: WallTime,
    payload: Payload,
}

#[derive(Clone)]
enum Payload {
    Plain(Arc<Plain>),
    /// In the form of [`compact`]. Each load decodes it.
    Compact(Arc<str>),
}

struct Plain {
    data: Data,
    /// Here and not in the entry, which is copied at each hit.
    origin: Origin,
    /// Kept, since to compute it visits each value of the data.
    weight: u32,
}

/// An entry's compact payload, by itself.
struct Compact(Arc<str>);

impl SharedData for Plain {
    fn data(&self) -> Result<Cow<'_, Data>> {
        Ok(Cow::Borrowed(&self.data))
    }
}

impl SharedData for Compact {
    fn data(&self) -> Result<Cow<'_, Data>> {
        compact::decode_with(&self.0).map(Cow::Owned).ok_or_else(unreadable)
    }
}

/// What decides for how long an entry may be served.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Times {
    /// The epoch in which the entry may be served.
    pub(crate) epoch: u64,
    /// When the read or the write that the entry comes from began.
    pub(crate) read_at: Moment,
}

impl Entry {
    pub(crate) fn new(session: Session, times: Times) -> Self {
        let Session { data, expires, rev, created } = session;
        let weight = weight::of_plain(&data, size_of::<Plain>());
        let origin = Origin { rev, created };
        Self { times, expires, payload: Payload::Plain(Arc::new(Plain { data, origin, weight })) }
    }

    /// The same entry in the compact form, or as it is if its data cannot be encoded.
    pub(crate) fn compacted(&self) -> Self {
        let mut entry = self.clone();
        if let Payload::Plain(plain) = &self.payload
            && let Some(encoded) = compact::encode_with(plain.origin, &plain.data)
        {
            entry.payload = Payload::Compact(encoded);
        }
        entry
    }

    /// A copy of the data and the expiry. It has no `rev` and no `created`: no caller of a load asks for them, and
    /// a compact entry would have to decode them at each hit.
    pub(crate) fn session(&self) -> Result<Session> {
        let data = match &self.payload {
            Payload::Plain(plain) => plain.data.clone(),
            Payload::Compact(encoded) => compact::decode_with(encoded).ok_or_else(unreadable)?,
        };
        Ok(Session::new(data, self.expires))
    }

    /// The session with its data shared, not copied.
    pub(crate) fn snapshot(&self) -> Snapshot {
        let data: Arc<dyn SharedData> = match &self.payload {
            Payload::Plain(plain) => Arc::clone(plain) as _,
            Payload::Compact(encoded) => Arc::new(Compact(Arc::clone(encoded))),
        };
        let Origin { rev, created } = self.origin();
        Snapshot { data, expires: self.expires, rev, created }
    }

    fn origin(&self) -> Origin {
        match &self.payload {
            Payload::Plain(plain) => plain.origin,
            Payload::Compact(encoded) => compact::origin(encoded).unwrap_or_default(),
        }
    }

    /// The same session with another expiry.
    pub(crate) fn with_expiry(&self, expires: WallTime, times: Times) -> Self {
        Self { times, expires, payload: self.payload.clone() }
    }

    /// Whether the session has this data.
    pub(crate) fn has_data(&self, data: &Data) -> bool {
        match &self.payload {
            Payload::Plain(plain) => is_same_data(&plain.data, data),
            Payload::Compact(encoded) => {
                compact::decode_with(encoded).is_some_and(|decoded| is_same_data(&decoded, data))
            }
        }
    }

    pub(crate) fn expires(&self) -> WallTime {
        self.expires
    }

    pub(crate) fn created(&self) -> Option<WallTime> {
        self.origin().created
    }

    pub(crate) fn times(&self) -> &Times {
        &self.times
    }

    /// The bytes of heap that the entry takes, including its part of the cache's tables.
    pub(crate) fn weight(&self) -> u32 {
        match &self.payload {
            Payload::Plain(plain) => plain.weight,
            Payload::Compact(encoded) => weight::of_compact(encoded.len()),
        }
    }
}

#[cold]
fn unreadable() -> Error {
    Error::new(ErrorKind::Decode, "a cached session cannot be read")
}

impl fmt::Debug for Entry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Entry")
            .field("times", &self.times)
            .field("weight", &self.weight())
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::time::Clock;

    #[test]
    fn debug_output_has_no_session_data() {
        let times = Times { epoch: 0, read_at: Clock::system().now() };
        let data = Data::from([("card".to_owned(), json!("4111"))]);
        let entry = Entry::new(Session::new(data, WallTime::from_millis(0)), times);
        let text = format!("{entry:?}");
        assert!(!text.contains("card") && !text.contains("4111"), "{text}");
    }
}
