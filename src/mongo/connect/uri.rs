//! Reads a connection string, and says what is wrong with a malformed one. No message quotes the string: any piece
//! of a malformed one may be a piece of the password.

use std::borrow::Cow;
use std::net::IpAddr;

use mongodb::options::{ConnectionString, HostInfo, ServerAddress};
use percent_encoding::percent_decode_str;

use crate::error::{Error, ErrorKind, Result};
use crate::mongo::connect::uri_options;
use crate::mongo::error;

/// Trims what a file may add: white space, such as a line break at the end, and a byte order mark, which Windows
/// editors write at the beginning.
pub(crate) fn trimmed(text: &str) -> &str {
    text.trim_matches(|character: char| character.is_whitespace() || character == '\u{feff}')
}

/// Splits the collection, which is the second part of the path, from a URI.
pub(crate) fn split_collection(uri: &str) -> Result<(String, Option<String>)> {
    if uri.contains(['\n', '\r']) {
        return Err(Error::config(
            "the URI has a line break in it: a user name or password that is read from a file ends \
             with one. Take it off with trim_end() before it is put into the URI",
        ));
    }
    if uri.contains('\u{feff}') {
        return Err(Error::config(
            "the URI has a byte order mark in it, which is invisible: a part of it was read from a \
             file that a Windows editor saved. Save the file as UTF-8 without a byte order mark",
        ));
    }
    let (head, query) = split_query(uri);
    let authority = head.find("://").map_or(0, |at| at + 3);
    if head[authority..].contains("://") {
        return Err(Error::config(
            "the URI has :// in it twice: several servers are listed in one URI, as in \
             mongodb://first:27017,second:27017/database, and in a password : and / are \
             percent-encoded",
        ));
    }
    // Most likely the `?` belongs to a password, and the driver would take its first half for a port. The user name
    // may have an `@` of its own.
    let behind_user = head[authority..].rfind('@').map(|at| &head[authority + at..]);
    if query.contains('@') && !behind_user.is_some_and(|rest| rest.contains('/')) {
        return Err(malformed());
    }
    // A password may have a slash that is not escaped. The driver will refuse it.
    let path = match head[authority..].rfind('@') {
        Some(at) => authority + at + 1,
        None => authority,
    };
    let Some(database) = head[path..].find('/').map(|at| path + at + 1) else {
        return Ok((uri.to_owned(), None));
    };
    let names = head[database..].split_once('/');
    percent_decoded(names.map_or(&head[database..], |(name, _)| name))?;
    let Some((database_name, collection)) = names else {
        return Ok((uri.to_owned(), None));
    };
    let collection = percent_decoded(collection)?;
    if collection.contains('/') {
        return Err(Error::config(
            "the URI's path has more than two parts: it is /database or /database/collection",
        ));
    }
    let uri = format!("{}{query}", &head[..database + database_name.len()]);
    Ok((uri, Some(collection).filter(|name| !name.is_empty())))
}

/// Splits a URI before its `?`.
fn split_query(uri: &str) -> (&str, &str) {
    uri.find('?').map_or((uri, ""), |at| uri.split_at(at))
}

/// Whether the URI has this option. The case of its name does not matter.
pub(crate) fn has_option(uri: &str, name: &str) -> bool {
    options(uri).any(|pair| key(pair).eq_ignore_ascii_case(name))
}

/// The options of a URI, each as `name=value`.
pub(crate) fn options(uri: &str) -> impl Iterator<Item = &str> {
    split_query(uri).1.trim_start_matches('?').split('&').filter(|pair| !pair.is_empty())
}

fn key(pair: &str) -> &str {
    pair.split_once('=').map_or(pair, |(key, _)| key)
}

