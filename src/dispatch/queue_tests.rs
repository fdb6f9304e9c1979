//! A queue over a small freight of its own, on paused time.

use std::collections::VecDeque;
use std::pin::pin;
use std::sync::{Arc, Mutex};

use tokio::runtime::Handle;
use tokio::task::JoinHandle;
use tokio::time::{advance, sleep};

use super::*;

const TIMEOUT: Duration = Duration::from_secs(5);
const PATIENCE: Duration = Duration::from_millis(10);
/// An item that its command says nothing of, and one at which it panics.
const NO_WORD: u32 = 1_000;
const PANICS: u32 = 2_000;
/// An item that fails by itself, and one that brings its whole command down.
const FAILS: u32 = 3_000;
const BREAKS: u32 = 4_000;
const LARGE: u32 = 5_000;

/// Carries numbers, and answers with each one's double once its gate is opened.
#[derive(Clone, Default)]
struct Numbers(Arc<Mutex<Carried>>);

#[derive(Default)]
struct Carried {
    departed: Vec<Vec<u32>>,
    gates: VecDeque<Option<oneshot::Sender<()>>>,
    /// Those that were dropped before they had ended, and when.
    cut_off: Vec<(u32, Instant)>,
}

struct UnderWay(Numbers, Vec<u32>);

impl Drop for UnderWay {
    fn drop(&mut self) {
        let cut_off = self.1.iter().map(|item| (*item, Instant::now()));
        self.0.0.lock().unwrap().cut_off.extend(cut_off);
    }
}

impl Numbers {
    fn departed(&self) -> Vec<Vec<u32>> {
        self.0.lock().unwrap().departed.clone()
    }

    fn open(&self, command: usize) {
        self.0.lock().unwrap().gates[command].take().unwrap().send(()).ok();
    }

    fn cut_off(&self) -> Vec<(u32, Instant)> {
        self.0.lock().unwrap().cut_off.clone()
    }

    async fn carry(self, items: Vec<u32>) -> Vec<Result<u32>> {
        let (open, gate) = oneshot::channel();
        {
            let mut carried = self.0.lock().unwrap();
            carried.departed.push(items.clone());
            carried.gates.push_back(Some(open));
        }
        let mut under_way = UnderWay(self, items);
        gate.await.ok();
        let items = std::mem::take(&mut under_way.1);
        assert!(!items.contains(&PANICS), "on purpose");
        let failed = || Error::new(ErrorKind::Server, "by itself");
        let items = items.into_iter().filter(|item| *item != NO_WORD);
        items.map(|item| if item == FAILS { Err(failed()) } else { Ok(2 * item) }).collect()
    }
}

impl Freight for Numbers {
    type Item = u32;
    type Answer = u32;

    fn alone(&self, item: u32) -> Call<u32> {
        let carried = self.clone().carry(vec![item]);
        Box::pin(async move { carried.await.pop().unwrap_or_else(|| Err(Error::cut_off())) })
    }

    fn together(&self, items: Vec<u32>) -> Call<Vec<Result<u32>>> {
        assert!(items.len() > 1, "one goes alone");
        let breaks = items.contains(&BREAKS);
        let carried = self.clone().carry(items);
        Box::pin(async move {
            let outcomes = carried.await;
            if breaks { Err(Error::new(ErrorKind::Connection, "as a whole")) } else { Ok(outcomes) }
        })
    }

    fn bytes(item: &u32) -> usize {
        if *item == LARGE { 100 } else { 10 }
    }
}

struct Line {
    queue: Queue<Numbers>,
    numbers: Numbers,
}

fn limits() -> Limits {
    Limits { commands: 2, together: 3, bytes: 100, patience: PATIENCE, calls: 100 }
}

impl Line {
    fn new(limits: Limits) -> Self {
        let numbers = Numbers::default();
        let tasks = Tasks::new(Handle::current(), TIMEOUT);
        Self { queue: Queue::new(numbers.clone(), tasks, limits), numbers }
    }

