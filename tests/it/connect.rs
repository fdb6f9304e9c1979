//! Every way to say where the sessions are, and the error for each way that cannot work.

use std::process::Command;
use std::time::{Duration, Instant};

use session_test_server::{fresh_database, shared_fast};
use tower_sessions::SessionStore;
use tower_sessions_moka_mongodb_store::mongodb::Client;
use tower_sessions_moka_mongodb_store::mongodb::bson::{Document, doc};
use tower_sessions_moka_mongodb_store::mongodb::options::{
    Acknowledgment, ClientOptions, WriteConcern,
};
use tower_sessions_moka_mongodb_store::{
    CachedMongoStore, Coherence, Error, ErrorKind, MongoStore, MongoStoreBuilder,
};

use crate::common::{create, uri};

/// Builds the store, uses it, and returns its namespace.
async fn used(builder: MongoStoreBuilder) -> (String, String) {
    let store = builder.build().await.unwrap();
    let record = create(&store).await;
    assert_eq!(store.load(&record.id).await.unwrap().unwrap().data, record.data);
    let namespace = store.collection().namespace();
    (namespace.db, namespace.coll)
}

/// Checks the error of a builder that must not contact any server.
async fn config_error(builder: MongoStoreBuilder, said: &str) {
    let error = builder.build().await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Config, "{error}");
    assert!(error.to_string().contains(said), "{error}");
}

/// The host and port of the shared server, if its URI has one address.
fn address() -> Option<(String, u16)> {
    shared_fast().unwrap().port().map(|port| ("127.0.0.1".to_owned(), port))
}

#[tokio::test]
async fn a_uri_names_the_database_and_perhaps_the_collection() {
    for (path, options, collection) in [
        ("", true, "sessions"),
        ("", false, "sessions"),
        ("/logins", true, "logins"),
        ("/logins", false, "logins"),
        ("/", true, "sessions"),
        ("/my%20logins", true, "my logins"),
        ("/a.b", false, "a.b"),
    ] {
        let database = fresh_database();
        let uri = shared_fast().unwrap().uri_for(&database);
        let uri = match (options, uri.split_once('?')) {
            (true, Some((uri, options))) => format!("{uri}{path}?{options}&appName=a/b?c=d"),
            (true, None) => format!("{uri}{path}?appName=a/b"),
            // A direct connection to the member is enough for a store.
            (false, Some((uri, _))) => format!("{uri}{path}"),
            (false, None) => format!("{uri}{path}"),
        };
        let builder = MongoStore::builder().uri(uri.replace("?c=d", ""));
        assert_eq!(used(builder).await, (database, collection.to_owned()), "{path} {options}");
    }
}

#[tokio::test]
async fn names_beside_the_uri_complete_it_and_must_not_contradict_it() {
    let one = fresh_database();
    let other = fresh_database();
    let uri = shared_fast().unwrap().uri_for(&one);
    let with_path = match uri.split_once('?') {
        Some((uri, options)) => format!("{uri}/logins?{options}"),
        None => format!("{uri}/logins"),
    };
    let builder = MongoStore::builder;
    assert_eq!(used(builder().uri(&uri).collection("c")).await, (one.clone(), "c".to_owned()));
    let same = builder().uri(&with_path).collection("logins").database(&one);
    assert_eq!(used(same).await, (one.clone(), "logins".to_owned()));
    let bare = shared_fast().unwrap().uri();
    if Client::with_uri_str(bare).await.unwrap().default_database().is_none() {
        assert_eq!(used(builder().uri(bare).database(&other)).await.0, other);
    }
    config_error(builder().uri(&with_path).collection("others"), "two different collections").await;
    config_error(builder().uri(&uri).database(&other), "two different databases").await;
    let three = format!("mongodb://{}/a/b/c", "127.0.0.1:1");
    config_error(builder().uri(three), "more than two parts").await;
}

