//! Filling a cold cache before the requests come.

use std::collections::HashMap;
use std::future::{Future, IntoFuture};
use std::pin::Pin;
use std::time::{Duration, Instant};

use tokio::task::yield_now;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

use crate::cache::{Cache, IdleFill, NoRoom};
use crate::error::Result;
use crate::mongo::MongoStore;
use crate::session::id::SessionKey;
use crate::store::CachedMongoStore;
use crate::telemetry::spans;

/// How many sessions are read by one command.
const PAGE: usize = 100;
/// How long it takes at most if nobody says otherwise.
const DEFAULT_TIME_LIMIT: Duration = Duration::from_secs(10);
/// How many entries are put in order before others have their turn.
const KEYS_PER_LIST: usize = 4_096;
/// The longest pause between two pages.
const LONGEST_PAUSE: Duration = Duration::from_millis(100);

/// Fills a cache with the sessions written last; see [`CachedMongoStore::warm`]. Begins when it is
/// awaited.
#[derive(Clone, Debug)]
#[must_use = "a warm-up does nothing until it is awaited"]
pub struct WarmUp {
    store: CachedMongoStore,
    sessions: u64,
    max_bytes: Option<u64>,
    within: Duration,
}

/// What a [`WarmUp`] has done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Warmed {
    /// How many sessions it has put into the cache.
    pub sessions: u64,
    /// How many bytes they take, as `max_bytes` counts.
    pub bytes: u64,
    /// How long that took.
    pub elapsed: Duration,
    /// Why there are no more.
    pub limit: WarmUpLimit,
}

/// What a [`WarmUp`] ended at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum WarmUpLimit {
    /// It went through as many sessions as it was asked for, or through all.
    Sessions,
    /// The cache holds as many bytes as it was to hold.
    Bytes,
    /// The time was over.
    Time,
}

impl CachedMongoStore {
    /// Fills the cache with the live sessions that were written last, the latest first, `sessions` at
    /// most: for an instance that has just been deployed, so that its first requests are no spike of
    /// load. Await it before the instance takes requests, or in a task beside them.
    ///
    /// It stands back for requests: it has one connection and no part in what `max_commands_in_flight` bounds,
    /// reads at most 100 sessions at a time, and rests after each page for as long as that took (100 ms at
    /// most). It displaces nothing, passes over what is cached or being worked on, and what it has read
    /// is dropped if the session changes meanwhile.
    ///
    /// There is no index on `updated`, which each save and each prolongation would have to keep. So it
    /// begins with a scan of the collection, of which the server keeps the keys and dates of so many
    /// `sessions` while it sorts, in at most
    /// [100 MB](https://www.mongodb.com/docs/manual/core/aggregation-pipeline-limits/), and beyond that
    /// on disk. With many millions of sessions on a busy server that is no small question. A session that was only read is as old as its
    /// last write, unless the app prolongs sessions at each request.
    ///
    /// What it has put there is served under the same lease as what a load has: without a change
    /// stream for `max_staleness`.
    ///
    /// # Errors
    ///
    /// What the server answers, and [`Closed`](crate::ErrorKind::Closed) once the store is shut down.
    /// What was put into the cache before stays.
    ///
    /// # Cancel safety
    ///
    /// May be dropped at any time: it ends after its present page.
    pub fn warm(&self, sessions: u64) -> WarmUp {
        WarmUp { store: self.clone(), sessions, max_bytes: None, within: DEFAULT_TIME_LIMIT }
    }
}

impl WarmUp {
    /// How many bytes the cache may hold, with what is there already, for the warm-up to put more into
    /// it. Default nine tenths of what it may hold, and never more than all.
    pub fn max_bytes(mut self, bytes: u64) -> Self {
        self.max_bytes = Some(bytes);
        self
    }

    /// How long it may take; past it there is no further page. Default 10 s.
    pub fn within(mut self, duration: Duration) -> Self {
        self.within = duration;
        self
    }

    async fn run(self) -> Result<Warmed> {
        let abandoned = CancellationToken::new();
        let _with_the_caller = abandoned.clone().drop_guard();
        let cache = self.store.tiers.cache.clone();
        let warming = WarmUpRun {
            max_bytes: self.max_bytes.unwrap_or_else(|| cache.capacity() / 10 * 9),
            cache,
            mongo: self.store.mongo.clone(),
            began: Instant::now(),
            within: self.within,
            warmed: Vec::new(),
            bytes: 0,
        };
        let tasks = self.store.mongo.tasks().clone();
        tasks.run_paged(warming.run(self.sessions, abandoned), |outcome| outcome).await
    }
}

