//! What a connection string says, and what is wrong with it, in words that never quote it: any
//! piece of a malformed one may be a piece of the password.

use mongodb::options::{ClientOptions, ConnectionString};

use super::failure;
use crate::error::{Error, ErrorKind, Result};

/// The options that an error may name, as the manual spells them.
const OPTIONS: [&str; 39] = [
    "appName",
    "authMechanism",
    "authMechanismProperties",
    "authSource",
    "compressors",
    "connectTimeoutMS",
    "directConnection",
    "enableOverloadRetargeting",
    "heartbeatFrequencyMS",
    "journal",
    "loadBalanced",
    "localThresholdMS",
    "maxAdaptiveRetries",
    "maxConnecting",
    "maxIdleTimeMS",
    "maxPoolSize",
    "maxStalenessSeconds",
    "minPoolSize",
    "readConcernLevel",
    "readPreference",
    "readPreferenceTags",
    "replicaSet",
    "retryReads",
    "retryWrites",
    "serverMonitoringMode",
    "serverSelectionTimeoutMS",
    "socketTimeoutMS",
    "srvMaxHosts",
    "srvServiceName",
    "ssl",
    "tls",
    "tlsAllowInvalidCertificates",
    "tlsCAFile",
    "tlsCertificateKeyFile",
    "tlsCertificateKeyFilePassword",
    "tlsInsecure",
    "w",
    "waitQueueTimeoutMS",
    "wTimeoutMS",
];

/// Takes the collection, the second part of the path, out of a URI.
pub(super) fn split_collection(uri: &str) -> Result<(String, Option<String>)> {
    let (head, query) = split_query(uri);
    let authority = head.find("://").map_or(0, |at| at + 3);
    if head[authority..].contains("://") {
        return Err(Error::config(
            "the URI has :// in it twice: several servers are listed in one URI, as in \
             mongodb://first:27017,second:27017/database, and in a password : and / are \
             percent-encoded",
        ));
    }
    if query.contains('@') && !head[authority..].contains('@') {
        // Most likely the `?` belongs to a password, whose first half would be taken for a port.
        return Err(malformed());
    }
    // A password may hold a slash that should have been escaped: the driver will say so.
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

/// What stands before the `?`, and the rest with it.
fn split_query(uri: &str) -> (&str, &str) {
    uri.find('?').map_or((uri, ""), |at| uri.split_at(at))
}

/// Whether the URI gives this option, which is in lower case here and in any case there.
pub(super) fn has_option(uri: &str, name: &str) -> bool {
    options(uri).any(|pair| key(pair).eq_ignore_ascii_case(name))
}

fn options(uri: &str) -> impl Iterator<Item = &str> {
    split_query(uri).1.trim_start_matches('?').split('&').filter(|pair| !pair.is_empty())
}

fn key(pair: &str) -> &str {
    pair.split_once('=').map_or(pair, |(key, _)| key)
}

fn percent_decoded(text: &str) -> Result<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let [first, after @ ..] = rest {
        rest = after;
        if *first != b'%' {
            bytes.push(*first);
            continue;
        }
        let digit = |at: usize| char::from(*after.get(at)?).to_digit(16);
        let (Some(high), Some(low)) = (digit(0), digit(1)) else {
            return Err(Error::config(
                "the URI's path has an invalid percent escape: a % is followed by two hex digits, \
                 and the character % itself is written %25",
            ));
        };
        bytes.extend(u8::try_from(high * 16 + low));
        rest = &after[2..];
    }
    String::from_utf8(bytes)
        .map_err(|_| Error::config("a name in the URI's path is not UTF-8 when percent-decoded"))
}

/// Why the driver could not read the URI. What the driver says itself is not passed on.
pub(super) async fn unusable(uri: &str, error: &mongodb::error::Error) -> Error {
    if !uri.starts_with("mongodb://") && !uri.starts_with("mongodb+srv://") {
        return Error::config(
            "the URI does not begin with mongodb:// or mongodb+srv://: write it like \
             mongodb://localhost/app, with no quotation marks around it",
        );
    }
    let (head, _) = split_query(uri);
    let said = failure::failure("read the URI", error);
    if said.kind() == ErrorKind::Connection {
        return said;
    }
    if !is_readable(head).await {
        return malformed();
    }
    let pairs: Vec<_> = options(uri).collect();
    let has_gap = split_query(uri).1.len() > pairs.join("&").len() + 1;
    if has_gap && is_readable(&format!("{head}?{}", pairs.join("&"))).await {
        return Error::config(
            "the URI has a & after its ? with no option before or behind it: take it out",
        );
    }
    // The one without which the rest is right; or else the first that is wrong by itself.
    for (at, pair) in pairs.iter().enumerate() {
        let mut others = pairs.clone();
        others.remove(at);
        if is_readable(&format!("{head}?{}", others.join("&"))).await {
            return option(pair);
        }
    }
    for pair in pairs {
        if !is_readable(&format!("{head}?{pair}")).await {
            return option(pair);
        }
    }
    malformed()
}

