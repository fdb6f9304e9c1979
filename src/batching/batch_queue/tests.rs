//! The queue over an executor of numbers, on paused time.

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
const MAX_WAIT: Duration = Duration::from_millis(10);
/// The command gives no answer for this item.
const NO_ANSWER: u32 = 1_000;
/// The command panics.
const PANICS: u32 = 2_000;
/// The item fails, the others in its command do not.
const FAILS: u32 = 3_000;
/// The whole command fails.
const BREAKS: u32 = 4_000;
/// The item alone has as many bytes as a command may have.
const LARGE: u32 = 5_000;

/// Answers each number with its double, once the test opens the gate of its command.
#[derive(Clone, Default)]
struct Numbers(Arc<Mutex<Record>>);

#[derive(Default)]
struct Record {
    commands: Vec<Vec<u32>>,
    gates: VecDeque<Option<oneshot::Sender<()>>>,
    /// The items whose command was dropped before it had ended, and when.
    cut_off: Vec<(u32, Instant)>,
}

struct Running(Numbers, Vec<u32>);

impl Drop for Running {
    fn drop(&mut self) {
        let cut_off = self.1.iter().map(|item| (*item, Instant::now()));
        self.0.0.lock().unwrap().cut_off.extend(cut_off);
    }
}

impl Numbers {
    fn commands(&self) -> Vec<Vec<u32>> {
        self.0.lock().unwrap().commands.clone()
    }

    fn open(&self, command: usize) {
        self.0.lock().unwrap().gates[command].take().unwrap().send(()).ok();
    }

    fn cut_off(&self) -> Vec<(u32, Instant)> {
        self.0.lock().unwrap().cut_off.clone()
    }

    async fn run(self, items: Vec<u32>) -> Vec<Result<u32>> {
        let (open, gate) = oneshot::channel();
        {
            let mut record = self.0.lock().unwrap();
            record.commands.push(items.clone());
            record.gates.push_back(Some(open));
        }
        let mut running = Running(self, items);
        gate.await.ok();
        let items = std::mem::take(&mut running.1);
        assert!(!items.contains(&PANICS), "on purpose");
        let failed = || Error::new(ErrorKind::Server, "by itself");
        let items = items.into_iter().filter(|item| *item != NO_ANSWER);
        items.map(|item| if item == FAILS { Err(failed()) } else { Ok(2 * item) }).collect()
    }
}

impl BatchExecutor for Numbers {
    type Item = u32;
    type Answer = u32;

    fn run_one(&self, item: u32) -> Call<u32> {
        let run = self.clone().run(vec![item]);
        Box::pin(async move { run.await.pop().unwrap_or_else(|| Err(Error::cut_off())) })
    }

    fn run_batch(&self, items: Vec<u32>) -> Call<Vec<Result<u32>>> {
        assert!(items.len() > 1, "`run_one` sends a single item");
        let breaks = items.contains(&BREAKS);
        let run = self.clone().run(items);
        Box::pin(async move {
            let outcomes = run.await;
            if breaks { Err(Error::new(ErrorKind::Connection, "as a whole")) } else { Ok(outcomes) }
        })
    }

    fn bytes(item: &u32) -> usize {
        if *item == LARGE { 100 } else { 10 }
    }
}

struct Fixture {
    queue: BatchQueue<Numbers>,
    numbers: Numbers,
}

fn limits() -> BatchLimits {
    BatchLimits {
        max_commands: 2,
        max_batch: 3,
        max_bytes: 100,
        max_wait: MAX_WAIT,
        max_calls: 100,
    }
}

impl Fixture {
    fn new(limits: BatchLimits) -> Self {
        let numbers = Numbers::default();
        let tasks = Tasks::new(Handle::current(), TIMEOUT, Availability::new(Clock::tokio()));
        Self { queue: BatchQueue::new(numbers.clone(), tasks, limits), numbers }
    }

