//! [Proxies](session_test_proxy) in front of the server that all tests share. They make its change
//! streams look like MongoDB's.
//!
//! All tests reach the server through the proxy of [`uri`], unless they use the server directly. A
//! test that holds replies or injects errors has its own [`Proxy`].

use std::future::pending;
use std::io;
use std::net::SocketAddr;
use std::ops::Deref;
use std::sync::{OnceLock, mpsc};
use std::thread;

pub use session_test_proxy::HeldReply;
use session_test_proxy::{Injected, Injection, Lasts, Location, Role, ServerError, Upstream};
use session_test_server::{Kind, TestServer, fresh_database, shared_fast, with_option};

/// How often the driver checks the server behind [`Proxy::start`], in milliseconds: the least that it
/// accepts. By default it is 10 s, and after an error of the server a test would wait for that.
const HEARTBEAT: &str = "500";

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
        let proxy = Self::before(server(), front().upstream.clone()).await;
        let uri = with_option(&proxy.uri, "heartbeatFrequencyMS", HEARTBEAT);
        Self { uri, ..proxy }
    }

    /// A proxy in front of the test's own server. The driver checks the server at its default
    /// interval, so a test can count or hold the `hello`s of the store.
    pub async fn before(server: &TestServer, upstream: Upstream) -> Self {
        let direct = server.uri_for(&fresh_database());
        let inner = session_test_proxy::Proxy::start(upstream).await.unwrap();
        let uri = Location::of(&direct).unwrap().through(inner.port());
        Self { inner, uri, direct }
    }

    /// The connection string that leads through the proxy.
    pub fn uri(&self) -> &str {
        &self.uri
    }

    /// The connection string that bypasses the proxy, with the same database.
    pub fn direct(&self) -> &str {
        &self.direct
    }

    /// Makes the server refuse every command of this name, until the result is dropped.
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

    /// Makes the server act as a load balancer from now on. Returns the connection string for that.
    pub fn as_load_balancer(&self) -> String {
        self.introduce_as(Role::LoadBalancer);
        self.uri.replace("directConnection=true", "loadBalanced=true")
    }
}

/// Commands are refused until this is dropped.
pub struct Refusing(Injected);

impl Refusing {
    /// The number of refused commands.
    pub fn times(&self) -> u32 {
        self.0.count()
    }
}

impl Drop for Refusing {
    fn drop(&mut self) {
        self.0.stop();
    }
}

/// A connection string with a new database, on the server that all tests of this process share. It
/// leads through a proxy, or to the server itself if no proxy can stand in front of it.
pub fn uri() -> String {
    let uri = shared_fast().expect("a server to test on").uri_for(&fresh_database());
    match reachable(&uri) {
        Some((location, _)) => location.through(front().proxy.port()),
        None => uri,
    }
}

/// The address of a server on loopback without TLS, if the driver contacts no other member of its
/// set.
fn reachable(uri: &str) -> Option<(Location, SocketAddr)> {
    let location = Location::of(uri).ok()?;
    let address = location.address().ok()?;
    let alone = uri.contains("directConnection=true");
    (alone && address.ip().is_loopback()).then_some((location, address))
}

/// The shared server if a proxy can stand in front of it, else a server of our own.
fn server() -> &'static TestServer {
    static OWN: OnceLock<TestServer> = OnceLock::new();

    let shared = shared_fast().expect("a server to test on");
    if reachable(shared.uri()).is_some() {
        return shared;
    }
    OWN.get_or_init(|| TestServer::builder().fast(true).start().unwrap())
}

/// Whether change streams behave like MongoDB's in these tests. The Python server is too slow for
/// that. It is used where neither `cmake` nor another server is installed.
pub fn is_like_mongodb() -> bool {
    server().kind() != Some(Kind::SecantusPy)
}

/// The proxy that every test of this process uses.
struct Front {
    upstream: Upstream,
    proxy: session_test_proxy::Proxy,
}

/// It runs on a thread of its own: each test has a runtime that ends with the test.
fn front() -> &'static Front {
    static FRONT: OnceLock<Front> = OnceLock::new();

    FRONT.get_or_init(|| {
        let (_, address) = reachable(server().uri()).expect("it is on loopback");
        let (report, reported) = mpsc::channel();
        let serve = move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            runtime.unwrap().block_on(async {
                let _ = report.send(start(address).await);
                pending::<()>().await;
            });
        };
        thread::Builder::new().name("proxy".to_owned()).spawn(serve).unwrap();
        reported.recv().unwrap().unwrap()
    })
}

async fn start(address: SocketAddr) -> io::Result<Front> {
    // The likeness follows every change on the server. The Python server is too slow for that.
    let upstream = if is_like_mongodb() {
        Upstream::like_mongodb(address).await?
    } else {
        Upstream::from(address)
    };
    let proxy = session_test_proxy::Proxy::start(upstream.clone()).await?;
    Ok(Front { upstream, proxy })
}
