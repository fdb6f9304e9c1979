//! The sessions of an owner: how they are listed and deleted, and which field is stored.

mod in_flight;
mod index;
#[cfg(feature = "tower-sessions-014")]
mod login;
mod races;

use std::collections::HashSet;
use std::time::{Duration, Instant};

use futures::{StreamExt, TryStreamExt};
use mongodb::bson::spec::BinarySubtype;
use mongodb::bson::{Binary, Bson, DateTime, Document, doc};
use serde_json::{Value, json};
use tower_sessions::session::Record;
use tower_sessions::{SessionStore, session_store};
use tower_sessions_moka_mongodb_store::{
    CachedMongoStore, Error, ErrorKind, LiveSession, LiveSessions, MongoStore, MongoStoreBuilder,
    Owner, Result, SessionHandle, SessionKey, mongodb,
};

use crate::common::{
    FOREVER, PATIENCE, Store, cache_of, create, eventually, everything_said_by, in_the_past,
    on_both_tiers, record, uri,
};

/// What both of our stores have for owners.
pub(crate) trait Owned: Store + 'static {
    async fn over(mongo: MongoStore) -> Self;
    fn find_by_owner(&self, owner: &str) -> LiveSessions;
    async fn delete_by_owner(&self, owner: &str) -> Result<u64>;
    async fn delete_by_owner_except(&self, owner: &str, kept: SessionKey) -> Result<u64>;
    async fn revoke(&self, handle: SessionHandle) -> Result<bool>;
    async fn revoke_owned(&self, owner: &str, handle: SessionHandle) -> Result<bool>;
    async fn assign_owners(&self) -> Result<u64>;
    fn find(&self, filter: Document) -> LiveSessions;
    async fn delete_where(&self, filter: Document) -> Result<u64>;

    /// A store on the same collection, built with more options.
    async fn with(&self, options: impl FnOnce(MongoStoreBuilder) -> MongoStoreBuilder) -> Self {
        let client = self.collection().client().clone();
        let namespace = self.collection().namespace();
        let builder = MongoStore::builder().client(client).database(namespace.db);
        Self::over(options(builder.collection(namespace.coll)).build().await.unwrap()).await
    }
}

macro_rules! impl_owned {
    ($($store:ident: |$mongo:ident| $over:expr;)*) => { $(
        impl Owned for $store {
            async fn over($mongo: MongoStore) -> Self {
                $over
            }
            fn find_by_owner(&self, owner: &str) -> LiveSessions {
                $store::find_by_owner(self, owner)
            }
            async fn delete_by_owner(&self, owner: &str) -> Result<u64> {
                $store::delete_by_owner(self, owner).await
            }
            async fn delete_by_owner_except(&self, owner: &str, kept: SessionKey) -> Result<u64> {
                $store::delete_by_owner_except(self, owner, kept).await
            }
            async fn revoke(&self, handle: SessionHandle) -> Result<bool> {
                $store::revoke(self, handle).await
            }
            async fn revoke_owned(&self, owner: &str, handle: SessionHandle) -> Result<bool> {
                $store::revoke_owned(self, owner, handle).await
            }
            async fn assign_owners(&self) -> Result<u64> {
                $store::assign_owners(self).await
            }
            fn find(&self, filter: Document) -> LiveSessions {
                $store::find(self, filter)
            }
            async fn delete_where(&self, filter: Document) -> Result<u64> {
                $store::delete_where(self, filter).await
            }
        }
    )* };
}

impl_owned! {
    MongoStore: |mongo| mongo;
    CachedMongoStore: |mongo| cache_of(&mongo).await;
}

/// The user of a session, if a user is logged in.
fn user(data: &std::collections::HashMap<String, Value>) -> Option<Owner> {
    Owner::from_value(data.get("user")?)
}

fn of(owner: &str) -> Record {
    let mut record = record();
    record.data.insert("user".to_owned(), json!(owner));
    record
}

async fn log_in(store: &impl SessionStore, owner: &str) -> Record {
    let mut record = of(owner);
    store.create(&mut record).await.unwrap();
    record
}

async fn is_there(store: &impl SessionStore, record: &Record) -> bool {
    store.load(&record.id).await.unwrap().is_some()
}

fn by_key(record: &Record) -> Document {
    let bytes = SessionKey::from(record.id).as_bytes().to_vec();
    doc! { "_id": Binary { subtype: BinarySubtype::Generic, bytes } }
}

async fn stored_owner(store: &impl Store, record: &Record) -> Option<String> {
    store.collection().find_one(by_key(record)).await.unwrap().unwrap().owner
}

async fn handles(listed: LiveSessions) -> HashSet<SessionHandle> {
    listed.map(|session| session.unwrap().handle).collect().await
}

