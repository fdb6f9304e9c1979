//! Work on many sessions, beside the calls of requests: re-encryption, owner assignment, the reads of a warm-up, and
//! the gauge of live sessions.

mod assign_owners;
pub(crate) mod live_count;
mod recent;
#[cfg(feature = "encryption")]
pub(crate) mod reencrypt;
