//! Operations of which nobody waits for the end, and which give way to all others.

use std::collections::hash_map::Entry as MapEntry;

use crate::cache::coherence::versions::{Version, VersionTable};
use crate::session::id::SessionKey;

impl<F: Clone> VersionTable<F> {
    /// A stamp for a read that is about to begin, if nobody else works on the key.
    pub(crate) fn take_version_if_idle(&self, key: SessionKey) -> Option<Version> {
        let mut shard = self.shard(key);
        if shard.contains_key(&key) {
            return None;
        }
        Some(self.insert_version(&mut shard, key, false))
    }

    /// Ends a read. Runs `act`, which may leave an entry, under the key's lock if the stamp is
    /// current and nobody else works on the key. Otherwise the read is as if it had not been, like one
    /// that is [released](Self::release): it has left nothing, so others need not know of it, and what
    /// they leave is theirs.
    #[allow(clippy::needless_pass_by_value, reason = "a stamp is finished once")]
    pub(crate) fn finish_if_idle(&self, stamp: Version, act: impl FnOnce()) -> bool {
        let mut shard = self.shard(stamp.key);
        let MapEntry::Occupied(mut slot) = shard.entry(stamp.key) else { return false };
        let state = slot.get_mut();
        let current = (state.generation, self.epoch()) == (stamp.generation, stamp.epoch);
        state.remove_version(&stamp);
        if state.versions > 0 {
            return false;
        }
        slot.remove();
        if current {
            act();
        }
        current
    }
}
