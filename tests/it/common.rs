//! What the tests share: a server, and stores on a database of their own.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use mongodb::event::EventHandler;
use mongodb::event::command::CommandEvent;
use mongodb::options::ClientOptions;
use session_test_server::fresh_database;
use tower_sessions_moka_mongodb_store::{CachedMongoStore, MongoStore, mongodb};

/// A URI with a database of its own, on the server that all tests of this process share.
pub fn uri() -> String {
    session_test_server::shared().expect("a server to test on").uri_for(&fresh_database())
}

pub async fn mongo() -> MongoStore {
    MongoStore::connect(uri()).await.unwrap()
}

pub async fn cached() -> CachedMongoStore {
    CachedMongoStore::builder(mongo().await).build().await.unwrap()
}

/// Counts the commands that a client sends, by name.
#[derive(Clone, Default)]
pub struct Commands(Arc<std::sync::Mutex<std::collections::HashMap<String, usize>>>);

impl Commands {
    pub fn sent(&self, name: &str) -> usize {
        self.0.lock().unwrap().get(name).copied().unwrap_or(0)
    }

    /// A client that counts into this.
    pub async fn client(&self, uri: &str) -> mongodb::Client {
        let mut options = ClientOptions::parse(uri).await.unwrap();
        let counts = self.clone();
        options.command_event_handler = Some(EventHandler::callback(move |event| {
            if let CommandEvent::Started(event) = event {
                *counts.0.lock().unwrap().entry(event.command_name).or_default() += 1;
            }
        }));
        mongodb::Client::with_options(options).unwrap()
    }
}

/// A number that is new on each call, to tell sessions apart.
pub fn serial() -> usize {
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    NEXT.fetch_add(1, Ordering::Relaxed)
}
