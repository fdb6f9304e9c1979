//! A merged save whose replies are lost, late or errors, at each of its steps. A change is stored at most once,
//! and nobody else's change is lost.

use std::time::Duration;

use serde_json::json;
use session_test_proxy::{Direction, Injection, Lasts, ServerError};
use tower_sessions::session::Id;
use tower_sessions_moka_mongodb_store::{MongoStore, MongoStoreBuilder, in_request_scope};

use super::app::{App, Saved, Visit, counting, on_two_instances_of_both_tiers};
use crate::common::eventually;
use crate::owner::Owned;
use crate::proxy::{HeldReply, Proxy};

on_two_instances_of_both_tiers! {
    save_that_is_late_keeps_what_was_saved_before_it_arrived = late;
    save_whose_reply_is_late_keeps_its_change = late_reply;
    saves_of_one_instance_build_on_each_other_without_a_read = in_order;
    change_whose_reply_is_lost_is_stored_once = lost_reply;
    merged_change_whose_reply_is_lost_is_stored_once = lost_reply_of_the_merge;
    failed_read_after_a_refused_update_stores_nothing = failed_read;
    read_that_never_ends_is_a_timeout_and_stores_nothing = timeout;
    refused_update_stores_nothing = refused;
    a_load_that_fails_is_no_empty_session = failed_load;
    cycle_id_whose_reply_is_lost_brings_nothing_back = lost_take;
    cancelled_save_is_complete_or_has_not_begun = cancelled;
    a_session_that_never_rests_is_an_error = never_at_rest;
}

/// An app whose first instance reaches the database through the proxy.
async fn app<S: Owned>(proxy: &Proxy) -> App<S> {
    app_with(proxy, |builder| builder).await
}

async fn app_with<S: Owned>(
    proxy: &Proxy,
    options: impl Fn(MongoStoreBuilder) -> MongoStoreBuilder,
) -> App<S> {
    let options = |builder: MongoStoreBuilder| options(builder.on_conflict(counting));
    let uris = [proxy.uri(), proxy.direct()];
    App::start_on(uris, options, async |mongo: MongoStore| S::over(mongo).await).await
}

/// Asserts what is stored, and that the instance with the fault agrees with it.
async fn assert_agree<S: Owned>(app: &App<S>, id: Id, data: serde_json::Value) {
    app.assert_data(id, &data).await;
    let visit = Visit::load(&app.one, id).await;
    visit.save_with("next", 1).await;
    assert_eq!(app.record(id).await.data.len(), data.as_object().unwrap().len() + 1);
}

// https://github.com/maxcountryman/tower-sessions/pull/37, with a slow network:
//
//     A   load ── save ┄┄┄┄┄┄┄┄┄┄┄┄ arrives
//     B        load ── save ── answered
async fn late<S: Owned>() {
    let proxy = Proxy::start().await;
    let app = app::<S>(&proxy).await;
    let id = app.stored(json!({ "a": 0 })).await;
    let a = Visit::load(&app.one, id).await;
    let b = Visit::load(&app.two, id).await;
    a.set("a", 1).await;
    proxy.stall(Direction::ToServer, true);
    let save = a.begin_save();
    b.save_with("b", 1).await;
    proxy.stall(Direction::ToServer, false);
    save.await.unwrap().unwrap();
    app.assert_data(id, &json!({ "a": 1, "b": 1 })).await;
    app.assert_merges("merged", 1);
    app.assert_conflicts(0);
}

async fn late_reply<S: Owned>() {
    let proxy = Proxy::start().await;
    let app = app::<S>(&proxy).await;
    let id = app.stored(json!({ "a": 0 })).await;
    let a = Visit::load(&app.one, id).await;
    let b = Visit::load(&app.two, id).await;
    a.set("a", 1).await;
    let mut reply = proxy.hold("update");
    let save = a.begin_save();
    reply.reached().await;
    b.save_with("b", 1).await;
    reply.deliver();
    save.await.unwrap().unwrap();
    app.assert_data(id, &json!({ "a": 1, "b": 1 })).await;
    app.assert_merges("merged", 1);
}