#[tokio::test]
async fn parts_can_replace_the_uri() {
    let Some((host, port)) = address() else { return };
    let builder = || MongoStore::builder().database(fresh_database());
    used(builder().host(&host).port(port)).await;
    used(builder().port(port)).await;
    used(builder().host(format!("{host}:{port}"))).await;
    used(builder().hosts([format!("{host}:{port}")])).await;
    used(builder().hosts([&host]).port(port)).await;
    used(builder().host("localhost").port(port).app_name("a test").max_pool_size(2)).await;
    let set = MongoStore::connect(uri()).await.unwrap();
    let hello = set.collection().client().database("admin").run_command(doc! { "hello": 1 }).await;
    if let Ok(name) = hello.unwrap().get_str("setName") {
        used(builder().host(&host).port(port).replica_set(name)).await;
    }
}

#[tokio::test]
async fn existing_handles() {
    let uri = uri();
    let client = Client::with_uri_str(&uri).await.unwrap();
    let named = client.default_database().unwrap();
    let database = client.database(&fresh_database());
    let collection = database.collection::<Document>("own");
    let builder = MongoStore::builder;
    let name = |db: &str, coll: &str| (db.to_owned(), coll.to_owned());

    let of_client = builder().client(client.clone());
    assert_eq!(used(of_client.clone()).await, name(named.name(), "sessions"));
    let of_client = of_client.database(database.name()).collection("c");
    assert_eq!(used(of_client).await, name(database.name(), "c"));
    let of_database = builder().database_handle(database.clone());
    assert_eq!(used(of_database.clone()).await, name(database.name(), "sessions"));
    assert_eq!(used(of_database.collection("d")).await, name(database.name(), "d"));
    let of_collection = builder().collection_handle(collection);
    assert_eq!(used(of_collection.clone()).await, name(database.name(), "own"));

    config_error(of_collection.clone().collection("x"), "already names it").await;
    config_error(builder().database_handle(database).database("x"), "already names it").await;
    config_error(of_collection.client(client.clone()), "one of them").await;
    config_error(builder().client(client.clone()).uri(&uri), "one of them").await;
    for (builder, option) in [
        (builder().username("u"), "username"),
        (builder().tls(true), "tls"),
        (builder().max_pool_size(3), "max_pool_size"),
        (builder().app_name("a"), "app_name"),
        (builder().replica_set("r"), "replica_set"),
    ] {
        config_error(builder.client(client.clone()), option).await;
    }
}

#[tokio::test]
async fn client_with_unacknowledged_writes_is_rejected() {
    let mut options = ClientOptions::parse(uri()).await.unwrap();
    options.write_concern = Some(WriteConcern::builder().w(Acknowledgment::Nodes(0)).build());
    let client = Client::with_options(options).unwrap();
    config_error(MongoStore::builder().client(client), "w=0").await;
    let uri = uri();
    let and = if uri.contains('?') { '&' } else { '?' };
    config_error(MongoStore::builder().uri(format!("{uri}{and}w=0")), "w=0").await;
    used(MongoStore::builder().uri(format!("{uri}{and}w=1"))).await;
    used(MongoStore::builder().uri(format!("{uri}{and}wTimeoutMS=1000"))).await;
}

#[tokio::test]
async fn contradicting_parts_are_rejected() {
    let builder = MongoStore::builder;
    let uri = "mongodb://127.0.0.1:1/never";
    config_error(builder().uri(uri).host("h"), "one of them").await;
    config_error(builder().uri(uri).port(2), "one of them").await;
    config_error(builder().uri(uri).uri_from_env(), "take one").await;
    config_error(builder().host("a").hosts(["b"]), "`hosts`").await;
    config_error(builder().host("a:1").port(2), "both").await;
    config_error(builder().host("mongodb://a"), "a host is a name").await;
    config_error(builder().hosts(["a", "mongodb://b/c"]), "write several URIs as one").await;
    config_error(builder().host("a:b:c"), "the form").await;
    config_error(builder().password("p"), "without `username`").await;
    config_error(builder().auth_source("p"), "without `username`").await;
    config_error(builder().tls(false).tls_ca_file("x"), "switched off").await;
    config_error(builder().uri("mongodb://u:p@127.0.0.1:1/x").username("v"), "credentials").await;
    config_error(builder().uri("http://127.0.0.1:1/x"), "").await;
    config_error(builder().uri(""), "").await;
    config_error(builder().host(""), "").await;
    config_error(builder().hosts([] as [&str; 0]), "no host").await;
    config_error(builder().max_pool_size(0), "`max_pool_size`").await;
}

