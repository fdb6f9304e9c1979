//! Putting a server program into the user's cache folder, once for all projects and processes.

use std::env;
use std::ffi::OsString;
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

use crate::error::tail;
use crate::find::{is_executable, on_path};
use crate::say;

/// The crate that has `secantusd-rs`, and the version all tests are run against.
const CRATE: &str = "secantus-mdb";
const CRATE_VERSION: &str = "0.5.3-beta.196";
/// The wheel of the same server's Python twin.
const WHEEL: &str = "secantusdb";
pub(crate) const WHEEL_VERSION: &str = "0.7.0b3";

/// How often a long installation says that it is still at it.
const SIGN_OF_LIFE: Duration = Duration::from_secs(30);

/// `secantusd-rs` from the cache, built there first if need be; and a word on where it is from.
pub(crate) fn cargo() -> Result<(PathBuf, String), String> {
    let cache = Cache::open().map_err(|reason| format!("secantusd-rs: {reason}"))?;
    let home = cache.folder.join(format!("{CRATE}-{CRATE_VERSION}"));
    let program = home.join("bin").join("secantusd-rs");
    let ready = || is_executable(&program);
    let why = "no mongod is on PATH, secantusd-rs is in the cache".to_owned();
    if ready() {
        return Ok((program, why));
    }
    let failed = |reason: String| format!("{CRATE} {CRATE_VERSION} with cargo: {reason}");
    if on_path("cmake").is_none() {
        return Err(failed("cmake is not on PATH, the build needs it".into()));
    }
    let toolchain = Toolchain::find().map_err(failed)?;
    let _lock = cache.lock().map_err(failed)?;
    if ready() {
        return Ok((program, why)); // another process was first
    }
    let log = cache.folder.join("cargo-install.log");
    let uri = match env::var_os("MONGODB_URI") {
        None => "no MONGODB_URI",
        Some(_) => "a server of its own is asked for",
    };
    say(&format!(
        "{uri}, and no mongod or secantusd-rs found: building the test server {CRATE} \
         {CRATE_VERSION} with cargo into {}, some minutes, once; log: {}",
        home.display(),
        log.display()
    ));
    // Beside its place and moved there when whole, so a build that was cut off is never used. The
    // objects stay on the other hand, so the next try goes on where that one ended.
    let half = tempfile::Builder::new()
        .prefix("half-")
        .tempdir_in(&cache.folder)
        .map_err(|error| failed(error.to_string()))?;
    let objects = cache.folder.join("build");
    let mut command = toolchain.command(&cache.folder);
    command
        .args(["install", CRATE, "--version", CRATE_VERSION])
        // It asks for a newer Rust than it needs.
        .args(["--ignore-rust-version", "--no-track", "--root"])
        .arg(half.path())
        .env("CARGO_TARGET_DIR", &objects);
    run(command, &log, "building the test server").map_err(failed)?;
    match fs::rename(half.path(), &home) {
        Ok(()) => {}
        Err(_) if ready() => {}
        Err(error) => return Err(failed(format!("could not move it into place: {error}"))),
    }
    // Hundreds of megabytes that are of no more use; and only a matter of space.
    let _ = fs::remove_dir_all(&objects);
    Ok((program, "built now with cargo".to_owned()))
}

