//! Races of saves in request scopes, each played call by call over a real batcher.

use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::task::JoinHandle;
use tokio::time::sleep;

use crate::error::{Error, ErrorKind, Result};
use crate::request_scope::changes::OnConflict;
use crate::request_scope::in_request_scope;
use crate::session::id::RawId;
use crate::session::{Data, Session};
use crate::simulation::merge_oracle;
use crate::simulation::operation::Operation;
use crate::simulation::queues::{Queued, is_find, is_replace};
use crate::simulation::world::TIMEOUT;

/// Longer than any call waits in a batch queue.
const MOMENT: Duration = Duration::from_millis(100);

fn object(value: Value) -> Data {
    serde_json::from_value(value).unwrap()
}

fn is_touch(operation: &Operation) -> bool {
    matches!(operation, Operation::Touch(..))
}

fn is_take(operation: &Operation) -> bool {
    matches!(operation, Operation::Take(_))
}

/// A request that has loaded its session. It saves when the test sends it data.
struct Request {
    orders: tokio::sync::mpsc::UnboundedSender<Data>,
    saved: tokio::sync::mpsc::UnboundedReceiver<Result<()>>,
    task: JoinHandle<()>,
}

impl Request {
    fn save(&self, data: Value) {
        self.orders.send(object(data)).unwrap();
    }

    async fn saved(&mut self) -> Result<()> {
        self.saved.recv().await.unwrap()
    }
}

impl Queued {
    fn new() -> Self {
        Self::with(100, Duration::ZERO, Duration::ZERO)
    }

    fn session(&self, data: Value) -> Session {
        Session::new(object(data), self.in_an_hour())
    }

    /// Stores a session as another instance does.
    fn put(&self, id: RawId, data: Value) {
        self.mongo.put(id.key(), Some(self.session(data)));
    }

    fn data(&self, id: RawId) -> Option<Value> {
        self.mongo.stored(id.key()).map(|session| json!(session.data))
    }

    /// Stores a session and starts a request that loads it.
    async fn request(&self, id: RawId) -> Request {
        let (orders, mut to_save) = tokio::sync::mpsc::unbounded_channel();
        let (outcomes, saved) = tokio::sync::mpsc::unbounded_channel();
        let (loaded, is_loaded) = tokio::sync::oneshot::channel();
        let world = self.clone();
        let task = tokio::spawn(in_request_scope(async move {
            loaded.send(world.tiers.load(id).await.unwrap().is_some()).unwrap();
            while let Some(data) = to_save.recv().await {
                let _ = outcomes.send(world.tiers.save(id, &data, world.in_an_hour()).await);
            }
        }));
        let is_loaded = tokio::spawn(is_loaded);
        assert!(self.serve_while(is_loaded).await.unwrap());
        Request { orders, saved, task }
    }

    /// Serves the reads that arrive while `task` runs.
    async fn serve_while<T>(&self, mut task: JoinHandle<T>) -> T {
        loop {
            tokio::select! {
                biased;
                done = &mut task => return done.unwrap(),
                call = self.mongo.arrival(is_find) => self.mongo.serve(call),
            }
        }
    }

    /// A session that is stored and cached.
    async fn with_data(&self, data: Value) -> RawId {
        let id = RawId::random();
        self.put(id, data);
        self.load_data(id).await;
        id
    }

    /// Loads the session. Its read is answered at once.
    async fn load_data(&self, id: RawId) -> Option<Value> {
        let tiers = self.tiers.clone();
        let load = tokio::spawn(async move { tiers.load(id).await.unwrap() });
        self.serve_while(load).await.map(|session| json!(session.data))
    }

    /// Asserts that the cache has this data: a load sends nothing.
    async fn assert_cached(&self, id: RawId, data: Value) {
        let made = self.mongo.made();
        assert_eq!(self.load_data(id).await, Some(data));
        assert_eq!(self.mongo.made(), made, "it is read from memory");
    }

    async fn replace(&self) -> usize {
        self.mongo.arrival(is_replace).await
    }
}

