//! `Oplog`: the oplog of the simulated database. A replica set has one, a sharded cluster one for each shard.
//!
//! As in MongoDB, each entry of one oplog has a time of its own. The changes of one entry (a bulk write, a
//! transaction) share that time and become visible at once. Two shards write independently, so their entries may
//! have the same time.

use crate::session::id::SessionKey;
use crate::session::revision::Rev;

pub(crate) struct Oplog {
    shards: Vec<Shard>,
    /// The time of the oldest entry that is kept. A stream cannot resume from an earlier time.
    oldest: u64,
    /// The shard of the next write that is not about a session.
    next: usize,
    /// The former primaries, each with the time up to which it has replicated. Empty if there are several shards.
    deposed: Vec<u64>,
}

struct Shard {
    /// The time of the newest entry: MongoDB's `lastApplied`.
    applied: u64,
    /// The latest time that the shard knows, its own or another shard's. Its next entry is later.
    clock: u64,
    /// The changes that streams report. Other entries only move `applied`, and with it the tokens of streams.
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

    /// Begins a new entry on a shard.
    pub(crate) fn tick(&mut self, shard: usize) {
        let shard = &mut self.shards[shard];
        shard.applied = shard.clock.max(shard.applied) + 1;
        shard.clock = shard.applied;
    }

    /// Begins an entry that is not about a session, on the shards in turn. Returns the shard.
    pub(crate) fn tick_anywhere(&mut self) -> usize {
        let shard = self.next % self.shards.len();
        self.next += 1;
        self.tick(shard);
        shard
    }

    /// Begins an entry on each shard, as idle shards do so that streams make progress.
    pub(crate) fn tick_everywhere(&mut self) {
        self.gossip(self.applied());
        for shard in 0..self.shards.len() {
            self.tick(shard);
        }
    }

    /// Adds a change to the newest entry of a shard.
    pub(crate) fn log(&mut self, shard: usize, change: Option<(SessionKey, Option<Rev>)>) {
        let shard = &mut self.shards[shard];
        shard.changes.push(Logged { time: shard.applied, change });
    }

    /// Tells all shards a time, as each client does that has seen it.
    pub(crate) fn gossip(&mut self, time: u64) {
        for shard in &mut self.shards {
            shard.clock = shard.clock.max(time);
        }
    }

    /// The time of the newest entry of all shards.
    pub(crate) fn applied(&self) -> u64 {
        self.shards.iter().map(|shard| shard.applied).max().unwrap_or(0)
    }

    pub(crate) fn applied_on(&self, shard: usize) -> u64 {
        self.shards[shard].applied
    }

    /// Another member becomes the primary. The former primary stays as a secondary, and its streams go on.
    pub(crate) fn elect(&mut self) {
        if self.shards.len() == 1 {
            self.deposed.push(self.applied());
            // Each term begins with an entry.
            self.tick(0);
        }
    }

    /// The number of the primary among all members.
    pub(crate) fn primary(&self) -> usize {
        self.deposed.len()
    }

    /// The latest former primary.
    pub(crate) fn deposed(&self) -> Option<usize> {
        self.deposed.len().checked_sub(1)
    }

    /// The time of the newest entry that a member has.
    pub(crate) fn applied_by(&self, member: usize) -> u64 {
        self.deposed.get(member).copied().unwrap_or_else(|| self.applied())
    }

    /// A former primary replicates some entries.
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
