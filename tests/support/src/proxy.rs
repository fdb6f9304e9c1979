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

pub use session_test_proxy::HeldReply;
use session_test_proxy::{Injected, Injection, Lasts, Location, Role, ServerError, Upstream};
use session_test_server::{Kind, TestServer, fresh_database, shared_fast};

/// A proxy, and a database behind it that no other test uses.
pub struct Proxy {
    inner: session_test_proxy::Proxy,
    uri: String,
    direct: String,
}

impl Deref for Proxy {
    type Target = session_test_proxy::Proxy;

    fn deref(&self) -> &session_test_proxy::Proxy {
        &self.inner
    }
}

impl Proxy {
    pub async fn start() -> Self {
        Self::before(server(), front().upstream.clone()).await
    }

    /// In front of a server of the test's own.
    pub async fn before(server: &TestServer, upstream: Upstream) -> Self {
        let direct = server.uri_for(&fresh_database());
        let inner = session_test_proxy::Proxy::start(upstream).await.unwrap();
        let uri = Location::of(&direct).unwrap().through(inner.port());
        Self { inner, uri, direct }
    }

    /// Through the proxy.
    pub fn uri(&self) -> &str {
        &self.uri
    }

    /// Past it, to the same database.
    pub fn direct(&self) -> &str {
        &self.direct
    }

    /// Has the server refuse every command of this name, until the answer is dropped.
    pub fn refuse_all(
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
    pub fn as_load_balancer(&self) -> String {
        self.introduce_as(Role::LoadBalancer);
        self.uri.replace("directConnection=true", "loadBalanced=true")
    }
}

/// Commands are refused as long as this is kept.
pub struct Refusing(Injected);

impl Refusing {
    /// How many have been refused.
    pub fn times(&self) -> u32 {
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
pub fn uri() -> String {
    let uri = shared_fast().expect("a server to test on").uri_for(&fresh_database());
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

    let shared = shared_fast().expect("a server to test on");
    if reachable(shared.uri()).is_some() {
        return shared;
    }
    OWN.get_or_init(|| TestServer::builder().fast(true).start().unwrap())
}

/// Whether change streams behave as MongoDB's in these tests. The server in Python is too slow for that: it
/// stands where neither `cmake` nor another server is.
pub fn is_like_mongodb() -> bool {
    server().kind() != Some(Kind::SecantusPy)
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
    // The likeness follows every change on the server, for which the server in Python is too slow.
    let upstream = if is_like_mongodb() {
        Upstream::like_mongodb(address).await?
    } else {
        Upstream::from(address)
    };
    let proxy = session_test_proxy::Proxy::start(upstream.clone()).await?;
    Ok(Front { upstream, proxy })
}
