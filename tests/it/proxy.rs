//! A [proxy](session_test_proxy) in front of the server that all tests share.

use std::net::{Ipv4Addr, SocketAddr};
use std::ops::Deref;
use std::sync::OnceLock;

use mongodb::Client;
use mongodb::bson::{Document, doc};
pub(crate) use session_test_proxy::HeldReply;
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
        let port = server_port();
        let database = fresh_database();
        let server = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        let proxy = session_test_proxy::Proxy::start(server).await.unwrap();
        let uri = |port| format!("mongodb://127.0.0.1:{port}/{database}?directConnection=true");
        Self { uri: uri(proxy.port()), direct: uri(port), proxy }
    }

    /// Through the proxy.
    pub(crate) fn uri(&self) -> &str {
        &self.uri
    }

    /// Past it, to the same database.
    pub(crate) fn direct(&self) -> &str {
        &self.direct
    }
}

/// The shared server if it is on loopback and without TLS, or else one of our own.
fn server_port() -> u16 {
    static OWN: OnceLock<TestServer> = OnceLock::new();
    let shared = shared().expect("a server to test on").port();
    shared.or_else(|| OWN.get_or_init(|| TestServer::builder().start().unwrap()).port()).unwrap()
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
