//! Races between the operations of one store, each played call by call.

use std::time::Duration;

use crate::error::ErrorKind;
use crate::session::Session;
use crate::session::id::RawId;
use crate::session::revision::Change;
use crate::simulation::operation::Operation;
use crate::simulation::types::data;
use crate::simulation::world::{MAX_STALENESS, World};

fn is_remove(operation: &Operation) -> bool {
    matches!(operation, Operation::Remove(_))
}

fn is_replace(operation: &Operation) -> bool {
    matches!(operation, Operation::Replace(..))
}

#[tokio::test(start_paused = true)]
async fn a_loaded_session_is_served_from_memory() {
    let world = World::new();
    let id = world.stored(1);
    assert_eq!(world.load(id).await, Some(1));
    let made = world.mongo.made();
    assert_eq!(world.load(id).await, Some(1));
    assert_eq!(world.mongo.made(), made);
}

#[tokio::test(start_paused = true)]
async fn a_slow_load_that_overlaps_a_delete_leaves_nothing_cached() {
    let world = World::new();
    let id = world.stored(1);
    let (load, find) = world.cold_load(id).await;
    world.mongo.apply(find);
    world.delete(id).await;
    world.mongo.answer(find);
    assert_eq!(load.await.unwrap().unwrap(), Some(1), "the load began before the delete");
    assert_eq!(world.load(id).await, None);
}

#[tokio::test(start_paused = true)]
async fn a_load_after_a_delete_does_not_wait_for_a_read_from_before_it() {
    let world = World::new();
    let id = world.stored(1);
    let (_load, find) = world.cold_load(id).await;
    world.mongo.apply(find);
    world.delete(id).await;
    assert_eq!(world.load(id).await, None);
}

#[tokio::test(start_paused = true)]
async fn a_slow_load_that_overlaps_a_save_does_not_bring_the_old_version_back() {
    let world = World::new();
    let id = world.stored(1);
    let (load, find) = world.cold_load(id).await;
    world.mongo.apply(find);
    world.save(id, 2).await.unwrap();
    world.mongo.answer(find);
    load.await.unwrap().unwrap();
    assert_eq!(world.load(id).await, Some(2));
}

#[tokio::test(start_paused = true)]
async fn two_saves_whose_answers_cross_leave_the_entry_of_the_later_one_or_none() {
    let world = World::new();
    let id = world.stored(1);
    let first = world.spawn_save(id, 2);
    let call_2 = world.mongo.arrival(is_replace).await;
    let second = world.spawn_save(id, 3);
    let call_3 = world.mongo.arrival(|op| is_replace(op) && world.mongo.waiting().len() == 2).await;
    let call_3 = world.mongo.waiting().iter().map(|(call, _)| *call).max().unwrap_or(call_3);
    world.mongo.apply(call_2);
    world.mongo.apply(call_3);
    world.mongo.answer(call_3);
    second.await.unwrap().unwrap();
    world.mongo.answer(call_2);
    first.await.unwrap().unwrap();
    assert_eq!(world.load(id).await, Some(3));
}

#[tokio::test(start_paused = true)]
async fn a_save_whose_report_overtakes_its_answer_stays_cached() {
    let world = World::new();
    let id = world.stored(1);
    world.tiers.cache.reset(true);
    world.load(id).await;
    let save = world.spawn_save(id, 2);
    let call = world.mongo.arrival(is_replace).await;
    let rev = world.mongo.waiting().into_iter().find_map(|(_, operation)| match operation {
        Operation::Replace(_, rev, ..) => Some(rev),
        _ => None,
    });
    world.mongo.apply(call);
    let origin = world.tiers.cache.apply_change(&Change { key: id.key(), rev });
    assert!(origin.has_invalidated(), "the entry from before the save is still cached");
    world.mongo.answer(call);
    save.await.unwrap().unwrap();
    let made = world.mongo.made();
    assert_eq!(world.load(id).await, Some(2));
    assert_eq!(world.mongo.made(), made);
}

