//! The spans of verbs and commands, and the warnings that an operator must see.

mod captured;

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use session_test_server::{TestServer, fresh_database};
use tower_sessions::SessionStore;
use tower_sessions::session::Id as SessionId;
use tower_sessions::session_store::ExpiredDeletion;
use tower_sessions_moka_mongodb_store::mongodb::bson::doc;
use tower_sessions_moka_mongodb_store::{
    CachedMongoStore, Coherence, ErrorKind, MongoStore, SessionHandle, in_request_scope,
};
use tracing::span::{Attributes, Id};
use tracing::{Event, Level, Metadata, Subscriber};
use tracing_subscriber::layer::{Context, Layer, SubscriberExt};

use crate::common::{Store, cache_of, create, eventually, mongo, on_both_tiers, uri};
use crate::proxy::Proxy;

use captured::{Captured, OURS};

const DROPPED: &str = "a save was dropped";
const BEGINS: &str = "an outage begins";
const ENDS: &str = "the outage has ended";
const INDEX: &str = "expired sessions may stay";

on_both_tiers! {
    each_verb_has_a_span_and_its_command_one_below_it = verbs;
    save_of_a_deleted_session_warns_in_its_span = dropped;
    merged_save_has_its_commands_below_one_span = merged;
}

async fn verbs(store: impl Store + ExpiredDeletion) {
    let namespace = store.collection().namespace();
    let mut record = crate::common::record();
    let id = record.id;
    macro_rules! has_spans {
        ($call:expr, $verb:literal, $commands:expr) => {
            let captured = Captured::during(async { _ = $call.await.unwrap() }).await;
            captured.assert_verb($verb, &$commands, &namespace);
        };
    }
    has_spans!(store.create(&mut record), "create", ["insert"]);
    has_spans!(store.save(&record), "save", ["update"]);
    has_spans!(store.contains(id), "contains", ["find"]);
    has_spans!(store.load(&SessionId::default()), "load", ["find"]);
    has_spans!(store.length(), "length", ["aggregate"]);
    has_spans!(store.estimated_length(), "estimated_length", ["count"]);
    has_spans!(store.delete(&record.id), "delete", ["delete"]);
    create(&store).await;
    has_spans!(store.clear(), "clear", ["find", "delete", "find"]);
    has_spans!(store.delete_expired(), "delete_expired", ["find", "delete"]);
    let another = store.another().await;
    has_spans!(another.ensure_indexes(), "ensure_indexes", ["listIndexes"]);
}

/// The verbs that both tiers have under the same names, and that no trait defines.
macro_rules! of_owners {
    ($store:expr) => {
        let store = $store;
        let namespace = store.collection().namespace();
        macro_rules! has_spans {
            ($call:expr, $verb:literal, $commands:expr) => {
                let captured = Captured::during(async { _ = $call.await.unwrap() }).await;
                captured.assert_verb($verb, &$commands, &namespace);
            };
        }
        let of_seven = || async {
            let mut record = crate::common::record();
            record.data.insert("user_id".to_owned(), 7.into());
            store.create(&mut record).await.unwrap();
            SessionHandle::of(record.id)
        };
        let here = of_seven().await;
        has_spans!(store.assign_owners(), "assign_owners", ["find"]);
        has_spans!(store.delete_by_owner_except(7, here), "delete_by_owner_except", ["find"]);
        has_spans!(store.revoke(here), "revoke", ["findAndModify"]);
        has_spans!(store.revoke_owned(7, here), "revoke_owned", ["findAndModify"]);
        of_seven().await;
        has_spans!(store.delete_by_owner(7), "delete_by_owner", ["find", "delete", "find"]);
        of_seven().await;
        let filter = doc! { "owner": "7" };
        has_spans!(store.delete_where(filter), "delete_where", ["find", "delete", "find"]);
        // A call that is refused before anything is sent is still a failure of the verb.
        let captured =
            Captured::during(async { drop(store.delete_where(doc! {}).await.unwrap_err()) });
        let captured = captured.await;
        assert_eq!(
            captured.span("session_store.delete_where").unwrap().fields["error.type"],
            "config"
        );
    };
}

async fn of_owners() -> MongoStore {
    let builder = MongoStore::builder().uri(uri()).owner(|data| data.get("user_id")?.as_i64());
    builder.build().await.unwrap()
}

#[tokio::test]
async fn each_verb_of_owners_has_a_span_uncached() {
    of_owners!(of_owners().await);
}

#[tokio::test]
async fn each_verb_of_owners_has_a_span_cached() {
    of_owners!(cache_of(&of_owners().await).await);
}

#[tokio::test]
async fn warm_up_and_events_have_spans() {
    let mongo = mongo().await;
    create(&mongo).await;
    let store = cache_of(&mongo).await;
    let namespace = mongo.collection().namespace();
    let captured = Captured::during(async { _ = store.warm(10).await.unwrap() }).await;
    captured.assert_verb("warm", &["aggregate", "find"], &namespace);
    let captured = Captured::during(async { drop(store.events().await.unwrap()) }).await;
    captured.assert_verb("events", &[], &namespace);
}

