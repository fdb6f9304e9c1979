//! What the project's tests need of a server, as the driver sees it.
#![cfg(unix)]
#![allow(clippy::expect_used, clippy::unwrap_used, reason = "a test ends where it fails")]

use std::time::Duration;

use mongodb::Client;
use mongodb::bson::{Document, doc};
use mongodb::error::{Error, ErrorKind};
use session_test_server::{PASSWORD, TestServer, USER, fresh_database, shared, with_option};

async fn client(uri: &str) -> Client {
    let uri = with_option(uri, "serverSelectionTimeoutMS", "3000");
    Client::with_uri_str(uri).await.unwrap()
}

async fn write_and_read(uri: &str) -> Result<Option<Document>, Error> {
    let client = client(uri).await;
    let database = client.default_database().expect("uri_for has named one");
    let things = database.collection::<Document>("things");
    things.insert_one(doc! { "_id": 1 }).await?;
    things.find_one(doc! {}).await
}

#[tokio::test]
async fn each_test_has_its_own_database() {
    let server = shared().unwrap();
    for _ in 0..2 {
        // The same `_id` twice: in one database the second insert would fail.
        let uri = server.uri_for(&fresh_database());
        assert_eq!(write_and_read(&uri).await.unwrap(), Some(doc! { "_id": 1 }));
    }
}

#[tokio::test]
async fn change_streams_and_transactions_work() {
    let server = shared().unwrap();
    let client = client(server.uri()).await;
    let things = client.database(&fresh_database()).collection::<Document>("things");
    let mut changes = things.watch().await.unwrap();
    let mut session = client.start_session().await.unwrap();
    session.start_transaction().await.unwrap();
    things.insert_one(doc! { "_id": 7 }).session(&mut session).await.unwrap();
    session.commit_transaction().await.unwrap();
    let change = tokio::time::timeout(Duration::from_secs(20), async {
        loop {
            if let Some(change) = changes.next_if_any().await.unwrap() {
                break change;
            }
        }
    });
    let change = change.await.unwrap();
    assert_eq!(change.full_document, Some(doc! { "_id": 7 }));
}

#[tokio::test]
async fn server_with_passwords_accepts_only_the_right_one() {
    let mut server = TestServer::builder().auth(true).start().unwrap();
    let own = server.uri_for(&fresh_database());
    assert_eq!(write_and_read(&own).await.unwrap(), Some(doc! { "_id": 1 }));

    let wrong = own.replace(PASSWORD, "guessed");
    let error = write_and_read(&wrong).await.unwrap_err();
    let kind = &*error.kind;
    assert!(matches!(kind, ErrorKind::Authentication { .. }), "{error}");
    let none = own.replace(&format!("{USER}:{PASSWORD}@"), "");
    let error = write_and_read(&none).await.unwrap_err();
    assert!(error.to_string().contains("13"), "{error}");

    server.stop().unwrap();
    server.restart().unwrap();
    let again = server.uri_for(&fresh_database());
    assert!(write_and_read(&again).await.is_ok(), "the user is kept");
}

#[tokio::test]
async fn server_with_tls_accepts_only_tls() {
    let folder = tempfile::tempdir().unwrap();
    let names = vec!["localhost".to_owned(), "127.0.0.1".to_owned()];
    let made = rcgen::generate_simple_self_signed(names).unwrap();
    let cert = folder.path().join("cert");
    let key = folder.path().join("key");
    std::fs::write(&cert, made.cert.pem()).unwrap();
    std::fs::write(&key, made.signing_key.serialize_pem()).unwrap();

    let builder = TestServer::builder().auth(true).tls(&cert, &key);
    let server = builder.start().unwrap();
    let uri = server.uri_for(&fresh_database());
    let trusting = with_option(&uri, "tlsCAFile", cert.to_str().unwrap());
    assert!(write_and_read(&trusting).await.unwrap().is_some());
    let plain = with_option(&uri, "tls", "false");
    assert!(write_and_read(&plain).await.is_err());
    assert!(write_and_read(&uri).await.is_err(), "no client trusts it");
}

#[tokio::test]
async fn durable_server_keeps_acknowledged_writes_after_a_kill() {
    let mut server = TestServer::builder().durable(true).start().unwrap();
    let uri = server.uri_for("kept");
    write_and_read(&uri).await.unwrap();
    server.kill().unwrap();
    assert!(write_and_read(&uri).await.is_err());
    server.restart().unwrap();
    let things = client(&uri).await.database("kept").collection("things");
    let found: Option<Document> = things.find_one(doc! {}).await.unwrap();
    assert_eq!(found, Some(doc! { "_id": 1 }));
}

#[tokio::test]
async fn fail_points_need_test_commands() {
    let command = || {
        doc! {
            "configureFailPoint": "failCommand",
            "mode": { "times": 1 },
            "data": { "failCommands": ["ping"], "errorCode": 91 },
        }
    };
    for allowed in [false, true] {
        let builder = TestServer::builder().test_commands(allowed);
        let server = builder.start().unwrap();
        let admin = client(server.uri()).await.database("admin");
        let answer = admin.run_command(command()).await;
        assert_eq!(answer.is_ok(), allowed, "{answer:?}");
        let ping = admin.run_command(doc! { "ping": 1 }).await;
        assert_eq!(ping.is_err(), allowed, "{ping:?}");
    }
}
