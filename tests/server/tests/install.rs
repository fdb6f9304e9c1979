//! The installation of a server, on different machines. Python, cargo and cmake are scripts here, so each of
//! them can be missing or fail.
#![cfg(unix)]
#![allow(clippy::unwrap_used, reason = "a test ends where it fails")]

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use tempfile::TempDir;

const NOTED: &str = "PATH=/usr/bin:/bin; echo \"${0##*/} $*\" >>\"$CALLS\"\n";
const CMAKE: (&str, &str) = ("cmake", "");
/// `python3 -m venv DIR` puts the script into DIR. Everything else succeeds.
const PYTHON: (&str, &str) =
    ("python3", "if [ \"$2\" = venv ]; then mkdir -p \"$3/bin\"; cp \"$0\" \"$3/bin/python\"; fi");
const PYTHON_WITHOUT_NETWORK: (&str, &str) = (
    "python3",
    "if [ \"$2\" = venv ]; then mkdir -p \"$3/bin\"; cp \"$0\" \"$3/bin/python\"; fi\n\
     if [ \"$2\" = pip ]; then echo pip has no network; exit 1; fi",
);
/// `cargo install` makes a server that prints its version. Everything else succeeds.
const CARGO: (&str, &str) = (
    "cargo",
    "while [ $# -gt 0 ]; do if [ \"$1\" = --root ]; then root=$2; fi; shift; done\n\
     if [ -z \"$root\" ]; then exit 0; fi\n\
     mkdir -p \"$root/bin\"\n\
     printf '#!/bin/sh\\necho secantusd-rs 9.9\\n' >\"$root/bin/secantusd-rs\"\n\
     chmod +x \"$root/bin/secantusd-rs\"",
);
const CARGO_WITHOUT_NETWORK: (&str, &str) =
    ("cargo", "if [ \"$1\" = install ]; then echo cargo has no network; exit 101; fi");

/// A machine with an empty cache, on which only these programs are on PATH.
struct Machine {
    folder: TempDir,
}

impl Machine {
    fn with(programs: &[(&str, &str)]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join("bin")).unwrap();
        fs::write(folder.path().join("calls"), "").unwrap();
        let machine = Self { folder };
        for program in programs {
            machine.add(*program);
        }
        machine
    }

    fn add(&self, (name, script): (&str, &str)) {
        let path = self.folder.path().join("bin").join(name);
        fs::write(&path, format!("#!/bin/sh\n{NOTED}{script}\n")).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    }

    fn command(&self) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_session-test-server"));
        command
            .arg("--install")
            .env_remove("CARGO")
            .env_remove("SESSION_TEST_SERVER")
            .env("PATH", self.folder.path().join("bin"))
            .env("SESSION_TEST_SERVER_CACHE", self.folder.path().join("cache"))
            .env("CALLS", self.folder.path().join("calls"))
            .stdin(Stdio::null());
        command
    }

    /// The installed server, and everything that was printed.
    fn install(&self) -> (String, String) {
        texts(&self.command().output().unwrap())
    }

    /// How often `program` was run with `argument` among its arguments.
    fn calls(&self, program: &str, argument: &str) -> usize {
        let calls = fs::read_to_string(self.folder.path().join("calls")).unwrap();
        let is_such = |line: &&str| {
            let mut words = line.split(' ');
            words.next() == Some(program) && words.any(|word| word == argument)
        };
        calls.lines().filter(is_such).count()
    }
}

fn texts(output: &Output) -> (String, String) {
    let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
    (text(&output.stdout), text(&output.stderr))
}

#[test]
fn pip_installs_although_cargo_could_build() {
    let machine = Machine::with(&[PYTHON, CARGO, CMAKE]);
    let (server, said) = machine.install();
    assert!(server.starts_with("secantusd-py"), "{said}");
    assert_eq!((machine.calls("python", "install"), machine.calls("cargo", "install")), (1, 0));
}

#[test]
fn cargo_builds_if_pip_fails() {
    let machine = Machine::with(&[PYTHON_WITHOUT_NETWORK, CARGO, CMAKE]);
    let (server, said) = machine.install();
    assert_eq!(server.trim(), "secantusd-rs 9.9", "{said}");
    let building = said.lines().find(|line| line.contains("building the test server")).unwrap();
    assert!(building.contains("pip has no network"), "{building}");
}

#[test]
fn cargo_builds_if_there_is_no_python() {
    let machine = Machine::with(&[CARGO, CMAKE]);
    let (server, said) = machine.install();
    assert_eq!(server.trim(), "secantusd-rs 9.9", "{said}");
    assert!(said.contains("python3 is not on PATH"), "{said}");
}

