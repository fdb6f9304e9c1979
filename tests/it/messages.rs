//! The guide's page on troubleshooting quotes each error message and each warning of the source,
//! and quotes nothing else. The tests provoke each message that a server can provoke, and compare
//! it with its quote.

mod calls;
mod source;

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener};
use std::process::Command;
use std::time::Duration;

use mongodb::Client;
use mongodb::bson::{Document, doc};
use session_test_server::{PASSWORD, TestServer, USER, fresh_database};
use tower_sessions::SessionStore;
use tower_sessions_moka_mongodb_store::{
    CachedMongoStore, Coherence, ErrorKind, MongoStore, MongoStoreBuilder, Result, mongodb,
};

use crate::common::{Log, create, mongo, record, uri};
use crate::proxy::Proxy;

const GUIDE: &str = include_str!("../../src/guide/troubleshooting.md");

/// The timeout for servers that never answer. Long enough for a server on loopback.
const SOON: Duration = Duration::from_millis(500);

/// The quotes of the guide: its `text` blocks, with `…` in place of the parts that differ.
struct Quotes {
    all: Vec<String>,
    said: RefCell<BTreeSet<usize>>,
}

impl Quotes {
    fn of(guide: &str) -> Self {
        let blocks = guide.split("```text\n").skip(1);
        let all = blocks.map(|block| in_one_line(block.split("```").next().unwrap())).collect();
        Self { all, said: RefCell::default() }
    }

    /// Asserts that the message is quoted. If two quotes fit, the longer one is marked as shown.
    #[track_caller]
    fn assert_quoted(&self, what: &str, message: &str) {
        let message = in_one_line(message);
        let fitting = (0..self.all.len()).filter(|at| fits(&self.all[*at], &message));
        let Some(quote) = fitting.max_by_key(|at| self.all[*at].len()) else {
            panic!("{what}: the guide does not quote\n{message}");
        };
        self.said.borrow_mut().insert(quote);
    }

    /// Asserts that one of the lines is quoted. Its time, level and module are skipped.
    #[track_caller]
    fn assert_one_is_quoted(&self, what: &str, lines: &str) {
        let fits = |quote| lines.lines().any(|line| fits(&format!("… {quote}"), line));
        let fitting: Vec<_> = (0..self.all.len()).filter(|at| fits(&self.all[*at])).collect();
        assert!(!fitting.is_empty(), "{what}: the guide quotes nothing of\n{lines}");
        self.said.borrow_mut().extend(fitting);
    }

    /// Marks the quotes that contain `part` as shown: this server cannot provoke them.
    fn leave_out(&self, part: &str) {
        let found = (0..self.all.len()).filter(|at| self.all[*at].contains(part));
        self.said.borrow_mut().extend(found);
    }

    fn assert_all_said(&self) {
        let said = self.said.borrow();
        let in_source = source::messages();
        let is_in_source = |quote| in_source.iter().any(|(_, message)| are_alike(quote, message));
        let never = self.all.iter().enumerate().filter(|(at, _)| !said.contains(at));
        let never: Vec<_> = never.filter(|(_, quote)| !is_in_source(quote)).collect();
        assert!(never.is_empty(), "quoted, and never said: {never:#?}");
    }

    async fn of_builder(&self, what: &str, kind: ErrorKind, builder: MongoStoreBuilder) {
        match builder.build().await {
            Ok(_) => panic!("{what}: it was built"),
            Err(error) => {
                assert_eq!(error.kind(), kind, "{what}: {error}");
                self.assert_quoted(what, &error.to_string());
                // `main` prints this if it returns the error.
                assert_eq!(format!("{error:?}"), format!("{kind:?}: {error}"));
            }
        }
    }
}

/// Whether one fits the other: either may have `…` where the other one has words.
fn are_alike(quote: &str, message: &str) -> bool {
    fits(quote, message) || fits(message, quote)
}

fn in_one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// Whether the message is the quote, with anything in place of each `…`.
fn fits(quote: &str, message: &str) -> bool {
    let mut parts: Vec<_> = quote.split('…').collect();
    let last = parts.pop().unwrap_or_default();
    let mut rest = message;
    for (index, part) in parts.iter().enumerate() {
        match rest.find(part) {
            Some(at) if index > 0 || at == 0 => rest = &rest[at + part.len()..],
            _ => return false,
        }
    }
    if parts.is_empty() { rest == last } else { rest.ends_with(last) }
}