impl IntoFuture for WarmUp {
    type Output = Result<Warmed>;
    type IntoFuture = Pin<Box<dyn Future<Output = Result<Warmed>> + Send>>;

    fn into_future(self) -> Self::IntoFuture {
        Box::pin(async { spans::verb!("session_store.warm", self.run()) })
    }
}

/// What became of a page.
enum PageOutcome {
    /// All of it that may be is in the cache.
    All,
    /// Nothing: it has more bytes than there is room for.
    TooMuch,
    /// As much as there is room for.
    NoRoom,
}

/// A warm-up under way.
struct WarmUpRun {
    cache: Cache,
    mongo: MongoStore,
    max_bytes: u64,
    began: Instant,
    within: Duration,
    /// The latest first.
    warmed: Vec<SessionKey>,
    bytes: u64,
}

impl WarmUpRun {
    async fn run(mut self, sessions: u64, abandoned: CancellationToken) -> Result<Warmed> {
        if sessions == 0 {
            return Ok(self.ends(WarmUpLimit::Sessions).await);
        }
        let Some(keys) = self.mongo.newest(sessions, self.within).await? else {
            return Ok(self.ends(WarmUpLimit::Time).await);
        };
        let (mut left, mut at_once) = (&*keys, PAGE);
        while !left.is_empty() {
            if abandoned.is_cancelled() || self.began.elapsed() >= self.within {
                return Ok(self.ends(WarmUpLimit::Time).await);
            }
            let began = Instant::now();
            let (page, rest) = left.split_at(at_once.min(left.len()));
            match self.take(page).await? {
                PageOutcome::All => left = rest,
                // The latest of them may fit.
                PageOutcome::TooMuch => at_once = page.len() / 2,
                PageOutcome::NoRoom => return Ok(self.ends(WarmUpLimit::Bytes).await),
            }
            sleep(began.elapsed().min(LONGEST_PAUSE)).await;
        }
        Ok(self.ends(WarmUpLimit::Sessions).await)
    }

    async fn take(&mut self, page: &[SessionKey]) -> Result<PageOutcome> {
        let mut room = self.cache.room(self.max_bytes);
        if room == 0 {
            return Ok(PageOutcome::NoRoom);
        }
        // Before the read: what changes from here on is not what it brings.
        let offer = |key: &SessionKey| Some((*key, self.cache.begin_idle_fill(*key)?));
        let mut offers: HashMap<SessionKey, IdleFill> = page.iter().filter_map(offer).collect();
        let keys: Vec<_> = page.iter().copied().filter(|key| offers.contains_key(key)).collect();
        if keys.is_empty() {
            return Ok(PageOutcome::All);
        }
        // No more at a time than there is room for, if it is not one; they come in another order than
        // the latest first, so what has come by then is any of them.
        let (mut found, mut read, alone) = (HashMap::with_capacity(keys.len()), 0, keys.len() == 1);
        let reads = self.mongo.read_each(&keys, |key, session, bytes| {
            found.insert(key, session);
            read += bytes;
            read <= room || alone
        });
        reads.await?;
        if read > room && !alone {
            return Ok(PageOutcome::TooMuch);
        }
        for key in keys {
            let (Some(offer), Some(session)) = (offers.remove(&key), found.remove(&key)) else {
                continue;
            };
            match offer.publish(session, room) {
                Ok(Some(bytes)) => {
                    room = room.saturating_sub(bytes);
                    self.bytes += bytes;
                    self.warmed.push(key);
                }
                Ok(None) => {}
                Err(NoRoom) => return Ok(PageOutcome::NoRoom),
            }
        }
        Ok(PageOutcome::All)
    }

    /// The latest are to be the last that the cache lets go.
    async fn ends(self, limit: WarmUpLimit) -> Warmed {
        for keys in self.warmed.rchunks(KEYS_PER_LIST) {
            self.cache.rank(keys);
            yield_now().await;
        }
        let sessions = u64::try_from(self.warmed.len()).unwrap_or(u64::MAX);
        Warmed { sessions, bytes: self.bytes, elapsed: self.began.elapsed(), limit }
    }
}
