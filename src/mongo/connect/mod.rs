//! `Connection`: the connection options of the builder, and the collection that they lead to. The options are a URI
//! with the collection in its path, its parts, or an existing handle.

pub(crate) mod client_state;
pub(crate) mod probe;
pub(crate) mod uri;
pub(crate) mod uri_options;
pub(crate) mod validate;

use std::future::Future;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use bson::Document;
use mongodb::options::{
    ClientOptions, ConnectionString, Credential, ServerAddress, Tls, TlsOptions,
};
use mongodb::{Client, Collection, Database};

use crate::error::{Error, ErrorKind, Result};
use crate::mongo::connect::uri::{
    check_hosts, has_option, is_valid_host, options as options_of, split_collection, trimmed,
    unusable, valid_database, valid_namespace,
};
use crate::mongo::connect::uri_options::{unusable_mechanism, warn_of_no_effect};
use crate::mongo::error;

/// The default pool size. A web server has many requests at a time; the driver's default of 10 would queue them.
const POOL: u32 = 100;
/// The default number of connections that may be opened at a time. The driver's default of 2 would delay the burst
/// after a start.
const CONNECTING: u32 = 8;
/// The default database.
const DATABASE: &str = "sessions";

/// The connection options, as they were given. It has no `Debug` on purpose, because it has the password.
#[derive(Clone, Default)]
pub(crate) struct Connection {
    pub(crate) uri: Option<String>,
    pub(crate) uri_from_env: bool,
    pub(crate) host: Option<String>,
    pub(crate) port: Option<u16>,
    pub(crate) hosts: Option<Vec<String>>,
    pub(crate) replica_set: Option<String>,
    pub(crate) username: Option<String>,
    pub(crate) password: Option<String>,
    pub(crate) auth_source: Option<String>,
    pub(crate) tls: Option<bool>,
    pub(crate) tls_ca_file: Option<PathBuf>,
    pub(crate) max_pool_size: Option<u32>,
    pub(crate) app_name: Option<String>,
    pub(crate) client: Option<Client>,
    pub(crate) database_handle: Option<Database>,
    pub(crate) collection_handle: Option<Collection<Document>>,
    pub(crate) database: Option<String>,
    pub(crate) collection: Option<String>,
    pub(crate) operation_timeout: Option<Duration>,
}

