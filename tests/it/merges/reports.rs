//! Public reports of changes that parallel requests have lost, in other frameworks and in earlier versions of
//! tower-sessions. Each test is the case of one report, and has its address.
//!
//! spring-session #1993 is often named beside these. It could not be found, so no test claims to be its case.

use serde_json::{Value, json};

use super::app::{App, Instances, Visit, counting, on_two_instances_of_both_tiers};
use tower_sessions_moka_mongodb_store::MongoStoreBuilder;

use crate::owner::Owned;

on_two_instances_of_both_tiers! {
    two_requests_count_to_seven_from_five = count_twice;
    sixty_four_requests_count_to_sixty_four = count_to_64;
    a_request_runs_while_another_one_of_its_session_does = no_lock;
    two_saves_of_one_request_keep_what_another_saved_between = two_saves;
    last_key_is_removed_while_another_request_adds_one = last_key;
    a_reader_that_saves_does_not_remove_what_another_request_added = unchanged_reader;
    twenty_six_requests_count_a_variable_each = alphabet;
    twenty_six_requests_count_a_variable_each_and_one_together = alphabet_and_total;
    a_poll_that_ends_after_the_log_in_logs_nobody_out = poll_and_log_in;
    a_poll_that_ends_after_a_log_in_under_another_id_is_dropped = poll_and_cycle;
    a_request_that_ends_after_the_log_out_is_dropped = save_after_log_out;
    three_requests_that_end_after_the_log_out_log_nobody_in = polls_and_log_out;
    a_user_whose_key_was_removed_does_not_come_back = log_out_by_key;
    two_requests_set_one_key_each = two_keys;
    two_requests_that_add_the_same_key_do_not_fail = same_key;
    the_second_save_of_a_request_does_not_bring_its_first_change_back = commit_twice;
    a_touch_after_the_session_has_ended_leaves_no_fragment = fragment;
    request_that_read_before_another_one_wrote_keeps_what_that_wrote = change_tracking;
    values_that_depend_on_each_other_need_one_key = write_skew;
    requests_that_only_read_leave_the_token_of_the_one_that_wrote = readers;
    a_change_inside_a_value_is_a_change_of_its_key = nested;
    a_removed_key_stays_removed = removed_key;
    value_that_two_requests_changed_is_one_of_the_two = opaque_values;
    messages_that_two_requests_push_and_take_are_kept = flash_messages;
    cycle_id_keeps_what_was_saved_since_the_request_loaded_the_session = save_then_cycle;
    a_session_that_two_requests_cycle_has_one_new_id = two_cycles;
}

fn plain(builder: MongoStoreBuilder) -> MongoStoreBuilder {
    builder
}

fn count(builder: MongoStoreBuilder) -> MongoStoreBuilder {
    builder.on_conflict(counting)
}

// https://github.com/maxcountryman/tower-sessions/pull/35, and its test of concurrency.
//
//     A   load 5 ───────────── save 6
//     B        load 5 ── save 6
async fn count_twice<S: Owned>() {
    for instances in Instances::BOTH {
        for (options, sum) in [(plain as super::app::Options, 6), (count, 7)] {
            let app = App::<S>::start(options).await;
            let id = app.stored(json!({ "n": 5 })).await;
            let [a, b] = app.visits(id, instances).await;
            b.save_with("n", 6).await;
            a.save_with("n", 6).await;
            app.assert_data(id, &json!({ "n": sum })).await;
            app.assert_conflicts(1);
        }
    }
}

// As above: 64 parallel requests on two instances.
async fn count_to_64<S: Owned>() {
    let app = App::<S>::start(count).await;
    let id = app.stored(json!({ "n": 0 })).await;
    let requests = (0..64).map(|nth| {
        let store = if nth % 2 == 0 { &app.one } else { &app.two };
        async move {
            let visit = Visit::load(store, id).await;
            let n = visit.get("n").await.and_then(|n| n.as_i64()).unwrap();
            visit.save_with("n", n + 1).await;
        }
    });
    futures::future::join_all(requests).await;
    app.assert_data(id, &json!({ "n": 64 })).await;
}

