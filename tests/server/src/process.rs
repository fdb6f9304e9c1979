//! A server process of our own: how it starts, becomes ready, ends and starts again.

use std::ffi::OsString;
use std::fs;
use std::hash::{BuildHasher, RandomState};
use std::io::{self, PipeWriter, Write};
use std::net::{Ipv4Addr, TcpListener};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ExitStatus};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, WaitId, WaitIdOptions, kill_process, waitid};

use crate::error::{Error, tail};
use crate::find::{CONFIG, DATA, KEY_FILE, Program, TLS_FILE, Wanted};
use crate::{Builder, Kind, PASSWORD, USER, find, hello, shell};

const LOG: &str = "server.log";
/// The longest start. It takes about a second, but the machine may be busy.
const START: Duration = Duration::from_secs(60);
/// The longest graceful stop. After that the server is killed.
const STOP: Duration = Duration::from_secs(15);
/// The pause between two attempts to bind the same port again.
const RETRY: Duration = Duration::from_millis(300);
const POLL: Duration = Duration::from_millis(10);

/// A server process with its folder, its port and its reaper.
#[derive(Debug)]
pub(crate) struct Own {
    program: Program,
    options: Builder,
    folder: PathBuf,
    port: u16,
    server: Option<Child>,
    reaper: Child,
    pipe: Option<PipeWriter>,
}

impl Own {
    /// Finds or installs a program, and starts it with `options`.
    pub(crate) fn start(options: Builder) -> Result<Self, Error> {
        let program = find::program(options.kind, options.fast)?;
        let mut own = Self::without_server(program, options)?;
        let mut tries = 0;
        loop {
            tries += 1;
            match own.first_start() {
                // Another process took the free port before the server bound it.
                Err(Error::Start { log, .. }) if tries < 5 && is_port_taken(&log) => own.kill()?,
                Err(error) => return Err(error),
                Ok(()) => return Ok(own),
            }
        }
    }

    fn without_server(program: Program, options: Builder) -> Result<Self, Error> {
        let folder = tempfile::Builder::new()
            .prefix("session-test-server-")
            .tempdir()
            .map_err(|error| Error::io("make a temporary folder", error))?;
        let (end, pipe) = io::pipe().map_err(|error| Error::io("make a pipe", error))?;
        let reaper =
            shell::reaper(folder.path(), end).map_err(|error| Error::io("run sh", error))?;
        Ok(Self {
            program,
            options,
            folder: folder.keep(), // the reaper's from here on
            port: 0,
            server: None,
            reaper,
            pipe: Some(pipe),
        })
    }

