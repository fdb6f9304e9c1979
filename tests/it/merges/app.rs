//! Two instances of an app, and requests to them whose steps a test puts into any order.

use std::sync::Arc;

use futures::future::BoxFuture;
use mongodb::bson::spec::BinarySubtype;
use mongodb::bson::{Binary, Document, doc};
use serde_json::{Value, json};
use tokio::sync::{mpsc, oneshot};
use tower_sessions::session::{self, Id, Record};
use tower_sessions::{Session, SessionStore};
use tower_sessions_moka_mongodb_store::{
    MongoStore, MongoStoreBuilder, SessionKey, in_request_scope, mongodb,
};

use crate::common::{Meters, PATIENCE, eventually, record, uri};
use crate::metrics::assert_count;
use crate::owner::Owned;

/// The options of the stores of an [`App`].
pub(super) type Options = fn(MongoStoreBuilder) -> MongoStoreBuilder;

/// Two instances of an app. They share nothing but the database, and count into the same metrics.
pub(super) struct App<S> {
    pub(super) one: S,
    pub(super) two: S,
    /// What the database has.
    pub(super) database: MongoStore,
    pub(super) meters: Meters,
}

impl<S: Owned> App<S> {
    pub(super) async fn start(options: Options) -> Self {
        let uri = uri();
        Self::start_on([&uri, &uri], options, async |mongo| S::over(mongo).await).await
    }

    /// An app whose first instance has a connection of its own to the database, such as a proxy.
    pub(super) async fn start_on(
        uris: [&str; 2],
        options: impl Fn(MongoStoreBuilder) -> MongoStoreBuilder,
        over: impl AsyncFn(MongoStore) -> S,
    ) -> Self {
        let build = async |uri: &str| {
            let builder = MongoStore::builder().uri(uri).operation_timeout(PATIENCE);
            options(builder).build().await.unwrap()
        };
        let (meters, guard) = Meters::install();
        let one = over(build(uris[0]).await).await;
        let two = over(build(uris[1]).await).await;
        drop(guard);
        Self { one, two, database: build(uris[1]).await, meters }
    }

    /// Stores a session with this data.
    pub(super) async fn stored(&self, data: Value) -> Id {
        let mut record = record();
        record.data = serde_json::from_value(data).unwrap();
        self.one.create(&mut record).await.unwrap();
        record.id
    }

    /// Begins requests that have loaded this session: all on one instance, or on two by turns.
    pub(super) async fn visits<const N: usize>(&self, id: Id, on: Instances) -> [Visit; N] {
        let mut visits = Vec::new();
        for nth in 0..N {
            let store = if nth % 2 == 1 && on == Instances::Two { &self.two } else { &self.one };
            visits.push(Visit::load(store, id).await);
        }
        visits.try_into().ok().unwrap()
    }

    pub(super) async fn record(&self, id: Id) -> Record {
        self.database.load(&id).await.unwrap().expect("a session")
    }

    /// Asserts that the database has this data, and that both instances serve it.
    #[track_caller]
    pub(super) fn assert_data(&self, id: Id, data: &Value) -> impl Future<Output = ()> {
        let caller = std::panic::Location::caller();
        async move {
            assert_eq!(json!(self.record(id).await.data), *data, "{caller}");
            for store in [&self.one, &self.two] {
                eventually(&format!("an instance serves it, {caller}"), async || {
                    json!(store.load(&id).await.unwrap().unwrap().data) == *data
                })
                .await;
            }
        }
    }

    /// Asserts that there is no session of this id, nor a fragment of one.
    pub(super) async fn assert_gone(&self, id: Id) {
        assert_eq!(self.document(id).await, None);
        for store in [&self.one, &self.two] {
            let gone = async || store.load(&id).await.unwrap().is_none();
            eventually("an instance knows that it is gone", gone).await;
        }
    }

    pub(super) async fn document(&self, id: Id) -> Option<Document> {
        let documents = self.database.collection().clone_with_type::<Document>();
        documents.find_one(by_id(id)).await.unwrap()
    }

    #[track_caller]
    pub(super) fn assert_conflicts(&self, count: u32) {
        assert_count(&self.meters, "session_store_merge_conflicts_total", count);
    }

    #[track_caller]
    pub(super) fn assert_merges(&self, result: &str, count: u32) {
        let name = format!("session_store_merges_total{{result={result}}}");
        assert_count(&self.meters, &name, count);
    }

    #[track_caller]
    pub(super) fn assert_dropped(&self, count: u32) {
        assert_count(&self.meters, "session_store_saves_dropped_total", count);
    }
}

