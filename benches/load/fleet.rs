//! The servers of one store in one scenario, and their clients.

use anyhow::{Context, Result};
use futures::future::try_join_all;
use hyper::header::HeaderValue;
use mongodb::Client;
use session_test_server::TestServer;
use tower_sessions_moka_mongodb_store::mongodb;

use crate::client::Connection;
use crate::kind::Kind;
use crate::options::Options;
use crate::process::Server;
use crate::scenario::Scenario;
use crate::server::Setup;
use crate::stats::Stats;
use crate::worker::{Rules, Worker};

pub(crate) struct Fleet {
    pub(crate) kind: Kind,
    pub(crate) scenario: Scenario,
    pub(crate) workers: Vec<Worker>,
    servers: Vec<Server>,
    setup: Setup,
    database: String,
}

impl Fleet {
    /// Starts the servers and creates the sessions.
    pub(crate) async fn start(
        kind: Kind,
        scenario: Scenario,
        options: &Options,
        mongo: &TestServer,
    ) -> Result<Self> {
        let database = session_test_server::fresh_database();
        let mut store = options.store.clone();
        store.max_entries = scenario.max_entries(options.sessions).or(store.max_entries);
        let setup = Setup {
            kind,
            uri: mongo.uri_for(&database),
            options: store,
            size: options.size,
            threads: options.server_threads,
            name_commands: options.name_commands,
        };
        let servers =
            try_join_all((0..scenario.instances()).map(|_| Server::start(&setup))).await?;
        // The store's own default.
        let bound = options.store.max_staleness.unwrap_or(std::time::Duration::from_secs(5));
        let bound = kind.bounds_staleness().then_some(bound);
        let rules = Rules { scenario, options: options.clone(), bound };
        let mut workers = Vec::with_capacity(options.connections);
        for index in 0..options.connections {
            workers.push(Worker::new(rules.clone(), connect(&servers).await?, index)?);
        }
        let mut fleet = Self { kind, scenario, workers, servers, setup, database };
        if scenario != Scenario::Bare {
            fleet.create_sessions(options).await?;
        }
        Ok(fleet)
    }

    /// Each client gets every `connections`-th session.
    async fn create_sessions(&mut self, options: &Options) -> Result<()> {
        let workers = self.workers.iter_mut().enumerate();
        try_join_all(workers.map(async |(index, worker)| {
            for owner in (index..options.sessions).step_by(options.connections) {
                worker.create(owner as u64).await?;
            }
            anyhow::Ok(())
        }))
        .await?;
        Ok(())
    }

    /// Stops the servers and starts new ones, whose caches are empty.
    pub(crate) async fn restart(&mut self) -> Result<()> {
        for server in std::mem::take(&mut self.servers) {
            server.stop().await?;
        }
        for _ in 0..self.scenario.instances() {
            self.servers.push(Server::start(&self.setup).await?);
        }
        for worker in &mut self.workers {
            worker.reconnect(connect(&self.servers).await?);
        }
        Ok(())
    }

    /// The cookies and owners of all sessions.
    pub(crate) fn sessions(&self) -> Vec<(HeaderValue, u64)> {
        let sessions = self.workers.iter().flat_map(|worker| &worker.sessions);
        sessions.map(|session| (session.cookie.clone(), session.owner)).collect()
    }

    pub(crate) fn pids(&self) -> Vec<u32> {
        self.servers.iter().map(|server| server.pid).collect()
    }

    pub(crate) async fn stats(&mut self) -> Result<Stats> {
        let mut sum = Stats::default();
        for server in &mut self.servers {
            sum.add(&server.stats().await?);
        }
        Ok(sum)
    }

    /// Stops the servers and removes their stored data.
    pub(crate) async fn stop(self) -> Result<()> {
        for server in self.servers {
            server.stop().await?;
        }
        if self.kind != Kind::InMemory {
            let client = Client::with_uri_str(&self.setup.uri).await?;
            let dropped = client.database(&self.database).drop().await;
            dropped.context("drop the test database")?;
        }
        Ok(())
    }
}

async fn connect(servers: &[Server]) -> Result<Vec<Connection>> {
    try_join_all(servers.iter().map(|server| Connection::open(server.address))).await
}
