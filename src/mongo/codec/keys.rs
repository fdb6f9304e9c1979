//! The keys that sessions' data is encrypted with.

use std::fmt;
use std::sync::Arc;

use base64::Engine;
use base64::alphabet::{STANDARD, URL_SAFE};
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};
use zeroize::Zeroizing;

use crate::error::{Error, Result};

/// How many bytes a key has.
const BYTES: usize = 32;

/// A key of 32 bytes that sessions' data is encrypted with.
///
/// Make one with `openssl rand -base64 32`; a passphrase is not a key. Keep it with the app's other secrets, in a
/// secret store or an environment variable, and never in the database or beside its backups. The key lets its owner
/// read every session. If the key is lost, the sessions are lost.
///
/// Clones share the bytes. They are overwritten when the last clone is dropped, and `Debug` does not show them. If
/// you make a key from a text or an array, wiping that is up to you.
#[derive(Clone)]
pub struct Key(Arc<Zeroizing<[u8; BYTES]>>);

impl Key {
    /// Returns the key with these bytes.
    #[must_use]
    pub fn from_bytes(bytes: &[u8; BYTES]) -> Self {
        // The bytes are copied directly to the heap, so no copy of them is left on the stack.
        let mut key = Arc::new(Zeroizing::new([0; BYTES]));
        if let Some(target) = Arc::get_mut(&mut key) {
            target.copy_from_slice(bytes);
        }
        Self(key)
    }

    /// Reads a key in hexadecimal: 64 digits in any case. White space around it is ignored.
    ///
    /// # Errors
    ///
    /// [`Config`](crate::ErrorKind::Config) if the text is anything else. The error does not quote it.
    pub fn from_hex(text: &str) -> Result<Self> {
        let text = text.trim();
        let mut bytes = Zeroizing::new([0; BYTES]);
        if text.len() != 2 * BYTES {
            return Err(malformed("hexadecimal", "64 digits", text));
        }
        match hex::decode_to_slice(text, bytes.as_mut_slice()) {
            Ok(()) => Ok(Self::from_bytes(&bytes)),
            Err(_) => Err(malformed("hexadecimal", "64 digits", text)),
        }
    }

    /// Reads a key in base64, as `openssl rand -base64 32` prints it: 43 characters and one `=`, which may be left
    /// out. The alphabet has `+` and `/`, or `-` and `_`. White space around it is ignored.
    ///
    /// # Errors
    ///
    /// [`Config`](crate::ErrorKind::Config) if the text is anything else. The error does not quote it.
    pub fn from_base64(text: &str) -> Result<Self> {
        let text = text.trim();
        let config =
            GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent);
        let alphabet = if text.contains(['-', '_']) { URL_SAFE } else { STANDARD };
        // The decoder wants room for its own estimate of the longest text.
        let mut bytes = Zeroizing::new([0; BYTES + 4]);
        let decoded = match text.len() {
            43 | 44 => {
                GeneralPurpose::new(&alphabet, config).decode_slice(text, bytes.as_mut_slice())
            }
            _ => return Err(malformed("base64", "43 characters and one `=`", text)),
        };
        match (decoded, bytes.first_chunk()) {
            (Ok(BYTES), Some(key)) => Ok(Self::from_bytes(key)),
            _ => Err(malformed("base64", "43 characters and one `=`", text)),
        }
    }

    pub(crate) fn bytes(&self) -> &[u8; BYTES] {
        &self.0
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Key(..)")
    }
}

fn malformed(form: &str, wanted: &str, text: &str) -> Error {
    let found = match text.chars().count() {
        0 => "it is empty".to_owned(),
        count => format!("it has {count} characters, or one that {form} does not have"),
    };
    Error::config(format!(
        "the text is not an encryption key: {BYTES} bytes in {form} are {wanted}, and {found} (make one \
         with `openssl rand`)"
    ))
}

/// The keys of a store, each with a number of your choice. The newest key encrypts; all keys decrypt.
///
/// The number is stored in front of the encrypted data, so never give it to another key. To change keys, do each step
/// on all instances before the next step:
///
/// 1. Add the new key without using it: `Keys::new(1, old).and_old(2, new)`.
/// 2. Make it the newest: `Keys::new(2, new).and_old(1, old)`.
/// 3. Call [`reencrypt`](crate::MongoStore::reencrypt), which encrypts all sessions with the new key.
/// 4. Remove the old key. Destroy it when no backup needs it any longer.
///
/// # Examples
///
/// ```
/// use tower_sessions_moka_mongodb_store::{Key, Keys, MongoStore};
///
/// # fn main() -> tower_sessions_moka_mongodb_store::Result<()> {
/// # let this_year = "3q2+7wAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=";
/// # let last_year = "00".repeat(32);
/// // From the environment, a file or a secret store.
/// let newest = Key::from_base64(this_year)?;
/// let old = Key::from_hex(&last_year)?;
///
/// let keys = Keys::new(2027, newest).and_old(2026, old);
/// assert_eq!(format!("{keys:?}"), "Keys { newest: 2027, old: [2026], require_encrypted: false }");
///
/// let store = MongoStore::builder().uri("mongodb://localhost/app").encryption(keys);
/// # drop(store);
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
#[must_use = "keys do nothing until they are given to a builder"]
pub struct Keys {
    newest: (u32, Key),
    old: Vec<(u32, Key)>,
    require_encrypted: bool,
}

