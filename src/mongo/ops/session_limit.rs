//! `max_sessions_per_owner`: `create` keeps the number of live sessions of an owner within a limit.
//!
//! Each `create` inserts its session first, and reads the owner's live sessions after that. The read is causal: it
//! includes every session that was inserted before. So of several log-ins at the same time, the last one sees the
//! sessions of all others. If each log-in counted first and inserted after that, two of them could both find room for
//! one session.

use std::time::{Duration, Instant};

use bson::{Bson, Document, RawDocumentBuf, doc};
use tokio::time::{sleep, timeout};

use crate::backend::BeginDelete;
use crate::batching::Commands;
use crate::error::{Error, ErrorKind, Result};
use crate::mongo::MongoStoreBuilder;
use crate::mongo::collection::SessionCollection;
use crate::mongo::ops::query::and;
use crate::mongo::ops::scan::DELETE_PAGE;
use crate::mongo::owner_field::owned_by;
use crate::mongo::schema;
use crate::session::id::SessionKey;
use crate::session::owner::Owner;
use crate::telemetry::metrics::{Outcome, OverLimit, Verb};
use crate::time::WallTime;

/// What `create` does if the owner of the new session has too many live sessions. See
/// [`max_sessions_per_owner`](MongoStoreBuilder::max_sessions_per_owner).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum OnLimit {
    /// Deletes the oldest sessions of the owner, so that the newest ones stay.
    Evict,
    /// Fails with [`TooManySessions`](crate::ErrorKind::TooManySessions), and stores nothing.
    Refuse,
}

/// The most live sessions of an owner, and what happens beyond that.
#[derive(Clone, Copy, Debug)]
pub(crate) struct SessionLimit {
    pub(crate) max: u32,
    pub(crate) on_limit: OnLimit,
}

impl SessionLimit {
    /// Checks that the options of a builder fit.
    pub(crate) fn check(self, has_owner: bool) -> Result<()> {
        if self.max == 0 {
            return Err(Error::config(
                "`max_sessions_per_owner` must be at least 1; leave it out for no limit",
            ));
        }
        if !has_owner {
            return Err(Error::config(
                "`max_sessions_per_owner` needs to know whose sessions it counts: give `owner` too",
            ));
        }
        Ok(())
    }
}

/// The part of the operation timeout for which a refusing `create` counts again and again, while its own session
/// is among the oldest ones.
const COUNTING_PART: u32 = 4;
/// The longest wait after the first count. Each further wait is up to twice as long.
const FIRST_WAIT: Duration = Duration::from_millis(20);

/// The order in which the sessions of an owner were created. It is the same for all instances.
#[derive(Clone, Copy)]
enum Order {
    OldestFirst,
    NewestFirst,
}

