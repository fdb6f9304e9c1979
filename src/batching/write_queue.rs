//! [`WriteQueue`]: sends the saves of one session one after the other, in the order of the calls.
//!
//! A save runs on if its caller goes away. Without this queue, the next save of the same session could
//! overtake it on another connection and be acknowledged. The earlier save would then overwrite it
//! (invariants I2 and I6 of `ARCHITECTURE.md`). So a save holds its place until it has ended, even if its
//! caller has a timeout error already.
//!
//! A delete does not use the queue: it is final, and a save that comes after it finds no session.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::oneshot::{self, error::TryRecvError};
use tokio::time::Instant;

use crate::backend::MergeAnswer;
use crate::error::{Error, ErrorKind, Result};
use crate::request_scope::changes::ScopedSave;
use crate::runtime::timed_out;
use crate::session::id::{KeyHashing, SessionKey};
use crate::session::snapshot::Snapshot;
use crate::sync::{Mutex, MutexGuard, lock};

/// The pending saves of each session. A session without any has no entry, so an idle store holds
/// nothing. A blocking lock, since nothing awaits while it is held.
#[derive(Clone, Default)]
pub(crate) struct WriteQueue(Arc<Mutex<KeyQueues>>);

type KeyQueues = HashMap<SessionKey, KeyQueue, KeyHashing>;

/// The most pending saves of one session. A visitor who saves faster than MongoDB answers must not use
/// up the calls of all visitors.
const MAX_PER_KEY: usize = 256;

/// The pending saves of one session. It is a list: each permit knows its predecessor.
struct KeyQueue {
    tail: Predecessor,
    len: usize,
    /// What the latest acknowledged save of a request scope has stored. A save that waits can build on it
    /// without a read. It may be outdated.
    newest: Option<Snapshot>,
    /// Where merges may join the last permit, if that is for a merge.
    tail_group: Option<MergeGroup>,
}

/// The merges that join one that waits.
#[derive(Clone)]
struct MergeGroup {
    /// When the first one was called.
    began: Instant,
    /// `None` once its turn has come.
    joined: Arc<Mutex<Option<Vec<JoinedMerge>>>>,
}

/// A merge that an earlier one of the same session carries out, since both were waiting.
pub(crate) struct JoinedMerge {
    pub(crate) save: ScopedSave,
    pub(crate) enqueued_at: Instant,
    pub(crate) answer: oneshot::Sender<MergeAnswer>,
}

/// How a merge waits.
#[allow(clippy::large_enum_variant, reason = "it is taken apart at once")]
pub(crate) enum MergePlace {
    /// It has a place of its own, and carries out the merges that join it.
    Leads(WritePermit, ScopedSave),
    Joins(oneshot::Receiver<MergeAnswer>),
}

/// A permit, as the next permit of the same session sees it.
#[derive(Debug)]
struct Predecessor {
    number: u64,
    /// Whether this permit and all permits before it are for touches.
    is_touch: bool,
    /// Gets the predecessor's own predecessor, if the permit was dropped before its turn. Closed if the
    /// permit was dropped and none is left before it.
    released: oneshot::Receiver<Predecessor>,
}

/// A place in the queue of a session. Dropping it lets the next permit go. If there are still permits
/// before this one, the next permit then waits for those.
pub(crate) struct WritePermit {
    queue: WriteQueue,
    key: SessionKey,
    number: u64,
    predecessor: Option<Predecessor>,
    enqueued_at: Instant,
    release: Option<oneshot::Sender<Predecessor>>,
    /// The merges that join this one.
    group: Option<MergeGroup>,
}

impl WriteQueue {
    /// Takes the last place in the queue of a session, for a save. The order of the saves is the order
    /// of these calls. An error if the queue is full.
    pub(crate) fn enqueue(&self, key: SessionKey) -> Result<WritePermit> {
        self.push(self.lock(), key, false, None)
    }

    /// Takes the last place for a merge, or joins the last permit, if that is for a merge that waits.
    ///
    /// It does not join one that has waited for half of the `timeout`. So the task of that one does not end
    /// before the deadlines of those that join.
    pub(crate) fn enqueue_merge(
        &self,
        key: SessionKey,
        save: ScopedSave,
        timeout: Duration,
    ) -> Result<MergePlace> {
        let queues = self.lock();
        if let Some(group) = queues.get(&key).and_then(|queue| queue.tail_group.as_ref())
            && group.began.elapsed() < timeout / 2
            && let Some(joined) = &mut *lock(&group.joined)
        {
            if joined.len() >= MAX_PER_KEY {
                return Err(queue_full());
            }
            let (answer, answered) = oneshot::channel();
            joined.push(JoinedMerge { save, enqueued_at: Instant::now(), answer });
            return Ok(MergePlace::Joins(answered));
        }
        let group =
            MergeGroup { began: Instant::now(), joined: Arc::new(Mutex::new(Some(Vec::new()))) };
        let permit = self.push(queues, key, false, Some(group))?;
        Ok(MergePlace::Leads(permit, save))
    }

