//! Passwords and certificates, right and wrong. No error shows a password.

use std::path::Path;
use std::time::Duration;

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use session_test_server::{PASSWORD, TestServer, USER, fresh_database, with_option};
use tower_sessions_moka_mongodb_store::{ErrorKind, MongoStore, MongoStoreBuilder};

use crate::common::{create, everything_said_by};

#[tokio::test]
async fn the_right_password_connects_and_a_wrong_one_is_an_authentication_error() {
    let server = TestServer::builder().fast(true).auth(true).start().unwrap();
    let database = fresh_database();
    let uri = server.uri_for(&database);
    let parts =
        || MongoStore::builder().host("127.0.0.1").port(server.port().unwrap()).database(&database);
    create(&MongoStore::connect(&uri).await.unwrap()).await;
    let right = parts().username(USER).password(PASSWORD).auth_source("admin");
    create(&right.build().await.unwrap()).await;
    create(&parts().username(USER).password(PASSWORD).build().await.unwrap()).await;
    let bare = uri.replace(&format!("{USER}:{PASSWORD}@"), "").replace("authSource=admin", "");
    let bare = bare.trim_end_matches(['&', '?']);
    let beside = MongoStore::builder().uri(bare).username(USER).password(PASSWORD);
    create(&beside.build().await.unwrap()).await;

    let wrong_uri = uri.replace(PASSWORD, "wr0ng-pass");
    for builder in [
        MongoStore::builder().uri(&wrong_uri),
        MongoStore::builder().uri(&wrong_uri).create_indexes(false),
        parts().username(USER).password("wr0ng-pass"),
        parts().username("nobody").password("wr0ng-pass"),
    ] {
        let error = builder.build().await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Authentication, "{error:?}");
        let said = everything_said_by(&error);
        assert!(!said.contains("wr0ng") && said.contains("password"), "{said}");
    }
    let error = parts().build().await.unwrap_err();
    let kinds = [ErrorKind::Authentication, ErrorKind::Permission];
    assert!(kinds.contains(&error.kind()), "{error:?}");
}

/// Writes a certificate authority, and a certificate for loopback that it signed.
pub(crate) fn certificates(folder: &Path) {
    let mut params = CertificateParams::new(Vec::new()).unwrap();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let authority = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
    let names = vec!["localhost".to_owned(), "127.0.0.1".to_owned()];
    let key = KeyPair::generate().unwrap();
    let server = CertificateParams::new(names).unwrap().signed_by(&key, &authority).unwrap();
    std::fs::write(folder.join("authority.pem"), authority.pem()).unwrap();
    std::fs::write(folder.join("server.pem"), server.pem()).unwrap();
    std::fs::write(folder.join("key.pem"), key.serialize_pem()).unwrap();
}

#[tokio::test]
async fn tls_connects_only_with_the_right_authority() {
    let folder = tempfile::tempdir().unwrap();
    let other = tempfile::tempdir().unwrap();
    certificates(folder.path());
    certificates(other.path());
    let right = folder.path().join("authority.pem");
    let wrong = other.path().join("authority.pem");
    let server = TestServer::builder()
        .fast(true)
        .tls(folder.path().join("server.pem"), folder.path().join("key.pem"))
        .start()
        .unwrap();
    let database = fresh_database();
    let uri = server.uri_for(&database);
    let parts =
        || MongoStore::builder().host("127.0.0.1").port(server.port().unwrap()).database(&database);
    let in_uri = with_option(&uri, "tlsCAFile", right.to_str().unwrap());
    for builder in [
        parts().tls_ca_file(&right),
        parts().tls(true).tls_ca_file(&right),
        MongoStore::builder().uri(in_uri),
        MongoStore::builder().uri(&uri).tls_ca_file(&right),
    ] {
        create(&builder.build().await.unwrap()).await;
    }
    for (builder, what) in [
        (parts().tls_ca_file(&wrong), "another authority"),
        (parts().tls(true), "Mozilla's authorities"),
        (parts(), "no TLS"),
        (parts().tls(false), "no TLS, on purpose"),
    ] {
        let timeout = Duration::from_millis(500);
        let error = builder.operation_timeout(timeout).build().await.unwrap_err();
        let kinds = [ErrorKind::Connection, ErrorKind::Timeout];
        assert!(kinds.contains(&error.kind()), "{what}: {error:?}");
    }
}

