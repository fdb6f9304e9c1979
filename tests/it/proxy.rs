//! [Proxies](session_test_proxy) in front of the server that all tests share, which make its change streams
//! look like MongoDB's.
//!
//! All tests reach the server through the one of [`uri`], unless they ask for the server itself. A test
//! that holds replies or puts errors in has a [`Proxy`] of its own.

use std::future::pending;
use std::io;
use std::net::SocketAddr;
use std::ops::Deref;
use std::sync::{OnceLock, mpsc};
use std::thread;

use mongodb::Client;
use mongodb::bson::{Document, doc};
pub(crate) use session_test_proxy::HeldReply;
use session_test_proxy::{Injected, Injection, Lasts, Location, Role, ServerError, Upstream};
use session_test_server::{TestServer, fresh_database, shared};
use tower_sessions_moka_mongodb_store::mongodb;

/// A proxy, and a database behind it that no other test uses.
pub(crate) struct Proxy {
    proxy: session_test_proxy::Proxy,
    uri: String,
    direct: String,
}

impl Deref for Proxy {
    type Target = session_test_proxy::Proxy;

    fn deref(&self) -> &session_test_proxy::Proxy {
        &self.proxy
    }
}

impl Proxy {
    pub(crate) async fn start() -> Self {
        Self::before(server(), front().upstream.clone()).await
    }

    /// In front of a server of the test's own.
    pub(crate) async fn before(server: &TestServer, upstream: Upstream) -> Self {
        let direct = server.uri_for(&fresh_database());
        let proxy = session_test_proxy::Proxy::start(upstream).await.unwrap();
        let uri = Location::of(&direct).unwrap().through(proxy.port());
        Self { proxy, uri, direct }
    }

    /// Through the proxy.
    pub(crate) fn uri(&self) -> &str {
        &self.uri
    }

    /// Past it, to the same database.
    pub(crate) fn direct(&self) -> &str {
        &self.direct
    }

    /// Has the server refuse every command of this name, until the answer is dropped.
    pub(crate) fn refuse_all(
        &self,
        command: &'static str,
        code: i32,
        name: &str,
        labels: &[&str],
    ) -> Refusing {
        let error = ServerError::new(code).with_name(name).with_labels(labels.iter().copied());
        Refusing(self.inject(command, Injection::Refuse(error), Lasts::UntilStopped))
    }

    /// Has the server introduce itself as a load balancer from now on. The connection string for it.
    pub(crate) fn as_load_balancer(&self) -> String {
        self.introduce_as(Role::LoadBalancer);
        self.uri.replace("directConnection=true", "loadBalanced=true")
    }
}

/// Commands are refused as long as this is kept.
pub(crate) struct Refusing(Injected);

impl Refusing {
    /// How many have been refused.
    pub(crate) fn times(&self) -> u32 {
        self.0.count()
    }
}

impl Drop for Refusing {
    fn drop(&mut self) {
        self.0.stop();
    }
}

/// A connection string with a database of its own, on the server that all tests of this process share:
/// through a proxy, or to the server itself where no proxy can stand in front of it.
pub(crate) fn uri() -> String {
    let uri = shared().expect("a server to test on").uri_for(&fresh_database());
    match reachable(&uri) {
        Some((location, _)) => location.through(front().proxy.port()),
        None => uri,
    }
}

/// The address of a server on loopback and without TLS, if the driver asks no other member of its set.
fn reachable(uri: &str) -> Option<(Location, SocketAddr)> {
    let location = Location::of(uri).ok()?;
    let address = location.address().ok()?;
    let alone = uri.contains("directConnection=true");
    (alone && address.ip().is_loopback()).then_some((location, address))
}

/// The shared server if a proxy can stand in front of it, or else one of our own.
fn server() -> &'static TestServer {
    static OWN: OnceLock<TestServer> = OnceLock::new();

    let shared = shared().expect("a server to test on");
    if reachable(shared.uri()).is_some() {
        return shared;
    }
    OWN.get_or_init(|| TestServer::builder().start().unwrap())
}

/// What every test of this process goes through.
struct Front {
    upstream: Upstream,
    proxy: session_test_proxy::Proxy,
}

/// It runs on a thread of its own: each test has a runtime that ends with the test.
fn front() -> &'static Front {
    static FRONT: OnceLock<Front> = OnceLock::new();

    FRONT.get_or_init(|| {
        let (_, address) = reachable(server().uri()).expect("it is on loopback");
        let (tell, told) = mpsc::channel();
        let serve = move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            runtime.unwrap().block_on(async {
                let _ = tell.send(start(address).await);
                pending::<()>().await;
            });
        };
        thread::Builder::new().name("proxy".to_owned()).spawn(serve).unwrap();
        told.recv().unwrap().unwrap()
    })
}

async fn start(address: SocketAddr) -> io::Result<Front> {
    let upstream = Upstream::like_mongodb(address).await?;
    let proxy = session_test_proxy::Proxy::start(upstream.clone()).await?;
    Ok(Front { upstream, proxy })
}

#[tokio::test]
async fn the_proxy_holds_the_reply_it_is_told_to_hold() {
    let proxy = Proxy::start().await;
    let client = Client::with_uri_str(proxy.uri()).await.unwrap();
    let things = client.default_database().unwrap().collection::<Document>("things");
    let mut held = proxy.hold("insert");
    let inserted = things.clone();
    let insert = tokio::spawn(async move { inserted.insert_one(doc! { "_id": 1 }).await });
    held.reached().await;
    let found = things.find_one(doc! {}).await.unwrap();
    assert_eq!(found, Some(doc! { "_id": 1 }), "done, and nobody knows");
    assert!(!insert.is_finished());
    held.deliver();
    insert.await.unwrap().unwrap();
}

/// What MongoDB's change streams do, and through the proxy the test server's.
#[tokio::test]
async fn a_change_stream_behaves_as_mongodbs() {
    let server = TestServer::builder().start().unwrap();
    let (_, address) = reachable(server.uri()).unwrap();
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
    assert_eq!(events, [of_event.clone()], "the last event's token is the batch's");
    assert_eq!(time_of(&of_event), (change.time, change.increment));
    assert_eq!(more(cursor).await, (vec![], of_event.clone()));

    // From each place, all that came after it is reported, once.
    for (place, reported) in [(&first, 1), (&moved, 1), (&of_event, 0)] {
        let (_, (events, _)) = open(doc! { "resumeAfter": { "_data": place } }).await;
        assert_eq!(events.len(), reported, "after {place}");
    }
}

/// The tokens of a batch's events, and its own.
fn read(reply: &Document, batch: &str) -> (Vec<String>, String) {
    let cursor = reply.get_document("cursor").unwrap();
    let token = |token: &Document| token.get_str("_data").unwrap().to_owned();
    let events = cursor.get_array(batch).unwrap();
    let events = events.iter().map(|it| it.as_document().unwrap().get_document("_id").unwrap());
    let events = events.map(token).collect();
    (events, token(cursor.get_document("postBatchResumeToken").unwrap()))
}

/// The seconds and the increment in a token of MongoDB's.
fn time_of(token: &str) -> (u32, u32) {
    let digits = token.strip_prefix("82").unwrap();
    let part = |range| u32::from_str_radix(&digits[range], 16).unwrap();
    (part(0..8), part(8..16))
}