    /// Takes the last place for a touch. `None` if a save is in the queue: the touch would extend the
    /// cached state, which that save is about to replace.
    pub(crate) fn enqueue_touch_of_cached(&self, key: SessionKey) -> Option<Result<WritePermit>> {
        let queues = self.lock();
        let has_save = queues.get(&key).is_some_and(|queue| !queue.tail.is_touch);
        (!has_save).then(|| self.push(queues, key, true, None))
    }

    /// Takes the last place for a touch, whatever is in the queue.
    pub(crate) fn enqueue_touch(&self, key: SessionKey) -> Result<WritePermit> {
        self.push(self.lock(), key, true, None)
    }

    /// Whether a save is in the queue of a key.
    pub(crate) fn has_pending_write(&self, key: SessionKey) -> bool {
        self.lock().get(&key).is_some_and(|queue| !queue.tail.is_touch)
    }

    #[cfg(test)]
    pub(crate) fn len(&self) -> usize {
        self.lock().len()
    }

    fn push(
        &self,
        mut queues: MutexGuard<'_, KeyQueues>,
        key: SessionKey,
        is_touch: bool,
        group: Option<MergeGroup>,
    ) -> Result<WritePermit> {
        let (release, released) = oneshot::channel();
        let mut tail = Predecessor { number: 0, is_touch, released };
        let predecessor = match queues.entry(key) {
            Entry::Occupied(queue) => {
                let queue = queue.into_mut();
                if queue.len >= MAX_PER_KEY {
                    return Err(queue_full());
                }
                tail.number = queue.tail.number + 1;
                tail.is_touch &= queue.tail.is_touch;
                queue.len += 1;
                queue.tail_group.clone_from(&group);
                Some(std::mem::replace(&mut queue.tail, tail))
            }
            Entry::Vacant(queue) => {
                queue.insert(KeyQueue { tail, len: 1, newest: None, tail_group: group.clone() });
                None
            }
        };
        Ok(WritePermit {
            queue: self.clone(),
            key,
            number: predecessor.as_ref().map_or(0, |predecessor| predecessor.number + 1),
            predecessor,
            enqueued_at: Instant::now(),
            release: Some(release),
            group,
        })
    }

    fn lock(&self) -> MutexGuard<'_, KeyQueues> {
        lock(&self.0)
    }
}

impl WritePermit {
    pub(crate) fn enqueued_at(&self) -> Instant {
        self.enqueued_at
    }

    /// Takes the merges that have joined this one. From now on, none can join.
    pub(crate) fn take_joined(&self) -> Vec<JoinedMerge> {
        let group = self.group.as_ref();
        group.and_then(|group| lock(&group.joined).take()).unwrap_or_default()
    }

    #[cfg(test)]
    pub(crate) fn joined(&self) -> usize {
        let group = self.group.as_ref();
        group.and_then(|group| lock(&group.joined).as_ref().map(Vec::len)).unwrap_or_default()
    }

    /// What an earlier save in the queue has stored, if it was a save of a request scope.
    pub(crate) fn newest(&self) -> Option<Snapshot> {
        self.queue.lock().get(&self.key).and_then(|queue| queue.newest.clone())
    }

    /// Leaves what this save has stored to the saves that wait.
    pub(crate) fn set_newest(&self, stored: impl FnOnce() -> Snapshot) {
        let mut queues = self.queue.lock();
        if let Some(queue) = queues.get_mut(&self.key)
            && queue.len > 1
        {
            queue.newest = Some(stored());
        }
    }

    /// Waits until all earlier permits of the session were dropped. An error if that took the whole
    /// timeout: the caller has its timeout error by now, so the write need not be sent.
    pub(crate) async fn acquire(&mut self, timeout: Duration) -> Result<()> {
        while let Some(predecessor) = self.predecessor.as_mut() {
            // A permit that is dropped before its turn hands over its own predecessor.
            self.predecessor = (&mut predecessor.released).await.ok();
        }
        if self.enqueued_at.elapsed() < timeout { Ok(()) } else { Err(timed_out(timeout)) }
    }
}

impl Drop for WritePermit {
    fn drop(&mut self) {
        // Merges that have joined a permit which is dropped before its turn get an error.
        drop(self.take_joined());
        let queue = self.queue.clone();
        let mut queues = queue.lock();
        // The sender is used or dropped while the lock is held: the next permit must not see this one as
        // released before the queue is up to date.
        let release = self.release.take();
        let predecessor = self.predecessor.take().and_then(Predecessor::still_queued);
        let Entry::Occupied(mut queue) = queues.entry(self.key) else { return };
        queue.get_mut().len -= 1;
        if queue.get().tail.number != self.number {
            if let (Some(predecessor), Some(release)) = (predecessor, release) {
                let _ = release.send(predecessor);
            }
        } else if let Some(predecessor) = predecessor {
            queue.get_mut().tail = predecessor;
            queue.get_mut().tail_group = None;
        } else {
            queue.remove();
        }
    }
}