#[tokio::test(start_paused = true)]
async fn a_save_without_a_conflict_is_one_call() {
    let world = Queued::new();
    let id = world.with_data(json!({ "a": 0 })).await;
    let mut request = world.request(id).await;
    let made = world.mongo.made();
    request.save(json!({ "a": 1 }));
    world.serve(is_replace).await;
    request.saved().await.unwrap();
    assert_eq!(world.mongo.made(), made + 1);
    world.assert_cached(id, json!({ "a": 1 })).await;
}

#[tokio::test(start_paused = true)]
async fn a_refused_save_reads_the_session_and_is_sent_again_and_the_cache_has_the_merged_state() {
    let world = Queued::new();
    let id = world.with_data(json!({ "a": 0, "gone": 1 })).await;
    let mut request = world.request(id).await;
    world.put(id, json!({ "a": 0, "b": 2 }));
    request.save(json!({ "a": 1, "gone": 1 }));
    world.serve(is_replace).await;
    world.serve(is_find).await;
    world.serve(is_replace).await;
    request.saved().await.unwrap();
    assert_eq!(world.data(id), Some(json!({ "a": 1, "b": 2 })));
    world.assert_cached(id, json!({ "a": 1, "b": 2 })).await;
    // The request itself does not know of `b`, and keeps it.
    request.save(json!({ "a": 1, "c": 3, "gone": 1 }));
    world.serve(is_replace).await;
    request.saved().await.unwrap();
    assert_eq!(world.data(id), Some(json!({ "a": 1, "b": 2, "c": 3 })));
}

/// ```text
/// request 1    save a ----------> waits
/// request 2    save b -> queued behind it
///                                 a is stored -> answered
///              b builds on it, and is stored without a read
/// ```
#[tokio::test(start_paused = true)]
async fn a_save_that_waits_builds_on_the_save_before_it_without_a_read() {
    let world = Queued::new();
    let id = world.with_data(json!({ "x": 0 })).await;
    let mut first = world.request(id).await;
    let mut second = world.request(id).await;
    let made = world.mongo.made();
    first.save(json!({ "x": 0, "a": 1 }));
    let call = world.replace().await;
    second.save(json!({ "x": 0, "b": 1 }));
    sleep(MOMENT).await;
    world.mongo.serve(call);
    first.saved().await.unwrap();
    world.serve(is_replace).await;
    second.saved().await.unwrap();
    assert_eq!(world.data(id), Some(json!({ "x": 0, "a": 1, "b": 1 })));
    assert_eq!(world.mongo.made(), made + 2, "no read");
    assert_eq!(world.load_data(id).await, Some(json!({ "x": 0, "a": 1, "b": 1 })));
}

/// The first save is stored, and its answer is lost. What it would have left is not handed over.
#[tokio::test(start_paused = true)]
async fn a_save_behind_one_of_unknown_outcome_does_not_build_on_it() {
    for applied in [false, true] {
        let world = Queued::new();
        let id = world.with_data(json!({ "x": 0 })).await;
        let mut first = world.request(id).await;
        let mut second = world.request(id).await;
        first.save(json!({ "x": 0, "a": 1 }));
        let call = world.replace().await;
        second.save(json!({ "x": 0, "b": 1 }));
        sleep(MOMENT).await;
        if applied {
            world.mongo.apply(call);
        }
        world.mongo.fail(call);
        assert_eq!(first.saved().await.unwrap_err().kind(), ErrorKind::Connection);
        world.serve(is_replace).await;
        if applied {
            world.serve(is_find).await;
            world.serve(is_replace).await;
        }
        second.saved().await.unwrap();
        let stored = world.data(id).unwrap();
        assert_eq!(stored.get("a").is_some(), applied);
        assert_eq!(stored["b"], json!(1));
    }
}

