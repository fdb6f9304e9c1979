//! Filters of operators: which stored sessions they find, and which ones they delete.

use std::time::{Duration, Instant};

use futures::StreamExt;
use mongodb::bson::{Document, doc};
use serde_json::{Value, json};
use tower_sessions::SessionStore;
use tower_sessions::session::Record;
use tower_sessions_moka_mongodb_store::{
    ErrorKind, LiveSessions, MongoStore, Result, SessionHandle, data_equals, data_path, mongodb,
    owner_equals,
};

use crate::common::{
    create, eventually, everything_said_by, mongo, on_both_tiers, other_instance, record, uri,
};
use crate::owner::Owned;

on_both_tiers! {
    filter_finds_sessions_by_their_data = find;
    store_of_texts_explains_how_to_query_data = not_queryable;
    filter_deletes_sessions_on_every_instance = delete_where;
    empty_filter_deletes_nothing = empty;
    filter_that_reads_data_is_rejected_where_data_is_a_text = reads_data_of_texts;
    an_owner_or_its_data_finds_the_sessions_of_both_forms = owner_or_data;
    expression_that_reads_no_field_deletes_nothing = constant_expressions;
    an_expression_is_not_evaluated_for_data_that_is_text = expressions_over_both_forms;
    a_filter_may_test_the_type_before_a_condition = guarded_by_the_caller;
    filter_from_untrusted_json_only_compares_for_equality = untrusted;
    error_quotes_no_message_of_the_server = errors;
}

async fn with(store: &impl SessionStore, key: &str, value: Value) -> Record {
    let mut record = record();
    record.data.insert(key.to_owned(), value);
    store.create(&mut record).await.unwrap();
    record
}

async fn is_there(store: &impl SessionStore, record: &Record) -> bool {
    store.load(&record.id).await.unwrap().is_some()
}

async fn found(listed: LiveSessions) -> Vec<SessionHandle> {
    listed.map(|session| session.unwrap().handle).collect().await
}

async fn error_of(mut listed: LiveSessions) -> tower_sessions_moka_mongodb_store::Error {
    let error = listed.next().await.unwrap().unwrap_err();
    assert!(listed.next().await.is_none());
    error
}

async fn find(plain: impl Owned) {
    let store = plain.with(|mongo| mongo.queryable(true)).await;
    let large = with(&store, "cart", json!({ "total": 2_000 })).await;
    with(&store, "cart", json!({ "total": 20 })).await;
    let odd = with(&store, "a.b%", json!({ "$c": "x" })).await;
    with(&plain, "cart", json!({ "total": 3_000 })).await;

    let total = data_path(&["cart", "total"]);
    let filter = doc! { &total: { "$gt": 1_000 } };
    assert_eq!(found(store.find(filter.clone())).await, [SessionHandle::of(large.id)]);
    let filter = doc! { "$and": [{ data_path(&["a.b%", "$c"]): "x" }] };
    assert_eq!(found(store.find(filter)).await, [SessionHandle::of(odd.id)]);
    assert_eq!(store.find(doc! {}).count().await, 4, "all of them");
    // The caller's condition on a field on which the store has a condition too.
    let soon = mongodb::bson::DateTime::from_millis(1_000);
    assert_eq!(store.find(doc! { "expires": { "$lt": soon } }).count().await, 0);
    let far = doc! { "expires": { "$gt": soon }, "$and": [{ &total: { "$lt": 1_000 } }] };
    assert_eq!(store.find(far).count().await, 1);
    let times = doc! { "created": { "$lte": mongodb::bson::DateTime::now() } };
    assert_eq!(plain.find(times.clone()).count().await, 4, "texts have times too");

    store.expire_all().await;
    assert_eq!(store.find(times).count().await, 0);
    assert_eq!(store.delete_where(doc! { &total: { "$gt": 0 } }).await.unwrap(), 0);
    assert_eq!(store.documents().await, 4, "expired sessions are left to the TTL index");
}

async fn not_queryable(store: impl Owned) {
    let record = with(&store, "card", json!("4111")).await;
    for filter in [
        doc! { data_path(&["card"]): "4111" },
        doc! { "$nor": [{ "$or": [{ "data.card": "4111" }] }] },
        doc! { "$expr": { "$eq": ["$data.card", "4111"] } },
    ] {
        for error in [
            error_of(store.find(filter.clone())).await,
            store.delete_where(filter.clone()).await.unwrap_err(),
        ] {
            assert_eq!(error.kind(), ErrorKind::Config);
            let said = everything_said_by(&error);
            assert!(said.contains("queryable(true)") && !said.contains("4111"), "{said}");
        }
    }
    assert!(is_there(&store, &record).await);
}

