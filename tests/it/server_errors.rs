//! What the stores do with each error of the server: see the table in `src/mongo/server_errors.rs`.
//!
//! A proxy answers in the server's place, with the code and the labels that MongoDB sends.

use std::time::{Duration, Instant};

use futures::future::join_all;
use serde_json::json;
use tower_sessions::SessionStore;
use tower_sessions::session::Record;
use tower_sessions_moka_mongodb_store::{
    CachedMongoStore, CachedMongoStoreBuilder, Coherence, ErrorKind, MongoStore, StreamHealth,
};

use crate::common::{Commands, FOREVER, Log, Meters, PATIENCE, create, eventually};
use crate::proxy::{HeldReply, Proxy};

const OVERLOADED: &str = "SystemOverloadedError";
/// The label of an overload alone, and together with the label that says that nothing was carried
/// out.
const LABELS: [&[&str]; 2] = [&[OVERLOADED, "RetryableError"], &[OVERLOADED]];
const RATE_LIMIT: (i32, &str) = (462, "IngressRequestRateLimitExceeded");
const SHORT: Duration = Duration::from_millis(200);

const EMPTIED: &str = "session_store_cache_invalidations_total{cause=gap}";
const UNKNOWN_OUTCOME: &str = "session_store_cache_invalidations_total{cause=unknown_outcome}";
const RESUMES: &str = "session_store_stream_resumes_total";
const OPEN: &str = "session_store_stream_open";
const GRACE: &str = "session_store_loads_total{result=grace}";

struct World {
    proxy: Proxy,
    commands: Commands,
    meters: Meters,
    mongo: MongoStore,
    store: CachedMongoStore,
}

/// A store behind a proxy. It sends one command at a time.
async fn world(with: impl FnOnce(CachedMongoStoreBuilder) -> CachedMongoStoreBuilder) -> World {
    let proxy = Proxy::start().await;
    let commands = Commands::default();
    let (meters, _guard) = Meters::install();
    let client = commands.client(proxy.uri()).await;
    let mongo = MongoStore::builder().client(client).max_commands_in_flight(1);
    let mongo = mongo.operation_timeout(PATIENCE).build().await.unwrap();
    let builder = CachedMongoStore::builder(mongo.clone()).max_staleness(FOREVER);
    let store = with(builder).build().await.unwrap();
    World { proxy, commands, meters, mongo, store }
}

impl World {
    fn never(&self, metric: &str) {
        let count = self.meters.value(metric);
        assert!(count.abs() < 0.5, "{metric} is {count}");
    }

    /// Asserts that the cache returns this session, without a command.
    async fn assert_cached(&self, record: &Record) {
        let finds = self.commands.sent("find");
        let loaded = self.store.load(&record.id).await.unwrap().unwrap();
        assert_eq!((&loaded.data, self.commands.sent("find")), (&record.data, finds));
    }
}

fn changed(record: &Record) -> Record {
    let mut record = record.clone();
    record.data.insert("changed".to_owned(), json!(crate::common::serial()));
    record
}

fn save(
    store: &(impl SessionStore + Clone),
    record: Record,
) -> tokio::task::JoinHandle<Result<(), String>> {
    let store = store.clone();
    tokio::spawn(async move { store.save(&record).await.map_err(|error| error.to_string()) })
}

async fn held(proxy: &Proxy, command: &'static str) -> HeldReply {
    let mut held = proxy.hold(command);
    held.reached().await;
    held
}

#[tokio::test]
async fn overloaded_stream_resumes_from_its_token_and_empties_nothing() {
    // The worlds are built one after the other, since each has the recorder of the thread meanwhile.
    let mut worlds = Vec::new();
    for labels in LABELS {
        worlds.push((world(|builder| builder).await, labels));
    }
    join_all(worlds.iter().map(async |(world, labels)| {
        let record = create(&world.store).await;
        let past_it = MongoStore::connect(world.proxy.direct()).await.unwrap();
        let (code, name) = RATE_LIMIT;
        // Wait until more than three attempts were refused, not counting the driver's retries.
        let refusing = ["getMore", "aggregate"];
        let refusing = refusing.map(|command| world.proxy.refuse_all(command, code, name, labels));
        eventually("the stream is refused", async || refusing[1].times() > 12).await;
        let other = create(&past_it).await;
        world.assert_cached(&record).await;
        drop(refusing);
        eventually("the stream resumes", async || world.meters.value(RESUMES) > 0.5).await;
        world.assert_cached(&record).await;
        world.never(EMPTIED);
        // The stream reports changes again.
        assert!(world.store.load(&other.id).await.unwrap().is_some());
        past_it.delete(&other.id).await.unwrap();
        eventually("the log-out is reported", async || {
            world.store.load(&other.id).await.unwrap().is_none()
        })
        .await;
    }))
    .await;
}