/// Decodes percent escapes. Refuses a malformed one.
pub(crate) fn percent_decoded(text: &str) -> Result<String> {
    // The crate leaves a malformed escape as it is.
    let is_escape = |after: &[u8]| after.len() >= 2 && after[..2].iter().all(u8::is_ascii_hexdigit);
    if !text.as_bytes().split(|byte| *byte == b'%').skip(1).all(is_escape) {
        return Err(Error::config(
            "the URI's path has an invalid percent escape: a % is followed by two hex digits, and \
             the character % itself is written %25",
        ));
    }
    let decoded = percent_decode_str(text).decode_utf8();
    decoded
        .map(Cow::into_owned)
        .map_err(|_| Error::config("a name in the URI's path is not UTF-8 when percent-decoded"))
}

/// Why the driver refused the URI. The driver's text is passed on only if it cannot have a piece of the URI.
pub(crate) fn unusable(uri: &str, error: &mongodb::error::Error) -> Error {
    if !uri.starts_with("mongodb://") && !uri.starts_with("mongodb+srv://") {
        return Error::config(
            "the URI does not begin with mongodb:// or mongodb+srv://: write it like \
             mongodb://localhost/app, with no quotation marks around it",
        );
    }
    let said = error::to_error("read the URI", error);
    if said.kind() == ErrorKind::Connection {
        return said;
    }
    let (head, query) = split_query(uri);
    // Some mechanisms allow an @ without a user before it.
    let head = head.replacen("://@", "://", 1);
    if let Err(error) = ConnectionString::parse(head) {
        return uri_options::reason(&error).map_or_else(malformed, |reason| refused(&reason));
    }
    let pairs: Vec<_> = options(uri).collect();
    if let Some(fault) = pairs.iter().find_map(|pair| uri_options::fault(pair)) {
        return fault;
    }
    if let Some(fault) = uri_options::oidc_fault(&pairs) {
        return fault;
    }
    let has_gap = query.len() > pairs.join("&").len() + 1;
    if has_gap {
        return Error::config(
            "the URI has a & after its ? with no option before or behind it: take it out",
        );
    }
    uri_options::reason(error).map_or_else(malformed, |reason| refused(&reason))
}

fn refused(reason: &str) -> Error {
    Error::config(format!("the driver refused the URI: {reason}"))
}

fn malformed() -> Error {
    Error::config(
        "the URI cannot be read. Its form is mongodb://user:password@host:port/database?options or \
         mongodb+srv://user:password@host/database?options, where user:password@, :port, /database \
         and ?options may be missing. In the user name and the password each of : / ? # [ ] @ % is \
         percent-encoded, the port is a number up to 65535, and the options are name=value, with & \
         between them and with @ percent-encoded",
    )
}

/// Whether this host can be looked up. The driver takes nearly any text, and the lookup would fail without saying
/// what is wrong.
pub(crate) fn is_valid_host(address: &ServerAddress) -> bool {
    match address {
        ServerAddress::Tcp { host, .. } => host.parse::<IpAddr>().is_ok() || is_valid_name(host),
        // The path of a socket.
        _ => true,
    }
}

/// Whether this is a host name. The lengths are those of
/// [RFC 1035](https://www.rfc-editor.org/rfc/rfc1035#section-2.3.4). More characters are allowed than there: service
/// names in Docker have underscores.
fn is_valid_name(name: &str) -> bool {
    // A fully qualified name ends with a dot.
    let name = name.strip_suffix('.').unwrap_or(name);
    let is_allowed = |it: char| it.is_alphanumeric() || it == '-' || it == '_';
    let is_label = |label: &str| matches!(label.len(), 1..=63) && label.chars().all(is_allowed);
    name.len() <= 253 && name.split('.').all(is_label)
}

/// Fails if a host of the URI is malformed.
pub(crate) fn check_hosts(uri: &ConnectionString) -> Result<()> {
    let are_valid = match &uri.host_info {
        HostInfo::HostIdentifiers(hosts) => hosts.iter().all(is_valid_host),
        HostInfo::DnsRecord(name) => is_valid_name(name),
        _ => true,
    };
    if are_valid {
        return Ok(());
    }
    Err(Error::config(
        "the URI has a malformed host: it has the form `name`, `name:port` or `[address]:port`, \
         and a name consists of letters, digits, hyphens, underscores and single dots. Commas \
         separate several hosts, and an @ is before the first one if there is a user name",
    ))
}

