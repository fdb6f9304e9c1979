//! The time of each entry in the test server's oplog.
//!
//! MongoDB's tokens and the times in its `hello` are times of oplog entries. Those of the test
//! server are not: its clock also ticks at each `hello`, and the token of an empty batch has the
//! time of its clock instead of the time of the newest examined entry. So the proxy follows the
//! oplog itself, by a change stream over the whole server, whose events have both the position and
//! the time.

use std::collections::VecDeque;
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use bson::oid::ObjectId;
use bson::{Bson, Document, doc};
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{mpsc, oneshot};

use crate::message::{Message, Reader, number};
use crate::token::{self, Own, Time};

/// More entries than lie between the position of any stream and the newest entry.
const KEPT: usize = 100_000;
/// The largest number of events in one batch.
const BATCH: i64 = 10_000;
/// Longer than the server takes to report an entry on a slow machine.
const PATIENCE: Duration = Duration::from_secs(20);
/// A batch of fewer events has reached the end of the oplog: the test server examines 1,000
/// entries.
const SMALL: usize = 500;
/// The collection of the proxy's own marks.
const MARKS_DATABASE: &str = "session_test_proxy";
const MARKS: &str = "marks";

/// Knows the times of the oplog's entries. Clones share one connection to the server.
#[derive(Clone, Debug)]
pub(crate) struct Oplog {
    entries: Arc<Mutex<VecDeque<Entry>>>,
    ask: mpsc::UnboundedSender<ReadRequest>,
}

#[derive(Clone, Copy, Debug)]
struct Entry {
    position: i64,
    time: Time,
}

/// A request to read every entry up to the time that a reply contained.
#[derive(Debug)]
struct ReadRequest {
    until: Time,
    answer: oneshot::Sender<io::Result<Time>>,
}

impl Oplog {
    /// Starts to follow the oplog. Returns `None` for a server that has no change streams, or whose
    /// tokens are not those of the test server.
    pub(crate) async fn follow(server: SocketAddr) -> io::Result<Option<Self>> {
        let entries = Arc::default();
        let Some(stream) = Stream::open(server, &entries).await? else { return Ok(None) };
        let (ask, requests) = mpsc::unbounded_channel();
        tokio::spawn(answer(server, entries.clone(), stream, requests));
        Ok(Some(Self { entries, ask }))
    }

    /// Waits until all entries are known up to the newest one at the time in a reply. Returns the
    /// time of that entry, which MongoDB calls `lastApplied`.
    pub(crate) async fn applied(&self, until: Time) -> io::Result<Time> {
        let (answer, answered) = oneshot::channel();
        let gone = || io::Error::other("the task that follows the oplog has ended");
        self.ask.send(ReadRequest { until, answer }).map_err(|_| gone())?;
        answered.await.map_err(|_| gone())?
    }

    /// The time of the newest known entry at this position or before it.
    pub(crate) fn time_at(&self, position: i64) -> Option<Time> {
        let entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
        let after = entries.partition_point(|entry| entry.position <= position);
        Some(entries.get(after.checked_sub(1)?)?.time)
    }
}

async fn answer(
    server: SocketAddr,
    entries: Arc<Mutex<VecDeque<Entry>>>,
    stream: Stream,
    mut requests: mpsc::UnboundedReceiver<ReadRequest>,
) {
    let mut stream = Some(stream);
    while let Some(first) = requests.recv().await {
        // One read of the oplog answers all waiting requests.
        let mut all = vec![first];
        while let Ok(request) = requests.try_recv() {
            all.push(request);
        }
        let until = all.iter().map(|request| request.until).max().unwrap_or_default();
        let known = match stream.take() {
            Some(stream) => read(stream, until).await,
            None => Err(io::ErrorKind::NotConnected.into()),
        };
        let known = match known {
            Ok(known) => Ok(known),
            // The server was probably restarted.
            Err(_) => match Stream::open(server, &entries).await {
                Ok(Some(stream)) => read(stream, until).await,
                Ok(None) => Err(io::Error::other("the server no longer has change streams")),
                Err(error) => Err(error),
            },
        };
        let outcome = known.map(|(again, newest)| {
            stream = Some(again);
            newest
        });
        for request in all {
            let outcome = outcome.as_ref().map_err(|error| io::Error::from(error.kind()));
            let _ = request.answer.send(outcome.copied());
        }
    }
}

async fn read(mut stream: Stream, until: Time) -> io::Result<(Stream, Time)> {
    let newest = stream.read_to(until).await?;
    Ok((stream, newest))
}

/// The change stream over the whole server.
#[derive(Debug)]
struct Stream {
    connection: Connection,
    cursor: i64,
    entries: Arc<Mutex<VecDeque<Entry>>>,
    /// The `_id` of this stream's marks, and the number of marks that the stream has reported.
    mark: ObjectId,
    marks: u64,
}

