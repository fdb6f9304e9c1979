//! The watermark: the point up to which a cache is known to have received all changes, by the times
//! in MongoDB's resume tokens.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use mongodb::Client;
use mongodb::bson::{Document, Timestamp};
use mongodb::event::EventHandler;
use mongodb::event::command::CommandEvent;
use mongodb::options::ClientOptions;
use session_test_proxy::Upstream;
use session_test_server::TestServer;
use tower_sessions::SessionStore;
use tower_sessions::session::Record;
use tower_sessions_moka_mongodb_store::{CachedMongoStore, MongoStore, mongodb};

use super::{instance, load};
use crate::common::{Commands, create, eventually, uri};
use crate::proxy::Proxy;

/// The replies to a client, which contain the server's times.
#[derive(Clone, Default)]
struct Replies(Arc<Mutex<Vec<(String, Document)>>>);

impl Replies {
    async fn client(&self, uri: &str) -> Client {
        let mut options = ClientOptions::parse(uri).await.unwrap();
        let replies = self.clone();
        options.command_event_handler = Some(EventHandler::callback(move |event| {
            if let CommandEvent::Succeeded(event) = event {
                replies.0.lock().unwrap().push((event.command_name, event.reply));
            }
        }));
        Client::with_options(options).unwrap()
    }

    /// What `read` returns for the last reply to this command for which it returns something.
    fn last<T>(&self, command: &str, tells: impl Fn(&Document) -> Option<T>) -> Option<T> {
        let replies = self.0.lock().unwrap();
        replies.iter().filter(|(name, _)| name == command).rev().find_map(|(_, it)| tells(it))
    }

    /// The token of the last batch of a change stream.
    fn token(&self, command: &str) -> Option<String> {
        self.last(command, |reply| {
            let token = reply.get_document("cursor").ok()?.get_document("postBatchResumeToken");
            Some(token.ok()?.get_str("_data").ok()?.to_owned())
        })
    }

    /// The time of the newest oplog entry, from the last reply to an application's `hello`.
    fn applied(&self) -> Option<Timestamp> {
        self.last("hello", |reply| reply.get_timestamp("operationTime").ok())
    }
}

/// The beginning of a resume token of this time.
fn begins(time: Timestamp) -> String {
    format!("82{:08X}{:08X}", time.time, time.increment)
}

#[tokio::test]
async fn unchanged_session_is_read_once_while_the_lease_is_renewed() {
    const BOUND: Duration = Duration::from_millis(300);

    let uri = uri();
    let commands = Commands::default();
    let mongo = commands.mongo(&uri).await;
    let store = CachedMongoStore::builder(mongo).max_staleness(BOUND).build().await.unwrap();
    let record = create(&instance(&uri).await).await;
    let mut finds = 0;
    let mut read = Instant::now();
    eventually("a session is served long after it was read", async || {
        assert_eq!(load(&store, &record).await.unwrap().data, record.data);
        if commands.sent("find") > finds {
            finds = commands.sent("find");
            read = Instant::now();
        }
        read.elapsed() > 8 * BOUND
    })
    .await;
}

#[tokio::test]
async fn tests_of_this_process_see_tokens_of_mongodb() {
    if !crate::proxy::is_like_mongodb() {
        return;
    }
    let uri = uri();
    let replies = Replies::default();
    let mongo = MongoStore::builder().client(replies.client(&uri).await).build().await.unwrap();
    let store = CachedMongoStore::builder(mongo).build().await.unwrap();
    create(&store).await;
    let token = replies.token("aggregate").unwrap();
    assert!(token.starts_with("82") && token.len() > 18, "{token}");
    eventually("the token moves", async || {
        let moved = replies.token("getMore");
        moved.is_some_and(|moved| moved.starts_with("82") && moved > token)
    })
    .await;
}

// T is the time of the newest entry when the stream is opened. Another instance deletes a session
// at the next time, T + 1.
//
// | the stream                                | the other instance | the checkpoints
// |
// |-------------------------------------------|--------------------|--------------------------------|
// | opened at T: its token is of T + 1        |                    |
// |
// | getMore: empty, token T + 1, reply held   |                    |
// |
// |                                           | delete at T + 1    |
// |
// |                                           |                    | requested: T + 1 is the newest
// |
// | the reply arrives                         |                    |
// |
// | stalls                                    |                    |
// |
//
// The token is of T + 1, but the server has examined nothing of that time: the reply is older than
// the delete. If the cache took the token as a proof, it would renew the lease up to the moment at
// which the checkpoint was requested. Then it would serve the deleted session for another
// `max_staleness`.
#[tokio::test]
async fn first_token_of_a_stream_proves_nothing_at_its_own_time() {
    const BOUND: Duration = Duration::from_secs(2);
    /// The clock's seconds and new connections can separate the two times.
    const ATTEMPTS: u32 = 30;
    /// The number of checkpoints. A checkpoint is requested every tenth of the bound.
    const CHECKPOINTS: u32 = 6;

    if !crate::proxy::is_like_mongodb() {
        return;
    }
    // A server without writes of other tests.
    let server = TestServer::builder().fast(true).start().unwrap();
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, server.port().unwrap()));
    let upstream = Upstream::like_mongodb(address).await.unwrap();
    let proxy = Proxy::before(&server, upstream).await;
    let one = MongoStore::connect(proxy.uri()).await.unwrap();
    let replies = Replies::default();
    let client = replies.client(proxy.uri()).await;
    let mongo = MongoStore::builder().client(client).build().await.unwrap();
    for _ in 0..ATTEMPTS {
        let record = create(&one).await;
        let mut batch = proxy.hold("getMore");
        let builder = CachedMongoStore::builder(mongo.clone()).max_staleness(BOUND);
        let store = builder.build().await.unwrap();
        assert!(load(&store, &record).await.is_some(), "it is cached from here on");
        batch.reached().await;
        one.delete(&record.id).await.unwrap();
        let deleted = Instant::now();
        for _ in 0..CHECKPOINTS {
            let mut checkpoint = proxy.hold("hello");
            checkpoint.reached().await;
            checkpoint.deliver();
        }
        let stalled = proxy.hold("getMore");
        batch.deliver();
        let opened = replies.token("aggregate").unwrap();
        let newest = replies.applied().unwrap();
        if opened.starts_with(&begins(newest)) {
            served_no_longer_than(BOUND, deleted, &store, &record).await;
            return;
        }
        drop(stalled);
    }
    panic!("in {ATTEMPTS} attempts, nothing was deleted in the tick after the newest entry");
}

async fn served_no_longer_than(
    bound: Duration,
    deleted: Instant,
    store: &CachedMongoStore,
    record: &Record,
) {
    loop {
        let begun = deleted.elapsed();
        match SessionStore::load(store, &record.id).await.unwrap() {
            Some(_) => assert!(begun <= bound, "served {begun:?} after the log-out"),
            None => return,
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}