#[tokio::test(start_paused = true)]
async fn an_attempt_of_unknown_outcome_is_the_last_one() {
    for attempts in [1, 2] {
        let world = Queued::new();
        let id = world.with_data(json!({ "a": 0 })).await;
        let mut request = world.request(id).await;
        if attempts == 2 {
            world.put(id, json!({ "a": 0, "b": 2 }));
        }
        request.save(json!({ "a": 1 }));
        if attempts == 2 {
            world.serve(is_replace).await;
            world.serve(is_find).await;
        }
        let call = world.replace().await;
        world.mongo.apply(call);
        let made = world.mongo.made();
        world.mongo.fail(call);
        assert_eq!(request.saved().await.unwrap_err().kind(), ErrorKind::Connection);
        sleep(TIMEOUT).await;
        assert_eq!(world.mongo.made(), made, "nothing more is sent");
        assert_eq!(world.load_data(id).await.unwrap()["a"], json!(1), "and nothing is cached");
        assert_eq!(world.mongo.made(), made + 1);
        assert_eq!(world.tiers.backend.load(), [0; 4]);
    }
}

#[tokio::test(start_paused = true)]
async fn a_save_whose_caller_has_timed_out_sends_no_further_attempt() {
    for is_read_late in [false, true] {
        let world = Queued::new();
        let id = world.with_data(json!({ "a": 0 })).await;
        let mut request = world.request(id).await;
        world.put(id, json!({ "a": 0, "b": 2 }));
        request.save(json!({ "a": 1 }));
        let mut late = world.replace().await;
        if is_read_late {
            world.mongo.serve(late);
            late = world.mongo.arrival(is_find).await;
        }
        assert_eq!(request.saved().await.unwrap_err().kind(), ErrorKind::Timeout);
        let made = world.mongo.made();
        world.mongo.serve(late);
        sleep(TIMEOUT).await;
        assert_eq!(world.mongo.made(), made, "nothing more is sent");
        assert_eq!(world.data(id), Some(json!({ "a": 0, "b": 2 })));
        assert_eq!(world.tiers.backend.load(), [0; 4]);
    }
}

#[tokio::test(start_paused = true)]
async fn a_session_that_is_deleted_between_two_attempts_stays_deleted() {
    for before_the_read in [true, false] {
        let world = Queued::new();
        let id = world.with_data(json!({ "a": 0 })).await;
        let mut request = world.request(id).await;
        world.put(id, json!({ "a": 0, "b": 2 }));
        request.save(json!({ "a": 1 }));
        world.serve(is_replace).await;
        if before_the_read {
            world.mongo.put(id.key(), None);
        }
        world.serve(is_find).await;
        if !before_the_read {
            let call = world.replace().await;
            world.mongo.put(id.key(), None);
            world.mongo.serve(call);
        }
        request.saved().await.unwrap();
        assert_eq!(world.data(id), None);
        assert_eq!(world.load_data(id).await, None);
        assert_eq!(world.tiers.backend.load(), [0; 4]);
    }
}

#[tokio::test(start_paused = true)]
async fn the_changes_of_a_cancelled_request_are_merged_and_the_cache_agrees() {
    let world = Queued::new();
    let id = world.with_data(json!({ "a": 0 })).await;
    let request = world.request(id).await;
    world.put(id, json!({ "a": 0, "b": 2 }));
    request.save(json!({ "a": 1 }));
    let call = world.replace().await;
    request.task.abort();
    world.mongo.serve(call);
    world.serve(is_find).await;
    world.serve(is_replace).await;
    sleep(MOMENT).await;
    assert_eq!(world.data(id), Some(json!({ "a": 1, "b": 2 })));
    world.assert_cached(id, json!({ "a": 1, "b": 2 })).await;
}

#[tokio::test(start_paused = true)]
async fn a_touch_waits_for_the_merge_before_it_and_leaves_no_older_state() {
    let world = Queued::new();
    let id = world.with_data(json!({ "a": 0 })).await;
    let mut merging = world.request(id).await;
    let mut touching = world.request(id).await;
    world.put(id, json!({ "a": 0, "b": 2 }));
    merging.save(json!({ "a": 1 }));
    let call = world.replace().await;
    sleep(MOMENT).await;
    touching.save(json!({ "a": 0 }));
    sleep(MOMENT).await;
    assert!(!world.mongo.waiting().iter().any(|(_, operation)| is_touch(operation)));
    world.mongo.serve(call);
    world.serve(is_find).await;
    world.serve(is_replace).await;
    merging.saved().await.unwrap();
    world.serve(is_touch).await;
    touching.saved().await.unwrap();
    assert_eq!(world.data(id), Some(json!({ "a": 1, "b": 2 })));
    assert_eq!(world.load_data(id).await, Some(json!({ "a": 1, "b": 2 })));
}

