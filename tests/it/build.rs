//! What `build()` checks before a session is stored: the options, the server and the user's rights.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::sync::Arc;
use std::time::Duration;

use mongodb::Client;
use mongodb::bson::{Document, doc};
use session_test_server::{PASSWORD, TestServer, USER, fresh_database, shared_fast};
use tower_sessions_moka_mongodb_store::{ErrorKind, MongoStore, MongoStoreBuilder, mongodb};

use crate::common::{Commands, Log, create, uri};
use crate::proxy::Proxy;

#[track_caller]
fn assert_says(error: &tower_sessions_moka_mongodb_store::Error, kind: ErrorKind, text: &str) {
    assert_eq!(error.kind(), kind, "{error}");
    assert!(error.to_string().contains(text), "{error}");
}

async fn assert_fails(builder: MongoStoreBuilder, kind: ErrorKind, text: &str) {
    match builder.build().await {
        Ok(_) => panic!("it was built, without: {text}"),
        Err(error) => assert_says(&error, kind, text),
    }
}

#[tokio::test]
async fn databases_of_mongodb_itself_are_rejected() {
    let client = Client::with_uri_str("mongodb://127.0.0.1:1/admin").await.unwrap();
    let builder = MongoStore::builder;
    for builder in [
        builder().uri("mongodb://user:S3cr3t@127.0.0.1:1/admin"),
        builder().uri("mongodb://user:S3cr3t@127.0.0.1:1/local/sessions"),
        builder().uri("mongodb://user:S3cr3t@127.0.0.1:1/admin").database("app"),
        builder().port(1).database("config"),
        builder().client(client.clone()),
        builder().client(client.clone()).database("local"),
        builder().database_handle(client.database("admin")),
        builder().collection_handle(client.database("local").collection::<Document>("sessions")),
    ] {
        let error = builder.build().await.unwrap_err();
        assert_says(&error, ErrorKind::Config, "/yourdb?authSource=");
        assert!(!error.to_string().contains("S3cr3t"), "{error}");
    }
}

#[tokio::test]
async fn white_space_and_a_byte_order_mark_around_a_uri_or_a_host_are_ignored() {
    let uri = uri();
    create(&MongoStore::connect(format!(" {uri}\r\n")).await.unwrap()).await;
    create(&MongoStore::connect(format!("\u{feff}{uri}\r\n")).await.unwrap()).await;
    let Some(port) = shared_fast().unwrap().port() else { return };
    let builder = || MongoStore::builder().database(fresh_database());
    create(&builder().host("127.0.0.1\n").port(port).build().await.unwrap()).await;
    create(&builder().host("\u{feff}127.0.0.1\n").port(port).build().await.unwrap()).await;
    create(&builder().hosts([format!("127.0.0.1:{port}\n")]).build().await.unwrap()).await;
}

#[tokio::test]
async fn trailing_line_break_in_a_name_is_rejected() {
    let builder = || MongoStore::builder().host("127.0.0.1").port(1);
    let user = || builder().username("u");
    for (builder, name) in [
        (builder().username("S3cr3t\n"), "`username`"),
        (user().password("S3cr3t\r\n"), "`password`"),
        (user().password("p").auth_source("admin\n"), "`auth_source`"),
        (builder().replica_set("rs0\n"), "`replica_set`"),
        (builder().app_name("a\n"), "`app_name`"),
        (builder().database("a\n"), "`database`"),
        (builder().collection("a\n"), "`collection`"),
        (builder().tls_ca_file("/a.pem\n"), "`tls_ca_file`"),
    ] {
        let error = builder.build().await.unwrap_err();
        assert_says(&error, ErrorKind::Config, name);
        assert_says(&error, ErrorKind::Config, "trim_end()");
        assert!(!error.to_string().contains("S3cr3t"), "{error}");
    }
    for (builder, name) in [
        (builder().username("\u{feff}S3cr3t"), "`username`"),
        (user().password("\u{feff}S3cr3t"), "`password`"),
        (builder().database("\u{feff}app"), "`database`"),
        (builder().tls_ca_file("\u{feff}/a.pem"), "`tls_ca_file`"),
    ] {
        let error = builder.build().await.unwrap_err();
        assert_says(&error, ErrorKind::Config, name);
        assert_says(&error, ErrorKind::Config, "begins with a byte order mark");
        assert!(!error.to_string().contains("S3cr3t"), "{error}");
    }
    let space = user().password("with a space ").operation_timeout(Duration::from_millis(50));
    assert_ne!(space.build().await.unwrap_err().kind(), ErrorKind::Config);
}

