//! The proxy in front of the test server, as a driver sees it: which replies it holds, and that
//! change streams behave like those of MongoDB.

use std::net::{Ipv4Addr, SocketAddr};

use mongodb::Client;
use mongodb::bson::{Document, doc};
use session_test_proxy::Upstream;
use session_test_server::TestServer;
use tower_sessions_moka_mongodb_store::mongodb;

use crate::proxy::Proxy;

#[tokio::test]
async fn proxy_holds_the_reply_to_the_named_command() {
    let proxy = Proxy::start().await;
    let client = Client::with_uri_str(proxy.uri()).await.unwrap();
    let things = client.default_database().unwrap().collection::<Document>("things");
    let mut held = proxy.hold("insert");
    let inserted = things.clone();
    let insert = tokio::spawn(async move { inserted.insert_one(doc! { "_id": 1 }).await });
    held.reached().await;
    let found = things.find_one(doc! {}).await.unwrap();
    assert_eq!(found, Some(doc! { "_id": 1 }), "carried out before its reply is delivered");
    assert!(!insert.is_finished());
    held.deliver();
    insert.await.unwrap().unwrap();
}

/// The change streams of MongoDB behave like this, and so do those of the test server behind the
/// proxy.
#[tokio::test]
async fn change_stream_behaves_like_mongodbs() {
    if !crate::proxy::is_like_mongodb() {
        return;
    }
    let server = TestServer::builder().fast(true).start().unwrap();
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, server.port().unwrap()));
    let upstream = Upstream::like_mongodb(address).await.unwrap();
    let proxy = Proxy::before(&server, upstream).await;
    let database = Client::with_uri_str(proxy.uri()).await.unwrap().default_database().unwrap();
    let insert = async |collection: &str| {
        let insert = doc! { "insert": collection, "documents": [{}] };
        let reply = database.run_command(insert).await.unwrap();
        reply.get_timestamp("operationTime").unwrap()
    };
    let hello = async || {
        let reply = database.run_command(doc! { "hello": 1 }).await.unwrap();
        assert!(reply.get_bool("isWritablePrimary").unwrap());
        reply.get_timestamp("operationTime").unwrap()
    };
    let more = async |cursor: i64| {
        let more = doc! { "getMore": cursor, "collection": "sessions", "maxTimeMS": 10 };
        read(&database.run_command(more).await.unwrap(), "nextBatch")
    };
    let open = async |stream: Document| {
        let pipeline = [doc! { "$changeStream": stream }];
        let open = doc! { "aggregate": "sessions", "pipeline": pipeline, "cursor": {} };
        let reply = database.run_command(open).await.unwrap();
        (reply.get_document("cursor").unwrap().get_i64("id").unwrap(), read(&reply, "firstBatch"))
    };

    insert("sessions").await;
    let newest = hello().await;
    assert_eq!(hello().await, newest, "a question is no entry of the oplog");
    let (cursor, (events, first)) = open(doc! {}).await;
    assert_eq!(events, [] as [String; 0]);
    assert_eq!(time_of(&first), (newest.time, newest.increment + 1), "one tick in the future");
    for _ in 0..3 {
        assert_eq!(more(cursor).await, (vec![], first.clone()), "nothing else was examined");
    }
    // A change of another collection is examined and not reported.
    insert("others").await;
    let other = hello().await;
    assert!(other > newest);
    let (events, moved) = more(cursor).await;
    assert_eq!(events, [] as [String; 0]);
    let is_first = time_of(&first) == (other.time, other.increment);
    assert!(is_first || time_of(&moved) == (other.time, other.increment), "{first} {moved}");

    insert("sessions").await;
    let change = hello().await;
    let (events, of_event) = more(cursor).await;
    assert_eq!(events, vec![of_event.clone()], "the last event's token is the batch's");
    assert_eq!(time_of(&of_event), (change.time, change.increment));
    assert_eq!(more(cursor).await, (vec![], of_event.clone()));

    // From each resume token, every later change is reported once.
    for (place, reported) in [(&first, 1), (&moved, 1), (&of_event, 0)] {
        let (_, (events, _)) = open(doc! { "resumeAfter": { "_data": place } }).await;
        assert_eq!(events.len(), reported, "after {place}");
    }
}

/// The tokens of the events in a batch, and the token of the batch.
fn read(reply: &Document, batch: &str) -> (Vec<String>, String) {
    let cursor = reply.get_document("cursor").unwrap();
    let token = |token: &Document| token.get_str("_data").unwrap().to_owned();
    let events = cursor.get_array(batch).unwrap();
    let events = events.iter().map(|it| it.as_document().unwrap().get_document("_id").unwrap());
    let events = events.map(token).collect();
    (events, token(cursor.get_document("postBatchResumeToken").unwrap()))
}

/// The seconds and the increment in a resume token of MongoDB.
fn time_of(token: &str) -> (u32, u32) {
    let digits = token.strip_prefix("82").unwrap();
    let part = |range| u32::from_str_radix(&digits[range], 16).unwrap();
    (part(0..8), part(8..16))
}

#[tokio::test]
async fn commands_are_refused_until_the_test_stops_it() {
    let proxy = Proxy::start().await;
    let client = Client::with_uri_str(proxy.uri()).await.unwrap();
    let things = client.default_database().unwrap().collection::<Document>("things");
    let refusing = proxy.refuse_all("find", 13, "Unauthorized", &["SomeLabel"]);
    let error = things.find_one(doc! {}).await.unwrap_err();
    assert!(error.contains_label("SomeLabel"), "{error}");
    assert_eq!(refusing.times(), 1);
    things.insert_one(doc! { "_id": 1 }).await.unwrap();
    drop(refusing);
    assert_eq!(things.find_one(doc! {}).await.unwrap(), Some(doc! { "_id": 1 }));
}

#[tokio::test]
async fn driver_sees_the_server_as_a_load_balancer() {
    let proxy = Proxy::start().await;
    let client = Client::with_uri_str(proxy.as_load_balancer()).await.unwrap();
    let database = client.default_database().unwrap();
    let hello = database.run_command(doc! { "hello": 1 }).await.unwrap();
    assert_eq!(hello.get_str("msg").unwrap(), "isdbgrid");
    // In load-balanced mode, a driver rejects a server whose `hello` has no such id.
    assert!(hello.get_object_id("serviceId").is_ok());
}