    /// Sends an item in a task of its own, as far as it goes.
    async fn send(&self, item: u32) -> JoinHandle<Result<u32>> {
        let (queue, began) = (self.queue.clone(), Instant::now());
        let sent = tokio::spawn(async move { queue.send(queue.sit()?, item, began).await });
        settle().await;
        sent
    }

    async fn send_all(&self, items: impl IntoIterator<Item = u32>) -> Vec<JoinHandle<Result<u32>>> {
        let mut sent = Vec::new();
        for item in items {
            sent.push(self.send(item).await);
        }
        sent
    }

    fn departed(&self) -> Vec<Vec<u32>> {
        self.numbers.departed()
    }

    fn is_at_rest(&self) -> bool {
        self.queue.under_way() == [0; 3]
    }
}

/// Lets everything run that can.
async fn settle() {
    for _ in 0..50 {
        tokio::task::yield_now().await;
    }
}

async fn outcome(sent: JoinHandle<Result<u32>>) -> Result<u32, ErrorKind> {
    sent.await.unwrap().map_err(|error| error.kind())
}

#[tokio::test(start_paused = true)]
async fn an_idle_queue_lets_a_call_go_at_once() {
    let line = Line::new(limits());
    let sent = line.send_all([1, 2]).await;
    assert_eq!(line.departed(), [vec![1], vec![2]]);
    line.numbers.open(1);
    line.numbers.open(0);
    for (sent, answer) in sent.into_iter().zip([2, 4]) {
        assert_eq!(outcome(sent).await, Ok(answer));
    }
    assert!(line.is_at_rest());
}

#[tokio::test(start_paused = true)]
async fn what_comes_while_it_is_busy_leaves_together_once_a_command_ends_and_in_order() {
    let line = Line::new(limits());
    let sent = line.send_all(1..=6).await;
    assert_eq!(line.departed().len(), 2, "the others wait");
    line.numbers.open(0);
    settle().await;
    assert_eq!(line.departed()[2..], [vec![3, 4, 5]]);
    line.numbers.open(1);
    settle().await;
    assert_eq!(line.departed().len(), 3, "one call is few beside three");
    line.numbers.open(2);
    settle().await;
    assert_eq!(line.departed()[3..], [vec![6]], "no more of them than may leave together");
    line.numbers.open(3);
    for (sent, item) in sent.into_iter().zip(1..) {
        assert_eq!(outcome(sent).await, Ok(2 * item), "each gets its own answer");
    }
    assert!(line.is_at_rest());
}

#[tokio::test(start_paused = true)]
async fn beside_a_large_command_no_smaller_one_leaves_until_it_is_missed() {
    let line = Line::new(limits());
    let _first = line.send_all(1..=5).await;
    line.numbers.open(0);
    line.numbers.open(1);
    settle().await;
    assert_eq!(line.departed()[2..], [vec![3, 4, 5]]);
    let _few = line.send_all([6, 7]).await;
    assert_eq!(line.departed().len(), 3, "though one command more may be under way");
    let _enough = line.send(8).await;
    assert_eq!(line.departed()[3..], [vec![6, 7, 8]], "as many as the other one has");
    line.numbers.open(2);
    settle().await;
    let _one = line.send(9).await;
    assert_eq!(line.departed().len(), 4);
    sleep(PATIENCE + Duration::from_millis(1)).await;
    assert_eq!(line.departed()[4..], [vec![9]]);
}

#[tokio::test(start_paused = true)]
async fn a_command_is_no_larger_than_it_may_be_unless_it_is_one_alone() {
    let line = Line::new(limits());
    let _sent = line.send_all([1, 2, 3, LARGE, LARGE, 4]).await;
    for command in 0..4 {
        line.numbers.open(command);
        settle().await;
    }
    assert_eq!(line.departed()[2..], [vec![3], vec![LARGE], vec![LARGE], vec![4]]);
}

