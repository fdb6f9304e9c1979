//! `Chance`: the random choices of a walk, all from one seed, so that a walk can be replayed.

use std::sync::{Arc, Mutex};
use std::time::Duration;

/// A shared source of random numbers. All clones draw from one generator, so a replay must draw in the same order.
#[derive(Clone, Debug)]
pub(crate) struct Chance(Arc<Mutex<fastrand::Rng>>);

impl Chance {
    pub(crate) fn of(seed: u64) -> Self {
        Self(Arc::new(Mutex::new(fastrand::Rng::with_seed(seed))))
    }

    /// Makes an independent generator, whose seed is drawn from this one.
    pub(crate) fn fork(&self) -> fastrand::Rng {
        self.0.lock().unwrap().fork()
    }

    /// Draws nothing if the probability is 0.
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

    /// Draws a whole number of milliseconds, at most `whole`.
    pub(crate) fn part_of(&self, whole: Duration) -> Duration {
        let millis = u64::try_from(whole.as_millis()).unwrap();
        Duration::from_millis(self.0.lock().unwrap().u64(..=millis))
    }

    /// Lets other tasks run first, a random number of times.
    pub(crate) async fn dawdle(&self, laziness: f64) {
        while self.happens(laziness) {
            tokio::task::yield_now().await;
        }
    }
}
