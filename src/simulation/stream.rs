//! `Streams`: the change streams of the simulated database. They give the same resume tokens as MongoDB.
//!
//! - A stream without a position begins one tick after the newest entry of the oplog. That time is its first
//!   token. No entry has that time yet
//!   ([`getStartTimeForNewStream`](https://github.com/mongodb/mongo/blob/master/src/mongo/db/pipeline/document_source_change_stream.cpp)).
//! - A token moves to the newest examined entry only if that entry is *later* than the token
//!   ([`highWaterMark > _latestOplogTimestamp`](https://github.com/mongodb/mongo/blob/master/src/mongo/db/query/plan_executor_pipeline.cpp)),
//!   so an empty batch may repeat the first token.
//! - A token is the token of a change, or a high-water mark. A high-water mark comes before all changes of its time.
//! - A router returns a change once every other shard has passed it. The router's high-water mark is the lowest
//!   one of its shards.
//!
//! The shipped code reads the replies:
//! [`InvalidationReader`](crate::mongo::change_stream::reader::InvalidationReader).

use bson::{Document, Timestamp, doc};

use crate::invalidation::source::{Fault, PrimaryTime, ServerId, ServerTime};
use crate::invalidation::watermark::StreamSource;
use crate::mongo::change_stream::cursor::{ResumeToken, StreamReply};
use crate::simulation::chance::Chance;
use crate::simulation::database::Database;
use crate::simulation::oplog::{Logged, Oplog};
use crate::simulation::types::FaultConfig;

/// All streams that were opened, and the fault that broke each of them, if one did.
#[derive(Default)]
pub(crate) struct Streams(Vec<Option<Fault>>);

/// What a stream needs of the world around it.
pub(crate) struct Context<'a> {
    pub(crate) database: &'a mut Database,
    pub(crate) faults: &'a FaultConfig,
    pub(crate) chance: &'a Chance,
}

/// `Cursor`: the server's state of one open stream.
#[derive(Clone, Debug)]
pub(crate) struct Cursor {
    pub(crate) stream: usize,
    /// The member that the stream reads from. 0 stands for the router if there are several shards.
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

/// How far a stream has read the oplog of one shard.
#[derive(Clone, Debug)]
struct Scan {
    /// The position of the next change to return.
    place: usize,
    /// The stream has examined every entry up to this time. At first this is the time at which it begins.
    examined: u64,
}

/// A position in the order of all changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Mark {
    time: u64,
    /// The shard of the change and its position there. `None`: a high-water mark.
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

impl Streams {
    /// Breaks a stream: its next `getMore` fails with `fault`.
    pub(crate) fn break_off(&mut self, stream: usize, fault: Fault) {
        self.0[stream] = Some(fault);
    }

    pub(crate) fn open(
        &mut self,
        after: Option<&ResumeToken>,
        context: &mut Context<'_>,
    ) -> Result<(Cursor, Reply), Fault> {
        let faults = context.faults;
        if !faults.streams {
            return Err(Fault::Unsupported("this walk has no change streams"));
        }
        let oplog = &mut context.database.oplog;
        // The driver may not have noticed yet that a former primary was deposed.
        let deposed = oplog.deposed().filter(|_| !faults.recovered && context.chance.happens(0.3));
        let member = deposed.unwrap_or(oplog.primary());
        let token = match after {
            Some(token) => Mark::read(token),
            None => Mark { time: oplog.applied_by(member) + 1, change: None },
        };
        if oplog.has_lost(token.time) {
            return Err(Fault::Lost);
        }
        // All shards learn the time at which the stream begins, so their next entries are not before it.
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
        let cursor =
            Cursor { stream: self.0.len(), member, scans: (0..shards).map(scan).collect(), token };
        self.0.push(None);
        Ok(context.read_batch(cursor))
    }

