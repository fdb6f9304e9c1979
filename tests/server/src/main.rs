//! Starts a test server and prints its connection string; see `--help`.

use std::io::Write;
use std::process::{Command, ExitCode};

use session_test_server::{Kind, TestServer, install};

const HELP: &str = "\
A MongoDB-compatible server for tests, on loopback, with temporary data.

  session-test-server [OPTIONS]                 print its URI, run until Ctrl-C
  session-test-server [OPTIONS] -- COMMAND...   run COMMAND with MONGODB_URI set to it

  --install     only make sure that there is a server program (for CI)
  --mongod      MongoDB's own server
  --rust        secantusd-rs
  --python      secantusd-py, its Python twin
  --durable     acknowledged writes survive a kill -9 of the server
  --help        this text

Without a kind: that of SESSION_TEST_SERVER (mongod, rust or python) if it is set, else the first one
that is found, in the order above. If none is found, the Python twin is installed with pip (about a
minute), or else secantusd-rs is built with cargo (some minutes, with cmake and a C++ compiler).
";

fn main() -> ExitCode {
    match run() {
        Ok(code) => code,
        Err(error) => {
            eprintln!("session-test-server: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<ExitCode, Box<dyn std::error::Error>> {
    let mut out = std::io::stdout();
    let mut kind = None;
    let mut durable = false;
    let mut only_install = false;
    let mut command = None;
    let mut args = std::env::args_os().skip(1);
    while let Some(arg) = args.next() {
        match arg.to_str() {
            Some("--install") => only_install = true,
            Some("--mongod") => kind = Some(Kind::Mongod),
            Some("--rust") => kind = Some(Kind::SecantusRs),
            Some("--python") => kind = Some(Kind::SecantusPy),
            Some("--durable") => durable = true,
            Some("--") => {
                command = args.next();
                break;
            }
            Some("--help" | "-h") => {
                write!(out, "{HELP}")?;
                return Ok(ExitCode::SUCCESS);
            }
            _ => return Err(format!("unknown option {}; see --help", arg.display()).into()),
        }
    }
    if only_install {
        writeln!(out, "{}", install(kind)?)?;
        return Ok(ExitCode::SUCCESS);
    }
    let mut builder = TestServer::builder().durable(durable);
    if let Some(kind) = kind {
        builder = builder.kind(kind);
    }
    let mut server = builder.start()?;
    if let Some(command) = command {
        let status = Command::new(command).args(args).env("MONGODB_URI", server.uri()).status()?;
        let code = status.code().and_then(|code| u8::try_from(code).ok());
        return Ok(code.map_or(ExitCode::FAILURE, ExitCode::from));
    }
    // If the reader closes the pipe, the server must not end.
    let _ = writeln!(out, "{}", server.uri()).and_then(|()| out.flush());
    server.wait()?;
    Err("the server ended".into())
}