#[cfg(feature = "import")]
#[tokio::test]
async fn an_import_has_a_span() {
    use tower_sessions_moka_mongodb_store::import;

    let mongo = mongo().await;
    let old = mongo.collection().client().database(&fresh_database()).collection::<()>("old");
    let run = import::tower_sessions_mongodb_store(&old).into_store(&mongo).run();
    let captured = Captured::during(async { _ = run.await.unwrap() }).await;
    // The documents that expired during the import are removed.
    captured.assert_verb("import", &["delete"], &mongo.collection().namespace());
}

async fn dropped(store: impl Store) {
    let record = create(&store).await;
    let captured = Captured::during(async { store.save(&record).await.unwrap() }).await;
    assert_eq!(captured.warnings(DROPPED), 0);
    store.delete(&record.id).await.unwrap();
    let captured = Captured::during(async { store.save(&record).await.unwrap() }).await;
    assert_eq!((captured.warnings(DROPPED), captured.events.len()), (1, 1));
    let within = captured.events[0].span;
    assert_eq!(captured.span("session_store.save").map(|span| span.id), within);
}

#[tokio::test]
async fn hit_has_a_span_without_children() {
    let store = cache_of(&mongo().await).await;
    let record = create(&store).await;
    let captured = Captured::during(async { drop(store.load(&record.id).await.unwrap()) }).await;
    let names: Vec<_> = captured.spans.iter().map(|span| span.name).collect();
    assert_eq!(names, ["session_store.load"]);
}

async fn merged(store: impl Store) {
    let record = create(&store).await;
    let changed = |key: &str| {
        let mut record = record.clone();
        record.data.insert(key.to_owned(), 1.into());
        record
    };
    // Another instance, so that the cache of this one has an older state.
    let another = store.another().await;
    let captured = Captured::during(in_request_scope(async {
        store.load(&record.id).await.unwrap();
        in_request_scope(async {
            another.load(&record.id).await.unwrap();
            another.save(&changed("b")).await.unwrap();
        })
        .await;
        store.save(&changed("a")).await.unwrap();
    }))
    .await;
    let spans = &captured.spans;
    let saves: Vec<_> = spans.iter().filter(|span| span.name == "session_store.save").collect();
    assert_eq!(saves.len(), 2);
    let below = spans.iter().filter(|span| span.parent == Some(saves[1].id));
    let commands: Vec<_> = below.map(|span| &*span.fields["db.operation.name"]).collect();
    assert_eq!(commands, ["update", "find", "update"]);
    let is_merged = |text: &str| text.contains("the save is merged");
    let merged: Vec<_> = captured.events.iter().filter(|event| is_merged(&event.text)).collect();
    assert_eq!(merged.len(), 1);
    assert_eq!((merged[0].level, merged[0].span), (Level::DEBUG, Some(saves[1].id)));
    assert_eq!(captured.warnings(DROPPED), 0);
}

/// Counts the events at the level info or above.
struct Loud<'a>(&'a AtomicUsize);

impl<S: Subscriber> Layer<S> for Loud<'static> {
    fn enabled(&self, metadata: &Metadata<'_>, _: Context<'_, S>) -> bool {
        *metadata.level() <= Level::INFO && metadata.target().starts_with(OURS)
    }

    fn on_new_span(&self, _: &Attributes<'_>, _: &Id, _: Context<'_, S>) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }

    fn on_event(&self, _: &Event<'_>, _: Context<'_, S>) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

#[tokio::test]
async fn verbs_log_nothing_at_info() {
    static SEEN: AtomicUsize = AtomicUsize::new(0);
    let store = cache_of(&mongo().await).await;
    let loud = tracing_subscriber::registry().with(Loud(&SEEN));
    let _guard = tracing::subscriber::set_default(loud);
    let record = create(&store).await;
    store.save(&record).await.unwrap();
    store.load(&record.id).await.unwrap();
    store.clear().await.unwrap();
    assert_eq!(store.load(&record.id).await.unwrap(), None);
    store.delete(&record.id).await.unwrap();
    store.length().await.unwrap();
    assert_eq!(SEEN.load(Ordering::Relaxed), 0);
    // The recorder above would see this save.
    store.save(&record).await.unwrap();
    assert_eq!(SEEN.load(Ordering::Relaxed), 1, "a dropped save");
}

