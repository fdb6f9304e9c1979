//! What fails, gives up or goes away in a queue.

use std::pin::pin;

use crate::batching::batch_queue::tests::*;

#[tokio::test(start_paused = true)]
async fn who_has_given_up_is_not_sent() {
    let line = Line::new(limits());
    advance(TIMEOUT).await;
    let _busy = line.send_all([1, 2]).await;
    let (gone, stays) = (line.send(3).await, line.send(4).await);
    gone.abort();
    let (queue, began) = (line.queue.clone(), Instant::now() - TIMEOUT);
    let late = tokio::spawn(async move { queue.send(queue.admit()?, 5, began).await });
    assert_eq!(outcome(late).await, Err(ErrorKind::Timeout), "its caller has been told");
    settle().await;
    assert_eq!(line.departed()[2..], [vec![4]]);
    for command in 0..3 {
        line.numbers.open(command);
    }
    assert_eq!(outcome(stays).await, Ok(8));
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
    let line = Line::new(BatchLimits { max_calls: 4, ..limits() });
    let mut sent = line.send_all(1..=4).await;
    let error = line.send(5).await.await.unwrap().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Overloaded);
    assert!(error.to_string().contains("`max_waiting`"), "{error}");
    sent.pop().unwrap().abort();
    settle().await;
    let _fifth = line.send(6).await;
    assert_eq!(line.queue.load()[1], 4);
    line.numbers.open(0);
    settle().await;
    assert_eq!(line.departed()[2..], [vec![3, 6]], "nothing was sent of the one refused");
}

#[tokio::test(start_paused = true)]
async fn a_command_lasts_no_longer_than_its_most_impatient_call() {
    let line = Line::new(BatchLimits { max_wait: 10 * TIMEOUT, ..limits() });
    let began = Instant::now();
    let _busy = line.send_all([1, 2]).await;
    let old = line.send(3).await;
    sleep(Duration::from_secs(2)).await;
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
    assert!(line.is_at_rest(), "{:?}", line.queue.load());
    assert_eq!(line.numbers.cut_off().len(), 2);
    assert_eq!(line.departed().len(), 2, "and what waited was not sent");
}

#[test]
fn a_runtime_that_is_gone_leaves_nothing_behind() {
    let gone = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
    let numbers = Numbers::default();
    let tasks = Tasks::new(gone.handle().clone(), TIMEOUT, Availability::new(Clock::system()));
    // So many that none may end inside of another.
    let limits = BatchLimits { max_batch: 1, max_calls: 100_000, ..limits() };
    let queue = BatchQueue::new(numbers.clone(), tasks, limits);
    let here = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
    here.block_on(async {
        let send = |item| {
            let queue = queue.clone();
            async move { queue.send(queue.admit()?, item, Instant::now()).await }
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
    assert_eq!(queue.load(), [0; 3]);
}

#[tokio::test(start_paused = true)]
async fn a_command_past_its_deadline_ends_with_the_store() {
    let line = Line::new(BatchLimits { max_wait: 10 * TIMEOUT, ..limits() });
    let _calls = line.send_all(1..=4).await;
    line.numbers.open(0);
    settle().await;
    assert_eq!(line.departed()[2..], [vec![3, 4]]);
    let tasks = line.queue.0.tasks.clone();
    let began = Instant::now();
    let shutdown = tokio::spawn(async move { tasks.shutdown().await });
    shutdown.await.unwrap();
    let took = began.elapsed();
    assert!(took <= TIMEOUT + Duration::from_millis(2), "{took:?}");
    assert_eq!(line.numbers.cut_off().len(), 2, "the two that left together");
}