/// Whether the driver takes it, without asking any server.
async fn is_readable(uri: &str) -> bool {
    match ConnectionString::parse(uri) {
        Ok(_) if uri.starts_with("mongodb+srv:") => true,
        Ok(_) => ClientOptions::parse(uri).await.is_ok(),
        Err(_) => false,
    }
}

fn option(pair: &str) -> Error {
    match OPTIONS.iter().find(|name| name.eq_ignore_ascii_case(key(pair))) {
        Some(name) if pair.contains('=') => Error::config(format!(
            "the URI's option `{name}` has no valid value, or does not go with the other options"
        )),
        Some(name) => Error::config(format!("the URI's option `{name}` has no value")),
        None => Error::config(
            "the URI has an option after its ? that the driver does not know: they have the form \
             ?name=value&name=value, and a ? in the user name or password is written %3F",
        ),
    }
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

pub(super) fn valid_database(name: &str) -> Result<&str> {
    let malformed = name.is_empty()
        || name.len() > 63
        || name.contains(['/', '\\', '.', ' ', '"', '$'])
        || name.contains(char::is_control);
    if malformed {
        return Err(Error::config(
            "what was given is no name for a database: 1 to 63 bytes without / \\ . \" $, space or \
             control characters",
        ));
    }
    Ok(name)
}

pub(super) fn valid_collection(name: &str) -> Result<&str> {
    let malformed = name.is_empty()
        || name.len() > 200
        || name.contains('$')
        || name.contains(char::is_control)
        || name.starts_with("system.")
        || name.starts_with('.')
        || name.ends_with('.');
    if malformed {
        return Err(Error::config(
            "what was given is no name for a collection: 1 to 200 bytes without $ or control \
             characters, with no dot at either end, and not of the server's own `system.`",
        ));
    }
    Ok(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn said_of(uri: &str) -> String {
        let (uri, _) = match split_collection(uri) {
            Ok(split) => split,
            Err(error) => return error.to_string(),
        };
        let error = ClientOptions::parse(&uri).await.unwrap_err();
        let said = unusable(&uri, &error).await;
        assert_eq!(said.kind(), ErrorKind::Config, "{said}");
        said.to_string()
    }

    #[tokio::test]
    async fn a_missing_scheme_is_named() {
        for uri in ["localhost/app", "hunter2", "hunter2://localhost", ""] {
            let said = said_of(uri).await;
            assert!(said.contains("does not begin with mongodb://"), "{uri}: {said}");
            assert!(!said.contains("hunter2"), "{said}");
        }
    }

    #[tokio::test]
    async fn an_option_that_is_wrong_is_named() {
        for (query, name) in [
            ("maxPoolSize=many", "`maxPoolSize`"),
            ("maxpoolsize=0", "`maxPoolSize`"),
            ("w=majority&MAXPOOLSIZE=-1&appName=x", "`maxPoolSize`"),
            ("readPreference=often", "`readPreference`"),
            ("readPreferenceTags=dc:ny", "`readPreferenceTags`"),
            ("journal=1&maxConnecting=x", "`journal`"),
            ("heartbeatFrequencyMS=1", "`heartbeatFrequencyMS`"),
            ("directConnection", "`directConnection` has no value"),
            ("authMechanismProperties=AWS_SESSION_TOKEN:abc,SEKRET", "`authMechanismProperties`"),
            ("hunter2=1", "does not know"),
            ("hunter2", "does not know"),
        ] {
            for head in ["mongodb://localhost/app", "mongodb://user:hunter2@localhost:1/app"] {
                let said = said_of(&format!("{head}?{query}")).await;
                assert!(said.contains(name), "{query}: {said}");
                assert!(!said.contains("hunter2") && !said.contains("SEKRET"), "{said}");
            }
        }
    }

    #[tokio::test]
    async fn all_else_is_met_with_the_form() {
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
