//! The sessions of an owner are deleted while they are loaded, saved and created.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use mongodb::bson::doc;
use serde_json::json;
use tower_sessions::SessionStore;
use tower_sessions::session::{Id, Record};
use tower_sessions_moka_mongodb_store::{
    CachedMongoStore, Coherence, MongoStore, SessionHandle, mongodb,
};

use super::{instance, is_there, log_in, user};
use crate::common::{FOREVER, PATIENCE, cache_of, eventually, in_the_future, uri};
use crate::proxy::Proxy;

/// Each way to delete a session, other than `delete`.
#[derive(Clone, Copy, Debug)]
enum End {
    Owner,
    Else,
    Handle,
    Filter,
}

impl End {
    const ALL: [Self; 4] = [Self::Owner, Self::Else, Self::Handle, Self::Filter];

    /// The command that removes the session.
    fn command(self) -> &'static str {
        match self {
            Self::Handle => "findAndModify",
            _ => "delete",
        }
    }

    async fn run(self, store: &CachedMongoStore, record: &Record) -> u64 {
        let other = SessionHandle::of(Id::default());
        match self {
            Self::Owner => store.delete_by_owner("ferris").await.unwrap(),
            Self::Else => store.delete_by_owner_except("ferris", other).await.unwrap(),
            Self::Handle => {
                let handle = SessionHandle::of(record.id);
                store.revoke_owned("ferris", handle).await.unwrap().into()
            }
            Self::Filter => store.delete_where(doc! { "owner": "ferris" }).await.unwrap(),
        }
    }
}

/// A session that the store behind the proxy has not cached yet.
async fn cold() -> (Proxy, CachedMongoStore, Record) {
    let proxy = Proxy::start().await;
    let other = MongoStore::builder().uri(proxy.direct()).owner(user).build().await.unwrap();
    let record = log_in(&other, "ferris").await;
    let store = MongoStore::builder().uri(proxy.uri()).owner(user).operation_timeout(PATIENCE);
    let store = cache_of(&store.build().await.unwrap()).await;
    (proxy, store, record)
}

#[tokio::test]
async fn slow_load_that_overlaps_a_sign_out_leaves_no_entry() {
    for end in End::ALL {
        let (proxy, store, record) = cold().await;
        let mut held = proxy.hold("find");
        let slow = tokio::spawn({
            let store = store.clone();
            let record = record.clone();
            async move { is_there(&store, &record).await }
        });
        held.reached().await;
        assert_eq!(end.run(&store, &record).await, 1, "{end:?}");
        assert!(!is_there(&store, &record).await, "{end:?}: a later load joins no old flight");
        held.deliver();
        assert!(slow.await.unwrap(), "{end:?}: it began before");
        assert!(!is_there(&store, &record).await, "{end:?}");
    }
}

#[tokio::test]
async fn slow_save_overtaken_by_a_sign_out_leaves_no_entry() {
    for end in End::ALL {
        let (proxy, store, mut record) = cold().await;
        assert!(is_there(&store, &record).await);
        let mut held = proxy.hold("update");
        record.data.insert("changed".to_owned(), json!(true));
        let slow = tokio::spawn({
            let store = store.clone();
            let record = record.clone();
            async move { SessionStore::save(&store, &record).await.unwrap() }
        });
        held.reached().await;
        assert_eq!(end.run(&store, &record).await, 1, "{end:?}");
        held.deliver();
        slow.await.unwrap();
        assert!(!is_there(&store, &record).await, "{end:?}");
        assert_eq!(store.length().await.unwrap(), 0, "{end:?}");
    }
}

#[tokio::test]
async fn load_during_a_sign_out_leaves_no_entry_at_its_end() {
    for end in End::ALL {
        let (proxy, store, record) = cold().await;
        assert!(is_there(&store, &record).await, "it is cached");
        let mut held = proxy.hold(end.command());
        let ends = tokio::spawn({
            let store = store.clone();
            let record = record.clone();
            async move { end.run(&store, &record).await }
        });
        held.reached().await;
        let _ = store.load(&record.id).await.unwrap();
        held.deliver();
        assert_eq!(ends.await.unwrap(), 1, "{end:?}");
        assert!(!is_there(&store, &record).await, "{end:?}");
    }
}