/// MongoDB's own databases. They have no change streams, and `local` is not replicated.
const INTERNAL: [&str; 3] = ["admin", "config", "local"];

/// The longest `database.collection` that [MongoDB takes](https://www.mongodb.com/docs/manual/reference/limits/#mongodb-limit-Namespace-Length).
const LONGEST_NAMESPACE: usize = 255;

/// Checks the names of a database and of a collection, from any option.
pub(crate) fn valid_namespace(database: &str, collection: &str) -> Result<()> {
    valid_database(database)?;
    valid_collection(collection)?;
    if database.len() + 1 + collection.len() > LONGEST_NAMESPACE {
        return Err(Error::config(
            "the names of the database and the collection are too long together: MongoDB takes \
             255 bytes for both and the dot between them",
        ));
    }
    Ok(())
}

pub(crate) fn valid_database(name: &str) -> Result<()> {
    if let Some(internal) = INTERNAL.iter().find(|internal| name.eq_ignore_ascii_case(internal)) {
        return Err(Error::config(format!(
            "sessions cannot be stored in `{internal}`, which is MongoDB's own database: name a \
             database of yours. If `{internal}` is where the user is known, write \
             mongodb://user:password@host/yourdb?authSource={internal}"
        )));
    }
    let malformed = name.is_empty()
        || name.len() > 63
        || name.contains(['/', '\\', '.', ' ', '"', '$'])
        || name.contains(char::is_control);
    if malformed {
        return Err(Error::config(
            "the name of the database is malformed: it has 1 to 63 bytes without / \\ . \" $, \
             space or control characters",
        ));
    }
    Ok(())
}

