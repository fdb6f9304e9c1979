//! The change streams of the simulated database, with the resume tokens that MongoDB gives.
//!
//! - A stream that is opened fresh begins one tick after the newest entry, and that time, of which there is
//!   no entry yet, is its first token
//!   ([`getStartTimeForNewStream`](https://github.com/mongodb/mongo/blob/master/src/mongo/db/pipeline/document_source_change_stream.cpp)).
//! - A token moves on to the newest entry that was examined only if that is *later* than the token
//!   ([`highWaterMark > _latestOplogTimestamp`](https://github.com/mongodb/mongo/blob/master/src/mongo/db/query/plan_executor_pipeline.cpp)),
//!   so an empty batch may repeat the first one.
//! - A token is that of a change, or a high-water mark, which comes before all changes of its time.
//! - A router hands over a change once every other shard has passed it, and its high-water mark is the least
//!   one of the shards.
//!
//! The replies are read by the code that reads MongoDB's:
//! [`InvalidationReader`](crate::mongo::change_stream::reader::InvalidationReader).

use bson::{Document, Timestamp, doc};

use crate::invalidation::source::{Fault, PrimaryTime, ServerId, ServerTime};
use crate::invalidation::watermark::StreamSource;
use crate::mongo::change_stream::cursor::{ResumeToken, StreamReply};
use crate::simulation::chance::Chance;
use crate::simulation::operation::Operation;
use crate::simulation::oplog::Logged;
use crate::simulation::wire::State;

/// An open stream: the server's cursor.
#[derive(Clone, Debug)]
pub(crate) struct Cursor {
    pub(crate) stream: usize,
    /// The member that it reads from. 0 stands for a router if there are several shards.
    member: usize,
    /// One for each shard.
    scans: Vec<Scan>,
    token: Mark,
}

impl Cursor {
    pub(crate) fn source(&self) -> StreamSource {
        if self.is_merged() {
            StreamSource::Router
        } else {
            StreamSource::Member(server(self.member))
        }
    }

    fn is_merged(&self) -> bool {
        self.scans.len() > 1
    }
}

/// How far a shard's oplog has been read.
#[derive(Clone, Debug)]
struct Scan {
    /// The change to hand over next.
    place: usize,
    /// Every entry up to this time has been examined. At first that is the time to begin at.
    examined: u64,
}

/// A place in the order of all changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Mark {
    time: u64,
    /// The change's shard and place there. `None`: a high-water mark.
    change: Option<(usize, usize)>,
}

/// The answer to `aggregate` or `getMore`.
#[derive(Clone, Debug)]
pub(crate) struct Reply {
    pub(crate) events: Vec<Document>,
    pub(crate) token: Option<ResumeToken>,
}

impl From<Reply> for StreamReply {
    fn from(reply: Reply) -> Self {
        Self { events: reply.events, after: reply.token }
    }
}

impl State {
    pub(crate) fn open(
        &mut self,
        after: Option<&ResumeToken>,
        chance: &Chance,
    ) -> Result<(Cursor, Reply), Fault> {
        if !self.manners.streams {
            return Err(Fault::Unsupported("it is not asked to"));
        }
        let healed = self.manners.healed;
        let oplog = &mut self.database.oplog;
        // The driver may not have noticed yet that a member is primary no more.
        let deposed = oplog.deposed().filter(|_| !healed && chance.happens(0.3));
        let member = deposed.unwrap_or(oplog.primary());
        let token = match after {
            Some(token) => Mark::read(token),
            None => Mark { time: oplog.applied_by(member) + 1, change: None },
        };
        if oplog.has_lost(token.time) {
            return Err(Fault::Lost);
        }
        // All shards learn of the time that the stream begins at: what they write from now on is not before.
        oplog.gossip(token.time - 1);
        let shards = oplog.shards();
        let scan = |shard| {
            let changes = oplog.changes(shard);
            let is_before = |(place, logged): (usize, &Logged)| {
                let mark = Mark { time: logged.time, change: Some((shard, place)) };
                mark <= token
            };
            let place = changes.iter().enumerate().take_while(|it| is_before(*it)).count();
            Scan { place, examined: token.time }
        };
        let cursor = Cursor {
            stream: self.streams.len(),
            member,
            scans: (0..shards).map(scan).collect(),
            token,
        };
        self.streams.push(None);
        Ok(self.hand_over(cursor, chance))
    }

    pub(crate) fn more(
        &mut self,
        cursor: Cursor,
        chance: &Chance,
    ) -> Result<(Cursor, Reply), Fault> {
        if let Some(fault) = self.streams[cursor.stream].clone() {
            return Err(fault);
        }
        if let Some(key) = self.manners.busy.filter(|_| !self.manners.healed) {
            self.database.another_write(Some(key));
        }
        let oplog = &mut self.database.oplog;
        if cursor.is_merged() && (self.manners.healed || chance.happens(0.3)) {
            oplog.tick_everywhere();
        }
        if cursor.member != oplog.primary() {
            if self.manners.healed {
                return Err(Fault::Passing);
            }
            if chance.happens(0.2) {
                oplog.replicate(cursor.member, chance.below(4) as u64);
            }
        }
        Ok(self.hand_over(cursor, chance))
    }

    /// The time of the primary's newest entry, or of the newest when the question was sent.
    pub(crate) fn fence(&mut self, call: usize, chance: &Chance) -> PrimaryTime {
        if !self.manners.healed && chance.happens(self.manners.others) {
            self.database.another_write(None);
        }
        let asked = self.records[call].asked_time;
        let oplog = &self.database.oplog;
        let time = if chance.happens(0.3) { asked } else { oplog.applied() };
        let is_router = oplog.shards() > 1;
        let visible_on = (!is_router).then(|| server(oplog.primary()));
        PrimaryTime { time: ServerTime(time), visible_on }
    }

