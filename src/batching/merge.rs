//! Merging: a save of a request scope stores the changes of its request, and keeps those of others.

use std::time::Duration;

use crate::batching::{Batcher, Commands, Condition, MergeEnd, NewExpiry, SavePermit, Updated};
use crate::error::{Error, ErrorKind, Result};
use crate::request_scope::changes::{Merged, Saved, ScopedSave};
use crate::runtime::timed_out;
use crate::session::id::SessionKey;
use crate::session::revision::Rev;
use crate::sync::{self, lock};

/// How often a save is sent while others change its session in between. With random waits, this number of
/// failures in a row means that something changes the session without a pause.
const MAX_ATTEMPTS: u32 = 64;
/// The longest wait before the third attempt. It doubles with each further one, up to
/// [`MAX_BACKOFF`].
const FIRST_BACKOFF: Duration = Duration::from_millis(1);
const MAX_BACKOFF: Duration = Duration::from_millis(64);

/// What a merge counts.
#[derive(Default)]
struct Tally {
    attempts: u32,
    conflicts: u64,
}

impl<C: Commands> Batcher<C> {
    /// Stores the changes of a request, and returns what is then stored. `None` if there is no live session.
    ///
    /// Each attempt is an update on condition of a `rev`. The first one builds on the state that an earlier save in
    /// the write queue has left; otherwise on the cached state; otherwise on the loaded one. If the session has
    /// another `rev` by then, the server refuses the update, and the next attempt builds on the newest state. An
    /// attempt whose outcome is unknown is the last one, so the changes are stored at most once.
    pub(super) async fn merge_in_turn(
        self,
        permit: SavePermit<C>,
        key: SessionKey,
        rev: Rev,
        save: ScopedSave,
    ) -> Result<Option<Saved>> {
        let mut tally = Tally::default();
        let outcome = self.attempt_all(&permit, key, rev, &save, &mut tally).await;
        let end = match &outcome {
            Ok(Some(saved)) if saved.is_merged => MergeEnd::Merged,
            Ok(Some(_)) => MergeEnd::Unchanged,
            Ok(None) => MergeEnd::Gone,
            Err(_) => MergeEnd::Failed,
        };
        self.commands.record_merge(end, tally.attempts, tally.conflicts);
        if let Ok(Some(saved)) = &outcome {
            permit.write.set_newest(|| saved.snapshot());
        }
        outcome
    }

    async fn attempt_all(
        &self,
        permit: &SavePermit<C>,
        key: SessionKey,
        rev: Rev,
        save: &ScopedSave,
        tally: &mut Tally,
    ) -> Result<Option<Saved>> {
        let mut state = permit.write.newest().unwrap_or_else(|| save.expected().clone());
        loop {
            let merged = save.apply(&state, self.commands.on_conflict())?;
            tally.attempts += 1;
            tally.conflicts = merged.conflicts;
            let condition = Condition::HasRev(state.rev);
            let expires = if save.is_shorter() {
                NewExpiry::Exactly(merged.expires)
            } else {
                NewExpiry::AtLeast(merged.expires)
            };
            let update = self.commands.replacement(key, rev, &merged.data, expires, condition)?;
            match self.send(update, permit).await? {
                Updated::Stored(expires) => {
                    let Merged { data, is_merged, .. } = merged;
                    let created = state.created;
                    return Ok(Some(Saved { data, expires, rev, created, is_merged }));
                }
                Updated::Gone => return Ok(None),
                Updated::Changed => {}
            }
            if tally.attempts >= MAX_ATTEMPTS {
                return Err(never_at_rest());
            }
            self.back_off(tally.attempts).await;
            self.check_deadline(permit)?;
            tracing::debug!("the session has changed since it was loaded: the save is merged");
            let Some(newest) = self.find_for(key, permit.write.enqueued_at()).await? else {
                self.commands.record_dropped_save();
                return Ok(None);
            };
            // The answer may have come late.
            self.check_deadline(permit)?;
            state = newest.into();
        }
    }

    /// An error if the caller has its timeout error by now, so that no further attempt is sent.
    fn check_deadline(&self, permit: &SavePermit<C>) -> Result<()> {
        let timeout = self.saves.timeout();
        if permit.write.enqueued_at().elapsed() < timeout {
            Ok(())
        } else {
            Err(timed_out(timeout))
        }
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

fn never_at_rest() -> Error {
    Error::new(
        ErrorKind::Conflict,
        format!(
            "the save was not stored: each of its {MAX_ATTEMPTS} attempts found that the session had changed \
             again. Does something change it without a pause, or was its `rev` edited by hand?"
        ),
    )
}