/// A touch leaves the `rev`, so the first attempt is carried out. The later expiry stays.
#[tokio::test(start_paused = true)]
async fn a_save_keeps_the_later_expiry_that_a_touch_has_stored_since_the_load() {
    let world = Queued::new();
    let id = world.with_data(json!({ "a": 0 })).await;
    let mut request = world.request(id).await;
    let later = world.in_an_hour().after(Duration::from_secs(3_600));
    world.mongo.wire.state().database.touch(id.key(), later);
    request.save(json!({ "a": 1 }));
    world.serve(is_replace).await;
    request.saved().await.unwrap();
    assert_eq!(world.mongo.stored(id.key()).unwrap().expires, later);
}

/// The first save of the request finds the later expiry in the cache. The second one is no shorter than the first.
#[tokio::test(start_paused = true)]
async fn a_second_save_keeps_the_later_expiry_that_a_touch_has_cached() {
    let world = Queued::new();
    let id = world.with_data(json!({ "a": 0 })).await;
    let mut request = world.request(id).await;
    let later = world.in_an_hour().after(Duration::from_secs(3_600));
    let other = world.clone();
    let touch =
        tokio::spawn(async move { other.tiers.save(id, &object(json!({ "a": 0 })), later).await });
    world.serve(is_touch).await;
    touch.await.unwrap().unwrap();
    for a in [1, 2] {
        request.save(json!({ "a": a }));
        world.serve(is_replace).await;
        request.saved().await.unwrap();
        assert_eq!(world.mongo.stored(id.key()).unwrap().expires, later);
    }
}

#[tokio::test(start_paused = true)]
async fn a_plain_save_between_the_load_and_the_save_is_merged() {
    let world = Queued::new();
    let id = world.with_data(json!({ "version": 1, "a": 0 })).await;
    let mut request = world.request(id).await;
    let mut last = world.request(id).await;
    request.save(json!({ "version": 1, "a": 1 }));
    let call = world.replace().await;
    let plain = world.save(id, 7);
    sleep(MOMENT).await;
    last.save(json!({ "version": 1, "a": 0, "b": 1 }));
    sleep(MOMENT).await;
    world.mongo.serve(call);
    request.saved().await.unwrap();
    world.serve(is_replace).await;
    plain.await.unwrap().unwrap();
    // It first builds on what the first save has left, and is refused.
    world.serve(is_replace).await;
    assert_eq!(world.data(id), Some(json!({ "version": 7 })));
    world.serve(is_find).await;
    world.serve(is_replace).await;
    last.saved().await.unwrap();
    assert_eq!(world.data(id), Some(json!({ "version": 7, "b": 1 })));
    assert_eq!(world.load_data(id).await, Some(json!({ "version": 7, "b": 1 })));
}

#[tokio::test(start_paused = true)]
async fn two_requests_that_count_the_same_number_make_two() {
    let world = Queued::resolving(merge_oracle::on_conflict());
    let id = world.with_data(json!({ "n": 5 })).await;
    let mut first = world.request(id).await;
    let mut second = world.request(id).await;
    for request in [&mut first, &mut second] {
        request.save(json!({ "n": 6 }));
    }
    // The second save joins the first one, which has not been sent.
    world.serve(is_replace).await;
    first.saved().await.unwrap();
    second.saved().await.unwrap();
    assert_eq!(world.data(id), Some(json!({ "n": 7 })));
    // The second request has seen 6, and counts on.
    second.save(json!({ "n": 7 }));
    world.serve(is_replace).await;
    second.saved().await.unwrap();
    assert_eq!(world.data(id), Some(json!({ "n": 8 })));
}

