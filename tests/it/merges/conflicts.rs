//! `on_conflict`: what it gets, when it is called, and what its results and its bugs do.

use std::sync::{Arc, Mutex};

use serde_json::{Value, json};
use tower_sessions_moka_mongodb_store::{MongoStore, MongoStoreBuilder};

use super::app::{App, Instances, Visit, counting, on_two_instances_of_both_tiers};
use crate::common::uri;
use crate::owner::Owned;
use crate::proxy::Proxy;

on_two_instances_of_both_tiers! {
    function_gets_the_key_and_the_three_values = arguments;
    third_writer_between_the_read_and_the_update_is_counted_once = third_writer;
    none_removes_the_key = none;
    a_panic_is_an_error_of_that_save_alone = panics;
    a_result_that_is_too_deep_is_an_error_of_that_save_alone = too_deep;
    changes_that_are_too_large_together_are_an_error_of_that_save_alone = too_large;
    a_counter_is_right_over_several_saves_of_one_request = several_saves;
}

type Calls = Arc<Mutex<Vec<(String, [Option<Value>; 3])>>>;

/// The two instances of an app that record the calls of the function, and count.
async fn recording<S: Owned>(uris: [&str; 2]) -> (App<S>, Calls) {
    let calls = Calls::default();
    let options = |builder: MongoStoreBuilder| {
        let calls = Arc::clone(&calls);
        builder.on_conflict(move |key, base, theirs, ours| {
            let values = [base.cloned(), theirs.cloned(), ours.cloned()];
            calls.lock().unwrap().push((key.to_owned(), values));
            counting(key, base, theirs, ours)
        })
    };
    let app = App::start_on(uris, options, async |mongo: MongoStore| S::over(mongo).await).await;
    (app, Arc::clone(&calls))
}

fn call(
    key: &str,
    base: impl Into<Option<i64>>,
    theirs: impl Into<Option<i64>>,
    ours: impl Into<Option<i64>>,
) -> (String, [Option<Value>; 3]) {
    let values = [base.into(), theirs.into(), ours.into()];
    (key.to_owned(), values.map(|value| value.map(Value::from)))
}

async fn arguments<S: Owned>() {
    let uri = uri();
    let (app, calls) = recording::<S>([&uri, &uri]).await;
    let id = app.stored(json!({ "a": 1, "b": 1, "c": 1, "same": 1 })).await;
    let [a, b] = app.visits(id, Instances::Two).await;
    b.set("a", 2).await;
    b.remove("b").await;
    b.set("c", 2).await;
    b.save_with("d", 2).await;
    a.set("a", 3).await;
    a.set("b", 3).await;
    a.remove("c").await;
    a.set("mine", 3).await;
    a.save_with("d", 3).await;
    let mut calls = std::mem::take(&mut *calls.lock().unwrap());
    calls.sort_by(|one, other| one.0.cmp(&other.0));
    assert_eq!(
        calls,
        [call("a", 1, 2, 3), call("b", 1, None, 3), call("c", 1, 2, None), call("d", None, 2, 3)]
    );
    app.assert_conflicts(4);
    app.assert_data(id, &json!({ "a": 3, "b": 3, "d": 3, "mine": 3, "same": 1 })).await;
}

// A has loaded 5, B has saved 6. A's update is refused, and A reads 6. Before A sends 7, C saves 7:
//
//     A   update (refused)  find ── 6 ──────────── update (refused)  find ── 7  update 8
//     C                                 save 7
async fn third_writer<S: Owned>() {
    let proxy = Proxy::start().await;
    let (app, calls) = recording::<S>([proxy.uri(), proxy.direct()]).await;
    let id = app.stored(json!({ "n": 5 })).await;
    let a = Visit::load(&app.one, id).await;
    Visit::load(&app.two, id).await.save_with("n", 6).await;
    a.set("n", 6).await;
    let mut read = proxy.hold("find");
    let save = a.begin_save();
    read.reached().await;
    Visit::load(&app.database, id).await.save_with("n", 7).await;
    read.deliver();
    save.await.unwrap().unwrap();
    app.assert_data(id, &json!({ "n": 8 })).await;
    assert_eq!(*calls.lock().unwrap(), [call("n", 5, 6, 6), call("n", 5, 7, 6)]);
    app.assert_conflicts(1);
    app.assert_merges("merged", 1);
}

