//! A caller drops its future at any of its awaits. The cache and the database agree all the same
//! (I6).

use std::pin::pin;

use serde_json::json;
use tower_sessions::SessionStore;
use tower_sessions::session::Record;

use crate::common::{PATIENCE, Store, create, eventually, on_both_tiers};

/// The largest number of polls before a call is dropped.
const POLLS: usize = 12;

on_both_tiers! {
    dropped_create_is_complete_or_has_not_begun = dropped_create;
    dropped_save_is_complete_or_has_not_begun = dropped_save;
    dropped_load_hides_no_later_change = dropped_load;
    dropped_delete_is_complete_or_has_not_begun = dropped_delete;
    dropped_clear_is_complete_or_has_not_begun = dropped_clear;
    delete_after_a_dropped_save_is_final = delete_after_dropped_save;
    dropped_delete_is_final = save_after_dropped_delete;
}

/// Polls `call` up to `polls` times, lets everything else run between two polls, and drops it.
async fn poll_and_drop(call: impl Future, polls: usize) {
    let mut call = pin!(call);
    for poll in 0..polls {
        if futures::poll!(&mut call).is_ready() {
            return;
        }
        // The first polls follow each other at once. The later ones also let the network proceed.
        for _ in 0..poll {
            tokio::task::yield_now().await;
        }
        if poll > 6 {
            tokio::time::sleep(std::time::Duration::from_micros(100)).await;
        }
    }
}

fn changed(record: &Record) -> Record {
    let mut record = record.clone();
    record.data.insert("changed".to_owned(), json!(true));
    record
}

async fn dropped_create(store: impl Store) {
    for polls in 0..POLLS {
        let mut record = crate::common::record();
        poll_and_drop(store.create(&mut record), polls).await;
        let made = u64::from(polls > 0);
        eventually("the calls in progress have ended", async || store.documents().await == made)
            .await;
        assert_eq!(store.clear().await.unwrap(), made);
        assert_eq!(store.load(&record.id).await.unwrap(), None);
    }
}

async fn dropped_save(store: impl Store) {
    let database = store.another().await;
    for polls in 0..POLLS {
        let record = create(&store).await;
        let save = changed(&record);
        poll_and_drop(store.save(&save), polls).await;
        let expected = if polls > 0 { &save } else { &record };
        for who in ["the database", "the store"] {
            eventually(who, async || {
                let loaded = match who {
                    "the database" => database.load(&record.id).await.unwrap(),
                    _ => store.load(&record.id).await.unwrap(),
                };
                loaded.unwrap().data == expected.data
            })
            .await;
        }
    }
}

async fn dropped_load(store: impl Store) {
    let other = store.another().await;
    for polls in 0..POLLS {
        let gone = create(&other).await;
        let kept = create(&other).await;
        poll_and_drop(store.load(&gone.id), polls).await;
        poll_and_drop(store.load(&kept.id), polls).await;
        store.delete(&gone.id).await.unwrap();
        store.save(&changed(&kept)).await.unwrap();
        for _ in 0..5 {
            assert_eq!(store.load(&gone.id).await.unwrap(), None);
            let loaded = store.load(&kept.id).await.unwrap().unwrap();
            assert_eq!(loaded.data, changed(&kept).data);
            tokio::task::yield_now().await;
        }
    }
}

async fn dropped_delete(store: impl Store) {
    for polls in 0..POLLS {
        let record = create(&store).await;
        poll_and_drop(store.delete(&record.id), polls).await;
        if polls == 0 {
            assert!(store.load(&record.id).await.unwrap().is_some());
            continue;
        }
        eventually("the store", async || store.load(&record.id).await.unwrap().is_none()).await;
        assert!(!store.contains(record.id).await.unwrap());
    }
}

async fn dropped_clear(store: impl Store) {
    for polls in 0..POLLS {
        let record = create(&store).await;
        poll_and_drop(store.clear(), polls).await;
        if polls == 0 {
            assert!(store.load(&record.id).await.unwrap().is_some());
        } else {
            eventually("the database", async || store.documents().await == 0).await;
            eventually("the store", async || store.load(&record.id).await.unwrap().is_none()).await;
        }
        store.clear().await.unwrap();
    }
}

async fn delete_after_dropped_save(store: impl Store) {
    for polls in 0..POLLS {
        let record = create(&store).await;
        poll_and_drop(store.save(&changed(&record)), polls).await;
        store.delete(&record.id).await.unwrap();
        assert_eq!(store.load(&record.id).await.unwrap(), None);
        // Wait until the save has been answered too, whichever came first.
        settle(&store).await;
        assert_eq!(store.load(&record.id).await.unwrap(), None);
        assert!(!store.contains(record.id).await.unwrap());
    }
}

async fn save_after_dropped_delete(store: impl Store) {
    for polls in 1..POLLS {
        let record = create(&store).await;
        poll_and_drop(store.delete(&record.id), polls).await;
        store.save(&changed(&record)).await.unwrap();
        eventually("the store", async || store.load(&record.id).await.unwrap().is_none()).await;
        assert!(!store.contains(record.id).await.unwrap());
    }
}

/// Waits for the calls in progress: makes as many round trips as there may be calls.
async fn settle(store: &impl Store) {
    let round_trips = async {
        for _ in 0..5 {
            store.documents().await;
        }
    };
    tokio::time::timeout(PATIENCE, round_trips).await.unwrap();
}