#[tokio::test(start_paused = true)]
async fn a_save_that_fails_leaves_nothing_cached() {
    let world = World::new();
    let id = world.stored(1);
    world.load(id).await;
    let save = world.spawn_save(id, 2);
    let call = world.mongo.arrival(is_replace).await;
    world.mongo.apply(call);
    world.mongo.fail(call);
    assert_eq!(save.await.unwrap().unwrap_err().kind(), ErrorKind::Connection);
    assert_eq!(
        world.load(id).await,
        Some(2),
        "the database has stored it, and the cache does not know that"
    );
    assert_eq!(world.mongo.made(), 3);
}

#[tokio::test(start_paused = true)]
async fn a_save_that_times_out_leaves_nothing_cached_even_if_it_completes_later() {
    let world = World::new();
    let id = world.stored(1);
    world.load(id).await;
    let error = world.tiers.save(id, &data(2), world.in_an_hour()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Timeout);
    let call = world.mongo.arrival(is_replace).await;
    assert_eq!(world.load(id).await, Some(1), "read again, since the outcome is unknown");
    world.mongo.serve(call);
    tokio::task::yield_now().await;
    assert_eq!(world.load(id).await, Some(2), "evicted again when the save ended");
}

#[tokio::test(start_paused = true)]
async fn a_cancelled_save_is_carried_out_and_the_cache_agrees() {
    let world = World::new();
    let id = world.stored(1);
    world.load(id).await;
    let save = world.spawn_save(id, 2);
    let call = world.mongo.arrival(is_replace).await;
    save.abort();
    assert!(save.await.unwrap_err().is_cancelled());
    world.mongo.serve(call);
    tokio::task::yield_now().await;
    assert_eq!(world.load(id).await, Some(2));
}

#[tokio::test(start_paused = true)]
async fn a_cancelled_delete_is_carried_out_and_leaves_nothing_cached() {
    let world = World::new();
    let id = world.stored(1);
    world.load(id).await;
    let tiers = world.tiers.clone();
    let delete = tokio::spawn(async move { tiers.delete(id).await });
    let call = world.mongo.arrival(is_remove).await;
    delete.abort();
    assert!(delete.await.unwrap_err().is_cancelled());
    world.mongo.serve(call);
    tokio::task::yield_now().await;
    assert_eq!(world.load(id).await, None);
}

