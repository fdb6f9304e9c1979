//! The server's process, and the small shell which outlives us to end it.
//!
//! The server is a child of this process, in a process group of its own (so Ctrl-C on the terminal
//! reaches the tests and not the server). Beside it runs a shell, the reaper, whose standard input
//! is a pipe that this process holds the other end of. However this process ends (return, panic,
//! abort, Ctrl-C, `kill -9`, or a `static` that is never dropped), the system closes the pipe; the
//! reaper then kills the server and removes the temporary folder.

use std::ffi::OsString;
use std::io::{self, PipeReader, PipeWriter};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};

/// Reads process ids until the pipe is closed, `-` for none; then ends the last one of them.
///
/// A killed process is gone at once but for what the system still does for it, and that is waited
/// for; where nobody collects orphans it stays listed as dead (`Z`) for ever.
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

/// Tells the reaper its process id before it becomes the server, so there is no moment in which a
/// server runs that the reaper does not know. The redirection also closes the pipe in the server.
const LAUNCHER: &str = r#"echo "$$"; exec "$@" >>"$0" 2>&1"#;

/// Starts the shell that will remove `folder` (and the server) once all writers of `end` are gone.
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

/// Starts the server with this command line; all it writes goes to the file `log`.
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
