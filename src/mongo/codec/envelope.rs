//! The envelope of encrypted data, as far as one without keys can read it: who may open it.
//!
//! ```text
//! version (1 byte: 1) | id of the key (4, big-endian) | nonce (24) | JSON text, encrypted | tag (16)
//! ```

use crate::error::Result;
use crate::mongo::codec::unreadable;

/// The version of the envelope that this release writes: XChaCha20-Poly1305 over JSON text, bound to
/// the header and to the document's `_id`.
pub(crate) const VERSION: u8 = 1;

const ID: usize = 1 + size_of::<u32>();

/// The bytes before the encrypted text.
pub(crate) const HEADER: usize = ID + NONCE;
pub(crate) const NONCE: usize = 24;
pub(crate) const TAG: usize = 16;

/// An envelope, taken apart and not opened.
#[cfg_attr(
    not(feature = "encryption"),
    allow(dead_code, reason = "without keys nothing is opened")
)]
pub(crate) struct Envelope<'a> {
    pub(crate) key: u32,
    pub(crate) header: &'a [u8],
    pub(crate) nonce: [u8; NONCE],
    /// With its tag.
    pub(crate) sealed: &'a [u8],
}

impl<'a> Envelope<'a> {
    pub(crate) fn of(bytes: &'a [u8]) -> Result<Self> {
        let torn = || unreadable("its `data` is a binary, and too short for encrypted data");
        match bytes.first() {
            Some(&VERSION) => {}
            Some(&other) => {
                return Err(unreadable(format!(
                    "its `data` is a binary of version {other}, and this version reads encrypted \
                     data of version {VERSION}; a newer version may have written it"
                )));
            }
            None => return Err(torn()),
        }
        let (header, sealed) = bytes.split_at_checked(HEADER).ok_or_else(torn)?;
        let (key, nonce) = (&header[1..ID], &header[ID..]);
        match (key.try_into(), nonce.try_into()) {
            (Ok(key), Ok(nonce)) if sealed.len() >= TAG => {
                Ok(Self { key: u32::from_be_bytes(key), header, nonce, sealed })
            }
            _ => Err(torn()),
        }
    }
}
