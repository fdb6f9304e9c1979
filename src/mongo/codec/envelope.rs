//! `Envelope`: the layout of encrypted data. A store without keys reads it too, to say which key is missing.
//!
//! ```text
//! version (1 byte: 1) | id of the key (4, big-endian) | nonce (24) | JSON text, encrypted | tag (16)
//! ```

use crate::error::Result;
use crate::mongo::codec::unreadable;

/// The version of the envelope that this release writes: XChaCha20-Poly1305 over JSON text, with the header and the
/// `_id` of the document as associated data.
pub(crate) const VERSION: u8 = 1;

/// The bytes before the nonce.
const PREFIX: usize = 1 + size_of::<u32>();

/// The bytes before the encrypted text.
pub(crate) const HEADER: usize = PREFIX + NONCE;
pub(crate) const NONCE: usize = 24;
pub(crate) const TAG: usize = 16;

/// The parts of an envelope, without decryption.
#[cfg_attr(
    not(feature = "encryption"),
    allow(dead_code, reason = "without the feature nothing is decrypted")
)]
pub(crate) struct Envelope<'a> {
    pub(crate) key: u32,
    pub(crate) header: &'a [u8],
    pub(crate) nonce: [u8; NONCE],
    /// The encrypted text and its tag.
    pub(crate) encrypted: &'a [u8],
}

impl<'a> Envelope<'a> {
    pub(crate) fn of(bytes: &'a [u8]) -> Result<Self> {
        let too_short = || unreadable("its `data` is a binary, and too short for encrypted data");
        match bytes.first() {
            Some(&VERSION) => {}
            Some(&other) => {
                return Err(unreadable(format!(
                    "its `data` is a binary of version {other}, and this version reads encrypted \
                     data of version {VERSION}; a newer version may have written it"
                )));
            }
            None => return Err(too_short()),
        }
        let (header, encrypted) = bytes.split_at_checked(HEADER).ok_or_else(too_short)?;
        let key = header[1..PREFIX].try_into();
        let nonce = header[PREFIX..].try_into();
        match (key, nonce) {
            (Ok(key), Ok(nonce)) if encrypted.len() >= TAG => {
                Ok(Self { key: u32::from_be_bytes(key), header, nonce, encrypted })
            }
            _ => Err(too_short()),
        }
    }
}