    pub(crate) fn get_more(
        &self,
        cursor: Cursor,
        context: &mut Context<'_>,
    ) -> Result<(Cursor, Reply), Fault> {
        if let Some(fault) = self.0[cursor.stream].clone() {
            return Err(fault);
        }
        let faults = context.faults;
        if let Some(key) = faults.busy_stream.filter(|_| !faults.recovered) {
            context.database.write_elsewhere(Some(key));
        }
        let oplog = &mut context.database.oplog;
        if cursor.is_merged() && (faults.recovered || context.chance.happens(0.3)) {
            oplog.tick_everywhere();
        }
        if cursor.member != oplog.primary() {
            if faults.recovered {
                return Err(Fault::Passing);
            }
            if context.chance.happens(0.2) {
                oplog.replicate(cursor.member, context.chance.below(4) as u64);
            }
        }
        Ok(context.read_batch(cursor))
    }
}

impl Context<'_> {
    /// The time of the primary's newest entry, either now or at the moment when the store asked.
    pub(crate) fn primary_time(&mut self, asked_time: u64) -> PrimaryTime {
        if !self.faults.recovered && self.chance.happens(self.faults.unrelated_writes) {
            self.database.write_elsewhere(None);
        }
        let oplog = &self.database.oplog;
        let time = if self.chance.happens(0.3) { asked_time } else { oplog.applied() };
        let is_router = oplog.shards() > 1;
        let visible_on = (!is_router).then(|| server(oplog.primary()));
        PrimaryTime { time: ServerTime(time), visible_on }
    }

    /// Reads the oplogs to their ends. The batch is empty only if there is no change to return.
    fn read_batch(&self, mut cursor: Cursor) -> (Cursor, Reply) {
        let oplog = self.oplog();
        let chance = self.chance;
        let is_merged = cursor.is_merged();
        for (shard, scan) in cursor.scans.iter_mut().enumerate() {
            let applied =
                if is_merged { oplog.applied_on(shard) } else { oplog.applied_by(cursor.member) };
            scan.examined = scan.examined.max(applied);
        }
        let recovered = self.faults.recovered;
        let max_events = if recovered {
            usize::MAX
        } else if chance.happens(self.faults.small_batches) {
            1
        } else if chance.happens(0.3) {
            1 + chance.below(4)
        } else {
            usize::MAX
        };
        let mut events = Vec::new();
        let mut ended = false;
        while events.len() < max_events && !ended {
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
        let says_none = !self.faults.tokens_have_times && !recovered && chance.happens(0.2);
        let token = (!says_none && !ended).then(|| self.token(cursor.token));
        (cursor, Reply { events, token })
    }

    /// The change to return next. `None` while another shard may still log an earlier change.
    fn next_change(&self, cursor: &Cursor) -> Option<(Mark, Logged)> {
        let first = self.pending(cursor).into_iter().flatten().min_by_key(|(mark, _)| *mark)?;
        let (mark, _) = first;
        let may_precede = |(shard, scan): (usize, &Scan)| {
            let is_other = mark.change.is_some_and(|(of, _)| of != shard);
            let is_read = scan.place == self.oplog().changes(shard).len();
            is_other && is_read && scan.examined <= mark.time
        };
        let waits = cursor.scans.iter().enumerate().any(may_precede);
        (!waits).then_some(first)
    }

    /// The next change of each shard, or of the one member.
    fn pending(&self, cursor: &Cursor) -> Vec<Option<(Mark, Logged)>> {
        let pending = |(shard, scan): (usize, &Scan)| {
            let logged = *self.oplog().changes(shard).get(scan.place)?;
            let mark = Mark { time: logged.time, change: Some((shard, scan.place)) };
            let oplog = self.oplog();
            let is_there = cursor.is_merged() || logged.time <= oplog.applied_by(cursor.member);
            is_there.then_some((mark, logged))
        };
        cursor.scans.iter().enumerate().map(pending).collect()
    }

    /// The time of the newest examined entry, on the shard that is furthest behind. `None` if the batch of a single
    /// member was full, so more changes are there.
    fn examined(&self, cursor: &Cursor) -> Option<u64> {
        let pending = self.pending(cursor);
        if !cursor.is_merged() && pending.iter().any(Option::is_some) {
            return None;
        }
        let examined = cursor.scans.iter().zip(pending).map(|(scan, pending)| {
            // The router has examined a change that waits to be merged, but has not passed it.
            pending.map_or(scan.examined, |(mark, _)| mark.time)
        });
        examined.min()
    }

    /// A change event in the shape that the aggregation stages of the stream give it.
    fn event(&self, mark: Mark, logged: Logged) -> Document {
        #[allow(clippy::cast_possible_truncation, reason = "the cast takes the lower half")]
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

    fn oplog(&self) -> &Oplog {
        &self.database.oplog
    }

    fn token(&self, mark: Mark) -> ResumeToken {
        // MongoDB's tokens begin with 82, the type of a timestamp. Tokens of other servers do not.
        let kind = if self.faults.tokens_have_times { "82" } else { "40" };
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
