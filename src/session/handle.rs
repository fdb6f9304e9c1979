//! `SessionHandle`: names a session to the people who may end it, without the id that would let them use
//! it.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::error::{Error, ErrorKind, Result};
use crate::session::id::SessionKey;

/// Names a session in a list, so that a user can end it with [`revoke`](crate::MongoStore::revoke). Put it
/// into a hidden field of a form.
///
/// A handle is the [digest](SessionKey) of the session's id. Nobody can use a session with it, since a
/// cookie needs the id, which cannot be computed from the digest. `Display`, `FromStr` and serde write and
/// read it as 64 hexadecimal digits in lower case. `Debug` shows no byte of it.
///
/// ```
/// use tower_sessions_moka_mongodb_store::SessionHandle;
/// # let id = tower_sessions::session::Id::default();
/// let this_one = SessionHandle::of(id);
/// let back: SessionHandle = this_one.to_string().parse()?;
/// assert_eq!(back, this_one);
/// assert!("something else".parse::<SessionHandle>().is_err());
/// # Ok::<_, tower_sessions_moka_mongodb_store::Error>(())
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct SessionHandle(SessionKey);

impl SessionHandle {
    /// The handle of the session with this id. Use it to mark the current session in a list.
    #[must_use]
    pub fn of(id: impl Into<SessionKey>) -> Self {
        Self(id.into())
    }
}

impl From<SessionHandle> for SessionKey {
    fn from(handle: SessionHandle) -> Self {
        handle.0
    }
}

impl fmt::Display for SessionHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&hex::encode(self.0.as_bytes()))
    }
}

impl fmt::Debug for SessionHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SessionHandle(..)")
    }
}

impl FromStr for SessionHandle {
    type Err = Error;

    /// # Errors
    ///
    /// [`Decode`](ErrorKind::Decode) if the text is not a handle.
    fn from_str(text: &str) -> Result<Self> {
        let malformed =
            || Error::new(ErrorKind::Decode, "a session's handle has 64 hexadecimal digits");
        // `hex` takes upper case too, but each handle has only one text.
        if text.bytes().any(|byte| byte.is_ascii_uppercase()) {
            return Err(malformed());
        }
        let mut bytes = [0; 32];
        hex::decode_to_slice(text, &mut bytes).map_err(|_| malformed())?;
        SessionKey::from_bytes(&bytes).map(Self).ok_or_else(malformed)
    }
}

impl Serialize for SessionHandle {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for SessionHandle {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = std::borrow::Cow::<'de, str>::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_handle_is_parsed_only_from_its_own_text() {
        let handle = SessionHandle::of(SessionKey::of(7));
        let text = handle.to_string();
        assert_eq!(text.len(), 64);
        assert_eq!(text.parse::<SessionHandle>().unwrap(), handle);
        assert_ne!(SessionHandle::of(SessionKey::of(8)).to_string(), text);
        let json = serde_json::to_string(&handle).unwrap();
        assert_eq!(json, format!("\"{text}\""));
        assert_eq!(serde_json::from_str::<SessionHandle>(&json).unwrap(), handle);
        for other in [
            "",
            &text[1..],
            &format!("{text}0"),
            &text.replace(|_| true, "g"),
            &text.replace(|_| true, "é")[..64],
            &text.to_uppercase(),
        ] {
            let error = other.parse::<SessionHandle>().unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Decode);
            assert!(error.to_string().contains("64 hexadecimal"), "{error}");
        }
        assert_eq!(format!("{handle:?}"), "SessionHandle(..)");
    }

    #[test]
    fn the_text_of_a_handle_does_not_contain_the_id() {
        let id = 0x0123_4567_89ab_cdef_0123_4567_89ab_cdef_i128;
        let text = SessionHandle::of(SessionKey::of(id)).to_string();
        assert!(!text.contains("89abcdef") && !text.contains("efcdab89"), "{text}");
    }
}
