//! Starts, measures and stops the server processes of the load test.

use std::net::{Ipv4Addr, SocketAddr};
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use hyper::{Method, StatusCode, Uri};
use sysinfo::{Pid, ProcessRefreshKind, ProcessesToUpdate, Signal, System};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::process::{Child, Command};

use crate::client::Connection;
use crate::server::Setup;
use crate::stats::Stats;

/// A server process. It ends when this is dropped.
pub(crate) struct Server {
    child: Child,
    pub(crate) address: SocketAddr,
    pub(crate) pid: u32,
    /// A connection for `/stats`, beside those of the clients.
    connection: Connection,
}

impl Server {
    pub(crate) async fn start(setup: &Setup) -> Result<Self> {
        let mut child = Command::new(std::env::current_exe()?)
            .arg("server")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .context("start a server process")?;
        let pid = child.id().context("the server process has ended")?;
        let mut line = serde_json::to_vec(setup)?;
        line.push(b'\n');
        // It stays open in `child`: the server ends when it is closed.
        let stdin = child.stdin.as_mut().context("stdin is piped")?;
        stdin.write_all(&line).await?;
        let stdout = child.stdout.take().context("stdout is piped")?;
        let mut said = String::new();
        BufReader::new(stdout).read_line(&mut said).await?;
        let port = said.trim().strip_prefix("port ").context("the server did not start")?;
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port.parse()?));
        let connection = Connection::open(address).await?;
        Ok(Self { child, address, pid, connection })
    }

    pub(crate) async fn stats(&mut self) -> Result<Stats> {
        let path = Uri::from_static("/stats");
        let answer = self.connection.ask(Method::GET, path, None).await?;
        ensure!(answer.status == StatusCode::OK, "{} for the statistics", answer.status);
        Ok(serde_json::from_slice(&answer.body)?)
    }

    pub(crate) async fn stop(mut self) -> Result<()> {
        drop(self.child.stdin.take());
        self.child.wait().await?;
        Ok(())
    }
}

/// Reads the resources that processes have used so far.
pub(crate) struct Usage {
    system: System,
}

impl Usage {
    pub(crate) fn new() -> Self {
        Self { system: System::new() }
    }

    /// Stops these processes or lets them continue, if the system supports it. Otherwise their
    /// background commands to MongoDB, such as those of change streams, would disturb the store
    /// that is measured.
    pub(crate) fn pause(&mut self, pids: &[u32], pause: bool) {
        let signal = if pause { Signal::Stop } else { Signal::Continue };
        self.of(pids);
        for process in pids.iter().filter_map(|pid| self.system.process(Pid::from_u32(*pid))) {
            // `None` if the system has no such signal.
            let _ = process.kill_with(signal);
        }
    }

    /// The CPU time and the resident bytes of these processes together.
    pub(crate) fn of(&mut self, pids: &[u32]) -> (Duration, u64) {
        let pids: Vec<_> = pids.iter().map(|pid| Pid::from_u32(*pid)).collect();
        let what = ProcessRefreshKind::nothing().with_cpu().with_memory().without_tasks();
        self.system.refresh_processes_specifics(ProcessesToUpdate::Some(&pids), true, what);
        let mut used = (Duration::ZERO, 0);
        for process in pids.iter().filter_map(|pid| self.system.process(*pid)) {
            used.0 += Duration::from_millis(process.accumulated_cpu_time());
            used.1 += process.memory();
        }
        used
    }
}