    /// Sends an item in a task of its own, and lets the task run until it waits.
    async fn send(&self, item: u32) -> JoinHandle<Result<u32>> {
        let queue = self.queue.clone();
        let began = Instant::now();
        let sent = tokio::spawn(async move {
            let _permit = queue.admit()?;
            queue.send(item, began).await
        });
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

    fn commands(&self) -> Vec<Vec<u32>> {
        self.numbers.commands()
    }

    fn is_idle(&self) -> bool {
        self.queue.load() == [0; 3]
    }
}

/// Lets all tasks run until they wait.
async fn settle() {
    for _ in 0..50 {
        tokio::task::yield_now().await;
    }
}

async fn outcome(sent: JoinHandle<Result<u32>>) -> Result<u32, ErrorKind> {
    sent.await.unwrap().map_err(|error| error.kind())
}

#[tokio::test(start_paused = true)]
async fn an_idle_queue_sends_a_call_at_once() {
    let fixture = Fixture::new(limits());
    let sent = fixture.send_all([1, 2]).await;
    assert_eq!(fixture.commands(), [vec![1], vec![2]]);
    fixture.numbers.open(1);
    fixture.numbers.open(0);
    for (sent, answer) in sent.into_iter().zip([2, 4]) {
        assert_eq!(outcome(sent).await, Ok(answer));
    }
    assert!(fixture.is_idle());
}

#[tokio::test(start_paused = true)]
async fn calls_of_a_busy_queue_are_batched_in_order_when_a_command_ends() {
    let fixture = Fixture::new(limits());
    let sent = fixture.send_all(1..=6).await;
    assert_eq!(fixture.commands().len(), 2, "the others wait");
    fixture.numbers.open(0);
    settle().await;
    assert_eq!(fixture.commands()[2..], [vec![3, 4, 5]]);
    fixture.numbers.open(1);
    settle().await;
    assert_eq!(fixture.commands().len(), 3, "one queued call is fewer than the three in flight");
    fixture.numbers.open(2);
    settle().await;
    assert_eq!(fixture.commands()[3..], [vec![6]], "at most `max_batch`");
    fixture.numbers.open(3);
    for (sent, item) in sent.into_iter().zip(1..) {
        assert_eq!(outcome(sent).await, Ok(2 * item), "each gets its own answer");
    }
    assert!(fixture.is_idle());
}

#[tokio::test(start_paused = true)]
async fn beside_a_large_command_a_smaller_one_is_sent_only_after_max_wait() {
    let fixture = Fixture::new(limits());
    let _first = fixture.send_all(1..=5).await;
    fixture.numbers.open(0);
    fixture.numbers.open(1);
    settle().await;
    assert_eq!(fixture.commands()[2..], [vec![3, 4, 5]]);
    let _few = fixture.send_all([6, 7]).await;
    assert_eq!(fixture.commands().len(), 3, "although one more command may be in flight");
    let _enough = fixture.send(8).await;
    assert_eq!(fixture.commands()[3..], [vec![6, 7, 8]], "as many as the other command has");
    fixture.numbers.open(2);
    settle().await;
    let _one = fixture.send(9).await;
    assert_eq!(fixture.commands().len(), 4);
    sleep(MAX_WAIT + Duration::from_millis(1)).await;
    assert_eq!(fixture.commands()[4..], [vec![9]]);
}

#[tokio::test(start_paused = true)]
async fn a_command_exceeds_max_bytes_only_with_a_single_item() {
    let fixture = Fixture::new(limits());
    let _sent = fixture.send_all([1, 2, 3, LARGE, LARGE, 4]).await;
    for command in 0..4 {
        fixture.numbers.open(command);
        settle().await;
    }
    assert_eq!(fixture.commands()[2..], [vec![3], vec![LARGE], vec![LARGE], vec![4]]);
}

#[tokio::test(start_paused = true)]
async fn an_expired_wait_flushes_the_queue_and_later_calls_wait_longer() {
    let fixture = Fixture::new(limits());
    let mut sent = fixture.send_all([1, 2, 3, 4]).await;
    advance(MAX_WAIT.saturating_sub(Duration::from_millis(1))).await;
    settle().await;
    assert_eq!(fixture.commands().len(), 2);
    sent.push(fixture.send(5).await);
    sleep(Duration::from_millis(2)).await;
    assert_eq!(fixture.commands()[2..], [vec![3, 4, 5]]);
    // With three commands in flight the wait is not doubled. With four it is twice as long, and so on.
    let mut waits = Vec::new();
    for item in 6..12 {
        let began = Instant::now();
        let before = fixture.commands().len();
        sent.push(fixture.send(item).await);
        while fixture.commands().len() == before {
            sleep(Duration::from_millis(1)).await;
        }
        waits.push(began.elapsed().as_millis() / MAX_WAIT.as_millis());
    }
    assert_eq!(waits, [1, 2, 2, 4, 4, 8]);
    // While more than `max_commands` are in flight, one that ends is replaced only after `max_wait`.
    let late = fixture.send(12).await;
    fixture.numbers.open(0);
    settle().await;
    assert_eq!(fixture.commands().len(), 9, "seven are in flight, and two are the limit");
    for command in 1..9 {
        fixture.numbers.open(command);
    }
    settle().await;
    assert_eq!(fixture.commands()[9..], [vec![12]]);
    fixture.numbers.open(9);
    assert_eq!(outcome(late).await, Ok(24));
    settle().await;
    assert!(fixture.is_idle());
}

#[tokio::test(start_paused = true)]
async fn a_later_call_does_not_shorten_the_wait_of_an_earlier_one() {
    let fixture = Fixture::new(limits());
    let _stuck = fixture.send_all(1..=2).await;
    for command in 2..6 {
        let _stuck = fixture.send(10 + command).await;
        while fixture.commands().len() == usize::try_from(command).unwrap() {
            sleep(Duration::from_millis(1)).await;
        }
    }
    assert_eq!(fixture.commands().len(), 6, "the limit is two");
    let _first = fixture.send(20).await;
    sleep(MAX_WAIT + Duration::from_millis(1)).await;
    let _second = fixture.send(21).await;
    assert_eq!(fixture.commands().len(), 6, "with six it is four times as long");
    // One that ends is replaced by one command, not by commands for all queued calls.
    let _third = fixture.send_all(22..28).await;
    sleep(MAX_WAIT + Duration::from_millis(1)).await;
    fixture.numbers.open(0);
    settle().await;
    assert_eq!(fixture.commands()[6..], [vec![20, 21, 22]]);
}

#[tokio::test(start_paused = true)]
async fn a_stalled_large_command_delays_only_the_first_queued_call() {
    let fixture = Fixture::new(limits());
    let _first = fixture.send_all(1..=5).await;
    fixture.numbers.open(0);
    fixture.numbers.open(1);
    settle().await;
    assert_eq!(fixture.commands()[2..], [vec![3, 4, 5]], "this one stalls");
    let _queued = fixture.send(6).await;
    sleep(MAX_WAIT + Duration::from_millis(1)).await;
    assert_eq!(fixture.commands()[3..], [vec![6]]);
    fixture.numbers.open(3);
    settle().await;
    for item in 7..10 {
        let sent = fixture.send(item).await;
        assert_eq!(fixture.commands().last(), Some(&vec![item]), "at once");
        fixture.numbers.open(fixture.commands().len() - 1);
        assert_eq!(outcome(sent).await, Ok(2 * item));
    }
    fixture.numbers.open(2);
    settle().await;
    assert!(fixture.is_idle());
}

#[tokio::test(start_paused = true)]
async fn a_call_that_has_waited_before_waits_at_most_half_of_its_time_left() {
    let fixture = Fixture::new(limits());
    let _busy = fixture.send_all(1..=2).await;
    let queue = fixture.queue.clone();
    let began = Instant::now();
    advance(TIMEOUT.saturating_sub(Duration::from_millis(8))).await;
    let _late = tokio::spawn(async move {
        let _permit = queue.admit()?;
        queue.send(3, began).await
    });
    sleep(Duration::from_millis(5)).await;
    assert_eq!(fixture.commands()[2..], [vec![3]]);
}
