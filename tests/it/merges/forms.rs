//! Merged saves in every form of a stored session, and under every option of the cache.

use std::time::Duration;

use mongodb::bson::spec::BinarySubtype;
use mongodb::bson::{Binary, Bson, DateTime, doc};
use serde_json::json;
use time::OffsetDateTime;
use tower_sessions::session::Id;
use tower_sessions::{Expiry, SessionStore};
use tower_sessions_moka_mongodb_store::{
    CachedMongoStore, CachedMongoStoreBuilder, Coherence, MongoStore, MongoStoreBuilder, mongodb,
};

use super::app::{App, Instances, Options, Visit, by_id, counting, on_two_instances_of_both_tiers};
use crate::common::{FOREVER, Store, uri};
use crate::owner::Owned;
use crate::proxy::Proxy;

on_two_instances_of_both_tiers! {
    each_form_of_the_data_is_merged = forms;
    owner_follows_the_merged_data = owner;
    later_expiry_is_kept_unless_a_request_shortens_it = expiry;
    fixed_lifetime_begins_with_each_save = ttl;
    session_without_a_valid_rev_is_merged = strange_revs;
    session_that_was_changed_by_hand_is_merged = changed_by_hand;
    session_that_was_cleared_is_stored_as_the_request_has_it = cleared;
    session_that_has_expired_meanwhile_stays_expired = expired;
    statements_of_a_batch_are_refused_one_by_one = batch;
}

/// Requests of one session that keep each other's changes, in all the ways that there are.
async fn assert_merges<S: Owned>(app: &App<S>, instances: Instances, case: &str) {
    let id = app
        .stored(
            json!({ "gone": 1, "n": u64::from(u32::MAX), "nested": { "list": [1.5, null, "ä"] } }),
        )
        .await;
    let [a, b, c, reader] = app.visits(id, instances).await;
    b.remove("gone").await;
    b.save_with("b", json!({ "$set": "no operator", "a.b": [] })).await;
    a.save_with("a", 1.0).await;
    for visit in [&c, &a] {
        visit.save_with("n", u64::from(u32::MAX) + 1).await;
    }
    reader.save().await;
    let all = json!({
        "n": u64::from(u32::MAX) + 2,
        "nested": { "list": [1.5, null, "ä"] },
        "b": { "$set": "no operator", "a.b": [] },
        "a": 1.0,
    });
    assert_eq!(json!(app.record(id).await.data), all, "{case}");
    assert_eq!(json!(app.one.load(&id).await.unwrap().unwrap().data), all, "{case}");
    let [a, b] = app.visits(id, Instances::One).await;
    b.save_with("late", 1).await;
    a.cycle_id().await;
    a.save_with("user", 2).await;
    let new = a.id().unwrap();
    let mut all = all;
    all["late"] = json!(1);
    all["user"] = json!(2);
    assert_eq!(json!(app.record(new).await.data), all, "{case}");
    assert_eq!(json!(app.one.load(&new).await.unwrap().unwrap().data), all, "{case}");
    app.assert_merges("failed", 0);
}

async fn forms<S: Owned>() {
    let text: Options = |builder| builder.on_conflict(counting);
    let queryable: Options = |builder| builder.on_conflict(counting).queryable(true);
    let one_at_a_time: Options = |builder| builder.on_conflict(counting).max_commands_in_flight(1);
    for (case, options) in
        [("text", text), ("queryable", queryable), ("one at a time", one_at_a_time)]
    {
        for instances in Instances::BOTH {
            assert_merges(&App::<S>::start(options).await, instances, case).await;
        }
    }
    #[cfg(feature = "encryption")]
    {
        use tower_sessions_moka_mongodb_store::{Key, Keys};

        let encrypted: Options = |builder| {
            builder.on_conflict(counting).encryption(Keys::new(1, Key::from_bytes(&[7; 32])))
        };
        let app = App::<S>::start(encrypted).await;
        assert_merges(&app, Instances::Two, "encrypted").await;
        let mut all = app.database.collection().find(doc! {}).await.unwrap();
        while all.advance().await.unwrap() {
            let stored = all.deserialize_current().unwrap();
            assert!(matches!(stored.data, Bson::Binary(_)), "{stored:?}");
        }
    }
}

type OfCache = fn(CachedMongoStoreBuilder) -> CachedMongoStoreBuilder;

