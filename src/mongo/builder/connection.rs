//! The options that say which collection of which server it is.

use std::path::PathBuf;

use mongodb::{Client, Collection, Database};

use crate::mongo::builder::MongoStoreBuilder;

impl MongoStoreBuilder {
    /// A connection string, `mongodb://` or `mongodb+srv://`. The path names the database, and a
    /// second part of it the collection: `mongodb://user:pass@host:port/database/collection`. White space
    /// around it and a byte order mark are ignored: a file ends with a line break, and a file that a
    /// Windows editor saved may begin with the mark.
    ///
    /// The database must be one of yours: not `admin`, `config` or `local`. Where a hosted MongoDB gives
    /// a URI that ends in `/admin`, write `/yourdb?authSource=admin`.
    pub fn uri(mut self, uri: impl Into<String>) -> Self {
        self.connection.uri = Some(uri.into());
        self
    }

    /// Takes the connection string from the environment variable `MONGODB_URI`. White space around
    /// it and a byte order mark are ignored.
    pub fn uri_from_env(mut self) -> Self {
        self.connection.uri_from_env = true;
        self
    }

    /// The server's host name or address, as `name`, `name:port` or `[address]:port`. Default `127.0.0.1`.
    /// White space around it and a byte order mark are ignored. A name that no name server can know, such as
    /// one with a comma, a space or two dots in a row, is a [`Config`](crate::ErrorKind::Config) error.
    pub fn host(mut self, host: impl Into<String>) -> Self {
        self.connection.host = Some(host.into());
        self
    }

    /// The server's port, 1 to 65535, also of those [`hosts`](Self::hosts) that have none of their
    /// own. Default 27017.
    pub fn port(mut self, port: u16) -> Self {
        self.connection.port = Some(port);
        self
    }

    /// The members of a replica set or the routers of a sharded cluster, as `host` or `host:port`;
    /// at least one. Each is checked as [`host`](Self::host) is.
    pub fn hosts<H: Into<String>>(mut self, hosts: impl IntoIterator<Item = H>) -> Self {
        self.connection.hosts = Some(hosts.into_iter().map(Into::into).collect());
        self
    }

    /// The name of the replica set. Default: the one in the URI, which must not be another one.
    pub fn replica_set(mut self, name: impl Into<String>) -> Self {
        self.connection.replica_set = Some(name.into());
        self
    }

    /// The user name. Goes with a [`uri`](Self::uri), too, if that has neither a user nor an
    /// `authSource`.
    pub fn username(mut self, username: impl Into<String>) -> Self {
        self.connection.username = Some(username.into());
        self
    }

    /// The password of [`username`](Self::username), as it is: nothing is to be escaped here.
    ///
    /// Nothing is taken off silently either. A password or user name that ends with a line break or begins
    /// with a byte order mark, as one that is read from a file may do, is a
    /// [`Config`](crate::ErrorKind::Config) error: call `trim_end()`.
    pub fn password(mut self, password: impl Into<String>) -> Self {
        self.connection.password = Some(password.into());
        self
    }

    /// The database that knows the user. Default `admin`.
    pub fn auth_source(mut self, database: impl Into<String>) -> Self {
        self.connection.auth_source = Some(database.into());
        self
    }

    /// Whether to connect by TLS. Default: what the URI says (yes, if it is `mongodb+srv://`), which
    /// this must not contradict, or else no.
    pub fn tls(mut self, tls: bool) -> Self {
        self.connection.tls = Some(tls);
        self
    }

    /// A PEM file of the authorities that the server's certificate is checked against; switches TLS
    /// on. Default: the file in the URI, which must not be another one, or else Mozilla's
    /// authorities. A file that cannot be read or holds no certificate is a
    /// [`Config`](crate::ErrorKind::Config) error.
    pub fn tls_ca_file(mut self, path: impl Into<PathBuf>) -> Self {
        self.connection.tls_ca_file = Some(path.into());
        self
    }

    /// How many connections the pool has at most for each server: 1 or more. Default: what the URI
    /// says, which must not be another number, or else 100. Not for a client that is handed in.
    ///
    /// A cached store needs two at least: its change stream keeps one of them. So does the pool of a
    /// client that is handed in.
    pub fn max_pool_size(mut self, connections: u32) -> Self {
        self.connection.max_pool_size = Some(connections);
        self
    }

    /// The name that the server's log shows for these connections. Default: the one in the URI,
    /// which must not be another one, or else none.
    pub fn app_name(mut self, name: impl Into<String>) -> Self {
        self.connection.app_name = Some(name.into());
        self
    }

    /// An existing client. It is not closed by [`MongoStore::shutdown`](crate::MongoStore::shutdown).
    ///
    /// Shut down the store first and the client after it. If the app shuts down its client while the
    /// store lives, the store notices within half a second and lets go of it; from then on each call
    /// is a [`Closed`](crate::ErrorKind::Closed) error that says so, and the change stream ends.
    ///
    /// This is a `Client` of the driver's version 3. This crate enables the driver's feature `bson-3`, and
    /// Cargo unites the features of all crates: `mongodb::bson` is bson 3 in the whole app. An app that
    /// uses `bson = "2"` beside the driver stops compiling (``expected `mongodb::bson::Document`, found
    /// `bson::Document` ``). Use [`mongodb::bson`](crate::mongodb::bson) in place of the crate `bson`, or
    /// `bson = "3"`.
    ///
    /// Its write concern is kept; without one, writes have `majority`. With one below `majority`
    /// (`w: 1`) a read, which is always of read concern `majority`, may not see a write yet that was
    /// acknowledged before it, and a failover may undo the write.
    pub fn client(mut self, client: Client) -> Self {
        self.connection.client = Some(client);
        self
    }

    /// An existing database, with its client and write concern; for one below `majority` see
    /// [`client`](Self::client).
    pub fn database_handle(mut self, database: Database) -> Self {
        self.connection.database_handle = Some(database);
        self
    }

    /// An existing collection of whatever type, with its client and write concern; for one below
    /// `majority` see [`client`](Self::client).
    #[allow(clippy::needless_pass_by_value, reason = "taken as the other handles are")]
    pub fn collection_handle<T: Send + Sync>(mut self, collection: Collection<T>) -> Self {
        self.connection.collection_handle = Some(collection.clone_with_type());
        self
    }

    /// The name of the database: 1 to 63 bytes without `/ \ . " $`, space or control characters, and none
    /// of MongoDB's own (`admin`, `config`, `local`).
    /// Default: the one in the URI, which must not be another one, or else `sessions`. Two apps on
    /// one server need two databases or two collections.
    pub fn database(mut self, name: impl Into<String>) -> Self {
        self.connection.database = Some(name.into());
        self
    }

    /// The name of the collection: 1 to 200 bytes without `$` or control characters, with no dot at
    /// either end, and none that begins with `system.`. The names of the database and the collection have at most
    /// 254 bytes together. Default: the second part of the URI's path,
    /// which must not be another one, or else `sessions`.
    #[doc(alias = "with_table_name")]
    #[doc(alias = "with_prefix")]
    pub fn collection(mut self, name: impl Into<String>) -> Self {
        self.connection.collection = Some(name.into());
        self
    }
}