impl Stream {
    async fn open(
        server: SocketAddr,
        entries: &Arc<Mutex<VecDeque<Entry>>>,
    ) -> io::Result<Option<Self>> {
        let mut connection = Connection::open(server).await?;
        let aggregate = doc! {
            "aggregate": 1,
            "pipeline": [
                { "$changeStream": { "allChangesForCluster": true } },
                { "$project": { "_id": 1 } },
            ],
            "cursor": {},
            "$db": "admin",
        };
        let reply = connection.ask(aggregate).await?;
        let Ok(cursor) = reply.get_document("cursor") else { return Ok(None) };
        let token = cursor.get_document("postBatchResumeToken").ok().and_then(Own::read);
        let (Some(_), Some(cursor)) = (token, number(cursor.get("id"))) else { return Ok(None) };
        // The entries known so far may belong to a history that a killed server has lost.
        entries.lock().unwrap_or_else(PoisonError::into_inner).clear();
        let entries = entries.clone();
        let mut stream = Self { connection, cursor, entries, mark: ObjectId::new(), marks: 0 };
        // Without an entry there is no time to begin with.
        stream.mark().await?;
        Ok(Some(stream))
    }

    /// Reads all entries from before a reply that contained the time `until`. Returns the time of
    /// the newest.
    async fn read_to(&mut self, until: Time) -> io::Result<Time> {
        while self.more(0).await? >= SMALL {}
        if self.newest() < until {
            // Either the clock has ticked at a `hello`, or an entry waits for an earlier one. The
            // entry that follows both decides it.
            self.mark().await?;
        }
        Ok(self.newest())
    }

    /// Writes an entry of the proxy's own, and reads up to it. Entries come in their order, so all
    /// earlier entries are known then. On MongoDB, periodic no-op entries have the same effect.
    async fn mark(&mut self) -> io::Result<()> {
        let began = Instant::now();
        let before = self.marks;
        let marked =
            doc! { "q": { "_id": self.mark }, "u": { "$inc": { "marks": 1 } }, "upsert": true };
        let update = doc! { "update": MARKS, "updates": [marked], "$db": MARKS_DATABASE };
        self.connection.ask(update).await?;
        while self.marks == before {
            if began.elapsed() > PATIENCE {
                return Err(io::ErrorKind::TimedOut.into());
            }
            self.more(1_000).await?;
        }
        Ok(())
    }

    fn newest(&self) -> Time {
        let entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
        entries.back().map_or(0, |entry| entry.time)
    }

    /// Reads the next batch, for which the server waits `wait` milliseconds. Returns its number of
    /// events.
    async fn more(&mut self, wait: i64) -> io::Result<usize> {
        let more = doc! {
            "getMore": self.cursor,
            "collection": "$cmd.aggregate",
            "batchSize": BATCH,
            "maxTimeMS": wait,
            "$db": "admin",
        };
        let reply = self.connection.ask(more).await?;
        let batch = reply.get_document("cursor").and_then(|cursor| cursor.get_array("nextBatch"));
        let batch = batch.map_err(|_| io::Error::other("the change stream has ended"))?;
        let own = |event: &Bson| Own::read(event.as_document()?.get_document("_id").ok()?);
        let mut entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
        for own in batch.iter().filter_map(own) {
            if entries.len() == KEPT {
                entries.pop_front();
            }
            entries.push_back(Entry { position: own.position, time: own.time });
            self.marks += u64::from(own.key == Some(Bson::ObjectId(self.mark)));
        }
        Ok(batch.len())
    }
}

/// The proxy's own connection.
#[derive(Debug)]
pub(crate) struct Connection {
    from: Reader<OwnedReadHalf>,
    to: OwnedWriteHalf,
}

impl Connection {
    pub(crate) async fn open(server: SocketAddr) -> io::Result<Self> {
        let stream = TcpStream::connect(server).await?;
        stream.set_nodelay(true)?;
        let (from, to) = stream.into_split();
        Ok(Self { from: Reader::new(from), to })
    }

    pub(crate) async fn ask(&mut self, command: Document) -> io::Result<Document> {
        // A request is a message that answers no other one.
        let request = Message::reply(0, &command)?;
        self.to.write_all(request.bytes()).await?;
        let reply = self.from.next().await?.and_then(|reply| reply.body());
        reply.ok_or_else(|| io::ErrorKind::UnexpectedEof.into())
    }
}

#[cfg(test)]
impl Oplog {
    /// An oplog with these entries, each a position and a time, without a connection to a server.
    pub(crate) fn made_by_hand(entries: &[(i64, Time)]) -> Self {
        let entry = |(position, time): &(i64, Time)| Entry { position: *position, time: *time };
        let entries = entries.iter().map(entry).collect();
        Self { entries: Arc::new(Mutex::new(entries)), ask: mpsc::unbounded_channel().0 }
    }
}

/// The operation time in a reply.
pub(crate) fn operation_time(reply: &Document) -> Option<Time> {
    reply.get_timestamp("operationTime").ok().map(token::time)
}
