//! A sign-out while a write of the same session is in flight: MongoDB has carried out the write,
//! and this instance has not received the reply yet.
//!
//! ```text
//! this instance                     MongoDB
//! save(owner: ferris -> corro)  ->  stored; the proxy holds the reply
//! delete_by_owner(ferris)       ->  finds nothing, since corro owns the session
//!                               <-  Ok(0)
//! load                              must not return ferris' version from the cache
//! ```

use std::time::Duration;

use mongodb::bson::doc;
use serde_json::{Value, json};
use tower_sessions::SessionStore;
use tower_sessions::session::Record;
use tower_sessions_moka_mongodb_store::{
    CachedMongoStore, Coherence, MongoStore, SessionHandle, mongodb,
};

use super::{is_there, log_in, user};
use crate::common::{FOREVER, PATIENCE};
use crate::proxy::Proxy;

/// What keeps the cache coherent.
#[derive(Clone, Copy, Debug)]
enum Mode {
    SoleWriter,
    TimeBound,
    /// A change stream that reports nothing for a while.
    StalledStream,
}

impl Mode {
    const ALL: [Self; 3] = [Self::SoleWriter, Self::TimeBound, Self::StalledStream];

    async fn store(self, proxy: &Proxy, max_commands: u32) -> CachedMongoStore {
        let mongo = MongoStore::builder()
            .uri(proxy.uri())
            .owner(user)
            .max_commands_in_flight(max_commands)
            .operation_timeout(PATIENCE);
        let store = CachedMongoStore::builder(mongo.build().await.unwrap());
        let store = match self {
            Self::SoleWriter => store.coherence(Coherence::SoleWriter),
            Self::TimeBound => store.coherence(Coherence::TimeBound).max_staleness(FOREVER),
            Self::StalledStream => store.max_staleness(FOREVER),
        };
        store.build().await.unwrap()
    }
}

/// The calls that delete the sessions that MongoDB finds.
#[derive(Clone, Copy, Debug)]
enum SignOut {
    Owner,
    OwnerExcept,
    Filter,
}

impl SignOut {
    const ALL: [Self; 3] = [Self::Owner, Self::OwnerExcept, Self::Filter];

    async fn run(self, store: &CachedMongoStore) -> u64 {
        let other = SessionHandle::of(tower_sessions::session::Id::default());
        let ended = match self {
            Self::Owner => store.delete_by_owner("ferris").await,
            Self::OwnerExcept => store.delete_by_owner_except("ferris", other).await,
            Self::Filter => store.delete_where(doc! { "owner": "ferris" }).await,
        };
        ended.unwrap()
    }
}

fn start_save(store: &CachedMongoStore, record: &Record) -> tokio::task::JoinHandle<()> {
    let store = store.clone();
    let record = record.clone();
    tokio::spawn(async move { SessionStore::save(&store, &record).await.unwrap() })
}

fn owned_by(record: &Record, owner: Option<&str>) -> Record {
    let mut record = record.clone();
    match owner {
        Some(owner) => drop(record.data.insert("user".to_owned(), json!(owner))),
        None => drop(record.data.remove("user")),
    }
    record
}

async fn owner_loaded(store: &CachedMongoStore, record: &Record) -> Option<Value> {
    let loaded = SessionStore::load(store, &record.id).await.unwrap();
    loaded.expect("it has another owner, so it is there").data.get("user").cloned()
}

#[tokio::test]
async fn sign_out_invalidates_a_save_in_flight_that_changes_the_owner() {
    for mode in Mode::ALL {
        for sign_out in SignOut::ALL {
            for new_owner in [Some("corro"), None] {
                let case = format!("{mode:?}, {sign_out:?}, {new_owner:?}");
                let proxy = Proxy::start().await;
                let store = mode.store(&proxy, 4).await;
                let record = log_in(&store, "ferris").await;
                assert!(is_there(&store, &record).await, "{case}: it is cached");
                let mut stream = proxy.hold("getMore");
                if matches!(mode, Mode::StalledStream) {
                    stream.reached().await;
                }
                let mut reply = proxy.hold("update");
                let changed = owned_by(&record, new_owner);
                let save = start_save(&store, &changed);
                reply.reached().await;

                assert_eq!(sign_out.run(&store).await, 0, "{case}: no session is of ferris");
                let new_owner = new_owner.map(Value::from);
                assert_eq!(owner_loaded(&store, &record).await, new_owner, "{case}");

                reply.deliver();
                save.await.unwrap();
                assert_eq!(owner_loaded(&store, &record).await, new_owner, "{case}: answered");
                stream.deliver();
            }
        }
    }
}

