//! The encrypted format: data as JSON text, encrypted by XChaCha20-Poly1305, in an
//! [envelope](crate::mongo::codec::envelope).
//!
//! Why this cipher: its nonces are random, and they have 192 bits, so no two are ever the same, however many sessions
//! one key encrypts. AES-256-GCM has nonces of 96 bits. That limits a key to 2^32 writes, which an app with 1,000
//! saves a second reaches in seven weeks. On processors without instructions for AES, it is also slow, or leaks its
//! key through the processor's cache.
//!
//! The header and the `_id` of the document are bound to the text as associated data. So nobody can put the data of
//! one session in the place of another's.

use chacha20poly1305::aead::inout::InOutBuf;
use chacha20poly1305::aead::{AeadInOut, Generate, KeyInit};
use chacha20poly1305::{Tag, XChaCha20Poly1305, XNonce};

use crate::error::Result;
use crate::mongo::codec::envelope::{Envelope, HEADER, NONCE, TAG, VERSION};
use crate::mongo::codec::keys::Keys;
use crate::mongo::codec::{too_large, unreadable, unstorable};

/// Encrypts a text with the newest key, for the document with this `_id`.
pub(crate) fn encrypt(keys: &Keys, id: &[u8], text: &[u8]) -> Result<Vec<u8>> {
    let nonce = <[u8; NONCE]>::try_generate()
        .map_err(|_| unstorable("the system gives no random bytes, which encryption needs"))?;
    encrypt_with(keys, id, text, nonce)
}

fn encrypt_with(keys: &Keys, id: &[u8], text: &[u8], nonce: [u8; NONCE]) -> Result<Vec<u8>> {
    let (number, key) = keys.newest();
    let mut envelope = Vec::with_capacity(HEADER + text.len() + TAG);
    envelope.push(VERSION);
    envelope.extend_from_slice(&number.to_be_bytes());
    envelope.extend_from_slice(&nonce);
    let bound = associated_data(&envelope, id);
    envelope.extend_from_slice(text);
    let cipher = XChaCha20Poly1305::new(key.bytes().into());
    let text = InOutBuf::from(&mut envelope[HEADER..]);
    let tag = cipher.encrypt_inout_detached(&XNonce::from(nonce), &bound, text);
    // It fails only for a text above 256 GiB.
    envelope.extend_from_slice(&tag.map_err(|_| too_large("JSON"))?);
    Ok(envelope)
}

/// Decrypts the text in the envelope of the document with this `_id`.
pub(crate) fn decrypt(keys: &Keys, id: &[u8], envelope: &[u8]) -> Result<String> {
    let envelope = Envelope::of(envelope)?;
    let number = envelope.key;
    let key = keys.key(number).ok_or_else(|| {
        unreadable(format!(
            "its data is encrypted with key {number}, which this store does not have"
        ))
    })?;
    let refused = || {
        unreadable(format!(
            "its data cannot be decrypted with key {number}: the data was encrypted with another key of \
             this number, the document was altered, or the data belongs to another document"
        ))
    };
    let (text, tag) = envelope.encrypted.split_last_chunk::<TAG>().ok_or_else(refused)?;
    let mut text = text.to_vec();
    let cipher = XChaCha20Poly1305::new(key.bytes().into());
    let bound = associated_data(envelope.header, id);
    let nonce = XNonce::from(envelope.nonce);
    let tag = Tag::from(*tag);
    cipher
        .decrypt_inout_detached(&nonce, &bound, InOutBuf::from(text.as_mut_slice()), &tag)
        .map_err(|_| refused())?;
    String::from_utf8(text).map_err(|_| unreadable("its decrypted data is not a text"))
}

/// The associated data of a text. The length of the header is fixed, so two different pairs never give the same
/// bytes.
fn associated_data(header: &[u8], id: &[u8]) -> Vec<u8> {
    [header, id].concat()
}

#[cfg(test)]
mod tests;