#[tokio::test]
async fn setters_that_contradict_the_uri_are_rejected() {
    let with = |query: &str| MongoStore::builder().uri(format!("mongodb://127.0.0.1:1/x?{query}"));
    config_error(with("tls=true").tls(false), "switches it on").await;
    config_error(with("tlsCAFile=a").tls(false), "switches it on").await;
    config_error(with("tls=false").tls(true), "switches TLS off").await;
    config_error(with("tls=false").tls_ca_file("a"), "switches TLS off").await;
    config_error(with("tlsCAFile=a").tls_ca_file("b"), "`tls_ca_file`").await;
    config_error(with("replicaSet=a").replica_set("b"), "`replica_set`").await;
    config_error(with("appName=a").app_name("b"), "`app_name`").await;
    config_error(with("maxPoolSize=2").max_pool_size(3), "`max_pool_size`").await;
    config_error(with("AuthSource=a").username("u").password("p"), "`auth_source`").await;
    config_error(with("maxPoolSize=many"), "`maxPoolSize`").await;
    config_error(MongoStore::builder().uri("mongodb://127.0.0.1:1/%zz"), "percent escape").await;
    let same = with("appName=a&maxPoolSize=2&replicaSet=r&tls=false");
    let same = same.app_name("a").max_pool_size(2).replica_set("r").tls(false);
    let same = same.operation_timeout(Duration::from_millis(50));
    assert_eq!(same.build().await.unwrap_err().kind(), ErrorKind::Connection);
}

#[tokio::test]
async fn the_operation_timeout_has_a_range() {
    let with = |timeout| MongoStore::builder().port(1).operation_timeout(timeout);
    let longest = Duration::from_millis(2_147_483_647);
    for timeout in [Duration::ZERO, Duration::from_micros(999), Duration::MAX] {
        config_error(with(timeout), "`operation_timeout`").await;
    }
    config_error(with(longest + Duration::from_nanos(1)), "`operation_timeout`").await;
    used(MongoStore::builder().uri(uri()).operation_timeout(longest)).await;
}

#[tokio::test]
async fn a_tls_file_that_cannot_be_read_is_a_config_error_that_names_the_option() {
    let folder = tempfile::tempdir().unwrap();
    let empty = folder.path().join("empty.pem");
    std::fs::write(&empty, "").unwrap();
    let with = |option: &str, path: &std::path::Path| {
        let path = path.display();
        MongoStore::builder().uri(format!("mongodb://127.0.0.1:1/x?tls=true&{option}={path}"))
    };
    let missing = folder.path().join("missing.pem");
    let ca = "the file of `tlsCAFile` cannot be read";
    let key = "the file of `tlsCertificateKeyFile` cannot be read";
    let setter = "the file of `tls_ca_file` cannot be read";
    let builder = MongoStore::builder;
    for (path, reason) in [(missing.as_path(), "o such file"), (folder.path(), "a directory")] {
        for (builder, said) in [
            (with("tlsCAFile", path), ca),
            (with("tlsCertificateKeyFile", path), key),
            (builder().port(1).tls_ca_file(path), setter),
            (with("appName", "a".as_ref()).tls_ca_file(path), setter),
        ] {
            config_error(builder.clone(), said).await;
            config_error(builder, reason).await;
        }
    }
    config_error(with("tlsCertificateKeyFile", &empty), "driver refused").await;
    config_error(with("tlsCAFile", &empty), "holds no certificate").await;
    config_error(builder().port(1).tls_ca_file(&empty), "holds no certificate").await;
}

