//! A change stream's cursor, opened and gone on with by plain commands, in one session and on one
//! server, and closed when it is dropped.
//!
//! Who follows a stream must know which server was asked, when and after what, and that nothing is left
//! out where it is resumed. The driver's own stream resumes behind one's back, and where the command
//! for that has to be sent again, the second one has no resume token (mongodb 3.9.1): what came in
//! between is lost without a word.

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
    /// 0 once the server has closed it.
    id: i64,
    /// Cancelled once nobody needs the stream any more: its store was dropped or shut down.
    ends: CancellationToken,
}

/// A resume token, as the server gave it: from where a stream can go on.
pub(crate) type ResumeToken = Document;

/// What one answer has handed over.
pub(crate) struct StreamReply {
    pub(crate) events: Vec<Document>,
    /// After all of them, from a server that says so.
    pub(crate) after: Option<ResumeToken>,
}

/// The reports with which a stream ends.
pub(crate) const TERMINAL_EVENTS: [&str; 4] = ["drop", "rename", "dropDatabase", "invalidate"];

impl SessionCollection {
    pub(crate) fn database(&self) -> Database {
        self.documents.client().database(&self.documents.namespace().db)
    }

    /// Nothing may be sent for a stream once the app shuts down its client, which waits for the
    /// stream's session.
    pub(crate) fn check_client_open(&self) -> Result<(), Fault> {
        if self.tasks.client_closed().is_cancelled() { Err(Fault::Closed) } else { Ok(()) }
    }

    /// Opens a stream, through these stages: after a place, or else from now on. It is needed until
    /// `ends` is cancelled.
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
        let opens = after.map_or_else(Document::new, |after| doc! { "resumeAfter": after });
        let [matches, projects] = stages;
        let database = self.database();
        let asks = database.run_command(doc! {
            "aggregate": self.documents.name(),
            "pipeline": [{ "$changeStream": opens }, matches, projects],
            "cursor": {},
            "readConcern": { "level": "majority" },
            // No `maxTimeMS`: the manual does not say whether it bounds the cursor's `getMore`s too. Where the
            // cluster's `defaultMaxTimeMS` ends a long way to the position, that is `TooSlow`.
        });
        let reply = asks.session(&mut session).selection_criteria(server.criteria()).await;
        let reply = reply.map_err(|error| server_errors::fault(&error, start))?;
        let (id, handed) = parse_reply(reply, "firstBatch").ok_or_else(unreadable)?;
        Ok((Cursor { sessions: self, session, server, id, ends }, handed))
    }

    /// Behind a load balancer each command may end at another router, and the driver ties a cursor to its
    /// connection for its own cursors alone: a `getMore` of ours would not find the cursor.
    async fn refuse_load_balancer(&self, server: &PinnedServer) -> Result<(), Fault> {
        // Which kind of server it is shows once one was chosen for a command.
        let database = self.database();
        let asks = database.run_command(doc! { "hello": 1 });
        asks.selection_criteria(server.criteria()).await.map_err(|error| fault(&error))?;
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
    /// What comes next; nothing if the server has waited so long for it in vain.
    pub(crate) async fn next_reply(&mut self, wait: Duration) -> Result<StreamReply, Fault> {
        self.sessions.check_client_open()?;
        let database = self.sessions.database();
        let asks = database.run_command(doc! {
            "getMore": self.id,
            "collection": self.sessions.documents.name(),
            "maxTimeMS": i64::try_from(wait.as_millis()).unwrap_or(i64::MAX),
        });
        let criteria = self.server.criteria();
        let reply = asks.session(&mut self.session).selection_criteria(criteria).await;
        let reply = reply.map_err(|error| fault(&error))?;
        let (id, handed) = parse_reply(reply, "nextBatch").ok_or_else(unreadable)?;
        self.id = id;
        Ok(handed)
    }

    /// Whether the server has closed it, so that it brings nothing any more.
    pub(crate) fn is_closed(&self) -> bool {
        self.id == 0
    }

    pub(crate) fn server(&self) -> &PinnedServer {
        &self.server
    }
}

impl Drop for Cursor {
    /// Closes the cursor, which the server would keep for minutes: as far as that goes, and in
    /// nobody's way. A shutdown of the store waits for it.
    fn drop(&mut self) {
        if self.is_closed() {
            return;
        }
        let sessions = self.sessions.clone();
        let id = self.id;
        let criteria = self.server.criteria();
        let may_end_soon = self.ends.is_cancelled() && !sessions.tasks.is_shut_down();
        self.sessions.tasks.spawn(async move {
            if may_end_soon {
                sleep(KILL_CURSORS_DELAY).await;
            }
            let kill = doc! { "killCursors": sessions.documents.name(), "cursors": [id] };
            let database = sessions.database();
            let kills = database.run_command(kill).selection_criteria(criteria);
            let _ = timeout(sessions.timeout, kills.into_future()).await;
        });
    }
}

/// The cursor's id and a batch; `None` if this is no answer to such a question.
pub(crate) fn parse_reply(mut reply: Document, batch: &str) -> Option<(i64, StreamReply)> {
    let cursor = reply.get_document_mut("cursor").ok()?;
    let Some(Bson::Array(events)) = cursor.remove(batch) else { return None };
    let document = |event| if let Bson::Document(event) = event { Some(event) } else { None };
    let events = events.into_iter().map(document).collect::<Option<_>>()?;
    let after = cursor.remove("postBatchResumeToken").and_then(document);
    Some((cursor.get_i64("id").ok()?, StreamReply { events, after }))
}

/// The one server that a stream or a question goes to: the first that is fit for it.
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

    /// What feeds a stream from this server.
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

/// What a driver's error means for a stream that is open.
pub(crate) fn fault(error: &mongodb::error::Error) -> Fault {
    server_errors::fault(error, StreamStart::Open)
}

/// An answer that has not the form of one.
pub(crate) fn unreadable() -> Fault {
    Fault::Refused(Refusal::default())
}
