//! How many of parallel views of one session each store counts. A round is eight views at the same time, half
//! of them on each process, and then a change of the session's id.

use anyhow::{Context, Result, ensure};
use futures::future::try_join_all;
use hyper::header::HeaderValue;
use hyper::{Method, StatusCode, Uri};
use mongodb::Client;
use serde_json::Value;
use session_test_server::TestServer;
use tower_sessions_moka_mongodb_store::mongodb;

use crate::client::Connection;
use crate::kind::Kind;
use crate::options::Options;
use crate::process::Server;
use crate::server::Setup;
use crate::table;

/// The key of the count in a session.
pub(crate) const VIEWS: &str = "views";

const ROUNDS: usize = 100;
const VIEWS_PER_ROUND: usize = 8;

/// Adds up what two requests have counted.
pub(crate) fn add_up_views(
    key: &str,
    base: Option<&Value>,
    theirs: Option<&Value>,
    ours: Option<&Value>,
) -> Option<Value> {
    let count = |value: Option<&Value>| value.map_or(Some(0), Value::as_u64);
    match (key, count(base), count(theirs), count(ours)) {
        (VIEWS, Some(base), Some(theirs), Some(ours)) => {
            Some(theirs.saturating_add(ours.saturating_sub(base)).into())
        }
        _ => ours.cloned(),
    }
}

/// What is compared: a store, and whether its requests have a scope.
struct Contender {
    title: &'static str,
    kind: Kind,
    scoped: bool,
}

const CONTENDERS: [Contender; 5] = [
    Contender { title: "ours, RequestScopeLayer", kind: Kind::Ours, scoped: true },
    Contender { title: "ours", kind: Kind::Ours, scoped: false },
    Contender { title: "Mongo alone", kind: Kind::Mongo, scoped: false },
    Contender { title: "naive pair", kind: Kind::Naive, scoped: false },
    Contender { title: "MemoryStore", kind: Kind::InMemory, scoped: false },
];

/// Prints the table. Returns whether our store has lost nothing in a scope.
pub(crate) async fn run(options: &Options, mongo: &TestServer) -> Result<bool> {
    let head = ["store", "one process", "two processes"];
    let mut rows = vec![head.map(str::to_owned).to_vec()];
    let mut exact = true;
    for contender in &CONTENDERS {
        let mut row = vec![contender.title.to_owned()];
        for processes in [1, 2] {
            if processes > 1 && !contender.kind.is_persistent() {
                row.push("-".to_owned());
                continue;
            }
            let lost = lost(contender, processes, options, mongo).await?;
            exact &= lost == 0 || !contender.scoped;
            row.push(lost.to_string());
        }
        rows.push(row);
    }
    let views = ROUNDS * VIEWS_PER_ROUND;
    println!("\nviews lost of {views}: {ROUNDS} rounds of {VIEWS_PER_ROUND} parallel views");
    println!("{}", table::plain(&rows));
    Ok(exact)
}

async fn lost(
    contender: &Contender,
    processes: usize,
    options: &Options,
    mongo: &TestServer,
) -> Result<usize> {
    let database = session_test_server::fresh_database();
    let setup = Setup {
        kind: contender.kind,
        uri: mongo.uri_for(&database),
        options: options.store.clone(),
        size: options.size,
        threads: options.server_threads,
        name_commands: false,
    };
    let servers = try_join_all((0..processes).map(|_| Server::start(&setup))).await?;
    let mut browser = Browser::open(&servers, contender.scoped).await?;
    browser.view_alone().await?;
    let mut lost = 0;
    for _ in 0..ROUNDS {
        let before = browser.views().await?;
        browser.view_in_parallel().await?;
        browser.rotate().await?;
        let counted = browser.views().await?.checked_sub(before).context("it counted back")?;
        lost += VIEWS_PER_ROUND.checked_sub(counted).context("it counted too many")?;
    }
    for server in servers {
        server.stop().await?;
    }
    if contender.kind.is_persistent() {
        let client = Client::with_uri_str(&setup.uri).await?;
        client.database(&database).drop().await.context("drop the test database")?;
    }
    Ok(lost)
}

/// A browser with one session and as many connections as parallel views.
struct Browser {
    connections: Vec<Connection>,
    cookie: Option<HeaderValue>,
    prefix: &'static str,
}

impl Browser {
    /// The connections lead to the servers by turns.
    async fn open(servers: &[Server], scoped: bool) -> Result<Self> {
        let addresses = servers.iter().map(|server| server.address).cycle();
        let connections = addresses.take(VIEWS_PER_ROUND).map(Connection::open);
        let connections = try_join_all(connections).await?;
        let prefix = if scoped { "/scoped" } else { "" };
        Ok(Self { connections, cookie: None, prefix })
    }

    fn path(&self, path: &str) -> Result<Uri> {
        Ok(format!("{}{path}", self.prefix).parse()?)
    }

    /// Counts on all connections at the same time.
    async fn view_in_parallel(&mut self) -> Result<()> {
        let path = self.path("/views/add")?;
        let cookie = self.cookie.clone();
        let views = self.connections.iter_mut().map(async |connection| {
            let answer = connection.ask(Method::POST, path.clone(), cookie.as_ref()).await?;
            ensure!(answer.status == StatusCode::OK, "{} for a view", answer.status);
            Ok(())
        });
        try_join_all(views).await?;
        Ok(())
    }

    async fn view_alone(&mut self) -> Result<()> {
        self.ask(Method::POST, "/views/add").await.map(drop)
    }

    async fn rotate(&mut self) -> Result<()> {
        self.ask(Method::POST, "/views/rotate").await.map(drop)
    }

    /// The count, as the first server serves it.
    async fn views(&mut self) -> Result<usize> {
        self.ask(Method::GET, "/views").await
    }

    /// Asks the first server, and keeps the cookie that it sets.
    async fn ask(&mut self, method: Method, path: &str) -> Result<usize> {
        let path = self.path(path)?;
        let connection = self.connections.first_mut().context("no connection")?;
        let answer = connection.ask(method, path, self.cookie.as_ref()).await?;
        ensure!(answer.status == StatusCode::OK, "{} alone", answer.status);
        self.cookie = answer.cookie.or(self.cookie.take());
        Ok(std::str::from_utf8(&answer.body)?.parse()?)
    }
}
