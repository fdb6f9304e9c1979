//! Finds the server program to run, and builds the command line for each kind of server.

use std::env;
use std::ffi::{OsStr, OsString};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::Kind;
use crate::error::Error;
use crate::install;

/// A server program that exists.
#[derive(Debug, Clone)]
pub(crate) struct Program {
    pub(crate) kind: Kind,
    /// The program, and the arguments that come before all others.
    pub(crate) command: Vec<OsString>,
    /// Its name and version.
    pub(crate) title: String,
    /// Why it was chosen, for the line on stderr.
    pub(crate) why: String,
}

/// The settings of a start.
pub(crate) struct Wanted<'a> {
    pub(crate) port: u16,
    pub(crate) folder: &'a Path,
    pub(crate) durable: bool,
    pub(crate) test_commands: bool,
    pub(crate) auth: bool,
    /// The files of the certificate chain and of the key.
    pub(crate) tls: Option<(&'a Path, &'a Path)>,
    pub(crate) extra: &'a [OsString],
}

/// The folder of the server's own files inside its temporary folder.
pub(crate) const DATA: &str = "data";
/// An empty configuration, so that the server reads no configuration file of the user.
pub(crate) const CONFIG: &str = "empty.toml";
/// The shared secret that a `mongod` in a replica set needs if it requires passwords.
pub(crate) const KEY_FILE: &str = "keyfile";
/// Certificate and key in one file, which `mongod` requires.
pub(crate) const TLS_FILE: &str = "server.pem";

impl Program {
    /// The whole command line of a start.
    pub(crate) fn command_line(&self, wanted: &Wanted<'_>) -> Vec<OsString> {
        let mut line = self.command.clone();
        let file = |name: &str| wanted.folder.join(name).into_os_string();
        let port = OsString::from(wanted.port.to_string());
        let mut add = |args: &[&OsStr]| line.extend(args.iter().map(|&arg| arg.to_owned()));
        if self.kind == Kind::Mongod {
            add(&["--bind_ip".as_ref(), "127.0.0.1".as_ref()]);
            add(&["--port".as_ref(), &port]);
            add(&["--dbpath".as_ref(), &file(DATA)]);
            add(&["--replSet".as_ref(), "rs0".as_ref()]);
            // Its socket file would stay in the folder of all temporary files.
            add(&["--nounixsocket".as_ref()]);
            if wanted.test_commands {
                add(&["--setParameter".as_ref(), "enableTestCommands=1".as_ref()]);
            }
            if wanted.auth {
                add(&["--auth".as_ref(), "--keyFile".as_ref(), &file(KEY_FILE)]);
            }
            if wanted.tls.is_some() {
                add(&["--tlsMode".as_ref(), "requireTLS".as_ref()]);
                add(&["--tlsCertificateKeyFile".as_ref(), &file(TLS_FILE)]);
                // `mongod` also connects to itself, and a test's certificate may not be valid for
                // that.
                add(&["--tlsCAFile".as_ref(), &file(TLS_FILE)]);
                add(&["--tlsAllowConnectionsWithoutCertificates".as_ref()]);
                add(&["--tlsAllowInvalidCertificates".as_ref()]);
                add(&["--tlsAllowInvalidHostnames".as_ref()]);
            }
        } else {
            add(&["--config".as_ref(), &file(CONFIG)]);
            add(&["--host".as_ref(), "127.0.0.1".as_ref()]);
            add(&["--port".as_ref(), &port]);
            add(&["--storage-path".as_ref(), &file(DATA)]);
            if self.kind == Kind::SecantusRs {
                // The server allocates its whole log file at the start. The default is 128 MB for
                // each server.
                add(&["--log-file-max".as_ref(), "64MB".as_ref()]);
            }
            if wanted.durable {
                add(&["--sync-on-commit".as_ref()]);
            }
            if wanted.test_commands {
                add(&["--enable-test-commands".as_ref()]);
            }
            if wanted.auth {
                add(&["--auth".as_ref()]);
            }
            if let Some((cert, key)) = wanted.tls {
                add(&["--tls-cert-file".as_ref(), cert.as_os_str()]);
                add(&["--tls-key-file".as_ref(), key.as_os_str()]);
            }
        }
        line.extend(wanted.extra.iter().cloned());
        line
    }

