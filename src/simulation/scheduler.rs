//! Runs what is asked of the stores, in an order of its own.
//!
//! tokio wakes those who wait for one answer in an order that nobody can seed. So they are polled
//! here, in an order drawn by chance among those that were woken, each of which may be passed over
//! for a while: every await is a point at which others may run.

use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Wake, Waker};

use tokio::task::JoinHandle;

use crate::simulation::chance::Chance;

pub(crate) struct Scheduler {
    members: Arc<Mutex<Vec<Member>>>,
    whole: Arc<Mutex<Waker>>,
    task: JoinHandle<()>,
}

struct Member {
    what: String,
    /// Not there while it is polled.
    work: Option<Work>,
    woken: Arc<Woken>,
}

type Work = Pin<Box<dyn Future<Output = ()> + Send>>;

struct Woken {
    is: AtomicBool,
    whole: Arc<Mutex<Waker>>,
}

impl Wake for Woken {
    fn wake(self: Arc<Self>) {
        self.is.store(true, Ordering::Relaxed);
        self.whole.lock().unwrap().wake_by_ref();
    }
}

impl Scheduler {
    pub(crate) fn new(chance: Chance, laziness: f64) -> Self {
        let members = Arc::<Mutex<Vec<Member>>>::default();
        let whole = Arc::new(Mutex::new(Waker::noop().clone()));
        let (all, waker) = (Arc::clone(&members), Arc::clone(&whole));
        let task = tokio::spawn(poll_fn(move |context| {
            waker.lock().unwrap().clone_from(context.waker());
            if work(&all, &chance, laziness) {
                context.waker().wake_by_ref();
            }
            Poll::Pending
        }));
        Self { members, whole, task }
    }

    pub(crate) fn start(&self, what: String, work: impl Future<Output = ()> + Send + 'static) {
        let woken = Arc::new(Woken { is: true.into(), whole: Arc::clone(&self.whole) });
        let member = Member { what, work: Some(Box::pin(work)), woken };
        self.members.lock().unwrap().push(member);
        self.whole.lock().unwrap().wake_by_ref();
    }

    /// Drops one of those that are under way, as a server drops the handler of a client that left.
    pub(crate) fn cancel(&self, which: usize) -> String {
        let member = self.members.lock().unwrap().swap_remove(which);
        member.what
    }

    pub(crate) fn under_way(&self) -> usize {
        self.members.lock().unwrap().len()
    }

    pub(crate) fn first(&self) -> Option<String> {
        self.members.lock().unwrap().first().map(|member| member.what.clone())
    }

    /// Whether one of them panicked.
    pub(crate) fn is_dead(&self) -> bool {
        self.task.is_finished()
    }
}

/// Polls those that were woken, in any order; whether some were passed over.
fn work(members: &Mutex<Vec<Member>>, chance: &Chance, laziness: f64) -> bool {
    let woken = |member: &Member| {
        member.woken.is.load(Ordering::Relaxed).then(|| Arc::clone(&member.woken))
    };
    let mut woken: Vec<_> = members.lock().unwrap().iter().filter_map(woken).collect();
    chance.shuffle(&mut woken);
    let mut passed_over = false;
    for one in woken {
        if chance.happens(laziness) {
            passed_over = true;
            continue;
        }
        one.is.store(false, Ordering::Relaxed);
        let is_it = |member: &mut Member| Arc::ptr_eq(&member.woken, &one);
        let mut all = members.lock().unwrap();
        let work = all.iter_mut().find_map(|member| is_it(member).then(|| member.work.take())?);
        drop(all);
        let Some(mut work) = work else { continue };
        let waker = Waker::from(Arc::clone(&one));
        let done = work.as_mut().poll(&mut Context::from_waker(&waker)).is_ready();
        let mut all = members.lock().unwrap();
        let at = all.iter_mut().position(is_it);
        match at {
            Some(at) if done => drop(all.swap_remove(at)),
            Some(at) => all[at].work = Some(work),
            None => {}
        }
    }
    passed_over
}