/// Each attempt begins with what the request has seen, not with the result of the attempt before it.
#[tokio::test(start_paused = true)]
async fn a_count_that_is_refused_twice_is_added_once() {
    let world = Queued::resolving(merge_oracle::on_conflict());
    let id = world.with_data(json!({ "n": 5 })).await;
    let mut request = world.request(id).await;
    world.put(id, json!({ "n": 6 }));
    request.save(json!({ "n": 6 }));
    world.serve(is_replace).await;
    world.serve(is_find).await;
    let call = world.replace().await;
    world.put(id, json!({ "n": 7 }));
    world.mongo.serve(call);
    world.serve(is_find).await;
    world.serve(is_replace).await;
    request.saved().await.unwrap();
    assert_eq!(world.data(id), Some(json!({ "n": 8 })));
}

#[tokio::test(start_paused = true)]
async fn a_panic_of_on_conflict_is_the_error_of_its_save_alone() {
    let world = Queued::resolving(OnConflict(Arc::new(|_, _, _, _| panic!("on purpose"))));
    let id = world.with_data(json!({ "a": 0 })).await;
    let mut request = world.request(id).await;
    let mut other = world.request(id).await;
    world.put(id, json!({ "a": 1 }));
    request.save(json!({ "a": 2 }));
    world.serve(is_replace).await;
    let find = world.mongo.arrival(is_find).await;
    other.save(json!({ "a": 0, "b": 1 }));
    sleep(MOMENT).await;
    world.mongo.serve(find);
    assert_eq!(request.saved().await.unwrap_err().kind(), ErrorKind::Panic);
    world.serve(is_replace).await;
    world.serve(is_find).await;
    world.serve(is_replace).await;
    other.saved().await.unwrap();
    assert_eq!(world.data(id), Some(json!({ "a": 1, "b": 1 })));
    assert_eq!(world.tiers.backend.load(), [0; 4]);
}

#[tokio::test(start_paused = true)]
async fn merges_that_wait_are_sent_together_in_the_order_of_the_calls() {
    let world = Queued::new();
    let id = world.with_data(json!({ "x": 0 })).await;
    let mut requests = Vec::new();
    for _ in 0..4 {
        requests.push(world.request(id).await);
    }
    let made = world.mongo.made();
    requests[0].save(json!({ "x": 0, "a": 1 }));
    let call = world.replace().await;
    for (request, data) in requests[1..].iter().zip([
        json!({ "x": 0, "b": 1 }),
        json!({ "x": 2, "c": 1 }),
        json!({ "x": 3 }),
    ]) {
        request.save(data);
        sleep(MOMENT).await;
    }
    world.mongo.serve(call);
    requests[0].saved().await.unwrap();
    world.serve(is_replace).await;
    for request in &mut requests[1..] {
        request.saved().await.unwrap();
    }
    let all = json!({ "x": 3, "a": 1, "b": 1, "c": 1 });
    assert_eq!(world.data(id), Some(all.clone()));
    assert_eq!(world.mongo.made(), made + 2, "three saves are one call");
    assert_eq!(world.load_data(id).await, Some(all));
    assert_eq!(world.tiers.backend.load(), [0; 4]);
}

#[tokio::test(start_paused = true)]
async fn a_merge_that_fails_by_itself_does_not_fail_those_that_are_sent_with_it() {
    let world = Queued::resolving(OnConflict(Arc::new(|_, _, _, _| panic!("on purpose"))));
    let id = world.with_data(json!({ "x": 0 })).await;
    let mut first = world.request(id).await;
    let mut fails = world.request(id).await;
    let mut joins = world.request(id).await;
    first.save(json!({ "x": 1 }));
    let call = world.replace().await;
    fails.save(json!({ "x": 2 }));
    sleep(MOMENT).await;
    joins.save(json!({ "x": 0, "b": 1 }));
    sleep(MOMENT).await;
    world.mongo.serve(call);
    first.saved().await.unwrap();
    world.serve(is_replace).await;
    assert_eq!(fails.saved().await.unwrap_err().kind(), ErrorKind::Panic);
    joins.saved().await.unwrap();
    assert_eq!(world.data(id), Some(json!({ "x": 1, "b": 1 })));
    assert_eq!(world.tiers.backend.load(), [0; 4]);
}

