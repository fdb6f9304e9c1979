//! Which removals are under way.
//!
//! Whoever is asked to end sessions and finds that another call has removed them already must not
//! return before that call has forgotten them: until then the cache serves what is gone (I1). Which
//! sessions those are nobody can say any more, so it waits for all removals that had begun, and for no
//! later one: each is a command, or a page of a long removal.

use std::collections::BTreeSet;
use std::pin::pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

/// Clones share it.
#[derive(Clone, Default)]
pub(crate) struct Removals(Arc<Shared>);

#[derive(Default)]
struct Shared {
    numbers: Mutex<Numbers>,
    one_ended: Notify,
}

#[derive(Default)]
struct Numbers {
    next: u64,
    under_way: BTreeSet<u64>,
}

/// A removal under way, until it is dropped: once what it removes is not cached any more.
pub(crate) struct UnderWay {
    removals: Removals,
    number: u64,
}

impl Removals {
    /// To be called before anything is removed.
    pub(crate) fn begins(&self) -> UnderWay {
        let mut numbers = self.numbers();
        let number = numbers.next;
        numbers.next += 1;
        numbers.under_way.insert(number);
        UnderWay { removals: self.clone(), number }
    }

    /// Waits for the end of those that are under way.
    pub(crate) async fn settle(&self) {
        let before = self.numbers().next;
        loop {
            let mut ended = pin!(self.0.one_ended.notified());
            ended.as_mut().enable();
            if self.numbers().under_way.first().is_none_or(|first| *first >= before) {
                return;
            }
            ended.await;
        }
    }

    fn numbers(&self) -> MutexGuard<'_, Numbers> {
        self.0.numbers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        self.removals.numbers().under_way.remove(&self.number);
        self.removals.0.one_ended.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    use futures::poll;

    use super::*;

    #[tokio::test]
    async fn it_waits_for_those_that_had_begun_and_for_no_later_one() {
        let removals = Removals::default();
        removals.settle().await;
        let (first, second) = (removals.begins(), removals.begins());
        let mut settled = pin!(removals.settle());
        assert!(poll!(&mut settled).is_pending());
        let later = removals.begins();
        drop(second);
        assert!(poll!(&mut settled).is_pending());
        drop(first);
        assert!(poll!(&mut settled).is_ready());
        drop(later);
        assert!(removals.numbers().under_way.is_empty());
    }
}
