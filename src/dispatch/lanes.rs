//! Lanes: the saves of one session are sent one after the other, in the order in which they were
//! called. A delete waits for nobody: it is final, and a save that comes after it finds nothing.
//!
//! A save whose caller has gone goes on by itself, on a connection of its own. Without this, the
//! next save of the same session could overtake it, be acknowledged, and then be overwritten by it
//! (invariants I2 and I6). A save that may still be under way holds its lane until it has ended.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::oneshot::{self, error::TryRecvError};
use tokio::time::Instant;

use crate::error::Result;
use crate::key::{KeyHashing, SessionKey};
use crate::tasks::timed_out;

/// The lanes that somebody is in. An idle store has none.
#[derive(Clone, Debug, Default)]
pub(super) struct Lanes(Arc<Mutex<Map>>);

type Map = HashMap<SessionKey, Ahead, KeyHashing>;

/// Somebody in a lane, as the one behind them sees it.
#[derive(Debug)]
struct Ahead {
    number: u64,
    /// They and all before them change nothing but an expiry.
    touches: bool,
    leaves: oneshot::Receiver<Ahead>,
}

/// A place in a lane. Dropping it lets the next one go, or wait for those before it if they are
/// still there.
#[derive(Debug)]
pub(crate) struct Place {
    lanes: Lanes,
    key: SessionKey,
    number: u64,
    before: Option<Ahead>,
    entered: Instant,
    left: Option<oneshot::Sender<Ahead>>,
}

impl Lanes {
    /// Takes the last place in the lane of a key, for a save. The order is that of these calls.
    pub(super) fn enter(&self, key: SessionKey) -> Place {
        let mut lanes = self.lock();
        let before = lanes.remove(&key);
        self.enter_after(before, lanes, key, false)
    }

    /// The same for a touch. `None` if a save is in the lane, with which it would not be ordered:
    /// a touch has nothing to put in the place of what that save stores.
    pub(super) fn enter_to_touch(&self, key: SessionKey) -> Option<Place> {
        let mut lanes = self.lock();
        let before = lanes.remove(&key);
        if let Some(tail) = before.as_ref()
            && !tail.touches
        {
            lanes.extend(before.map(|tail| (key, tail)));
            return None;
        }
        Some(self.enter_after(before, lanes, key, true))
    }

    /// Whether no save is in the lane of a key.
    pub(super) fn is_settled(&self, key: SessionKey) -> bool {
        self.lock().get(&key).is_none_or(|tail| tail.touches)
    }

    fn enter_after(
        &self,
        before: Option<Ahead>,
        mut lanes: MutexGuard<'_, Map>,
        key: SessionKey,
        touches: bool,
    ) -> Place {
        let (left, leaves) = oneshot::channel();
        let number = before.as_ref().map_or(0, |tail| tail.number + 1);
        lanes.insert(key, Ahead { number, touches, leaves });
        let entered = Instant::now();
        Place { lanes: self.clone(), key, number, before, entered, left: Some(left) }
    }

    fn lock(&self) -> MutexGuard<'_, Map> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Place {
    /// When the place was taken.
    pub(super) fn entered(&self) -> Instant {
        self.entered
    }

    /// Waits until all who came before have left. An error if that took the whole timeout: the
    /// caller has been told by now, and the write need not be sent any more.
    pub(super) async fn turn(&mut self, timeout: Duration) -> Result<()> {
        while let Some(before) = self.before.as_mut() {
            // Who leaves before their turn tells of those that are still there.
            self.before = (&mut before.leaves).await.ok();
        }
        if self.entered.elapsed() < timeout { Ok(()) } else { Err(timed_out(timeout)) }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let lanes = self.lanes.clone();
        let mut lanes = lanes.lock();
        // From here on, and still under the lock, who is behind sees this place as left.
        let left = self.left.take();
        let before = self.before.take().and_then(Ahead::still_there);
        if lanes.get(&self.key).is_some_and(|tail| tail.number == self.number) {
            lanes.remove(&self.key);
            lanes.extend(before.map(|before| (self.key, before)));
        } else if let (Some(before), Some(left)) = (before, left) {
            drop(left.send(before));
        }
    }
}

impl Ahead {
    /// Those, or the last before them who has not left.
    fn still_there(mut self) -> Option<Self> {
        loop {
            match self.leaves.try_recv() {
                Ok(earlier) => self = earlier,
                Err(TryRecvError::Empty) => return Some(self),
                Err(TryRecvError::Closed) => return None,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt;

    use super::*;

    const LONG: Duration = Duration::from_secs(3600);

    #[tokio::test]
    async fn a_write_whose_time_is_up_is_not_sent() {
        let lanes = Lanes::default();
        let mut place = lanes.enter(SessionKey::of(1));
        let error = place.turn(Duration::ZERO).await.unwrap_err();
        assert_eq!(error.kind(), crate::ErrorKind::Timeout);
    }

    #[tokio::test]
    async fn a_lane_is_left_in_the_order_in_which_it_was_entered() {
        let lanes = Lanes::default();
        let key = SessionKey::of(1);
        let (mut a, mut b, mut c) = (lanes.enter(key), lanes.enter(key), lanes.enter(key));
        a.turn(LONG).await.unwrap();
        assert!(c.turn(LONG).now_or_never().is_none());
        assert!(b.turn(LONG).now_or_never().is_none());
        drop(a);
        drop(b);
        drop(c);
        assert!(lanes.lock().is_empty());
    }

    #[tokio::test]
    async fn who_leaves_before_their_turn_lets_nobody_overtake() {
        let lanes = Lanes::default();
        let key = SessionKey::of(1);
        let mut first = lanes.enter(key);
        let impatient = lanes.enter(key);
        let mut second = lanes.enter(key);
        drop((impatient, lanes.enter(key)));
        first.turn(LONG).await.unwrap();
        assert!(second.turn(LONG).now_or_never().is_none());
        let mut third = lanes.enter(key);
        assert!(third.turn(LONG).now_or_never().is_none());
        drop(first);
        second.turn(LONG).await.unwrap();
        assert!(third.turn(LONG).now_or_never().is_none());
        drop(second);
        third.turn(LONG).await.unwrap();
        drop(third);
        assert!(lanes.lock().is_empty());
    }

    #[tokio::test]
    async fn a_touch_follows_touches_and_keeps_out_of_the_way_of_saves() {
        let lanes = Lanes::default();
        let key = SessionKey::of(1);
        let mut first = lanes.enter_to_touch(key).unwrap();
        let mut second = lanes.enter_to_touch(key).unwrap();
        assert!(lanes.is_settled(key));
        first.turn(LONG).await.unwrap();
        assert!(second.turn(LONG).now_or_never().is_none());
        let mut save = lanes.enter(key);
        assert!(lanes.enter_to_touch(key).is_none() && !lanes.is_settled(key));
        drop(first);
        second.turn(LONG).await.unwrap();
        drop(second);
        save.turn(LONG).await.unwrap();
        assert!(lanes.enter_to_touch(key).is_none(), "it is under way");
        drop(save);
        assert!(lanes.is_settled(key) && lanes.enter_to_touch(key).is_some());
    }

    #[tokio::test]
    async fn whoever_is_in_a_lane_holds_up_nobody_in_another() {
        let lanes = Lanes::default();
        let mut a = lanes.enter(SessionKey::of(1));
        let mut b = lanes.enter(SessionKey::of(2));
        b.turn(LONG).await.unwrap();
        a.turn(LONG).await.unwrap();
        drop(a);
        assert_eq!(lanes.lock().len(), 1);
    }
}
