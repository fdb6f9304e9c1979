//! What a test's own thread has logged.

use std::cell::RefCell;
use std::io;
use std::sync::Once;

/// What is logged by this thread, from here on.
///
/// One subscriber for all threads: those that come and go with a test are forgotten and remembered by
/// other threads' tests at the wrong moment.
pub(crate) struct Log;

thread_local! {
    static LOGGED: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

impl Log {
    pub(crate) fn start() {
        static INSTALLED: Once = Once::new();
        INSTALLED.call_once(|| {
            let lines = tracing_subscriber::fmt().with_writer(|| Log);
            tracing::subscriber::set_global_default(lines.finish()).unwrap();
        });
        LOGGED.take();
    }

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
