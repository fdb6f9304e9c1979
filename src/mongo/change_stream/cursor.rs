//! `Cursor`: a change stream's cursor, made of plain `aggregate`, `getMore` and `killCursors` commands. It keeps to
//! one driver session and one server, and closes itself when it is dropped.
//!
//! The driver has a change stream of its own, [`mongodb::change_stream::ChangeStream`]. It is not used, for two
//! reasons:
//!
//! 1. The server that was asked, and the time, decide what a batch proves. The driver's stream hides both.
//! 2. The driver's stream resumes by itself, and can lose events when it does (mongodb 3.9.1; we know of no report).
//!    `ChangeStreamAggregate::build` in the driver's `operation/aggregate/change_stream.rs` moves the resume token out
//!    of the operation with `resume_token.take()`. If the `aggregate` fails with a retryable error, the driver
//!    builds the command of the same operation again, for its one retry of a read. The second command has no
//!    resume token, so it opens a stream that begins now.
//!
//! A minimal reproduction: read one event from `collection.watch()`. Insert a document. Then fail the next `getMore`
//! and the first `aggregate` after it with a network error. `next()` returns no error, and never the insert.

use std::sync::Arc;
use std::time::Duration;

use bson::{Bson, Document, doc};
use mongodb::options::{SelectionCriteria, ServerAddress};
use mongodb::{ClientSession, Database, ServerInfo, ServerType};
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

use crate::invalidation::source::{Fault, Refusal, ServerId};
use crate::invalidation::watermark::StreamSource;
use crate::mongo::collection::SessionCollection;
use crate::mongo::connect::client_state::KILL_CURSORS_DELAY;
use crate::mongo::server_errors::{self, StreamStart};
use crate::sync::{Mutex, lock};

/// An open change stream of the sessions' collection.
pub(crate) struct Cursor {
    sessions: SessionCollection,
    session: ClientSession,
    server: PinnedServer,
    /// 0 if the server has closed the cursor.
    id: i64,
    /// Cancelled when the stream is no longer needed: its store was dropped or shut down.
    ends: CancellationToken,
}

/// A resume token, as the server sent it: a position from which a stream can be resumed.
pub(crate) type ResumeToken = Document;

/// One reply to `aggregate` or `getMore`.
pub(crate) struct StreamReply {
    pub(crate) events: Vec<Document>,
    /// The position after all `events`, if the server reported it.
    pub(crate) after: Option<ResumeToken>,
}

/// The events that end a stream.
pub(crate) const TERMINAL_EVENTS: [&str; 4] = ["drop", "rename", "dropDatabase", "invalidate"];

impl SessionCollection {
    pub(crate) fn database(&self) -> Database {
        self.documents.client().database(&self.documents.namespace().db)
    }

    /// Fails if the app shuts its client down. Nothing may be sent from then on, because the client waits for the
    /// stream's session to end.
    pub(crate) fn check_client_open(&self) -> Result<(), Fault> {
        if self.tasks.client_closed().is_cancelled() { Err(Fault::Closed) } else { Ok(()) }
    }

    /// Opens a stream with these stages, after a position or from now on. It is needed until `ends` is cancelled.
    pub(crate) async fn open_stream(
        self,
        after: Option<ResumeToken>,
        stages: [Document; 2],
        ends: CancellationToken,
    ) -> Result<(Cursor, StreamReply), Fault> {
        self.check_client_open()?;
        let start = if after.is_some() { StreamStart::Resumed } else { StreamStart::Fresh };
        let server = PinnedServer::primary_or_router();
        if after.is_none() {
            self.refuse_load_balancer(&server).await?;
        }
        let client = self.documents.client();
        let session = client.start_session().causal_consistency(false).await;
        let mut session = session.map_err(|error| fault(&error))?;
        let start_at = after.map_or_else(Document::new, |after| doc! { "resumeAfter": after });
        let [matches, projects] = stages;
        let database = self.database();
        let aggregate = database.run_command(doc! {
            "aggregate": self.documents.name(),
            "pipeline": [{ "$changeStream": start_at }, matches, projects],
            "cursor": {},
            "readConcern": { "level": "majority" },
            // No `maxTimeMS`: the manual does not say whether it also bounds the `getMore`s of the cursor. If the
            // cluster's `defaultMaxTimeMS` ends the way to a distant position, the fault is `TooSlow`.
        });
        let reply = aggregate.session(&mut session).selection_criteria(server.criteria()).await;
        let reply = reply.map_err(|error| server_errors::fault(&error, start))?;
        let (id, first) = parse_reply(reply, "firstBatch").ok_or_else(unreadable)?;
        Ok((Cursor { sessions: self, session, server, id, ends }, first))
    }

    /// Behind a load balancer each command may reach another router. The driver pins its own cursors to their
    /// connection, but not this one, so a `getMore` would not find the cursor.
    async fn refuse_load_balancer(&self, server: &PinnedServer) -> Result<(), Fault> {
        // The driver reports the kind of server when it has chosen one for a command.
        let database = self.database();
        let hello = database.run_command(doc! { "hello": 1 });
        hello.selection_criteria(server.criteria()).await.map_err(|error| fault(&error))?;
        if server.is_load_balancer() {
            return Err(Fault::Unsupported(
                "the connection goes through a load balancer (loadBalanced=true), and a change \
                 stream needs each command to reach the same server",
            ));
        }
        Ok(())
    }
}