    /// Starts on a new port with new data.
    fn first_start(&mut self) -> Result<(), Error> {
        self.prepare_files().map_err(|error| Error::io("write the server's files", error))?;
        self.port = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))
            .and_then(|listener| listener.local_addr())
            .map_err(|error| Error::io("find a free port", error))?
            .port();
        let is_mongod = self.program.kind == Kind::Mongod;
        let guarded = self.options.auth || self.options.tls.is_some();
        if is_mongod || self.options.auth {
            // Create the first user and the replica set before the server requires passwords. All
            // kinds support this way: the Python server has no exception for localhost.
            self.spawn(false)?;
            self.wait_until("answer", |port| {
                hello::ask(port, false, hello::hello()).is_ok_and(|reply| reply.is_true("ok"))
            })?;
            if is_mongod {
                hello::initiate(self.port)?;
                self.wait_until("become primary", |port| hello::is_ready(port, false))?;
            }
            if self.options.auth {
                hello::create_user(self.port, USER, PASSWORD)?;
            }
            if !guarded {
                return Ok(());
            }
            self.stop()?;
        }
        self.run()
    }

    /// Starts the server with its options, and waits until it is ready.
    fn run(&mut self) -> Result<(), Error> {
        let tls = self.options.tls.is_some();
        self.spawn(true)?;
        self.wait_until("become ready", |port| hello::is_ready(port, tls))
    }

    fn prepare_files(&self) -> io::Result<()> {
        let data = self.folder.join(DATA);
        match fs::remove_dir_all(&data) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => fs::create_dir(&data)?,
        }
        fs::write(self.folder.join(CONFIG), "")?;
        if self.program.kind == Kind::Mongod {
            let random = || RandomState::new().hash_one(0_u8);
            let key = format!("{:016x}{:016x}", random(), random());
            write_secret(&self.folder.join(KEY_FILE), key.as_bytes())?;
            if let Some((cert, key)) = &self.options.tls {
                let mut both = fs::read(cert)?;
                both.push(b'\n');
                both.extend(fs::read(key)?);
                write_secret(&self.folder.join(TLS_FILE), &both)?;
            }
        }
        Ok(())
    }

    fn log(&self) -> PathBuf {
        self.folder.join(LOG)
    }

    /// Starts the program. `guarded`: with passwords and TLS.
    fn spawn(&mut self, guarded: bool) -> Result<(), Error> {
        let options = &self.options;
        let tls = options.tls.as_ref().filter(|_| guarded);
        let line: Vec<OsString> = self.program.command_line(&Wanted {
            port: self.port,
            folder: &self.folder,
            durable: options.durable,
            test_commands: options.test_commands,
            auth: options.auth && guarded,
            tls: tls.map(|(cert, key)| (cert.as_path(), key.as_path())),
            extra: &options.extra,
        });
        let doing = || format!("start {}", self.program.title);
        fs::write(self.log(), "").map_err(|error| Error::io(doing(), error))?;
        let pipe = self
            .pipe
            .as_ref()
            .ok_or_else(|| Error::io(doing(), "its pipe is closed"))?
            .try_clone()
            .map_err(|error| Error::io(doing(), error))?;
        let server = shell::launch(&line, &self.log(), &self.folder, pipe)
            .map_err(|error| Error::io(doing(), error))?;
        self.server = Some(server);
        Ok(())
    }

    fn wait_until(&mut self, what: &str, ready: impl Fn(u16) -> bool) -> Result<(), Error> {
        let deadline = Instant::now() + START;
        let reason = loop {
            // Check the program's own log first: another server could answer on the port.
            let bound = fs::read(self.log())
                .is_ok_and(|log| contains(&log, self.program.listening_mark().as_bytes()));
            if bound && ready(self.port) {
                return Ok(());
            }
            if let Some(status) = self.exited()? {
                break format!("ended before it could {what} ({status})");
            }
            if Instant::now() > deadline {
                break format!("did not {what} within {} s", START.as_secs());
            }
            thread::sleep(POLL);
        };
        Err(Error::Start {
            program: self.program.title.clone(),
            reason,
            log: tail(&self.log(), 20),
        })
    }

    /// Checks whether the process has ended by itself.
    fn exited(&mut self) -> Result<Option<ExitStatus>, Error> {
        let Some(server) = &mut self.server else {
            return Ok(None);
        };
        let status =
            server.try_wait().map_err(|error| Error::io("look after the server", error))?;
        if status.is_some() {
            self.forget();
        }
        Ok(status)
    }

    /// Forgets the process: it is collected, so its id may become another process's, and the reaper
    /// must not use it.
    fn forget(&mut self) {
        self.server = None;
        if let Some(pipe) = &mut self.pipe {
            // If the reaper is gone, it cannot kill anything, so ignore the error.
            let _ = pipe.write_all(b"-\n");
        }
    }

    fn signal(&self, signal: Signal) -> Result<(), Error> {
        let pid = self
            .server
            .as_ref()
            .and_then(|server| Pid::from_raw(server.id().cast_signed()))
            .ok_or_else(|| Error::Unsupported("the server is not running".to_owned()))?;
        kill_process(pid, signal).map_err(|error| Error::io("signal the server", error))
    }

    pub(crate) fn kill(&mut self) -> Result<(), Error> {
        if let Some(server) = &mut self.server {
            server
                .kill()
                .and_then(|()| server.wait())
                .map_err(|error| Error::io("kill the server", error))?;
            self.forget();
        }
        Ok(())
    }

    pub(crate) fn stop(&mut self) -> Result<(), Error> {
        if self.exited()?.is_some() || self.server.is_none() {
            return Ok(());
        }
        // A paused process would not react to the other signal.
        self.signal(Signal::CONT)?;
        self.signal(Signal::TERM)?;
        let deadline = Instant::now() + STOP;
        while self.exited()?.is_none() {
            if Instant::now() > deadline {
                self.kill()?;
                return Err(Error::Io {
                    doing: format!("stop {}", self.program.title),
                    reason: format!("it was killed, having gone on for {} s", STOP.as_secs()),
                });
            }
            thread::sleep(POLL);
        }
        Ok(())
    }

    pub(crate) fn restart(&mut self) -> Result<(), Error> {
        self.kill()?;
        let mut tries = 0;
        loop {
            tries += 1;
            match self.run() {
                // Meanwhile the system may have given this port to an outgoing connection of a
                // client, even to one that connects to itself when it looks for the dead server.
                // That client gives up soon.
                Err(Error::Start { log, .. }) if tries < 10 && is_port_taken(&log) => {
                    thread::sleep(RETRY);
                }
                result => return result,
            }
        }
    }

    pub(crate) fn pause(&self) -> Result<(), Error> {
        self.signal(Signal::STOP)?;
        // The signal returns before the last thread has stopped. That thread may still answer a
        // request.
        let Some(pid) = self.pid().and_then(|pid| Pid::from_raw(pid.cast_signed())) else {
            return Ok(());
        };
        waitid(WaitId::Pid(pid), WaitIdOptions::STOPPED)
            .map(drop)
            .map_err(|error| Error::io("wait until the server has stopped", error))
    }

    pub(crate) fn resume(&self) -> Result<(), Error> {
        self.signal(Signal::CONT)
    }

    pub(crate) fn wait(&mut self) -> Result<(), Error> {
        if let Some(server) = &mut self.server {
            server.wait().map_err(|error| Error::io("wait for the server", error))?;
            self.forget();
        }
        Ok(())
    }

    pub(crate) fn pid(&self) -> Option<u32> {
        self.server.as_ref().map(Child::id)
    }

    pub(crate) fn port(&self) -> u16 {
        self.port
    }

    pub(crate) fn folder(&self) -> &Path {
        &self.folder
    }

    pub(crate) fn kind(&self) -> Kind {
        self.program.kind
    }

    pub(crate) fn title(&self) -> &str {
        &self.program.title
    }

    pub(crate) fn why(&self) -> &str {
        &self.program.why
    }
}

impl Drop for Own {
    fn drop(&mut self) {
        // The data is removed too, so a graceful stop has no use.
        let _ = self.kill();
        drop(self.pipe.take());
        let _ = self.reaper.wait();
        // The reaper removes the folder, unless the reaper was killed.
        let _ = fs::remove_dir_all(&self.folder);
    }
}

fn is_port_taken(log: &str) -> bool {
    let log = log.to_lowercase();
    ["address already in use", "address in use", "failed to bind"]
        .iter()
        .any(|words| log.contains(words))
}

fn contains(text: &[u8], part: &[u8]) -> bool {
    text.windows(part.len()).any(|window| window == part)
}

/// Writes a file that only its owner may read: `mongod` accepts no other.
fn write_secret(path: &Path, content: &[u8]) -> io::Result<()> {
    fs::OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(path)?
        .write_all(content)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn log_of_a_taken_port_is_recognized() {
        let other = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let port = other.local_addr().unwrap().port().to_string();
        let options = crate::TestServer::builder().arg("--port").arg(port);
        let error = Own::start(options).unwrap_err();
        let Error::Start { log, .. } = &error else {
            panic!("{error}");
        };
        assert!(is_port_taken(log), "{log}");
        assert!(!is_port_taken("no such flag"));
    }
}
