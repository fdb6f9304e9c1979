//! Lanes: the saves of one session are sent one after the other, in the order in which they were
//! called. A delete waits for nobody: it is final, and a save that comes after it finds nothing.
//!
//! A save whose caller has gone goes on by itself, on a connection of its own. Without this, the
//! next save of the same session could overtake it, be acknowledged, and then be overwritten by it
//! (invariants I2 and I6). A save that may still be under way holds its lane until it has ended.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::oneshot;
use tokio::time::Instant;

use crate::error::Result;
use crate::key::{KeyHashing, SessionKey};
use crate::tasks::timed_out;

/// The lanes that somebody is in. An idle store has none.
#[derive(Clone, Debug, Default)]
pub(super) struct Lanes(Arc<Mutex<Map>>);

type Map = HashMap<SessionKey, Tail, KeyHashing>;

/// The last in a lane.
#[derive(Debug)]
struct Tail {
    number: u64,
    /// All in this lane change nothing but an expiry.
    touches: bool,
    leaves: oneshot::Receiver<()>,
}

/// A place in a lane. Dropping it lets the next one go.
#[derive(Debug)]
pub(crate) struct Place {
    lanes: Lanes,
    key: SessionKey,
    number: u64,
    before: Option<oneshot::Receiver<()>>,
    entered: Instant,
    _left: oneshot::Sender<()>,
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
        before: Option<Tail>,
        mut lanes: MutexGuard<'_, Map>,
        key: SessionKey,
        touches: bool,
    ) -> Place {
        let (left, leaves) = oneshot::channel();
        let number = before.as_ref().map_or(0, |tail| tail.number + 1);
        lanes.insert(key, Tail { number, touches, leaves });
        let (before, entered) = (before.map(|tail| tail.leaves), Instant::now());
        Place { lanes: self.clone(), key, number, before, entered, _left: left }
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
        if let Some(before) = self.before.take() {
            // Nothing is ever sent: who leaves drops their end.
            let _left = before.await;
        }
        if self.entered.elapsed() < timeout { Ok(()) } else { Err(timed_out(timeout)) }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut lanes = self.lanes.lock();
        if lanes.get(&self.key).is_some_and(|tail| tail.number == self.number) {
            lanes.remove(&self.key);
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