#[tokio::test(start_paused = true)]
async fn other_loads_share_the_read_of_a_first_load_that_was_cancelled() {
    let world = World::new();
    let id = world.stored(1);
    let (first, find) = world.cold_load(id).await;
    let rest: Vec<_> = (0..999).map(|_| world.spawn_load(id)).collect();
    tokio::task::yield_now().await;
    first.abort();
    world.mongo.serve(find);
    for load in rest {
        assert_eq!(load.await.unwrap().unwrap(), Some(1));
    }
    assert_eq!(world.mongo.made(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_failed_read_is_an_error_and_not_an_absence_for_all_loads_that_share_it() {
    let world = World::new();
    let id = world.stored(1);
    let (first, find) = world.cold_load(id).await;
    let second = world.spawn_load(id);
    tokio::task::yield_now().await;
    world.mongo.fail(find);
    assert_eq!(first.await.unwrap().unwrap_err().kind(), ErrorKind::Connection);
    assert_eq!(second.await.unwrap().unwrap_err().kind(), ErrorKind::Connection);
    assert_eq!(world.load(id).await, Some(1));
}

#[tokio::test(start_paused = true)]
async fn a_save_of_a_session_that_is_gone_stores_and_caches_nothing() {
    let world = World::new();
    let id = world.stored(1);
    world.load(id).await;
    world.mongo.put(id.key(), None);
    world.save(id, 2).await.unwrap();
    assert_eq!(world.mongo.stored(id.key()), None);
    assert_eq!(world.load(id).await, None);
}

#[tokio::test(start_paused = true)]
async fn an_entry_is_served_until_the_staleness_bound_and_not_longer() {
    let world = World::new();
    let id = world.stored(1);
    world.load(id).await;
    world.mongo.put(id.key(), Some(Session::new(data(2), world.in_an_hour())));
    tokio::time::advance(MAX_STALENESS).await;
    assert_eq!(world.load(id).await, Some(1));
    tokio::time::advance(Duration::from_millis(1)).await;
    assert_eq!(world.load(id).await, Some(2));
}

#[tokio::test(start_paused = true)]
async fn the_age_of_an_entry_counts_from_the_start_of_its_read() {
    let world = World::new();
    let id = world.stored(1);
    let (load, find) = world.cold_load(id).await;
    world.mongo.apply(find);
    tokio::time::advance(Duration::from_secs(4)).await;
    world.mongo.answer(find);
    load.await.unwrap().unwrap();
    world.mongo.put(id.key(), None);
    tokio::time::advance(Duration::from_secs(2)).await;
    assert_eq!(world.load(id).await, None);
}

#[tokio::test(start_paused = true)]
async fn an_expired_entry_is_a_miss() {
    let world = World::new();
    let id = RawId::random();
    let expires = world.clock.wall().after(Duration::from_secs(1));
    world.mongo.put(id.key(), Some(Session::new(data(1), expires)));
    assert_eq!(world.load(id).await, Some(1));
    tokio::time::advance(Duration::from_secs(1)).await;
    assert_eq!(world.load(id).await, None);
    assert_eq!(world.mongo.made(), 2);
}

#[tokio::test(start_paused = true)]
async fn a_clear_invalidates_reads_in_progress() {
    let world = World::new();
    let cached = world.stored(1);
    let loading = world.stored(2);
    world.load(cached).await;
    let (load, find) = world.cold_load(loading).await;
    world.mongo.apply(find);
    assert_eq!(world.clear().await, 2);
    world.mongo.answer(find);
    load.await.unwrap().unwrap();
    assert_eq!(world.load(cached).await, None);
    assert_eq!(world.load(loading).await, None);
}

#[tokio::test(start_paused = true)]
async fn an_unknown_id_is_remembered_and_a_flood_of_them_evicts_no_session() {
    let world = World::new();
    let id = world.stored(1);
    world.load(id).await;
    let unknown = RawId::random();
    assert_eq!(world.load(unknown).await, None);
    let made = world.mongo.made();
    assert_eq!(world.load(unknown).await, None);
    assert_eq!(world.mongo.made(), made);
    for _ in 0..2_000 {
        world.load(RawId::random()).await;
    }
    let made = world.mongo.made();
    assert_eq!(world.load(id).await, Some(1));
    assert_eq!(world.mongo.made(), made);
}

#[tokio::test(start_paused = true)]
async fn a_key_is_tracked_only_while_an_operation_on_it_runs() {
    let world = World::new();
    let id = world.stored(1);
    let (load, find) = world.cold_load(id).await;
    assert_eq!(world.tiers.cache.tracked_keys(), 1);
    world.mongo.serve(find);
    load.await.unwrap().unwrap();
    world.save(id, 2).await.unwrap();
    world.delete(id).await;
    assert_eq!(world.tiers.cache.tracked_keys(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_load_does_not_wait_for_a_read_that_began_longer_ago_than_the_bound() {
    let world = World::with_max_staleness(Duration::from_secs(1));
    let id = world.stored(1);
    let (first, find) = world.cold_load(id).await;
    world.mongo.apply(find);
    world.mongo.put(id.key(), None);
    tokio::time::advance(Duration::from_secs(2)).await;
    assert_eq!(world.load(id).await, None);
    world.mongo.answer(find);
    assert_eq!(first.await.unwrap().unwrap(), Some(1), "the load began before the change");
    assert_eq!(world.load(id).await, None);
}
