//! Replies that a test holds, to make races happen in the order that the test needs.

use std::sync::{Mutex, PoisonError};

use bson::Document;
use tokio::sync::oneshot;
use tokio::time::timeout;

use crate::PATIENCE;
use crate::fault::ServerError;

/// The commands whose replies are held. A `Mutex`, since the requests of all connections read it.
#[derive(Debug, Default)]
pub(crate) struct Traps(Mutex<Vec<(&'static str, Trap)>>);

/// The proxy's half of a reply that it will hold. The test has the other half, a [`HeldReply`].
#[derive(Debug)]
pub(crate) struct Trap {
    /// Receives the number of the command's statements.
    reached: oneshot::Sender<usize>,
    abandoned: oneshot::Sender<()>,
    verdict: oneshot::Receiver<Verdict>,
}

/// A reply that the server has sent and that the client has not received.
#[derive(Debug)]
pub struct HeldReply {
    reached: oneshot::Receiver<usize>,
    abandoned: oneshot::Receiver<()>,
    verdict: oneshot::Sender<Verdict>,
}

#[derive(Debug)]
enum Verdict {
    Deliver,
    Cut,
    Refuse(ServerError),
}

impl Traps {
    /// Sets a trap for the next command of this name for which no other trap is set.
    pub(crate) fn set(&self, command: &'static str) -> HeldReply {
        let (reached, is_reached) = oneshot::channel();
        let (abandoned, is_abandoned) = oneshot::channel();
        let (verdict, decided) = oneshot::channel();
        let trap = Trap { reached, abandoned, verdict: decided };
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push((command, trap));
        HeldReply { reached: is_reached, abandoned: is_abandoned, verdict }
    }

    /// Removes the trap for this command, if there is one.
    pub(crate) fn spring(&self, command: &str) -> Option<Trap> {
        let mut traps = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let at = traps.iter().position(|(name, _)| *name == command)?;
        Some(traps.remove(at).1)
    }
}

/// What happens to a reply that was held.
#[derive(Debug)]
pub(crate) enum Released {
    AsItWas,
    Instead(Document),
    /// The client has closed the connection, or the test closes it.
    Cut,
}

impl Trap {
    /// Holds the reply to `command` until the test decides, or the client closes the connection.
    pub(crate) async fn hold(
        self,
        command: &Document,
        statements: usize,
        hung_up: impl Future<Output = ()>,
    ) -> Released {
        let _ = self.reached.send(statements);
        let verdict = tokio::select! {
            verdict = self.verdict => verdict,
            () = hung_up => {
                let _ = self.abandoned.send(());
                return Released::Cut;
            }
        };
        match verdict {
            Ok(Verdict::Cut) => Released::Cut,
            Ok(Verdict::Refuse(error)) => Released::Instead(error.reply(command)),
            // If the test drops its end, the reply is delivered.
            Ok(Verdict::Deliver) | Err(_) => Released::AsItWas,
        }
    }
}

impl HeldReply {
    /// Waits until the server has carried the command out, and returns how many statements it has.
    ///
    /// # Panics
    ///
    /// If no such command comes within a minute.
    pub async fn reached(&mut self) -> usize {
        let reached = timeout(PATIENCE, &mut self.reached).await.ok().and_then(Result::ok);
        assert!(reached.is_some(), "the command was not sent");
        reached.unwrap_or_default()
    }

    /// Waits until the client has closed the connection of this request.
    ///
    /// # Panics
    ///
    /// If that takes more than a minute.
    pub async fn abandoned(&mut self) {
        let abandoned = timeout(PATIENCE, &mut self.abandoned).await.ok().and_then(Result::ok);
        assert!(abandoned.is_some(), "the client still waits for the reply");
    }

    /// Delivers the reply to the client.
    pub fn deliver(self) {
        let _ = self.verdict.send(Verdict::Deliver);
    }

    /// Closes the connection instead: the client never learns the outcome of the command.
    pub fn cut(self) {
        let _ = self.verdict.send(Verdict::Cut);
    }

    /// Replaces the reply by an error of this code, without labels and with the name `Refused`.
    pub fn refuse(self, code: i32) {
        self.refuse_with(code, "Refused", &[]);
    }

    /// Replaces the reply by an error of this code and name, with exactly these labels.
    pub fn refuse_with(self, code: i32, name: &str, labels: &[&str]) {
        let error = ServerError::new(code).with_name(name);
        self.refuse_as(error.with_labels(labels.iter().copied()));
    }

    /// Replaces the reply by an error.
    pub fn refuse_as(self, error: ServerError) {
        let _ = self.verdict.send(Verdict::Refuse(error));
    }
}