/// The options of a cache, each on two instances where there may be two.
#[tokio::test]
async fn each_option_of_the_cache_merges() {
    let options = |builder: MongoStoreBuilder| builder.on_conflict(counting);
    let stale = |builder: CachedMongoStoreBuilder| builder.max_staleness(FOREVER);
    let cases: [(&str, Instances, OfCache); 6] = [
        ("compact", Instances::Two, |cache| cache.compact(true)),
        ("touch_after", Instances::Two, |cache| cache.touch_after(FOREVER)),
        ("no staleness", Instances::Two, |cache| cache.max_staleness(Duration::ZERO)),
        ("small", Instances::Two, |cache| cache.max_entries(1)),
        // Without a stream, the instances serve stale states here, as they may.
        ("time bound", Instances::Two, |cache| cache.coherence(Coherence::TimeBound)),
        ("sole writer", Instances::One, |cache| cache.coherence(Coherence::SoleWriter)),
    ];
    for (case, instances, of_cache) in cases {
        let uri = uri();
        let over = async |mongo| {
            let builder = CachedMongoStore::builder(mongo);
            let builder = if case == "no staleness" || case == "sole writer" {
                of_cache(builder)
            } else {
                stale(of_cache(builder))
            };
            builder.build().await.unwrap()
        };
        let app = App::<CachedMongoStore>::start_on([&uri, &uri], options, over).await;
        assert_merges(&app, instances, case).await;
    }
}

/// An instance without a change stream has a session as it was some time ago. A request there still keeps what
/// others have saved since, and counts from the right number.
#[tokio::test]
async fn a_request_that_was_served_a_stale_state_keeps_what_others_saved() {
    let uri = uri();
    let over = async |mongo| {
        let builder = CachedMongoStore::builder(mongo).coherence(Coherence::TimeBound);
        builder.max_staleness(FOREVER).build().await.unwrap()
    };
    let options = |builder: MongoStoreBuilder| builder.on_conflict(counting);
    let app = App::<CachedMongoStore>::start_on([&uri, &uri], options, over).await;
    let id = app.stored(json!({ "n": 5, "user": 1 })).await;
    app.two.load(&id).await.unwrap();
    for n in 6..=8 {
        Visit::load(&app.one, id).await.save_with("n", n).await;
    }
    let log_out = Visit::load(&app.one, id).await;
    log_out.remove("user").await;
    log_out.save().await;
    let stale = Visit::load(&app.two, id).await;
    assert_eq!(stale.get("n").await, Some(json!(5)));
    stale.save_with("n", 6).await;
    assert_eq!(json!(app.record(id).await.data), json!({ "n": 9 }));
    assert_eq!(json!(app.two.load(&id).await.unwrap().unwrap().data), json!({ "n": 9 }));
}

/// A standalone server has no change streams.
#[tokio::test]
async fn a_server_without_change_streams_merges() {
    let proxy = Proxy::start().await;
    let refusing = proxy.refuse_all("aggregate", 40573, "Location40573", &[]);
    let over = async |mongo| CachedMongoStore::builder(mongo).build().await.unwrap();
    let options = |builder: MongoStoreBuilder| builder.on_conflict(counting);
    let uris = [proxy.uri(), proxy.uri()];
    let app = App::<CachedMongoStore>::start_on(uris, options, over).await;
    assert!(refusing.times() > 0);
    assert_merges(&app, Instances::Two, "standalone").await;
}

async fn owner<S: Owned>() {
    for instances in Instances::BOTH {
        let app = App::<S>::start(|builder| builder.owner(|data| data.get("user")?.as_i64())).await;
        let owner_of = async |id: Id| app.document(id).await.unwrap().get("owner").cloned();
        for logs_in_first in [true, false] {
            let id = app.stored(json!({ "user": 1 })).await;
            let [a, b] = app.visits(id, instances).await;
            a.set("user", 2).await;
            b.set("cart", json!(["x"])).await;
            for visit in if logs_in_first { [&a, &b] } else { [&b, &a] } {
                visit.save().await;
            }
            app.assert_data(id, &json!({ "user": 2, "cart": ["x"] })).await;
            assert_eq!(owner_of(id).await, Some("2".into()), "{logs_in_first}");
            assert_eq!(app.one.delete_by_owner("1").await.unwrap(), 0);
            let [a, b] = app.visits(id, instances).await;
            a.remove("user").await;
            a.save().await;
            b.save_with("seen", true).await;
            assert_eq!(owner_of(id).await, Some(Bson::Null));
            assert_eq!(app.one.delete_by_owner("2").await.unwrap(), 0);
        }
    }
}

async fn set_expiry(visit: &Visit, at: OffsetDateTime) {
    visit.run(|session| async move { session.set_expiry(Some(Expiry::AtDateTime(at))) }).await;
}