#[tokio::test]
async fn failure_is_recorded_in_the_spans_of_command_and_verb() {
    let store = mongo().await;
    let record = create(&store).await;
    let newer = doc! { "$set": { "format": 2 } };
    store.collection().update_many(doc! {}, newer).await.unwrap();
    let captured =
        Captured::during(async { drop(store.load(&record.id).await.unwrap_err()) }).await;
    for name in ["session_store.load", "mongodb"] {
        let span = captured.span(name).unwrap();
        assert_eq!(span.fields["error.type"], "decode", "{span:?}");
        assert_eq!(span.fields["otel.status_code"], "ERROR", "{span:?}");
        assert!(!span.fields.contains_key("db.response.status_code"), "{span:?}");
    }

    let unique = doc! { "createIndexes": "sessions", "indexes": [
    { "key": { "format": 1 }, "name": "one", "unique": true }] };
    let sessions = store.collection();
    sessions.client().database(&sessions.namespace().db).run_command(unique).await.unwrap();
    store.clear().await.unwrap();
    create(&store).await;
    let mut record = crate::common::record();
    let captured =
        Captured::during(async { drop(store.create(&mut record).await.unwrap_err()) }).await;
    assert_eq!(captured.span("session_store.create").unwrap().fields["error.type"], "server");
    let draws: Vec<_> = captured.spans.iter().filter(|span| span.name == "mongodb").collect();
    assert_eq!(draws.len(), 8);
    for draw in draws {
        assert_eq!(draw.fields["error.type"], "11000", "{draw:?}");
        assert_eq!(draw.fields["db.response.status_code"], "11000", "{draw:?}");
    }
}

#[tokio::test]
async fn span_of_a_batched_save_has_the_size_of_its_batch() {
    let proxy = Proxy::start().await;
    let mongo =
        MongoStore::builder().uri(proxy.uri()).max_commands_in_flight(1).build().await.unwrap();
    let records = [create(&mongo).await, create(&mongo).await, create(&mongo).await];
    let mut held = proxy.hold("update");
    let captured = Captured::during(async {
        let first = mongo.save(&records[0]);
        let others = futures::future::join(mongo.save(&records[1]), mongo.save(&records[2]));
        let mut all = Box::pin(futures::future::join(first, others));
        assert!(futures::poll!(&mut all).is_pending());
        held.reached().await;
        // A queued call waits only briefly, so the other saves may have been sent by now.
        held.deliver();
        let (first, (second, third)) = all.await;
        first.and(second).and(third).unwrap();
    })
    .await;
    let commands = captured.spans.iter().filter(|span| span.name == "mongodb");
    let sizes: Vec<_> = commands
        .map(|it| {
            (it.fields.get("db.operation.batch.size").map(|size| &**size), it.parent.is_none())
        })
        .collect();
    assert_eq!(sizes, [(None, false), (Some("2"), true)], "{:?}", captured.spans);
}

#[tokio::test]
async fn wrong_ttl_index_is_warned_of() {
    let uri = uri();
    let plain = MongoStore::builder().uri(&uri).create_indexes(false).build().await.unwrap();
    let indexes = plain.collection();
    let database = plain.collection().namespace().db;
    let captured = Captured::during(async { plain.ensure_indexes().await.unwrap() }).await;
    assert_eq!(captured.warnings(INDEX), 0);
    let other = doc! { "collMod": indexes.name(), "index": {
    "name": "expires_1", "expireAfterSeconds": 60 } };
    indexes.client().database(&database).run_command(other).await.unwrap();
    let captured = Captured::during(async {
        let error = MongoStore::connect(&uri).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Index);
    })
    .await;
    assert_eq!(captured.warnings(INDEX), 1);
    assert!(
        captured.events[0].text.contains("collMod"),
        "it says what to do: {:?}",
        captured.events
    );
}

#[tokio::test]
async fn outage_is_logged_once_at_its_begin_and_once_at_its_end() {
    let mut server = TestServer::builder().fast(true).start().unwrap();
    let mongo = MongoStore::connect(server.uri_for(&fresh_database())).await.unwrap();
    // Another store on the same client, whose calls have a shorter timeout.
    let short = Duration::from_millis(300);
    let client = mongo.collection().client().clone();
    let mongo = MongoStore::builder().client(client).database(mongo.collection().namespace().db);
    let mongo = mongo.operation_timeout(short).create_indexes(false);
    let mut built = mongo.clone().build().await;
    while built.is_err() {
        built = mongo.clone().build().await;
    }
    let store =
        CachedMongoStore::builder(built.unwrap()).coherence(Coherence::TimeBound).build().await;
    let store = store.unwrap();
    let record = create(&store).await;
    let mut too_deep = record.clone();
    let deep = (0..200).fold(serde_json::json!(1), |inner, _| serde_json::json!([inner]));
    too_deep.data.insert("deep".to_owned(), deep);

    let captured = Captured::during(async {
        store.save(&too_deep).await.unwrap_err();
        server.pause().unwrap();
        store.length().await.unwrap_err();
        store.save(&record).await.unwrap_err();
        store.save(&too_deep).await.unwrap_err();
        store.delete(&record.id).await.unwrap_err();
    })
    .await;
    assert_eq!(
        (captured.warnings(BEGINS), captured.warnings(ENDS)),
        (1, 0),
        "{:?}",
        captured.events
    );
    let captured = Captured::during(async {
        server.resume().unwrap();
        eventually("the store recovers", async || store.length().await.is_ok()).await;
        store.load(&record.id).await.unwrap();
    })
    .await;
    assert_eq!(
        (captured.warnings(BEGINS), captured.warnings(ENDS)),
        (0, 1),
        "{:?}",
        captured.events
    );
}
