//! Causal reads: no read returns older data than what was written here, was reported by the stream,
//! or is known to be in the database.

use std::sync::{Arc, Mutex};

use mongodb::Client;
use mongodb::bson::{Document, Timestamp, doc};
use mongodb::event::EventHandler;
use mongodb::event::command::CommandEvent;
use mongodb::options::ClientOptions;
use tower_sessions::SessionStore;
use tower_sessions::session::Id;
use tower_sessions_moka_mongodb_store::{MongoStore, mongodb};

use super::{OTHER, changed, load, wait_until_at_least, wait_until_sees};
use crate::common::{Meters, cache_of, create, eventually, other_instance, uri};

/// The commands that a client has sent, and the replies.
#[derive(Clone, Default)]
struct Wire {
    asked: Arc<Mutex<Vec<Document>>>,
    answered: Arc<Mutex<Vec<(String, Document)>>>,
}

impl Wire {
    async fn client(&self, uri: &str) -> Client {
        let mut options = ClientOptions::parse(uri).await.unwrap();
        let wire = self.clone();
        options.command_event_handler = Some(EventHandler::callback(move |event| match event {
            CommandEvent::Started(event) => wire.asked.lock().unwrap().push(event.command),
            CommandEvent::Succeeded(event) => {
                wire.answered.lock().unwrap().push((event.command_name, event.reply));
            }
            _ => {}
        }));
        Client::with_options(options).unwrap()
    }

    async fn mongo(&self, uri: &str) -> MongoStore {
        MongoStore::builder().client(self.client(uri).await).build().await.unwrap()
    }

    /// The time that the last command of this name had to wait for, if any.
    fn waited_for(&self, command: &str) -> Option<Timestamp> {
        let asked = self.asked.lock().unwrap();
        let last = asked.iter().rfind(|asked| asked.contains_key(command)).unwrap();
        last.get_document("readConcern").unwrap().get_timestamp("afterClusterTime").ok()
    }

    /// The operation time in the last reply to a command of this name.
    fn operation_time(&self, command: &str) -> Option<Timestamp> {
        let answered = self.answered.lock().unwrap();
        let (_, last) = answered.iter().rfind(|(name, _)| name == command)?;
        last.get_timestamp("operationTime").ok()
    }

    /// The time of the last change that a stream has reported.
    fn last_reported(&self) -> Option<Timestamp> {
        let answered = self.answered.lock().unwrap();
        let batches = answered.iter().filter(|(name, _)| name == "getMore").filter_map(|it| {
            it.1.get_document("cursor").ok()?.get_array("nextBatch").ok()?.last()?.as_document()
        });
        batches.filter_map(|change| change.get_timestamp("at").ok()).max()
    }
}

/// Writes a document that no store reads, and returns the operation time of the write.
async fn write_elsewhere(uri: &str) -> Option<Timestamp> {
    let wire = Wire::default();
    let database = wire.client(uri).await.default_database().unwrap();
    let others = database.collection::<Document>("others");
    others.insert_one(doc! {}).await.unwrap();
    let time = wire.operation_time("insert");
    assert!(time.is_some(), "the reply has an operation time");
    time
}

#[tokio::test]
async fn read_is_no_older_than_own_writes_and_reported_changes() {
    let uri = uri();
    let wire = Wire::default();
    let mongo = wire.mongo(&uri).await;
    let one = cache_of(&other_instance(&uri).await).await;
    let record = create(&one).await;

    assert_eq!(SessionStore::load(&mongo, &record.id).await.unwrap().unwrap().data, record.data);
    let mut last = wire.waited_for("find");
    for round in 0..3 {
        let other = if round == 0 { create(&mongo).await } else { record.clone() };
        SessionStore::save(&mongo, &changed(&other)).await.unwrap();
        SessionStore::load(&mongo, &record.id).await.unwrap();
        let next = wire.waited_for("find");
        assert!(next.is_some() && next > last, "after a write of its own: {last:?} {next:?}");
        last = next;
    }
    let (meters, guard) = Meters::install();
    let store = cache_of(&mongo).await;
    drop(guard);
    wait_until_sees(&store, &record, load(&one, &record).await.as_ref()).await;
    let before = meters.value(OTHER);
    let saved = changed(&record);
    one.save(&saved).await.unwrap();
    wait_until_at_least(&meters, OTHER, before + 1.0).await;
    // Not the operation time in the reply to the save: that is the time of the newest operation on
    // the server, which may be another client's.
    let save = wire.last_reported();
    assert!(save > last, "{last:?} {save:?}");
    wait_until_sees(&store, &record, Some(&saved)).await;
    let waited = wire.waited_for("find");
    assert!(waited >= save, "after the report of a save at {save:?}: {waited:?}");
}

#[tokio::test]
async fn read_is_no_older_than_the_stream_and_its_checkpoints() {
    let uri = uri();
    let wire = Wire::default();
    let mongo = wire.mongo(&uri).await;
    let before = write_elsewhere(&uri).await;
    let store = cache_of(&mongo).await;
    assert!(SessionStore::load(&store, &Id::default()).await.unwrap().is_none());
    let first = wire.waited_for("find");
    assert!(first >= before, "the stream was opened after {before:?}: {first:?}");

    let later = write_elsewhere(&uri).await;
    assert!(later > before);
    eventually("a checkpoint is answered", async || {
        assert!(SessionStore::load(&store, &Id::default()).await.unwrap().is_none());
        wire.waited_for("find") >= later
    })
    .await;
}

#[tokio::test]
async fn clear_contains_and_length_are_causal_reads() {
    let uri = uri();
    let wire = Wire::default();
    let mongo = wire.mongo(&uri).await;
    let record = create(&mongo).await;
    let written = wire.operation_time("insert");
    assert!(written.is_some());
    assert!(mongo.contains(record.id).await.unwrap());
    assert!(wire.waited_for("find") >= written);
    assert_eq!(mongo.length().await.unwrap(), 1);
    assert!(wire.waited_for("aggregate") >= written);
    wire.asked.lock().unwrap().clear();
    assert_eq!(mongo.clear().await.unwrap(), 1);
    assert!(wire.waited_for("find") >= written);
}
