//! Two imports at a time, as of two instances that both import when they start.
//!
//! Each of them is held at each of its steps, by each command that it sends: the server has carried
//! it out, and the import has not heard of it.

use futures::{StreamExt, stream};
use mongodb::bson::Document;
use mongodb::{Client, Collection};
use tokio::task::JoinHandle;
use tower_sessions_core::SessionStore;
use tower_sessions_core::session::Id;
use tower_sessions_core_011::session as old;
use tower_sessions_moka_mongodb_store::import::{Progress, tower_sessions_mongodb_store};
use tower_sessions_moka_mongodb_store::{MongoStore, Result};

use super::common::PATIENCE;
use super::proxy::{HeldReply, Proxy};
use super::{documents, loaded, name, published, write};

/// The commands that an import of one page sends, in their order, by name and as the how manieth of
/// it. Not every run comes to all of them: one that does not is not held.
const STEPS: [(&str, usize); 8] = [
    ("find", 0),
    ("insert", 0),
    ("find", 1),
    ("update", 0),
    ("find", 2),
    ("update", 1),
    ("delete", 0),
    ("delete", 1),
];

/// One of the two.
struct Instance {
    proxy: Proxy,
    store: MongoStore,
    old: Collection<Document>,
}

/// An import that was begun, and where it is held, if it is.
struct Begun {
    run: JoinHandle<Result<Progress>>,
    held: Option<HeldReply>,
}

impl Instance {
    /// On this database, through a wire of its own. Sessions come from and into the same collection, or
    /// into another one.
    async fn start(database: &str, ours: &str) -> Self {
        let proxy = Proxy::start().await;
        let uri = proxy.uri().replace(&name(proxy.uri()), database);
        let builder = MongoStore::builder().uri(uri).collection(ours).operation_timeout(PATIENCE);
        let store = builder.create_indexes(false).build().await.unwrap();
        let client = store.collection().client().clone();
        let old = client.database(database).collection("sessions");
        Self { proxy, store, old }
    }

    /// Imports until the server has carried out the `nth` command of this name.
    async fn imports_until(&self, keep: bool, (command, nth): (&'static str, usize)) -> Begun {
        let holds: Vec<_> = (0..=nth).map(|_| self.proxy.hold(command)).collect();
        let import = tower_sessions_mongodb_store(&self.old).into(&self.store);
        let import = if keep { import.keep_source() } else { import };
        let mut run = tokio::spawn(import.run());
        for (at, mut held) in holds.into_iter().enumerate() {
            tokio::select! {
                _ = held.reached() => {}
                ended = &mut run => {
                    let run = tokio::spawn(async { ended.unwrap() });
                    return Begun { run, held: None };
                }
            }
            if at == nth {
                return Begun { run, held: Some(held) };
            }
            held.deliver();
        }
        Begun { run, held: None }
    }
}

impl Begun {
    async fn ends(self) {
        if let Some(held) = self.held {
            held.deliver();
        }
        self.run.await.unwrap().unwrap();
    }
}

/// A session, and whether it was ended here.
struct Watched<'a> {
    record: &'a old::Record,
    store: MongoStore,
    ended: bool,
}

impl Watched<'_> {
    /// Ends it, if it is live. It is never so again.
    async fn ends(&mut self, when: &str) {
        let id = Id(self.record.id.0);
        if self.store.contains(id).await.unwrap() {
            assert!(!self.ended, "it rose: {when}");
            SessionStore::delete(&self.store, &id).await.unwrap();
            self.ended = true;
        }
    }
}

async fn two_overlap(one: (&'static str, usize), other: (&'static str, usize), keep: bool) {
    let when = format!("one held at {one:?}, the other at {other:?}, kept: {keep}");
    let direct = Proxy::start().await.direct().to_owned();
    let database = name(&direct);
    let records = write(&published(&direct, &database).await, 0..3).await;
    let ours = if keep { "ours" } else { "sessions" };
    let (a, b) = (Instance::start(&database, ours).await, Instance::start(&database, ours).await);
    let watching = MongoStore::builder().uri(&direct).collection(ours).build().await.unwrap();
    let mut watched = Watched { record: &records[0], store: watching.clone(), ended: false };

    let first = a.imports_until(keep, one).await;
    watched.ends(&when).await;
    let second = b.imports_until(keep, other).await;
    watched.ends(&when).await;
    first.ends().await;
    watched.ends(&when).await;
    second.ends().await;
    watched.ends(&when).await;
    assert!(watched.ended, "it was never live: {when}");

    // Nor does a third one find anything that was left undone.
    let last = a.imports_until(keep, ("none", 0)).await;
    assert_eq!(last.run.await.unwrap().unwrap().imported, 0, "{when}");
    watched.ends(&when).await;
    for (serial, record) in (1..).zip(&records[1..]) {
        assert_eq!(loaded(&watching, record).await, Some((serial, true)), "{when}");
    }
    let stored = watching.collection().clone_with_type::<Document>();
    assert_eq!(documents(&stored).await, 2, "{when}");
    assert_eq!(documents(&a.old).await, if keep { 3 } else { 2 }, "{when}");
    for store in [&a.store, &b.store, &watching] {
        store.shutdown().await;
    }
    Client::with_uri_str(&direct).await.unwrap().database(&database).drop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_ended_between_two_imports_never_rises_and_nothing_is_lost() {
    let others = |keep| STEPS.into_iter().map(move |other| (keep, other));
    let pairs = [false, true].into_iter().flat_map(others);
    let all = pairs.flat_map(|(keep, other)| STEPS.map(|one| two_overlap(one, other, keep)));
    stream::iter(all).for_each_concurrent(8, |pair| pair).await;
}