#[tokio::test]
async fn build_on_an_overloaded_server_keeps_its_change_stream() {
    let proxy = Proxy::start().await;
    let mongo = MongoStore::builder().uri(proxy.uri()).operation_timeout(SHORT);
    let mongo = loop {
        match mongo.clone().build().await {
            Ok(mongo) => break mongo,
            // On a busy machine, the first connection may take longer than the short timeout.
            Err(error) => assert_eq!(error.kind(), ErrorKind::Timeout, "{error}"),
        }
    };
    let log = Log::default();
    let _logs = tracing::subscriber::set_default(log.subscriber());
    let refusing = proxy.refuse_all("aggregate", RATE_LIMIT.0, RATE_LIMIT.1, LABELS[0]);
    let (meters, guard) = Meters::install();
    let _store = CachedMongoStore::builder(mongo).build().await.unwrap();
    drop(guard);
    eventually("it is retried", async || refusing.times() > 12).await;
    drop(refusing);
    eventually("the stream opens", async || meters.value(OPEN) > 0.5).await;
    assert!(!log.take().contains("cannot follow changes"));
}

#[tokio::test]
async fn refused_read_past_the_lease_keeps_the_entry_for_the_grace() {
    // Overload, an election, a router that does not reach the shard, and the server's own time
    // limit.
    for (code, name, labels) in [
        (462, "IngressRequestRateLimitExceeded", LABELS[0]),
        (462, "IngressRequestRateLimitExceeded", LABELS[1]),
        (433, "AdmissionQueueOverflow", &[] as &[&str]),
        (449, "RateLimitExceeded", &[]),
        (450, "PooledConnectionAcquisitionRejected", &[]),
        (134, "ReadConcernMajorityNotAvailableYet", &[]),
        (407, "PooledConnectionAcquisitionExceededTimeLimit", &[]),
        (262, "ExceededTimeLimit", &[]),
    ] {
        let world = world(|builder| {
            builder.coherence(Coherence::TimeBound).max_staleness(SHORT).outage_grace(FOREVER)
        })
        .await;
        let record = create(&world.store).await;
        let refusing = world.proxy.refuse_all("find", code, name, labels);
        eventually("the lease has expired, and the entry is served", async || {
            let loaded = world.store.load(&record.id).await.unwrap().unwrap();
            assert_eq!(loaded.data, record.data, "{code}");
            world.meters.value(GRACE) > 0.5
        })
        .await;
        world.never(UNKNOWN_OUTCOME);
        drop(refusing);
        eventually("the grace ends", async || {
            let before = world.meters.value(GRACE);
            world.store.load(&record.id).await.unwrap();
            (world.meters.value(GRACE) - before).abs() < 0.5
        })
        .await;
    }
}

#[tokio::test]
async fn read_refused_for_another_reason_is_an_error_and_keeps_the_entry() {
    for (code, name) in [(13, "Unauthorized"), (1, "InternalError"), (175, "QueryPlanKilled")] {
        let world = world(|builder| {
            builder.coherence(Coherence::TimeBound).max_staleness(SHORT).outage_grace(FOREVER)
        })
        .await;
        let record = create(&world.store).await;
        let refusing = world.proxy.refuse_all("find", code, name, &[]);
        eventually("the lease has expired", async || world.store.load(&record.id).await.is_err())
            .await;
        world.never(UNKNOWN_OUTCOME);
        world.never(GRACE);
        drop(refusing);
        assert!(world.store.load(&record.id).await.unwrap().is_some());
    }
}

