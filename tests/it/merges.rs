//! Parallel requests of one session keep each other's changes.

mod app;
mod conflicts;
mod faults;
mod forms;
mod metered;
mod over_http;
mod reports;

use serde_json::{Value, json};
use tower_sessions::SessionStore;
use tower_sessions::session::{Id, Record};
use tower_sessions_moka_mongodb_store::{MongoStore, in_request_scope};

use crate::common::{PATIENCE, Store, cache_of, in_the_future, on_both_tiers, record, uri};

on_both_tiers! {
    requests_that_change_different_keys_keep_each_others_changes = different_keys;
    a_save_without_a_change_keeps_what_others_changed = unchanged;
    a_save_keeps_the_later_expiry_that_another_request_has_stored = later_expiry;
    cycle_id_keeps_what_others_saved_before_it = cycle_keeps;
    cycle_id_of_a_session_that_somebody_else_has_ended_stores_nothing = cycle_of_ended;
    a_second_save_keeps_the_later_expiry_that_the_first_one_met = later_expiry_twice;
    cycle_id_of_a_session_that_a_later_load_did_not_find_stores_nothing = cycle_after_a_vain_load;
    a_new_session_after_a_vain_load_is_stored = new_after_a_vain_load;
    after_flush_a_request_may_store_a_new_session = flush;
    log_in_after_flush_is_stored_and_has_nothing_of_the_old_session = log_in_after_flush;
}

/// Stores a session with this data.
async fn stored(store: &impl Store, data: Value) -> Id {
    let mut record = record();
    record.data = serde_json::from_value(data).unwrap();
    store.create(&mut record).await.unwrap();
    record.id
}

async fn data(store: &impl Store, id: Id) -> Value {
    json!(store.load(&id).await.unwrap().unwrap().data)
}

/// Loads, lets `meanwhile` happen, and saves with these keys set, all as one request.
async fn request(
    store: &impl Store,
    id: Id,
    meanwhile: impl Future<Output = ()>,
    change: impl FnOnce(&mut Record),
) {
    let request = async {
        let mut record = store.load(&id).await.unwrap().unwrap();
        meanwhile.await;
        change(&mut record);
        record.expiry_date = in_the_future();
        store.save(&record).await.unwrap();
    };
    in_request_scope(request).await;
}

fn set(key: &'static str, value: Value) -> impl FnOnce(&mut Record) {
    move |record| drop(record.data.insert(key.to_owned(), value))
}

async fn different_keys(store: impl Store) {
    let id = stored(&store, json!({ "gone": 1, "kept": 1 })).await;
    let other = request(&store, id, async {}, |record| {
        record.data.remove("gone");
        record.data.insert("b".to_owned(), json!(2));
    });
    request(&store, id, other, set("a", json!(1))).await;
    assert_eq!(data(&store, id).await, json!({ "kept": 1, "a": 1, "b": 2 }));
    let another = store.another().await;
    assert_eq!(data(&another, id).await, json!({ "kept": 1, "a": 1, "b": 2 }));
    let other = request(&another, id, async {}, set("c", json!(3)));
    request(&store, id, other, set("d", json!(4))).await;
    assert_eq!(data(&store, id).await, json!({ "kept": 1, "a": 1, "b": 2, "c": 3, "d": 4 }));
}

async fn unchanged(store: impl Store) {
    let id = stored(&store, json!({ "a": 0 })).await;
    let other = request(&store, id, async {}, set("a", json!(1)));
    request(&store, id, other, |_| ()).await;
    assert_eq!(data(&store, id).await, json!({ "a": 1 }));
}