#[test]
fn ellipsis_in_a_quote_matches_any_text() {
    assert!(fits("a … c", "a b c") && fits("a …", "a b") && fits("… b", "a b") && fits("a", "a"));
    assert!(
        !fits("a … c", "a b d") && !fits("a", "a b") && !fits("b", "a b") && !fits("b …", "a b c")
    );
}

#[test]
fn each_message_in_the_source_has_an_entry() {
    let quotes = Quotes::of(GUIDE);
    let messages = source::messages();
    assert!(messages.len() > 100, "{messages:#?}");
    let is_quoted = |message: &str| quotes.all.iter().any(|quote| are_alike(quote, message));
    let missing: Vec<_> = messages.iter().filter(|(_, message)| !is_quoted(message)).collect();
    assert!(missing.is_empty(), "the guide does not quote {missing:#?}");
}

#[tokio::test]
async fn guide_quotes_exactly_the_messages_that_occur() {
    let quotes = Quotes::of(GUIDE);
    uris(&quotes).await;
    servers(&quotes).await;
    versions(&quotes).await;
    certificates(&quotes).await;
    users(&quotes).await;
    indexes(&quotes).await;
    runtimes(&quotes);
    options(&quotes).await;
    calls::owners(&quotes).await;
    Box::pin(calls::filters(&quotes)).await;
    calls::documents(&quotes).await;
    #[cfg(feature = "encryption")]
    calls::keys(&quotes).await;
    calls::events(&quotes).await;
    while_it_runs(&quotes).await;
    #[cfg(unix)]
    examples(&quotes);
    // The messages about keys can be shown only with the feature for encryption.
    if cfg!(feature = "encryption") {
        quotes.assert_all_said();
    }
}

async fn uris(quotes: &Quotes) {
    for uri in [
        "",
        "localhost/app",
        "localhost:27017",
        "http://localhost",
        "mongodb:/localhost",
        "'mongodb://localhost/app'",
        "mongodb://",
        "mongodb:///app",
        "mongodb://user:p@ss@localhost/app",
        "mongodb://user:p/ss@localhost/app",
        "mongodb://localhost:99999/app",
        "mongodb://localhost/my app",
        "mongodb+srv://cluster.example.invalid:27017/app",
        "mongodb://first,mongodb://second/app",
        "mongodb://localhost/a/b/c",
        "mongodb://localhost/app?retryWritess=true",
        "mongodb://localhost/app?maxPoolSize=many",
        "mongodb://localhost/app?maxPoolSize",
        "mongodb://localhost/app?compressors=zlib",
        "mongodb://localhost/app?authMechanism=GSSAPI",
        "mongodb://localhost/app?socketTimeoutMS=30000",
        "mongodb://a,b/app?directConnection=true",
        "mongodb://user:pass@localhost/admin",
        "mongodb://localhost/app?maxPoolSize=5&",
        "mongodb://localhost/app?&maxPoolSize=5",
        "mongodb://my host/app",
        "mongodb://user:pa\nss@localhost/app",
        "mongodb://localhost/app?poolSize=5",
        "mongodb://localhost/app?authMechanism=MONGODB-OIDC&authMechanismProperties=ENVIRONMENT:x",
        "mongodb://localhost/app?tlsCAFile=/no/such/file.pem",
        "mongodb://localhost/%zz",
    ] {
        quotes.of_builder(uri, ErrorKind::Config, MongoStore::builder().uri(uri)).await;
    }
    for uri in
        ["mongodb+srv://cluster.invalid/app", "mongodb+srv://u:p@cluster.no-such.invalid/app"]
    {
        quotes.of_builder(uri, ErrorKind::Connection, MongoStore::builder().uri(uri)).await;
    }
    // The unit tests in `src/mongo/connect` provoke this message: a test cannot choose the driver's
    // name server.
    quotes.assert_quoted(
        "a silent name server",
        "the host of the mongodb+srv:// URI was not resolved, since no name server answered within \
         5s: does DNS work here, and are its name servers reachable?",
    );
    for value in [None, Some(""), Some(" ")] {
        quotes.assert_quoted("MONGODB_URI", &in_a_child("app", value));
    }
}

const CHILD: &str = "SESSION_STORE_MESSAGES_CHILD";