// https://github.com/maxcountryman/tower-sessions/pull/36: a lock for each request. A's handler waits for B's
// response here, so a lock would never be released.
async fn no_lock<S: Owned>() {
    for instances in Instances::BOTH {
        let app = App::<S>::start(plain).await;
        let id = app.stored(json!({ "user": 1 })).await;
        let [a, b] = app.visits(id, instances).await;
        b.save_with("cart", json!(["x"])).await;
        a.save_with("seen", "/a").await;
        app.assert_data(id, &json!({ "user": 1, "cart": ["x"], "seen": "/a" })).await;
        app.assert_conflicts(0);
    }
}

// https://github.com/maxcountryman/tower-sessions/pull/37: a request that has unsaved changes. The race of its
// load and save over a slow network is in `faults.rs`.
async fn two_saves<S: Owned>() {
    for instances in Instances::BOTH {
        let app = App::<S>::start(plain).await;
        let id = app.stored(json!({ "a": 0 })).await;
        let [a, b] = app.visits(id, instances).await;
        b.save_with("b", 1).await;
        a.save_with("a", 1).await;
        a.save_with("c", 1).await;
        app.assert_data(id, &json!({ "a": 1, "b": 1, "c": 1 })).await;
        app.assert_conflicts(0);
    }
}

// As above. The session has no data in A, and still is no session to delete.
async fn last_key<S: Owned>() {
    for instances in Instances::BOTH {
        let app = App::<S>::start(plain).await;
        let id = app.stored(json!({ "a": 0 })).await;
        let [a, b] = app.visits(id, instances).await;
        a.remove("a").await;
        b.save_with("b", 1).await;
        a.save().await;
        app.assert_data(id, &json!({ "b": 1 })).await;
    }
}

// https://github.com/laravel/framework/issues/5416: a request that reads, and then writes everything at its
// end. The read that fails is in `faults.rs`.
async fn unchanged_reader<S: Owned>() {
    for instances in Instances::BOTH {
        let app = App::<S>::start(plain).await;
        let id = app.stored(json!({})).await;
        let [a, b] = app.visits(id, instances).await;
        b.save_with("user", 1).await;
        a.save().await;
        app.assert_data(id, &json!({ "user": 1 })).await;
        app.assert_merges("unchanged", 1);
        app.assert_merges("merged", 0);
    }
}

const LETTERS: [&str; 26] = [
    "a", "b", "c", "d", "e", "f", "g", "h", "i", "j", "k", "l", "m", "n", "o", "p", "q", "r", "s",
    "t", "u", "v", "w", "x", "y", "z",
];

fn all_letters(value: u32) -> serde_json::Map<String, Value> {
    LETTERS.iter().map(|letter| ((*letter).to_owned(), json!(value))).collect()
}

// https://github.com/laravel/framework/issues/7549: 26 requests, and each one counts a variable of its own.
async fn alphabet<S: Owned>() {
    for instances in Instances::BOTH {
        let app = App::<S>::start(plain).await;
        for _ in 0..3 {
            let id = app.stored(all_letters(0).into()).await;
            let visits: [Visit; 26] = app.visits(id, instances).await;
            let saves = visits.iter().zip(LETTERS).map(async |(visit, letter)| {
                visit.save_with(letter, 1).await;
            });
            futures::future::join_all(saves).await;
            app.assert_data(id, &all_letters(1).into()).await;
        }
        app.assert_conflicts(0);
    }
}

// As above, and each one counts a variable of all.
async fn alphabet_and_total<S: Owned>() {
    for (options, sum) in [(plain as super::app::Options, 1), (count, 26)] {
        let app = App::<S>::start(options).await;
        let id = app.stored(json!({})).await;
        let visits: [Visit; 26] = app.visits(id, Instances::Two).await;
        let saves = visits.iter().zip(LETTERS).map(async |(visit, letter)| {
            visit.set(letter, 1).await;
            visit.save_with("n of all", 1).await;
        });
        futures::future::join_all(saves).await;
        let mut data = all_letters(1);
        data.insert("n of all".to_owned(), json!(sum));
        app.assert_data(id, &data.into()).await;
        app.assert_conflicts(25);
    }
}

// https://github.com/laravel/framework/issues/18187: a poll writes its old copy over a log-in.
async fn poll_and_log_in<S: Owned>() {
    for instances in Instances::BOTH {
        let app = App::<S>::start(plain).await;
        let id = app.stored(json!({ "csrf": "t" })).await;
        let [poll, log_in] = app.visits(id, instances).await;
        log_in.save_with("user", 1).await;
        poll.save().await;
        app.assert_data(id, &json!({ "csrf": "t", "user": 1 })).await;
    }
}

