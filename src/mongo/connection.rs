//! From what a user gives to a collection: the URI with a collection in its path, parts, or an
//! existing handle.

use std::path::PathBuf;
use std::time::Duration;

use bson::Document;
use mongodb::options::{ClientOptions, Credential, ServerAddress, Tls, TlsOptions};
use mongodb::{Client, Collection, Database};

use super::failure;
use crate::error::{Error, Result};

/// A web server has many requests in flight; the driver's own default of 10 would queue them.
const POOL: u32 = 100;
/// Connections that may be opened at a time: a burst after start-up should not wait for two by two.
const CONNECTING: u32 = 8;
const DATABASE: &str = "sessions";

/// What is known of the connection. `Debug` is left out on purpose: it holds the password.
#[derive(Clone, Default)]
pub(super) struct Connection {
    pub(super) uri: Option<String>,
    pub(super) uri_from_env: bool,
    pub(super) host: Option<String>,
    pub(super) port: Option<u16>,
    pub(super) hosts: Vec<String>,
    pub(super) replica_set: Option<String>,
    pub(super) username: Option<String>,
    pub(super) password: Option<String>,
    pub(super) auth_source: Option<String>,
    pub(super) tls: Option<bool>,
    pub(super) tls_ca_file: Option<PathBuf>,
    pub(super) max_pool_size: Option<u32>,
    pub(super) app_name: Option<String>,
    pub(super) client: Option<Client>,
    pub(super) database_handle: Option<Database>,
    pub(super) collection_handle: Option<Collection<Document>>,
    pub(super) database: Option<String>,
    pub(super) collection: Option<String>,
    pub(super) operation_timeout: Option<Duration>,
}

impl Connection {
    /// The collection, and whether its client was made here.
    pub(super) async fn collection(
        &self,
        default: &str,
        timeout: Duration,
    ) -> Result<(Collection<Document>, bool)> {
        self.check()?;
        if let Some(collection) = &self.collection_handle {
            return Ok((collection.clone(), false));
        }
        let given = self.collection.as_deref();
        if let Some(database) = &self.database_handle {
            return Ok((database.collection(valid_collection(given.unwrap_or(default))?), false));
        }
        if let Some(client) = &self.client {
            let database = self.database.clone();
            let database = database.or_else(|| Some(client.default_database()?.name().to_owned()));
            let database =
                client.database(valid_database(database.as_deref().unwrap_or(DATABASE))?);
            return Ok((database.collection(valid_collection(given.unwrap_or(default))?), false));
        }
        let (mut options, in_path) = self.client_options(timeout).await?;
        let collection = match (given, in_path) {
            (Some(given), Some(in_path)) if given != in_path => {
                return Err(Error::config(
                    "the URI's path and `collection` name two different collections: give one",
                ));
            }
            (given, in_path) => {
                given.map(str::to_owned).or(in_path).unwrap_or_else(|| default.to_owned())
            }
        };
        let database = match (&self.database, options.default_database.take()) {
            (Some(given), Some(in_uri)) if *given != in_uri => {
                return Err(Error::config(
                    "the URI and `database` name two different databases: give one",
                ));
            }
            (given, in_uri) => given.clone().or(in_uri).unwrap_or_else(|| DATABASE.to_owned()),
        };
        let (database, collection) = (valid_database(&database)?, valid_collection(&collection)?);
        let client = Client::with_options(options)
            .map_err(|error| failure::failure("open the connection", &error))?;
        Ok((client.database(database).collection(collection), true))
    }