#[tokio::test]
async fn missing_role_is_named_even_without_an_index() {
    let server = TestServer::builder().fast(true).auth(true).start().unwrap();
    let database = fresh_database();
    let uri = server.uri_for(&database);
    // The indexes already exist. Otherwise their creation would reveal the missing right.
    MongoStore::builder().uri(&uri).owner(|_| Some("ferris")).build().await.unwrap();
    let known = Client::with_uri_str(&uri).await.unwrap().database(&database);
    for (user, roles) in [("nothing", vec![]), ("reader", vec!["read"]), ("all", vec!["readWrite"])]
    {
        let user = doc! { "createUser": user, "pwd": "pw", "roles": roles };
        known.run_command(user).await.unwrap();
    }
    let own = uri.replace("&authSource=admin", "");
    let as_user =
        |user: &str| MongoStore::builder().uri(own.replace(&format!("{USER}:{PASSWORD}@"), user));
    let role = "grant it the role `readWrite`";
    let permission = ErrorKind::Permission;
    for create_indexes in [false, true] {
        let builder = |user| as_user(user).create_indexes(create_indexes);
        assert_fails(builder("nothing:pw@"), permission, role).await;
        assert_fails(builder("reader:pw@"), permission, "not allowed to save a session").await;
        assert_fails(builder("reader:pw@"), permission, role).await;
        assert_fails(builder(""), permission, "wants a user name and a password").await;
        create(&builder("all:pw@").build().await.unwrap()).await;
    }
}

#[tokio::test]
async fn privilege_checks_change_nothing_and_end_by_the_operation_timeout() {
    let commands = Commands::default();
    let client = commands.client(&uri()).await;
    let store = MongoStore::builder().client(client).create_indexes(false).build().await.unwrap();
    let database = store.collection().client().database(&store.collection().namespace().db);
    // One of the test servers creates the collection for an update that matches nothing.
    for collection in database.list_collection_names().await.unwrap() {
        let documents = database.collection::<Document>(&collection);
        assert_eq!(documents.count_documents(doc! {}).await.unwrap(), 0);
    }
    assert_eq!((commands.sent("find"), commands.sent("update")), (1, 1));

    for command in ["find", "update"] {
        let proxy = Proxy::start().await;
        let mut held = proxy.hold(command);
        let timeout = Duration::from_millis(500);
        let builder = MongoStore::builder().uri(proxy.uri()).operation_timeout(timeout);
        let builds = tokio::spawn(builder.create_indexes(false).build());
        held.reached().await;
        let error = builds.await.unwrap().unwrap_err();
        assert_says(&error, ErrorKind::Timeout, "did not answer within 500ms");
        drop(held);
    }
}

#[tokio::test]
async fn single_missing_right_is_named() {
    for (command, doing) in [("find", "read a session"), ("update", "save a session")] {
        let proxy = Proxy::start().await;
        proxy.hold(command).refuse(13);
        let text = format!("not allowed to {doing}: grant it the role `readWrite`");
        assert_fails(MongoStore::builder().uri(proxy.uri()), ErrorKind::Permission, &text).await;
    }
}