// As above, with a log-in that changes the id. What the browser keeps is in `over_http.rs`.
async fn poll_and_cycle<S: Owned>() {
    for instances in Instances::BOTH {
        let app = App::<S>::start(plain).await;
        let old = app.stored(json!({ "csrf": "t" })).await;
        let [poll, log_in] = app.visits(old, instances).await;
        log_in.cycle_id().await;
        log_in.save_with("user", 1).await;
        poll.save().await;
        app.assert_gone(old).await;
        app.assert_data(log_in.id().unwrap(), &json!({ "csrf": "t", "user": 1 })).await;
        app.assert_dropped(1);
    }
}

// As above, with a log-out.
async fn save_after_log_out<S: Owned>() {
    for instances in Instances::BOTH {
        let app = App::<S>::start(plain).await;
        let id = app.stored(json!({ "user": 1 })).await;
        let [log_out, visit] = app.visits(id, instances).await;
        log_out.flush().await;
        visit.save_with("seen", "/b").await;
        app.assert_gone(id).await;
        app.assert_dropped(1);
    }
}

// https://github.com/laravel/framework/issues/30996: requests in flight write the logged-in session back.
async fn polls_and_log_out<S: Owned>() {
    for instances in Instances::BOTH {
        for writes in [false, true] {
            let app = App::<S>::start(plain).await;
            let id = app.stored(json!({ "user": 1 })).await;
            let [a, log_out, c, b] = app.visits(id, instances).await;
            log_out.flush().await;
            for visit in [c, b, a] {
                if writes {
                    visit.set("_previous", "/a").await;
                }
                visit.save().await;
            }
            app.assert_gone(id).await;
            app.assert_dropped(3);
            assert_eq!(app.database.length().await.unwrap(), 0);
        }
    }
}

// As above. `cycle_id` after "sign out everywhere" is in `over_http.rs`.
async fn log_out_by_key<S: Owned>() {
    for instances in Instances::BOTH {
        let app = App::<S>::start(plain).await;
        let id = app.stored(json!({ "user": 1, "cart": ["x"] })).await;
        let [log_out, visit] = app.visits(id, instances).await;
        log_out.remove("user").await;
        log_out.save().await;
        visit.save_with("cart", json!(["x", "y"])).await;
        app.assert_data(id, &json!({ "cart": ["x", "y"] })).await;
    }
}

// https://github.com/spring-projects/spring-session/issues/1471
async fn two_keys<S: Owned>() {
    for instances in Instances::BOTH {
        for a_first in [true, false] {
            let app = App::<S>::start(plain).await;
            let id = app.stored(json!({})).await;
            let [a, b] = app.visits(id, instances).await;
            a.set("key1", "value1").await;
            b.set("key2", "value2").await;
            for visit in if a_first { [a, b] } else { [b, a] } {
                visit.save().await;
            }
            app.assert_data(id, &json!({ "key1": "value1", "key2": "value2" })).await;
            app.assert_conflicts(0);
        }
    }
}

// https://github.com/spring-projects/spring-session/issues/1213: the second request failed with status 500.
async fn same_key<S: Owned>() {
    for instances in Instances::BOTH {
        let app = App::<S>::start(plain).await;
        let id = app.stored(json!({ "other": 0 })).await;
        let [a, b] = app.visits(id, instances).await;
        a.save_with("t", 1).await;
        b.save_with("t", 1).await;
        app.assert_data(id, &json!({ "other": 0, "t": 1 })).await;
        app.assert_conflicts(1);
    }
}

// https://github.com/spring-projects/spring-session/issues/508: a request commits twice.
async fn commit_twice<S: Owned>() {
    for instances in Instances::BOTH {
        let app = App::<S>::start(plain).await;
        let id = app.stored(json!({ "k": 0 })).await;
        let [a] = app.visits(id, instances).await;
        a.save_with("k", 1).await;
        // B begins after A's response.
        let store = if instances == Instances::One { &app.one } else { &app.two };
        let b = Visit::load(store, id).await;
        b.save_with("k", 2).await;
        a.save().await;
        app.assert_data(id, &json!({ "k": 2 })).await;
        app.assert_conflicts(0);
    }
}