#[tokio::test]
async fn error_kind_follows_the_table() {
    let world = world(|builder| builder.coherence(Coherence::TimeBound)).await;
    let id = create(&world.store).await.id;
    for (code, labels, kind) in [
        (462, LABELS[0], ErrorKind::Overloaded),
        (999, LABELS[1], ErrorKind::Overloaded),
        (433, &[] as &[&str], ErrorKind::Overloaded),
        (134, &[], ErrorKind::Connection),
        (202, &[], ErrorKind::Connection),
        (407, &[], ErrorKind::Connection),
        (262, &[], ErrorKind::Timeout),
        (50, &[], ErrorKind::Timeout),
        (13, &[], ErrorKind::Permission),
        (1, &[], ErrorKind::Server),
    ] {
        let find = world.proxy.refuse_all("find", code, "Named", labels);
        let count = world.proxy.refuse_all("aggregate", code, "Named", labels);
        let cached = [world.store.contains(id).await.map(|_| 0), world.store.length().await];
        let plain = [world.mongo.contains(id).await.map(|_| 0), world.mongo.length().await];
        for outcome in cached.into_iter().chain(plain) {
            let error = outcome.unwrap_err();
            assert_eq!(error.kind(), kind, "{code}: {error}");
            let said = error.to_string();
            assert!(kind != ErrorKind::Overloaded || said.contains(&code.to_string()), "{said}");
        }
        drop((find, count));
    }
}

#[tokio::test]
async fn refused_build_reports_an_overload() {
    for (code, kind) in [(462, ErrorKind::Overloaded), (134, ErrorKind::Connection)] {
        let proxy = Proxy::start().await;
        let _refusing = proxy.refuse_all("listIndexes", code, "Named", &[]);
        let error = MongoStore::connect(proxy.uri()).await.unwrap_err();
        assert_eq!(error.kind(), kind, "{error}");
    }
}

#[tokio::test]
async fn refused_save_keeps_the_entry() {
    for (code, labels) in [(462, LABELS[0]), (462, LABELS[1]), (433, &[]), (999, LABELS[0])] {
        let world = world(|builder| builder).await;
        let record = create(&world.store).await;
        let refusing = world.proxy.refuse_all("update", code, "Named", labels);
        for store in [save(&world.store, changed(&record)), save(&world.mongo, changed(&record))] {
            let error = store.await.unwrap().unwrap_err();
            assert!(error.contains("overloaded") && error.contains(&code.to_string()), "{error}");
        }
        world.assert_cached(&record).await;
        world.never(UNKNOWN_OUTCOME);
        drop(refusing);
        let saved = changed(&record);
        world.store.save(&saved).await.unwrap();
        world.assert_cached(&saved).await;
    }
}

#[tokio::test]
async fn refused_batch_keeps_the_entry_of_each_save() {
    let world = world(|builder| builder).await;
    let [busy, a, b] =
        [create(&world.store).await, create(&world.store).await, create(&world.store).await];
    let mut first = world.proxy.hold("update");
    let keeps_busy = save(&world.store, changed(&busy));
    first.reached().await;
    let sent = world.commands.sent("update");
    let refusing = world.proxy.refuse_all("update", RATE_LIMIT.0, RATE_LIMIT.1, LABELS[0]);
    let saves = [save(&world.store, changed(&a)), save(&world.store, changed(&b))];
    for save in saves {
        assert!(save.await.unwrap().unwrap_err().contains("overloaded"));
    }
    let sent = world.commands.sent("update") - sent;
    assert!(sent <= 3, "one command, and the driver's repetitions of it: {sent}");
    world.assert_cached(&a).await;
    world.assert_cached(&b).await;
    drop(refusing);
    first.deliver();
    keeps_busy.await.unwrap().unwrap();
}

/// The reply to a batch says how many sessions it changed. If that is not all of them, a read finds
/// out which ones. If that read is refused, nothing is known about the saves.
#[tokio::test]
async fn batch_whose_outcome_read_is_refused_leaves_no_entry() {
    let world = world(|builder| builder.coherence(Coherence::TimeBound)).await;
    let [busy, a, gone] =
        [create(&world.store).await, create(&world.store).await, create(&world.store).await];
    let past_it = MongoStore::connect(world.proxy.direct()).await.unwrap();
    past_it.delete(&gone.id).await.unwrap();
    let mut first = world.proxy.hold("update");
    let keeps_busy = save(&world.store, changed(&busy));
    first.reached().await;
    let refusing = world.proxy.refuse_all("find", RATE_LIMIT.0, RATE_LIMIT.1, LABELS[0]);
    let after = changed(&a);
    let saves = [save(&world.store, after.clone()), save(&world.store, changed(&gone))];
    for save in saves {
        assert!(save.await.unwrap().unwrap_err().contains("overloaded"));
    }
    drop(refusing);
    assert_eq!(world.store.load(&a.id).await.unwrap().unwrap().data, after.data);
    first.deliver();
    keeps_busy.await.unwrap().unwrap();
}