    /// Options that contradict each other.
    fn check(&self) -> Result<()> {
        let parts = self.host.is_some() || self.port.is_some() || !self.hosts.is_empty();
        let given = [
            ("a URI", self.uri.is_some() || self.uri_from_env),
            ("`host`, `hosts` or `port`", parts),
            ("`client`", self.client.is_some()),
            ("`database_handle`", self.database_handle.is_some()),
            ("`collection_handle`", self.collection_handle.is_some()),
        ];
        let given: Vec<_> =
            given.iter().filter(|(_, given)| *given).map(|(name, _)| *name).collect();
        if given.len() > 1 {
            return Err(Error::config(format!(
                "{} were given; the connection is described by one of them",
                given.join(" and ")
            )));
        }
        if self.uri.is_some() && self.uri_from_env {
            return Err(Error::config("both `uri` and `uri_from_env` were given; take one"));
        }
        if self.host.is_some() && !self.hosts.is_empty() {
            return Err(Error::config(
                "both `host` and `hosts` were given; put the host into `hosts`",
            ));
        }
        let existing = self.client.is_some()
            || self.database_handle.is_some()
            || self.collection_handle.is_some();
        let of_a_new_client = [
            ("username", self.username.is_some()),
            ("password", self.password.is_some()),
            ("auth_source", self.auth_source.is_some()),
            ("tls", self.tls.is_some()),
            ("tls_ca_file", self.tls_ca_file.is_some()),
            ("replica_set", self.replica_set.is_some()),
            ("max_pool_size", self.max_pool_size.is_some()),
            ("app_name", self.app_name.is_some()),
        ];
        if let Some((name, _)) = of_a_new_client.iter().find(|(_, given)| existing && *given) {
            return Err(Error::config(format!(
                "`{name}` was given with an existing client, which has its own: set it there"
            )));
        }
        if self.collection_handle.is_some()
            && (self.collection.is_some() || self.database.is_some())
            || self.database_handle.is_some() && self.database.is_some()
        {
            return Err(Error::config(
                "a name was given for what an existing handle names already: leave the name out",
            ));
        }
        if self.password.is_some() && self.username.is_none() {
            return Err(Error::config("`password` was given without `username`"));
        }
        if self.auth_source.is_some() && self.username.is_none() {
            return Err(Error::config(
                "`auth_source` was given without `username`; in a URI write ?authSource=…",
            ));
        }
        if self.tls == Some(false) && self.tls_ca_file.is_some() {
            return Err(Error::config("`tls_ca_file` was given though `tls` is switched off"));
        }
        Ok(())
    }

    /// The driver's options, and the collection in the URI's path.
    async fn client_options(&self, timeout: Duration) -> Result<(ClientOptions, Option<String>)> {
        let (mut options, collection) = match self.uri()? {
            Some(uri) => {
                let (uri, collection) = split_collection(&uri)?;
                let parsed = tokio::time::timeout(timeout, ClientOptions::parse(&uri)).await;
                let parsed = parsed.map_err(|_| crate::tasks::timed_out(timeout))?;
                (parsed.map_err(|error| unusable_uri(&uri, &error))?, collection)
            }
            None => (ClientOptions::builder().hosts(self.addresses()?).build(), None),
        };
        if let Some(username) = &self.username {
            if options.credential.is_some() {
                return Err(Error::config(
                    "both the URI and `username` give credentials: take them out of one",
                ));
            }
            options.credential = Some(
                Credential::builder()
                    .username(username.clone())
                    .password(self.password.clone())
                    .source(self.auth_source.clone())
                    .build(),
            );
        }
        if self.tls == Some(false) {
            options.tls = Some(Tls::Disabled);
        } else if self.tls.is_some() || self.tls_ca_file.is_some() {
            let mut tls = match options.tls.take() {
                Some(Tls::Enabled(tls)) => tls,
                _ => TlsOptions::default(),
            };
            tls.ca_file_path = self.tls_ca_file.clone().or(tls.ca_file_path);
            options.tls = Some(Tls::Enabled(tls));
        }
        if self.replica_set.is_some() {
            options.repl_set_name.clone_from(&self.replica_set);
        }
        if self.app_name.is_some() {
            options.app_name.clone_from(&self.app_name);
        }
        options.max_pool_size = self.max_pool_size.or(options.max_pool_size).or(Some(POOL));
        options.max_connecting = options.max_connecting.or(Some(CONNECTING));
        options.server_selection_timeout = options.server_selection_timeout.or(Some(timeout));
        options.connect_timeout = options.connect_timeout.or(Some(timeout));
        Ok((options, collection))
    }

    fn uri(&self) -> Result<Option<String>> {
        if !self.uri_from_env {
            return Ok(self.uri.clone());
        }
        let uri = std::env::var("MONGODB_URI").ok().filter(|uri| !uri.is_empty());
        uri.map(Some).ok_or_else(|| {
            Error::config(
                "the environment variable MONGODB_URI is not set, is empty or is no UTF-8: set it \
                 to something like mongodb://localhost/app",
            )
        })
    }

