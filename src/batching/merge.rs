//! Merging: a save of a request scope stores the changes of its request, and keeps those of others.
//!
//! Merges of one session that wait one after the other are sent as one update. Each is applied to what the one
//! before it has made, in the order of the calls.

use std::time::Duration;

use tokio::sync::oneshot;
use tokio::time::Instant;

use crate::backend::{MergeAnswer, MergeOutcome};
use crate::batching::write_queue::JoinedMerge;
use crate::batching::{
    Batcher, Commands, Condition, MergeEnd, MergePermit, NewExpiry, SavePermit, Updated,
};
use crate::error::{Error, ErrorKind, Result};
use crate::request_scope::changes::{Merged, OnConflict, Saved, ScopedSave};
use crate::runtime::timed_out;
use crate::session::id::SessionKey;
use crate::session::revision::Rev;
use crate::session::snapshot::Snapshot;
use crate::sync::{self, lock};

/// How often a save is sent while others change its session in between. With random waits, this number of
/// failures in a row means that something changes the session without a pause.
const MAX_ATTEMPTS: u32 = 64;
/// The longest wait before the third attempt. It doubles with each further one, up to
/// [`MAX_BACKOFF`].
const FIRST_BACKOFF: Duration = Duration::from_millis(1);
const MAX_BACKOFF: Duration = Duration::from_millis(64);

/// The merges that are sent together, in the order of the calls.
struct Group {
    members: Vec<Member>,
    attempts: u32,
}

/// One merge of a group.
struct Member {
    save: ScopedSave,
    enqueued_at: Instant,
    /// `None` for the merge that has the turn.
    joined: Option<oneshot::Sender<MergeAnswer>>,
    /// The keys that had changed on both sides.
    conflicts: u64,
    /// Set once the merge has ended by itself. The others of the group go on.
    refusal: Option<Error>,
}

impl<C: Commands> Batcher<C> {
    /// Stores the changes of a request, and of those that have joined it.
    ///
    /// Each attempt is an update on condition of a `rev`. The first one builds on the state that an earlier save in
    /// the write queue has left; otherwise on the cached state; otherwise on the loaded one. If the session has
    /// another `rev` by then, the server refuses the update, and the next attempt builds on the newest state. An
    /// attempt whose outcome is unknown is the last one, so the changes are stored at most once.
    pub(super) async fn merge_in_turn(
        self,
        permit: MergePermit<C>,
        joined: Vec<JoinedMerge>,
        key: SessionKey,
        rev: Rev,
    ) -> MergeOutcome {
        let MergePermit { permit, save } = permit;
        let first = Member::new(save, permit.write.enqueued_at(), None);
        let joined = joined.into_iter();
        let joined =
            joined.map(|it: JoinedMerge| Member::new(it.save, it.enqueued_at, Some(it.answer)));
        let members = std::iter::once(first).chain(joined).collect();
        let mut group = Group { members, attempts: 0 };
        let sent = self.attempt_all(&permit, key, rev, &mut group).await;
        if let Some(Ok(Some(saved))) = &sent {
            permit.write.set_newest(|| saved.snapshot());
        }
        self.end(group, sent)
    }

    /// Returns the outcome of the last attempt, and `None` if there was none.
    async fn attempt_all(
        &self,
        permit: &SavePermit<C>,
        key: SessionKey,
        rev: Rev,
        group: &mut Group,
    ) -> Option<MergeAnswer> {
        let expected = || group.members.first().map(|first| first.save.expected().clone());
        let mut state = permit.write.newest().or_else(expected)?;
        loop {
            let (merged, update) = self.next_update(key, rev, &state, group)?;
            group.attempts += 1;
            match self.send(update, permit, group.last_began()?).await {
                Ok(Updated::Stored(expires)) => {
                    let created = state.created;
                    let is_merged = merged.keeps_others || group.members.len() > 1;
                    let data = merged.data;
                    return Some(Ok(Some(Saved { data, expires, rev, created, is_merged })));
                }
                Ok(Updated::Gone) => return Some(Ok(None)),
                Ok(Updated::Changed) => {}
                Err(error) => return Some(Err(error)),
            }
            if group.attempts >= MAX_ATTEMPTS {
                return Some(Err(never_at_rest()));
            }
            self.back_off(group.attempts).await;
            tracing::debug!("the session has changed since it was loaded: the save is merged");
            group.refuse_late(self.saves.timeout());
            match self.find_for(key, group.last_began()?).await {
                Ok(Some(newest)) => state = newest.into(),
                Ok(None) => {
                    self.commands.record_dropped_save();
                    return Some(Ok(None));
                }
                Err(error) => return Some(Err(error)),
            }
        }
    }

