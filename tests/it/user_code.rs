//! Functions of the app that the store calls, and that panic.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use futures::TryStreamExt;
use serde_json::{Value, json};
use tower_sessions::SessionStore;
use tower_sessions::session::Record;
use tower_sessions::session_store::Error as TraitError;
use tower_sessions_moka_mongodb_store::{CachedMongoStore, MongoStore};

use crate::common::{FOREVER, create, record, uri};

const SAID: &str = "the `owner` function panicked";

/// A bug of the app.
fn owner_that_panics(data: &HashMap<String, Value>) -> Option<i64> {
    assert!(!data.contains_key("bug"), "on purpose");
    data.get("user")?.as_i64()
}

fn with(key: &str, value: i64) -> Record {
    let mut record = record();
    record.data.insert(key.to_owned(), json!(value));
    record
}

fn said(error: TraitError) -> String {
    match error {
        TraitError::Backend(said) | TraitError::Encode(said) => said,
        TraitError::Decode(said) => panic!("{said}"),
    }
}

async fn store(uri: &str) -> (MongoStore, CachedMongoStore) {
    let mongo = MongoStore::builder().uri(uri).owner(owner_that_panics).build().await.unwrap();
    let cached = CachedMongoStore::builder(mongo.clone()).max_staleness(FOREVER);
    (mongo, cached.build().await.unwrap())
}

#[tokio::test]
async fn panic_in_the_owner_function_is_an_error_of_that_call_only() {
    let (mongo, cached) = store(&uri()).await;
    let error = mongo.create(&mut with("bug", 1)).await.unwrap_err();
    assert!(said(error).contains(SAID));
    let error = cached.create(&mut with("bug", 1)).await.unwrap_err();
    assert!(said(error).contains(SAID));
    assert_eq!(mongo.length().await.unwrap(), 0);
    let mut kept = with("user", 7);
    cached.create(&mut kept).await.unwrap();
    let mut broken = kept.clone();
    broken.data.insert("bug".to_owned(), json!(1));
    assert!(said(cached.save(&broken).await.unwrap_err()).contains(SAID));
    assert!(said(mongo.save(&broken).await.unwrap_err()).contains(SAID));
    // The cache serves what was stored, and the next save works.
    assert_eq!(cached.load(&kept.id).await.unwrap().unwrap().data, kept.data);
    kept.data.insert("more".to_owned(), json!(true));
    cached.save(&kept).await.unwrap();
    assert_eq!(mongo.load(&kept.id).await.unwrap().unwrap().data, kept.data);
}

#[tokio::test]
async fn panic_in_the_owner_function_skips_only_that_session() {
    let uri = uri();
    let plain = MongoStore::connect(&uri).await.unwrap();
    for nth in 0..200 {
        let mut record = if nth % 50 == 25 { with("bug", nth) } else { with("user", 7) };
        plain.create(&mut record).await.unwrap();
    }
    let (mongo, cached) = store(&uri).await;
    for outcome in [mongo.assign_owners().await, cached.assign_owners().await] {
        let error = outcome.unwrap_err().to_string();
        assert!(error.contains(SAID) && error.contains("of 4 sessions"), "{error}");
        assert!(!error.contains("shut down"), "{error}");
    }
    let owned: Vec<_> = mongo.find_by_owner(7).try_collect().await.unwrap();
    assert_eq!(owned.len(), 196);
}

#[cfg(feature = "import")]
mod import {
    use mongodb::bson::{Binary, DateTime, Document, doc, spec::BinarySubtype};
    use tower_sessions::session::Id;
    use tower_sessions_moka_mongodb_store::{import::tower_sessions_mongodb_store, mongodb};

    use super::*;

    /// A session as the old store keeps it.
    fn old(data: serde_json::Value) -> Document {
        let id = Id::default();
        let expires = DateTime::from_millis(DateTime::now().timestamp_millis() + 3_600_000);
        let bytes = rmp_serde::to_vec(&(id.0, data, 0_u8)).unwrap();
        let data = Binary { subtype: BinarySubtype::Generic, bytes };
        doc! { "_id": id.to_string(), "data": data, "expireAt": expires }
    }