#[tokio::test]
async fn a_store_is_built_only_after_a_read_that_succeeded() {
    // Atlas reports a missing right with the code 8000.
    for (command, doing) in [("find", "read a session"), ("update", "save a session")] {
        let proxy = Proxy::start().await;
        let _refusing = proxy.refuse_all(command, 8000, "AtlasError", &[]);
        let text = format!("error 8000 (AtlasError) when asked to {doing}");
        assert_fails(MongoStore::builder().uri(proxy.uri()), ErrorKind::Server, &text).await;
    }
    // Another database engine rejects the first filter, and answers a plain read.
    let proxy = Proxy::start().await;
    proxy.hold("find").refuse(2);
    MongoStore::connect(proxy.uri()).await.unwrap();
}

#[tokio::test]
async fn build_rejects_a_server_without_pipeline_updates_but_not_a_full_one() {
    for code in [9, 59, 303, 304, 40324] {
        let proxy = Proxy::start().await;
        proxy.hold("update").refuse(code);
        let builder = MongoStore::builder().uri(proxy.uri());
        assert_fails(builder, ErrorKind::Server, "MongoDB 4.4.2 or newer").await;
    }
    // OutOfDiskSpace, UserWritesBlocked, and NotWritablePrimary twice, since the driver retries it.
    for codes in [&[14031][..], &[371], &[10107, 10107]] {
        let log = Log::default();
        let _logs = tracing::subscriber::set_default(log.subscriber());
        let proxy = Proxy::start().await;
        for code in codes {
            proxy.hold("update").refuse(*code);
        }
        MongoStore::connect(proxy.uri()).await.unwrap();
        assert!(log.take().contains("sessions can be read, but not saved: "), "{codes:?}");
    }
}

/// Forwards between a client and the server on `port`. It answers a message itself, or changes the
/// server's reply.
fn relay(
    server: u16,
    answers: impl Fn(&[u8]) -> Option<Vec<u8>> + Send + Sync + 'static,
    changes: impl Fn(&mut [u8]) + Send + Sync + 'static,
) -> u16 {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    let answers = Arc::new(answers);
    let changes = Arc::new(changes);
    std::thread::spawn(move || {
        for client in listener.incoming() {
            let mut client = client.unwrap();
            let mut server = TcpStream::connect((Ipv4Addr::LOCALHOST, server)).unwrap();
            let mut from_server = server.try_clone().unwrap();
            let mut to_client = client.try_clone().unwrap();
            let answers = answers.clone();
            std::thread::spawn(move || {
                while let Some(message) = message(&mut client) {
                    let sent = match answers(&message) {
                        Some(answer) => client.write_all(&answer),
                        None => server.write_all(&message),
                    };
                    if sent.is_err() {
                        return;
                    }
                }
            });
            let changes = changes.clone();
            std::thread::spawn(move || {
                while let Some(mut message) = message(&mut from_server) {
                    changes(&mut message);
                    if to_client.write_all(&message).is_err() {
                        return;
                    }
                }
            });
        }
    });
    port
}

/// Reads one message. A message begins with its length.
fn message(from: &mut TcpStream) -> Option<Vec<u8>> {
    let mut message = vec![0; 4];
    from.read_exact(&mut message).ok()?;
    let length = i32::from_le_bytes(message[..].try_into().ok()?);
    message.resize(usize::try_from(length).ok()?, 0);
    from.read_exact(&mut message[4..]).ok()?;
    Some(message)
}

fn position(message: &[u8], pattern: &[u8]) -> Option<usize> {
    message.windows(pattern.len()).position(|window| window == pattern)
}

async fn server_port() -> u16 {
    let proxy = Proxy::start().await;
    let (_, rest) = proxy.direct().split_once("127.0.0.1:").unwrap();
    rest.split('/').next().unwrap().parse().unwrap()
}

