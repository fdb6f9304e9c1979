//! What names a session to those who may end it, and to nobody who would use it.

use std::fmt::{self, Write};
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::error::{Error, ErrorKind, Result};
use crate::session::id::SessionKey;

/// Names a session in a list, to end it with [`revoke`](crate::MongoStore::revoke): for the hidden
/// field of a form.
///
/// It is the [digest](SessionKey) of the session's id. Nobody can use a session with it, since the id
/// that a cookie needs cannot be computed from it. As text it has 64 hexadecimal digits; it is written
/// and read by `Display`, `FromStr` and serde. `Debug` shows no byte.
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
    /// The handle of the session with this id: to mark, in a list, the one that asks for it.
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
        let mut text = String::with_capacity(64);
        for byte in self.0.as_bytes() {
            write!(text, "{byte:02x}")?;
        }
        f.pad(&text)
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
    /// [`Decode`](ErrorKind::Decode) for a text that is none of a handle's.
    fn from_str(text: &str) -> Result<Self> {
        let malformed =
            || Error::new(ErrorKind::Decode, "a session's handle has 64 hexadecimal digits");
        let digits = text.as_bytes();
        let mut bytes = [0; 32];
        if digits.len() != 2 * bytes.len() {
            return Err(malformed());
        }
        for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
            let (high, low) = (digit(pair[0]), digit(pair[1]));
            *byte = high.zip(low).map(|(high, low)| 16 * high + low).ok_or_else(malformed)?;
        }
        SessionKey::from_bytes(&bytes).map(Self).ok_or_else(malformed)
    }
}

/// One text for each handle: upper case is none of ours.
fn digit(char: u8) -> Option<u8> {
    match char {
        b'0'..=b'9' => Some(char - b'0'),
        b'a'..=b'f' => Some(char - b'a' + 10),
        _ => None,
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
    fn a_handle_is_its_own_text_and_no_other() {
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
            &text.to_uppercase(),
        ] {
            let error = other.parse::<SessionHandle>().unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Decode);
            assert!(error.to_string().contains("64 hexadecimal"), "{error}");
        }
        assert_eq!(format!("{handle:?}"), "SessionHandle(..)");
    }

    #[test]
    fn a_handle_is_not_the_id() {
        let id = 0x0123_4567_89ab_cdef_0123_4567_89ab_cdef_i128;
        let text = SessionHandle::of(SessionKey::of(id)).to_string();
        assert!(!text.contains("89abcdef") && !text.contains("efcdab89"), "{text}");
    }
}