#[tokio::test(start_paused = true)]
async fn who_waits_in_vain_leaves_with_all_others_and_the_next_ones_wait_longer() {
    let line = Line::new(limits());
    let mut sent = line.send_all([1, 2, 3, 4]).await;
    advance(PATIENCE.saturating_sub(Duration::from_millis(1))).await;
    settle().await;
    assert_eq!(line.departed().len(), 2);
    sent.push(line.send(5).await);
    sleep(Duration::from_millis(2)).await;
    assert_eq!(line.departed()[2..], [vec![3, 4, 5]]);
    // Three commands are under way; with four it is twice as long, and with six three doublings.
    let mut waits = Vec::new();
    for item in 6..12 {
        let began = Instant::now();
        let before = line.departed().len();
        sent.push(line.send(item).await);
        while line.departed().len() == before {
            sleep(Duration::from_millis(1)).await;
        }
        waits.push(began.elapsed().as_millis() / PATIENCE.as_millis());
    }
    assert_eq!(waits, [1, 2, 2, 4, 4, 8]);
    // A command beyond the usual number is followed by another one only if it is missed.
    let late = line.send(12).await;
    line.numbers.open(0);
    settle().await;
    assert_eq!(line.departed().len(), 9, "seven are more than two");
    for command in 1..9 {
        line.numbers.open(command);
    }
    settle().await;
    assert_eq!(line.departed()[9..], [vec![12]]);
    line.numbers.open(9);
    assert_eq!(outcome(late).await, Ok(24));
    settle().await;
    assert!(line.is_at_rest());
}

#[tokio::test(start_paused = true)]
async fn who_has_given_up_is_not_sent() {
    let line = Line::new(Limits { patience: 10 * TIMEOUT, ..limits() });
    let _busy = line.send_all([1, 2]).await;
    let (gone, stays) = (line.send(3).await, line.send(4).await);
    advance(TIMEOUT.saturating_sub(Duration::from_millis(1))).await;
    let young = line.send(5).await;
    gone.abort();
    advance(Duration::from_millis(1)).await;
    line.numbers.open(0);
    assert_eq!(outcome(stays).await, Err(ErrorKind::Timeout), "its caller has been told");
    settle().await;
    assert_eq!(line.departed()[2..], [vec![5]]);
    line.numbers.open(1);
    line.numbers.open(2);
    assert_eq!(outcome(young).await, Ok(10));
    settle().await;
    assert!(line.is_at_rest());
}

#[tokio::test(start_paused = true)]
async fn a_failure_of_its_own_is_nobody_elses_and_that_of_the_command_everybodys() {
    let line = Line::new(limits());
    let sent = line.send_all([1, 2, 3, FAILS, 4, 5, BREAKS, 6, 7, NO_WORD]).await;
    for command in 0..5 {
        line.numbers.open(command);
        settle().await;
    }
    let mut outcomes = Vec::new();
    for sent in sent {
        outcomes.push(outcome(sent).await);
    }
    let (own, whole) = (Err(ErrorKind::Server), Err(ErrorKind::Connection));
    assert_eq!(outcomes[..8], [Ok(2), Ok(4), Ok(6), own, Ok(8), whole, whole, whole]);
    assert_eq!(outcomes[8..], [Ok(14), Err(ErrorKind::Closed)], "of the last there was no word");
    assert!(line.is_at_rest());
}

#[tokio::test(start_paused = true)]
async fn a_full_queue_refuses_at_once_and_has_room_again_when_a_call_ends() {
    let line = Line::new(Limits { calls: 4, ..limits() });
    let mut sent = line.send_all(1..=4).await;
    let error = line.send(5).await.await.unwrap().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Overloaded);
    assert!(error.to_string().contains("`max_waiting`"), "{error}");
    sent.pop().unwrap().abort();
    settle().await;
    let _fifth = line.send(6).await;
    assert_eq!(line.queue.under_way()[1], 4);
    line.numbers.open(0);
    settle().await;
    assert_eq!(line.departed()[2..], [vec![3, 6]], "nothing was sent of the one refused");
}