#[tokio::test]
async fn sign_out_with_unknown_outcome_leaves_no_entry() {
    for end in End::ALL {
        let (proxy, store, record) = cold().await;
        assert!(is_there(&store, &record).await, "it is cached");
        let mut held = proxy.hold(end.command());
        let ends = tokio::spawn({
            let store = store.clone();
            let record = record.clone();
            // The driver may retry the command or not. Both results are accepted.
            async move { drop(tokio::spawn(async move { end.run(&store, &record).await }).await) }
        });
        held.reached().await;
        held.cut();
        ends.await.unwrap();
        assert!(!is_there(&store, &record).await, "{end:?}");
    }
}

#[tokio::test]
async fn sign_out_continues_after_its_caller_gives_up() {
    for end in End::ALL {
        let (proxy, store, record) = cold().await;
        assert!(is_there(&store, &record).await);
        let mut held = proxy.hold(end.command());
        let mut call = Box::pin(end.run(&store, &record));
        assert!(futures::poll!(&mut call).is_pending());
        held.reached().await;
        drop(call);
        held.deliver();
        eventually("the cache receives the change", async || !is_there(&store, &record).await)
            .await;
        assert_eq!(store.length().await.unwrap(), 0, "{end:?}");
    }
}

/// A filter has found a session, and the session changes before it is removed.
#[tokio::test]
async fn sign_out_leaves_a_session_whose_owner_changed() {
    for end in [End::Owner, End::Else, End::Filter] {
        let (proxy, store, mut record) = cold().await;
        let mut held = proxy.hold("find");
        let ends = tokio::spawn({
            let store = store.clone();
            let record = record.clone();
            async move { end.run(&store, &record).await }
        });
        held.reached().await;
        record.data.insert("user".to_owned(), json!("corro"));
        SessionStore::save(&store, &record).await.unwrap();
        held.deliver();
        assert_eq!(ends.await.unwrap(), 0, "{end:?}");
        let found = SessionStore::load(&store, &record.id).await.unwrap();
        assert_eq!(found.unwrap().data, record.data, "{end:?}");
    }
}

/// Signs the user out everywhere else, many times, while the user's browsers load, save and log in
/// on two instances.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn sign_out_ends_every_earlier_session_under_load() {
    let uri = uri();
    let one = instance(&uri).await;
    let other = instance(&uri).await;
    let kept = log_in(&one, "ferris").await;
    let anothers = log_in(&one, "corro").await;
    let mut logged_in_meanwhile = 0;
    for _ in 0..12 {
        let mut before = Vec::new();
        for _ in 0..6 {
            before.push(log_in(&one, "ferris").await);
            before.push(log_in(&other, "ferris").await);
        }
        let ended = Arc::new(AtomicBool::new(false));
        let browsers: Vec<_> = (0..6)
            .map(|number| {
                let store = [&one, &other][number % 2].clone();
                let ended = Arc::clone(&ended);
                let mine = before.clone();
                tokio::spawn(async move {
                    let mut version = 0;
                    let mut new = Vec::new();
                    while !ended.load(Ordering::SeqCst) {
                        version += 1;
                        for record in &mine {
                            let _ = SessionStore::load(&store, &record.id).await.unwrap();
                            let mut record = record.clone();
                            record.data.insert("version".to_owned(), json!([number, version]));
                            SessionStore::save(&store, &record).await.unwrap();
                        }
                        new.push(log_in(&store, "ferris").await);
                    }
                    new
                })
            })
            .collect();
        let count = one.delete_by_owner_except("ferris", kept.id).await.unwrap();
        assert!(count >= 12, "{count}");
        // Check at once, while the others continue.
        for record in &before {
            assert!(!is_there(&one, record).await);
        }
        ended.store(true, Ordering::SeqCst);
        let mut new = Vec::new();
        for browser in browsers {
            new.extend(browser.await.unwrap());
        }
        for record in &before {
            assert!(!is_there(&one, record).await, "no save brings it back");
            eventually("it ends there", async || !is_there(&other, record).await).await;
        }
        // Each session that was created meanwhile exists for both instances, or for neither.
        for record in &new {
            let stays = one.contains(record.id).await.unwrap();
            logged_in_meanwhile += u32::from(stays);
            for store in [&one, &other] {
                eventually("they agree", async || is_there(store, record).await == stays).await;
            }
        }
        assert!(is_there(&one, &kept).await && is_there(&other, &anothers).await);
    }
    assert!(logged_in_meanwhile > 0, "no log-in took place meanwhile");
    assert!(one.delete_by_owner("ferris").await.unwrap() > 0);
    assert_eq!(one.length().await.unwrap(), 1, "corro's");
}