/// The filter for the document of a session.
pub(super) fn by_id(id: Id) -> Document {
    let bytes = SessionKey::from(id).as_bytes().to_vec();
    doc! { "_id": Binary { subtype: BinarySubtype::Generic, bytes } }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Instances {
    One,
    Two,
}

impl Instances {
    pub(super) const BOTH: [Self; 2] = [Self::One, Self::Two];
}

type Step = BoxFuture<'static, ()>;
pub(super) type Saved = Result<(), session::Error>;

/// A request, as the layers see it: a scope with the `Session` of a handler in it. Each method is a step of
/// the handler.
pub(super) struct Visit {
    session: Session,
    steps: mpsc::UnboundedSender<Step>,
}

impl Visit {
    /// Begins a request, and loads its session.
    pub(super) async fn load<S: SessionStore + Clone>(store: &S, id: Id) -> Self {
        let visit = Self::begin(store, Some(id));
        visit.get("any").await;
        assert_eq!(visit.id(), Some(id), "there is no such session");
        visit
    }

    pub(super) fn begin<S: SessionStore + Clone>(store: &S, id: Option<Id>) -> Self {
        let (steps, mut next) = mpsc::unbounded_channel::<Step>();
        tokio::spawn(in_request_scope(async move {
            while let Some(step) = next.recv().await {
                step.await;
            }
        }));
        Self { session: Session::new(id, Arc::new(store.clone()), None), steps }
    }

    /// Runs a step in the scope of the request.
    pub(super) async fn run<T, F>(&self, step: impl FnOnce(Session) -> F) -> T
    where
        T: Send + 'static,
        F: Future<Output = T> + Send + 'static,
    {
        let (report, reported) = oneshot::channel();
        let step = step(self.session.clone());
        let step = Box::pin(async move { _ = report.send(step.await) });
        self.steps.send(step).expect("an earlier step panicked");
        reported.await.expect("the step panicked")
    }

    pub(super) fn id(&self) -> Option<Id> {
        self.session.id()
    }

    pub(super) async fn get(&self, key: &'static str) -> Option<Value> {
        self.run(|session| async move { session.get_value(key).await.unwrap() }).await
    }

    pub(super) async fn set(&self, key: &'static str, value: impl Into<Value>) {
        let value = value.into();
        self.run(|session| async move { session.insert_value(key, value).await.map(drop) })
            .await
            .unwrap();
    }

    pub(super) async fn remove(&self, key: &'static str) {
        self.run(|session| async move { session.remove_value(key).await.map(drop) }).await.unwrap();
    }

    pub(super) async fn clear(&self) {
        self.run(|session| async move { session.clear().await }).await;
    }

    pub(super) async fn cycle_id(&self) {
        self.run(|session| async move { session.cycle_id().await }).await.unwrap();
    }

    pub(super) async fn flush(&self) {
        self.run(|session| async move { session.flush().await }).await.unwrap();
    }

    pub(super) async fn try_save(&self) -> Saved {
        self.run(|session| async move { session.save().await }).await
    }

    /// What a handler may do at any time, and the layer does after the request, if it always saves.
    pub(super) async fn save(&self) {
        self.try_save().await.unwrap();
    }

    /// A handler that sets one key, and the save after it.
    pub(super) async fn save_with(&self, key: &'static str, value: impl Into<Value>) {
        self.set(key, value).await;
        self.save().await;
    }

    /// Begins the save after the request, and does not wait for it.
    pub(super) fn begin_save(&self) -> oneshot::Receiver<Saved> {
        let (report, reported) = oneshot::channel();
        let session = self.session.clone();
        let step = Box::pin(async move { _ = report.send(session.save().await) });
        self.steps.send(step).expect("an earlier step panicked");
        reported
    }
}

/// Adds up what all requests have counted, in the keys that begin with `n`.
pub(super) fn counting(
    key: &str,
    base: Option<&Value>,
    theirs: Option<&Value>,
    ours: Option<&Value>,
) -> Option<Value> {
    let number = |value: Option<&Value>| value.and_then(Value::as_i64).unwrap_or(0);
    if key.starts_with('n') {
        return Some(json!(number(theirs) + number(ours) - number(base)));
    }
    ours.cloned()
}

/// Runs the same tests on both of our stores: `name_of_the_test = function;`.
macro_rules! on_two_instances_of_both_tiers {
    ($($name:ident = $test:ident;)*) => {
        mod uncached {
            $(#[tokio::test] async fn $name() {
                super::$test::<tower_sessions_moka_mongodb_store::MongoStore>().await;
            })*
        }
        mod cached {
            $(#[tokio::test] async fn $name() {
                super::$test::<tower_sessions_moka_mongodb_store::CachedMongoStore>().await;
            })*
        }
    };
}
pub(super) use on_two_instances_of_both_tiers;
