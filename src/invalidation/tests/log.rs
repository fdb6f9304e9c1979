//! `Log`: the log of a test's own thread.

use std::cell::RefCell;
use std::io;
use std::sync::Once;

/// Collects what this thread logs.
///
/// All threads share one subscriber. A subscriber that comes and goes with a test would change, at the wrong moment,
/// which events the tests of other threads see.
pub(crate) struct Log;

thread_local! {
    static LOGGED: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

impl Log {
    /// Forgets what this thread has logged so far.
    pub(crate) fn start() {
        static INSTALLED: Once = Once::new();
        INSTALLED.call_once(|| {
            let lines = tracing_subscriber::fmt().with_writer(|| Log);
            tracing::subscriber::set_global_default(lines.finish()).unwrap();
        });
        LOGGED.take();
    }

    /// How often this thread has logged this text.
    pub(crate) fn count(text: &str) -> usize {
        LOGGED.with_borrow(|log| std::str::from_utf8(log).unwrap().matches(text).count())
    }
}

impl io::Write for Log {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        LOGGED.with_borrow_mut(|log| log.extend_from_slice(bytes));
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