impl Predecessor {
    /// Returns the last permit up to this one that was not dropped.
    fn still_queued(mut self) -> Option<Self> {
        loop {
            match self.released.try_recv() {
                Ok(earlier) => self = earlier,
                Err(TryRecvError::Empty) => return Some(self),
                Err(TryRecvError::Closed) => return None,
            }
        }
    }
}

fn queue_full() -> Error {
    Error::new(
        ErrorKind::Overloaded,
        format!(
            "{MAX_PER_KEY} saves of one session are waiting for MongoDB, which is the limit: does its \
             visitor send requests without a limit?"
        ),
    )
}

#[cfg(test)]
mod tests {
    use futures::FutureExt;

    use super::*;

    const LONG: Duration = Duration::from_secs(3600);

    #[tokio::test]
    async fn a_save_that_has_waited_for_the_whole_timeout_is_not_sent() {
        let queue = WriteQueue::default();
        let mut permit = queue.enqueue(SessionKey::of(1)).unwrap();
        let error = permit.acquire(Duration::ZERO).await.unwrap_err();
        assert_eq!(error.kind(), crate::ErrorKind::Timeout);
    }

    #[tokio::test]
    async fn saves_of_one_session_are_sent_in_the_order_of_the_calls() {
        let queue = WriteQueue::default();
        let key = SessionKey::of(1);
        let mut a = queue.enqueue(key).unwrap();
        let mut b = queue.enqueue(key).unwrap();
        let mut c = queue.enqueue(key).unwrap();
        a.acquire(LONG).await.unwrap();
        assert!(c.acquire(LONG).now_or_never().is_none());
        assert!(b.acquire(LONG).now_or_never().is_none());
        drop(a);
        drop(b);
        drop(c);
        assert!(queue.lock().is_empty());
    }

    #[tokio::test]
    async fn a_permit_that_is_dropped_early_lets_no_later_save_overtake() {
        let queue = WriteQueue::default();
        let key = SessionKey::of(1);
        let mut first = queue.enqueue(key).unwrap();
        let dropped_early = queue.enqueue(key).unwrap();
        let mut second = queue.enqueue(key).unwrap();
        drop((dropped_early, queue.enqueue(key).unwrap()));
        first.acquire(LONG).await.unwrap();
        assert!(second.acquire(LONG).now_or_never().is_none());
        let mut third = queue.enqueue(key).unwrap();
        assert!(third.acquire(LONG).now_or_never().is_none());
        drop(first);
        second.acquire(LONG).await.unwrap();
        assert!(third.acquire(LONG).now_or_never().is_none());
        drop(second);
        third.acquire(LONG).await.unwrap();
        drop(third);
        assert!(queue.lock().is_empty());
    }

    #[tokio::test]
    async fn a_touch_waits_for_touches_and_is_refused_behind_a_save() {
        let queue = WriteQueue::default();
        let key = SessionKey::of(1);
        let mut first = queue.enqueue_touch_of_cached(key).unwrap().unwrap();
        let mut second = queue.enqueue_touch_of_cached(key).unwrap().unwrap();
        assert!(!queue.has_pending_write(key));
        first.acquire(LONG).await.unwrap();
        assert!(second.acquire(LONG).now_or_never().is_none());
        let mut save = queue.enqueue(key).unwrap();
        assert!(queue.enqueue_touch_of_cached(key).is_none() && queue.has_pending_write(key));
        drop(first);
        second.acquire(LONG).await.unwrap();
        drop(second);
        save.acquire(LONG).await.unwrap();
        assert!(queue.enqueue_touch_of_cached(key).is_none(), "it is being sent");
        drop(save);
        assert!(!queue.has_pending_write(key) && queue.enqueue_touch_of_cached(key).is_some());
    }

    #[tokio::test]
    async fn a_save_does_not_wait_for_another_session() {
        let queue = WriteQueue::default();
        let mut a = queue.enqueue(SessionKey::of(1)).unwrap();
        let mut b = queue.enqueue(SessionKey::of(2)).unwrap();
        b.acquire(LONG).await.unwrap();
        a.acquire(LONG).await.unwrap();
        drop(a);
        assert_eq!(queue.lock().len(), 1);
    }

    #[tokio::test]
    async fn a_full_queue_refuses_saves_of_that_session_alone_until_one_ends() {
        let queue = WriteQueue::default();
        let key = SessionKey::of(1);
        let mut permits: Vec<_> = (0..MAX_PER_KEY).map(|_| queue.enqueue(key).unwrap()).collect();
        assert_eq!(queue.enqueue(key).err().unwrap().kind(), ErrorKind::Overloaded);
        assert!(queue.enqueue(SessionKey::of(2)).is_ok());
        // From anywhere: the one at the end, one in between, and the first.
        for at in [MAX_PER_KEY - 1, MAX_PER_KEY / 2, 0] {
            drop(permits.remove(at));
            permits.push(queue.enqueue(key).unwrap());
            assert_eq!(queue.enqueue(key).err().unwrap().kind(), ErrorKind::Overloaded);
        }
        drop(permits);
        assert!(queue.lock().is_empty());
    }
}