async fn delete_where(plain: impl Owned) {
    let store = plain.with(|mongo| mongo.queryable(true)).await;
    let other = store.with(|mongo| mongo.queryable(true)).await;
    let mut old = Vec::new();
    let mut new = Vec::new();
    for version in 0..6 {
        let made = with(&store, "version", json!(version)).await;
        assert!(is_there(&other, &made).await, "it is cached there");
        if version < 4 { &mut old } else { &mut new }.push(made);
    }
    let filter = doc! { data_path(&["version"]): { "$lt": 4 } };
    assert_eq!(store.delete_where(filter.clone()).await.unwrap(), 4);
    let returned = Instant::now();
    for record in &old {
        assert!(!is_there(&store, record).await);
        eventually("it ends there", async || !is_there(&other, record).await).await;
        store.save(record).await.unwrap();
        assert!(!is_there(&store, record).await, "no save brings it back");
    }
    assert!(returned.elapsed() < Duration::from_secs(5), "the bound by default");
    for record in &new {
        assert!(is_there(&store, record).await && is_there(&other, record).await);
    }
    assert_eq!(store.delete_where(filter).await.unwrap(), 0);
}

async fn empty(store: impl Owned) {
    let record = create(&store).await;
    let error = store.delete_where(doc! {}).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Config);
    assert!(error.to_string().contains("`clear`"), "{error}");
    assert!(is_there(&store, &record).await);
}

async fn errors(plain: impl Owned) {
    let store = plain.with(|mongo| mongo.queryable(true)).await;
    create(&store).await;
    for (filter, kind) in [
        (doc! { "data.card": { "$in": "4111" } }, ErrorKind::Server),
        (doc! { "data.card": { "$no_such": "4111" } }, ErrorKind::Config),
    ] {
        let deleted: Result<u64> = store.delete_where(filter.clone()).await;
        for error in [error_of(store.find(filter)).await, deleted.unwrap_err()] {
            assert_eq!(error.kind(), kind);
            let said = everything_said_by(&error);
            assert!(!said.contains("4111") && !said.contains("no_such"), "{said}");
        }
    }
}

/// Filters that read the data, or may read it. Each one has deleted sessions that it must not find,
/// or would delete them.
fn read_data() -> Vec<Document> {
    let role = doc! { "$getField": { "field": "role", "input": "$data" } };
    vec![
        doc! { "$expr": { "$ne": [role.clone(), "admin"] } },
        doc! { "$expr": { "$let": { "vars": { "d": "$data" }, "in": { "$ne": ["$$d.role", "admin"] } } } },
        doc! { "$or": [{ "owner": "7" }, { "data.flagged": true }] },
        doc! { "data": { "$ne": { "role": "admin" } } },
        doc! { "data": { "$not": { "$type": "object" } } },
        doc! { "data": { "$type": "string" } },
        doc! { "data": { "$exists": true } },
        doc! { "$nor": [{ "data.role": "admin" }] },
        doc! { "$nor": [{ "$or": [{ "$and": [{ "data.role": { "$in": ["admin"] } }] }] }] },
        doc! { "data.role": { "$not": { "$regex": "^admin" } } },
        doc! { "$where": "this.data.role != 'admin'" },
        doc! { "$jsonSchema": { "not": { "properties": { "data": { "required": ["role"] } } } } },
        doc! { "$text": { "$search": "-admin" } },
        doc! { "$expr": { "$ne": ["$$ROOT.data.role", "admin"] } },
        doc! { "$expr": { "$ne": ["$$CURRENT.data.role", "admin"] } },
        doc! { "$expr": { "$let": { "vars": { "d": "$$ROOT" }, "in": { "$ne": ["$$d.data.role", "admin"] } } } },
        doc! { "$expr": { "$let": { "vars": { "d": "$$CURRENT" }, "in": { "$ne": ["$$d.data.role", "admin"] } } } },
        doc! { "$expr": { "$let": { "vars": { "CURRENT": "$data" }, "in": { "$ne": ["$role", "admin"] } } } },
        doc! { "$expr": { "$ne": [{ "$getField": "data" }, 1] } },
        doc! { "$expr": { "$ne": [{ "$getField": { "field": "data" } }, 1] } },
        doc! { "$expr": { "$ne": [{ "$getField": { "field": "data", "input": "$$ROOT" } }, 1] } },
        doc! { "$expr": { "$eq": [{ "$type": "$data.role" }, "missing"] } },
        doc! { "$expr": { "$not": [{ "$in": ["admin", { "$ifNull": ["$data.roles", []] }] }] } },
        doc! { "$expr": { "$eq": [{ "$size": { "$objectToArray": "$$ROOT" } }, 7] } },
        doc! { "$expr": { "$eq": [{ "$mergeObjects": ["$$ROOT", {}] }, {}] } },
        doc! { "$expr": { "$ne": [{ "$setField": { "field": "a", "input": "$$ROOT", "value": 1 } }, 1] } },
        doc! { "$expr": { "$switch": { "branches": [{ "case": { "$eq": ["$data.role", "admin"] }, "then": false }], "default": true } } },
        doc! { "$expr": { "$reduce": { "input": ["$data"], "initialValue": true, "in": { "$ne": ["$$this.role", "admin"] } } } },
        doc! { "$expr": { "$allElementsTrue": [{ "$map": { "input": ["$data"], "as": "d", "in": { "$ne": ["$$d.role", "admin"] } } }] } },
        doc! { "$expr": { "$function": { "body": "() => true", "args": ["$data"], "lang": "js" } } },
        doc! { "$expr": { "$cond": { "if": "$data.role", "then": false, "else": true } } },
        doc! { "$expr": { "a": "$data.role" } },
        doc! { "$expr": [{ "$not": ["$data.role"] }] },
        doc! { "$expr": "$data" },
        doc! { "$expr": { "$gt": [{ "$meta": "textScore" }, 1] } },
        // No session has these fields, so a `$ne` of them would find all sessions.
        doc! { "role": { "$ne": "admin" } },
        doc! { "user_id": { "$exists": false } },
        doc! { "database": 1 },
        doc! { "$expr": { "$ne": ["$role", "admin"] } },
        doc! { "expires.data": { "$exists": false } },
        doc! { "": 1 },
        // No condition at all.
        doc! { "$comment": "all of them" },
        doc! { "$or": [{ "owner": "7" }, {}] },
        doc! { "$and": [{ "$comment": "all of them" }] },
    ]
}