/// The command of the Python twin in the cache, installed there first if need be; and a word on
/// where it is from. `reason` says why it comes to that, if something better was tried before.
pub(crate) fn python(reason: Option<&str>) -> Result<(Vec<OsString>, String), String> {
    let failed = |reason: String| format!("{WHEEL} {WHEEL_VERSION} with pip: {reason}");
    let cache = Cache::open().map_err(failed)?;
    let home = cache.folder.join(format!("{WHEEL}-{WHEEL_VERSION}"));
    let program = home.join("bin").join("python");
    // A virtual environment cannot be moved, so what says that it is whole is a file written last.
    let marker = home.join("installed");
    let ready = || marker.exists() && is_executable(&program);
    let command = vec![program.clone().into(), "-m".into(), "secantus".into()];
    if ready() {
        return Ok((command, "secantusd-py is in the cache".to_owned()));
    }
    let python = on_path("python3").ok_or_else(|| failed("python3 is not on PATH".into()))?;
    let _lock = cache.lock().map_err(failed)?;
    if ready() {
        return Ok((command, "secantusd-py is in the cache".to_owned()));
    }
    let log = cache.folder.join("pip-install.log");
    let because = reason.map(|r| format!("{r}; ")).unwrap_or_default();
    say(&format!(
        "{because}installing the test server {WHEEL} {WHEEL_VERSION} with pip into {}, a minute, \
         once; log: {}",
        home.display(),
        log.display()
    ));
    let io = |error: std::io::Error| failed(error.to_string());
    if home.exists() {
        fs::remove_dir_all(&home).map_err(io)?;
    }
    let mut venv = Command::new(python);
    venv.args(["-m", "venv"]).arg(&home).current_dir(&cache.folder);
    run(venv, &log, "making a Python environment").map_err(failed)?;
    let mut pip = Command::new(&program);
    pip.args(["-m", "pip", "install", "--disable-pip-version-check"])
        .arg(format!("{WHEEL}=={WHEEL_VERSION}"))
        .current_dir(&cache.folder);
    run(pip, &log, "installing the test server").map_err(failed)?;
    fs::write(&marker, "").map_err(io)?;
    Ok((command, "installed now with pip".to_owned()))
}

/// The folder all installations are in.
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
            // The standard says that a relative one is to be ignored.
            Some(xdg) if xdg.is_absolute() => xdg,
            _ => PathBuf::from(variable("HOME")?).join(".cache"),
        };
        Some(base.join("tower-sessions-moka-mongodb-store"))
    }

    /// Waits until no other process installs; the system takes the lock back from one that dies.
    fn lock(&self) -> Result<File, String> {
        let path = self.folder.join("install.lock");
        let file = File::create(&path).map_err(|error| error.to_string())?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(file),
            Err(Errno::WOULDBLOCK) => say("another process installs it now, waiting for it"),
            Err(error) => return Err(error.to_string()),
        }
        flock(&file, FlockOperation::LockExclusive).map_err(|error| error.to_string())?;
        Ok(file)
    }
}

/// The cargo to build with.
struct Toolchain {
    cargo: PathBuf,
    /// The variables of an outer cargo which are kept from it.
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
        // The project's own toolchain may be an old one, so the user's default is better; but there
        // need not be one.
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
        // Where no project's .cargo/config.toml and rust-toolchain.toml is looked for.
        command.current_dir(folder);
        for name in &self.hidden {
            command.env_remove(name);
        }
        command
    }
}

/// Whether the variable is about the build which this runs in, and not about the machine.
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

/// Runs `command` to its end with all output in the file `log`, and says now and then that it
/// still runs.
fn run(mut command: Command, log: &Path, doing: &str) -> Result<(), String> {
    let file = File::create(log).map_err(|error| error.to_string())?;
    let copy = file.try_clone().map_err(|error| error.to_string())?;
    let begun = Instant::now();
    let mut child =
        command.stdin(Stdio::null()).stdout(file).stderr(copy).spawn().map_err(|error| {
            let program = command.get_program().to_string_lossy();
            format!("could not run {program}: {error}")
        })?;
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
    fn the_cache_is_where_the_user_wants_it() {
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
    fn the_outer_build_is_hidden_and_the_machine_is_not() {
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
    fn a_command_that_fails_tells_its_last_words() {
        let folder = tempfile::tempdir().unwrap();
        let log = folder.path().join("log");
        let mut command = Command::new("sh");
        command.args(["-c", "echo one; echo no compiler >&2; exit 3"]);
        let error = run(command, &log, "trying").unwrap_err();
        assert!(error.contains("no compiler") && error.contains('3'), "{error}");
    }

    #[test]
    fn one_process_installs_at_a_time() {
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache { folder: folder.path().to_owned() };
        let first = cache.lock().unwrap();
        let other = File::create(folder.path().join("install.lock")).unwrap();
        let now = flock(&other, FlockOperation::NonBlockingLockExclusive);
        assert_eq!(now, Err(Errno::WOULDBLOCK));
        drop(first);
        // Waits: a child of another test may hold a copy between its fork and its exec.
        flock(&other, FlockOperation::LockExclusive).unwrap();
    }
}
