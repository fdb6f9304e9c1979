//! Ending sessions by what the database finds, as a sign-out does.
//!
//! The owner of a simulated session is a part of its version, so that a save may change it.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::backend::delete_pages::{DeletePage, DeletePages};
use crate::error::{ErrorKind, Result};
use crate::session::id::SessionKey;
use crate::simulation::backend::FakeBackend;
use crate::simulation::operation::{Operation, Outcome};
use crate::simulation::*;

/// How many sessions one page has.
pub(crate) const PAGE: usize = 2;
const OWNERS: u64 = 2;

pub(crate) fn owner(version: u64) -> u64 {
    version % OWNERS
}

/// Sessions, and what each must be at least by now, as a [rank](crate::simulation::database::Span::rank).
pub(crate) type Floors = Vec<(usize, usize)>;

/// A walk along the sessions of an owner.
pub(crate) struct OwnedPages {
    mongo: FakeBackend,
    owner: u64,
    after: Option<usize>,
    reached: Arc<Mutex<Reached>>,
}

/// How far a walk has come.
#[derive(Default)]
pub(crate) struct Reached {
    /// What writes of this store had made of each session when it was looked for, though their answers
    /// were not here yet.
    pub(crate) pending: Floors,
    /// What the sessions on the pages are once their removal was answered, or has failed.
    pub(crate) removed: Floors,
}

impl OwnedPages {
    pub(crate) fn new(mongo: FakeBackend, owner: u64) -> Self {
        Self { mongo, owner, after: None, reached: Arc::default() }
    }

    pub(crate) fn reached(&self) -> Arc<Mutex<Reached>> {
        Arc::clone(&self.reached)
    }
}

impl DeletePages for OwnedPages {
    async fn next(&mut self) -> Result<Option<DeletePage>> {
        let find = Operation::FindOwned(self.owner, self.after);
        let found = self.mongo.call(find, |outcome| match outcome {
            Outcome::Owned(found) => Some(found),
            _ => None,
        });
        let found = found.await?;
        self.reached.lock().unwrap().pending.extend(found.pending);
        let Some((last, ..)) = found.sessions.last() else { return Ok(None) };
        self.after = Some(*last);
        let mut page = DeletePage::default();
        for (_, key, live) in found.sessions {
            if live { &mut page.live } else { &mut page.expired }.push(key);
        }
        Ok(Some(page))
    }

    async fn remove(&self, keys: &[SessionKey]) -> Result<u64> {
        if keys.is_empty() {
            return Ok(0);
        }
        let remove = Operation::RemoveOwned(keys.to_vec(), self.owner);
        let removed = self.mongo.call(remove, |outcome| match outcome {
            Outcome::Ended(count, ranks) => Some((count, ranks)),
            _ => None,
        });
        match removed.await {
            Ok((count, ranks)) => {
                self.reached.lock().unwrap().removed.extend(ranks);
                Ok(count)
            }
            Err(error) => {
                let ranks = self.mongo.ranks(keys);
                self.reached.lock().unwrap().removed.extend(ranks);
                Err(error)
            }
        }
    }
}

/// What the database finds of an owner.
#[derive(Clone, Debug)]
pub(crate) struct Found {
    /// Its number, its key, and whether it is live.
    pub(crate) sessions: Vec<(usize, SessionKey, bool)>,
    pub(crate) pending: Floors,
}

impl World {
    fn spawn_sign_out(&self, owner: u64) -> tokio::task::JoinHandle<Result<u64>> {
        let tiers = self.tiers.clone();
        let pages = OwnedPages::new(self.mongo.clone(), owner);
        tokio::spawn(async move { tiers.delete_pages(pages).await })
    }

    async fn sign_out(&self, owner: u64) -> u64 {
        self.answer_while(self.spawn_sign_out(owner)).await.unwrap()
    }

    fn spawn_save(&self, id: RawId, version: u64) -> tokio::task::JoinHandle<Result<()>> {
        let tiers = self.tiers.clone();
        let expires = self.in_an_hour();
        tokio::spawn(async move { tiers.save(id, &data(version), expires).await })
    }
}

fn is_replace(operation: &Operation) -> bool {
    matches!(operation, Operation::Replace(..))
}

fn is_remove(operation: &Operation) -> bool {
    matches!(operation, Operation::Remove(_))
}

#[tokio::test(start_paused = true)]
async fn a_sign_out_ends_the_sessions_of_the_owner_on_all_pages() {
    let world = World::new();
    let ids: Vec<_> = (0..10).map(|version| world.stored(version)).collect();
    for id in &ids {
        world.load(*id).await;
    }
    assert_eq!(world.sign_out(1).await, 5);
    for (version, id) in (0..10).zip(&ids) {
        let wanted = (owner(version) != 1).then_some(version);
        assert_eq!(world.load(*id).await, wanted);
    }
    assert_eq!(world.tiers.cache.tracked_keys(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_sign_out_forgets_what_a_save_in_flight_has_taken_from_the_owner() {
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

/// The caller was told that the save has timed out. The session is read again, and then the save lands.
#[tokio::test(start_paused = true)]
async fn a_sign_out_forgets_what_a_save_that_lands_late_has_taken_from_the_owner() {
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
async fn a_sign_out_forgets_what_a_delete_that_lands_late_has_removed() {
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
async fn a_sign_out_leaves_the_sessions_that_nobody_writes_in_the_cache() {
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

/// The filter is asked again when a page is removed: who is the owner by then counts.
#[tokio::test(start_paused = true)]
async fn a_session_that_changes_its_owner_before_its_page_is_removed_is_left() {
    let world = World::new();
    let id = world.stored(1);
    world.load(id).await;
    let sign_out = world.spawn_sign_out(1);
    let find = world.mongo.arrival(|it| matches!(it, Operation::FindOwned(..))).await;
    world.mongo.serve(find);
    let remove = world.mongo.arrival(|it| matches!(it, Operation::RemoveOwned(..))).await;
    world.mongo.put(id.key(), Some(Session { data: data(2), expires: world.in_an_hour() }));
    world.mongo.serve(remove);
    assert_eq!(world.answer_while(sign_out).await.unwrap(), 0);
    assert_eq!(world.load(id).await, Some(2));
}