#[tokio::test(start_paused = true)]
async fn an_unknown_outcome_is_that_of_all_merges_that_were_sent_together() {
    let world = Queued::new();
    let id = world.with_data(json!({ "x": 0 })).await;
    let mut first = world.request(id).await;
    let mut second = world.request(id).await;
    let mut third = world.request(id).await;
    first.save(json!({ "x": 0, "a": 1 }));
    let call = world.replace().await;
    second.save(json!({ "x": 0, "b": 1 }));
    sleep(MOMENT).await;
    third.save(json!({ "x": 0, "c": 1 }));
    sleep(MOMENT).await;
    world.mongo.serve(call);
    first.saved().await.unwrap();
    let call = world.replace().await;
    world.mongo.apply(call);
    world.mongo.fail(call);
    for request in [&mut second, &mut third] {
        assert_eq!(request.saved().await.unwrap_err().kind(), ErrorKind::Connection);
    }
    let stored = json!({ "x": 0, "a": 1, "b": 1, "c": 1 });
    assert_eq!(world.load_data(id).await, Some(stored), "the cache has no older state");
}

#[tokio::test(start_paused = true)]
async fn a_merge_does_not_join_one_that_was_called_before_a_plain_save() {
    let world = Queued::new();
    let id = world.with_data(json!({ "x": 0 })).await;
    let mut first = world.request(id).await;
    let mut waits = world.request(id).await;
    let mut last = world.request(id).await;
    first.save(json!({ "x": 0, "a": 1 }));
    let call = world.replace().await;
    waits.save(json!({ "x": 0, "b": 1 }));
    sleep(MOMENT).await;
    let plain = world.clone();
    let plain = tokio::spawn(async move {
        plain.tiers.save(id, &object(json!({ "x": 5 })), plain.in_an_hour()).await
    });
    sleep(MOMENT).await;
    last.save(json!({ "x": 0, "c": 1 }));
    sleep(MOMENT).await;
    world.mongo.serve(call);
    first.saved().await.unwrap();
    world.serve(is_replace).await;
    waits.saved().await.unwrap();
    world.serve(is_replace).await;
    plain.await.unwrap().unwrap();
    // It builds on the merge before the plain save, is refused, and reads.
    world.serve(is_replace).await;
    world.serve(is_find).await;
    world.serve(is_replace).await;
    last.saved().await.unwrap();
    assert_eq!(world.data(id), Some(json!({ "x": 5, "c": 1 })));
}

#[tokio::test(start_paused = true)]
async fn a_session_that_changes_without_a_pause_is_a_conflict_after_64_attempts() {
    let world = Queued::new();
    let id = world.with_data(json!({ "a": 0 })).await;
    let mut request = world.request(id).await;
    world.put(id, json!({ "a": 0, "b": 0 }));
    let made = world.mongo.made();
    request.save(json!({ "a": 1 }));
    for attempt in 1..=64 {
        world.serve(is_replace).await;
        if attempt < 64 {
            world.serve(is_find).await;
            world.put(id, json!({ "a": 0, "b": attempt }));
        }
    }
    assert_eq!(request.saved().await.unwrap_err().kind(), ErrorKind::Conflict);
    assert_eq!(world.mongo.made(), made + 64 + 63);
    assert_eq!(world.data(id), Some(json!({ "a": 0, "b": 63 })));
    assert_eq!(world.tiers.backend.load(), [0; 4]);
}

/// Its stream reports the merge before the answer arrives. The attempts share one `rev`, so the cache knows it.
#[tokio::test(start_paused = true)]
async fn all_attempts_of_a_save_have_one_rev() {
    let world = Queued::new();
    let id = world.with_data(json!({ "a": 0 })).await;
    let mut request = world.request(id).await;
    world.put(id, json!({ "a": 0, "b": 2 }));
    request.save(json!({ "a": 1 }));
    let rev_of = |call: usize| {
        world.mongo.waiting().into_iter().find_map(|(it, operation)| match operation {
            Operation::Replace(_, rev, ..) if it == call => Some(rev),
            _ => None,
        })
    };
    let call = world.replace().await;
    let first = rev_of(call);
    world.mongo.serve(call);
    world.serve(is_find).await;
    let call = world.replace().await;
    assert!(first.is_some() && rev_of(call) == first);
    world.mongo.serve(call);
    request.saved().await.unwrap();
}