impl MongoStoreBuilder {
    /// How many live sessions an owner may have, and what [`create`](crate::MongoStore#contract-of-the-verbs) does
    /// with one more. At least 1. Needs [`owner`](Self::owner). Default: no limit.
    ///
    /// After `create` has stored a session that has an owner, at most this number of live sessions of the owner
    /// remain. This holds when all calls that overlap have returned, also on several instances. Sessions without
    /// an owner and expired sessions do not count, and stay. Give all instances the same limit.
    ///
    /// - [`OnLimit::Evict`] deletes the oldest sessions. If two log-ins overlap, the older one of them may be deleted
    ///   before its `create` returns `Ok`.
    /// - [`OnLimit::Refuse`] deletes the new session, and `create` fails with
    ///   [`TooManySessions`](crate::ErrorKind::TooManySessions). If log-ins overlap, the oldest of them waits for up to
    ///   a quarter of the operation timeout, until the others have been refused.
    ///
    /// Only `create` looks at the limit. A `save` that gives an existing session to an owner does not, nor does
    /// [`assign_owners`](crate::MongoStore::assign_owners), nor an import. A log-in that calls `cycle_id` is a
    /// `create`, and axum-login calls it at each log-in. `cycle_id` deletes the old session first, so that one does
    /// not count.
    ///
    /// The cost is a second round trip for each new session that has an owner, and a third one if it exceeds the
    /// limit. The calls are under one operation timeout.
    ///
    /// The order of the sessions is that of [`created`](crate::StoredSession::created), by the clock of the instance
    /// that created each one. So keep the clocks right. If the clock of one instance is late by a second, a new
    /// session there is older than one that another instance created in that second. In a
    /// [request scope](crate::RequestScopeLayer), a `cycle_id` that keeps the owner also keeps the place in the order.
    ///
    /// ```no_run
    /// # async fn run() -> tower_sessions_moka_mongodb_store::Result<()> {
    /// use tower_sessions_moka_mongodb_store::{MongoStore, OnLimit};
    ///
    /// let mongo = MongoStore::builder()
    ///     .uri("mongodb://localhost/app")
    ///     .owner(|data| data.get("user_id")?.as_i64())
    ///     .max_sessions_per_owner(3, OnLimit::Evict)
    ///     .build()
    ///     .await?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// [`build`](Self::build) fails with [`Config`](crate::ErrorKind::Config) if the limit is 0, or without
    /// [`owner`](Self::owner). If a step of `create` fails, `create` fails, and the store removes the new session in
    /// the background. With `Evict`, some of the oldest sessions may have been deleted by then.
    ///
    /// # Cancel safety
    ///
    /// A `create` that has begun runs to completion, even if its future is dropped. So the limit holds then too. Its
    /// session counts until it expires, although nobody knows its id.
    pub fn max_sessions_per_owner(mut self, sessions: u32, on_limit: OnLimit) -> Self {
        self.session_limit = Some(SessionLimit { max: sessions, on_limit });
        self
    }
}

impl SessionCollection {
    /// Stores the document of a new session, and then keeps its owner within the limit. Returns the stored expiry.
    /// `None` if the key is taken.
    pub(crate) async fn insert_within_limit(
        self,
        limit: SessionLimit,
        key: SessionKey,
        document: Document,
        expires: WallTime,
        begin_evict: BeginDelete,
    ) -> Result<Option<WallTime>> {
        let owner = document.get_str("owner").ok().map(Owner::from);
        let outcome = async {
            let stored = self.insert_document(document, expires).await?;
            let (Some(_), Some(owner)) = (stored, owner) else { return Ok(stored) };
            let kept = match limit.on_limit {
                OnLimit::Evict => self.evict_oldest(&owner, limit.max, begin_evict).await,
                OnLimit::Refuse => self.refuse_excess(key, &owner, limit.max).await,
            };
            kept.map(|()| stored).map_err(|error| error.of_a_later_step())
        };
        let outcome = outcome.await;
        if outcome.as_ref().is_err_and(may_be_stored) {
            self.remove_later(key);
        }
        outcome
    }

    /// Deletes all live sessions of an owner except the newest `max`.
    async fn evict_oldest(&self, owner: &Owner, max: u32, begin_evict: BeginDelete) -> Result<()> {
        let mut evicted = 0;
        loop {
            let page = self.live_sessions(owner, Order::NewestFirst, max.into(), DELETE_PAGE);
            let excess = page.await?;
            if excess.is_empty() {
                break;
            }
            let finish = begin_evict(&excess);
            let ids: Vec<Bson> = excess.iter().map(|key| schema::id(*key).into()).collect();
            // A session may have got another owner since it was read. Then it stays.
            let wanted = and(owned_by(owner), doc! { "_id": { "$in": ids } });
            evicted += self.remove_matching(Verb::Remove, wanted).await?;
            finish();
            if excess.len() < DELETE_PAGE as usize {
                break;
            }
        }
        if evicted > 0 {
            self.metrics.over_limit(OverLimit::Evicted).increment(evicted);
            tracing::info!(
                evicted,
                "the oldest sessions of an owner were deleted: a new one exceeds `max_sessions_per_owner`"
            );
        }
        Ok(())
    }