impl Cursor {
    /// The next reply. It has no events if none came while the server waited.
    pub(crate) async fn next_reply(&mut self, wait: Duration) -> Result<StreamReply, Fault> {
        self.sessions.check_client_open()?;
        let database = self.sessions.database();
        let get_more = database.run_command(doc! {
            "getMore": self.id,
            "collection": self.sessions.documents.name(),
            "maxTimeMS": i64::try_from(wait.as_millis()).unwrap_or(i64::MAX),
        });
        let criteria = self.server.criteria();
        let reply = get_more.session(&mut self.session).selection_criteria(criteria).await;
        let reply = reply.map_err(|error| fault(&error))?;
        let (id, next) = parse_reply(reply, "nextBatch").ok_or_else(unreadable)?;
        self.id = id;
        Ok(next)
    }

    /// Whether the server has closed the cursor, so that no event follows.
    pub(crate) fn is_closed(&self) -> bool {
        self.id == 0
    }

    pub(crate) fn server(&self) -> &PinnedServer {
        &self.server
    }
}

impl Drop for Cursor {
    /// Closes the cursor on the server, which would keep it for minutes otherwise. Only a shutdown of the store waits
    /// for this, and a failure is ignored.
    fn drop(&mut self) {
        if self.is_closed() {
            return;
        }
        let sessions = self.sessions.clone();
        let id = self.id;
        let criteria = self.server.criteria();
        let may_shut_down_soon = self.ends.is_cancelled() && !sessions.tasks.is_shut_down();
        self.sessions.tasks.spawn(async move {
            if may_shut_down_soon {
                sleep(KILL_CURSORS_DELAY).await;
            }
            let kill = doc! { "killCursors": sessions.documents.name(), "cursors": [id] };
            let database = sessions.database();
            let kills = database.run_command(kill).selection_criteria(criteria);
            let _ = timeout(sessions.timeout, kills.into_future()).await;
        });
    }
}

/// The cursor's id and its batch. `None` if the reply has another form.
pub(crate) fn parse_reply(mut reply: Document, batch: &str) -> Option<(i64, StreamReply)> {
    let cursor = reply.get_document_mut("cursor").ok()?;
    let Some(Bson::Array(events)) = cursor.remove(batch) else { return None };
    let document = |event| if let Bson::Document(event) = event { Some(event) } else { None };
    let events = events.into_iter().map(document).collect::<Option<_>>()?;
    let after = cursor.remove("postBatchResumeToken").and_then(document);
    Some((cursor.get_i64("id").ok()?, StreamReply { events, after }))
}

/// The one server that a stream's commands go to: the first suitable one that the driver offers.
///
/// A lock, because the driver calls the predicate of [`criteria`](Self::criteria) from its own tasks.
#[derive(Clone, Default)]
pub(crate) struct PinnedServer(Arc<Mutex<Option<(ServerAddress, ServerType)>>>);

impl PinnedServer {
    pub(crate) fn primary_or_router() -> Self {
        Self::default()
    }

    pub(crate) fn criteria(&self) -> SelectionCriteria {
        let this = self.clone();
        SelectionCriteria::Predicate(Arc::new(move |server| this.matches(server)))
    }

    fn matches(&self, server: &ServerInfo<'_>) -> bool {
        use ServerType::{LoadBalancer, Mongos, RsPrimary, Standalone};

        let kind = server.server_type();
        let mut chosen = lock(&self.0);
        match &*chosen {
            Some((address, _)) => address == server.address(),
            None if matches!(kind, RsPrimary | Mongos | Standalone | LoadBalancer) => {
                *chosen = Some((server.address().clone(), kind));
                true
            }
            None => false,
        }
    }

    /// The kind of server that feeds a stream that is opened here.
    pub(crate) fn source(&self) -> StreamSource {
        match &*lock(&self.0) {
            Some((address, kind)) if !is_router(*kind) => {
                StreamSource::Member(ServerId(address.to_string().into()))
            }
            _ => StreamSource::Router,
        }
    }

    pub(crate) fn is_router(&self) -> bool {
        lock(&self.0).as_ref().is_some_and(|(_, kind)| is_router(*kind))
    }

    fn is_load_balancer(&self) -> bool {
        lock(&self.0).as_ref().is_some_and(|(_, kind)| *kind == ServerType::LoadBalancer)
    }
}

fn is_router(kind: ServerType) -> bool {
    matches!(kind, ServerType::Mongos | ServerType::LoadBalancer)
}

/// The fault that a driver's error means for an open stream.
pub(crate) fn fault(error: &mongodb::error::Error) -> Fault {
    server_errors::fault(error, StreamStart::Open)
}

/// The fault of a reply that cannot be read.
pub(crate) fn unreadable() -> Fault {
    Fault::Refused(Refusal::default())
}