    /// Breaks the streams of one store off.
    pub(crate) fn break_streams(&mut self, node: usize, fault: &Fault) {
        for waiting in self.calls.keys().map(|call| &self.records[*call]) {
            if let Operation::More(cursor) = &waiting.operation
                && waiting.node == node
            {
                self.streams[cursor.stream] = Some(fault.clone());
            }
        }
    }

    /// Reads the oplogs to their ends. A batch is empty only if there is nothing to hand over.
    fn hand_over(&self, mut cursor: Cursor, chance: &Chance) -> (Cursor, Reply) {
        let oplog = &self.database.oplog;
        let is_merged = cursor.is_merged();
        for (shard, scan) in cursor.scans.iter_mut().enumerate() {
            let applied =
                if is_merged { oplog.applied_on(shard) } else { oplog.applied_by(cursor.member) };
            scan.examined = scan.examined.max(applied);
        }
        let healed = self.manners.healed;
        let most = if healed {
            usize::MAX
        } else if chance.happens(self.manners.lags) {
            1
        } else if chance.happens(0.3) {
            1 + chance.below(4)
        } else {
            usize::MAX
        };
        let mut events = Vec::new();
        let mut ended = false;
        while events.len() < most && !ended {
            let Some((mark, logged)) = self.next_change(&cursor) else { break };
            let Some((shard, place)) = mark.change else { break };
            cursor.scans[shard].place = place + 1;
            cursor.token = mark;
            ended = logged.change.is_none();
            events.push(self.event(mark, logged));
        }
        let examined = self.examined(&cursor);
        if let Some(examined) = examined.filter(|examined| *examined > cursor.token.time) {
            cursor.token = Mark { time: examined, change: None };
        }
        let says_none = !self.manners.tokens_have_times && !healed && chance.happens(0.2);
        let token = (!says_none && !ended).then(|| self.token(cursor.token));
        (cursor, Reply { events, token })
    }

    /// The change that is handed over next, once nothing before it can come any more.
    fn next_change(&self, cursor: &Cursor) -> Option<(Mark, Logged)> {
        let first = self.pending(cursor).into_iter().flatten().min_by_key(|(mark, _)| *mark)?;
        let (mark, _) = first;
        let may_precede = |(shard, scan): (usize, &Scan)| {
            let is_other = mark.change.is_some_and(|(of, _)| of != shard);
            let is_read = scan.place == self.database.oplog.changes(shard).len();
            is_other && is_read && scan.examined <= mark.time
        };
        let waits = cursor.scans.iter().enumerate().any(may_precede);
        (!waits).then_some(first)
    }

    /// The next change of each shard, or of the one member.
    fn pending(&self, cursor: &Cursor) -> Vec<Option<(Mark, Logged)>> {
        let pending = |(shard, scan): (usize, &Scan)| {
            let logged = *self.database.oplog.changes(shard).get(scan.place)?;
            let mark = Mark { time: logged.time, change: Some((shard, scan.place)) };
            let oplog = &self.database.oplog;
            let is_there = cursor.is_merged() || logged.time <= oplog.applied_by(cursor.member);
            is_there.then_some((mark, logged))
        };
        cursor.scans.iter().enumerate().map(pending).collect()
    }

    /// The time of the newest entry that was examined, by the shard that is furthest behind. `None` if a member
    /// has more to hand over: the batch was full.
    fn examined(&self, cursor: &Cursor) -> Option<u64> {
        let pending = self.pending(cursor);
        if !cursor.is_merged() && pending.iter().any(Option::is_some) {
            return None;
        }
        let examined = cursor.scans.iter().zip(pending).map(|(scan, pending)| {
            // What waits to be merged was examined, and is not passed.
            pending.map_or(scan.examined, |(mark, _)| mark.time)
        });
        examined.min()
    }

    /// As the stream's stages leave it.
    fn event(&self, mark: Mark, logged: Logged) -> Document {
        #[allow(clippy::cast_possible_truncation, reason = "the halves are taken apart")]
        let at = Timestamp { time: (mark.time >> 32) as u32, increment: mark.time as u32 };
        let mut event = doc! { "_id": self.token(mark), "at": at, "ends": logged.change.is_none() };
        if let Some((key, rev)) = logged.change {
            event.insert("key", binary(key.as_bytes()));
            if let Some(rev) = rev {
                event.insert("rev", binary(rev.as_bytes()));
            }
        }
        event
    }

    fn token(&self, mark: Mark) -> ResumeToken {
        // The type of a timestamp in MongoDB's tokens; others' begin in another way.
        let kind = if self.manners.tokens_have_times { "82" } else { "40" };
        let time = mark.time;
        let change = mark
            .change
            .map_or_else(String::new, |(shard, place)| format!("{shard:08x}{place:08x}"));
        doc! { "_data": format!("{kind}{time:016x}{change}") }
    }
}

impl Mark {
    fn read(token: &ResumeToken) -> Self {
        let text = token.get_str("_data").unwrap();
        let number = |from: usize, to: usize| u64::from_str_radix(&text[from..to], 16).unwrap();
        let place = |from, to| usize::try_from(number(from, to)).unwrap();
        let change = (text.len() > 18).then(|| (place(18, 26), place(26, 34)));
        Self { time: number(2, 18), change }
    }
}

fn server(member: usize) -> ServerId {
    ServerId(member.to_string().into())
}

fn binary(bytes: &[u8]) -> bson::Binary {
    bson::Binary { subtype: bson::spec::BinarySubtype::Generic, bytes: bytes.to_vec() }
}
