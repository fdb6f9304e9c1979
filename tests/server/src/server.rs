//! The server as a test sees it.

use std::ffi::OsString;
use std::net::{TcpStream, ToSocketAddrs};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crate::error::Error;
use crate::process::Own;
use crate::{Kind, PASSWORD, USER, say, uri, with_option};

/// A MongoDB server: the server of `MONGODB_URI`, or a process of its own.
///
/// If it is a process of its own, it ends, and its data is removed, when this is dropped or when
/// the test process ends in any way.
#[derive(Debug)]
pub struct TestServer {
    uri: String,
    own: Option<Own>,
}

/// The options of an own server. [`TestServer::builder`] creates it.
#[derive(Debug, Clone, Default)]
#[must_use]
#[allow(clippy::struct_excessive_bools, reason = "each is an option of its own")]
pub struct Builder {
    pub(crate) kind: Option<Kind>,
    pub(crate) fast: bool,
    pub(crate) durable: bool,
    pub(crate) auth: bool,
    pub(crate) tls: Option<(PathBuf, PathBuf)>,
    pub(crate) test_commands: bool,
    pub(crate) extra: Vec<OsString>,
}

impl Builder {
    /// Uses only this kind of server, not the first one that is found.
    pub fn kind(mut self, kind: Kind) -> Self {
        self.kind = Some(kind);
        self
    }

    /// Whether the faster server is preferred to the one that is ready sooner. Off by default.
    ///
    /// Tests and benches switch this on. It only matters if no server is installed yet, or only the
    /// Python server. Then the server in Rust is built, which takes some minutes. If the build
    /// fails, the Python server is used.
    pub fn fast(mut self, fast: bool) -> Self {
        self.fast = fast;
        self
    }

    /// Whether acknowledged writes must survive [`TestServer::kill`]. Off by default, for speed.
    ///
    /// A `mongod` always keeps its journal.
    pub fn durable(mut self, durable: bool) -> Self {
        self.durable = durable;
        self
    }

    /// Whether clients need a password (SCRAM-SHA-256). [`USER`] may then do everything.
    ///
    /// [`TestServer::uri`] contains the credentials. The start takes longer, since the server
    /// starts twice.
    pub fn auth(mut self, auth: bool) -> Self {
        self.auth = auth;
        self
    }

    /// Accepts only TLS, with this certificate (chain) and key, two PEM files.
    ///
    /// [`TestServer::uri`] then has `tls=true`. Set the trusted authority with `with_option(&uri,
    /// "tlsCAFile", path)`.
    pub fn tls(mut self, certificate: impl Into<PathBuf>, key: impl Into<PathBuf>) -> Self {
        self.tls = Some((certificate.into(), key.into()));
        self
    }

    /// Whether commands for tests are allowed, such as `configureFailPoint`.
    pub fn test_commands(mut self, allowed: bool) -> Self {
        self.test_commands = allowed;
        self
    }

    /// One more argument for the server program, after all others.
    pub fn arg(mut self, argument: impl Into<OsString>) -> Self {
        self.extra.push(argument.into());
        self
    }

    /// Starts the server and waits until it is ready. That takes about a second, and minutes if it
    /// must be installed first. Blocks the thread for that time.
    ///
    /// # Errors
    ///
    /// If there is no server program and none can be installed, or it does not become ready.
    pub fn start(self) -> Result<TestServer, Error> {
        static SAID: AtomicBool = AtomicBool::new(false);

        let own = Own::start(self.clone())?;
        let user = if self.auth { format!("{USER}:{PASSWORD}@") } else { String::new() };
        let mut uri = format!("mongodb://{user}127.0.0.1:{}/?directConnection=true", own.port());
        if self.auth {
            uri = with_option(&uri, "authSource", "admin");
        }
        if self.tls.is_some() {
            uri = with_option(&uri, "tls", "true");
        }
        if !SAID.swap(true, Ordering::Relaxed) {
            say(&format!(
                "{}; started {} on 127.0.0.1:{}, its data is temporary",
                own.why(),
                own.title(),
                own.port()
            ));
        }
        Ok(TestServer { uri, own: Some(own) })
    }
}

impl TestServer {
    /// A server process of its own, even if `MONGODB_URI` is set: for tests that stop it, pause it,
    /// or need passwords or TLS.
    pub fn builder() -> Builder {
        Builder::default()
    }