/// What `cycle_id` does. Returns the new id.
async fn cycle(world: &Queued, id: RawId, data: Value) -> Result<RawId, Error> {
    world.tiers.delete(id).await?;
    world.tiers.create(RawId::random(), &object(data), world.in_an_hour()).await
}

/// The delete is carried out, and its answer is lost. Nobody knows whether this request has ended the session.
#[tokio::test(start_paused = true)]
async fn a_request_whose_delete_has_an_unknown_outcome_stores_no_new_session() {
    let world = Queued::new();
    let id = world.with_data(json!({ "user": 1 })).await;
    let in_task = world.clone();
    let request = tokio::spawn(in_request_scope(async move {
        in_task.tiers.load(id).await.unwrap().unwrap();
        let failed = cycle(&in_task, id, json!({ "user": 1 })).await.unwrap_err();
        let data = object(json!({ "user": 1 }));
        let new = in_task.tiers.create(RawId::random(), &data, in_task.in_an_hour()).await;
        (failed, new.unwrap())
    }));
    let call = world.mongo.arrival(is_take).await;
    world.mongo.apply(call);
    world.mongo.fail(call);
    let (failed, new) = request.await.unwrap();
    assert_eq!(failed.kind(), ErrorKind::Connection);
    assert_eq!((world.data(id), world.data(new)), (None, None));
}

/// Another request saves between the load and the delete. The new session has its changes, and its expiry.
#[tokio::test(start_paused = true)]
async fn a_new_id_keeps_what_was_stored_before_the_delete() {
    let world = Queued::new();
    let id = world.with_data(json!({ "user": 1 })).await;
    let in_task = world.clone();
    let (go, may_go) = tokio::sync::oneshot::channel();
    let request = tokio::spawn(in_request_scope(async move {
        in_task.tiers.load(id).await.unwrap().unwrap();
        may_go.await.unwrap();
        cycle(&in_task, id, json!({ "user": 1, "seen": true })).await.unwrap()
    }));
    sleep(MOMENT).await;
    let later = world.in_an_hour().after(Duration::from_secs(60));
    let cart = Session::new(object(json!({ "user": 1, "cart": 2 })), later);
    world.mongo.put(id.key(), Some(cart));
    let created = world.mongo.stored(id.key()).unwrap().created;
    sleep(MOMENT).await;
    go.send(()).unwrap();
    world.serve(is_take).await;
    world.serve(|operation| matches!(operation, Operation::Insert(..))).await;
    let new = request.await.unwrap();
    let stored = world.mongo.stored(new.key()).unwrap();
    assert_eq!(json!(stored.data), json!({ "user": 1, "cart": 2, "seen": true }));
    assert_eq!((stored.expires, stored.created), (later, created));
    assert_eq!(world.data(id), None);
}

/// A load that fails leaves the request without a base. So its save is no merge with nothing: it stores what the app
/// has, as without a scope.
#[tokio::test(start_paused = true)]
async fn a_failed_load_is_no_base() {
    let world = Queued::new();
    let id = RawId::random();
    world.put(id, json!({ "user": 1 }));
    let in_task = world.clone();
    let request = tokio::spawn(in_request_scope(async move {
        let failed = in_task.tiers.load(id).await.unwrap_err();
        let saved = in_task.tiers.save(id, &object(json!({ "a": 1 })), in_task.in_an_hour()).await;
        (failed.kind(), saved)
    }));
    let find = world.mongo.arrival(is_find).await;
    world.mongo.fail(find);
    let call = world.replace().await;
    let has_condition = world.mongo.waiting().iter().any(|(_, operation)| operation.is_merge());
    assert!(!has_condition);
    world.mongo.serve(call);
    let (failed, saved) = request.await.unwrap();
    assert_eq!(failed, ErrorKind::Connection);
    saved.unwrap();
    assert_eq!(world.data(id), Some(json!({ "a": 1 })));
}
