//! [`WarmUp`]: fills a cold cache before the requests come.

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

/// The most sessions that one command reads.
const PAGE: usize = 100;
/// The default of [`WarmUp::within`].
const DEFAULT_TIME_LIMIT: Duration = Duration::from_secs(10);
/// How many entries are ranked before other tasks run.
const KEYS_PER_LIST: usize = 4_096;
/// The longest pause between two pages.
const LONGEST_PAUSE: Duration = Duration::from_millis(100);

/// Fills a cache with the sessions that were written last; see [`CachedMongoStore::warm`]. Begins when it
/// is awaited.
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
    /// The number of sessions that it has put into the cache.
    pub sessions: u64,
    /// The bytes that they take, as [`max_bytes`](crate::CachedMongoStoreBuilder::max_bytes) counts them.
    pub bytes: u64,
    /// The time that it took.
    pub elapsed: Duration,
    /// Why it ended.
    pub limit: WarmUpLimit,
}

/// The limit at which a [`WarmUp`] ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum WarmUpLimit {
    /// It has gone through the requested number of sessions, or through all.
    Sessions,
    /// The cache holds [`WarmUp::max_bytes`].
    Bytes,
    /// [`WarmUp::within`] is over.
    Time,
}

impl CachedMongoStore {
    /// Fills the cache with the live sessions that were written last, at most `sessions` of them.
    ///
    /// It is for an instance that was just deployed: without it, the first requests are a spike of load
    /// on MongoDB. Await it before the instance takes requests, or in a task beside them.
    ///
    /// A warm-up gives way to requests:
    ///
    /// - It uses one connection, beside those that
    ///   [`max_commands_in_flight`](crate::MongoStoreBuilder::max_commands_in_flight) bounds.
    /// - It reads at most 100 sessions at a time. After each page it pauses for as long as the page took,
    ///   at most 100 ms.
    /// - It evicts nothing, and skips sessions that are cached or in use. If a session changes while it is
    ///   read, what was read is dropped.
    ///
    /// A session that it has cached is served under the same lease as one that a load has cached. Without
    /// a change stream, that is for `max_staleness`.
    ///
    /// # Cost
    ///
    /// It begins with a scan of the collection: there is no index on `updated`, since each save and each
    /// touch would have to update it. While the server sorts, it keeps the keys and dates of `sessions`
    /// sessions, in at most
    /// [100 MB](https://www.mongodb.com/docs/manual/core/aggregation-pipeline-limits/) of memory, and
    /// beyond that on disk. With many millions of sessions on a busy server, that is a heavy query.
    ///
    /// A session that was only read counts as old as its last write, unless the app extends sessions on
    /// each request.
    ///
    /// # Errors
    ///
    /// The errors of the server, and [`Closed`](crate::ErrorKind::Closed) once the store is shut down.
    /// The sessions that are in the cache by then stay.
    ///
    /// # Cancel safety
    ///
    /// May be dropped at any time. It then ends after its current page.
    pub fn warm(&self, sessions: u64) -> WarmUp {
        WarmUp { store: self.clone(), sessions, max_bytes: None, within: DEFAULT_TIME_LIMIT }
    }
}

impl WarmUp {
    /// Up to how many bytes in the cache the warm-up adds sessions, counting what is there already.
    /// Default: nine tenths of the cache's capacity. Never more than the capacity.
    pub fn max_bytes(mut self, bytes: u64) -> Self {
        self.max_bytes = Some(bytes);
        self
    }

    /// How long it may take. It begins no page after that. Default: 10 s.
    pub fn within(mut self, duration: Duration) -> Self {
        self.within = duration;
        self
    }

    async fn run(self) -> Result<Warmed> {
        let cancelled = CancellationToken::new();
        // Cancels the run, which has a task of its own, when the caller drops this future.
        let _cancel_guard = cancelled.clone().drop_guard();
        let cache = self.store.tiers.cache.clone();
        let run = WarmUpRun {
            max_bytes: self.max_bytes.unwrap_or_else(|| cache.capacity() / 10 * 9),
            cache,
            mongo: self.store.mongo.clone(),
            started_at: Instant::now(),
            within: self.within,
            warmed: Vec::new(),
            bytes: 0,
        };
        let tasks = self.store.mongo.tasks().clone();
        // A warm-up that ends without an error may have sent nothing, or may have got no answer within its time.
        // Its commands are observed one by one.
        let is_evidence = Result::is_err;
        let run = run.run(self.sessions, cancelled);
        tasks.run_paged_observed(is_evidence, run, |outcome| outcome).await
    }
}