/// The URI of a server that reports the wire version of MongoDB 4.2.
pub(crate) async fn old_server() -> String {
    let port = relay(
        server_port().await,
        |_| None,
        |reply| {
            let name = b"maxWireVersion\0";
            if let Some(at) = position(reply, name) {
                reply[at + name.len()..][..4].copy_from_slice(&8_i32.to_le_bytes());
            }
        },
    );
    // A direct connection. Otherwise the driver would connect to the address that the replica set
    // reports.
    format!("mongodb://127.0.0.1:{port}/app?directConnection=true")
}

#[tokio::test]
async fn server_with_an_old_wire_version_is_too_old() {
    let uri = old_server().await;
    for create_indexes in [true, false] {
        let builder = MongoStore::builder().uri(&uri).create_indexes(create_indexes);
        let too_old = "too old: its version is 4.2, and the store needs 4.4.2 or newer";
        assert_fails(builder, ErrorKind::Server, too_old).await;
    }
}

#[tokio::test]
async fn server_without_hello_is_too_old_and_its_version_is_shown() {
    let database = fresh_database();
    let own = database.clone();
    let port = relay(
        server_port().await,
        move |request| {
            // The driver sends `hello` to `admin`, the store sends it to its own database.
            let is_hello = request.get(26..)?.starts_with(b"hello\0");
            (is_hello && position(request, own.as_bytes()).is_some()).then(|| {
                let error = doc! { "ok": 0.0, "errmsg": "no such command", "code": 59 };
                let mut reply = vec![0; 4];
                let id = u32::from_le_bytes(request[4..8].try_into().unwrap());
                reply.extend([1, id, 2013, 0].iter().flat_map(|word| word.to_le_bytes()));
                reply.push(0);
                reply.extend(error.to_vec().unwrap());
                let length = u32::try_from(reply.len()).unwrap();
                reply[..4].copy_from_slice(&length.to_le_bytes());
                reply
            })
        },
        |_| (),
    );
    let client = Client::with_uri_str(uri()).await.unwrap();
    let info = client.database("admin").run_command(doc! { "buildInfo": 1 }).await.unwrap();
    let version = info.get_str("version").unwrap();
    let uri = format!("mongodb://127.0.0.1:{port}/{database}?directConnection=true");
    let builder = MongoStore::builder().uri(uri);
    assert_fails(builder, ErrorKind::Server, &format!("too old: its version is {version}")).await;
}

#[tokio::test]
async fn unsupported_mechanism_is_not_reported_as_a_wrong_password() {
    let port = server_port().await;
    let with = |options: &str| {
        let uri = format!("mongodb://127.0.0.1:{port}/app?directConnection=true&{options}");
        MongoStore::builder().uri(uri)
    };
    let properties =
        "authMechanism=MONGODB-OIDC&authMechanismProperties=TOKEN_RESOURCE:S3cr3t,ENVIRONMENT:";
    for (builder, text) in [
        (with("authMechanism=MONGODB-CR"), "authMechanism=MONGODB-CR`: take it out"),
        (with("authMechanism=MONGODB-OIDC"), "ENVIRONMENT:"),
        (with(&format!("{properties}azure")), "enable the feature `azure-oidc`"),
        (with(&format!("{properties}gcp")), "enable the feature `gcp-oidc`"),
    ] {
        let error = builder.build().await.unwrap_err();
        assert_says(&error, ErrorKind::Config, text);
        assert!(!error.to_string().contains("S3cr3t"), "{error}");
    }
}

#[tokio::test]
async fn options_without_effect_are_logged() {
    let log = Log::default();
    let _logs = tracing::subscriber::set_default(log.subscriber());
    let uri = uri();
    let and = if uri.contains('?') { '&' } else { '?' };
    for (option, is_told) in [
        ("readPreference=secondaryPreferred", true),
        ("readConcernLevel=local", true),
        ("WAITQUEUETIMEOUTMS=100", true),
        ("readPreference=primary", false),
        ("readConcernLevel=majority", false),
    ] {
        MongoStore::connect(format!("{uri}{and}{option}")).await.unwrap();
        assert_eq!(log.take().contains("has no effect"), is_told, "{option}");
    }
}
