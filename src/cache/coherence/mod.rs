//! What must be right so that no stale entry is served: versions, own writes, and the lease.
//!
//! These modules hold logic only: no I/O, and no clock of their own.

pub(crate) mod lease;
pub(crate) mod own_writes;
pub(crate) mod versions;
