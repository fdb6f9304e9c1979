//! Keys without a digest and without a secret: every run of a model must be like the last.

use std::hash::{BuildHasherDefault, DefaultHasher};

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct SessionKey([u8; 32]);

pub(crate) type KeyHashing = BuildHasherDefault<DefaultHasher>;

impl SessionKey {
    pub(crate) fn of(id: i128) -> Self {
        let mut bytes = [0; 32];
        bytes[..16].copy_from_slice(&id.to_le_bytes());
        Self(bytes)
    }

    pub(crate) fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }
}
