//! `Scheduler`: runs the operations of a walk, in an order that the seed decides.
//!
//! tokio wakes the waiters of one answer in an order that no seed decides. So the scheduler polls the operations
//! itself: it shuffles those that were woken, and may pass over each of them for a while. In this way every await
//! is a point at which other operations may run.

use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Wake, Waker};

use tokio::task::JoinHandle;

use crate::simulation::chance::Chance;

pub(crate) struct Scheduler {
    operations: Arc<Mutex<Vec<Running>>>,
    /// The waker of `task`, which polls all operations.
    waker: Arc<Mutex<Waker>>,
    task: JoinHandle<()>,
}

struct Running {
    what: String,
    /// `None` while the operation is polled: the lock is not held then.
    work: Option<Work>,
    woken: Arc<Woken>,
}

type Work = Pin<Box<dyn Future<Output = ()> + Send>>;

/// The waker of one operation. It marks the operation and wakes the task of the scheduler.
struct Woken {
    is_woken: AtomicBool,
    scheduler: Arc<Mutex<Waker>>,
}

impl Wake for Woken {
    fn wake(self: Arc<Self>) {
        self.is_woken.store(true, Ordering::Relaxed);
        self.scheduler.lock().unwrap().wake_by_ref();
    }
}

impl Scheduler {
    pub(crate) fn new(chance: Chance, laziness: f64) -> Self {
        let operations = Arc::<Mutex<Vec<Running>>>::default();
        let waker = Arc::new(Mutex::new(Waker::noop().clone()));
        let all = Arc::clone(&operations);
        let of_task = Arc::clone(&waker);
        let task = tokio::spawn(poll_fn(move |context| {
            of_task.lock().unwrap().clone_from(context.waker());
            if poll_woken(&all, &chance, laziness) {
                context.waker().wake_by_ref();
            }
            Poll::Pending
        }));
        Self { operations, waker, task }
    }

    pub(crate) fn start(&self, what: String, work: impl Future<Output = ()> + Send + 'static) {
        let woken = Arc::new(Woken { is_woken: true.into(), scheduler: Arc::clone(&self.waker) });
        let operation = Running { what, work: Some(Box::pin(work)), woken };
        self.operations.lock().unwrap().push(operation);
        self.waker.lock().unwrap().wake_by_ref();
    }

    /// Drops one operation, as a server drops the handler of a client that left. Returns its description.
    pub(crate) fn cancel(&self, which: usize) -> String {
        let operation = self.operations.lock().unwrap().swap_remove(which);
        operation.what
    }

    /// The number of operations that have not ended.
    pub(crate) fn running(&self) -> usize {
        self.operations.lock().unwrap().len()
    }

    /// The description of an operation that has not ended.
    pub(crate) fn first_running(&self) -> Option<String> {
        self.operations.lock().unwrap().first().map(|operation| operation.what.clone())
    }

    /// Whether an operation has panicked.
    pub(crate) fn has_panicked(&self) -> bool {
        self.task.is_finished()
    }
}

/// Polls the operations that were woken, in a random order. Returns whether some of them were passed over.
fn poll_woken(operations: &Mutex<Vec<Running>>, chance: &Chance, laziness: f64) -> bool {
    let woken = |operation: &Running| {
        let is_woken = operation.woken.is_woken.load(Ordering::Relaxed);
        is_woken.then(|| Arc::clone(&operation.woken))
    };
    let mut woken: Vec<_> = operations.lock().unwrap().iter().filter_map(woken).collect();
    chance.shuffle(&mut woken);
    let mut passed_over = false;
    for one in woken {
        if chance.happens(laziness) {
            passed_over = true;
            continue;
        }
        one.is_woken.store(false, Ordering::Relaxed);
        let is_it = |operation: &mut Running| Arc::ptr_eq(&operation.woken, &one);
        let mut all = operations.lock().unwrap();
        let work = all.iter_mut().find_map(|it| is_it(it).then(|| it.work.take())?);
        drop(all);
        let Some(mut work) = work else { continue };
        let waker = Waker::from(Arc::clone(&one));
        let done = work.as_mut().poll(&mut Context::from_waker(&waker)).is_ready();
        let mut all = operations.lock().unwrap();
        let at = all.iter_mut().position(is_it);
        match at {
            Some(at) if done => {
                all.swap_remove(at);
            }
            Some(at) => all[at].work = Some(work),
            // The operation was cancelled while it was polled.
            None => {}
        }
    }
    passed_over
}