impl Connection {
    /// Returns the collection, and the pool size of its client if the client was made here.
    pub(crate) async fn collection(
        &self,
        default: &str,
        timeout: Duration,
    ) -> Result<(Collection<Document>, Option<u32>)> {
        self.check()?;
        if let Some(collection) = &self.collection_handle {
            let namespace = collection.namespace();
            valid_namespace(&namespace.db, &namespace.coll)?;
            return Ok((collection.clone(), None));
        }
        let given = self.collection.as_deref();
        if let Some(database) = &self.database_handle {
            let collection = given.unwrap_or(default);
            valid_namespace(database.name(), collection)?;
            return Ok((database.collection(collection), None));
        }
        if let Some(client) = &self.client {
            let database = self.database.clone();
            let database = database.or_else(|| Some(client.default_database()?.name().to_owned()));
            let database = database.as_deref().unwrap_or(DATABASE);
            let collection = given.unwrap_or(default);
            valid_namespace(database, collection)?;
            return Ok((client.database(database).collection(collection), None));
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
                valid_database(&in_uri)?;
                return Err(Error::config(
                    "the URI and `database` name two different databases: give one",
                ));
            }
            (given, in_uri) => given.clone().or(in_uri).unwrap_or_else(|| DATABASE.to_owned()),
        };
        valid_namespace(&database, &collection)?;
        self.check_tls_files(options.tls.as_ref())?;
        let pool = options.max_pool_size.unwrap_or(POOL);
        let client = Client::with_options(options)
            .map_err(|error| error::to_error("open the connection", &error))?;
        Ok((client.database(&database).collection(&collection), Some(pool)))
    }

    /// Refuses options that contradict each other.
    fn check(&self) -> Result<()> {
        let parts = self.host.is_some() || self.port.is_some() || self.hosts.is_some();
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
                "{} were given: describe the connection by one of them",
                given.join(" and ")
            )));
        }
        if self.uri.is_some() && self.uri_from_env {
            return Err(Error::config("both `uri` and `uri_from_env` were given; take one"));
        }
        if self.host.is_some() && self.hosts.is_some() {
            return Err(Error::config(
                "both `host` and `hosts` were given; put the host into `hosts`",
            ));
        }
        if self.hosts.as_ref().is_some_and(Vec::is_empty) {
            return Err(Error::config("`hosts` was given no host: give at least one"));
        }
        if self.max_pool_size == Some(0) {
            return Err(Error::config("`max_pool_size` must be at least 1"));
        }
        let existing = self.client.is_some()
            || self.database_handle.is_some()
            || self.collection_handle.is_some();
        let client_options = [
            ("username", self.username.is_some()),
            ("password", self.password.is_some()),
            ("auth_source", self.auth_source.is_some()),
            ("tls", self.tls.is_some()),
            ("tls_ca_file", self.tls_ca_file.is_some()),
            ("replica_set", self.replica_set.is_some()),
            ("max_pool_size", self.max_pool_size.is_some()),
            ("app_name", self.app_name.is_some()),
        ];
        if let Some((name, _)) = client_options.iter().find(|(_, given)| existing && *given) {
            return Err(Error::config(format!(
                "`{name}` was given with an existing client, which has its own: set it there"
            )));
        }
        if self.collection_handle.is_some()
            && (self.collection.is_some() || self.database.is_some())
            || self.database_handle.is_some() && self.database.is_some()
        {
            return Err(Error::config(
                "`database` or `collection` was given, but the existing handle already names it: \
                 leave it out",
            ));
        }
        self.check_ends()?;
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

    /// Refuses a line break at the end and a byte order mark at the beginning, as a value from a file may have.
    /// They are not removed, because they may belong to the value: the result would be a wrong password without a
    /// visible reason.
    fn check_ends(&self) -> Result<()> {
        let file = self.tls_ca_file.as_ref().and_then(|path| path.to_str());
        for (name, value) in [
            ("username", self.username.as_deref()),
            ("password", self.password.as_deref()),
            ("auth_source", self.auth_source.as_deref()),
            ("replica_set", self.replica_set.as_deref()),
            ("app_name", self.app_name.as_deref()),
            ("database", self.database.as_deref()),
            ("collection", self.collection.as_deref()),
            ("tls_ca_file", file),
        ] {
            if value.is_some_and(|value| value.starts_with('\u{feff}')) {
                return Err(Error::config(format!(
                    "`{name}` begins with a byte order mark, as a file that a Windows editor \
                     saved does: save it as UTF-8 without a byte order mark, or take the mark off \
                     with trim_start_matches('\\u{{feff}}')"
                )));
            }
            if value.is_some_and(|value| value.ends_with(['\n', '\r'])) {
                return Err(Error::config(format!(
                    "`{name}` ends with a line break, as what is read from a file does: take it \
                     off with trim_end()"
                )));
            }
        }
        Ok(())
    }

    /// Returns the driver's options, and the collection in the path of the URI.
    async fn client_options(&self, timeout: Duration) -> Result<(ClientOptions, Option<String>)> {
        let uri = self.uri()?;
        let (mut options, collection) = match &uri {
            Some(uri) => {
                let (uri, collection) = split_collection(uri)?;
                // `ClientOptions::parse` may ask a name server, so the URI is checked before it.
                match ConnectionString::parse(&uri) {
                    Ok(parsed) => check_hosts(&parsed)?,
                    Err(error) => return Err(unusable(&uri, &error)),
                }
                match resolved(ClientOptions::parse(&uri).into_future(), timeout).await? {
                    Ok(options) => {
                        if let Some(error) =
                            options.credential.as_ref().and_then(unusable_mechanism)
                        {
                            return Err(error);
                        }
                        options_of(&uri).for_each(warn_of_no_effect);
                        (options, collection)
                    }
                    Err(error) => return Err(unusable(&uri, &error)),
                }
            }
            None => (ClientOptions::builder().hosts(self.addresses()?).build(), None),
        };
        // A proxy resolves the names itself.
        if !uri.as_ref().is_some_and(|uri| has_option(uri, "proxyhost")) {
            let timeout = timeout.mul_f64(0.9);
            lookup(&options.hosts, timeout, |host| tokio::net::lookup_host((host, 0))).await?;
        }
        if let Some(username) = &self.username {
            if options.credential.is_some() {
                return Err(Error::config(
                    "both the URI and `username` give credentials: take them out of one",
                ));
            }
            if uri.is_some_and(|uri| has_option(&uri, "authsource")) {
                return Err(Error::config(
                    "the URI has an authSource but no user name, and `username` was given: give \
                     `auth_source` in place of the URI's authSource",
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
        options.tls = self.tls(options.tls.take())?;
        options.repl_set_name =
            one_of("replica_set", self.replica_set.clone(), options.repl_set_name)?;
        options.app_name = one_of("app_name", self.app_name.clone(), options.app_name)?;
        options.max_pool_size =
            one_of("max_pool_size", self.max_pool_size, options.max_pool_size)?.or(Some(POOL));
        options.max_connecting = options.max_connecting.or(Some(CONNECTING));
        // Shorter than the operation timeout, so that a call gets the error that no server was found, and not just a
        // timeout.
        options.server_selection_timeout =
            options.server_selection_timeout.or(Some(timeout.mul_f64(0.9)));
        options.connect_timeout = options.connect_timeout.or(Some(timeout));
        Ok((options, collection))
    }

    fn tls(&self, in_uri: Option<Tls>) -> Result<Option<Tls>> {
        let wanted = self.tls.or(self.tls_ca_file.is_some().then_some(true));
        match (wanted, in_uri) {
            (Some(false), Some(Tls::Enabled(_))) => Err(Error::config(
                "`tls` is switched off, but the URI switches it on (a mongodb+srv:// URI does so \
                 unless it has tls=false): change one of them",
            )),
            (Some(true), Some(Tls::Disabled)) => Err(Error::config(
                "the URI switches TLS off, and `tls` or `tls_ca_file` was given: change one of them",
            )),
            (Some(false), _) => Ok(Some(Tls::Disabled)),
            (Some(true), in_uri) => {
                let mut tls = match in_uri {
                    Some(Tls::Enabled(tls)) => tls,
                    _ => TlsOptions::default(),
                };
                tls.ca_file_path =
                    one_of("tls_ca_file", self.tls_ca_file.clone(), tls.ca_file_path)?;
                Ok(Some(Tls::Enabled(tls)))
            }
            (None, in_uri) => Ok(in_uri),
        }
    }

    /// Reads the TLS files before the driver does. The driver reports a missing key file as a lost connection, and
    /// takes a directory or an empty file for an empty list of authorities.
    fn check_tls_files(&self, tls: Option<&Tls>) -> Result<()> {
        let Some(Tls::Enabled(tls)) = tls else { return Ok(()) };
        if let Some(path) = &tls.ca_file_path {
            let option = if self.tls_ca_file.is_some() { "tls_ca_file" } else { "tlsCAFile" };
            let pem = read_file(option, path)?;
            if pem.is_some_and(|pem| !holds(&pem, b"-----BEGIN CERTIFICATE-----")) {
                return Err(Error::config(format!(
                    "the file of `{option}` holds no certificate: give a PEM file with at least \
                     one -----BEGIN CERTIFICATE----- block"
                )));
            }
        }
        if let Some(path) = &tls.cert_key_file_path {
            read_file("tlsCertificateKeyFile", path)?;
        }
        Ok(())
    }

    fn uri(&self) -> Result<Option<String>> {
        if !self.uri_from_env {
            return Ok(self.uri.as_deref().map(|uri| trimmed(uri).to_owned()));
        }
        let uri = std::env::var("MONGODB_URI").ok().map(|uri| trimmed(&uri).to_owned());
        uri.filter(|uri| !uri.is_empty()).map(Some).ok_or_else(|| {
            Error::config(
                "the environment variable MONGODB_URI is not set, is empty or is no UTF-8: set it \
                 to something like mongodb://localhost/app",
            )
        })
    }

    fn addresses(&self) -> Result<Vec<ServerAddress>> {
        let port = self.port.unwrap_or(27017);
        if let Some(hosts) = &self.hosts {
            return hosts.iter().map(|host| self.address(host, port)).collect();
        }
        let host = self.host.as_deref().unwrap_or("127.0.0.1");
        Ok(vec![self.address(host, port)?])
    }

    fn address(&self, host: &str, port: u16) -> Result<ServerAddress> {
        let host = trimmed(host);
        if host.contains("://") {
            return Err(Error::config(
                "a host is a name or an address, with or without a port: write several URIs as \
                 one, mongodb://first,second/database",
            ));
        }
        let parsed = ServerAddress::parse(host).ok().filter(is_valid_host);
        let mut address = parsed.ok_or_else(|| {
            Error::config(
                "a host must have the form `name`, `name:port` or `[address]:port`, and a name \
                 consists of letters, digits, hyphens, underscores and single dots: give several \
                 to `hosts`, and a user to `username` and `password`",
            )
        })?;
        if let ServerAddress::Tcp { port: own, .. } = &mut address {
            if own.is_some() && self.port.is_some() && self.hosts.is_none() {
                return Err(Error::config("both `host` and `port` have a port: give one"));
            }
            own.get_or_insert(port);
        }
        Ok(address)
    }
}

/// Reads the file; `None` if it is a pipe, which can be read only once.
fn read_file(option: &str, path: &Path) -> Result<Option<Vec<u8>>> {
    let unreadable = |reason: &dyn std::fmt::Display| {
        Error::config(format!(
            "the file of `{option}` cannot be read: {reason}. Is the path right? A relative one \
             begins at the working directory of the app"
        ))
    };
    let metadata = std::fs::metadata(path).map_err(|error| unreadable(&error))?;
    if metadata.is_dir() {
        return Err(unreadable(&"it is a directory"));
    }
    if !metadata.is_file() {
        return Ok(None);
    }
    std::fs::read(path).map(Some).map_err(|error| unreadable(&error))
}

fn holds(bytes: &[u8], part: &[u8]) -> bool {
    bytes.windows(part.len()).any(|window| window == part)
}

/// Limits the time of `ClientOptions::parse`, which waits only for the name server of a `mongodb+srv://` URI.
async fn resolved<T>(parse: impl Future<Output = T>, timeout: Duration) -> Result<T> {
    tokio::time::timeout(timeout, parse).await.map_err(|_| {
        Error::new(
            ErrorKind::Connection,
            format!("the host of the mongodb+srv:// URI {}", unresolved(timeout)),
        )
    })
}

fn unresolved(timeout: Duration) -> String {
    format!(
        "was not resolved, since no name server answered within {timeout:?}: does DNS work here, \
         and are its name servers reachable?"
    )
}

/// Fails if no name server replies about any host. The driver would only report that the host does not answer. If a
/// name server does reply, the driver gets the same reply, and tries again while it has time.
async fn lookup<F, T>(
    hosts: &[ServerAddress],
    timeout: Duration,
    resolve: impl Fn(String) -> F,
) -> Result<()>
where
    F: Future<Output = T> + Send + 'static,
    T: Send + 'static,
{
    let mut lookups = tokio::task::JoinSet::new();
    let mut names = Vec::new();
    for host in hosts {
        match host {
            ServerAddress::Tcp { host, .. } if host.parse::<IpAddr>().is_err() => {
                let lookup = resolve(host.clone());
                lookups.spawn(async move {
                    let _ = lookup.await;
                });
                names.push(host.as_str());
            }
            // An address or a socket needs no name server.
            _ => return Ok(()),
        }
    }
    if tokio::time::timeout(timeout, lookups.join_next()).await.is_ok() {
        return Ok(());
    }
    Err(Error::new(
        ErrorKind::Connection,
        format!("the name {} {}", names.join(", "), unresolved(timeout)),
    ))
}

/// Returns the value of the setter or that of the URI. Fails if they differ.
fn one_of<T: PartialEq>(setter: &str, given: Option<T>, in_uri: Option<T>) -> Result<Option<T>> {
    match (given, in_uri) {
        (Some(given), Some(in_uri)) if given != in_uri => {
            Err(Error::config(format!("the URI and `{setter}` have different values: give one")))
        }
        (given, in_uri) => Ok(given.or(in_uri)),
    }
}

#[cfg(test)]
mod tests {
    use std::future::pending;

    use super::*;

    const TIMEOUT: Duration = Duration::from_secs(5);

    #[tokio::test(start_paused = true)]
    async fn a_silent_name_server_is_reported_as_such() {
        let start = tokio::time::Instant::now();
        let error = resolved(pending::<()>(), TIMEOUT).await.unwrap_err();
        assert_eq!(start.elapsed(), TIMEOUT);
        assert_eq!(error.kind(), ErrorKind::Connection);
        assert_eq!(
            error.to_string(),
            "the host of the mongodb+srv:// URI was not resolved, since no name server answered \
             within 5s: does DNS work here, and are its name servers reachable?"
        );
    }

    async fn looked_up(hosts: &[&str], silent: bool) -> Result<()> {
        let hosts: Vec<_> = hosts.iter().map(|host| ServerAddress::parse(host).unwrap()).collect();
        lookup(&hosts, TIMEOUT, |host| async move {
            if silent || host == "silent" {
                pending::<()>().await;
            }
        })
        .await
    }

    #[tokio::test(start_paused = true)]
    async fn the_error_of_a_silent_name_server_names_the_hosts() {
        let start = tokio::time::Instant::now();
        let error = looked_up(&["first:1", "second"], true).await.unwrap_err();
        assert_eq!(start.elapsed(), TIMEOUT);
        assert_eq!(error.kind(), ErrorKind::Connection);
        assert!(
            error.to_string().starts_with("the name first, second was not resolved"),
            "{error}"
        );
        let start = tokio::time::Instant::now();
        for hosts in [&["127.0.0.1"][..], &["[::1]:1"], &["first", "10.0.0.1:1"], &["/tmp/a.sock"]]
        {
            looked_up(hosts, true).await.unwrap();
        }
        looked_up(&["silent", "answers"], false).await.unwrap();
        assert_eq!(start.elapsed(), Duration::ZERO);
    }
}