async fn none<S: Owned>() {
    for instances in Instances::BOTH {
        let app = App::<S>::start(|builder| builder.on_conflict(|_, _, _, _| None)).await;
        let id = app.stored(json!({ "user": 1, "kept": 1 })).await;
        let [a, b] = app.visits(id, instances).await;
        b.remove("user").await;
        b.save().await;
        a.save_with("user", 2).await;
        app.assert_data(id, &json!({ "kept": 1 })).await;
        app.assert_conflicts(1);
    }
}

/// Of two conflicts, in two sessions, the function fails on one.
async fn assert_fails_alone<S: Owned>(app: &App<S>, value: Value, said: &str) {
    let broken = app.stored(json!({ "user": 1 })).await;
    let fine = app.stored(json!({ "user": 1 })).await;
    let [a, b] = app.visits(broken, Instances::Two).await;
    let [c, d] = app.visits(fine, Instances::Two).await;
    b.save_with("v", 1).await;
    d.save_with("w", 1).await;
    a.set("other", 1).await;
    a.set("v", value).await;
    c.set("w", 2).await;
    let saves = [a.begin_save(), c.begin_save()];
    let [failed, stored] = saves;
    let error = failed.await.unwrap().unwrap_err().to_string();
    assert!(error.contains(said), "{error}");
    stored.await.unwrap().unwrap();
    app.assert_data(broken, &json!({ "user": 1, "v": 1 })).await;
    app.assert_data(fine, &json!({ "user": 1, "w": 2 })).await;
    app.assert_merges("failed", 1);
    // The request goes on, with another value.
    a.save_with("v", 1).await;
    app.assert_data(broken, &json!({ "user": 1, "v": 1, "other": 1 })).await;
}

async fn panics<S: Owned>() {
    let app = App::<S>::start(|builder| {
        builder.on_conflict(|_, _, _, ours| {
            assert_ne!(ours, Some(&json!("bug")), "on purpose");
            ours.cloned()
        })
    })
    .await;
    assert_fails_alone(&app, json!("bug"), "the `on_conflict` function panicked").await;
}

async fn too_deep<S: Owned>() {
    let app = App::<S>::start(|builder| {
        builder.on_conflict(|_, _, _, ours| {
            if ours? == "deep" {
                return Some((0..200).fold(json!(1), |inner, _| json!([inner])));
            }
            ours.cloned()
        })
    })
    .await;
    assert_fails_alone(&app, json!("deep"), "deep").await;
}

async fn too_large<S: Owned>() {
    let app = App::<S>::start(|builder| builder).await;
    let id = app.stored(json!({})).await;
    let [a, b] = app.visits(id, Instances::Two).await;
    b.save_with("b", "b".repeat(9 << 20)).await;
    a.set("a", "a".repeat(9 << 20)).await;
    let error = a.try_save().await.unwrap_err().to_string();
    assert!(error.contains("large"), "{error}");
    app.assert_merges("failed", 1);
    assert_eq!(app.record(id).await.data.keys().collect::<Vec<_>>(), ["b"]);
    a.save_with("a", 1).await;
    assert_eq!(app.record(id).await.data.len(), 2);
}

async fn several_saves<S: Owned>() {
    for instances in Instances::BOTH {
        let app = App::<S>::start(|builder| builder.on_conflict(counting)).await;
        let id = app.stored(json!({ "n": 5 })).await;
        let [a, b] = app.visits(id, instances).await;
        // Each request holds 5, 6, 7, 8. The other one's counts are in the database only.
        for n in 6..=8 {
            a.save_with("n", n).await;
            b.save_with("n", n).await;
        }
        app.assert_data(id, &json!({ "n": 11 })).await;
        app.assert_conflicts(5);
    }
}