    /// Applies the changes of the group to a state. Returns what they make, and the update that stores it. `None` if
    /// each merge has ended by itself.
    fn next_update(
        &self,
        key: SessionKey,
        rev: Rev,
        state: &Snapshot,
        group: &mut Group,
    ) -> Option<(Merged, C::Update)> {
        // The answer to the read before may have come late.
        group.refuse_late(self.saves.timeout());
        let merged = group.apply(state, self.commands.on_conflict(), |_| Ok(()))?;
        let encode = |merged: &Merged| {
            let condition = Condition::HasRev(state.rev);
            let expires = if merged.is_shorter {
                NewExpiry::Exactly(merged.expires)
            } else {
                NewExpiry::AtLeast(merged.expires)
            };
            self.commands.replacement(key, rev, &merged.data, expires, condition)
        };
        if let Ok(update) = encode(&merged) {
            return Some((merged, update));
        }
        // One of them makes data that cannot be stored. Only that one is refused.
        let merged = group.apply(state, self.commands.on_conflict(), |it| encode(it).map(drop))?;
        let update = encode(&merged).ok()?;
        Some((merged, update))
    }

    /// Counts the merges of a group, and gives each its answer.
    fn end(&self, group: Group, sent: Option<MergeAnswer>) -> MergeOutcome {
        let mut own = Err(Error::cut_off());
        let mut joined = Vec::new();
        for member in group.members {
            let answer = match (member.refusal, &sent) {
                (Some(refusal), _) => Err(refusal),
                (None, Some(sent)) => sent.clone(),
                (None, None) => Err(Error::cut_off()),
            };
            let end = match &answer {
                Ok(Some(saved)) if saved.is_merged => MergeEnd::Merged,
                Ok(Some(_)) => MergeEnd::Unchanged,
                Ok(None) => MergeEnd::Gone,
                Err(_) => MergeEnd::Failed,
            };
            // A conflict counts if its result is stored.
            let conflicts = if matches!(answer, Ok(Some(_))) { member.conflicts } else { 0 };
            self.commands.record_merge(end, group.attempts, conflicts);
            match member.joined {
                Some(sender) => joined.push((sender, answer)),
                None => own = answer,
            }
        }
        MergeOutcome { sent, own, joined }
    }

    /// Waits after a refused attempt, so that instances which change one session do not keep refusing each
    /// other. No wait after the first one.
    async fn back_off(&self, attempts: u32) {
        let Some(doublings) = attempts.checked_sub(2) else { return };
        let longest = FIRST_BACKOFF.saturating_mul(1 << doublings.min(16)).min(MAX_BACKOFF);
        let wait = longest.mul_f64(lock(&self.rng).f64());
        sync::sleep(wait).await;
    }
}

impl Group {
    /// When the last of the merges was called that have not ended. `None` if all have.
    fn last_began(&self) -> Option<Instant> {
        self.open().map(|member| member.enqueued_at).max()
    }

    fn open(&self) -> impl Iterator<Item = &Member> {
        self.members.iter().filter(|member| member.refusal.is_none())
    }

    /// Ends the merges whose callers have got a timeout error by now.
    fn refuse_late(&mut self, timeout: Duration) {
        for member in &mut self.members {
            if member.enqueued_at.elapsed() >= timeout {
                member.refusal.get_or_insert_with(|| timed_out(timeout));
            }
        }
    }

    /// Applies the merges to a state, one after the other. One that fails, or whose result `check` refuses, ends with
    /// that error. `None` if none is left.
    fn apply(
        &mut self,
        state: &Snapshot,
        on_conflict: Option<&OnConflict>,
        check: impl Fn(&Merged) -> Result<()>,
    ) -> Option<Merged> {
        let mut merged: Option<Merged> = None;
        for member in self.members.iter_mut().filter(|member| member.refusal.is_none()) {
            let applied = match &merged {
                None => member.save.apply(state, on_conflict),
                Some(earlier) => member.save.apply_after(earlier, on_conflict),
            };
            match applied.and_then(|applied| check(&applied).map(|()| applied)) {
                Ok(applied) => {
                    member.conflicts = applied.conflicts;
                    merged = Some(applied);
                }
                Err(error) => member.refusal = Some(error),
            }
        }
        merged
    }
}

impl Member {
    fn new(
        save: ScopedSave,
        enqueued_at: Instant,
        joined: Option<oneshot::Sender<MergeAnswer>>,
    ) -> Self {
        Self { save, enqueued_at, joined, conflicts: 0, refusal: None }
    }
}

fn never_at_rest() -> Error {
    Error::new(
        ErrorKind::Conflict,
        format!(
            "the save was not stored: each of its {MAX_ATTEMPTS} attempts found that the session had changed \
             again. Does something change it without a pause, or was its `rev` edited by hand?"
        ),
    )
}
