//! Data as JSON text that is encrypted by XChaCha20-Poly1305, in an [envelope](crate::mongo::codec::envelope).
//!
//! Its nonces are drawn: with 192 bits of them no two are ever the same, however many sessions one
//! key sees. AES-256-GCM has 96, and so a bound of 2^32 writes for each key, which an app of 1,000
//! saves a second meets in seven weeks; and it is slow, or leaks its key through the cache, on
//! processors that have no instructions for it.
//!
//! What is bound to the text beside the header is the document's `_id`, so that the data of one
//! session cannot be put in the place of another's.

use chacha20poly1305::aead::inout::InOutBuf;
use chacha20poly1305::aead::{AeadInOut, Generate, KeyInit};
use chacha20poly1305::{Tag, XChaCha20Poly1305, XNonce};

use crate::error::Result;
use crate::mongo::codec::envelope::{Envelope, HEADER, NONCE, TAG, VERSION};
use crate::mongo::codec::keys::Keys;
use crate::mongo::codec::{too_large, unreadable, unstorable};

/// Encrypts a text for the document with this `_id`, with the newest key.
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
    // Past 256 GiB.
    envelope.extend_from_slice(&tag.map_err(|_| too_large("JSON"))?);
    Ok(envelope)
}

/// Decrypts the text in the envelope of the document with this `_id`.
pub(crate) fn decrypt(keys: &Keys, id: &[u8], envelope: &[u8]) -> Result<String> {
    let envelope = Envelope::of(envelope)?;
    let number = envelope.key;
    let key = keys.key(number).ok_or_else(|| {
        unreadable(format!(
            "its data is encrypted with key {number}, which is none of this store's keys"
        ))
    })?;
    let shut = || {
        unreadable(format!(
            "its data does not open with key {number}: either that key is another one than the one \
             it was encrypted with, or the document was altered, or the data is that of another one"
        ))
    };
    let (text, tag) = envelope.sealed.split_last_chunk::<TAG>().ok_or_else(shut)?;
    let mut text = text.to_vec();
    let cipher = XChaCha20Poly1305::new(key.bytes().into());
    let bound = associated_data(envelope.header, id);
    let (nonce, tag) = (XNonce::from(envelope.nonce), Tag::from(*tag));
    cipher
        .decrypt_inout_detached(&nonce, &bound, InOutBuf::from(text.as_mut_slice()), &tag)
        .map_err(|_| shut())?;
    String::from_utf8(text).map_err(|_| unreadable("its data was encrypted and is no text"))
}

/// What is bound to a text without being in it. The header's length is fixed, so no two pairs are the
/// same together.
fn associated_data(header: &[u8], id: &[u8]) -> Vec<u8> {
    [header, id].concat()
}

#[cfg(test)]
mod tests;