#[test]
fn each_reason_is_named_if_all_ways_fail() {
    let machine = Machine::with(&[PYTHON_WITHOUT_NETWORK, CARGO_WITHOUT_NETWORK, CMAKE]);
    let output = machine.command().output().unwrap();
    assert!(!output.status.success());
    let (_, said) = texts(&output);
    let (_, error) = said.split_once("Tried:").unwrap();
    for reason in ["mongod: not on PATH", "pip has no network", "cargo has no network"] {
        assert!(error.contains(reason), "{reason} in {said}");
    }
    // A later attempt starts from the beginning, even if the first one left an incomplete
    // environment.
    machine.add(PYTHON);
    let (server, said) = machine.install();
    assert!(server.starts_with("secantusd-py"), "{said}");
}

#[test]
fn a_server_in_the_cache_is_used_and_nothing_is_installed() {
    let machine = Machine::with(&[CARGO, CMAKE]);
    machine.install();
    machine.add(PYTHON);
    let (server, said) = machine.install();
    assert_eq!(server.trim(), "secantusd-rs 9.9", "{said}");
    assert_eq!((machine.calls("python", "install"), machine.calls("cargo", "install")), (0, 1));

    let machine = Machine::with(&[PYTHON, CARGO, CMAKE]);
    machine.install();
    let (server, said) = machine.install();
    assert!(server.starts_with("secantusd-py"), "{said}");
    assert_eq!((machine.calls("python", "install"), machine.calls("cargo", "install")), (1, 0));
    // The faster server is used as soon as it is installed.
    let built = texts(&machine.command().arg("--rust").output().unwrap());
    assert_eq!(machine.install().0, built.0);
    assert_eq!(machine.calls("cargo", "install"), 1);
}

#[test]
fn processes_that_start_at_once_install_once() {
    let machine = Machine::with(&[PYTHON, CARGO, CMAKE]);
    let start = |_| machine.command().stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
    let all: Vec<_> = (0..4).map(start).collect();
    for process in all {
        let (server, said) = texts(&process.unwrap().wait_with_output().unwrap());
        assert!(server.starts_with("secantusd-py"), "{said}");
    }
    assert_eq!(machine.calls("python", "install"), 1);
}

#[test]
fn the_environment_names_the_kind() {
    let machine = Machine::with(&[PYTHON, CARGO, CMAKE]);
    let named =
        |kind: &str| texts(&machine.command().env("SESSION_TEST_SERVER", kind).output().unwrap());
    assert_eq!(named("rust").0.trim(), "secantusd-rs 9.9");
    assert!(named("python").0.starts_with("secantusd-py"));
    assert!(named("").0.starts_with("secantusd-rs"), "an empty variable names none");
    let (server, said) = named("mongod");
    assert_eq!(server, "");
    assert!(said.contains("mongod: not on PATH") && !said.contains("cargo"), "{said}");
    let (server, said) = named("mongodb");
    assert_eq!(server, "");
    assert!(said.contains("must be `mongod`, `rust` or `python`"), "{said}");
}

/// The real Python behaves like another one: without `ensurepip`, as on Debian without
/// `python3-venv`, or too old.
#[test]
fn unsuitable_python_is_reported_with_what_it_lacks() {
    let Some(python) = ["/usr/bin", "/usr/local/bin", "/opt/bin"]
        .map(|folder| Path::new(folder).join("python3"))
        .into_iter()
        .find(|path| path.exists())
    else {
        eprintln!("there is no python3 here, so this was not tested");
        return;
    };
    for (before, reason) in [
        ("sys.modules[\"ensurepip\"] = None", "python3 has no ensurepip"),
        ("sys.version_info = (3, 9, 1)", "python3 is 3.9, 3.10 is needed"),
    ] {
        let before = format!("import sys; {before}; exec(sys.argv[1])");
        let script = format!("exec {} -c '{before}' \"$2\"", python.display());
        let machine = Machine::with(&[("python3", &script), CARGO, CMAKE]);
        let (server, said) = machine.install();
        assert_eq!(server.trim(), "secantusd-rs 9.9", "{said}");
        assert!(said.contains(reason), "{reason} in {said}");
    }
}

#[test]
fn pip_does_not_wait_for_a_build_with_cargo() {
    let slow = format!(
        "if [ \"$1\" = install ]; then echo >\"$CALLS.begun\"; cat \"$CALLS.end\"; fi\n{}",
        CARGO.1
    );
    let machine = Machine::with(&[PYTHON, ("cargo", &slow), CMAKE]);
    let [begun, end] = ["calls.begun", "calls.end"].map(|name| machine.folder.path().join(name));
    for fifo in [&begun, &end] {
        assert!(Command::new("mkfifo").arg(fifo).status().unwrap().success());
    }
    let mut build = machine.command().arg("--rust").stdout(Stdio::null()).spawn().unwrap();
    fs::read(&begun).unwrap();
    let mut command = machine.command();
    let (done, is_done) = std::sync::mpsc::channel();
    std::thread::spawn(move || done.send(texts(&command.output().unwrap())));
    let installed = is_done.recv_timeout(Duration::from_secs(60));
    fs::write(&end, "").unwrap();
    assert!(build.wait().unwrap().success());
    assert!(installed.unwrap().0.starts_with("secantusd-py"));
}