// https://github.com/spring-projects/spring-session/issues/1111: a log-out changes the id, and a long request
// writes a fragment under the old one.
async fn fragment<S: Owned>() {
    for instances in Instances::BOTH {
        for flush in [false, true] {
            let app = App::<S>::start(plain).await;
            let id = app.stored(json!({ "user": 1 })).await;
            let [long, other] = app.visits(id, instances).await;
            if flush {
                other.flush().await;
            } else {
                other.cycle_id().await;
                other.save().await;
            }
            long.save().await;
            app.assert_gone(id).await;
            assert_eq!(app.database.length().await.unwrap(), u64::from(!flush));
        }
    }
}

// https://github.com/aspnet/Session/issues/72, https://github.com/aspnet/Session/issues/60
async fn change_tracking<S: Owned>() {
    for instances in Instances::BOTH {
        let app = App::<S>::start(plain).await;
        let id = app.stored(json!({ "x": 0, "y": 0 })).await;
        let [a, b] = app.visits(id, instances).await;
        b.save_with("y", 1).await;
        a.save_with("x", 1).await;
        app.assert_data(id, &json!({ "x": 1, "y": 1 })).await;
    }
}

// As above, with values that depend on each other. One after the other, the requests would give (1, 2) or
// (2, 1). No key has changed on both sides, so nothing notices. Under one key, it is a conflict.
async fn write_skew<S: Owned>() {
    let app = App::<S>::start(|builder| {
        builder.on_conflict(|key, base, theirs, ours| {
            let all = [base, theirs, ours].map(|value| value.cloned().unwrap());
            assert_eq!(key, "pair");
            assert_eq!(all, [json!([0, 0]), json!([0, 1]), json!([1, 0])]);
            Some(json!([2, 1]))
        })
    })
    .await;
    let id = app.stored(json!({ "x": 0, "y": 0 })).await;
    let [a, b] = app.visits(id, Instances::Two).await;
    b.save_with("y", 1).await;
    a.save_with("x", 1).await;
    app.assert_data(id, &json!({ "x": 1, "y": 1 })).await;
    app.assert_conflicts(0);
    let id = app.stored(json!({ "pair": [0, 0] })).await;
    let [a, b] = app.visits(id, Instances::Two).await;
    b.save_with("pair", json!([0, 1])).await;
    a.save_with("pair", json!([1, 0])).await;
    app.assert_data(id, &json!({ "pair": [2, 1] })).await;
    app.assert_conflicts(1);
}

// https://github.com/rack/rack-session/pull/24: all requests load the session, one stores something, and each
// one commits what it has loaded.
async fn readers<S: Owned>() {
    for instances in Instances::BOTH {
        let app = App::<S>::start(plain).await;
        let id = app.stored(json!({ "user": 1 })).await;
        let [a, b, c, d] = app.visits(id, instances).await;
        b.save_with("token", "t").await;
        let rev = app.document(id).await.unwrap().get("rev").cloned();
        for visit in [a, c, d] {
            visit.save().await;
        }
        app.assert_data(id, &json!({ "user": 1, "token": "t" })).await;
        let now = app.document(id).await.unwrap().get("rev").cloned();
        assert_eq!(now, rev, "a reader has stored data");
    }
}

// https://github.com/rack/rack-session/pull/53: only a comparison of values sees a nested change.
async fn nested<S: Owned>() {
    let app = App::<S>::start(plain).await;
    let id = app.stored(json!({ "cart": { "items": [1] } })).await;
    let [a, b] = app.visits(id, Instances::Two).await;
    b.save_with("b", 1).await;
    let mut cart = a.get("cart").await.unwrap();
    cart["items"].as_array_mut().unwrap().push(json!(2));
    a.save_with("cart", cart).await;
    app.assert_data(id, &json!({ "cart": { "items": [1, 2] }, "b": 1 })).await;
}

// https://github.com/redis-store/redis-rack/issues/53: a merge without the state at the load brings each removed
// key back.
async fn removed_key<S: Owned>() {
    let app = App::<S>::start(plain).await;
    let id = app.stored(json!({ "flash": "m" })).await;
    let [a, b] = app.visits(id, Instances::Two).await;
    a.remove("flash").await;
    a.save().await;
    assert_eq!(json!(app.record(id).await.data), json!({}));
    b.save_with("b", 1).await;
    app.assert_data(id, &json!({ "b": 1 })).await;
}