/// A process with threads must not change its environment, so the test runs itself as a child
/// process.
fn in_a_child(role: &str, value: Option<&str>) -> String {
    let mut child = Command::new(std::env::current_exe().unwrap());
    child.args(["--exact", "messages::child_process", "--nocapture"]);
    child.env(CHILD, role).env_remove("MONGODB_URI");
    if let Some(value) = value {
        child.env("MONGODB_URI", value);
    }
    let output = String::from_utf8(child.output().unwrap().stdout).unwrap();
    let (_, said) = output.split_once("said: ").expect("the child has said it");
    said.lines().next().unwrap().to_owned()
}

#[tokio::test]
async fn child_process() {
    match std::env::var(CHILD).as_deref() {
        Ok("app") => println!("\nsaid: {}", MongoStore::from_env().await.unwrap_err()),
        // Print the error as `unwrap` would.
        Ok("tests") => println!("\nsaid: {:?}", session_test_server::shared_fast().unwrap_err()),
        _ => {}
    }
}

/// A port that answers everything with `answer`. If `answer` is empty, it closes the connection.
fn stranger(answer: &'static [u8]) -> u16 {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    std::thread::spawn(move || {
        for client in listener.incoming() {
            let mut client = client.unwrap();
            let _ = client.read(&mut [0; 1024]);
            let _ = client.write_all(answer);
        }
    });
    port
}

async fn servers(quotes: &Quotes) {
    let builder = || MongoStore::builder().operation_timeout(SOON);
    let mute = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    for (what, builder) in [
        ("nobody listens", builder().port(1)),
        ("no such host", builder().host("no-such-host.invalid")),
        ("nothing is said", builder().port(mute.local_addr().unwrap().port())),
        ("it hangs up", builder().port(stranger(b""))),
        ("a web server", builder().port(stranger(b"HTTP/1.1 400 Bad Request\r\n\r\n"))),
    ] {
        quotes.of_builder(what, ErrorKind::Connection, builder).await;
    }
}

async fn versions(quotes: &Quotes) {
    let old = MongoStore::builder().uri(crate::build::old_server().await);
    quotes.of_builder("an old version", ErrorKind::Server, old).await;
    let proxy = Proxy::start().await;
    proxy.hold("update").refuse(304);
    let partly = MongoStore::builder().uri(proxy.uri());
    quotes.of_builder("compatible in part", ErrorKind::Server, partly).await;
}

async fn certificates(quotes: &Quotes) {
    let folder = tempfile::tempdir().unwrap();
    crate::credentials::certificates(folder.path());
    let file = |name| folder.path().join(name);
    let server =
        TestServer::builder().fast(true).tls(file("server.pem"), file("key.pem")).start().unwrap();
    let builder = || MongoStore::builder().port(server.port().unwrap()).operation_timeout(SOON);
    quotes.of_builder("TLS there alone", ErrorKind::Connection, builder()).await;
    quotes.of_builder("its authority", ErrorKind::Connection, builder().tls(true)).await;
}

async fn users(quotes: &Quotes) {
    let server = TestServer::builder().fast(true).auth(true).start().unwrap();
    let database = fresh_database();
    let uri = server.uri_for(&database);
    let own = uri.replace("&authSource=admin", "");
    let credentials = format!("{USER}:{PASSWORD}@");
    let builder = |from: &str, to: &str| MongoStore::builder().uri(own.replace(from, to));
    for (what, builder) in [
        ("wrong password", MongoStore::builder().uri(uri.replace(PASSWORD, "guessed"))),
        ("unknown user", MongoStore::builder().uri(uri.replace(USER, "nobody"))),
        ("known to another database", builder("", "")),
    ] {
        quotes.of_builder(what, ErrorKind::Authentication, builder).await;
    }
    let here = || MongoStore::builder().port(server.port().unwrap()).operation_timeout(SOON);
    for (what, builder) in
        [("TLS here alone", here().tls(true)), ("another set", here().replica_set("other"))]
    {
        quotes.of_builder(what, ErrorKind::Connection, builder).await;
    }
    let known = Client::with_uri_str(&uri).await.unwrap().database(&database);
    for (user, roles) in [("nothing", vec![]), ("reader", vec!["read"])] {
        let user = doc! { "createUser": user, "pwd": "pw", "roles": roles };
        known.run_command(user).await.unwrap();
    }
    for (what, user) in [
        ("without a user", ""),
        ("a user without any right", "nothing:pw@"),
        ("a user who only reads", "reader:pw@"),
    ] {
        quotes.of_builder(what, ErrorKind::Permission, builder(&credentials, user)).await;
    }
}

