//! An app that saves through `src/tiers.rs` as it ships, over lanes and a database of which each step
//! is one of the model.

use std::pin::pin;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use loom::sync::Condvar;
use tokio_util::sync::CancellationToken;

use crate::cache::Cache;
use crate::error::{Error, ErrorKind, Result};
use crate::model_check::database::{Database, EXPIRES, GONE};
use crate::model_check::tasks;
use crate::model_check::world::World;
use crate::session::id::RawId;
use crate::session::id::SessionKey;
use crate::session::revision::{Rev, RevSource};
use crate::session::{Data, Session};
use crate::store::backend::{Backend, Call};
use crate::store::write_through::{TouchPolicy, WriteThrough};
use crate::sync::{Mutex, lock};
use crate::time::Clock;
use crate::time::WallTime;

/// The id of the one session.
const ID: RawId = RawId(1);
const TOUCH_AFTER: Duration = Duration::from_secs(60);

/// The app's store.
pub(crate) struct App {
    tiers: WriteThrough<Persistence>,
    lane: Arc<Lane>,
}

/// The database behind the lane of its one session. Clones share it.
#[derive(Clone)]
struct Persistence {
    database: Arc<Database>,
    lane: Arc<Lane>,
    clock: Clock,
}

/// Saves of the session go one after the other.
#[derive(Default)]
struct Lane {
    state: Mutex<Places>,
    left: Condvar,
}

#[derive(Default)]
struct Places {
    entered: u64,
    /// Their numbers, and whether each is a touch.
    there: Vec<(u64, bool)>,
    /// The data of all saves that ever entered.
    saved: Vec<u64>,
}

struct Place {
    number: u64,
    lane: Arc<Lane>,
}

impl Lane {
    fn enter(self: &Arc<Self>, data: Option<u64>) -> Option<Place> {
        let mut places = lock(&self.state);
        let touches = data.is_none();
        if touches && places.there.iter().any(|(_, touches)| !touches) {
            return None;
        }
        let number = places.entered;
        places.entered += 1;
        places.there.push((number, touches));
        places.saved.extend(data);
        drop(places);
        Some(Place { number, lane: Arc::clone(self) })
    }

    fn is_settled(&self) -> bool {
        lock(&self.state).there.iter().all(|(_, touches)| *touches)
    }

    fn saved(&self) -> Vec<u64> {
        lock(&self.state).saved.clone()
    }
}

impl Place {
    fn turn(&self) {
        let mut places = lock(&self.lane.state);
        while places.there.first().is_some_and(|(first, _)| *first != self.number) {
            places = self.lane.left.wait(places).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        lock(&self.lane.state).there.retain(|(number, _)| *number != self.number);
        self.lane.left.notify_all();
    }
}

impl Backend for Persistence {
    type TouchPermit = Place;

    fn insert(&self, _: SessionKey, _: Rev, _: &Data, _: WallTime) -> Call<Option<WallTime>> {
        Box::pin(async { Ok(None) })
    }

    fn replace(
        &self,
        _: SessionKey,
        rev: Rev,
        data: &Data,
        expires: WallTime,
    ) -> Call<Option<WallTime>> {
        let (number, to) = (number_in(data), self.clone());
        let place = self.lane.enter(Some(number));
        Box::pin(async move {
            let place = place.ok_or_else(|| Error::new(ErrorKind::Server, "no place"))?;
            place.turn();
            let written = to.database.replace_with(Some(number), rev, true, &to.clock);
            drop(place);
            Ok(written.map(|_| expires))
        })
    }

    fn acquire_touch(&self, _: SessionKey) -> Option<Call<Place>> {
        let place = self.lane.enter(None)?;
        Some(Box::pin(async move {
            place.turn();
            Ok(place)
        }))
    }

    fn touch(&self, place: Place, _: SessionKey, expires: WallTime) -> Call<Option<WallTime>> {
        let to = self.clone();
        Box::pin(async move {
            let there = to.database.find().is_some();
            drop(place);
            Ok(there.then_some(expires))
        })
    }