async fn reads_data_of_texts(store: impl Owned) {
    let admin = with(&store, "role", json!("admin")).await;
    let other = with(&store, "role", json!("visitor")).await;
    for filter in read_data() {
        let error = store.delete_where(filter.clone()).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Config, "{filter}: {error}");
        let said = everything_said_by(&error);
        assert!(!said.contains("admin") && !said.contains("role"), "{filter}: {said}");
        if !filter.contains_key("$comment") {
            let listed = error_of(store.find(filter.clone())).await;
            assert_eq!(listed.kind(), ErrorKind::Config, "{filter}: {listed}");
        }
    }
    let mut deep = doc! { "data.role": 1 };
    for _ in 0..300 {
        deep = doc! { "$and": [deep] };
    }
    let error = store.delete_where(deep).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Config);
    assert!(is_there(&store, &admin).await && is_there(&store, &other).await);
}

async fn owner_or_data(plain: impl Owned) {
    let owner = |data: &std::collections::HashMap<String, Value>| data.get("user")?.as_i64();
    let texts = plain.with(|mongo| mongo.owner(owner)).await;
    let store = plain.with(|mongo| mongo.owner(owner).queryable(true)).await;
    let text_of_7 = with(&texts, "user", json!(7)).await;
    let text_of_8 = with(&texts, "user", json!(8)).await;
    let flagged_text = with(&texts, "flagged", json!(true)).await;
    let native_of_7 = with(&store, "user", json!(7)).await;
    let native_of_8 = with(&store, "user", json!(8)).await;
    let flagged = with(&store, "flagged", json!(true)).await;

    let either = doc! { "$or": [{ "owner": "7" }, { "data.flagged": true }] };
    let mut found_by_either = found(store.find(either.clone())).await;
    let mut wanted =
        [&text_of_7, &native_of_7, &flagged].map(|it| SessionHandle::of(it.id)).to_vec();
    found_by_either.sort_unstable_by_key(ToString::to_string);
    wanted.sort_unstable_by_key(ToString::to_string);
    assert_eq!(found_by_either, wanted);
    let in_an_expression = doc! { "$expr": { "$or": [
        { "$eq": ["$owner", "7"] },
        { "$eq": ["$data.flagged", true] },
    ] } };
    assert_eq!(store.find(in_an_expression).count().await, 3);
    for neither in [
        doc! { "$nor": [{ "owner": "7" }, { "data.flagged": true }] },
        doc! { "$expr": { "$not": [{ "$or": [
            { "$eq": ["$owner", "7"] },
            { "$eq": ["$data.flagged", true] },
        ] }] } },
    ] {
        let found = found(store.find(neither)).await;
        assert_eq!(found, [SessionHandle::of(native_of_8.id)], "texts may be flagged");
    }

    assert_eq!(store.delete_where(either).await.unwrap(), 3);
    for gone in [&text_of_7, &native_of_7, &flagged] {
        assert!(!is_there(&store, gone).await);
    }
    for left in [&text_of_8, &flagged_text, &native_of_8] {
        assert!(is_there(&store, left).await);
    }
}