// As above, on one instance: the second save waits for the first one, and knows what that has stored. If it
// read, the read would fail.
async fn in_order<S: Owned>() {
    let proxy = Proxy::start().await;
    let app = app::<S>(&proxy).await;
    let id = app.stored(json!({ "n": 0 })).await;
    let mut visits = Vec::new();
    for _ in 0..8 {
        visits.push(Visit::load(&app.one, id).await);
    }
    let mut reply = proxy.hold("update");
    let reads = proxy.refuse_all("find", 13, "Unauthorized", &[]);
    let mut saves = Vec::new();
    for visit in &visits {
        visit.set("n", 1).await;
        saves.push(visit.begin_save());
    }
    reply.reached().await;
    reply.deliver();
    for save in saves {
        save.await.unwrap().unwrap();
    }
    assert_eq!(reads.times(), 0);
    drop(reads);
    app.assert_data(id, &json!({ "n": 8 })).await;
    app.assert_merges("merged", 7);
}

/// How the reply to an update is lost.
#[derive(Clone, Copy, Debug)]
enum Lost {
    /// The connection breaks. The driver sends the update once more, and the server knows that it has carried it
    /// out.
    Connection,
    /// An error that does not say whether the update was carried out.
    Error,
}

impl Lost {
    fn lose(self, reply: HeldReply) {
        match self {
            Self::Connection => reply.cut(),
            Self::Error => reply.refuse(50),
        }
    }

    fn assert_outcome(self, saved: &Saved) {
        let is_known = matches!(self, Self::Connection);
        assert_eq!(saved.is_ok(), is_known, "{self:?}: {saved:?}");
    }
}

async fn lost_reply<S: Owned>() {
    for lost in [Lost::Connection, Lost::Error] {
        let proxy = Proxy::start().await;
        let app = app::<S>(&proxy).await;
        let id = app.stored(json!({ "n": 5 })).await;
        let a = Visit::load(&app.one, id).await;
        a.set("n", 6).await;
        let mut reply = proxy.hold("update");
        let save = a.begin_save();
        reply.reached().await;
        lost.lose(reply);
        lost.assert_outcome(&save.await.unwrap());
        assert_agree(&app, id, json!({ "n": 6 })).await;
    }
}

async fn lost_reply_of_the_merge<S: Owned>() {
    for lost in [Lost::Connection, Lost::Error] {
        let proxy = Proxy::start().await;
        let app = app::<S>(&proxy).await;
        let id = app.stored(json!({ "n": 5 })).await;
        let a = Visit::load(&app.one, id).await;
        Visit::load(&app.two, id).await.save_with("n", 6).await;
        a.set("n", 6).await;
        let mut read = proxy.hold("find");
        let save = a.begin_save();
        read.reached().await;
        let mut reply = proxy.hold("update");
        read.deliver();
        reply.reached().await;
        lost.lose(reply);
        lost.assert_outcome(&save.await.unwrap());
        assert_agree(&app, id, json!({ "n": 7 })).await;
    }
}

async fn failed_read<S: Owned>() {
    let proxy = Proxy::start().await;
    let app = app::<S>(&proxy).await;
    let id = app.stored(json!({ "a": 0 })).await;
    let a = Visit::load(&app.one, id).await;
    Visit::load(&app.two, id).await.save_with("b", 1).await;
    a.set("a", 1).await;
    let reads = proxy.refuse_all("find", 13, "Unauthorized", &[]);
    a.try_save().await.unwrap_err();
    assert_eq!(reads.times(), 1);
    drop(reads);
    app.assert_merges("failed", 1);
    app.assert_data(id, &json!({ "a": 0, "b": 1 })).await;
    // The request may try again.
    a.save().await;
    app.assert_data(id, &json!({ "a": 1, "b": 1 })).await;
}

async fn timeout<S: Owned>() {
    let proxy = Proxy::start().await;
    let short = |builder: MongoStoreBuilder| builder.operation_timeout(Duration::from_secs(2));
    let app = app_with::<S>(&proxy, short).await;
    let id = app.stored(json!({ "a": 0 })).await;
    let a = Visit::load(&app.one, id).await;
    Visit::load(&app.two, id).await.save_with("b", 1).await;
    a.set("a", 1).await;
    let mut read = proxy.hold("find");
    let save = a.begin_save();
    read.reached().await;
    let error = save.await.unwrap().unwrap_err().to_string();
    assert!(error.contains("did not answer within"), "{error}");
    read.abandoned().await;
    app.assert_data(id, &json!({ "a": 0, "b": 1 })).await;
}