#[tokio::test]
async fn save_that_an_overload_may_have_interrupted_leaves_no_entry() {
    let world = world(|builder| builder).await;
    let record = create(&world.store).await;
    let saved = changed(&record);
    let saving = save(&world.store, saved.clone());
    // The server carries out the command. The reply is an error that no table has, and that says
    // nothing about the command.
    held(&world.proxy, "update").await.refuse_with(999, "Interrupted", LABELS[1]);
    assert!(saving.await.unwrap().unwrap_err().contains("overloaded"));
    assert_eq!(world.store.load(&record.id).await.unwrap().unwrap().data, saved.data);
}

#[tokio::test]
async fn batch_during_a_server_shutdown_leaves_no_entry() {
    let world = world(|builder| builder.coherence(Coherence::TimeBound)).await;
    for code in [91, 189, 11600, 11602] {
        let [busy, a, b] =
            [create(&world.store).await, create(&world.store).await, create(&world.store).await];
        let mut first = world.proxy.hold("update");
        let keeps_busy = save(&world.store, changed(&busy));
        first.reached().await;
        let mut batch = world.proxy.hold("update");
        let after = [changed(&a), changed(&b)];
        let saves = after.clone().map(|record| save(&world.store, record));
        assert_eq!(batch.reached().await, 2, "they are sent as one batch");
        batch.refuse_with(code, "Named", &["RetryableWriteError"]);
        for save in saves {
            let error = save.await.unwrap().unwrap_err();
            assert!(error.contains(&code.to_string()), "{error}");
        }
        first.deliver();
        keeps_busy.await.unwrap().unwrap();
        // The server has carried them out all the same.
        for record in after {
            assert_eq!(world.store.load(&record.id).await.unwrap().unwrap().data, record.data);
        }
    }
    // The store without a cache also returns an error: it does not ignore the save.
    let record = create(&world.mongo).await;
    let saving = save(&world.mongo, changed(&record));
    held(&world.proxy, "update").await.refuse(91);
    // The driver has retried it if it could.
    let repeated = saving.await.unwrap();
    assert!(repeated.is_ok() || repeated.unwrap_err().contains("91"));
}

#[tokio::test]
async fn stream_broken_by_an_election_or_a_migration_resumes_without_a_gap() {
    const RESUMABLE: &[&str] = &["ResumableChangeStreamError"];

    let world = world(|builder| builder).await;
    let record = create(&world.store).await;
    let mut resumed = 0.0;
    for (code, labels) in [
        (175, RESUMABLE),
        (175, &[] as &[&str]),
        (96, &[]),
        (314, &[]),
        (134, &[]),
        (365, &[]),
        (402, &[]),
        (407, &[]),
        (43, &[]),
        (10107, RESUMABLE),
        (11600, RESUMABLE),
        // A code that no table has.
        (999, RESUMABLE),
    ] {
        held(&world.proxy, "getMore").await.refuse_with(code, "Named", labels);
        resumed += 1.0;
        let meters = &world.meters;
        eventually("it is resumed", async || meters.value(RESUMES) > resumed - 0.5).await;
        world.assert_cached(&record).await;
    }
    world.never(EMPTIED);
    for cause in ["refused", "history_lost", "collection_gone"] {
        world.never(&format!("session_store_stream_gaps_total{{cause={cause}}}"));
    }
}

#[tokio::test]
async fn too_large_change_is_one_gap() {
    let world = world(|builder| builder).await;
    let record = create(&world.store).await;
    held(&world.proxy, "getMore").await.refuse_with(10334, "BSONObjectTooLarge", &[]);
    eventually("a new stream is open", async || world.meters.value(EMPTIED) > 0.5).await;
    let gaps = world.meters.value("session_store_stream_gaps_total{cause=history_lost}");
    assert!((gaps - 1.0).abs() < 0.5, "{gaps}");
    assert!(world.store.load(&record.id).await.unwrap().is_some());
}

