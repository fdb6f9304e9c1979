//! A server's life: it starts, survives what it must survive, and is never left behind.
#![cfg(unix)]
#![allow(
    clippy::print_stdout,
    clippy::unwrap_used,
    reason = "a test ends where it fails, and its child process speaks to it by stdout"
)]

use std::io::{BufRead, BufReader};
use std::net::{Ipv4Addr, TcpStream};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use session_test_server::{Builder, Error, Kind, TestServer};

/// The variable that tells a child process of these tests how to end.
const ROLE: &str = "SESSION_TEST_SERVER_ROLE";

fn connects(port: u16) -> bool {
    TcpStream::connect((Ipv4Addr::LOCALHOST, port)).is_ok()
}

fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !holds() {
        assert!(Instant::now() < deadline, "not within 20 s: {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// The state letter that `ps` shows for a process. `None` if there is no such process.
fn state(pid: u32) -> Option<char> {
    let output = Command::new("ps").args(["-o", "stat=", "-p", &pid.to_string()]).output().unwrap();
    String::from_utf8(output.stdout).unwrap().trim().chars().next()
}

/// Whether it is dead, or dead and not yet collected by the system's first process.
fn is_dead(pid: u32) -> bool {
    matches!(state(pid), None | Some('Z'))
}

#[test]
fn server_is_ready_and_ends_on_drop() {
    let server = TestServer::builder().start().unwrap();
    let port = server.port().unwrap();
    let pid = server.pid().unwrap();
    let folder = server.folder().unwrap().to_owned();
    assert!(!server.is_external());
    assert!(connects(port));
    assert!(folder.join("data").is_dir());
    assert!(server.uri().starts_with(&format!("mongodb://127.0.0.1:{port}/")), "{}", server.uri());
    let description = server.description();
    assert!(description.chars().any(|c| c.is_ascii_digit()), "{description}");
    drop(server);
    assert!(!connects(port));
    assert!(is_dead(pid));
    assert!(!folder.exists());
}

#[test]
fn server_restarts_on_the_same_port_and_data() {
    let mut server = TestServer::builder().durable(true).start().unwrap();
    let port = server.port();
    let pid = server.pid();
    let witness = server.folder().unwrap().join("data/witness");
    std::fs::write(&witness, "").unwrap();

    server.kill().unwrap();
    assert_eq!(server.pid(), None);
    assert!(!connects(port.unwrap()));
    server.kill().unwrap(); // is no error when it is dead already
    server.restart().unwrap();
    assert_eq!(server.port(), port);
    assert_ne!(server.pid(), pid);
    assert!(connects(port.unwrap()));

    server.stop().unwrap();
    assert!(!connects(port.unwrap()));
    server.stop().unwrap();
    assert!(server.pause().is_err(), "there is nothing to pause");
    server.restart().unwrap();
    assert!(connects(port.unwrap()));
    server.restart().unwrap(); // also while it runs
    assert!(witness.exists(), "the data was not kept");
}

#[test]
fn paused_server_answers_after_resume() {
    let mut server = TestServer::builder().start().unwrap();
    let pid = server.pid().unwrap();
    server.pause().unwrap();
    eventually("it is paused", || state(pid) == Some('T'));
    server.resume().unwrap();
    eventually("it runs again", || state(pid) != Some('T'));
    server.pause().unwrap();
    server.stop().unwrap();
    assert!(is_dead(pid), "a paused server can be stopped as well");
}

#[test]
fn failed_start_shows_the_servers_log() {
    let error = TestServer::builder().arg("--no-such-flag").start().unwrap_err();
    assert!(matches!(error, Error::Start { .. }), "{error:?}");
    assert!(error.to_string().contains("no-such-flag"), "{error}");
}

#[test]
fn two_servers_do_not_share_anything() {
    let start = |builder: Builder| std::thread::spawn(|| builder.start().unwrap());
    let a = start(TestServer::builder());
    let b = start(TestServer::builder());
    let a = a.join().unwrap();
    let b = b.join().unwrap();
    assert_ne!(a.port(), b.port());
    assert_ne!(a.folder(), b.folder());
    drop(a);
    assert!(connects(b.port().unwrap()), "the one's end is not the other's");
}

#[test]
fn shared_server_is_one_with_many_databases() {
    let shared = session_test_server::shared().unwrap();
    let again = std::thread::spawn(|| session_test_server::uri().unwrap());
    assert_eq!(again.join().unwrap(), shared.uri());
    let names: std::collections::HashSet<_> =
        (0..100).map(|_| session_test_server::fresh_database()).collect();
    assert_eq!(names.len(), 100);
    assert!(names.iter().all(|name| name.len() < 64), "MongoDB's limit");
}

#[test]
fn external_server_is_used_unchanged() {
    let server = TestServer::builder().start().unwrap();
    let port = server.port().unwrap();
    let uri = server.uri();
    let said = role("shared", |command| command.env("MONGODB_URI", uri)).wait_for_text().unwrap();
    assert_eq!(said, format!("external {uri}"));
    drop(server);
    let said =
        role("shared", |command| command.env("MONGODB_URI", uri_of(port))).wait_for_text().unwrap();
    assert!(said.contains("error") && said.contains("nothing answers"), "{said}");
}

fn uri_of(port: u16) -> String {
    format!("mongodb://127.0.0.1:{port}")
}

#[test]
fn missing_server_and_installers_are_reported() {
    let empty = tempfile::tempdir().unwrap();
    let said = role("shared", |command| {
        command
            .env_remove("MONGODB_URI")
            .env_remove("SESSION_TEST_SERVER")
            .env_remove("CARGO")
            .env("PATH", empty.path())
            .env("SESSION_TEST_SERVER_CACHE", empty.path().join("cache"))
    })
    .wait_for_text()
    .unwrap();
    for part in ["mongod", "cmake", "python3", "MONGODB_URI"] {
        assert!(said.contains(part), "{part} in {said}");
    }
}

#[test]
fn killed_process_leaves_nothing_behind() {
    let status = leaves_nothing(|child| signal(child, Signal::KILL));
    assert_eq!(status.signal(), Some(9));
}

#[test]
fn interrupted_process_leaves_nothing_behind() {
    let status = leaves_nothing(|child| signal(child, Signal::INT));
    assert_eq!(status.signal(), Some(2));
}

#[test]
fn panicking_process_leaves_nothing_behind() {
    let status = leaves_nothing(|child| drop(child.stdin.take()));
    assert!(!status.success());
    assert_eq!(status.signal(), None);
}

/// Makes a child process start a server, lets `end` end the child, and checks that nothing is left.
fn leaves_nothing(end: impl FnOnce(&mut Child)) -> ExitStatus {
    let mut child = role("hold", |command| command.env_remove("MONGODB_URI")).0;
    let mut line = String::new();
    let mut output = BufReader::new(child.stdout.take().unwrap());
    while !line.contains("holding") {
        line.clear();
        assert!(output.read_line(&mut line).unwrap() > 0, "the child ended early");
    }
    let words: Vec<&str> = line.trim().splitn(4, ' ').collect();
    let pid: u32 = words[1].parse().unwrap();
    let port: u16 = words[2].parse().unwrap();
    let folder = PathBuf::from(words[3]);
    assert!(connects(port) && folder.is_dir());
    assert!(!is_dead(pid));

    end(&mut child);
    let status = child.wait().unwrap();
    eventually("the server is dead", || is_dead(pid));
    eventually("the folder is gone", || !folder.exists());
    assert!(!connects(port));
    assert!(no_process_with(&folder), "a process is left over");
    status
}

/// Whether the reaper is gone too: its command line contains the folder.
fn no_process_with(folder: &Path) -> bool {
    let mut gone = false;
    eventually("all processes are gone", || {
        let all = Command::new("ps").args(["-A", "-o", "args="]).output().unwrap();
        gone = !String::from_utf8_lossy(&all.stdout).contains(folder.to_str().unwrap());
        gone
    });
    gone
}

fn signal(child: &mut Child, signal: Signal) {
    kill_process(Pid::from_child(child), signal).unwrap();
}

struct Role(Child);

impl Role {
    /// The text that the child wrote for its parent, once the child has ended.
    fn wait_for_text(self) -> Option<String> {
        let output = self.0.wait_with_output().unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        let (_, said) = text.split_once("said: ")?;
        Some(said.split(" :said").next()?.to_owned())
    }
}

/// Starts this test program again, to run [`child_process`] in that role.
fn role(name: &str, prepare: impl FnOnce(&mut Command) -> &mut Command) -> Role {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command
        .args(["--exact", "child_process", "--nocapture", "--ignored"])
        .env(ROLE, name)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped());
    Role(prepare(&mut command).spawn().unwrap())
}

#[test]
#[ignore = "not a test: the child process of the others"]
fn child_process() {
    match std::env::var(ROLE).as_deref() {
        Ok("shared") => match session_test_server::shared() {
            Ok(server) if server.is_external() => println!("said: external {} :said", server.uri()),
            Ok(server) => println!("said: own {} :said", server.uri()),
            Err(error) => println!("said: error {error} :said"),
        },
        Ok("hold") => {
            // The shared server is never dropped: only the end of the process ends it.
            let server = session_test_server::shared().unwrap();
            println!(
                "\nholding {} {} {}",
                server.pid().unwrap(),
                server.port().unwrap(),
                server.folder().unwrap().display()
            );
            // Wait until the parent closes its end.
            let _ = std::io::stdin().lines().next();
            panic!("as asked for");
        }
        _ => {}
    }
}

#[test]
fn kinds_can_be_asked_for() {
    // Not the Python server: it would be installed only for this test.
    let error = TestServer::builder().kind(Kind::Mongod).start();
    match error {
        Ok(server) => assert_eq!(server.kind(), Some(Kind::Mongod)),
        Err(error) => assert!(matches!(error, Error::NoServer { .. }), "{error}"),
    }
}