/// The other request only prolongs the session, so the `rev` stays the same.
async fn later_expiry(store: impl Store) {
    let id = stored(&store, json!({ "a": 0 })).await;
    let later = in_the_future() + time::Duration::days(1);
    let touch = in_request_scope(async {
        let mut record = store.load(&id).await.unwrap().unwrap();
        record.expiry_date = later;
        store.save(&record).await.unwrap();
    });
    request(&store, id, touch, set("a", json!(1))).await;
    let found = store.another().await.load(&id).await.unwrap().unwrap();
    assert_eq!(json!(found.data), json!({ "a": 1 }));
    assert!(later - found.expiry_date < time::Duration::seconds(1), "it has the later expiry");
}

/// Another instance ends a session, outside of the request's scope.
async fn later_expiry_twice(store: impl Store) {
    let id = stored(&store, json!({ "k": 0 })).await;
    let latest = in_the_future() + time::Duration::hours(1);
    in_request_scope(async {
        let mut record = store.load(&id).await.unwrap().unwrap();
        let mut others = record.clone();
        others.expiry_date = latest;
        in_request_scope(async {
            store.load(&id).await.unwrap();
            store.save(&others).await.unwrap();
        })
        .await;
        for value in 1..=2 {
            record.data.insert("k".to_owned(), json!(value));
            record.expiry_date = in_the_future();
            store.save(&record).await.unwrap();
        }
    })
    .await;
    let expiry = store.load(&id).await.unwrap().unwrap().expiry_date;
    assert!((expiry - latest).abs() < time::Duration::seconds(1), "{expiry} {latest}");
}

async fn cycle_after_a_vain_load(store: impl Store) {
    let id = stored(&store, json!({ "user": 1 })).await;
    in_request_scope(async {
        let mut record = store.load(&id).await.unwrap().unwrap();
        delete_elsewhere(&store, id).await;
        while store.load(&id).await.unwrap().is_some() {
            tokio::task::yield_now().await;
        }
        cycle(&store, &mut record).await;
        assert_eq!(store.load(&record.id).await.unwrap(), None);
    })
    .await;
}

async fn new_after_a_vain_load(store: impl Store) {
    let id = stored(&store, json!({ "user": 1 })).await;
    in_request_scope(async {
        let mut record = store.load(&id).await.unwrap().unwrap();
        delete_elsewhere(&store, id).await;
        while store.load(&id).await.unwrap().is_some() {
            tokio::task::yield_now().await;
        }
        record.id = Id::default();
        store.create(&mut record).await.unwrap();
        assert!(store.load(&record.id).await.unwrap().is_some());
    })
    .await;
}

async fn delete_elsewhere(store: &impl Store, id: Id) {
    let another = store.another().await;
    tokio::spawn(async move { another.delete(&id).await.unwrap() }).await.unwrap();
}

/// What `Session::cycle_id` does.
async fn cycle(store: &impl Store, record: &mut Record) {
    let old = std::mem::take(&mut record.id);
    store.delete(&old).await.unwrap();
    store.create(record).await.unwrap();
}

async fn cycle_keeps(store: impl Store) {
    let id = stored(&store, json!({ "user": 1 })).await;
    let new = in_request_scope(async {
        let mut record = store.load(&id).await.unwrap().unwrap();
        request(&store, id, async {}, set("cart", json!(["x"]))).await;
        record.data.insert("seen".to_owned(), json!(true));
        cycle(&store, &mut record).await;
        record.id
    });
    let new = new.await;
    assert_eq!(store.load(&id).await.unwrap(), None);
    assert_eq!(data(&store, new).await, json!({ "user": 1, "cart": ["x"], "seen": true }));
}

async fn cycle_of_ended(store: impl Store) {
    for saves_first in [false, true] {
        let id = stored(&store, json!({ "user": 1 })).await;
        let new = in_request_scope(async {
            let mut record = store.load(&id).await.unwrap().unwrap();
            delete_elsewhere(&store, id).await;
            record.data.insert("seen".to_owned(), json!(true));
            if saves_first {
                store.save(&record).await.unwrap();
            }
            cycle(&store, &mut record).await;
            record.id
        });
        assert_eq!(store.load(&new.await).await.unwrap(), None);
        assert_eq!(store.documents().await, 0);
    }
}

