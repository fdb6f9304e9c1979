//! Lanes: the saves of one session are sent one after the other, in the order in which they were
//! called. A delete waits for nobody: it is final, and a save that comes after it finds nothing.
//!
//! A save whose caller has gone goes on by itself, on a connection of its own. Without this, the
//! next save of the same session could overtake it, be acknowledged, and then be overwritten by it
//! (invariants I2 and I6). A save that may still be under way holds its lane until it has ended.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::oneshot::{self, error::TryRecvError};
use tokio::time::Instant;

use crate::error::{Error, ErrorKind, Result};
use crate::runtime::timed_out;
use crate::session::id::{KeyHashing, SessionKey};

/// The lanes that somebody is in. An idle store has none.
#[derive(Clone, Debug, Default)]
pub(crate) struct WriteQueue(Arc<Mutex<Map>>);

type Map = HashMap<SessionKey, KeyQueue, KeyHashing>;

/// How many may be in a lane. A visitor who saves faster than MongoDB takes it must not use up what all
/// may wait for.
const MAX_PER_KEY: usize = 256;

#[derive(Debug)]
struct KeyQueue {
    tail: Predecessor,
    len: usize,
}

/// Somebody in a lane, as the one behind them sees it.
#[derive(Debug)]
struct Predecessor {
    number: u64,
    /// They and all before them change nothing but an expiry.
    is_touch: bool,
    released: oneshot::Receiver<Predecessor>,
}

/// A place in a lane. Dropping it lets the next one go, or wait for those before it if they are
/// still there.
#[derive(Debug)]
pub(crate) struct WritePermit {
    queue: WriteQueue,
    key: SessionKey,
    number: u64,
    predecessor: Option<Predecessor>,
    enqueued_at: Instant,
    release: Option<oneshot::Sender<Predecessor>>,
}

impl WriteQueue {
    /// Takes the last place in the lane of a key, for a save. The order is that of these calls. An
    /// error if the lane is full.
    pub(crate) fn enqueue(&self, key: SessionKey) -> Result<WritePermit> {
        self.push(self.lock(), key, false)
    }

    /// The same for a touch. `None` if a save is in the lane, with which it would not be ordered:
    /// a touch has nothing to put in the place of what that save stores.
    pub(crate) fn enqueue_touch(&self, key: SessionKey) -> Option<Result<WritePermit>> {
        let lanes = self.lock();
        let is_free = lanes.get(&key).is_none_or(|lane| lane.tail.is_touch);
        is_free.then(|| self.push(lanes, key, true))
    }

    /// Whether a save is in the queue of a key.
    pub(crate) fn has_pending_write(&self, key: SessionKey) -> bool {
        self.lock().get(&key).is_some_and(|lane| !lane.tail.is_touch)
    }

    #[cfg(test)]
    pub(crate) fn len(&self) -> usize {
        self.lock().len()
    }

    fn push(
        &self,
        mut lanes: MutexGuard<'_, Map>,
        key: SessionKey,
        touches: bool,
    ) -> Result<WritePermit> {
        let (left, leaves) = oneshot::channel();
        let mut ahead = Predecessor { number: 0, is_touch: touches, released: leaves };
        let before = match lanes.entry(key) {
            Entry::Occupied(lane) => {
                let lane = lane.into_mut();
                if lane.len >= MAX_PER_KEY {
                    return Err(queue_full());
                }
                ahead.number = lane.tail.number + 1;
                lane.len += 1;
                Some(std::mem::replace(&mut lane.tail, ahead))
            }
            Entry::Vacant(lane) => {
                lane.insert(KeyQueue { tail: ahead, len: 1 });
                None
            }
        };
        let number = before.as_ref().map_or(0, |before| before.number + 1);
        let entered = Instant::now();
        Ok(WritePermit {
            queue: self.clone(),
            key,
            number,
            predecessor: before,
            enqueued_at: entered,
            release: Some(left),
        })
    }

    fn lock(&self) -> MutexGuard<'_, Map> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl WritePermit {
    /// When the place was taken.
    pub(crate) fn enqueued_at(&self) -> Instant {
        self.enqueued_at
    }

    /// Waits until all who came before have left. An error if that took the whole timeout: the
    /// caller has been told by now, and the write need not be sent any more.
    pub(crate) async fn acquire(&mut self, timeout: Duration) -> Result<()> {
        while let Some(before) = self.predecessor.as_mut() {
            // Who leaves before their turn tells of those that are still there.
            self.predecessor = (&mut before.released).await.ok();
        }
        if self.enqueued_at.elapsed() < timeout { Ok(()) } else { Err(timed_out(timeout)) }
    }
}

impl Drop for WritePermit {
    fn drop(&mut self) {
        let lanes = self.queue.clone();
        let mut lanes = lanes.lock();
        // From here on, and still under the lock, who is behind sees this place as left.
        let left = self.release.take();
        let before = self.predecessor.take().and_then(Predecessor::still_queued);
        let Entry::Occupied(mut lane) = lanes.entry(self.key) else { return };
        lane.get_mut().len -= 1;
        if lane.get().tail.number != self.number {
            if let (Some(before), Some(left)) = (before, left) {
                drop(left.send(before));
            }
        } else if let Some(before) = before {
            lane.get_mut().tail = before;
        } else {
            lane.remove();
        }
    }
}

