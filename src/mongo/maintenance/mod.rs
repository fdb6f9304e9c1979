//! Work on many sessions that no single call waits for: re-encryption, owner assignment, counts.

mod assign_owners;
pub(crate) mod live_count;
mod recent;
#[cfg(feature = "encryption")]
pub(crate) mod reencrypt;
