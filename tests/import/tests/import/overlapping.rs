//! Two imports at a time, as when two instances both import at their start.
//!
//! Each of them is held at each of its steps, by each command that it sends: the server has carried
//! the command out, and the import has not received the reply.

use futures::{StreamExt, stream};
use mongodb::Collection;
use mongodb::bson::Document;
use tokio::task::JoinHandle;
use tower_sessions_core::SessionStore;
use tower_sessions_core::session::Id;
use tower_sessions_core_011::session as old;
use tower_sessions_moka_mongodb_store::import::{Progress, tower_sessions_mongodb_store};
use tower_sessions_moka_mongodb_store::{MongoStore, Result};

use super::{documents, loaded, name, published, write};
use session_test_support::PATIENCE;
use session_test_support::proxy::{HeldReply, Proxy};

/// A command, and its position among the commands of the same name.
type Step = (&'static str, usize);

/// The commands that an import of one page sends, in their order. Not every run sends all of them.
/// A run that does not send the command is not held.
const STEPS: [Step; 8] = [
    ("find", 0),
    ("insert", 0),
    ("find", 1),
    ("update", 0),
    ("find", 2),
    ("update", 1),
    ("delete", 0),
    ("delete", 1),
];

/// One of the two instances.
struct Instance {
    proxy: Proxy,
    store: MongoStore,
    old: Collection<Document>,
}

/// An import that has begun, and the reply at which it is held, if any.
struct Begun {
    run: JoinHandle<Result<Progress>>,
    held: Option<HeldReply>,
}

impl Instance {
    /// On this database, through its own proxy. The sessions stay in the same collection, or move
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

    fn start_import(&self, keep: bool) -> JoinHandle<Result<Progress>> {
        let import = tower_sessions_mongodb_store(&self.old).into_store(&self.store);
        tokio::spawn(if keep { import.keep_source() } else { import }.run())
    }

    /// Imports until the server has carried out the `nth` command of this name.
    async fn import_until(&self, keep: bool, step: Step) -> Begun {
        let holds = self.hold(step);
        holds.reached_by(self.start_import(keep)).await
    }

    fn hold(&self, (command, nth): Step) -> Holds {
        Holds((0..=nth).map(|_| self.proxy.hold(command)).collect())
    }
}

/// Holds for the same command. The test needs the last one.
struct Holds(Vec<HeldReply>);

impl Holds {
    async fn reached_by(mut self, mut run: JoinHandle<Result<Progress>>) -> Begun {
        let last = self.0.pop();
        for mut earlier in self.0 {
            tokio::select! {
                _ = earlier.reached() => earlier.deliver(),
                ended = &mut run => return Begun::ended(ended.unwrap()),
            }
        }
        let Some(mut last) = last else { return Begun { run, held: None } };
        tokio::select! {
            _ = last.reached() => Begun { run, held: Some(last) },
            ended = &mut run => Begun::ended(ended.unwrap()),
        }
    }
}

impl Begun {
    fn ended(with: Result<Progress>) -> Self {
        Self { run: tokio::spawn(async { with }), held: None }
    }

    async fn finish(self) {
        if let Some(held) = self.held {
            held.deliver();
        }
        self.run.await.unwrap().unwrap();
    }
}

/// A source of three sessions, two instances that import them, and one of the three sessions, which
/// is deleted.
struct Scene {
    a: Instance,
    b: Instance,
    records: Vec<old::Record>,
    watching: MongoStore,
    keep: bool,
    when: String,
    ended: bool,
}

impl Scene {
    async fn set(keep: bool, when: String) -> Self {
        let direct = Proxy::start().await.direct().to_owned();
        let database = name(&direct);
        let records = write(&published(&direct, &database).await, 0..3).await;
        let ours = if keep { "ours" } else { "sessions" };
        let a = Instance::start(&database, ours).await;
        let b = Instance::start(&database, ours).await;
        let watching = MongoStore::builder().uri(&direct).collection(ours).build().await.unwrap();
        Self { a, b, records, watching, keep, when, ended: false }
    }

    /// Deletes the one session if it is live. It must never be live again.
    async fn delete_if_live(&mut self) {
        let id = Id(self.records[0].id.0);
        if self.watching.contains(id).await.unwrap() {
            assert!(!self.ended, "it came back: {}", self.when);
            SessionStore::delete(&self.watching, &id).await.unwrap();
            self.ended = true;
        }
    }

    async fn close(mut self) {
        let Self { ended, keep, .. } = self;
        assert!(ended, "it was never live: {}", self.when);
        // A third import finds no work left.
        assert_eq!(self.a.start_import(keep).await.unwrap().unwrap().imported, 0, "{}", self.when);
        self.delete_if_live().await;
        let Self { a, b, records, watching, when, .. } = self;
        for (serial, record) in (1..).zip(&records[1..]) {
            assert_eq!(loaded(&watching, record).await, Some((serial, true)), "{when}");
        }
        let stored = watching.collection().clone_with_type::<Document>();
        assert_eq!(documents(&stored).await, 2, "{when}");
        assert_eq!(documents(&a.old).await, if keep { 3 } else { 2 }, "{when}");
        for store in [&a.store, &b.store, &watching] {
            store.shutdown().await;
        }
    }
}

async fn two_overlap(one: Step, other: Step, keep: bool) {
    let when = format!("one held at {one:?}, the other at {other:?}, kept: {keep}");
    let mut scene = Scene::set(keep, when).await;
    let first = scene.a.import_until(keep, one).await;
    scene.delete_if_live().await;
    let second = scene.b.import_until(keep, other).await;
    scene.delete_if_live().await;
    first.finish().await;
    scene.delete_if_live().await;
    second.finish().await;
    scene.delete_if_live().await;
    scene.close().await;
}

/// The slow import stores its page after the end, while another import reads the old document's
/// mark.
async fn a_slow_one_between_two(step: Step) {
    let mut scene = Scene::set(true, format!("one held at its read and at {step:?}")).await;
    let mut read = scene.a.proxy.hold("find");
    let slow = scene.a.start_import(true);
    read.reached().await;
    scene.b.start_import(true).await.unwrap().unwrap();
    scene.delete_if_live().await;
    let holds = scene.a.hold(step);
    read.deliver();
    let slow = holds.reached_by(slow).await;
    scene.b.start_import(true).await.unwrap().unwrap();
    scene.delete_if_live().await;
    slow.finish().await;
    scene.delete_if_live().await;
    scene.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn session_deleted_between_two_imports_stays_deleted() {
    let others = |keep| STEPS.into_iter().map(move |other| (keep, other));
    let pairs = [false, true].into_iter().flat_map(others);
    let all =
        pairs.flat_map(|(keep, other)| STEPS.map(|one| Box::pin(two_overlap(one, other, keep))));
    stream::iter(all).for_each_concurrent(8, |pair| pair).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn no_import_activates_what_a_slow_import_stores_after_a_delete() {
    for (command, nth) in STEPS.into_iter().skip(1) {
        // The first read has ended by then.
        a_slow_one_between_two((command, nth - usize::from(command == "find"))).await;
    }
}
