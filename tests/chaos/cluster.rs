//! What a run is made of: the server, a proxy for each instance, and the instances.

use std::net::{SocketAddr, ToSocketAddrs};
use std::sync::Arc;

use session_test_proxy::Proxy;
use session_test_server::{TestServer, fresh_database, with_option};
use tokio::sync::Mutex;
use tower_sessions_moka_mongodb_store::{CachedMongoStore, MongoStore};

use crate::args::Settings;
use crate::faults::Victims;

/// The instances and what is under them.
pub(crate) struct Cluster {
    pub(crate) instances: Vec<CachedMongoStore>,
    pub(crate) victims: Arc<Victims>,
    /// The connection string past all proxies.
    pub(crate) direct: String,
    pub(crate) database: String,
}

impl Cluster {
    pub(crate) async fn start(settings: &Settings) -> Result<Self, String> {
        let started = tokio::task::spawn_blocking(|| TestServer::builder().durable(true).start());
        let database = fresh_database();
        let (server, uri) = match started.await.map_err(|error| error.to_string())? {
            Ok(server) => {
                let uri = server.uri_for(&database);
                (Some(Arc::new(Mutex::new(server))), uri)
            }
            Err(error) if std::env::var_os("MONGODB_URI").is_some() => {
                eprintln!(
                    "chaos: {error}\nchaos: runs on MONGODB_URI: nothing is killed or paused"
                );
                let shared = tokio::task::spawn_blocking(session_test_server::shared).await;
                let shared = shared.map_err(|error| error.to_string())?;
                (None, shared.map_err(|error| error.to_string())?.uri_for(&database))
            }
            Err(error) => return Err(error.to_string()),
        };
        let (before, host, after) = split(&uri)?;
        let address = tokio::task::spawn_blocking(move || address(&host)).await;
        let address = address.map_err(|error| error.to_string())??;

        let (mut proxies, mut instances) = (Vec::new(), Vec::new());
        for instance in 0..settings.instances {
            let proxy = Proxy::start(address).await.map_err(|error| error.to_string())?;
            // Not even by the server's own word may the driver find the way around the proxy.
            let uri = format!("{before}127.0.0.1:{}{after}", proxy.port());
            let uri = with_option(&uri, "directConnection", "true");
            let mongo = MongoStore::builder().uri(uri).operation_timeout(settings.timeout);
            let mongo = mongo.build().await.map_err(|error| error.to_string())?;
            let store = CachedMongoStore::builder(mongo)
                .max_staleness(settings.max_staleness)
                .touch_after(Settings::touch_after(instance));
            instances.push(store.build().await.map_err(|error| error.to_string())?);
            proxies.push(proxy);
        }
        let victims = Arc::new(Victims { proxies, server });
        Ok(Self { instances, victims, direct: uri, database })
    }
}

/// What comes before the one host, the host, and what comes after it.
fn split(uri: &str) -> Result<(String, String, String), String> {
    let refused = |why: &str| Err(format!("MONGODB_URI cannot be reached through a proxy: {why}"));
    let Some(rest) = uri.strip_prefix("mongodb://") else {
        return refused("it does not begin with mongodb://");
    };
    if ["tls=true", "ssl=true"].iter().any(|option| rest.contains(option)) {
        return refused("a certificate would not be valid for the proxy");
    }
    let end = rest.find(['/', '?']).unwrap_or(rest.len());
    let begin = rest[..end].rfind('@').map_or(0, |at| at + 1);
    let host = &rest[begin..end];
    if host.contains(',') || host.contains('%') {
        return refused("it must name one host");
    }
    let before = format!("mongodb://{}", &rest[..begin]);
    Ok((before, host.to_owned(), rest[end..].to_owned()))
}

fn address(host: &str) -> Result<SocketAddr, String> {
    let found = host.to_socket_addrs().or_else(|_| (host, 27017).to_socket_addrs());
    let found = found.map_err(|error| format!("{host}: {error}"))?.next();
    found.ok_or_else(|| format!("{host} has no address"))
}
