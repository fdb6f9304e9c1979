//! The steps of threads that use the store through an [`App`](crate::model_check::app::App).

use crate::error::Result;
use crate::model_check::database::{GONE, bit_of, number_in};
use crate::model_check::tasks;
use crate::model_check::world::World;

impl World {
    /// An app saves new data.
    pub(crate) fn app_save_new(&self) {
        let data = self.database.new_data();
        self.note(format_args!("the app saves {data}"));
        let saved = self.app_save(data);
        self.check(saved.is_ok(), "a save failed");
        self.note(format_args!("the app has saved {data}"));
        self.learn(self.database.rank_of(data));
    }

    /// An app saves new data. The save times out before it is sent, and the database still carries it out.
    pub(crate) fn app_save_with_unknown_outcome(&self) {
        let data = self.database.new_data();
        self.note(format_args!("the app saves {data}, and the save times out"));
        tasks::expire_next_deadline();
        let saved = self.app_save(data);
        self.check(saved.is_err(), "a save that had timed out was acknowledged");
        self.note(format_args!("the save of {data} has ended"));
    }

    /// An app loads the session, changes nothing, and saves.
    pub(crate) fn app_save_unchanged(&self) {
        let found = self.bell.wait_for(self.app.load());
        let Ok(Some(found)) = found else {
            return self.note(format_args!("the app finds nothing"));
        };
        let data = number_in(&found.data);
        let before = self.app.saved();
        self.note(format_args!("the app saves {data} again"));
        let written = self.database.times_written(data);
        let saved = self.app_save(data);
        self.check(saved.is_ok(), "a save of what was loaded failed");
        self.note(format_args!("the app has saved {data} again"));
        let rank = self.database.rank_of(data);
        if self.database.times_written(data) == written && !self.database.is_gone() {
            let undone = before.iter().find(|other| {
                **other != data
                    && self.database.rank_if_written(**other).is_some_and(|it| it > rank)
            });
            self.check(
                undone.is_none(),
                "an unchanged save was skipped after a save of newer data",
            );
        }
        self.learn(rank);
    }

    pub(crate) fn request_adds_a(&self) {
        self.request_adds("a");
    }

    pub(crate) fn request_adds_b(&self) {
        self.request_adds("b");
    }

    /// A request loads the session, adds a key and saves.
    fn request_adds(&self, key: &str) {
        let found = self.bell.wait_for(self.app.load());
        let Ok(Some(found)) = found else {
            return self.note(format_args!("the request finds nothing"));
        };
        let mut data = found.data.clone();
        data.insert(key.to_owned(), true.into());
        self.note(format_args!("a request has loaded {}, and adds {key}", number_in(&found.data)));
        let saved = self.bell.wait_for(self.app.merge(found, &data));
        let Ok(saved) = saved else { return self.check(false, "the save of a request failed") };
        self.note(format_args!("{key} is added: {saved:?}"));
        let Some(stored) = saved else { return self.learn(GONE) };
        self.check(stored & bit_of(key) != 0, "what a request has stored lacks its change");
        self.check(self.database.has_key(key) != Some(false), "a change of a request is lost");
        self.learn(self.database.rank_of(stored));
    }

    pub(crate) fn app_delete(&self) {
        self.note(format_args!("the app deletes"));
        let deleted = self.bell.wait_for(self.app.delete());
        self.check(deleted.is_ok(), "a delete failed");
        self.note(format_args!("the app has deleted"));
        self.learn(GONE);
    }

    fn app_save(&self, data: u64) -> Result<()> {
        self.bell.wait_for(self.app.save(data))
    }
}