/// Filters that are true of every session or of no session, whatever the session holds.
fn constant() -> Vec<Document> {
    let expressions: Vec<mongodb::bson::Bson> = vec![
        true.into(),
        1.into(),
        "owner".into(),
        doc! { "$literal": true }.into(),
        doc! { "$literal": "$owner" }.into(),
        doc! { "$eq": [1, 1] }.into(),
        doc! { "$and": [] }.into(),
        doc! { "$not": [false] }.into(),
        doc! { "$not": false }.into(),
        doc! { "$or": [{ "$eq": ["$owner", "7"] }, true] }.into(),
        doc! { "$not": [{ "$and": [{ "$eq": ["$data.role", "admin"] }, { "$eq": [1, 2] }] }] }
            .into(),
        doc! { "$gt": ["$$NOW", mongodb::bson::DateTime::from_millis(0)] }.into(),
        doc! { "$let": { "vars": { "a": 1 }, "in": { "$eq": ["$$a", 1] } } }.into(),
        doc! { "$anyElementTrue": [{ "$map": { "input": [1], "in": "$$this" } }] }.into(),
        mongodb::bson::Bson::Array(vec![true.into()]),
        doc! { "a": 1 }.into(),
    ];
    let mut filters: Vec<_> = expressions.into_iter().map(|it| doc! { "$expr": it }).collect();
    filters.extend([
        doc! { "$or": [{ "owner": "7" }, { "$expr": true }] },
        doc! { "$nor": [{ "$expr": false }] },
        doc! { "$and": [] },
        doc! { "$or": [{ "owner": "7" }, { "$nor": [] }] },
    ]);
    filters
}

async fn constant_expressions(plain: impl Owned) {
    for queryable in [false, true] {
        let store = plain.with(|mongo| mongo.queryable(queryable)).await;
        let record = create(&store).await;
        for filter in constant() {
            for error in [
                error_of(store.find(filter.clone())).await,
                store.delete_where(filter.clone()).await.unwrap_err(),
            ] {
                assert_eq!(error.kind(), ErrorKind::Config, "{filter}: {error}");
            }
        }
        assert!(is_there(&store, &record).await);
        let soon = doc! { "$expr": { "$gte": ["$expires", mongodb::bson::DateTime::now()] } };
        assert_eq!(store.delete_where(soon).await.unwrap(), 1);
    }
}

/// A session of a user, with a cart.
async fn with_cart(store: &impl SessionStore, user: i64, cart: Value) -> SessionHandle {
    let mut record = with(store, "user", json!(user)).await;
    record.data.insert("cart".to_owned(), cart);
    store.save(&record).await.unwrap();
    SessionHandle::of(record.id)
}

/// Conditions that are a server error for a value of another type.
async fn expressions_over_both_forms(plain: impl Owned) {
    let owner = |data: &std::collections::HashMap<String, Value>| data.get("user")?.as_i64();
    let texts = plain.with(|mongo| mongo.owner(owner)).await;
    let store = plain.with(|mongo| mongo.owner(owner).queryable(true)).await;
    let text_of_7 = with_cart(&texts, 7, json!([1, 2, 3])).await;
    let _text_of_8 = with_cart(&texts, 8, json!([1, 2, 3])).await;
    let large = with_cart(&store, 8, json!([1, 2, 3])).await;
    let small = with_cart(&store, 8, json!([1])).await;
    let size = || doc! { "$gt": [{ "$size": "$data.cart" }, 2] };
    let first = || doc! { "$eq": [{ "$arrayElemAt": [{ "$objectToArray": "$data" }, 0] }, 1] };
    let of_seven = || doc! { "$eq": ["$owner", "7"] };
    for (filter, wanted) in [
        (doc! { "$expr": size() }, vec![large]),
        (doc! { "$expr": { "$not": [size()] } }, vec![small]),
        (doc! { "$nor": [{ "$expr": size() }] }, vec![small]),
        (doc! { "$expr": { "$or": [of_seven(), size()] } }, vec![text_of_7, large]),
        (doc! { "$or": [{ "owner": "7" }, { "$expr": size() }] }, vec![text_of_7, large]),
        (doc! { "$expr": { "$not": [{ "$or": [of_seven(), size()] }] } }, vec![small]),
        (doc! { "$expr": { "$and": [{ "$ne": ["$owner", "7"] }, size()] } }, vec![large]),
        (doc! { "$expr": first() }, vec![]),
        (doc! { "$expr": { "$gt": [{ "$add": [{ "$size": "$data.cart" }, 1] }, 3] } }, vec![large]),
        (doc! { "data.cart": { "$exists": true }, "$expr": size() }, vec![large]),
    ] {
        let mut found = found(store.find(filter.clone())).await;
        let mut wanted = wanted;
        found.sort_unstable_by_key(ToString::to_string);
        wanted.sort_unstable_by_key(ToString::to_string);
        assert_eq!(found, wanted, "{filter}");
    }
    let either = doc! { "$expr": { "$or": [of_seven(), size()] } };
    assert_eq!(store.delete_where(either).await.unwrap(), 2);
    assert_eq!(store.documents().await, 2);
}