    /// Deletes the new session of `key` and fails, if its owner has more than `max` live sessions.
    ///
    /// Only a count that finds at most `max` lets the session stay. So the last one of several log-ins never stays
    /// beside too many others. If the session is among the oldest `max` ones, the newer ones may be log-ins that are
    /// about to be refused. So this waits and counts again, and one of the log-ins succeeds. The others do not wait.
    async fn refuse_excess(&self, key: SessionKey, owner: &Owner, max: u32) -> Result<()> {
        let began = Instant::now();
        let mut longest_wait = FIRST_WAIT;
        loop {
            let one_more = max.saturating_add(1);
            let oldest = self.live_sessions(owner, Order::OldestFirst, 0, one_more).await?;
            let max = max as usize;
            if oldest.len() <= max {
                return Ok(());
            }
            let is_among_the_oldest = oldest.iter().take(max).any(|it| *it == key);
            let ends = began.elapsed().saturating_add(longest_wait);
            if !is_among_the_oldest || ends > self.timeout / COUNTING_PART {
                break;
            }
            sleep(longest_wait.mul_f64(0.5 + fastrand::f64() / 2.0)).await;
            longest_wait = longest_wait.saturating_mul(2);
        }
        Commands::remove(self, key).await?;
        self.metrics.over_limit(OverLimit::Refused).increment(1);
        tracing::info!("a new session was refused: its owner has `max_sessions_per_owner` already");
        Err(too_many(max))
    }

    /// Reads the keys of an owner's live sessions: in this order, after the first `skipped` ones, at most `limit`.
    async fn live_sessions(
        &self,
        owner: &Owner,
        order: Order,
        skipped: u64,
        limit: u32,
    ) -> Result<Vec<SessionKey>> {
        let timer = self.timer(Verb::List);
        let read = async {
            let mut keys = Vec::new();
            let mut session = self.causal_session().await?;
            let documents = self.documents.clone_with_type::<RawDocumentBuf>();
            let find = documents.find(self.live_sessions_of(owner));
            let direction = if matches!(order, Order::OldestFirst) { 1 } else { -1 };
            // An owner has few sessions, so the server sorts them in memory: see the index on the owner.
            let find = find.sort(doc! { "created": direction, "_id": direction });
            let find = find.skip(skipped).limit(limit.into()).projection(doc! { "_id": 1 });
            let mut cursor = find.max_time(self.timeout).session(&mut session).await?;
            while cursor.advance(&mut session).await? {
                keys.extend(schema::key(cursor.current()));
            }
            self.causal.check_in(session, Ok(keys))
        };
        match read.await {
            Ok(keys) => timer.finish(Outcome::Ok, Ok(keys)),
            Err(error) => timer.fail("count the sessions of an owner", &error),
        }
    }

    /// Matches the live sessions of an owner. A query compares each date in a list of dates, so arrays are excluded.
    fn live_sessions_of(&self, owner: &Owner) -> Document {
        let now = self.clock.wall();
        let live = doc! { "$gt": schema::date(now), "$not": { "$type": "array" } };
        let mut wanted = doc! { "_id": schema::keys_after(None), "expires": live };
        self.lifetime.add_condition(&mut wanted, now);
        and(owned_by(owner), wanted)
    }

    /// Removes a session whose `create` has failed, in a task of its own. Nobody knows its id, and it would count.
    pub(crate) fn remove_later(&self, key: SessionKey) {
        let remove = Commands::remove(self, key);
        let deadline = self.timeout;
        self.tasks.spawn(async move {
            if !matches!(timeout(deadline, remove).await, Ok(Ok(()))) {
                tracing::warn!(
                    "a session whose creation failed may remain until it expires: it counts for \
                     `max_sessions_per_owner`. End it with `delete_by_owner` if its owner cannot log in"
                );
            }
        });
    }
}

/// Whether the new session may be in the collection after this error of its creation.
fn may_be_stored(error: &Error) -> bool {
    error.kind() != ErrorKind::TooManySessions && !error.was_not_carried_out()
}

fn too_many(max: u32) -> Error {
    Error::new(
        ErrorKind::TooManySessions,
        format!(
            "the new session was refused: its owner already has {max} live sessions, as many as \
             `max_sessions_per_owner` allows. End one of them, or wait until one expires"
        ),
    )
}