// https://github.com/tj/connect-redis/pull/348: a merge of what is inside of the values made `{}` of dates and
// joined lists.
async fn opaque_values<S: Owned>() {
    for (a, b) in [
        (json!({ "expires": "2026-11-28T16:00:00.000Z" }), json!({ "expires": null, "path": "/" })),
        (json!([1, 2]), json!([1, 3])),
        (json!({ "x": { "y": 1 } }), json!({ "x": { "z": 2 } })),
        (json!(1.0), json!(1)),
    ] {
        let app = App::<S>::start(plain).await;
        let id = app.stored(json!({ "v": { "x": 0 } })).await;
        let visits = app.visits::<2>(id, Instances::Two).await;
        visits[0].save_with("v", a).await;
        visits[1].save_with("v", b.clone()).await;
        app.assert_data(id, &json!({ "v": b })).await;
        app.assert_conflicts(1);
    }
}

/// The one key of axum-messages.
const KEY: &str = "axum-messages.data";

/// `theirs`, without what `ours` has removed from `base`, and with what it has added.
fn merge_lists(base: &Value, theirs: &Value, ours: &Value) -> Value {
    let list = |value: &Value| value.as_array().cloned().unwrap_or_default();
    let without = |mut all: Vec<Value>, some: &[Value]| {
        for value in some {
            if let Some(at) = all.iter().position(|it| it == value) {
                all.remove(at);
            }
        }
        all
    };
    let removed = without(list(base), &list(ours));
    let added = without(list(ours), &list(base));
    let mut merged = without(list(theirs), &removed);
    merged.extend(added);
    merged.into()
}

// axum-messages (https://github.com/maxcountryman/axum-messages, `src/lib.rs`) keeps all messages under one key.
// A request moves the pending ones to those that it shows.
async fn flash_messages<S: Owned>() {
    let options = |builder: MongoStoreBuilder| {
        builder.on_conflict(|_, base, theirs, ours| {
            let [base, theirs] = [base, theirs].map(|value| value.unwrap_or(&Value::Null));
            let mut merged = ours?.clone();
            let pending = |value: &Value| value["pending_messages"].clone();
            merged["pending_messages"] =
                merge_lists(&pending(base), &pending(theirs), &pending(ours?));
            Some(merged)
        })
    };
    let messages = |pending: &[&str], shown: &[&str]| json!({ "pending_messages": pending, "messages": shown });
    // Another request takes the first message (A), or pushes one more (B, C).
    let a = messages(&[], &[]);
    let b = messages(&["m2"], &["m1"]);
    let c = messages(&["m3"], &["m1"]);
    for (first, second, pending) in
        [(&b, &a, json!(["m2"])), (&a, &b, json!(["m2"])), (&b, &c, json!(["m2", "m3"]))]
    {
        let app = App::<S>::start(options).await;
        let id = app.stored(json!({ KEY: messages(&["m1"], &[]) })).await;
        let visits = app.visits::<2>(id, Instances::Two).await;
        visits[0].save_with(KEY, first.clone()).await;
        visits[1].save_with(KEY, second.clone()).await;
        assert_eq!(app.record(id).await.data[KEY]["pending_messages"], pending);
    }
}

// A change that was acknowledged before another request gives the session a new id, from an older copy.
async fn save_then_cycle<S: Owned>() {
    for instances in Instances::BOTH {
        for sets_first in [false, true] {
            let app = App::<S>::start(count).await;
            let old = app.stored(json!({ "n": 0 })).await;
            let [a, b] = app.visits(old, instances).await;
            b.set("n", 1).await;
            b.save_with("b", 1).await;
            if sets_first {
                a.set("n", 1).await;
            }
            a.cycle_id().await;
            if !sets_first {
                a.set("n", 1).await;
            }
            a.save_with("user", 1).await;
            let new = a.id().unwrap();
            app.assert_gone(old).await;
            app.assert_data(new, &json!({ "n": 2, "b": 1, "user": 1 })).await;
        }
    }
}

// Two requests cycle the id of one session. The second one finds that somebody has ended it.
async fn two_cycles<S: Owned>() {
    for instances in Instances::BOTH {
        let app = App::<S>::start(plain).await;
        let old = app.stored(json!({ "user": 1 })).await;
        let [a, b] = app.visits(old, instances).await;
        for visit in [&a, &b] {
            visit.cycle_id().await;
        }
        a.save().await;
        b.save_with("seen", "/b").await;
        app.assert_gone(old).await;
        app.assert_data(a.id().unwrap(), &json!({ "user": 1 })).await;
        app.assert_gone(b.id().unwrap()).await;
        assert_eq!(app.database.length().await.unwrap(), 1);
    }
}