/// Passwords with characters that must be escaped in a URI, and are not. No error may show a part
/// of them.
const PASSWORDS: [&str; 18] = [
    "S3cr3tA@S3cr3tB",
    "S3cr3tA/S3cr3tB",
    "S3cr3tA:S3cr3tB",
    "S3cr3tA?S3cr3tB",
    "S3cr3tA#S3cr3tB",
    "S3cr3tA[S3cr3tB",
    "S3cr3tA]S3cr3tB",
    "S3cr3tA%S3cr3tB",
    "S3cr3tA%ffS3cr3tB",
    "S3cr3tA,S3cr3tB",
    "S3cr3tA@S3cr3tB/S3cr3tC#S3cr3tD",
    "S3cr3tA/S3cr3tB/S3cr3tC",
    "S3cr3tA/S3cr3tB.S3cr3tC",
    "77123/S3cr3tB",
    "7712/S3cr3tB",
    "7712/S3cr3tB/S3cr3tC",
    "7712/S3cr3tB$S3cr3tC",
    "7712?S3cr3tB=S3cr3tC&S3cr3tD",
];

#[tokio::test]
async fn error_shows_no_part_of_an_unescaped_password() {
    let mut leaks = Vec::new();
    let mut uris = Vec::new();
    for password in PASSWORDS {
        for host in ["127.0.0.1:1", "localhost:1"] {
            for path in
                ["/app", "/app/logins", "", "/?directConnection=true", "/app?w=none", "/a b"]
            {
                uris.push(format!("mongodb://user:{password}@{host}{path}"));
            }
        }
    }
    for uri in uris {
        let builders = [
            MongoStore::builder().uri(&uri),
            MongoStore::builder().uri(&uri).database("$"),
            MongoStore::builder().host(&uri),
            MongoStore::builder().host(uri.trim_start_matches("mongodb://")),
        ];
        for builder in builders {
            leaks.extend(leak(builder, &uri).await);
        }
    }
    for uri in [
        "mongodb+srv://user:S3cr3tA@",
        "mongodb+srv://user:S3cr3tA",
        "mongodb+srv://S3cr3tA",
        "mongodb://user:S3cr3tA/app",
        "mongodb://user:S3cr3tA,localhost",
        "mongodb://localhost/app?authMechanismProperties=AWS_SESSION_TOKEN:abc,S3cr3tA",
        "mongodb://localhost/a S3cr3tA",
        "mongodb://localhost/a/$S3cr3tA",
        "user:S3cr3tA@127.0.0.1/x",
        "mongodb:/user:S3cr3tA@h/x",
    ] {
        leaks.extend(leak(MongoStore::builder().uri(uri), uri).await);
    }
    assert!(
        leaks.is_empty(),
        "{} errors show a password:
{}",
        leaks.len(),
        leaks.join("\n")
    );
}

/// Returns the error about the URI if it shows a part of the password.
async fn leak(builder: MongoStoreBuilder, uri: &str) -> Option<String> {
    let built = builder.operation_timeout(Duration::from_millis(20)).build().await;
    let error = built.expect_err("nothing listens there");
    let said = everything_said_by(&error).to_lowercase();
    ["s3cr3t", "7712"].iter().any(|part| said.contains(part)).then(|| format!("{uri}: {error}"))
}

#[tokio::test]
async fn escaped_password_is_accepted_and_not_shown() {
    for password in ["S3cr3t%40%2F%3A%3F%23%5B%5D%25", "S3cr3t!$&'()*+,;=-._~"] {
        let uri = format!("mongodb://user:{password}@127.0.0.1:1/app");
        let builder = MongoStore::builder().uri(&uri).operation_timeout(Duration::from_millis(20));
        let error = builder.build().await.unwrap_err();
        let kinds = [ErrorKind::Connection, ErrorKind::Timeout];
        assert!(kinds.contains(&error.kind()), "{uri}: {error:?}");
        assert!(!everything_said_by(&error).contains("S3cr3t"), "{error:?}");
    }
}