/// Two saves wait for a third one that has the only permit. Then they are sent in one command.
#[tokio::test]
async fn sign_out_invalidates_saves_of_one_batch() {
    let proxy = Proxy::start().await;
    let store = Mode::SoleWriter.store(&proxy, 1).await;
    let first = log_in(&store, "ferris").await;
    let second = log_in(&store, "ferris").await;
    let blocker = log_in(&store, "blocker").await;
    let mut blocking = proxy.hold("update");
    let blocks = start_save(&store, &owned_by(&blocker, Some("somebody")));
    blocking.reached().await;
    let mut reply = proxy.hold("update");
    let saved = [
        start_save(&store, &owned_by(&first, Some("corro"))),
        start_save(&store, &owned_by(&second, Some("corro"))),
    ];
    assert_eq!(reply.reached().await, 2, "they are sent as one batch");

    assert_eq!(store.delete_by_owner("ferris").await.unwrap(), 0);
    for record in [&first, &second] {
        assert_eq!(owner_loaded(&store, record).await, Some(json!("corro")));
    }
    reply.deliver();
    blocking.deliver();
    blocks.await.unwrap();
    for save in saved {
        save.await.unwrap();
    }
}

/// A load that began before the sign-out may return what it has read. A later load does not join
/// it.
#[tokio::test]
async fn load_after_a_sign_out_does_not_join_an_earlier_read() {
    let proxy = Proxy::start().await;
    let other = MongoStore::builder().uri(proxy.direct()).owner(user).build().await.unwrap();
    let record = log_in(&other, "ferris").await;
    let store = Mode::TimeBound.store(&proxy, 4).await;
    let mut read = proxy.hold("find");
    let slow = tokio::spawn({
        let store = store.clone();
        let record = record.clone();
        async move { owner_loaded(&store, &record).await }
    });
    read.reached().await;
    let mut reply = proxy.hold("update");
    let save = start_save(&store, &owned_by(&record, Some("corro")));
    reply.reached().await;

    assert_eq!(store.delete_by_owner("ferris").await.unwrap(), 0);
    let later = tokio::time::timeout(Duration::from_secs(30), owner_loaded(&store, &record));
    assert_eq!(later.await.expect("it reads MongoDB itself"), Some(json!("corro")));
    read.deliver();
    assert_eq!(slow.await.unwrap(), Some(json!("ferris")), "it began before");
    assert_eq!(owner_loaded(&store, &record).await, Some(json!("corro")));
    reply.deliver();
    save.await.unwrap();
}

/// Another call has removed the session, and does not have the reply yet. The second call finds
/// nothing.
#[tokio::test]
async fn sign_out_that_finds_nothing_invalidates_pending_deletes() {
    for other_call in ["delete", "revoke", "clear", "delete_by_owner"] {
        let proxy = Proxy::start().await;
        let store = Mode::SoleWriter.store(&proxy, 4).await;
        let record = log_in(&store, "ferris").await;
        let command = if other_call == "revoke" { "findAndModify" } else { "delete" };
        let mut reply = proxy.hold(command);
        let first = tokio::spawn({
            let store = store.clone();
            let id = record.id;
            async move {
                match other_call {
                    "delete" => SessionStore::delete(&store, &id).await.unwrap(),
                    "revoke" => assert!(store.revoke(SessionHandle::of(id)).await.unwrap()),
                    "clear" => assert_eq!(store.clear().await.unwrap(), 1),
                    _ => assert_eq!(store.delete_by_owner("ferris").await.unwrap(), 1),
                }
            }
        });
        reply.reached().await;
        let second = tokio::time::timeout(PATIENCE, store.delete_by_owner("ferris"));
        assert_eq!(second.await.expect("it does not wait").unwrap(), 0, "{other_call}");
        assert!(!is_there(&store, &record).await, "{other_call}");
        reply.deliver();
        first.await.unwrap();
        assert!(!is_there(&store, &record).await, "{other_call}");
    }
}