#[tokio::test]
async fn server_that_refuses_new_streams_has_none_and_build_does_not_wait() {
    for (code, name) in [
        (136, "CappedPositionLost"),
        (8000, "AtlasError"),
        (115, "CommandNotSupported"),
        (238, "NotImplemented"),
        (303, "Location303"),
        (304, "Location304"),
        (72, "InvalidOptions"),
        (73, "InvalidNamespace"),
        (2, "BadValue"),
        (9, "FailedToParse"),
        (40573, "Location40573"),
    ] {
        let proxy = Proxy::start().await;
        let log = Log::default();
        let _logs = tracing::subscriber::set_default(log.subscriber());
        let refusing = proxy.refuse_all("aggregate", code, name, &[]);
        let mongo = MongoStore::builder().uri(proxy.uri()).operation_timeout(PATIENCE);
        let mongo = mongo.build().await.unwrap();
        let start = Instant::now();
        let store = CachedMongoStore::builder(mongo).max_staleness(SHORT).build().await.unwrap();
        let error = store.events().await.unwrap_err();
        assert!(start.elapsed() < PATIENCE / 2, "{code}: {:?}", start.elapsed());
        assert_eq!(error.kind(), ErrorKind::Config, "{error}");
        let known = code == 40573;
        let why = if known { "has no change streams" } else { &format!("error {code} ({name})") };
        assert!(error.to_string().contains(why), "{error}");
        assert!(matches!(store.health().stream, StreamHealth::Unavailable { .. }));
        // Each session keeps its own bound.
        let record = create(&store).await;
        let past_it = MongoStore::connect(proxy.direct()).await.unwrap();
        past_it.delete(&record.id).await.unwrap();
        eventually("the bound holds", async || store.load(&record.id).await.unwrap().is_none())
            .await;
        let asked = if known { 2 } else { 6 };
        assert_eq!(refusing.times(), asked, "{code}: once more in a minute");
        let log = log.take();
        let warnings = |text: &str| {
            log.lines().filter(|line| line.contains("WARN") && line.contains(text)).count()
        };
        assert_eq!((warnings("change"), warnings("cannot follow changes")), (1, 1), "{log}");
        assert_eq!(warnings(why), 1, "{log}");
    }
}

#[tokio::test]
async fn events_that_the_server_refuses_later_return_the_reason() {
    let proxy = Proxy::start().await;
    let mongo = MongoStore::builder().uri(proxy.uri()).operation_timeout(PATIENCE);
    let store =
        CachedMongoStore::builder(mongo.build().await.unwrap()).coherence(Coherence::SoleWriter);
    let store = store.build().await.unwrap();
    let _listens = store.events().await.unwrap();
    let refusing = proxy.refuse_all("aggregate", 115, "CommandNotSupported", &[]);
    held(&proxy, "getMore").await.refuse(1);
    // The first refusal and two refused resumes give up the token. Two attempts without a token
    // follow.
    eventually("it is given up", async || refusing.times() >= 4).await;
    let start = Instant::now();
    eventually("events() returns the reason", async || match store.events().await {
        Ok(_) => false,
        Err(error) => error.to_string().contains("error 115 (CommandNotSupported)"),
    })
    .await;
    assert!(start.elapsed() < PATIENCE / 2);
}

#[tokio::test]
async fn behind_a_load_balancer_no_stream_is_opened() {
    let proxy = Proxy::start().await;
    let uri = proxy.as_load_balancer();
    let log = Log::default();
    let _logs = tracing::subscriber::set_default(log.subscriber());
    let commands = Commands::default();
    let mongo = commands.mongo(&uri).await;
    let store = CachedMongoStore::builder(mongo).max_staleness(SHORT).build().await.unwrap();
    let record = create(&store).await;
    assert_eq!(store.load(&record.id).await.unwrap().unwrap().data, record.data);
    let error = store.events().await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Config);
    assert!(error.to_string().contains("loadBalanced=true"), "{error}");
    assert_eq!((commands.sent("aggregate"), commands.sent("getMore")), (0, 0));
    let warnings = log.take().matches("cannot follow changes").count();
    assert_eq!(warnings, 1);
}