    fn addresses(&self) -> Result<Vec<ServerAddress>> {
        let port = self.port.unwrap_or(27017);
        if self.hosts.is_empty() {
            let host = self.host.as_deref().unwrap_or("127.0.0.1");
            return Ok(vec![self.address(host, port)?]);
        }
        self.hosts.iter().map(|host| self.address(host, port)).collect()
    }

    fn address(&self, host: &str, port: u16) -> Result<ServerAddress> {
        if host.contains("://") {
            return Err(Error::config(
                "a host is a name or address, with a port or without: of several URIs make one, \
                 mongodb://first,second/database",
            ));
        }
        let mut address = ServerAddress::parse(host).map_err(|_| {
            Error::config("a host must have the form `name`, `name:port` or `[address]:port`")
        })?;
        if let ServerAddress::Tcp { port: own, .. } = &mut address {
            if own.is_some() && self.port.is_some() && self.hosts.is_empty() {
                return Err(Error::config("the port stands in both `host` and `port`: give one"));
            }
            own.get_or_insert(port);
        }
        Ok(address)
    }
}

/// Takes the collection, the second part of the path, out of a URI.
fn split_collection(uri: &str) -> Result<(String, Option<String>)> {
    let authority = uri.find("://").map_or(0, |at| at + 3);
    let (head, query) = match uri[authority..].find('?') {
        Some(at) => uri.split_at(authority + at),
        None => (uri, ""),
    };
    // A password may hold a slash that should have been escaped: the driver will say so.
    let path = match head[authority..].rfind('@') {
        Some(at) => authority + at + 1,
        None => authority,
    };
    let Some(database) = head[path..].find('/').map(|at| path + at + 1) else {
        return Ok((uri.to_owned(), None));
    };
    let Some(collection) = head[database..].find('/').map(|at| database + at) else {
        return Ok((uri.to_owned(), None));
    };
    let name = percent_decoded(&head[collection + 1..])
        .ok_or_else(|| Error::config("the collection in the URI's path is not valid UTF-8"))?;
    if name.contains('/') {
        return Err(Error::config(
            "the URI's path has more than two parts: it is /database or /database/collection",
        ));
    }
    Ok((format!("{}{query}", &head[..collection]), Some(name).filter(|name| !name.is_empty())))
}

fn percent_decoded(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let [first, after @ ..] = rest {
        if let (b'%', Some(hex)) = (*first, after.get(..2)) {
            bytes.push(u8::from_str_radix(std::str::from_utf8(hex).ok()?, 16).ok()?);
            rest = &after[2..];
        } else {
            bytes.push(*first);
            rest = after;
        }
    }
    String::from_utf8(bytes).ok()
}

/// The driver's text is worth having, but it may quote a piece of the password.
fn unusable_uri(uri: &str, error: &mongodb::error::Error) -> Error {
    let said = failure::failure("read the URI", error);
    let authority = uri.split_once("://").map_or(uri, |(_, rest)| rest);
    let secret = authority.rfind('@').map_or("", |at| &authority[..at]);
    let quoted = secret
        .split([':', '@', '/', '?', '#', '[', ']', ','])
        .any(|piece| !piece.is_empty() && said.to_string().contains(piece));
    if quoted {
        return Error::config(
            "the URI cannot be read: in the user name and the password each of : / ? # [ ] @ % must \
             be percent-encoded",
        );
    }
    said
}

fn valid_database(name: &str) -> Result<&str> {
    if name.is_empty() || name.len() > 63 || name.contains(['/', '\\', '.', ' ', '"', '$', '\0']) {
        return Err(Error::config(format!(
            "{name:?} is no name for a database: 1 to 63 bytes without / \\ . \" $, space or NUL"
        )));
    }
    Ok(name)
}

fn valid_collection(name: &str) -> Result<&str> {
    let malformed = name.is_empty()
        || name.len() > 200
        || name.contains(['$', '\0'])
        || name.starts_with("system.")
        || name.starts_with('.')
        || name.ends_with('.');
    if malformed {
        return Err(Error::config(format!(
            "{name:?} is no name for a collection: 1 to 200 bytes without $ or NUL, with no dot at \
             either end, and not of the server's own `system.`"
        )));
    }
    Ok(name)
}
