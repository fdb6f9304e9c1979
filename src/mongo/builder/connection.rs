//! The options of the builder that choose the server, the database and the collection.

use std::path::PathBuf;

use mongodb::{Client, Collection, Database};

use crate::mongo::builder::MongoStoreBuilder;

impl MongoStoreBuilder {
    /// The connection string, `mongodb://` or `mongodb+srv://`. The path names the database, and may name the
    /// collection after it: `mongodb://user:pass@host:port/database/collection`.
    ///
    /// White space around the string and a byte order mark are ignored: a file may end with a line break, or begin
    /// with the mark.
    ///
    /// The database must not be `admin`, `config` or `local`. If a hosted MongoDB gives you a URI that ends in
    /// `/admin`, write `/yourdb?authSource=admin`.
    pub fn uri(mut self, uri: impl Into<String>) -> Self {
        self.connection.uri = Some(uri.into());
        self
    }

    /// Reads the connection string from the environment variable `MONGODB_URI`. White space around it and a byte
    /// order mark are ignored.
    pub fn uri_from_env(mut self) -> Self {
        self.connection.uri_from_env = true;
        self
    }

    /// The server's host name or address, as `name`, `name:port` or `[address]:port`. Default `127.0.0.1`.
    /// White space around it and a byte order mark are ignored. A malformed name, such as one with a comma, a space
    /// or two dots in a row, is a [`Config`](crate::ErrorKind::Config) error.
    pub fn host(mut self, host: impl Into<String>) -> Self {
        self.connection.host = Some(host.into());
        self
    }

    /// The server's port, 1 to 65535. Default 27017. It is also the port of each of [`hosts`](Self::hosts) that has
    /// no port of its own.
    pub fn port(mut self, port: u16) -> Self {
        self.connection.port = Some(port);
        self
    }

    /// The members of a replica set or the routers of a sharded cluster, as `host` or `host:port`. At least one. Each
    /// is checked as [`host`](Self::host) is.
    pub fn hosts<H: Into<String>>(mut self, hosts: impl IntoIterator<Item = H>) -> Self {
        self.connection.hosts = Some(hosts.into_iter().map(Into::into).collect());
        self
    }

    /// The name of the replica set. Default: the name in the URI, if any. If both are given, they must be the same.
    pub fn replica_set(mut self, name: impl Into<String>) -> Self {
        self.connection.replica_set = Some(name.into());
        self
    }

    /// The user name. You may also give it beside a [`uri`](Self::uri) that has neither a user nor an `authSource`.
    pub fn username(mut self, username: impl Into<String>) -> Self {
        self.connection.username = Some(username.into());
        self
    }

    /// The password of [`username`](Self::username), without any escaping.
    ///
    /// The store does not trim it. If a password or user name ends with a line break or begins with a byte order
    /// mark, as one from a file may, it is a [`Config`](crate::ErrorKind::Config) error: call `trim_end()`.
    pub fn password(mut self, password: impl Into<String>) -> Self {
        self.connection.password = Some(password.into());
        self
    }

    /// The database in which the user is defined. Default `admin`.
    pub fn auth_source(mut self, database: impl Into<String>) -> Self {
        self.connection.auth_source = Some(database.into());
        self
    }

    /// Whether to connect by TLS. Default: as the URI says (`mongodb+srv://` says yes), otherwise no. It must not
    /// contradict the URI.
    pub fn tls(mut self, tls: bool) -> Self {
        self.connection.tls = Some(tls);
        self
    }

    /// A PEM file with the certificate authorities that the store trusts. Switches TLS on. Default: the file in the
    /// URI, otherwise Mozilla's authorities. If the URI has a file too, it must be the same. A file that cannot be
    /// read or holds no certificate is a [`Config`](crate::ErrorKind::Config) error.
    pub fn tls_ca_file(mut self, path: impl Into<PathBuf>) -> Self {
        self.connection.tls_ca_file = Some(path.into());
        self
    }

    /// The most connections that the pool opens to each server. At least 1. Default: the number in the URI, otherwise
    /// 100. If the URI has a number too, it must be the same. Not for a client that you hand in.
    ///
    /// A cached store needs at least 2, because its change stream keeps one connection. This also holds for the
    /// pool of a client that you hand in.
    pub fn max_pool_size(mut self, connections: u32) -> Self {
        self.connection.max_pool_size = Some(connections);
        self
    }

    /// The name that the server's log shows for these connections. Default: the name in the URI, otherwise none. If
    /// the URI has a name too, it must be the same.
    pub fn app_name(mut self, name: impl Into<String>) -> Self {
        self.connection.app_name = Some(name.into());
        self
    }

    /// An existing client. [`MongoStore::shutdown`](crate::MongoStore::shutdown) does not close it.
    ///
    /// Shut down the store first and the client after it. If the app shuts down its client first, the store notices
    /// that within half a second and releases the client. From then on each call is a
    /// [`Closed`](crate::ErrorKind::Closed) error that says so, and the change stream ends.
    ///
    /// This is a `Client` of the driver's version 3. This crate enables the driver's feature `bson-3`, and Cargo
    /// unites the features of all crates, so `mongodb::bson` is bson 3 in the whole app. An app that uses `bson =
    /// "2"` beside the driver stops compiling (``expected `mongodb::bson::Document`, found `bson::Document` ``).
    /// Use [`mongodb::bson`](crate::mongodb::bson) in place of the crate `bson`, or `bson = "3"`.
    ///
    /// The store keeps the write concern of the client. If the client has none, writes have `majority`. A write
    /// concern below `majority` (`w: 1`) has two costs: a read may not include a write that was acknowledged before
    /// it, because reads have read concern `majority`; and a failover may undo the write.
    pub fn client(mut self, client: Client) -> Self {
        self.connection.client = Some(client);
        self
    }

    /// An existing database, with its client and write concern. For a write concern below `majority` see
    /// [`client`](Self::client).
    pub fn database_handle(mut self, database: Database) -> Self {
        self.connection.database_handle = Some(database);
        self
    }

    /// An existing collection of any type, with its client and write concern. For a write concern below `majority`
    /// see [`client`](Self::client).
    #[allow(clippy::needless_pass_by_value, reason = "as the setters of the other handles")]
    pub fn collection_handle<T: Send + Sync>(mut self, collection: Collection<T>) -> Self {
        self.connection.collection_handle = Some(collection.clone_with_type());
        self
    }

    /// The name of the database: 1 to 63 bytes without `/ \ . " $`, space or control characters, and not one of
    /// MongoDB's own (`admin`, `config`, `local`). Default: the name in the URI, otherwise `sessions`. If the URI
    /// has a name too, it must be the same. Two apps on one server need two databases or two collections.
    pub fn database(mut self, name: impl Into<String>) -> Self {
        self.connection.database = Some(name.into());
        self
    }

    /// The name of the collection: 1 to 200 bytes without `$` or control characters. It must not begin or end with a
    /// dot, nor begin with `system.`. The names of the database and the collection have at most 254 bytes together.
    /// Default: the second part of the URI's path, otherwise `sessions`. If the URI has a name too, it must be the
    /// same.
    #[doc(alias = "with_table_name")]
    #[doc(alias = "with_prefix")]
    pub fn collection(mut self, name: impl Into<String>) -> Self {
        self.connection.collection = Some(name.into());
        self
    }
}
