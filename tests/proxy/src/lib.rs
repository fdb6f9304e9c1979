//! A proxy between MongoDB clients and a server on loopback, for tests.
//!
//! It speaks `OP_MSG`, so that a test can [hold](Proxy::hold) the reply to a command and
//! [put in](Proxy::inject) errors of the server; and it can break the network: connections that
//! are cut, reset, refused, stalled, delayed or broken off in the middle of a message. In front of the
//! test server it also [answers as MongoDB does](Upstream::like_mongodb).
//!
//! # Layout
//!
//! - `message`: one message of the wire protocol, read and written.
//! - `proxy`: [`Proxy`], and what happens on each of its connections.
//! - `network`: the faults of the network.
//! - `hold`: [`HeldReply`], which a test delivers when it wants to.
//! - `fault`: [`ServerError`] and [`Injection`], what MongoDB answers when it refuses.
//! - `likeness`: makes the test server's change streams look like MongoDB's; `token`, its resume tokens;
//!   `oplog`, the times that go into them.
//! - `uri`: [`Location`], a connection string that leads through a proxy.

#![allow(clippy::doc_markdown, reason = "MongoDB is a name and not code")]

mod fault;
mod hold;
mod likeness;
mod message;
mod network;
mod oplog;
mod proxy;
mod token;
mod uri;

use std::time::Duration;

pub use fault::{Commands, Injected, Injection, Lasts, ServerError};
pub use hold::HeldReply;
pub use network::{Direction, Ending};
pub use proxy::{Proxy, Role, Upstream};
pub use uri::Location;

/// Longer than anything takes on a slow machine.
const PATIENCE: Duration = Duration::from_secs(60);
