//! The oplog of the simulated database: of one replica set, or of each shard behind a router.
//!
//! As in MongoDB, each entry of one oplog has a time of its own. The changes of one entry (a bulk, a
//! transaction) share that time, and are there all at once. The oplogs of two shards know nothing of each
//! other, so their entries may have the same time.

use crate::session::id::SessionKey;
use crate::session::revision::Rev;

pub(crate) struct Oplog {
    shards: Vec<Shard>,
    /// The time of the oldest entry that is kept. A stream cannot go on from before it.
    oldest: u64,
    /// Which shard the next write that is not about a session goes to.
    next: usize,
    /// The members of the replica set that were primary before, with the time up to which each has replicated
    /// since. None if there are several shards.
    deposed: Vec<u64>,
}

struct Shard {
    /// The time of the newest entry: MongoDB's `lastApplied`.
    applied: u64,
    /// The latest time that the shard has heard of, its own or another's. The next entry is later.
    clock: u64,
    /// The changes that streams report. Of all other entries nothing is kept: streams examine them, and that
    /// moves their tokens.
    changes: Vec<Logged>,
}

/// A change that streams report.
#[derive(Clone, Copy)]
pub(crate) struct Logged {
    pub(crate) time: u64,
    /// `None`: the collection was dropped.
    pub(crate) change: Option<(SessionKey, Option<Rev>)>,
}

impl Oplog {
    pub(crate) fn new(shards: usize) -> Self {
        let shard = || Shard { applied: 1, clock: 1, changes: Vec::new() };
        let shards = (0..shards).map(|_| shard()).collect();
        Self { shards, oldest: 0, next: 0, deposed: Vec::new() }
    }

    pub(crate) fn shards(&self) -> usize {
        self.shards.len()
    }

    /// The shard of a session.
    pub(crate) fn home(&self, number: usize) -> usize {
        number % self.shards.len()
    }

    /// Begins a new entry.
    pub(crate) fn tick(&mut self, shard: usize) {
        let shard = &mut self.shards[shard];
        shard.applied = shard.clock.max(shard.applied) + 1;
        shard.clock = shard.applied;
    }

    /// A write of which streams report nothing.
    pub(crate) fn tick_anywhere(&mut self) -> usize {
        let shard = self.next % self.shards.len();
        self.next += 1;
        self.tick(shard);
        shard
    }

    /// The entries that idle shards write so that streams go on.
    pub(crate) fn tick_everywhere(&mut self) {
        self.gossip(self.applied());
        for shard in 0..self.shards.len() {
            self.tick(shard);
        }
    }

    /// Adds a change to the newest entry.
    pub(crate) fn log(&mut self, shard: usize, change: Option<(SessionKey, Option<Rev>)>) {
        let shard = &mut self.shards[shard];
        shard.changes.push(Logged { time: shard.applied, change });
    }

    /// All shards hear of a time, as they do from each client that has seen it.
    pub(crate) fn gossip(&mut self, time: u64) {
        for shard in &mut self.shards {
            shard.clock = shard.clock.max(time);
        }
    }

    /// The time of the newest entry of all.
    pub(crate) fn applied(&self) -> u64 {
        self.shards.iter().map(|shard| shard.applied).max().unwrap_or(0)
    }

    pub(crate) fn applied_on(&self, shard: usize) -> u64 {
        self.shards[shard].applied
    }

    /// Another member becomes the primary. The one before stays there as a secondary, and feeds its streams.
    pub(crate) fn elect(&mut self) {
        if self.shards.len() == 1 {
            self.deposed.push(self.applied());
            // The entry with which each term begins.
            self.tick(0);
        }
    }

    /// The number of the primary among all members.
    pub(crate) fn primary(&self) -> usize {
        self.deposed.len()
    }

    /// The member that was primary before.
    pub(crate) fn deposed(&self) -> Option<usize> {
        self.deposed.len().checked_sub(1)
    }

    /// The time of the newest entry that a member has.
    pub(crate) fn applied_by(&self, member: usize) -> u64 {
        self.deposed.get(member).copied().unwrap_or_else(|| self.applied())
    }

    /// A member that is primary no more replicates some entries.
    pub(crate) fn replicate(&mut self, member: usize, entries: u64) {
        let applied = self.applied();
        if let Some(replicated) = self.deposed.get_mut(member) {
            *replicated = applied.min(*replicated + entries);
        }
    }

    pub(crate) fn changes(&self, shard: usize) -> &[Logged] {
        &self.shards[shard].changes
    }

    pub(crate) fn lose_history(&mut self) {
        self.oldest = self.applied();
    }

    pub(crate) fn has_lost(&self, time: u64) -> bool {
        time < self.oldest
    }
}
