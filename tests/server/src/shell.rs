//! The server's process, and a small shell that outlives this process to end the server.
//!
//! The server is a child of this process, in its own process group, so Ctrl-C on the terminal
//! reaches the tests and not the server. Beside it runs a shell, the reaper. Its standard input is
//! a pipe, and this process holds the other end. However this process ends (return, panic, abort,
//! Ctrl-C, `kill -9`, or a `static` that is never dropped), the system closes the pipe. Then the
//! reaper kills the server and removes the temporary folder.

use std::ffi::OsString;
use std::io::{self, PipeReader, PipeWriter};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};

/// Reads process ids until the pipe is closed, then kills the process of the last one. `-` means that there
/// is no process.
///
/// The system may still work for a killed process, and the reaper waits for that. If no process
/// collects orphans, the process stays listed as dead (`Z`) forever.
const REAPER: &str = r#"
trap '' HUP INT TERM
pid=-
while read -r word; do pid=$word; done
if [ "$pid" != - ]; then
  kill -KILL "$pid" 2>/dev/null
  for try in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20; do
    case $(ps -o stat= -p "$pid" 2>/dev/null) in '' | Z*) break ;; esac
    sleep 0.1
  done
fi
rm -rf -- "$0"
"#;

/// Sends the process id to the reaper before the shell becomes the server, so the reaper knows
/// every server that runs. The redirection also closes the pipe in the server.
const LAUNCHER: &str = r#"echo "$$"; exec "$@" >>"$0" 2>&1"#;

/// Starts the shell that removes `folder` (and the server) once all writers of `end` are gone.
pub(crate) fn reaper(folder: &Path, end: PipeReader) -> io::Result<Child> {
    Command::new("sh")
        .args(["-c", REAPER])
        .arg(folder)
        .current_dir("/")
        .stdin(end)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .process_group(0)
        .spawn()
}

/// Starts the server with this command line. The file `log` receives all its output.
pub(crate) fn launch(
    line: &[OsString],
    log: &Path,
    folder: &Path,
    pipe: PipeWriter,
) -> io::Result<Child> {
    Command::new("sh")
        .args(["-c", LAUNCHER])
        .arg(log)
        .args(line)
        .current_dir(folder)
        .stdin(Stdio::null())
        .stdout(pipe)
        .stderr(Stdio::null())
        .process_group(0)
        .spawn()
}
