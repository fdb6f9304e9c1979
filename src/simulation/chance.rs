//! Chance that can be replayed: every choice of a simulation comes from one seed.

use std::sync::{Arc, Mutex};
use std::time::Duration;

/// A source of choices. Clones share it: the order in which they ask is part of what is replayed.
#[derive(Clone, Debug)]
pub(crate) struct Chance(Arc<Mutex<fastrand::Rng>>);

impl Chance {
    pub(crate) fn of(seed: u64) -> Self {
        Self(Arc::new(Mutex::new(fastrand::Rng::with_seed(seed))))
    }

    /// A source of its own, which this one decides on.
    pub(crate) fn another(&self) -> fastrand::Rng {
        self.0.lock().unwrap().fork()
    }

    pub(crate) fn happens(&self, probability: f64) -> bool {
        probability > 0.0 && self.0.lock().unwrap().f64() < probability
    }

    pub(crate) fn below(&self, bound: usize) -> usize {
        self.0.lock().unwrap().usize(..bound)
    }

    pub(crate) fn pick<T: Copy>(&self, from: &[T]) -> T {
        from[self.below(from.len())]
    }

    pub(crate) fn shuffle<T>(&self, items: &mut [T]) {
        self.0.lock().unwrap().shuffle(items);
    }

    /// Some whole milliseconds, at most `whole`.
    pub(crate) fn part_of(&self, whole: Duration) -> Duration {
        let millis = u64::try_from(whole.as_millis()).unwrap();
        Duration::from_millis(self.0.lock().unwrap().u64(..=millis))
    }

    /// Lets others run first, or not.
    pub(crate) async fn dawdle(&self, laziness: f64) {
        while self.happens(laziness) {
            tokio::task::yield_now().await;
        }
    }
}