    fn is_settled(&self, _: SessionKey) -> bool {
        self.lane.is_settled()
    }

    fn expiry(&self, expires: WallTime) -> WallTime {
        expires
    }

    fn find(&self, _: SessionKey) -> Call<Option<Session>> {
        let to = self.clone();
        Box::pin(async move { Ok(to.database.find()) })
    }

    fn remove(&self, _: SessionKey) -> Call<()> {
        let to = self.clone();
        Box::pin(async move {
            to.database.remove(&to.clock);
            Ok(())
        })
    }

    fn clear(&self) -> Call<u64> {
        Box::pin(async { Ok(0) })
    }
}

pub(crate) fn number_in(data: &Data) -> u64 {
    data["rank"].as_u64().unwrap_or_default()
}

impl App {
    pub(crate) fn new(
        cache: Cache,
        database: Arc<Database>,
        clock: Clock,
        leaves_out_touches: bool,
    ) -> Self {
        let lane = Arc::<Lane>::default();
        let after = if leaves_out_touches { TOUCH_AFTER } else { Duration::ZERO };
        let tasks = tasks::tasks(cache.availability().clone());
        let tiers = WriteThrough {
            backend: Persistence { database, lane: Arc::clone(&lane), clock: clock.clone() },
            cache,
            tasks,
            revs: RevSource::new(),
            touch_policy: TouchPolicy { after, clock },
            _stops_listener: CancellationToken::new().drop_guard(),
        };
        Self { tiers, lane }
    }
}

impl World {
    /// An app saves new data.
    pub(crate) fn app_saves(&self) {
        let data = self.database.fresh();
        self.tell(format_args!("the app saves {data}"));
        let saved = self.app_save(data);
        self.check(saved.is_ok(), "a save failed");
        self.tell(format_args!("the app has saved {data}"));
        self.knows(self.database.rank_of(data));
    }

    /// The same, and it is given up before it is sent, and carried out all the same.
    pub(crate) fn app_saves_in_doubt(&self) {
        let data = self.database.fresh();
        self.tell(format_args!("the app saves {data}, and gives up"));
        tasks::expire_next_deadline();
        let saved = self.app_save(data);
        self.check(saved.is_err(), "a save in doubt was acknowledged");
        self.tell(format_args!("the save of {data} has ended"));
    }

    /// An app loads, changes nothing, and saves.
    pub(crate) fn app_saves_again(&self) {
        let found = self.bell.wait_for(self.app.tiers.load(ID));
        let Ok(Some(found)) = found else {
            return self.tell(format_args!("the app finds nothing"));
        };
        let data = number_in(&found.data);
        let before = self.app.lane.saved();
        self.tell(format_args!("the app saves {data} again"));
        let written = self.database.times_written(data);
        let saved = self.app_save(data);
        self.check(saved.is_ok(), "a save of what was loaded failed");
        self.tell(format_args!("the app has saved {data} again"));
        let rank = self.database.rank_of(data);
        if self.database.times_written(data) == written && !self.database.is_gone() {
            let undone = before.iter().find(|other| {
                **other != data
                    && self.database.rank_if_written(**other).is_some_and(|it| it > rank)
            });
            self.check(undone.is_none(), "an unchanged save was passed over, after one before it");
        }
        self.knows(rank);
    }

    pub(crate) fn app_deletes(&self) {
        self.tell(format_args!("the app deletes"));
        let deleted = self.bell.wait_for(self.app.tiers.delete(ID));
        self.check(deleted.is_ok(), "a delete failed");
        self.tell(format_args!("the app has deleted"));
        self.knows(GONE);
    }

    fn app_save(&self, data: u64) -> Result<()> {
        let data = Data::from([("rank".to_owned(), data.into())]);
        let save = pin!(self.app.tiers.save(ID, &data, EXPIRES));
        self.bell.wait_for(save)
    }
}