async fn indexes(quotes: &Quotes) {
    for options in [
        doc! { "expireAfterSeconds": 60 },
        doc! {},
        doc! { "expireAfterSeconds": 0, "sparse": true },
    ] {
        let client = Client::with_uri_str(uri()).await.unwrap();
        let mut index = doc! { "key": { "expires": 1 }, "name": "theirs" };
        index.extend(options.clone());
        let create = doc! { "createIndexes": "sessions", "indexes": [index] };
        client.default_database().unwrap().run_command(create).await.unwrap();
        let builder = MongoStore::builder().client(client);
        quotes.of_builder(&options.to_string(), ErrorKind::Index, builder).await;
    }
    let client = Client::with_uri_str(uri()).await.unwrap();
    let index = doc! { "key": { "other": 1 }, "name": "expires_1" };
    let create = doc! { "createIndexes": "sessions", "indexes": [index] };
    client.default_database().unwrap().run_command(create).await.unwrap();
    let builder = MongoStore::builder().client(client);
    quotes.of_builder("the name is taken", ErrorKind::Index, builder).await;
}

fn runtimes(quotes: &Quotes) {
    let connect = || MongoStore::connect("mongodb://127.0.0.1:1/app");
    let said = |error: Result<MongoStore>| {
        let error = error.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Config);
        error.to_string()
    };
    // Threads of their own, which are not in this test's runtime.
    let none = std::thread::spawn(move || said(futures::executor::block_on(connect())));
    quotes.assert_quoted("no runtime", &none.join().unwrap());
    for what in ["no timer", "no I/O"] {
        let poor = std::thread::spawn(move || {
            let mut runtime = tokio::runtime::Builder::new_current_thread();
            if what == "no timer" {
                runtime.enable_io()
            } else {
                runtime.enable_time()
            };
            said(runtime.build().unwrap().block_on(connect()))
        });
        quotes.assert_quoted(what, &poor.join().unwrap());
    }
}

async fn options(quotes: &Quotes) {
    let builder = MongoStore::builder().uri("mongodb://localhost/app?appName=a").app_name("b");
    quotes.of_builder("contradictions", ErrorKind::Config, builder).await;
    let builder = MongoStore::builder().username("u").password("p\n");
    quotes.of_builder("a password from a file", ErrorKind::Config, builder).await;
    let builder = MongoStore::builder().username("u").password("\u{feff}p");
    quotes.of_builder("a password from Windows", ErrorKind::Config, builder).await;
    let builder = MongoStore::builder().host("a,b");
    quotes.of_builder("two hosts in one", ErrorKind::Config, builder).await;
    let builder = MongoStore::builder().collection("system.users");
    quotes.of_builder("a name of the server", ErrorKind::Config, builder).await;
    let one = MongoStore::builder().uri(uri()).max_pool_size(1).build().await.unwrap();
    let error = CachedMongoStore::builder(one).build().await.unwrap_err();
    quotes.assert_quoted("a pool of one", &error.to_string());
}