impl Keys {
    /// Returns keys with this key as the newest, which encrypts.
    pub fn new(id: u32, key: Key) -> Self {
        Self { newest: (id, key), old: Vec::new(), require_encrypted: false }
    }

    /// Adds a key that only decrypts. If two keys have the same id, `build` fails.
    pub fn and_old(mut self, id: u32, key: Key) -> Self {
        self.old.push((id, key));
        self
    }

    /// Refuses sessions that are not encrypted, with a [`Decode`](crate::ErrorKind::Decode) error. Default: they are
    /// read, and encrypted by their next save.
    ///
    /// Without this, anybody who may write to the database can put a plain session in the place of an encrypted one.
    /// Switch it on once every instance encrypts, and [`reencrypt`](crate::MongoStore::reencrypt) is complete.
    pub fn require_encrypted(mut self) -> Self {
        self.require_encrypted = true;
        self
    }

    pub(crate) fn newest(&self) -> (u32, &Key) {
        (self.newest.0, &self.newest.1)
    }

    pub(crate) fn key(&self, id: u32) -> Option<&Key> {
        std::iter::once(&self.newest).chain(&self.old).find(|key| key.0 == id).map(|key| &key.1)
    }

    pub(crate) fn requires_encrypted(&self) -> bool {
        self.require_encrypted
    }

    /// Checks that no two keys have the same id.
    pub(crate) fn checked(self) -> Result<Self> {
        let mut ids: Vec<_> =
            std::iter::once(&self.newest).chain(&self.old).map(|it| it.0).collect();
        ids.sort_unstable();
        match ids.windows(2).find(|pair| pair[0] == pair[1]) {
            None => Ok(self),
            Some(pair) => Err(Error::config(format!(
                "two encryption keys have the id {}: give each an id of its own",
                pair[0]
            ))),
        }
    }
}

/// Shows the ids of the keys, and nothing of the keys themselves.
impl fmt::Debug for Keys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Keys")
            .field("newest", &self.newest.0)
            .field("old", &self.old.iter().map(|key| key.0).collect::<Vec<_>>())
            .field("require_encrypted", &self.require_encrypted)
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;

    const HEX: &str = "00fbff102030405060708090a0b0c0d0e0f0112233445566778899aabbccddee";
    const BASE64: &str = "APv/ECAwQFBgcICQoLDA0ODwESIzRFVmd4iZqrvM3e4=";

    #[test]
    fn a_key_is_the_same_from_bytes_hex_and_base64() {
        let bytes = *Key::from_hex(HEX).unwrap().bytes();
        assert_eq!(bytes[..4], [0, 0xfb, 0xff, 0x10]);
        assert_eq!(bytes, *Key::from_bytes(&bytes).bytes());
        let url_safe = BASE64.replace('/', "_");
        let spaced = format!(" {BASE64}\n");
        for text in [BASE64, BASE64.trim_end_matches('='), &url_safe, &spaced] {
            assert_eq!(*Key::from_base64(text).unwrap().bytes(), bytes, "{text}");
        }
        let hex = HEX.to_uppercase() + "\r\n";
        assert_eq!(*Key::from_hex(&hex).unwrap().bytes(), bytes);
    }

    #[test]
    fn a_malformed_key_is_refused_and_not_quoted() {
        let long = HEX.to_owned() + "00";
        let mixed = BASE64.replace('E', "-");
        for text in ["", "secret", &HEX[1..], &long, &HEX.replace('f', "g"), &HEX.replace('f', "é")]
        {
            let error = Key::from_hex(text).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Config);
            assert!(text.is_empty() || !error.to_string().contains(text), "{error}");
        }
        for text in ["", "secret", HEX, &mixed, &BASE64[1..], &BASE64.replace('=', "A")] {
            let error = Key::from_base64(text).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Config);
            assert!(text.is_empty() || !error.to_string().contains(text), "{error}");
        }
    }

    #[test]
    fn two_keys_with_one_id_are_refused() {
        let key = || Key::from_hex(HEX).unwrap();
        assert!(Keys::new(1, key()).and_old(2, key()).checked().is_ok());
        for keys in [
            Keys::new(7, key()).and_old(7, key()),
            Keys::new(1, key()).and_old(7, key()).and_old(2, key()).and_old(7, key()),
        ] {
            let error = keys.checked().unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Config);
            assert!(error.to_string().contains("id 7"), "{error}");
        }
    }

    #[test]
    fn debug_output_shows_no_key() {
        let key = Key::from_bytes(&[0xab; BYTES]);
        let keys = Keys::new(7, key.clone()).and_old(5, key.clone());
        let shown = format!("{key:?} {key:#?} {keys:?} {keys:#?}").to_lowercase();
        for bytes in ["171", "0xab", "abab", "q6ur"] {
            assert!(!shown.contains(bytes), "{shown}");
        }
        assert!(shown.contains("newest: 7, old: [5]"), "{shown}");
    }

    #[test]
    fn bytes_are_wiped_with_the_last_clone() {
        fn is_wiped<T: zeroize::ZeroizeOnDrop>(_: &T) {}
        let key = Key::from_bytes(&[1; BYTES]);
        let clone = key.clone();
        is_wiped(&*key.0);
        assert!(Arc::ptr_eq(&key.0, &clone.0), "a clone has bytes of its own");
    }
}