/// The form that the documentation of `find` recommends.
async fn guarded_by_the_caller(plain: impl Owned) {
    let store = plain.with(|mongo| mongo.queryable(true)).await;
    let large = with(&store, "cart", json!([1, 2, 3])).await;
    with(&store, "cart", json!("none")).await;
    with(&plain, "cart", json!([1, 2, 3])).await;
    let filter = doc! { "$expr": { "$cond": [
        { "$isArray": "$data.cart" },
        { "$gt": [{ "$size": "$data.cart" }, 2] },
        false,
    ] } };
    assert_eq!(found(store.find(filter)).await, [SessionHandle::of(large.id)]);
}

/// The value comes from a request: `{"token": {"$ne": ""}}` instead of `{"token": "…"}`.
async fn untrusted(plain: impl Owned) {
    let store = plain.with(|mongo| mongo.queryable(true)).await;
    let one = with(&store, "cart", json!({ "id": "a", "total": 7 })).await;
    let other = with(&store, "cart", json!({ "id": "b", "$ne": "" })).await;
    let without = with(&store, "name", Value::Null).await;
    for attack in [
        json!({ "$ne": "" }),
        json!({ "$exists": true }),
        json!({ "$gt": "" }),
        json!({ "$regex": "." }),
        json!({ "$not": { "$eq": 1 } }),
        json!([{ "$ne": "" }]),
        json!({ "id": { "$ne": "" } }),
        json!({}),
        json!([]),
        json!("$data.cart.id"),
        // A missing field is not null.
        Value::Null,
    ] {
        let filter = data_equals(&["cart", "id"], attack.clone()).unwrap();
        assert_eq!(store.delete_where(filter).await.unwrap(), 0, "{attack}");
    }
    let filter = data_equals(&["cart", "id"], "a").unwrap();
    assert_eq!(found(store.find(filter)).await, [SessionHandle::of(one.id)]);
    let filter = data_equals(&["cart", "total"], 7).unwrap();
    assert_eq!(found(store.find(filter)).await, [SessionHandle::of(one.id)]);
    let filter = data_equals(&["cart", "$ne"], "").unwrap();
    assert_eq!(found(store.find(filter)).await, [SessionHandle::of(other.id)], "keys are escaped");
    let filter = data_equals(&["name"], Value::Null).unwrap();
    assert_eq!(found(store.find(filter)).await, [SessionHandle::of(without.id)]);
    let error = data_equals(&[""; 0], "a").unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Config);
    assert_eq!(store.find(owner_equals("$ne")).count().await, 0);
    assert_eq!(store.find(doc! {}).count().await, 3);
}

#[tokio::test]
async fn negated_filter_finds_no_session_whose_data_is_a_text() {
    let uri = uri();
    let text = other_instance(&uri).await;
    with(&text, "role", json!("admin")).await;
    let store = MongoStore::builder().uri(&uri).queryable(true).build().await.unwrap();
    let deleted = store.delete_where(doc! { "data.role": { "$ne": "admin" } }).await.unwrap();
    assert_eq!(deleted, 0, "an admin was signed out by role != admin");
}

#[tokio::test]
async fn filter_that_compares_the_whole_data_is_rejected_where_data_is_a_text() {
    let store = mongo().await;
    let record = create(&store).await;
    for filter in
        [doc! { "data": { "user": 7 } }, doc! { "$nor": [{ "data": { "$type": "object" } }] }]
    {
        let error = store.delete_where(filter).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Config, "{error}");
    }
    assert!(store.load(&record.id).await.unwrap().is_some());
}