/// The owner was derived from data that is replaced before the owner is stored.
#[tokio::test]
async fn assign_owners_does_not_use_older_data() {
    let proxy = Proxy::start().await;
    let plain = MongoStore::connect(proxy.direct()).await.unwrap();
    let mut record = log_in(&plain, "ferris").await;
    let builder = MongoStore::builder().uri(proxy.uri()).owner(user).operation_timeout(PATIENCE);
    let store = builder.build().await.unwrap();
    let mut held = proxy.hold("find");
    let assigns = tokio::spawn({
        let store = store.clone();
        async move { store.assign_owners().await.unwrap() }
    });
    held.reached().await;
    record.data.insert("user".to_owned(), json!("corro"));
    SessionStore::save(&store, &record).await.unwrap();
    held.deliver();
    assert_eq!(assigns.await.unwrap(), 0);
    assert_eq!(store.delete_by_owner("ferris").await.unwrap(), 0);
    assert_eq!(store.delete_by_owner("corro").await.unwrap(), 1);
}

/// Each session is counted by exactly one of the calls that delete it.
#[tokio::test]
async fn two_sign_outs_count_each_session_once() {
    let uri = uri();
    let one = instance(&uri).await;
    let other = instance(&uri).await;
    for _ in 0..5 {
        let mut records = Vec::new();
        for _ in 0..20 {
            records.push(log_in(&one, "ferris").await);
        }
        let (here, there) =
            tokio::join!(one.delete_by_owner("ferris"), other.delete_by_owner("ferris"));
        assert_eq!(here.unwrap() + there.unwrap(), 20);
        for record in &records {
            for store in [&one, &other] {
                eventually("it ends", async || !is_there(store, record).await).await;
            }
        }
    }
}

/// A store with users as owners, behind a proxy. Its entries do not expire.
async fn numbered_users() -> (Proxy, CachedMongoStore) {
    let proxy = Proxy::start().await;
    let mongo = MongoStore::builder()
        .uri(proxy.uri())
        .owner(|data| data.get("user")?.as_i64())
        .operation_timeout(Duration::from_secs(60));
    let store =
        CachedMongoStore::builder(mongo.build().await.unwrap()).coherence(Coherence::TimeBound);
    (proxy, store.max_staleness(FOREVER).build().await.unwrap())
}

async fn session_of(user: i64, store: &CachedMongoStore) -> Record {
    let mut record = Record {
        id: Id::default(),
        data: [("user".to_owned(), json!(user))].into(),
        expiry_date: in_the_future(),
    };
    store.create(&mut record).await.unwrap();
    record
}

#[tokio::test]
async fn sign_out_does_not_wait_for_the_end_of_a_long_one() {
    let (proxy, store) = numbered_users().await;
    // More sessions than a page has.
    for _ in 0..1_001 {
        session_of(7, &store).await;
    }
    let one = session_of(8, &store).await;
    let other = session_of(9, &store).await;
    let mut page = proxy.hold("delete");
    let long = tokio::spawn({
        let store = store.clone();
        async move { store.delete_by_owner(7).await }
    });
    page.reached().await;
    let mut short = Box::pin(store.delete_by_owner(8));
    while store.contains(one.id).await.unwrap() {
        assert!(futures::poll!(&mut short).is_pending());
    }
    // A third sign-out does not wait for the second one either.
    let mut another = Box::pin(store.delete_by_owner(9));
    while store.contains(other.id).await.unwrap() {
        assert!(futures::poll!(&mut another).is_pending());
    }
    let mut next_page = proxy.hold("delete");
    page.deliver();
    next_page.reached().await;
    assert_eq!(tokio::time::timeout(PATIENCE, short).await.unwrap().unwrap(), 1);
    assert_eq!(tokio::time::timeout(PATIENCE, another).await.unwrap().unwrap(), 1);
    next_page.deliver();
    assert_eq!(long.await.unwrap().unwrap(), 1_001);
}