/// Without the check, the driver would look up each of these, and report a name that DNS does not
/// know.
#[tokio::test]
async fn malformed_host_is_rejected_at_once() {
    let builder = MongoStore::builder;
    let long_label = "x".repeat(64);
    let long_name = ["x"; 128].join(".");
    for host in [
        "a,b",
        "a/b",
        "a?b",
        "a#b",
        "u@a",
        "u:p@a",
        "a b",
        "a\tb",
        "a\u{a0}b",
        "a\u{feff}b",
        "a\u{200b}b",
        "a\0b",
        "a\\b",
        "a%20b",
        "\"a\"",
        "'a'",
        "<host>",
        "a..b",
        ".a",
        ".",
        &long_label,
        &long_name,
    ] {
        config_error(builder().host(host), "the form `name`").await;
        config_error(builder().host(host), "give several to `hosts`").await;
        config_error(builder().hosts(["127.0.0.1:1", host]), "the form `name`").await;
    }
    for host in ["a b", "a\u{200b}b", "a#b", "a%20b", "\"a\"", "a..b", ".a", &long_label] {
        for scheme in ["mongodb", "mongodb+srv"] {
            let uri = format!("{scheme}://u:S3cr3t@{host}/app");
            config_error(builder().uri(&uri), "the URI has a malformed host").await;
        }
        config_error(builder().uri(format!("mongodb://127.0.0.1:1,{host}")), "malformed host")
            .await;
    }
    for host in [
        "db_1-a.example",
        "a.example.",
        "m\u{fc}nchen.invalid",
        "127.0.0.1",
        "[::1]",
        "/no/such.sock",
    ] {
        let uri_host = host.replace('/', "%2F");
        let timeout = Duration::from_millis(200);
        for builder in [builder().host(host), builder().uri(format!("mongodb://{uri_host}/app"))] {
            let error = builder.operation_timeout(timeout).build().await.err();
            let kind = error.as_ref().map(Error::kind);
            assert_ne!(kind, Some(ErrorKind::Config), "{host}: {error:?}");
        }
    }
}

#[tokio::test]
async fn every_way_to_name_a_collection_has_the_same_rules() {
    let client = Client::with_uri_str("mongodb://127.0.0.1:1/app").await.unwrap();
    let database = client.database("app");
    let builder = MongoStore::builder;
    for name in ["a$b", "system.users", "a."] {
        for builder in [
            builder().port(1).collection(name),
            builder().uri(format!("mongodb://127.0.0.1:1/app/{name}")),
            builder().client(client.clone()).collection(name),
            builder().database_handle(database.clone()).collection(name),
            builder().collection_handle(database.collection::<Document>(name)),
        ] {
            config_error(builder, "the name of the collection is malformed").await;
        }
    }
    // The server accepts 255 bytes for both names and the dot between them.
    let database = "d".repeat(63);
    let collection = "c".repeat(192);
    let handle = client.database(&database).collection::<Document>(&collection);
    for builder in [
        builder().port(1).database(&database).collection(&collection),
        builder().uri(format!("mongodb://127.0.0.1:1/{database}/{collection}")),
        builder().client(client.clone()).database(&database).collection(&collection),
        builder().collection_handle(handle),
    ] {
        config_error(builder, "255 bytes").await;
    }
    let database = client.database("a b");
    config_error(
        builder().database_handle(database.clone()),
        "the name of the database is malformed",
    )
    .await;
    let handle = database.collection::<Document>("sessions");
    config_error(builder().collection_handle(handle), "the name of the database is malformed")
        .await;
}

#[tokio::test]
async fn names_that_the_server_would_reject_are_rejected() {
    let long = "x".repeat(64);
    for name in ["", "a b", "a.b", "a/b", "a\\b", "a\"b", "$a", "a\0b", "a\nb", long.as_str()] {
        let builder = MongoStore::builder().port(1).database(name);
        config_error(builder, "the name of the database is malformed").await;
    }
    let long = "x".repeat(201);
    for name in ["", "a$b", "a\0b", "a\nb", "system.users", ".a", "a.", long.as_str()] {
        let builder = MongoStore::builder().port(1).collection(name);
        config_error(builder, "the name of the collection is malformed").await;
    }
}

