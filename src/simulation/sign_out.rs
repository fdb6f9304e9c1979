//! Races of a sign-out, which removes the sessions of one owner page by page.

use std::time::Duration;

use tokio::task::JoinHandle;

use crate::error::{ErrorKind, Result};
use crate::session::Session;
use crate::simulation::operation::Operation;
use crate::simulation::owned_pages::OwnedPages;
use crate::simulation::types::{data, owner_of};
use crate::simulation::world::{TIMEOUT, World};

impl World {
    fn spawn_sign_out(&self, owner: u64) -> JoinHandle<Result<u64>> {
        let tiers = self.tiers.clone();
        let pages = OwnedPages::new(self.mongo.clone(), owner);
        tokio::spawn(async move { tiers.delete_pages(pages).await })
    }

    async fn sign_out(&self, owner: u64) -> u64 {
        self.answer_while(self.spawn_sign_out(owner)).await.unwrap()
    }
}

fn is_replace(operation: &Operation) -> bool {
    matches!(operation, Operation::Replace(..))
}

fn is_remove(operation: &Operation) -> bool {
    matches!(operation, Operation::Remove(_))
}

#[tokio::test(start_paused = true)]
async fn a_sign_out_removes_the_sessions_of_the_owner_on_all_pages() {
    let world = World::new();
    let ids: Vec<_> = (0..10).map(|version| world.stored(version)).collect();
    for id in &ids {
        world.load(*id).await;
    }
    assert_eq!(world.sign_out(1).await, 5);
    for (version, id) in (0..10).zip(&ids) {
        let wanted = (owner_of(version) != 1).then_some(version);
        assert_eq!(world.load(*id).await, wanted);
    }
    assert_eq!(world.tiers.cache.tracked_keys(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_sign_out_evicts_a_session_that_a_pending_save_takes_from_the_owner() {
    let world = World::new();
    let id = world.stored(1);
    world.load(id).await;
    let save = world.spawn_save(id, 2);
    let call = world.mongo.arrival(is_replace).await;
    world.mongo.apply(call);
    assert_eq!(world.sign_out(1).await, 0);
    assert_eq!(world.load(id).await, Some(2));
    world.mongo.answer(call);
    save.await.unwrap().unwrap();
    assert_eq!(world.load(id).await, Some(2));
    assert_eq!(world.tiers.cache.tracked_keys(), 0);
}

/// The save has timed out for its caller. The session is read again. Then the database carries out the save.
#[tokio::test(start_paused = true)]
async fn a_sign_out_evicts_a_session_that_a_timed_out_save_takes_from_the_owner() {
    let world = World::with_max_staleness(TIMEOUT * 10);
    let id = world.stored(1);
    let save = world.spawn_save(id, 2);
    let call = world.mongo.arrival(is_replace).await;
    assert_eq!(save.await.unwrap().unwrap_err().kind(), ErrorKind::Timeout);
    assert_eq!(world.load(id).await, Some(1));
    world.mongo.apply(call);
    assert_eq!(world.sign_out(1).await, 0);
    assert_eq!(world.load(id).await, Some(2));
}

#[tokio::test(start_paused = true)]
async fn a_sign_out_evicts_a_session_that_a_timed_out_delete_has_removed() {
    let world = World::with_max_staleness(TIMEOUT * 10);
    let id = world.stored(1);
    let tiers = world.tiers.clone();
    let delete = tokio::spawn(async move { tiers.delete(id).await });
    let call = world.mongo.arrival(is_remove).await;
    assert_eq!(delete.await.unwrap().unwrap_err().kind(), ErrorKind::Timeout);
    assert_eq!(world.load(id).await, Some(1));
    world.mongo.apply(call);
    assert_eq!(world.sign_out(1).await, 0);
    assert_eq!(world.load(id).await, None);
    world.mongo.answer(call);
    tokio::time::sleep(Duration::from_millis(1)).await;
    assert_eq!(world.tiers.cache.tracked_keys(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_sign_out_keeps_cached_sessions_without_pending_writes() {
    let world = World::new();
    let id = world.stored(2);
    world.load(id).await;
    let reading = world.stored(4);
    let (load, find) = world.cold_load(reading).await;
    world.mongo.apply(find);
    assert_eq!(world.sign_out(1).await, 0);
    world.mongo.answer(find);
    load.await.unwrap().unwrap();
    let made = world.mongo.made();
    assert_eq!(world.load(id).await, Some(2));
    assert_eq!(world.load(reading).await, Some(4));
    assert_eq!(world.mongo.made(), made, "both are cached");
}

/// The removal of a page checks the owner again.
#[tokio::test(start_paused = true)]
async fn a_sign_out_keeps_a_session_that_changes_its_owner_before_its_page_is_removed() {
    let world = World::new();
    let id = world.stored(1);
    world.load(id).await;
    let sign_out = world.spawn_sign_out(1);
    let find = world.mongo.arrival(|it| matches!(it, Operation::FindOwned(..))).await;
    world.mongo.serve(find);
    let remove = world.mongo.arrival(|it| matches!(it, Operation::RemoveOwned(..))).await;
    world.mongo.put(id.key(), Some(Session::new(data(2), world.in_an_hour())));
    world.mongo.serve(remove);
    assert_eq!(world.answer_while(sign_out).await.unwrap(), 0);
    assert_eq!(world.load(id).await, Some(2));
}