async fn refused<S: Owned>() {
    let proxy = Proxy::start().await;
    let app = app::<S>(&proxy).await;
    let id = app.stored(json!({ "a": 0 })).await;
    let a = Visit::load(&app.one, id).await;
    a.set("a", 1).await;
    let refusing = proxy.refuse_all("update", 13, "Unauthorized", &[]);
    a.try_save().await.unwrap_err();
    assert_eq!(refusing.times(), 1, "an error is not tried again");
    drop(refusing);
    assert_agree(&app, id, json!({ "a": 0 })).await;
}

// https://github.com/laravel/framework/issues/5416: a read that fails gave an empty session, which the end of
// the request stored.
async fn failed_load<S: Owned>() {
    let proxy = Proxy::start().await;
    let app = app::<S>(&proxy).await;
    let creator = Visit::begin(&app.two, None);
    creator.set("user", 1).await;
    creator.save_with("cart", json!(["x"])).await;
    let id = creator.id().unwrap();
    let a = Visit::begin(&app.one, Some(id));
    let refusing = proxy.refuse_all("find", 13, "Unauthorized", &[]);
    let read = a.run(|session| async move { session.get_value("user").await }).await;
    read.unwrap_err();
    let set = a.run(|session| async move { session.insert("seen", "/a").await }).await;
    set.unwrap_err();
    drop(refusing);
    a.save_with("seen", "/a").await;
    app.assert_data(id, &json!({ "user": 1, "cart": ["x"], "seen": "/a" })).await;
}

/// Nobody knows whether the request itself has ended the session. So it counts as ended by somebody else.
async fn lost_take<S: Owned>() {
    let proxy = Proxy::start().await;
    let app = app::<S>(&proxy).await;
    let id = app.stored(json!({ "user": 1 })).await;
    let a = Visit::load(&app.one, id).await;
    let mut reply = proxy.hold("findAndModify");
    let cycle = a.run(|session| async move { session.cycle_id().await.map_err(drop) });
    let lose = async {
        reply.reached().await;
        reply.refuse(50);
    };
    assert_eq!(futures::join!(cycle, lose).0, Err(()));
    app.assert_gone(id).await;
    // A handler that ignores the error.
    a.save_with("seen", true).await;
    app.assert_gone(a.id().unwrap()).await;
    assert_eq!(app.database.length().await.unwrap(), 0);
}

/// Polls the save of a request up to `polls` times and drops it, as a handler does when its client disconnects.
async fn cancelled<S: Owned>() {
    let proxy = Proxy::start().await;
    let app = app::<S>(&proxy).await;
    for polls in 0..12 {
        let id = app.stored(json!({ "a": 0 })).await;
        in_request_scope(async {
            let mut record = app.one.load(&id).await.unwrap().unwrap();
            // A visit has a scope and a task of its own.
            Visit::load(&app.two, id).await.save_with("b", 1).await;
            record.data.insert("a".to_owned(), json!(1));
            let mut save = app.one.save(&record);
            for poll in 0..polls {
                if futures::poll!(&mut save).is_ready() {
                    break;
                }
                for _ in 0..poll {
                    tokio::task::yield_now().await;
                }
                if poll > 6 {
                    tokio::time::sleep(Duration::from_micros(200)).await;
                }
            }
        })
        .await;
        let a = i32::from(polls > 0);
        eventually("the save has ended", async || {
            json!(app.record(id).await.data) == json!({ "a": a, "b": 1 })
        })
        .await;
        app.assert_data(id, &json!({ "a": a, "b": 1 })).await;
    }
}

/// The server says each time that the session has changed again (error 66 for the statement).
async fn never_at_rest<S: Owned>() {
    let proxy = Proxy::start().await;
    let app = app::<S>(&proxy).await;
    let id = app.stored(json!({ "a": 0 })).await;
    let a = Visit::load(&app.one, id).await;
    a.set("a", 1).await;
    let changed = Injection::WriteErrors(ServerError::new(66));
    let refused = proxy.inject("update", changed, Lasts::UntilStopped);
    let error = a.try_save().await.unwrap_err().to_string();
    assert!(error.contains("each of its 64 attempts"), "{error}");
    assert_eq!(refused.count(), 64);
    refused.stop();
    app.assert_merges("failed", 1);
    assert_agree(&app, id, json!({ "a": 0 })).await;
}