#[tokio::test(start_paused = true)]
async fn a_command_lasts_no_longer_than_its_most_impatient_call() {
    let line = Line::new(Limits { patience: 10 * TIMEOUT, ..limits() });
    let began = Instant::now();
    let _busy = line.send_all([1, 2]).await;
    let old = line.send(3).await;
    sleep(TIMEOUT.saturating_sub(Duration::from_secs(1))).await;
    let young = line.send(4).await;
    line.numbers.open(0);
    settle().await;
    assert_eq!(line.departed()[2..], [vec![3, 4]]);
    assert_eq!(outcome(young).await, Err(ErrorKind::Timeout));
    assert_eq!(outcome(old).await, Err(ErrorKind::Timeout));
    let ends = began + 2 * TIMEOUT;
    let late = |(_, at): &(u32, Instant)| at.duration_since(ends);
    let cut_off = line.numbers.cut_off();
    assert_eq!(cut_off.len(), 2, "{cut_off:?}");
    assert!(cut_off.iter().all(|it| late(it) < Duration::from_millis(2)), "{cut_off:?}");
}

#[tokio::test(start_paused = true)]
async fn a_panic_in_a_command_leaves_nothing_behind() {
    let line = Line::new(limits());
    let alone = line.send(PANICS).await;
    let _other = line.send(1).await;
    let together = line.send_all([2, PANICS, 3]).await;
    let after = line.send(4).await;
    line.numbers.open(0);
    assert!(alone.await.unwrap_err().is_panic());
    settle().await;
    line.numbers.open(2);
    for sent in together {
        assert_eq!(outcome(sent).await, Err(ErrorKind::Closed));
    }
    settle().await;
    line.numbers.open(3);
    assert_eq!(outcome(after).await, Ok(8));
    line.numbers.open(1);
    settle().await;
    assert!(line.is_at_rest());
}

#[tokio::test(start_paused = true)]
async fn callers_that_leave_leave_nothing_behind() {
    let line = Line::new(limits());
    let sent = line.send_all(1..=8).await;
    // Those that wait first: where a command ends, they would leave.
    sent.iter().rev().for_each(JoinHandle::abort);
    settle().await;
    assert!(line.is_at_rest(), "{:?}", line.queue.under_way());
    assert_eq!(line.numbers.cut_off().len(), 2);
    assert_eq!(line.departed().len(), 2, "and what waited was not sent");
}

#[test]
fn a_runtime_that_is_gone_leaves_nothing_behind() {
    let gone = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
    let numbers = Numbers::default();
    let tasks = Tasks::new(gone.handle().clone(), TIMEOUT);
    // So many that none may end inside of another.
    let limits = Limits { together: 1, calls: 100_000, ..limits() };
    let queue = Queue::new(numbers.clone(), tasks, limits);
    let here = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
    here.block_on(async {
        let send = |item| {
            let queue = queue.clone();
            async move { queue.send(queue.sit()?, item, Instant::now()).await }
        };
        let mut first = pin!(send(1));
        let mut second = pin!(send(2));
        assert!(
            futures::poll!(&mut first).is_pending() && futures::poll!(&mut second).is_pending()
        );
        let rest: Vec<_> = (3..30_000).map(send).collect();
        let mut rest: Vec<_> = rest.into_iter().map(Box::pin).collect();
        for sent in &mut rest {
            assert!(futures::poll!(sent).is_pending());
        }
        gone.shutdown_background();
        numbers.open(0);
        assert_eq!(first.await.unwrap(), 2);
        for sent in rest {
            assert_eq!(sent.await.unwrap_err().kind(), ErrorKind::Closed);
        }
        numbers.open(1);
        assert_eq!(second.await.unwrap(), 4);
    });
    assert_eq!(queue.under_way(), [0; 3]);
}