pub(crate) fn valid_collection(name: &str) -> Result<()> {
    let malformed = name.is_empty()
        || name.len() > 200
        || name.contains('$')
        || name.contains(char::is_control)
        || name.starts_with("system.")
        || name.starts_with('.')
        || name.ends_with('.');
    if malformed {
        return Err(Error::config(
            "the name of the collection is malformed: it has 1 to 200 bytes without $ or control \
             characters, has no dot at either end, and does not begin with `system.`",
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn said_of(uri: &str) -> String {
        let (uri, _) = match split_collection(uri) {
            Ok(split) => split,
            Err(error) => return error.to_string(),
        };
        let error = mongodb::options::ClientOptions::parse(&uri).await.expect_err(&uri);
        let said = unusable(&uri, &error);
        assert_eq!(said.kind(), ErrorKind::Config, "{said}");
        said.to_string()
    }

    #[tokio::test]
    async fn a_missing_scheme_is_reported() {
        for uri in ["localhost/app", "hunter2", "hunter2://localhost", ""] {
            let said = said_of(uri).await;
            assert!(said.contains("does not begin with mongodb://"), "{uri}: {said}");
            assert!(!said.contains("hunter2"), "{said}");
        }
    }

    #[tokio::test]
    async fn a_line_break_inside_is_reported() {
        for uri in [
            "mongodb://me:hunter2\n@host/app",
            "mongodb://me\r\n:hunter2@host/app",
            "mongodb://host/app?replicaSet=rs0\n&appName=x",
        ] {
            let said = said_of(uri).await;
            assert!(said.contains("has a line break in it") && !said.contains("hunter2"), "{said}");
        }
    }

    #[tokio::test]
    async fn a_byte_order_mark_inside_is_reported() {
        for uri in [
            "mongodb://me:\u{feff}hunter2@host/app",
            "mongodb://ho\u{feff}st/app",
            "mongodb://host/\u{feff}app",
            "mongodb://host/app?replicaSet=\u{feff}rs0",
        ] {
            let said = said_of(uri).await;
            assert!(said.contains("has a byte order mark in it"), "{said}");
            assert!(!said.contains("hunter2"), "{said}");
        }
        assert_eq!(trimmed("\u{feff} mongodb://host\r\n"), "mongodb://host");
    }

    #[tokio::test]
    async fn a_question_mark_in_a_password_is_reported() {
        for uri in [
            "mongodb://me:7712?appName=hunter2@host/app",
            "mongodb://me@corp.example:7712?appName=hunter2@host/app",
        ] {
            let said = said_of(uri).await;
            assert!(said.contains("cannot be read") && !said.contains("7712"), "{said}");
        }
        let (uri, _) = split_collection("mongodb://me:pw@host/app?appName=a%40b").unwrap();
        assert!(mongodb::options::ClientOptions::parse(&uri).await.is_ok());
    }

    #[tokio::test]
    async fn the_error_of_an_option_names_it_and_its_values() {
        const NO_FEATURE: &str = "this build of the driver does not support the URI's option";
        const OTHER: &str = "is an option of an older or another driver: take it out of the URI";
        const OIDC: &str = "`authMechanismProperties` does not fit authMechanism=MONGODB-OIDC";
        const NO_SUPPORT: &str = "the Rust driver does not support the URI's option";
        for (query, said) in [
            ("maxPoolSize=many", "`maxPoolSize` takes a whole number from 1 to 4294967295"),
            ("maxpoolsize=0", "`maxPoolSize` takes a whole number from 1"),
            ("w=majority&MAXPOOLSIZE=-1&appName=x", "`maxPoolSize` takes"),
            ("w=-1", "`w` takes a whole number of at least 0, or `majority`"),
            ("connectTimeoutMS=1s", "`connectTimeoutMS` takes a whole number of at least 0"),
            ("maxStalenessSeconds=-2", "`maxStalenessSeconds` takes a whole number of at least -1"),
            ("readPreference=often", "`readPreference` takes `primary`, `primaryPreferred`, "),
            ("readPreferenceTags=ny", "`readPreferenceTags` takes pairs key:value"),
            ("serverMonitoringMode=x", "`serverMonitoringMode` takes `auto`, `poll` or `stream`"),
            ("uuidRepresentation=standard", "`uuidRepresentation` takes `csharpLegacy`, "),
            ("journal=1&maxConnecting=x", "`journal` takes `true` or `false`"),
            ("tls=True", "`tls` takes `true` or `false`"),
            (
                "heartbeatFrequencyMS=1",
                "`heartbeatFrequencyMS` takes a whole number of at least 500",
            ),
            ("directConnection", "`directConnection` has no value"),
            ("authMechanismProperties=TOKEN:abc,SEKRET", "`authMechanismProperties` takes pairs"),
            ("authMechanism=SEKRET", "`authMechanism` takes `GSSAPI`, `MONGODB-AWS`, "),
            ("compressors=SEKRET", "`compressors` takes a list of `snappy`, `zlib` or `zstd`"),
            ("hunter2=1", "does not know"),
            ("hunter2", "does not know"),
            ("compressors=zlib", NO_FEATURE),
            ("compressors=zlib", "the feature `zlib-compression` of the crate `mongodb`"),
            ("compressors=snappy,zstd", "the feature `snappy-compression`"),
            ("zlibCompressionLevel=9", "the feature `zlib-compression`"),
            ("tlsCertificateKeyFilePassword=SEKRET", "the feature `cert-key-password`"),
            ("proxyHost=a&proxyPassword=SEKRET", "`proxyHost`: enable the feature `socks5-proxy`"),
            ("authMechanism=GSSAPI", "`authMechanism=GSSAPI`: enable the feature `gssapi-auth`"),
            ("authMechanism=MONGODB-AWS", "the feature `aws-auth`"),
            ("socketTimeoutMS=30000", NO_SUPPORT),
            ("sockettimeoutms=30000", "`socketTimeoutMS`: take it out of the URI, and set Mongo"),
            ("timeoutMS=30000", "MongoStoreBuilder::operation_timeout"),
            ("tlsAllowInvalidHostnames=true", NO_SUPPORT),
            ("tlsDisableOCSPEndpointCheck=true", NO_SUPPORT),
            ("useUnifiedTopology=true", OTHER),
            (
                "poolSize=5",
                "`poolSize` is an option of an older or another driver: write `maxPoolSize`",
            ),
            ("J=true", "`j` is an option of an older or another driver: write `journal`"),
            ("wtimeout=SEKRET", "write `wTimeoutMS`"),
            ("slaveOk=true", "reads from the primary"),
            ("sslCAFile=SEKRET", "write `tlsCAFile`"),
            ("sslcertificatekeyfile=SEKRET", "write `tlsCertificateKeyFile`"),
            ("sslPass=SEKRET", "write `tlsCertificateKeyFilePassword`"),
            ("serverSelectionTryOnce=false", "write `serverSelectionTimeoutMS`"),
            ("keepAlive=true", OTHER),
            ("autoReconnect=true", OTHER),
            ("family=4", OTHER),
            ("bufferMaxEntries", OTHER),
            ("adaptiveRetries=true", NO_SUPPORT),
            ("authMechanismProperties=A:SEKRET,", "`authMechanismProperties` takes pairs"),
            ("authMechanismProperties=", "`authMechanismProperties` takes pairs"),
            (
                "authMechanism=MONGODB-X509&authMechanismProperties=ALLOWED_HOSTS:SEKRET",
                "`authMechanismProperties` takes no `ALLOWED_HOSTS`",
            ),
            (
                "authMechanism=PLAIN&authMechanismProperties=CANONICALIZE_HOST_NAME:SEKRET",
                "`CANONICALIZE_HOST_NAME` in the URI's option `authMechanismProperties` takes `none`",
            ),
            ("authMechanism=MONGODB-OIDC&authMechanismProperties=ENVIRONMENT:SEKRET", OIDC),
            ("authMechanism=MONGODB-OIDC&authMechanismProperties=ENVIRONMENT:azure", OIDC),
            ("authMechanism=MONGODB-OIDC&authMechanismProperties=TOKEN_RESOURCE:SEKRET", OIDC),
            ("authMechanism=MONGODB-OIDC&authMechanismProperties=ENVIRONMENT:k8s,SEKRET:1", OIDC),
        ] {
            for head in ["mongodb://localhost/app", "mongodb://user:hunter2@localhost:1/app"] {
                let all = said_of(&format!("{head}?{query}")).await;
                assert!(all.contains(said), "{query}: {all}");
                assert!(!all.contains("hunter2") && !all.contains("SEKRET"), "{all}");
            }
        }
        let said = said_of("mongodb://@localhost/app?authMechanism=MONGODB-AWS").await;
        assert!(said.contains("`aws-auth`"), "{said}");
    }

    #[tokio::test]
    async fn the_drivers_reason_is_passed_on_if_it_cannot_have_a_value() {
        for (uri, reason) in [
            (
                "mongodb://a,b/app?directConnection=true",
                "multiple seeds with directConnection=true",
            ),
            ("mongodb://a,b/app?loadBalanced=true", "multiple seeds with loadBalanced=true"),
            ("mongodb://a/app?loadBalanced=true&replicaSet=SEKRET", "replicaSet with loadBalanced"),
            (
                "mongodb://a/app?loadBalanced=true&directConnection=true",
                "directConnection=true with",
            ),
            ("mongodb://a/app?appName=SEKRET&appname=SEKRET", "repeated options are not allowed"),
            ("mongodb://a/app?w=0&journal=true", "w=0 and j=true"),
            ("mongodb://a/app?authSource=", "empty authSource"),
            ("mongodb://a/app?srvMaxHosts=1", "srvMaxHosts cannot be specified with a non-SRV URI"),
            ("mongodb://a/app?srvServiceName=SEKRET", "srvServiceName cannot be specified"),
            ("mongodb+srv://a.example/app?directConnection=true", "SRV-style URI with directConn"),
            (
                "mongodb+srv://a.example/app?srvMaxHosts=1&replicaSet=b",
                "srvMaxHosts and replicaSet",
            ),
            ("mongodb+srv://a.example,b.example/app", "exactly one host"),
            ("mongodb+srv://a.example:27017/app", "a port cannot be specified with 'mongodb+srv'"),
            (
                "mongodb://a/app?readPreferenceTags=dc:SEKRET",
                "without also setting read preference",
            ),
            ("mongodb://a/app?maxStalenessSeconds=90", "without also setting read preference mode"),
            (
                "mongodb://a/app?readPreference=nearest&maxStalenessSeconds=89",
                "must be at least 90 seconds",
            ),
            ("mongodb://a/app?tls=false&tlsCAFile=SEKRET", "'tlsCAFile' can't be set if tls=false"),
            ("mongodb://a/app?tls=false&tlsInsecure=true", "tlsinsecure when TLS is disabled"),
            ("mongodb://a/app?tls=false&ssl=true", "cannot set `tls` or `ssl` if TLS is disabled"),
            ("mongodb://a/app?tlsCAFile=SEKRET&tls=false", "`tls` or `ssl` if other TLS options"),
            (
                "mongodb://a/app?tlsInsecure=true&tlsAllowInvalidCertificates=true",
                "cannot set both",
            ),
            ("mongodb://a/app?authMechanism=SCRAM-SHA-256", "No username provided for SCRAM"),
            ("mongodb://a/app?authMechanism=PLAIN", "No username provided for PLAIN"),
            ("mongodb://u@a/app?authMechanism=PLAIN", "No password provided for PLAIN"),
            (
                "mongodb://u:SEKRET@a/app?authMechanism=MONGODB-X509",
                "A password cannot be specified",
            ),
            (
                "mongodb://u:SEKRET@a/?authMechanism=MONGODB-OIDC&authMechanismProperties=ENVIRONMENT:k8s",
                "password must not be set for MONGODB-OIDC",
            ),
            ("mongodb+srv://%2Ftmp%2FSEKRET.sock/app", "unix sockets cannot be used"),
            (
                "mongodb://u@a/?authMechanism=MONGODB-X509&authSource=SEKRET",
                "only $external may be",
            ),
        ] {
            let said = said_of(uri).await;
            assert!(said.starts_with("the driver refused the URI: "), "{uri}: {said}");
            assert!(said.contains(reason) && !said.contains("SEKRET"), "{uri}: {said}");
        }
    }

    #[tokio::test]
    async fn any_other_malformed_uri_gives_the_form() {
        for uri in [
            "mongodb://admin:hunter2SECRET/app",
            "mongodb://admin:hunter2,localhost",
            "mongodb+srv://a:hunter2",
            "mongodb+srv://a:7712hunter2/x",
            "mongodb://user:7712?hunter2=x&hunter2@127.0.0.1:1/app",
            "mongodb://user:7712?appName=hunter2@127.0.0.1:1/app",
            "mongodb://user:hunter%2@127.0.0.1:1/app",
            "mongodb://:hunter2@127.0.0.1:1/app",
        ] {
            let said = said_of(uri).await;
            assert!(said.contains("mongodb://user:password@host"), "{uri}: {said}");
            assert!(!said.contains("hunter2") && !said.contains("7712"), "{said}");
        }
    }

    #[test]
    fn the_databases_of_mongodb_are_refused() {
        for name in ["admin", "config", "local", "Admin"] {
            let error = valid_database(name).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Config);
            assert!(error.to_string().contains("/yourdb?authSource="), "{error}");
        }
        for name in ["admins", "localhost", "my-config"] {
            valid_database(name).unwrap();
        }
    }

    #[test]
    fn a_percent_escape_is_two_hex_digits() {
        assert_eq!(percent_decoded("a%20b%C3%bc").unwrap(), "a bü");
        for path in ["%zz", "a/%zz", "a/%+f", "a/%", "a/%2", "%"] {
            let error = split_collection(&format!("mongodb://h/{path}")).unwrap_err();
            assert!(error.to_string().contains("invalid percent escape"), "{path}: {error}");
        }
        let error = split_collection("mongodb://h/a/%ff").unwrap_err();
        assert!(error.to_string().contains("not UTF-8"), "{error}");
    }
}