fn these<'a>(records: impl IntoIterator<Item = &'a Record>) -> HashSet<SessionHandle> {
    records.into_iter().map(|record| SessionHandle::of(record.id)).collect()
}

on_both_tiers! {
    an_owner_finds_all_its_live_sessions_and_no_others = find_by_owner;
    stored_owner_follows_the_data = follows_the_data;
    an_expired_session_is_not_changed_by_a_save_that_has_no_owner = expired_is_left;
    sign_out_elsewhere_deletes_all_but_one = everywhere_else;
    sign_out_deletes_more_than_a_page = many;
    sign_out_deletes_expired_sessions_without_counting_them = expired_go_too;
    handle_revokes_the_session_only_for_its_owner = revoke;
    store_without_owner_function_changes_no_owner = without_owners;
    an_owner_that_is_too_long_is_refused_before_anything_is_sent = too_long;
    sessions_from_before_get_their_owner = assign_owners;
    every_method_beyond_the_contract_says_closed_after_shutdown = shutdown;
}

async fn find_by_owner(plain: impl Owned) {
    let store = plain.with(|mongo| mongo.owner(user)).await;
    let first = log_in(&store, "ferris").await;
    let second = log_in(&store, "ferris").await;
    let other = log_in(&store, "corro").await;
    create(&store).await;
    let mut ended = of("ferris");
    ended.expiry_date = in_the_past();
    store.create(&mut ended).await.unwrap();

    // The most recently updated session comes first.
    eventually("the clock moves", async || {
        let mut used = first.clone();
        used.data.insert("used".to_owned(), json!(true));
        store.save(&used).await.unwrap();
        let listed: Vec<LiveSession> = store.find_by_owner("ferris").try_collect().await.unwrap();
        assert_eq!(listed.len(), 2);
        listed[0].updated > listed[1].updated && listed[0].data == used.data
    })
    .await;
    let listed: Vec<LiveSession> = store.find_by_owner("ferris").try_collect().await.unwrap();
    assert_eq!(listed[0].handle, SessionHandle::of(first.id));
    assert_eq!(listed[1].handle, SessionHandle::of(second.id));
    assert!(listed[0].created < listed[0].updated);
    assert!((listed[1].expires - second.expiry_date).abs() < time::Duration::MILLISECOND);
    assert!(listed.iter().all(|session| session.owner == Some("ferris".into())));
    let shown = format!("{listed:?}");
    assert!(!shown.contains("ferris") && !shown.contains(&listed[0].handle.to_string()), "{shown}");

    assert_eq!(handles(store.find_by_owner("corro")).await, these([&other]));
    assert!(handles(store.find_by_owner("nobody")).await.is_empty());
}

async fn follows_the_data(plain: impl Owned) {
    let store = plain.with(|mongo| mongo.owner(user)).await;
    let mut record = create(&store).await;
    assert_eq!(stored_owner(&store, &record).await, None);
    for owner in ["ferris", "corro"] {
        record.data.insert("user".to_owned(), json!(owner));
        store.save(&record).await.unwrap();
        assert_eq!(stored_owner(&store, &record).await.as_deref(), Some(owner));
    }
    assert!(handles(store.find_by_owner("ferris")).await.is_empty());

    // A save that only prolongs the session, and the save of a store without owners.
    record.expiry_date += time::Duration::minutes(5);
    store.save(&record).await.unwrap();
    record.data.insert("more".to_owned(), json!(1));
    plain.save(&record).await.unwrap();
    assert_eq!(stored_owner(&store, &record).await.as_deref(), Some("corro"));

    // A log-out without a new id. A field that another program has added stays.
    let extra = doc! { "$set": { "note": "by hand" } };
    store.collection().update_one(by_key(&record), extra).await.unwrap();
    record.data.remove("user");
    store.save(&record).await.unwrap();
    let documents = store.collection().clone_with_type::<Document>();
    let document = documents.find_one(by_key(&record)).await.unwrap().unwrap();
    assert_eq!(document.get("owner"), Some(&Bson::Null));
    assert_eq!(document.get_str("note").unwrap(), "by hand");
    assert_eq!(store.load(&record.id).await.unwrap().unwrap().data, record.data);
    assert_eq!(store.delete_by_owner("corro").await.unwrap(), 0);
    let listed: Vec<LiveSession> = store.all().try_collect().await.unwrap();
    assert!(listed.len() == 1 && listed[0].owner.is_none());
    assert_eq!(
        (stored_owner(&store, &record).await, store.assign_owners().await.unwrap()),
        (None, 0)
    );
    let stays = create(&store).await;
    store.save(&Record { data: record.data, ..stays.clone() }).await.unwrap();
    let document = documents.find_one(by_key(&stays)).await.unwrap().unwrap();
    assert!(!document.contains_key("owner"), "it would be in the index");
}