async fn while_it_runs(quotes: &Quotes) {
    let log = Log::default();
    let _logs = tracing::subscriber::set_default(log.subscriber());
    for (what, code) in [("a standalone server", 40573), ("a user who may not watch", 13)] {
        let proxy = Proxy::start().await;
        let mongo = MongoStore::connect(proxy.uri()).await.unwrap();
        let held = proxy.hold("aggregate");
        let builds = CachedMongoStore::builder(mongo).build();
        held.refuse(code);
        builds.await.unwrap();
        quotes.assert_one_is_quoted(what, &log.take());
    }
    let proxy = Proxy::start().await;
    proxy.hold("update").refuse(14031);
    MongoStore::connect(proxy.uri()).await.unwrap();
    quotes.assert_one_is_quoted("a full disk", &log.take());
    let own = uri();
    let and = if own.contains('?') { '&' } else { '?' };
    MongoStore::connect(format!("{own}{and}readPreference=nearest")).await.unwrap();
    quotes.assert_one_is_quoted("an option without effect", &log.take());
    dropped_indexes(quotes, &log).await;
    let mongo_behind = MongoStore::connect(proxy.uri()).await.unwrap();
    let refusing = proxy.refuse_all("aggregate", 136, "CappedPositionLost", &[]);
    CachedMongoStore::builder(mongo_behind.clone()).build().await.unwrap();
    quotes.assert_one_is_quoted("a server that refuses streams", &log.take());
    drop(refusing);
    let _refusing = proxy.refuse_all("find", 462, "IngressRequestRateLimitExceeded", &[]);
    let error = mongo_behind.load(&record().id).await.unwrap_err();
    quotes.assert_quoted("an overloaded server", &said_by_the_trait(&error));
    let proxy = Proxy::start().await;
    let mongo_behind = MongoStore::connect(proxy.as_load_balancer()).await.unwrap();
    CachedMongoStore::builder(mongo_behind).build().await.unwrap();
    quotes.assert_one_is_quoted("a load balancer", &log.take());
    let store = mongo().await;
    store.save(&record()).await.unwrap();
    quotes.assert_one_is_quoted("a late save", &log.take());

    let proxy = Proxy::start().await;
    let builder = MongoStore::builder().uri(proxy.uri()).operation_timeout(SOON);
    let stalls = builder.build().await.unwrap();
    let held = proxy.hold("insert");
    let error = stalls.create(&mut record()).await.unwrap_err();
    quotes.assert_quoted("a server that stalls", &said_by_the_trait(&error));
    drop(held);

    let client = Client::with_uri_str(uri()).await.unwrap();
    let handed_in = MongoStore::builder().client(client.clone()).build().await.unwrap();
    client.shutdown().await;
    let error = handed_in.load(&record().id).await.unwrap_err();
    quotes.assert_quoted("after the end of its client", &said_by_the_trait(&error));

    create(&store).await;
    store.shutdown().await;
    let error = store.load(&record().id).await.unwrap_err();
    quotes.assert_quoted("after its end", &said_by_the_trait(&error));
}

async fn dropped_indexes(quotes: &Quotes, log: &Log) {
    let store = mongo().await;
    let theirs = store.collection().clone_with_type::<mongodb::bson::Document>();
    theirs.insert_one(doc! { "_id": "theirs" }).await.unwrap();
    let builder = MongoStore::builder().collection_handle(store.collection());
    let _second = builder.build().await.unwrap();
    quotes.assert_one_is_quoted("documents of another store", &log.take());
    theirs.drop_index("expires_1").await.unwrap();
    let said = RefCell::new(String::new());
    let says = async |text: &str| {
        said.borrow_mut().push_str(&log.take());
        said.borrow().contains(text)
    };
    crate::index_upkeep::by_the_minute("the index", async || says("was created again").await).await;
    quotes.assert_one_is_quoted("a dropped index", &said.borrow());
    theirs.drop_index("expires_1").await.unwrap();
    theirs
        .create_index(mongodb::IndexModel::builder().keys(doc! { "expires": 1 }).build())
        .await
        .unwrap();
    crate::index_upkeep::by_the_minute("another", async || says("an index was changed").await)
        .await;
    quotes.assert_one_is_quoted("a changed index", &said.borrow());
}

/// The text of our error, without the text that the trait's error puts in front of it.
fn said_by_the_trait(error: &tower_sessions::session_store::Error) -> String {
    use tower_sessions::session_store::Error::{Backend, Decode, Encode};

    match error {
        Backend(said) | Decode(said) | Encode(said) => said.clone(),
    }
}

#[cfg(unix)]
fn examples(quotes: &Quotes) {
    let counter = || {
        let mut counter = Command::new(crate::app::program("counter"));
        counter.env_clear().env("ADDR", "127.0.0.1:0").env("RUST_LOG", "off");
        counter
    };
    let said = |counter: &mut Command| {
        let output = counter.output().unwrap();
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        String::from_utf8(output.stderr).unwrap()
    };
    let taken = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let address = taken.local_addr().unwrap().to_string();
    quotes.assert_quoted("a port that is taken", &said(counter().env("ADDR", &address)));
    quotes.assert_quoted("no address", &said(counter().env("ADDR", "3000")));
    let nowhere = "mongodb://127.0.0.1:1/app?serverSelectionTimeoutMS=100";
    quotes.assert_quoted("nobody at MONGODB_URI", &said(counter().env("MONGODB_URI", nowhere)));
    quotes.assert_quoted("tests on nobody", &in_a_child("tests", Some(nowhere)));
    let empty = tempfile::tempdir().unwrap();
    let bare = said(counter().env("PATH", empty.path()).env("HOME", empty.path()));
    quotes.assert_quoted("nothing to build a server with", &bare);
    for tried in ["mongod: not on PATH", "cmake is not on PATH", "python3 is not on PATH"] {
        assert!(bare.contains(tried), "{bare}");
    }
}
