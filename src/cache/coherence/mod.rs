//! The rules that keep stale entries out of the cache. Logic only: no I/O, and no clock of its own.
//!
//! 1. **Version** ([`versions`]). Each key has a generation. An operation takes a version, which is the
//!    generation and the epoch, before its I/O begins. Each operation that finishes begins a new
//!    generation. It inserts its entry only if its version is current. Otherwise it removes the entry. An
//!    operation that has learned nothing, such as a failed read, is released, and changes nothing.
//! 2. **Fill guard** ([`FillGuard`](crate::cache::FillGuard)). Only the holder of a version can insert.
//!    A guard that is dropped unused removes the entry, since the outcome of its operation is unknown.
//! 3. **Epoch** ([`versions`]). Emptying the cache begins a new epoch of all keys. No entry and no
//!    version of an earlier epoch counts again.
//! 4. **Own write** ([`own_writes`]). A change that the stream reports begins a new generation and
//!    removes the entry, unless it is a write of this store that the cache has taken already.
//! 5. **Lease** ([`lease`]). An entry is served until `max_staleness` after its read began, or after the
//!    latest moment up to which the stream has reported every change.
//!
//! A slow load against a delete:
//!
//! ```text
//!      slow load                    generation                    delete
//!
//!      take version 7                   7
//!      find: MongoDB replies            7                    take version 7
//!         :                             7                    delete: MongoDB replies
//!         : (the reply is slow)         8  <---------------- finish: 7 is current, remove the entry
//!         :                             8                    return Ok
//!      finish: 7 is not 8  ---------->  9
//!      remove the entry, insert none
//! ```
//!
//! A load that begins after the delete has returned has generation 8, so it does not share the slow
//! load's read. If the slow load finishes first, it inserts an entry, and the delete removes that entry
//! before it returns.

pub(crate) mod lease;
pub(crate) mod own_writes;
pub(crate) mod versions;