    #[tokio::test]
    async fn panic_of_the_app_during_an_import_is_an_error_and_loses_nothing() {
        let uri = uri();
        let (mongo, _) = store(&uri).await;
        let sessions = mongo.collection();
        let database = sessions.client().database(&sessions.namespace().db);
        let old_sessions = database.collection::<Document>("old");
        let all = (0..600).map(|nth| match nth % 300 {
            7 => old(json!({ "bug": nth })),
            _ => old(json!({ "user": 7 })),
        });
        old_sessions.insert_many(all).await.unwrap();
        let import = || tower_sessions_mongodb_store(&old_sessions).into_store(&mongo);
        let error = import().on_progress(|_| panic!("on purpose")).run().await.unwrap_err();
        assert!(error.to_string().contains("on_progress"), "{error}");
        assert!(!error.to_string().contains("shut down"), "{error}");
        let progress = import().run().await.unwrap();
        assert_eq!(progress.unreadable, 2, "{progress:?}");
        let reason = progress.reasons.keys().next().unwrap();
        assert!(reason.contains("panicked"), "{progress:?}");
        assert_eq!(mongo.length().await.unwrap(), 598);
        assert_eq!(old_sessions.count_documents(doc! {}).await.unwrap(), 2);
    }
}

/// A recorder whose every handle panics while the flag is set.
#[derive(Clone, Default)]
struct Breaks(Arc<AtomicBool>);

impl Breaks {
    fn now(&self) {
        assert!(!self.0.load(Ordering::SeqCst), "on purpose");
    }
}

mod recorder {
    use metrics::{
        Counter, CounterFn, Gauge, GaugeFn, Histogram, HistogramFn, Key, KeyName, Metadata,
        Recorder, SharedString, Unit,
    };

    use super::{Arc, Breaks};

    impl CounterFn for Breaks {
        fn increment(&self, _: u64) {
            self.now();
        }

        fn absolute(&self, _: u64) {
            self.now();
        }
    }

    impl GaugeFn for Breaks {
        fn increment(&self, _: f64) {
            self.now();
        }

        fn decrement(&self, _: f64) {
            self.now();
        }

        fn set(&self, _: f64) {
            self.now();
        }
    }

    impl HistogramFn for Breaks {
        fn record(&self, _: f64) {
            self.now();
        }
    }

    impl Recorder for Breaks {
        fn describe_counter(&self, _: KeyName, _: Option<Unit>, _: SharedString) {
            self.now();
        }

        fn describe_gauge(&self, _: KeyName, _: Option<Unit>, _: SharedString) {
            self.now();
        }

        fn describe_histogram(&self, _: KeyName, _: Option<Unit>, _: SharedString) {
            self.now();
        }

        fn register_counter(&self, _: &Key, _: &Metadata<'_>) -> Counter {
            self.now();
            Counter::from_arc(Arc::new(self.clone()))
        }

        fn register_gauge(&self, _: &Key, _: &Metadata<'_>) -> Gauge {
            self.now();
            Gauge::from_arc(Arc::new(self.clone()))
        }

        fn register_histogram(&self, _: &Key, _: &Metadata<'_>) -> Histogram {
            self.now();
            Histogram::from_arc(Arc::new(self.clone()))
        }
    }
}

#[tokio::test]
async fn panicking_metrics_recorder_loses_only_its_metrics() {
    for from_the_start in [true, false] {
        let breaks = Breaks::default();
        breaks.0.store(from_the_start, Ordering::SeqCst);
        let leaked: &'static Breaks = Box::leak(Box::new(breaks.clone()));
        let guard = metrics::set_default_local_recorder(leaked);
        let (mongo, cached) = store(&uri()).await;
        drop(guard);
        breaks.0.store(true, Ordering::SeqCst);
        let kept = create(&cached).await;
        for _ in 0..3 {
            assert_eq!(cached.load(&kept.id).await.unwrap().unwrap().data, kept.data);
            assert_eq!(mongo.load(&kept.id).await.unwrap().unwrap().data, kept.data);
        }
        assert!(cached.load(&record().id).await.unwrap().is_none());
        let mut changed = kept.clone();
        changed.data.insert("more".to_owned(), json!(1));
        cached.save(&changed).await.unwrap();
        assert_eq!(cached.load(&kept.id).await.unwrap().unwrap().data, changed.data);
        // The change stream continues as well.
        mongo.delete(&kept.id).await.unwrap();
        crate::common::eventually("another instance's delete is reported", async || {
            cached.load(&kept.id).await.unwrap().is_none()
        })
        .await;
        assert_eq!(cached.warm(10).await.unwrap().sessions, 0);
        assert_eq!(cached.clear().await.unwrap(), 0);
        assert!(cached.health().is_serving());
        cached.shutdown().await;
    }
}