impl IntoFuture for WarmUp {
    type Output = Result<Warmed>;
    type IntoFuture = Pin<Box<dyn Future<Output = Result<Warmed>> + Send>>;

    fn into_future(self) -> Self::IntoFuture {
        Box::pin(async { spans::verb!("session_store.warm", self.run()) })
    }
}

/// How a page ended.
enum PageOutcome {
    /// Each of its sessions is in the cache, or was skipped.
    All,
    /// None is: together they have more bytes than there is room for.
    TooMuch,
    /// The cache is full.
    NoRoom,
}

/// A running warm-up.
struct WarmUpRun {
    cache: Cache,
    mongo: MongoStore,
    max_bytes: u64,
    started_at: Instant,
    within: Duration,
    /// The most recently written first.
    warmed: Vec<SessionKey>,
    bytes: u64,
}

impl WarmUpRun {
    async fn run(mut self, sessions: u64, cancelled: CancellationToken) -> Result<Warmed> {
        if sessions == 0 {
            return Ok(self.finish(WarmUpLimit::Sessions).await);
        }
        let Some(keys) = self.mongo.newest(sessions, self.within).await? else {
            return Ok(self.finish(WarmUpLimit::Time).await);
        };
        let mut left = &*keys;
        let mut page_len = PAGE;
        while !left.is_empty() {
            if cancelled.is_cancelled() || self.started_at.elapsed() >= self.within {
                return Ok(self.finish(WarmUpLimit::Time).await);
            }
            let page_started_at = Instant::now();
            let (page, rest) = left.split_at(page_len.min(left.len()));
            match self.warm_page(page).await? {
                PageOutcome::All => left = rest,
                // The first half may fit.
                PageOutcome::TooMuch => page_len = page.len() / 2,
                PageOutcome::NoRoom => return Ok(self.finish(WarmUpLimit::Bytes).await),
            }
            sleep(page_started_at.elapsed().min(LONGEST_PAUSE)).await;
        }
        Ok(self.finish(WarmUpLimit::Sessions).await)
    }

    async fn warm_page(&mut self, page: &[SessionKey]) -> Result<PageOutcome> {
        let mut room = self.cache.room(self.max_bytes);
        if room == 0 {
            return Ok(PageOutcome::NoRoom);
        }
        // Before the read: if a session changes from here on, its fill fails.
        let begin_fill = |key: &SessionKey| Some((*key, self.cache.begin_idle_fill(*key)?));
        let mut fills: HashMap<SessionKey, IdleFill> = page.iter().filter_map(begin_fill).collect();
        let keys: Vec<_> = page.iter().copied().filter(|key| fills.contains_key(key)).collect();
        if keys.is_empty() {
            return Ok(PageOutcome::All);
        }
        // Stops reading once there is no room, unless the page is a single session. MongoDB returns the
        // sessions in another order, so those that were read by then are not the most recent ones. None
        // of them is cached.
        let mut found = HashMap::with_capacity(keys.len());
        let mut read_bytes = 0;
        let is_single = keys.len() == 1;
        let read = self.mongo.read_each(&keys, |key, session, bytes| {
            found.insert(key, session);
            read_bytes += bytes;
            read_bytes <= room || is_single
        });
        read.await?;
        if read_bytes > room && !is_single {
            return Ok(PageOutcome::TooMuch);
        }
        for key in keys {
            let (Some(fill), Some(session)) = (fills.remove(&key), found.remove(&key)) else {
                continue;
            };
            match fill.publish(session, room) {
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

    /// Ranks the entries, so that the cache evicts the most recently written ones last.
    async fn finish(self, limit: WarmUpLimit) -> Warmed {
        for keys in self.warmed.rchunks(KEYS_PER_LIST) {
            self.cache.rank(keys);
            yield_now().await;
        }
        let sessions = u64::try_from(self.warmed.len()).unwrap_or(u64::MAX);
        Warmed { sessions, bytes: self.bytes, elapsed: self.started_at.elapsed(), limit }
    }
}
