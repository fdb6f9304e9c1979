//! A proxy between MongoDB clients and a server on loopback, for tests.
//!
//! It parses `OP_MSG`, so a test can [hold](Proxy::hold) the reply to a command and
//! [inject](Proxy::inject) errors of the server. It can also break the network: cut, reset, refuse,
//! stall or delay connections, or end them in the middle of a message. In front of the test server
//! it also [answers as MongoDB does](Upstream::like_mongodb).
//!
//! # Layout
//!
//! - `message`: one message of the wire protocol, read and written.
//! - `proxy`: [`Proxy`], and what it does on each of its connections.
//! - `network`: the faults of the network.
//! - `hold`: [`HeldReply`], a reply that a test delivers later.
//! - `fault`: [`ServerError`] and [`Injection`], the errors of MongoDB.
//! - `likeness`: makes the test server's change streams look like MongoDB's.
//! - `token`: the resume tokens of both servers.
//! - `oplog`: the times of the oplog's entries, which tokens contain.
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

/// Longer than any operation takes on a slow machine.
const PATIENCE: Duration = Duration::from_secs(60);