async fn expired_is_left(plain: impl Owned) {
    let store = plain.with(|mongo| mongo.owner(user)).await;
    let mut record = log_in(&store, "ferris").await;
    store.expire_all().await;
    record.data.remove("user");
    store.save(&record).await.unwrap();
    assert!(!is_there(&store, &record).await, "the session does not come back");
    assert_eq!(stored_owner(&store, &record).await.as_deref(), Some("ferris"), "as it was");
}

async fn everywhere_else(plain: impl Owned) {
    let store = plain.with(|mongo| mongo.owner(user)).await;
    let other = store.with(|mongo| mongo.owner(user)).await;
    let mut mine = Vec::new();
    for _ in 0..3 {
        mine.push(log_in(&store, "ferris").await);
    }
    let anothers = log_in(&store, "corro").await;
    for record in mine.iter().chain([&anothers]) {
        assert!(is_there(&other, record).await, "it is cached there");
    }

    let kept = &mine[1];
    let ended = store.delete_by_owner_except("ferris", kept.id.into()).await.unwrap();
    let returned = Instant::now();
    assert_eq!(ended, 2);
    for record in [&mine[0], &mine[2]] {
        assert!(!is_there(&store, record).await);
        // The cache may keep all entries for an hour, so only the change stream can remove this
        // one.
        eventually("it ends there", async || !is_there(&other, record).await).await;
        assert!(returned.elapsed() < Duration::from_secs(5), "the bound by default");
        store.save(record).await.unwrap();
        assert!(!is_there(&store, record).await && !is_there(&other, record).await);
    }
    for store in [&store, &other] {
        assert!(is_there(store, kept).await && is_there(store, &anothers).await);
    }
    assert_eq!(handles(other.find_by_owner("ferris")).await, these([kept]));

    // Parse the handle, as an app does with a form's value.
    let handle = SessionHandle::of(kept.id).to_string().parse::<SessionHandle>().unwrap();
    assert_eq!(store.delete_by_owner_except("ferris", handle.into()).await.unwrap(), 0);
    assert_eq!(store.delete_by_owner("ferris").await.unwrap(), 1);
    assert!(!is_there(&store, kept).await && is_there(&store, &anothers).await);
}

async fn many(plain: impl Owned) {
    let store = plain.with(|mongo| mongo.owner(user).operation_timeout(PATIENCE)).await;
    let mut template = log_in(&store, "ferris").await;
    let kept = log_in(&store, "corro").await;
    let documents = store.collection().clone_with_type::<Document>();
    let document = documents.find_one(by_key(&template)).await.unwrap().unwrap();
    let copies = (0..2_500_u32).map(|n| {
        let mut copy = document.clone();
        let mut key = [7; 32].to_vec();
        key[..4].copy_from_slice(&n.to_be_bytes());
        copy.insert("_id", Binary { subtype: BinarySubtype::Generic, bytes: key });
        copy
    });
    documents.insert_many(copies.collect::<Vec<_>>()).await.unwrap();
    // Not a session, although it has an owner.
    documents.insert_one(doc! { "_id": "settings", "owner": "ferris" }).await.unwrap();
    assert_eq!(store.find_by_owner("ferris").count().await, 2_501);
    assert_eq!(store.delete_by_owner("ferris").await.unwrap(), 2_501);
    assert!(!is_there(&store, &template).await && is_there(&store, &kept).await);
    assert_eq!(store.documents().await, 2, "corro's session, and what is not ours");
    template.data.insert("late".to_owned(), json!(true));
    store.save(&template).await.unwrap();
    assert!(!is_there(&store, &template).await);
}

async fn expired_go_too(plain: impl Owned) {
    let store = plain.with(|mongo| mongo.owner(user)).await;
    log_in(&store, "ferris").await;
    log_in(&store, "ferris").await;
    let past = doc! { "$set": { "expires": DateTime::from_millis(1_000) } };
    store.collection().update_one(doc! {}, past).await.unwrap();
    assert_eq!(store.delete_by_owner("ferris").await.unwrap(), 1);
    assert_eq!(store.documents().await, 0);
}

async fn revoke(plain: impl Owned) {
    let store = plain.with(|mongo| mongo.owner(user)).await;
    let other = store.with(|mongo| mongo.owner(user)).await;
    let mine = log_in(&store, "ferris").await;
    let anothers = log_in(&store, "corro").await;
    for record in [&mine, &anothers] {
        assert!(is_there(&other, record).await);
    }
    let forged = SessionHandle::of(anothers.id);
    assert!(!store.revoke_owned("ferris", forged).await.unwrap());
    assert!(is_there(&store, &anothers).await && is_there(&other, &anothers).await);

    assert!(store.revoke_owned("ferris", SessionHandle::of(mine.id)).await.unwrap());
    assert!(!is_there(&store, &mine).await);
    assert!(!store.revoke_owned("ferris", SessionHandle::of(mine.id)).await.unwrap(), "once");
    assert!(store.revoke(forged).await.unwrap());
    assert!(!store.revoke(forged).await.unwrap());
    for record in [&mine, &anothers] {
        assert!(!is_there(&store, record).await);
        eventually("it ends there", async || !is_there(&other, record).await).await;
    }
    let expired = log_in(&store, "ferris").await;
    store.expire_all().await;
    assert!(!store.revoke(SessionHandle::of(expired.id)).await.unwrap());
}

