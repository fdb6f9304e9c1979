//! Calls that are polled outside of a runtime with a timer, or outside of any runtime, while the
//! store's runtime runs on other threads.

use std::future::Future;
use std::pin::Pin;
use std::sync::mpsc;

use futures::{StreamExt, TryStreamExt};
use mongodb::bson::doc;
use tokio::runtime::{Builder, Runtime};
use tower_sessions::session_store::ExpiredDeletion;
use tower_sessions::{SessionStore, session::Record};
use tower_sessions_moka_mongodb_store::{
    CachedMongoStore, Coherence, ErrorKind, MongoStore, SessionHandle, mongodb,
};

use crate::common::{PATIENCE, Store, create, record, uri};

/// A thread that polls a future with less than the store's own runtime offers.
#[derive(Clone, Copy, Debug)]
enum PollingThread {
    /// A thread without a runtime.
    PlainThread,
    /// A runtime with neither a timer nor I/O.
    BareRuntime,
}

const POLLING_THREADS: [PollingThread; 2] =
    [PollingThread::PlainThread, PollingThread::BareRuntime];

impl PollingThread {
    /// Polls `call` on a new thread of this kind. Fails if the call panics or takes too long.
    fn poll<T: Send + 'static>(
        self,
        what: &'static str,
        call: impl Future<Output = T> + Send + 'static,
    ) -> T {
        let (done, is_done) = mpsc::channel();
        std::thread::spawn(move || {
            let output = match self {
                Self::PlainThread => futures::executor::block_on(call),
                Self::BareRuntime => Builder::new_current_thread().build().unwrap().block_on(call),
            };
            done.send(output).ok();
        });
        is_done.recv_timeout(PATIENCE).unwrap_or_else(|error| panic!("{what} {self:?}: {error}"))
    }
}

fn runtime() -> Runtime {
    Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap()
}

async fn owned(uri: &str) -> MongoStore {
    let builder = MongoStore::builder().uri(uri).owner(|data| data.get("user")?.as_i64());
    builder.build().await.unwrap()
}

type Calls<S> = Vec<(&'static str, fn(S, Record) -> Pin<Box<dyn Future<Output = ()> + Send>>)>;

macro_rules! calls {
    ($store:ident, $record:ident: $($name:literal => $call:expr;)*) => {
        vec![$(($name, |$store, $record| {
            Box::pin(async move {
                let _ = &$record;
                let _ = $call;
            })
        })),*]
    };
}

/// The calls that both stores have.
macro_rules! calls_of_both {
    () => {
        calls! { store, record:
            "create" => create(&store).await;
            "save" => store.save(&record).await.unwrap();
            "load" => store.load(&record.id).await.unwrap().unwrap();
            "load of an absent id" => store.load(&self::record().id).await.unwrap();
            "contains" => assert!(store.contains(record.id).await.unwrap());
            "length" => store.length().await.unwrap();
            "estimated_length" => store.estimated_length().await.unwrap();
            "ensure_indexes" => store.ensure_indexes().await.unwrap();
            "all" => store.all().try_collect::<Vec<_>>().await.unwrap();
            "find" => store.find(doc! { "owner": "7" }).try_collect::<Vec<_>>().await.unwrap();
            "find_by_owner" => store.find_by_owner(7).try_collect::<Vec<_>>().await.unwrap();
            "assign_owners" => store.assign_owners().await.unwrap();
            "delete_by_owner_except" => store.delete_by_owner_except(7, record.id).await.unwrap();
            "delete_by_owner" => store.delete_by_owner(7).await.unwrap();
            "delete_where" => store.delete_where(doc! { "owner": "7" }).await.unwrap();
            "revoke_owned" => store.revoke_owned(7, SessionHandle::of(record.id)).await.unwrap();
            "revoke" => store.revoke(SessionHandle::of(record.id)).await.unwrap();
            "delete" => store.delete(&record.id).await.unwrap();
            "delete_expired" => store.delete_expired().await.unwrap();
            "health" => assert!(store.health().is_serving());
            "clear" => store.clear().await.unwrap();
            "shutdown" => store.shutdown().await;
        }
    };
}

fn calls_of_a_cached_store() -> Calls<CachedMongoStore> {
    let mut calls: Calls<CachedMongoStore> = calls! { store, record:
        "events" => {
            let mut events = store.events().await.unwrap();
            create(&store).await;
            events.next().await.unwrap()
        };
        "warm" => store.warm(10).await.unwrap();
    };
    let of_both: Calls<CachedMongoStore> = calls_of_both!();
    calls.extend(of_both);
    calls
}

fn calls_of_an_uncached_store() -> Calls<MongoStore> {
    let mut calls: Calls<MongoStore> = calls! { store, record:
        "build a cached store" => {
            let cached = CachedMongoStore::builder(store).build().await.unwrap();
            cached.load(&record.id).await.unwrap().unwrap()
        };
    };
    #[cfg(feature = "encryption")]
    {
        let encrypted: Calls<MongoStore> = calls! { store, record:
            "reencrypt" => store.reencrypt().finish().await.unwrap_err();
        };
        calls.extend(encrypted);
    }
    #[cfg(feature = "import")]
    {
        let import: Calls<MongoStore> = calls! { store, record:
            "import" => {
                let old = store.collection().client().database("old").collection::<()>("none");
                let import = tower_sessions_moka_mongodb_store::import::tower_sessions_mongodb_store;
                import(&old).into_store(&store).run().await.unwrap()
            };
        };
        calls.extend(import);
    }
    let of_both: Calls<MongoStore> = calls_of_both!();
    calls.extend(of_both);
    calls
}

fn all_work<S: Store + Send + 'static>(
    store: &S,
    own: &Runtime,
    thread: PollingThread,
    calls: Calls<S>,
) {
    for (what, call) in calls {
        let mut record = record();
        record.data.insert("user".to_owned(), 7.into());
        own.block_on(store.create(&mut record)).unwrap();
        thread.poll(what, call(store.clone(), record));
    }
}

