//! Failures, timeouts, cancellation and shutdown.

use std::pin::pin;

use crate::batching::batch_queue::tests::*;

#[tokio::test(start_paused = true)]
async fn a_call_that_has_ended_is_not_sent() {
    let fixture = Fixture::new(limits());
    advance(TIMEOUT).await;
    let _busy = fixture.send_all([1, 2]).await;
    let gone = fixture.send(3).await;
    let stays = fixture.send(4).await;
    gone.abort();
    let queue = fixture.queue.clone();
    let began = Instant::now() - TIMEOUT;
    let late = tokio::spawn(async move {
        let _permit = queue.admit()?;
        queue.send(5, began).await
    });
    assert_eq!(outcome(late).await, Err(ErrorKind::Timeout), "its caller has a timeout error");
    settle().await;
    assert_eq!(fixture.commands()[2..], [vec![4]]);
    for command in 0..3 {
        fixture.numbers.open(command);
    }
    assert_eq!(outcome(stays).await, Ok(8));
    settle().await;
    assert!(fixture.is_idle());
}

#[tokio::test(start_paused = true)]
async fn an_item_fails_alone_and_a_command_fails_for_all_its_items() {
    let fixture = Fixture::new(limits());
    let sent = fixture.send_all([1, 2, 3, FAILS, 4, 5, BREAKS, 6, 7, NO_ANSWER]).await;
    for command in 0..5 {
        fixture.numbers.open(command);
        settle().await;
    }
    let mut outcomes = Vec::new();
    for sent in sent {
        outcomes.push(outcome(sent).await);
    }
    let own = Err(ErrorKind::Server);
    let whole = Err(ErrorKind::Connection);
    assert_eq!(outcomes[..8], [Ok(2), Ok(4), Ok(6), own, Ok(8), whole, whole, whole]);
    assert_eq!(
        outcomes[8..],
        [Ok(14), Err(ErrorKind::Closed)],
        "the command gave no answer for the last one"
    );
    assert!(fixture.is_idle());
}

#[tokio::test(start_paused = true)]
async fn a_full_queue_refuses_at_once_and_has_room_again_when_a_call_ends() {
    let fixture = Fixture::new(BatchLimits { max_calls: 4, ..limits() });
    let mut sent = fixture.send_all(1..=4).await;
    let error = fixture.send(5).await.await.unwrap().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Overloaded);
    assert!(error.to_string().contains("`max_queued_calls`"), "{error}");
    sent.pop().unwrap().abort();
    settle().await;
    let _fifth = fixture.send(6).await;
    assert_eq!(fixture.queue.load()[1], 4);
    fixture.numbers.open(0);
    settle().await;
    assert_eq!(fixture.commands()[2..], [vec![3, 6]], "the refused call was not sent");
}

#[tokio::test(start_paused = true)]
async fn a_batch_ends_when_its_oldest_call_does() {
    let fixture = Fixture::new(BatchLimits { max_wait: 10 * TIMEOUT, ..limits() });
    let began = Instant::now();
    let _busy = fixture.send_all([1, 2]).await;
    let old = fixture.send(3).await;
    sleep(Duration::from_secs(2)).await;
    let young = fixture.send(4).await;
    fixture.numbers.open(0);
    settle().await;
    assert_eq!(fixture.commands()[2..], [vec![3, 4]]);
    assert_eq!(outcome(young).await, Err(ErrorKind::Timeout));
    assert_eq!(outcome(old).await, Err(ErrorKind::Timeout));
    let ends = began + 2 * TIMEOUT;
    let late = |(_, at): &(u32, Instant)| at.duration_since(ends);
    let cut_off = fixture.numbers.cut_off();
    assert_eq!(cut_off.len(), 2, "{cut_off:?}");
    assert!(cut_off.iter().all(|it| late(it) < Duration::from_millis(2)), "{cut_off:?}");
}

#[tokio::test(start_paused = true)]
async fn a_panic_in_a_command_leaks_nothing() {
    let fixture = Fixture::new(limits());
    let alone = fixture.send(PANICS).await;
    let _other = fixture.send(1).await;
    let together = fixture.send_all([2, PANICS, 3]).await;
    let after = fixture.send(4).await;
    fixture.numbers.open(0);
    assert!(alone.await.unwrap_err().is_panic());
    settle().await;
    fixture.numbers.open(2);
    for sent in together {
        assert_eq!(outcome(sent).await, Err(ErrorKind::Closed));
    }
    settle().await;
    fixture.numbers.open(3);
    assert_eq!(outcome(after).await, Ok(8));
    fixture.numbers.open(1);
    settle().await;
    assert!(fixture.is_idle());
}

#[tokio::test(start_paused = true)]
async fn cancelled_calls_leak_nothing() {
    let fixture = Fixture::new(limits());
    let sent = fixture.send_all(1..=8).await;
    // The queued calls first: when a command ends, they would be sent.
    sent.iter().rev().for_each(JoinHandle::abort);
    settle().await;
    assert!(fixture.is_idle(), "{:?}", fixture.queue.load());
    assert_eq!(fixture.numbers.cut_off().len(), 2);
    assert_eq!(fixture.commands().len(), 2, "the queued calls were not sent");
}

#[test]
fn a_runtime_that_is_gone_leaks_nothing() {
    let gone = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
    let numbers = Numbers::default();
    let tasks = Tasks::new(gone.handle().clone(), TIMEOUT, Availability::new(Clock::system()));
    // Enough calls to overflow the stack if the commands ended inside of each other.
    let limits = BatchLimits { max_batch: 1, max_calls: 100_000, ..limits() };
    let queue = BatchQueue::new(numbers.clone(), tasks, limits);
    let here = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
    here.block_on(async {
        let send = |item| {
            let queue = queue.clone();
            async move {
                let _permit = queue.admit()?;
                queue.send(item, Instant::now()).await
            }
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
    let fixture = Fixture::new(BatchLimits { max_wait: 10 * TIMEOUT, ..limits() });
    let _calls = fixture.send_all(1..=4).await;
    fixture.numbers.open(0);
    settle().await;
    assert_eq!(fixture.commands()[2..], [vec![3, 4]]);
    let tasks = fixture.queue.0.tasks.clone();
    let began = Instant::now();
    let shutdown = tokio::spawn(async move { tasks.shutdown().await });
    shutdown.await.unwrap();
    let took = began.elapsed();
    assert!(took <= TIMEOUT + Duration::from_millis(2), "{took:?}");
    assert_eq!(fixture.numbers.cut_off().len(), 2, "the two of the batch");
}
