//! The parts of a run: the server, a proxy for each instance, and the instances.

use std::sync::Arc;

use session_test_proxy::{Location, Proxy, Upstream};
use session_test_server::{TestServer, fresh_database, with_option};
use tokio::sync::Mutex;
use tower_sessions_moka_mongodb_store::{CachedMongoStore, MongoStore};

use crate::args::Settings;
use crate::faults::Victims;
use crate::shared;

/// The server of a run, and a database on it.
pub(crate) struct Server {
    /// `None` for the server of `MONGODB_URI`, which the run must not stop.
    own: Option<TestServer>,
    uri: String,
    database: String,
}

impl Server {
    /// Starts a server, and installs one first if the machine has none. Blocks the thread.
    pub(crate) fn start() -> Result<Self, String> {
        let database = fresh_database();
        match TestServer::builder().fast(true).durable(true).start() {
            Ok(server) => {
                let uri = server.uri_for(&database);
                Ok(Self { own: Some(server), uri, database })
            }
            Err(error) if std::env::var_os("MONGODB_URI").is_some() => {
                eprintln!(
                    "chaos: {error}\nchaos: runs on MONGODB_URI: nothing is killed or paused"
                );
                let shared =
                    session_test_server::shared_fast().map_err(|error| error.to_string())?;
                Ok(Self { own: None, uri: shared.uri_for(&database), database })
            }
            Err(error) => Err(error.to_string()),
        }
    }
}

/// The instances, their proxies and their server.
pub(crate) struct Cluster {
    pub(crate) instances: Vec<CachedMongoStore>,
    pub(crate) victims: Arc<Victims>,
    /// The connection string that bypasses all proxies.
    pub(crate) direct: String,
    pub(crate) database: String,
}

impl Cluster {
    pub(crate) async fn start(settings: &Settings, server: Server) -> Result<Self, String> {
        let Server { own, uri, database } = server;
        let location = Location::of(&uri);
        let location = location
            .map_err(|why| format!("MONGODB_URI cannot be reached through a proxy: {why}"))?;
        let looked_up = location.clone();
        let address = tokio::task::spawn_blocking(move || looked_up.address()).await;
        let address = address.map_err(|error| error.to_string())??;
        let upstream = Upstream::like_mongodb(address).await.map_err(|error| error.to_string())?;

        let mut proxies = Vec::new();
        let mut instances = Vec::new();
        for instance in 0..settings.instances {
            let proxy = Proxy::start(upstream.clone()).await.map_err(|error| error.to_string())?;
            // A direct connection, so that the driver does not use the server's own address and
            // bypass the proxy.
            let uri = with_option(&location.through(proxy.port()), "directConnection", "true");
            let mongo = MongoStore::builder().uri(uri).operation_timeout(settings.timeout);
            let mongo = mongo.on_conflict(shared::add_up);
            let mongo = mongo.build().await.map_err(|error| error.to_string())?;
            let store = CachedMongoStore::builder(mongo)
                .max_staleness(settings.max_staleness)
                .touch_after(Settings::touch_after(instance));
            instances.push(store.build().await.map_err(|error| error.to_string())?);
            proxies.push(proxy);
        }
        let server = own.map(|server| Arc::new(Mutex::new(server)));
        let victims = Arc::new(Victims { proxies, server });
        Ok(Self { instances, victims, direct: uri, database })
    }
}