    /// The text in the log that shows that the program owns the port.
    ///
    /// A successful connection is not enough: if two servers were given the same port, the one that
    /// got it would answer for the other one.
    pub(crate) fn listening_mark(&self) -> &'static str {
        match self.kind {
            Kind::Mongod => "Waiting for connections",
            Kind::SecantusRs | Kind::SecantusPy => "listening on",
        }
    }
}

/// The variable that names the kind of server if the caller names none.
const KIND: &str = "SESSION_TEST_SERVER";

/// One way to get a program.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    FindMongod,
    FindRust,
    FindPython,
    InstallPython,
    BuildRust,
}

impl Way {
    /// The ways for `kind`, or for any kind, in the order in which they are tried.
    ///
    /// Installed programs come first. Then comes pip, which takes a minute, and then cargo, which
    /// takes some minutes. With `fast`, the faster server comes first.
    fn all(kind: Option<Kind>, fast: bool) -> &'static [Self] {
        use Way::{BuildRust, FindMongod, FindPython, FindRust, InstallPython};

        match kind {
            Some(Kind::Mongod) => &[FindMongod],
            Some(Kind::SecantusRs) => &[FindRust, BuildRust],
            Some(Kind::SecantusPy) => &[FindPython, InstallPython],
            None if fast => &[FindMongod, FindRust, BuildRust, FindPython, InstallPython],
            None => &[FindMongod, FindRust, FindPython, InstallPython, BuildRust],
        }
    }

    /// The program, or why this way fails. `last` is why the way before failed.
    fn go(self, last: &str) -> Result<Program, String> {
        match self {
            Self::FindMongod => mongod(),
            Self::FindRust => found_rust(),
            Self::FindPython => found_python(),
            Self::InstallPython => {
                install::pip().map(|python| twin(python, "secantusd-py was installed with pip"))
            }
            Self::BuildRust => {
                install::cargo(last).map(|path| rust(path, "secantusd-rs was built with cargo"))
            }
        }
    }
}

/// The program to use: one of `kind`, else of the kind in the environment, else the first one that
/// is found or can be installed.
pub(crate) fn program(kind: Option<Kind>, fast: bool) -> Result<Program, Error> {
    let named = env::var_os(KIND).filter(|name| !name.is_empty());
    let kind = match (kind, named) {
        (None, Some(name)) => Some(kind_of(&name)?),
        (kind, _) => kind,
    };
    let mut tried = Vec::new();
    for way in Way::all(kind, fast) {
        match way.go(tried.last().map_or("", String::as_str)) {
            Ok(program) => return Ok(program),
            Err(reason) => tried.push(reason),
        }
    }
    Err(Error::NoServer { tried })
}

fn kind_of(name: &OsStr) -> Result<Kind, Error> {
    match name.to_str() {
        Some("mongod") => Ok(Kind::Mongod),
        Some("rust") => Ok(Kind::SecantusRs),
        Some("python") => Ok(Kind::SecantusPy),
        _ => Err(Error::Unsupported(format!(
            "{KIND} is {}: it must be `mongod`, `rust` or `python`",
            name.display()
        ))),
    }
}

fn mongod() -> Result<Program, String> {
    let path = on_path("mongod").ok_or("mongod: not on PATH")?;
    Ok(Program {
        kind: Kind::Mongod,
        title: version(&path, "mongod"),
        command: vec![path.into()],
        why: "mongod is on PATH".to_owned(),
    })
}

fn found_rust() -> Result<Program, String> {
    if let Some(path) = on_path("secantusd-rs") {
        return Ok(rust(path, "secantusd-rs is on PATH"));
    }
    match install::cached_rust()? {
        Some(path) => Ok(rust(path, "secantusd-rs is in the cache")),
        None => Err("secantusd-rs: neither on PATH nor in the cache".to_owned()),
    }
}

fn rust(path: PathBuf, why: &str) -> Program {
    Program {
        kind: Kind::SecantusRs,
        title: version(&path, "secantusd-rs"),
        command: vec![path.into()],
        why: why.to_owned(),
    }
}

fn found_python() -> Result<Program, String> {
    match install::cached_python()? {
        Some(python) => Ok(twin(python, "secantusd-py is in the cache")),
        None => Err("secantusd-py: not in the cache".to_owned()),
    }
}