impl Predecessor {
    /// Those, or the last before them who has not left.
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
            "{MAX_PER_KEY} saves of one session wait for MongoDB already, and no more than that may: is \
             its visitor sending requests without a limit?"
        ),
    )
}

#[cfg(test)]
mod tests {
    use futures::FutureExt;

    use super::*;

    const LONG: Duration = Duration::from_secs(3600);

    #[tokio::test]
    async fn a_write_whose_time_is_up_is_not_sent() {
        let lanes = WriteQueue::default();
        let mut place = lanes.enqueue(SessionKey::of(1)).unwrap();
        let error = place.acquire(Duration::ZERO).await.unwrap_err();
        assert_eq!(error.kind(), crate::ErrorKind::Timeout);
    }

    #[tokio::test]
    async fn a_lane_is_left_in_the_order_in_which_it_was_entered() {
        let lanes = WriteQueue::default();
        let key = SessionKey::of(1);
        let (mut a, mut b, mut c) =
            (lanes.enqueue(key).unwrap(), lanes.enqueue(key).unwrap(), lanes.enqueue(key).unwrap());
        a.acquire(LONG).await.unwrap();
        assert!(c.acquire(LONG).now_or_never().is_none());
        assert!(b.acquire(LONG).now_or_never().is_none());
        drop(a);
        drop(b);
        drop(c);
        assert!(lanes.lock().is_empty());
    }

    #[tokio::test]
    async fn who_leaves_before_their_turn_lets_nobody_overtake() {
        let lanes = WriteQueue::default();
        let key = SessionKey::of(1);
        let mut first = lanes.enqueue(key).unwrap();
        let impatient = lanes.enqueue(key).unwrap();
        let mut second = lanes.enqueue(key).unwrap();
        drop((impatient, lanes.enqueue(key).unwrap()));
        first.acquire(LONG).await.unwrap();
        assert!(second.acquire(LONG).now_or_never().is_none());
        let mut third = lanes.enqueue(key).unwrap();
        assert!(third.acquire(LONG).now_or_never().is_none());
        drop(first);
        second.acquire(LONG).await.unwrap();
        assert!(third.acquire(LONG).now_or_never().is_none());
        drop(second);
        third.acquire(LONG).await.unwrap();
        drop(third);
        assert!(lanes.lock().is_empty());
    }

    #[tokio::test]
    async fn a_touch_follows_touches_and_keeps_out_of_the_way_of_saves() {
        let lanes = WriteQueue::default();
        let key = SessionKey::of(1);
        let mut first = lanes.enqueue_touch(key).unwrap().unwrap();
        let mut second = lanes.enqueue_touch(key).unwrap().unwrap();
        assert!(!lanes.has_pending_write(key));
        first.acquire(LONG).await.unwrap();
        assert!(second.acquire(LONG).now_or_never().is_none());
        let mut save = lanes.enqueue(key).unwrap();
        assert!(lanes.enqueue_touch(key).is_none() && lanes.has_pending_write(key));
        drop(first);
        second.acquire(LONG).await.unwrap();
        drop(second);
        save.acquire(LONG).await.unwrap();
        assert!(lanes.enqueue_touch(key).is_none(), "it is under way");
        drop(save);
        assert!(!lanes.has_pending_write(key) && lanes.enqueue_touch(key).is_some());
    }

    #[tokio::test]
    async fn whoever_is_in_a_lane_holds_up_nobody_in_another() {
        let lanes = WriteQueue::default();
        let mut a = lanes.enqueue(SessionKey::of(1)).unwrap();
        let mut b = lanes.enqueue(SessionKey::of(2)).unwrap();
        b.acquire(LONG).await.unwrap();
        a.acquire(LONG).await.unwrap();
        drop(a);
        assert_eq!(lanes.lock().len(), 1);
    }

    #[tokio::test]
    async fn a_full_lane_takes_nobody_more_until_one_leaves_and_other_lanes_do() {
        let lanes = WriteQueue::default();
        let key = SessionKey::of(1);
        let mut places: Vec<_> = (0..MAX_PER_KEY).map(|_| lanes.enqueue(key).unwrap()).collect();
        assert_eq!(lanes.enqueue(key).unwrap_err().kind(), ErrorKind::Overloaded);
        assert!(lanes.enqueue(SessionKey::of(2)).is_ok());
        // From anywhere: the one at the end, one in between, and the first.
        for at in [MAX_PER_KEY - 1, MAX_PER_KEY / 2, 0] {
            drop(places.remove(at));
            places.push(lanes.enqueue(key).unwrap());
            assert_eq!(lanes.enqueue(key).unwrap_err().kind(), ErrorKind::Overloaded);
        }
        drop(places);
        assert!(lanes.lock().is_empty());
    }
}
