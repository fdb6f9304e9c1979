//! Mistakes in calls that not every app makes: owners, filters, keys and events.

use futures::TryStreamExt;
use tower_sessions_moka_mongodb_store::{OnLimit, Owner, SessionHandle, data_equals};

use super::*;

fn config<T>(quotes: &Quotes, what: &str, outcome: Result<T>) {
    is(quotes, what, ErrorKind::Config, outcome);
}

fn is<T>(quotes: &Quotes, what: &str, kind: ErrorKind, outcome: Result<T>) {
    let Err(error) = outcome else { panic!("{what}: nothing is wrong") };
    assert_eq!(error.kind(), kind, "{what}: {error}");
    quotes.assert_quoted(what, &error.to_string());
}

pub(super) async fn owners(quotes: &Quotes) {
    let plain = mongo().await;
    config(quotes, "whose?", plain.delete_by_owner("ferris").await);
    config(quotes, "whose, in a list?", plain.find_by_owner("ferris").try_next().await);
    is(quotes, "no handle", ErrorKind::Decode, "its id".parse::<SessionHandle>());
    let owner = |_: &_| Some(Owner::from("x".repeat(10_000)));
    let long = MongoStore::builder().uri(uri()).owner(owner).build().await.unwrap();
    let error = long.create(&mut record()).await.unwrap_err();
    quotes.assert_quoted("an owner without end", &said_by_the_trait(&error));

    let owner = |data: &std::collections::HashMap<String, serde_json::Value>| {
        let user = data["a user who is not there"].as_i64();
        assert!(user.is_some(), "not reached");
        user
    };
    let panics = MongoStore::builder().uri(uri()).owner(owner).build().await.unwrap();
    let error = panics.create(&mut record()).await.unwrap_err();
    quotes.assert_quoted("an owner function that panics", &said_by_the_trait(&error));

    let limited =
        |max| MongoStore::builder().uri(uri()).max_sessions_per_owner(max, OnLimit::Refuse);
    quotes.of_builder("a limit of zero", ErrorKind::Config, limited(0)).await;
    quotes.of_builder("a limit for nobody", ErrorKind::Config, limited(1)).await;
    let limited = limited(1).owner(|_| Some("ferris")).build().await.unwrap();
    create(&limited).await;
    let error = limited.create(&mut record()).await.unwrap_err();
    quotes.assert_quoted("one session too many", &said_by_the_trait(&error));

    let builder = |client| MongoStore::builder().client(client).owner(|_| Some("ferris"));
    let client = Client::with_uri_str(uri()).await.unwrap();
    let create = doc! { "create": "sessions", "collation": { "locale": "en", "strength": 2 } };
    client.default_database().unwrap().run_command(create).await.unwrap();
    if lists_the_default_collation(&client).await {
        quotes.of_builder("a collation", ErrorKind::Index, builder(client)).await;
    } else {
        quotes.leave_out("has a default collation");
    }
    let client = Client::with_uri_str(uri()).await.unwrap();
    let index = doc! { "key": { "owner": 1, "_id": 1 }, "name": "theirs",
    "partialFilterExpression": { "owner": { "$gt": "a" } } };
    let create = doc! { "createIndexes": "sessions", "indexes": [index] };
    client.default_database().unwrap().run_command(create).await.unwrap();
    quotes.of_builder("another index of owners", ErrorKind::Index, builder(client)).await;
}

/// MongoDB lists the collation with the index on `_id`. The test server secantusd-py 0.7.0b3 does
/// not.
async fn lists_the_default_collation(client: &Client) -> bool {
    let sessions = client.default_database().unwrap().collection::<Document>("sessions");
    let indexes: Vec<_> = sessions.list_indexes().await.unwrap().try_collect().await.unwrap();
    indexes.iter().any(|index| index.options.as_ref().is_some_and(|o| o.collation.is_some()))
}