async fn expiry<S: Owned>() {
    let second = OffsetDateTime::now_utc().replace_nanosecond(0).unwrap();
    let [soon, found, later, latest] =
        [1, 2, 3, 4].map(|hours| second + time::Duration::hours(hours));
    for instances in Instances::BOTH {
        for (a_sets, b_sets, stored) in [
            (later, latest, latest),
            (latest, later, latest),
            (found, latest, latest),
            (soon, latest, soon),
            (later, soon, later),
        ] {
            for a_changes in [false, true] {
                let app = App::<S>::start(|builder| builder).await;
                let id = app.stored(json!({})).await;
                let [first] = app.visits(id, instances).await;
                // Shorter than the expiry of a new session.
                set_expiry(&first, found).await;
                first.save().await;
                let [a, b] = app.visits(id, Instances::One).await;
                set_expiry(&b, b_sets).await;
                b.save_with("b", 1).await;
                set_expiry(&a, a_sets).await;
                if a_changes {
                    a.set("a", 1).await;
                }
                a.save().await;
                let record = app.record(id).await;
                let case = format!("{a_sets} after {b_sets}, {a_changes}");
                assert_eq!(record.expiry_date, stored, "{case}");
                assert_eq!(record.data.contains_key("a"), a_changes, "{case}");
                assert!(record.data.contains_key("b"), "{case}");
                let served = app.one.load(&id).await.unwrap().unwrap();
                assert_eq!((served.expiry_date, served.data), (stored, record.data), "{case}");
            }
        }
    }
}

async fn ttl<S: Owned>() {
    const HOUR: Duration = Duration::from_secs(3_600);
    let app = App::<S>::start(|builder| builder.ttl(HOUR)).await;
    let id = app.stored(json!({})).await;
    let [a, b, c] = app.visits(id, Instances::Two).await;
    for (visit, key) in [(&b, "b"), (&a, "a")] {
        let before = OffsetDateTime::now_utc() - time::Duration::MILLISECOND;
        visit.save_with(key, 1).await;
        let expires = app.record(id).await.expiry_date;
        assert!(expires >= before + HOUR && expires <= OffsetDateTime::now_utc() + HOUR);
    }
    c.save().await;
    app.assert_data(id, &json!({ "a": 1, "b": 1 })).await;
}

/// Sets or removes the `rev` of a session, as an operator may.
///
/// A binary of 16 bytes that has another subtype is not among the cases: no expression of the server sees the
/// subtype, so a save of such a session fails, and its message names `rev`.
async fn set_rev(database: &MongoStore, id: Id, rev: Option<Bson>) {
    let set = |rev| doc! { "$set": { "rev": rev } };
    let change = rev.map_or_else(|| doc! { "$unset": { "rev": "" } }, set);
    database.collection().update_one(by_id(id), change).await.unwrap();
}

fn binary(length: usize) -> Bson {
    Binary { subtype: BinarySubtype::Generic, bytes: vec![7; length] }.into()
}

async fn strange_revs<S: Owned>() {
    for rev in [
        None,
        Some(Bson::Null),
        Some("text".into()),
        Some(7.into()),
        Some(DateTime::now().into()),
        Some(binary(0)),
        Some(binary(3)),
        Some(binary(17)),
        Some(doc! { "a": 1 }.into()),
    ] {
        let app = App::<S>::start(|builder| builder).await;
        let creator = Visit::begin(&app.database, None);
        creator.save_with("user", 1).await;
        let id = creator.id().unwrap();
        set_rev(&app.database, id, rev.clone()).await;
        let [a, b] = app.visits(id, Instances::Two).await;
        b.save_with("b", 1).await;
        let now = app.document(id).await.unwrap().get_binary_generic("rev").unwrap().len();
        assert_eq!(now, 16, "{rev:?}");
        a.save_with("a", 1).await;
        app.assert_data(id, &json!({ "user": 1, "a": 1, "b": 1 })).await;
        // Twice in a row: the rev becomes strange between load and save.
        let [a, b] = app.visits(id, Instances::Two).await;
        b.save_with("c", 1).await;
        set_rev(&app.database, id, rev.clone()).await;
        a.save_with("d", 1).await;
        let all = json!({ "user": 1, "a": 1, "b": 1, "c": 1, "d": 1 });
        assert_eq!(json!(app.record(id).await.data), all, "{rev:?}");
        app.assert_merges("failed", 0);
    }
}

