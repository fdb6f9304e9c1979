//! `SessionKey`: the digest of a session's id, by which both tiers find the session.

use std::fmt;
use std::hash::{BuildHasher, Hash, Hasher};

use sha2::{Digest, Sha256};

use crate::sync::RandomState;

/// A session's key: the SHA-256 digest of the 16 bytes of its id.
///
/// It is the `_id` in MongoDB and the key in the cache. The id itself is in the cookie, and does not go
/// further than the public methods of the stores. So an attacker who reads the database or a memory dump of
/// the cache finds no usable cookie, and the time of a look-up reveals nothing about ids.
///
/// Methods take `impl Into<SessionKey>`, so you can pass an id. `Debug` shows no byte of the key.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct SessionKey([u8; 32]);

impl SessionKey {
    pub(crate) fn of(id: i128) -> Self {
        // Little-endian, as the id is written into the cookie.
        Self(Sha256::digest(id.to_le_bytes()).into())
    }

    /// `None` unless there are 32 bytes.
    pub(crate) fn from_bytes(bytes: &[u8]) -> Option<Self> {
        bytes.try_into().ok().map(Self)
    }

    /// The 32 bytes of the key. Use them to find a session by its `_id` in
    /// [`collection()`](crate::MongoStore::collection).
    #[must_use]
    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    fn word(&self, index: usize) -> u64 {
        let mut word = [0; 8];
        word.copy_from_slice(&self.0[8 * index..8 * index + 8]);
        u64::from_le_bytes(word)
    }
}

impl From<tower_sessions_core::session::Id> for SessionKey {
    fn from(id: tower_sessions_core::session::Id) -> Self {
        Self::of(id.0)
    }
}

impl From<&tower_sessions_core::session::Id> for SessionKey {
    fn from(id: &tower_sessions_core::session::Id) -> Self {
        Self::of(id.0)
    }
}

#[cfg(feature = "tower-sessions-014")]
impl From<tower_sessions_core_014::session::Id> for SessionKey {
    fn from(id: tower_sessions_core_014::session::Id) -> Self {
        Self::of(id.0)
    }
}

#[cfg(feature = "tower-sessions-014")]
impl From<&tower_sessions_core_014::session::Id> for SessionKey {
    fn from(id: &tower_sessions_core_014::session::Id) -> Self {
        Self::of(id.0)
    }
}

impl fmt::Debug for SessionKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SessionKey(..)")
    }
}

impl Hash for SessionKey {
    fn hash<H: Hasher>(&self, state: &mut H) {
        state.write_u64(self.word(0));
        state.write_u64(self.word(1));
    }
}

/// Hashes keys for the cache's tables.
///
/// A digest is uniform, but an attacker could search for invented ids whose digests share a bucket. So a
/// hash mixes two words of the digest with two secret seeds, by one multiplication whose halves are combined.
#[derive(Clone, Debug)]
pub(crate) struct KeyHashing {
    seeds: [u64; 2],
}

impl Default for KeyHashing {
    fn default() -> Self {
        let random = RandomState::new();
        Self { seeds: [random.hash_one(0), random.hash_one(1)] }
    }
}

impl BuildHasher for KeyHashing {
    type Hasher = KeyHasher;

    fn build_hasher(&self) -> KeyHasher {
        KeyHasher { seeds: self.seeds, words: [0; 2], next: 0 }
    }
}

/// The hasher of [`KeyHashing`]. Only for [`SessionKey`].
#[derive(Debug)]
pub(crate) struct KeyHasher {
    seeds: [u64; 2],
    words: [u64; 2],
    next: usize,
}

impl Hasher for KeyHasher {
    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.write_u64(u64::from(*byte));
        }
    }

    fn write_u64(&mut self, word: u64) {
        let at = self.next & 1;
        self.words[at] = self.words[at].rotate_left(5) ^ word;
        self.next += 1;
    }

    fn finish(&self) -> u64 {
        let product = u128::from(self.words[0] ^ self.seeds[0])
            .wrapping_mul(u128::from(self.words[1] ^ self.seeds[1]));
        #[allow(clippy::cast_possible_truncation, reason = "both halves are combined")]
        let folded = (product >> 64) as u64 ^ product as u64;
        folded
    }
}

/// A session's id, between a public method and the key.
///
/// It lives no longer than a call. `Debug` does not show it.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct RawId(pub(crate) i128);

impl RawId {
    /// A new id: 128 bits from the generator of tower-sessions, which the operating system seeds.
    pub(crate) fn random() -> Self {
        Self(tower_sessions_core::session::Id::default().0)
    }

    pub(crate) fn key(self) -> SessionKey {
        SessionKey::of(self.0)
    }
}

impl fmt::Debug for RawId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("RawId(..)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_the_sha_256_of_the_ids_bytes() {
        // Another implementation computed this digest of 16 zero bytes.
        let expected = 0x3747_08ff_f771_9dd5_979e_c875_d56c_d228_u128.to_be_bytes();
        assert_eq!(SessionKey::of(0).as_bytes()[..16], expected);
        let expected = 0x6f6d_3cf7_ec31_7a3b_2563_2aab_28ec_37bb_u128.to_be_bytes();
        assert_eq!(SessionKey::of(0).as_bytes()[16..], expected);
    }

    #[test]
    fn debug_output_has_no_byte_of_a_key() {
        assert_eq!(format!("{:?}", SessionKey::of(42)), "SessionKey(..)");
    }

    #[test]
    fn hashes_spread_over_all_buckets_and_depend_on_the_seeds() {
        let hashing = KeyHashing::default();
        let mut buckets = [0_u32; 256];
        for id in 0..25_600 {
            let hash = hashing.hash_one(SessionKey::of(id));
            buckets[usize::try_from(hash & 255).unwrap()] += 1;
        }
        assert!(buckets.iter().all(|count| (40..=180).contains(count)), "{buckets:?}");
        let key = SessionKey::of(1);
        assert_ne!(hashing.hash_one(key), KeyHashing::default().hash_one(key));
    }
}