async fn flush(store: impl Store) {
    let id = stored(&store, json!({ "user": 1 })).await;
    let flush = async |ended: bool| {
        let id = stored(&store, json!({ "user": 1 })).await;
        in_request_scope(async {
            let mut record = store.load(&id).await.unwrap().unwrap();
            request(&store, id, async {}, set("cart", json!(["x"]))).await;
            if ended {
                delete_elsewhere(&store, id).await;
            }
            record.data.clear();
            store.delete(&record.id).await.unwrap();
            record.data.insert("flash".to_owned(), json!("bye"));
            store.create(&mut record).await.unwrap();
            assert_ne!(record.id, id);
            record.id
        })
        .await
    };
    for ended in [false, true] {
        let new = flush(ended).await;
        assert_eq!(data(&store, new).await, json!({ "flash": "bye" }), "nothing of the old one");
    }
    assert!(store.load(&id).await.unwrap().is_some());
}

/// What an app does if another user logs in on the same device: `flush`, perhaps `cycle_id`, and a new user under
/// the same key. It does not matter whether somebody has ended the old session meanwhile.
async fn log_in_after_flush(store: impl Store) {
    for ended in [false, true] {
        for cycles in [false, true] {
            let id = stored(&store, json!({ "user": 1 })).await;
            let new = in_request_scope(async {
                let mut record = store.load(&id).await.unwrap().unwrap();
                request(&store, id, async {}, set("cart", json!(["x"]))).await;
                if ended {
                    delete_elsewhere(&store, id).await;
                }
                record.data.clear();
                store.delete(&record.id).await.unwrap();
                if cycles {
                    let old = std::mem::take(&mut record.id);
                    store.delete(&old).await.unwrap();
                }
                record.data.insert("user".to_owned(), json!(2));
                store.create(&mut record).await.unwrap();
                record.id
            });
            let new = new.await;
            let found = store.load(&new).await.unwrap().map(|record| json!(record.data));
            assert_eq!(found, Some(json!({ "user": 2 })), "ended: {ended}, cycles: {cycles}");
        }
    }
}

async fn counting() -> MongoStore {
    let count = |value: Option<&Value>| value.and_then(Value::as_i64).unwrap_or(0);
    let builder = MongoStore::builder().uri(uri()).operation_timeout(PATIENCE);
    let builder = builder.on_conflict(move |key, base, theirs, ours| match key {
        "views" => Some(json!(count(theirs) + count(ours) - count(base))),
        _ => ours.cloned(),
    });
    builder.build().await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_counter_is_exact_on_two_instances() {
    let mongo = counting().await;
    let one = cache_of(&mongo).await;
    let builder = MongoStore::builder().client(mongo.collection().client().clone());
    let builder = builder.database(mongo.collection().namespace().db);
    let two = builder.on_conflict(|key, base, theirs, ours| {
        let count = |value: Option<&Value>| value.and_then(Value::as_i64).unwrap_or(0);
        match key {
            "views" => Some(json!(count(theirs) + count(ours) - count(base))),
            _ => ours.cloned(),
        }
    });
    let two = cache_of(&two.build().await.unwrap()).await;
    let id = stored(&one, json!({ "views": 0 })).await;
    let tasks: Vec<_> = (0..64)
        .map(|n| {
            let store = if n % 2 == 0 { one.clone() } else { two.clone() };
            tokio::spawn(async move {
                request(&store, id, async {}, |record| {
                    let views = record.data["views"].as_i64().unwrap();
                    record.data.insert("views".to_owned(), json!(views + 1));
                    record.data.insert(format!("k{n}"), json!(n));
                })
                .await;
            })
        })
        .collect();
    for task in tasks {
        task.await.unwrap();
    }
    let found = mongo.load(&id).await.unwrap().unwrap();
    assert_eq!(found.data["views"], json!(64));
    assert_eq!(found.data.len(), 65);
}