pub(super) async fn filters(quotes: &Quotes) {
    let store = mongo().await;
    config(quotes, "an empty filter", store.delete_where(doc! {}).await);
    let of_data = || doc! { "data.role": "guest" };
    config(quotes, "data that is a text", store.delete_where(of_data()).await);
    config(quotes, "the same in a list", store.find(of_data()).try_next().await);
    for (what, filter) in [
        ("a misspelt operator", doc! { "created": { "$befor": 1 } }),
        ("a key without `data.`", doc! { "role": { "$ne": "guest" } }),
        ("the whole document", doc! { "$expr": { "$eq": ["$$ROOT", 1] } }),
        ("a field without `$`", doc! { "$expr": { "$eq": ["owner", "ferris"] } }),
        ("no list", doc! { "$or": { "owner": "ferris" } }),
    ] {
        config(quotes, what, store.delete_where(filter).await);
    }
    config(quotes, "no key to look under", data_equals(&[""; 0], "ferris"));
    // A server may check the filter only if there is a session to compare with it.
    create(&store).await;
    let no_list = doc! { "created": { "$in": 1 } };
    is(quotes, "no list in a condition", ErrorKind::Server, store.delete_where(no_list).await);
}

pub(super) async fn documents(quotes: &Quotes) {
    let store = mongo().await;
    let id = create(&store).await.id;
    for (what, change) in [
        ("an expiry that is a number", doc! { "$set": { "expires": 7 } }),
        ("no expiry", doc! { "$unset": { "expires": "" } }),
    ] {
        store.collection().update_many(doc! {}, change).await.unwrap();
        quotes.assert_quoted(what, &said_by_the_trait(&store.load(&id).await.unwrap_err()));
    }
}

#[cfg(feature = "encryption")]
pub(super) async fn keys(quotes: &Quotes) {
    use tower_sessions_moka_mongodb_store::{Key, Keys};

    config(quotes, "no key", Key::from_hex(""));
    config(quotes, "a key that is cut", Key::from_base64("c2VjcmV0"));
    let key = |byte| Key::from_bytes(&[byte; 32]);
    let uri = uri();
    let builder = MongoStore::builder;
    for (what, keys, queryable) in [
        ("one id twice", Keys::new(1, key(1)).and_old(1, key(2)), false),
        ("queryable too", Keys::new(1, key(1)), true),
    ] {
        let builder = builder().uri(&uri).encryption(keys).queryable(queryable);
        quotes.of_builder(what, ErrorKind::Config, builder).await;
    }
    let with = async |keys| builder().uri(&uri).encryption(keys).build().await.unwrap();
    let encrypted = create(&with(Keys::new(1, key(1))).await).await;
    let said = async |store: MongoStore, id| said_by_the_trait(&store.load(&id).await.unwrap_err());
    let without = builder().uri(&uri).build().await.unwrap();
    let plain = create(&without).await;
    quotes.assert_quoted("no key any more", &said(without, encrypted.id).await);
    quotes.assert_quoted(
        "the old key is out",
        &said(with(Keys::new(2, key(2))).await, encrypted.id).await,
    );
    quotes.assert_quoted(
        "its id is another's",
        &said(with(Keys::new(1, key(2))).await, encrypted.id).await,
    );
    let picky = with(Keys::new(1, key(1)).require_encrypted()).await;
    quotes.assert_quoted("plain ones are refused", &said(picky, plain.id).await);
}

pub(super) async fn events(quotes: &Quotes) {
    let without = CachedMongoStore::builder(mongo().await).coherence(Coherence::TimeBound);
    config(quotes, "no stream", without.build().await.unwrap().events().await);
    let two = MongoStore::builder().uri(uri()).max_pool_size(2).build().await.unwrap();
    let two = CachedMongoStore::builder(two).build().await.unwrap();
    config(quotes, "a pool of two", two.events().await);
    for (what, code) in [("a standalone server", 40573), ("a user who may not watch", 13)] {
        let proxy = Proxy::start().await;
        let mongo = MongoStore::connect(proxy.uri()).await.unwrap();
        let store = CachedMongoStore::builder(mongo)
            .coherence(Coherence::SoleWriter)
            .build()
            .await
            .unwrap();
        let held = proxy.hold("aggregate");
        held.refuse(code);
        config(quotes, what, store.events().await);
    }
    let proxy = Proxy::start().await;
    let _refusing = proxy.refuse_all("aggregate", 115, "CommandNotSupported", &[]);
    for (what, uri) in [
        ("a server that refuses streams", proxy.uri().to_owned()),
        ("a load balancer", proxy.as_load_balancer()),
    ] {
        let mongo = MongoStore::connect(uri).await.unwrap();
        let store = CachedMongoStore::builder(mongo)
            .coherence(Coherence::SoleWriter)
            .build()
            .await
            .unwrap();
        config(quotes, what, store.events().await);
    }
}