/// The Python server, run by the Python of its virtual environment.
fn twin(python: PathBuf, why: &str) -> Program {
    Program {
        kind: Kind::SecantusPy,
        title: format!("secantusd-py {}", install::WHEEL_VERSION),
        command: vec![python.into(), "-m".into(), "secantus".into()],
        why: why.to_owned(),
    }
}

/// The executable file of that name on PATH.
pub(crate) fn on_path(name: &str) -> Option<PathBuf> {
    env::split_paths(&env::var_os("PATH")?)
        .map(|folder| folder.join(name))
        .find(|path| is_executable(path))
}

pub(crate) fn is_executable(path: &Path) -> bool {
    path.metadata().is_ok_and(|file| file.is_file() && file.permissions().mode() & 0o111 != 0)
}

/// The first line of `--version`, or only the name if the program prints no version.
fn version(path: &Path, name: &str) -> String {
    let output = Command::new(path).arg("--version").stdin(Stdio::null()).output();
    let text = output.map(|output| output.stdout).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let first = text.lines().next().unwrap_or_default().trim();
    if first.contains(name) {
        first.to_owned()
    } else {
        // mongod prints only `db version v8.0.4`.
        format!("{name} {}", first.trim_start_matches("db version ")).trim_end().to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(kind: Kind, wanted: &Wanted<'_>) -> String {
        let program = Program {
            kind,
            command: vec!["prog".into()],
            title: String::new(),
            why: String::new(),
        };
        let words = program.command_line(wanted);
        words.iter().map(|word| word.to_string_lossy()).collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn command_line_of_every_kind_has_loopback_and_the_options() {
        let cert = Path::new("/c.pem");
        let key = Path::new("/k.pem");
        let extra = ["--last".into()];
        let mut wanted = Wanted {
            port: 5,
            folder: Path::new("/f"),
            durable: true,
            test_commands: true,
            auth: true,
            tls: Some((cert, key)),
            extra: &extra,
        };
        let rust = line(Kind::SecantusRs, &wanted);
        assert_eq!(
            rust,
            "prog --config /f/empty.toml --host 127.0.0.1 --port 5 --storage-path /f/data \
             --log-file-max 64MB --sync-on-commit --enable-test-commands --auth \
             --tls-cert-file /c.pem --tls-key-file /k.pem --last"
        );
        let python = line(Kind::SecantusPy, &wanted);
        assert_eq!(python, rust.replace(" --log-file-max 64MB", ""));
        let mongod = line(Kind::Mongod, &wanted);
        for part in [
            "prog --bind_ip 127.0.0.1 --port 5 --dbpath /f/data --replSet rs0",
            "--auth --keyFile /f/keyfile",
            "--tlsMode requireTLS --tlsCertificateKeyFile /f/server.pem",
            "enableTestCommands=1",
        ] {
            assert!(mongod.contains(part), "{part} in {mongod}");
        }
        (wanted.durable, wanted.auth, wanted.test_commands) = (false, false, false);
        (wanted.tls, wanted.extra) = (None, &[]);
        assert_eq!(
            line(Kind::SecantusPy, &wanted),
            "prog --config /f/empty.toml --host 127.0.0.1 --port 5 --storage-path /f/data"
        );
        assert!(!line(Kind::Mongod, &wanted).contains("tls"));
    }

    #[test]
    fn installed_programs_come_first_then_the_fastest_installation() {
        use Way::{BuildRust, FindMongod, FindPython, FindRust, InstallPython};

        let any = [FindMongod, FindRust, FindPython, InstallPython, BuildRust];
        assert_eq!(Way::all(None, false), any);
        let for_figures = [FindMongod, FindRust, BuildRust, FindPython, InstallPython];
        assert_eq!(Way::all(None, true), for_figures);
        for fast in [false, true] {
            assert_eq!(Way::all(Some(Kind::Mongod), fast), [FindMongod]);
            assert_eq!(Way::all(Some(Kind::SecantusRs), fast), [FindRust, BuildRust]);
            assert_eq!(Way::all(Some(Kind::SecantusPy), fast), [FindPython, InstallPython]);
        }
    }

    #[test]
    fn only_executable_files_count() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("prog");
        std::fs::write(&path, "#!/bin/sh\necho db version v8.0.4\necho more\n").unwrap();
        assert!(!is_executable(&path));
        assert!(!is_executable(folder.path()), "a folder is no program");
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        assert!(is_executable(&path));
        assert_eq!(version(&path, "mongod"), "mongod v8.0.4");
    }
}