    /// The server of a connection string, if it answers.
    pub(crate) fn external(uri: String) -> Result<Self, Error> {
        const PATIENCE: Duration = Duration::from_secs(5);

        let addresses = uri::addresses(&uri).ok_or_else(|| {
            Error::External("it does not begin with mongodb:// and a host".to_owned())
        })?;
        // A driver would retry for half a minute in every single test.
        let mut reasons = Vec::new();
        for address in &addresses {
            let reached = address.to_socket_addrs().and_then(|mut all| {
                let first = all.next().ok_or(std::io::ErrorKind::NotFound)?;
                let rest = all.collect::<Vec<_>>();
                TcpStream::connect_timeout(&first, PATIENCE).or_else(|error| {
                    rest.iter()
                        .find_map(|other| TcpStream::connect_timeout(other, PATIENCE).ok())
                        .ok_or(error)
                })
            });
            match reached {
                Ok(_) => {
                    reasons.clear();
                    break;
                }
                Err(error) => reasons.push(format!("{address}: {error}")),
            }
        }
        if !reasons.is_empty() {
            let reasons = reasons.join("; ");
            return Err(Error::External(format!("nothing answers there ({reasons})")));
        }
        let server = Self { uri, own: None };
        say(&format!("using {}", server.description()));
        Ok(server)
    }

    /// The connection string, without a database. That of an own server contains the credentials.
    #[must_use]
    pub fn uri(&self) -> &str {
        &self.uri
    }

    /// The connection string with this database as its default one.
    ///
    /// Hosts, options and credentials stay, and so does the database in which the server looks up
    /// the credentials.
    #[must_use]
    pub fn uri_for(&self, database: &str) -> String {
        uri::with_database(&self.uri, database)
    }

    /// The port on loopback of an own server.
    #[must_use]
    pub fn port(&self) -> Option<u16> {
        self.own.as_ref().map(Own::port)
    }

    /// The process id of an own server that runs.
    #[must_use]
    pub fn pid(&self) -> Option<u32> {
        self.own.as_ref().and_then(Own::pid)
    }

    /// The temporary folder of an own server: its data, and its log `server.log`.
    #[must_use]
    pub fn folder(&self) -> Option<&Path> {
        self.own.as_ref().map(Own::folder)
    }

    /// The kind of an own server.
    #[must_use]
    pub fn kind(&self) -> Option<Kind> {
        self.own.as_ref().map(Own::kind)
    }

    /// Whether it is the server of `MONGODB_URI`, which tests must not stop.
    #[must_use]
    pub fn is_external(&self) -> bool {
        self.own.is_none()
    }

    /// One line that describes the server: the program and its version, or the hosts of
    /// `MONGODB_URI`. It contains no secrets.
    #[must_use]
    pub fn description(&self) -> String {
        match &self.own {
            Some(own) => own.title().to_owned(),
            None => format!("the server of MONGODB_URI ({})", uri::shown(&self.uri)),
        }
    }

    /// Kills the server with SIGKILL, like a crash. The data stays for [`restart`](Self::restart).
    ///
    /// # Errors
    ///
    /// If it is not an own server, or the system refuses.
    pub fn kill(&mut self) -> Result<(), Error> {
        self.own_mut()?.kill()
    }

    /// Stops the server as an operator would. The data stays for [`restart`](Self::restart).
    ///
    /// # Errors
    ///
    /// If it is not an own server, or it does not stop by itself. Then it is killed.
    pub fn stop(&mut self) -> Result<(), Error> {
        self.own_mut()?.stop()
    }

    /// Starts the server again on the same port with the same data, and waits until it is ready. A
    /// server that still runs is killed first.
    ///
    /// # Errors
    ///
    /// If it is not an own server, or it does not become ready.
    pub fn restart(&mut self) -> Result<(), Error> {
        self.own_mut()?.restart()
    }

    /// Freezes the server (SIGSTOP): connections stay open and get no replies.
    ///
    /// # Errors
    ///
    /// If it is not an own server, or it does not run.
    pub fn pause(&mut self) -> Result<(), Error> {
        self.own_mut()?.pause()
    }

    /// Lets a frozen server continue (SIGCONT).
    ///
    /// # Errors
    ///
    /// If it is not an own server, or it does not run.
    pub fn resume(&mut self) -> Result<(), Error> {
        self.own_mut()?.resume()
    }

    /// Waits until the server ends by itself.
    ///
    /// # Errors
    ///
    /// If it is not an own server, or the system refuses.
    pub fn wait(&mut self) -> Result<(), Error> {
        self.own_mut()?.wait()
    }

    fn own_mut(&mut self) -> Result<&mut Own, Error> {
        self.own.as_mut().ok_or_else(|| {
            Error::Unsupported("the server of MONGODB_URI is not this test's to stop".to_owned())
        })
    }
}
