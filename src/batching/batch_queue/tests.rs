//! A queue over a small freight of its own, on paused time.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};

use tokio::runtime::Handle;
use tokio::task::JoinHandle;
use tokio::time::{advance, sleep};

use crate::availability::Availability;
use crate::batching::batch_queue::*;
use crate::time::Clock;

mod failures;

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

impl BatchExecutor for Numbers {
    type Item = u32;
    type Answer = u32;

    fn run_one(&self, item: u32) -> Call<u32> {
        let carried = self.clone().carry(vec![item]);
        Box::pin(async move { carried.await.pop().unwrap_or_else(|| Err(Error::cut_off())) })
    }

    fn run_batch(&self, items: Vec<u32>) -> Call<Vec<Result<u32>>> {
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
    queue: BatchQueue<Numbers>,
    numbers: Numbers,
}

fn limits() -> BatchLimits {
    BatchLimits {
        max_commands: 2,
        max_batch: 3,
        max_bytes: 100,
        max_wait: PATIENCE,
        max_calls: 100,
    }
}

impl Line {
    fn new(limits: BatchLimits) -> Self {
        let numbers = Numbers::default();
        let tasks = Tasks::new(Handle::current(), TIMEOUT, Availability::new(Clock::tokio()));
        Self { queue: BatchQueue::new(numbers.clone(), tasks, limits), numbers }
    }

    /// Sends an item in a task of its own, as far as it goes.
    async fn send(&self, item: u32) -> JoinHandle<Result<u32>> {
        let (queue, began) = (self.queue.clone(), Instant::now());
        let sent = tokio::spawn(async move { queue.send(queue.admit()?, item, began).await });
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
        self.queue.load() == [0; 3]
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
async fn who_comes_later_does_not_shorten_the_wait_of_those_before() {
    let line = Line::new(limits());
    let _stuck = line.send_all(1..=2).await;
    for command in 2..6 {
        let _stuck = line.send(10 + command).await;
        while line.departed().len() == usize::try_from(command).unwrap() {
            sleep(Duration::from_millis(1)).await;
        }
    }
    assert_eq!(line.departed().len(), 6, "of two that there should be");
    let _first = line.send(20).await;
    sleep(PATIENCE + Duration::from_millis(1)).await;
    let _second = line.send(21).await;
    assert_eq!(line.departed().len(), 6, "with six it is four times as long");
    // One that ends is followed by one, and not by all who have waited for so long.
    let _third = line.send_all(22..28).await;
    sleep(PATIENCE + Duration::from_millis(1)).await;
    line.numbers.open(0);
    settle().await;
    assert_eq!(line.departed()[6..], [vec![20, 21, 22]]);
}

#[tokio::test(start_paused = true)]
async fn a_large_command_that_stands_still_holds_up_nobody_but_the_first_who_waits() {
    let line = Line::new(limits());
    let _first = line.send_all(1..=5).await;
    line.numbers.open(0);
    line.numbers.open(1);
    settle().await;
    assert_eq!(line.departed()[2..], [vec![3, 4, 5]], "which stands still");
    let _missed = line.send(6).await;
    sleep(PATIENCE + Duration::from_millis(1)).await;
    assert_eq!(line.departed()[3..], [vec![6]]);
    line.numbers.open(3);
    settle().await;
    for item in 7..10 {
        let sent = line.send(item).await;
        assert_eq!(line.departed().last(), Some(&vec![item]), "at once");
        line.numbers.open(line.departed().len() - 1);
        assert_eq!(outcome(sent).await, Ok(2 * item));
    }
    line.numbers.open(2);
    settle().await;
    assert!(line.is_at_rest());
}

#[tokio::test(start_paused = true)]
async fn who_has_waited_elsewhere_waits_for_half_of_the_rest_at_most() {
    let line = Line::new(limits());
    let _busy = line.send_all(1..=2).await;
    let queue = line.queue.clone();
    let began = Instant::now();
    advance(TIMEOUT.saturating_sub(Duration::from_millis(8))).await;
    let _late = tokio::spawn(async move { queue.send(queue.admit()?, 3, began).await });
    sleep(Duration::from_millis(5)).await;
    assert_eq!(line.departed()[2..], [vec![3]]);
}