#[test]
fn build_outside_of_a_runtime_is_an_error() {
    let error = futures::executor::block_on(MongoStore::connect("mongodb://127.0.0.1:1/x"));
    let error = error.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Config);
    assert!(error.to_string().contains("tokio runtime"), "{error}");
}

#[test]
fn build_in_a_runtime_without_timer_is_an_error() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build().unwrap();
    let error = runtime.block_on(MongoStore::connect("mongodb://127.0.0.1:1/x")).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Config, "{error}");
    assert!(error.to_string().contains("enable_all()"), "{error}");
}

#[test]
fn build_in_a_runtime_without_io_is_an_error() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
    let error = runtime.block_on(MongoStore::connect("mongodb://127.0.0.1:1/x")).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Config, "{error}");
    assert!(error.to_string().contains("enable_all()"), "{error}");
}

/// A process with threads must not change its environment, so the test runs itself as a child
/// process.
#[tokio::test]
async fn uri_comes_from_the_environment() {
    const CHILD: &str = "SESSION_STORE_TEST_CHILD";
    if std::env::var_os(CHILD).is_some() {
        let store = CachedMongoStore::from_env().await.unwrap();
        create(&store).await;
        create(&MongoStore::builder().uri_from_env().build().await.unwrap()).await;
        assert_eq!(MongoStore::from_env().await.unwrap().length().await.unwrap(), 2);
        return;
    }
    let uri = uri();
    let status = this_test("connect::uri_comes_from_the_environment")
        .env(CHILD, "1")
        .env("MONGODB_URI", format!("\u{feff} {uri}\n"))
        .status();
    assert!(status.unwrap().success());
    assert_eq!(MongoStore::connect(uri).await.unwrap().length().await.unwrap(), 2);
}

#[tokio::test]
async fn missing_uri_in_the_environment_is_an_error_that_names_the_variable() {
    const CHILD: &str = "SESSION_STORE_TEST_CHILD";
    if std::env::var_os(CHILD).is_some() {
        config_error(MongoStore::builder().uri_from_env(), "MONGODB_URI").await;
        let error = CachedMongoStore::from_env().await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Config);
        return;
    }
    let name = "connect::missing_uri_in_the_environment_is_an_error_that_names_the_variable";
    let status = this_test(name).env(CHILD, "1").env_remove("MONGODB_URI").status();
    assert!(status.unwrap().success());
    let status = this_test(name).env(CHILD, "1").env("MONGODB_URI", " ").status();
    assert!(status.unwrap().success());
}

fn this_test(name: &str) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", name, "--quiet"]);
    command
}

#[tokio::test]
async fn an_unreachable_server_is_a_connection_error_by_the_deadline() {
    // A port that was free a moment ago, and a port that accepts connections and never answers.
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let mute = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    for port in [free, mute.local_addr().unwrap().port()] {
        for create_indexes in [true, false] {
            let start = Instant::now();
            let error: Error = MongoStore::builder()
                .port(port)
                .operation_timeout(Duration::from_millis(500))
                .create_indexes(create_indexes)
                .build()
                .await
                .unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Connection, "{error:?}");
            assert!(std::error::Error::source(&error).is_none(), "{error:?}");
            assert!(start.elapsed() < Duration::from_secs(10), "{:?}", start.elapsed());
        }
    }
}

#[tokio::test]
async fn contradicting_cache_options_are_rejected() {
    let mongo = MongoStore::builder().uri(uri()).build().await.unwrap();
    let cached = || CachedMongoStore::builder(mongo.clone());
    let one = MongoStore::builder().uri(uri()).max_pool_size(1).build().await.unwrap();
    let grace = Duration::from_secs(1);
    for (builder, said) in [
        (cached().max_entries(0), "`max_entries`"),
        (cached().coherence(Coherence::SoleWriter).outage_grace(grace), "`outage_grace`"),
        (CachedMongoStore::builder(one.clone()), "`max_pool_size`"),
    ] {
        let error = builder.build().await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Config);
        assert!(error.to_string().contains(said), "{error}");
    }
    CachedMongoStore::builder(one).coherence(Coherence::SoleWriter).build().await.unwrap();
}