#[test]
fn every_call_of_a_cached_store_works_without_a_timer() {
    for thread in POLLING_THREADS {
        let own = runtime();
        let uri = uri();
        let store = own.block_on(async {
            CachedMongoStore::builder(owned(&uri).await).build().await.unwrap()
        });
        all_work(&store, &own, thread, calls_of_a_cached_store());
    }
}

#[test]
fn every_call_of_an_uncached_store_works_without_a_timer() {
    for thread in POLLING_THREADS {
        let own = runtime();
        let uri = uri();
        let store = own.block_on(owned(&uri));
        all_work(&store, &own, thread, calls_of_an_uncached_store());
    }
}

/// The calls that wait longest: `outage_grace`, a timeout of its own, and a server that does not
/// answer.
#[test]
fn unanswered_call_ends_at_its_deadline_without_a_timer() {
    use std::time::Duration;

    let mongo = |uri: &str| {
        MongoStore::builder().uri(uri).operation_timeout(Duration::from_millis(500)).build()
    };
    for thread in POLLING_THREADS {
        let own = runtime();
        let (proxy, store) = own.block_on(async {
            let proxy = crate::proxy::Proxy::start().await;
            let mongo = mongo(proxy.uri()).await.unwrap();
            let cached = CachedMongoStore::builder(mongo).coherence(Coherence::SoleWriter);
            (proxy, cached.build().await.unwrap())
        });
        let held = proxy.hold("aggregate");
        let asks = store.clone();
        let outcome = thread.poll("events", async move { asks.events().await.map(drop) });
        assert_eq!(outcome.unwrap_err().kind(), ErrorKind::Timeout, "{thread:?}");
        drop(held);
        let held = proxy.hold("find");
        let asks = store.clone();
        thread.poll("load", async move { asks.load(&record().id).await }).unwrap_err();
        drop(held);
        let other = own.block_on(mongo(proxy.uri())).unwrap();
        let held = proxy.hold("aggregate");
        thread.poll("build", CachedMongoStore::builder(other).build()).unwrap();
        drop(held);
        thread.poll("shutdown", async move { store.shutdown().await });
    }
}

#[test]
fn build_on_a_client_whose_runtime_is_gone_is_an_error_and_no_hang() {
    for thread in POLLING_THREADS {
        for coherence in [Coherence::ChangeStream, Coherence::TimeBound] {
            let own = runtime();
            let uri = uri();
            let mongo = own.block_on(owned(&uri));
            drop(own);
            let build = CachedMongoStore::builder(mongo.clone()).coherence(coherence).build();
            let error = thread.poll("build", build).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Closed, "{error}");
            thread.poll("shutdown", async move { mongo.shutdown().await });
        }
    }
}

#[test]
fn build_without_a_timer_says_what_to_do() {
    for thread in POLLING_THREADS {
        let error = thread.poll("connect", MongoStore::connect(uri())).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Config, "{error}");
        let error = thread.poll("connect", CachedMongoStore::connect(uri())).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Config, "{error}");
        assert!(error.to_string().contains("tokio"), "{error}");
    }
}

/// The build begins in a runtime. Then another thread polls it without a runtime. Everything in it
/// that needs a runtime stays in the first one.
#[test]
fn build_continues_on_a_thread_without_runtime() {
    let own = runtime();
    let mut build = Box::pin(MongoStore::connect(uri()));
    own.block_on(async { assert!(futures::poll!(&mut build).is_pending()) });
    PollingThread::PlainThread.poll("connect", build).unwrap();
}

#[test]
fn events_on_a_runtime_that_is_gone_are_an_error_and_no_hang() {
    let gone = Runtime::new().unwrap();
    let store = gone.block_on(crate::common::cached());
    drop(gone);
    let (done, is_done) = mpsc::channel();
    std::thread::spawn(move || {
        let here = Builder::new_multi_thread().enable_all().build().unwrap();
        let _ = done.send(here.block_on(store.events()).is_err());
    });
    assert_eq!(is_done.recv_timeout(PATIENCE), Ok(true));
}
