//! Calls run where they are made, to their end; at most their callers are told before that that
//! their time is over.

use std::collections::HashSet;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use loom::thread::ThreadId;

use crate::error::{Error, ErrorKind, Result};
use crate::world::run;

#[derive(Default)]
pub(crate) struct Tasks {
    /// The threads whose next call is given up. Not seen by loom: each cares for itself alone.
    doubted: Mutex<HashSet<ThreadId>>,
}

impl Tasks {
    pub(crate) fn doubt_the_next(&self) {
        self.doubted().insert(loom::thread::current().id());
    }

    #[allow(clippy::unused_self, reason = "as the crate's tasks are asked")]
    pub(crate) fn is_shut_down(&self) -> bool {
        false
    }

    #[allow(clippy::unused_self, reason = "as the crate's tasks are asked")]
    pub(crate) fn timeout(&self) -> Duration {
        Duration::from_secs(5)
    }

    #[allow(clippy::unused_self, reason = "as the crate's tasks are asked")]
    pub(crate) fn start_for<T>(
        &self,
        _: Duration,
        call: impl Future<Output = Result<T>>,
        end: impl FnOnce(Result<T>),
        _: impl FnOnce(),
    ) {
        end(run(call));
    }

    pub(crate) async fn run<T, R>(
        &self,
        call: impl Future<Output = Result<T>>,
        end: impl FnOnce(Result<T>) -> Result<R>,
        late: impl FnOnce(),
    ) -> Result<R> {
        if self.doubted().remove(&loom::thread::current().id()) {
            let told = end(Err(Error::new(ErrorKind::Timeout, "no answer")));
            drop(call.await);
            late();
            return told;
        }
        end(call.await)
    }

    pub(crate) async fn run_paged<T, R>(
        &self,
        call: impl Future<Output = Result<T>>,
        end: impl FnOnce(Result<T>) -> Result<R>,
    ) -> Result<R> {
        end(call.await)
    }

    fn doubted(&self) -> std::sync::MutexGuard<'_, HashSet<ThreadId>> {
        self.doubted.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