async fn without_owners(store: impl Owned) {
    let record = log_in(&store, "ferris").await;
    assert_eq!(stored_owner(&store, &record).await, None);
    let handle = SessionHandle::of(record.id);
    let errors = [
        store.find_by_owner("ferris").next().await.unwrap().unwrap_err(),
        store.delete_by_owner("ferris").await.unwrap_err(),
        store.delete_by_owner_except("ferris", record.id.into()).await.unwrap_err(),
        store.revoke_owned("ferris", handle).await.unwrap_err(),
        store.assign_owners().await.unwrap_err(),
    ];
    for error in errors {
        assert_eq!(error.kind(), ErrorKind::Config);
        let said = everything_said_by(&error);
        assert!(said.contains("MongoStoreBuilder::owner") && !said.contains("ferris"), "{said}");
    }
    assert!(is_there(&store, &record).await);
    assert!(store.revoke(handle).await.unwrap(), "a handle needs no owner");
}

async fn too_long(plain: impl Owned) {
    let store = plain.with(|mongo| mongo.owner(user)).await;
    let long = "x".repeat(2_000);
    let error = store.create(&mut of(&long)).await.unwrap_err();
    assert!(matches!(&error, session_store::Error::Encode(_)), "{error:?}");
    let mut record = log_in(&store, "ferris").await;
    record.data.insert("user".to_owned(), json!(long));
    let error = store.save(&record).await.unwrap_err();
    assert!(error.to_string().contains("1024 bytes") && !error.to_string().contains("xx"));
    assert_eq!(stored_owner(&store, &record).await.as_deref(), Some("ferris"));
}

async fn assign_owners(plain: impl Owned) {
    let old = log_in(&plain, "ferris").await;
    let anonymous = create(&plain).await;
    let broken = log_in(&plain, "ferris").await;
    let store = plain.with(|mongo| mongo.owner(user)).await;
    let new = log_in(&store, "ferris").await;
    let stale = log_in(&store, "ferris").await;
    for (record, change) in [
        (&broken, doc! { "$set": { "format": 9 } }),
        (&anonymous, doc! { "$set": { "owner": "nobody" } }),
        (&stale, doc! { "$set": { "owner": 7 } }),
    ] {
        store.collection().update_one(by_key(record), change).await.unwrap();
    }
    assert_eq!(store.assign_owners().await.unwrap(), 3);
    assert_eq!(handles(store.find_by_owner("ferris")).await, these([&old, &new, &stale]));
    assert_eq!(stored_owner(&store, &anonymous).await, None);
    assert_eq!(store.assign_owners().await.unwrap(), 0, "all is as it should be");
    assert_eq!(store.load(&old.id).await.unwrap().unwrap().data, old.data);
}

async fn shutdown(plain: impl Owned) {
    let store = plain.with(|mongo| mongo.owner(user)).await;
    let record = log_in(&store, "ferris").await;
    store.shutdown().await;
    let handle = SessionHandle::of(record.id);
    let errors: [Error; 5] = [
        store.find_by_owner("ferris").next().await.unwrap().unwrap_err(),
        store.delete_by_owner("ferris").await.unwrap_err(),
        store.revoke(handle).await.unwrap_err(),
        store.delete_where(doc! { "owner": "ferris" }).await.unwrap_err(),
        store.assign_owners().await.unwrap_err(),
    ];
    for error in errors {
        assert_eq!(error.kind(), ErrorKind::Closed, "{error}");
    }
}

/// A store that learns of other instances' changes only by the change stream.
async fn instance(uri: &str) -> CachedMongoStore {
    let mongo = MongoStore::builder().uri(uri).owner(user).build().await.unwrap();
    CachedMongoStore::builder(mongo).max_staleness(FOREVER).build().await.unwrap()
}

#[tokio::test]
async fn owner_function_may_return_any_owner_type() {
    let mongo = MongoStore::builder().uri(uri()).owner(|data| data.get("user")?.as_u64());
    let store = mongo.build().await.unwrap();
    let mut record = record();
    record.data.insert("user".to_owned(), json!(7));
    store.create(&mut record).await.unwrap();
    assert_eq!(handles(store.find_by_owner(7)).await, these([&record]));
    assert_eq!(store.delete_by_owner("7").await.unwrap(), 1);
}