async fn changed_by_hand<S: Owned>() {
    let app = App::<S>::start(|builder| builder).await;
    let id = app.stored(json!({ "user": 1, "role": "admin" })).await;
    let [a, b] = app.visits(id, Instances::Two).await;
    // The documents say: an edit by hand should change `rev`.
    let rev = binary(16);
    let edit = doc! { "$set": { "data": r#"{"user":1,"edited":true}"#, "rev": rev } };
    app.database.collection().update_one(by_id(id), edit).await.unwrap();
    b.save_with("b", 1).await;
    a.save_with("a", 1).await;
    app.assert_data(id, &json!({ "user": 1, "edited": true, "a": 1, "b": 1 })).await;
}

/// `Session::clear` before anything is loaded: the request does not know what it removes, and removes all.
async fn cleared<S: Owned>() {
    let app = App::<S>::start(|builder| builder).await;
    let id = app.stored(json!({ "user": 1 })).await;
    let [b] = app.visits(id, Instances::One).await;
    let a = Visit::begin(&app.one, Some(id));
    a.clear().await;
    b.save_with("b", 1).await;
    a.save_with("a", 1).await;
    assert_eq!(json!(app.record(id).await.data), json!({ "a": 1 }));
    // After a load, it removes what it has seen.
    let [a, b] = app.visits(id, Instances::One).await;
    a.clear().await;
    b.save_with("b", 1).await;
    a.save_with("c", 1).await;
    assert_eq!(json!(app.record(id).await.data), json!({ "b": 1, "c": 1 }));
}

async fn expired<S: Owned>() {
    for also_changed in [false, true] {
        let app = App::<S>::start(|builder| builder).await;
        let id = app.stored(json!({ "user": 1 })).await;
        let [a, b] = app.visits(id, Instances::Two).await;
        if also_changed {
            b.save_with("b", 1).await;
        }
        app.database.expire_all().await;
        a.save_with("a", 1).await;
        app.assert_merges("gone", 1);
        app.assert_dropped(1);
        assert_eq!(app.database.length().await.unwrap(), 0);
        let data = app.document(id).await.unwrap().get_str("data").unwrap().to_owned();
        assert!(!data.contains("\"a\""), "{data}");
    }
}

/// Saves of many sessions wait for one that has the only permit, and are sent as one command:
///
/// - another instance has changed the session of the second one, so its statement is refused,
/// - the session of the third one is gone,
/// - the others are stored.
async fn batch<S: Owned>() {
    let proxy = Proxy::start().await;
    let options =
        |builder: MongoStoreBuilder| builder.on_conflict(counting).max_commands_in_flight(1);
    let uris = [proxy.uri(), proxy.direct()];
    let app = App::<S>::start_on(uris, options, async |mongo| S::over(mongo).await).await;
    let busy = app.stored(json!({ "n": 0 })).await;
    let mut ids = Vec::new();
    let mut visits = Vec::new();
    for _ in 0..8 {
        let id = app.stored(json!({ "n": 5 })).await;
        ids.push(id);
        visits.push(Visit::load(&app.one, id).await);
    }
    let keeps_busy = Visit::load(&app.one, busy).await;
    let theirs = Visit::load(&app.two, ids[1]).await;
    theirs.set("b", 1).await;
    theirs.save_with("n", 6).await;
    app.two.delete(&ids[2]).await.unwrap();
    for visit in &visits {
        visit.set("a", 1).await;
        visit.set("n", 6).await;
    }
    keeps_busy.set("n", 1).await;
    let mut first = proxy.hold("update");
    let blocker = keeps_busy.begin_save();
    first.reached().await;
    let mut batch = proxy.hold("update");
    let saves: Vec<_> = visits.iter().map(Visit::begin_save).collect();
    assert_eq!(batch.reached().await, 8, "they are sent as one batch");
    // In the batch, one statement was refused, and the others were carried out.
    assert_eq!(json!(app.record(ids[0]).await.data), json!({ "n": 6, "a": 1 }));
    assert_eq!(json!(app.record(ids[1]).await.data), json!({ "n": 6, "b": 1 }));
    batch.deliver();
    first.deliver();
    for save in saves.into_iter().chain([blocker]) {
        save.await.unwrap().unwrap();
    }
    for (nth, id) in ids.iter().enumerate() {
        let expected = match nth {
            1 => json!({ "n": 7, "a": 1, "b": 1 }),
            2 => {
                app.assert_gone(*id).await;
                continue;
            }
            _ => json!({ "n": 6, "a": 1 }),
        };
        app.assert_data(*id, &expected).await;
    }
    app.assert_conflicts(1);
    app.assert_merges("merged", 1);
    app.assert_merges("gone", 1);
    app.assert_merges("unchanged", 8);
}
