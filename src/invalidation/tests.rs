//! The listener over a source whose results a test decides, in paused time.

mod log;

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use metrics_util::debugging::{DebugValue, DebuggingRecorder, Snapshotter};

use crate::availability::Availability;
use crate::cache::{CacheConfig, Coherence, EvictionPolicy, Lookup};
use crate::error::{Error, ErrorKind};
use crate::invalidation::source::{PrimaryTime, Refusal, ServerTime, SourceCall, StreamCall};
use crate::invalidation::tests::log::Log;
use crate::invalidation::*;
use crate::session::id::SessionKey;
use crate::session::{Data, Session};
use crate::telemetry::metrics::{MongoMetrics, Retry, Series};
use crate::time::WallTime;

#[test]
fn the_poll_interval_renews_a_lease_several_times_before_it_expires() {
    assert_eq!(poll_interval(Duration::from_secs(5)), Duration::from_millis(500));
    assert_eq!(poll_interval(Duration::from_secs(1)), Duration::from_millis(100));
    assert_eq!(poll_interval(Duration::ZERO), Duration::from_millis(10));
    assert_eq!(poll_interval(Duration::MAX), Duration::from_millis(500));
}

/// What becomes of a call.
enum Reply {
    Success,
    Failure(Fault),
    /// No reply, ever.
    Silence,
}

/// Decides about the call with this number.
type Script = Box<dyn Fn(u32) -> Reply + Send + Sync>;

fn always(reply: fn() -> Reply) -> Script {
    Box::new(move |_| reply())
}

/// One failure, in the call with this number.
fn fail_once(number: u32, fault: fn() -> Fault) -> Script {
    Box::new(move |n| if n == number { Reply::Failure(fault()) } else { Reply::Success })
}

/// The reply of Amazon `DocumentDB` if change streams are not enabled.
fn refused() -> Fault {
    Fault::Refused(Refusal {
        code: Some(136),
        name: "CappedPositionLost".to_owned(),
        hint: Some("Amazon DocumentDB answers so until they are enabled with modifyChangeStreams"),
    })
}

/// How often each call was made.
#[derive(Default)]
struct Calls {
    opened: AtomicU32,
    resumed: AtomicU32,
    batches: AtomicU32,
    checkpoints: AtomicU32,
}

/// A source whose replies a test decides, by the number of the call. An empty batch comes every
/// [`POLL_INTERVAL`].
struct FakeSource {
    opens: Script,
    resumes: Script,
    batches: Script,
    checkpoints: Script,
    /// Whether the stream keeps up with the primary.
    keeps_up: bool,
    start: tokio::time::Instant,
    calls: Arc<Calls>,
}

impl FakeSource {
    fn new() -> Self {
        let succeed = || always(|| Reply::Success);
        Self {
            opens: succeed(),
            resumes: succeed(),
            batches: succeed(),
            checkpoints: succeed(),
            keeps_up: true,
            start: tokio::time::Instant::now(),
            calls: Arc::default(),
        }
    }

    fn time(&self) -> ServerTime {
        ServerTime(u64::try_from(self.start.elapsed().as_millis()).unwrap() + 1)
    }

    fn call<T: Send + 'static>(reply: Reply, after: Duration, success: T) -> SourceCall<T> {
        Box::pin(async move {
            sleep(after).await;
            match reply {
                Reply::Success => Ok(success),
                Reply::Failure(fault) => Err(fault),
                Reply::Silence => std::future::pending().await,
            }
        })
    }

    fn batch(&self) -> Batch<()> {
        let reached = self.keeps_up.then(|| self.time());
        Batch { changes: vec![], ended: false, position: Some(()), reached, complete_on: None }
    }
}

fn count(calls: &AtomicU32) -> u32 {
    calls.fetch_add(1, Ordering::SeqCst)
}

impl ChangeSource for FakeSource {
    type Stream = ();
    type Position = ();

    fn open(&self, after: Option<()>) -> StreamCall<(), ()> {
        let reply = match after {
            None => (self.opens)(count(&self.calls.opened)),
            Some(()) => (self.resumes)(count(&self.calls.resumed)),
        };
        Self::call(reply, Duration::ZERO, ((), self.batch()))
    }

    fn next_batch(&self, (): ()) -> StreamCall<(), ()> {
        let reply = (self.batches)(count(&self.calls.batches));
        Self::call(reply, POLL_INTERVAL, ((), self.batch()))
    }

    fn primary_time(&self) -> SourceCall<PrimaryTime> {
        let reply = (self.checkpoints)(count(&self.calls.checkpoints));
        let answer = PrimaryTime { time: self.time(), visible_on: None };
        Self::call(reply, Duration::ZERO, answer)
    }
}

const EMPTIED: &str = "session_store_cache_invalidations_total";

const BOUND: Duration = Duration::from_secs(5);
const POLL_INTERVAL: Duration = Duration::from_millis(500);
const TIMEOUT: Duration = Duration::from_secs(5);
const HOUR: Duration = Duration::from_secs(3_600);

/// A cache and the listener that keeps it true, over a [`FakeSource`].
struct Instance {
    cache: Cache,
    clock: Clock,
    calls: Arc<Calls>,
    meters: Snapshotter,
    tasks: Tasks,
    /// What `build` waits for.
    opened_once: oneshot::Receiver<Outcome<()>>,
}

impl Instance {
    fn start(source: FakeSource) -> Self {
        let recorder = DebuggingRecorder::new();
        let clock = Clock::tokio();
        let retries = metrics::with_local_recorder(&recorder, || {
            let mongo = MongoMetrics::new(Series::default());
            mongo.retries(Retry::Stream).clone()
        });
        let metrics = metrics::with_local_recorder(&recorder, || {
            StreamMetrics::new(&Series::default(), retries, clock.clone())
        });
        let limits = CacheConfig {
            max_bytes: 1 << 20,
            max_entries: None,
            max_absent_ids: 10,
            policy: EvictionPolicy::Lru,
            max_staleness: BOUND,
            coherence: Coherence::ChangeStream,
            outage_grace: HOUR,
            compact: false,
        };
        let cache = metrics::with_local_recorder(&recorder, || {
            let availability = Availability::new(clock.clone());
            Cache::new(&limits, clock.clone(), availability, &Series::default())
        });
        let runtime = tokio::runtime::Handle::current();
        let tasks = Tasks::new(runtime, TIMEOUT, cache.availability().clone());
        let calls = Arc::clone(&source.calls);
        let listener = InvalidationListener {
            source,
            cache: cache.clone(),
            clock: clock.clone(),
            poll_interval: POLL_INTERVAL,
            timeout: TIMEOUT,
            metrics,
            rng: fastrand::Rng::with_seed(1),
        };
        let opened_once = listener.start(&tasks, tasks.closed().child_token());
        Self { cache, clock, calls, meters: recorder.snapshotter(), tasks, opened_once }
    }

    /// The age of the newest moment up to which the cache has every change.
    fn lag(&self) -> Duration {
        self.clock.now().since(self.cache.synced_through())
    }

    /// The value that a metric has gained since the last call.
    fn value(&self, name: &str) -> f64 {
        let all = self.meters.snapshot().into_vec();
        let values = all.into_iter().filter(|(key, ..)| key.key().name() == name);
        let values = values.map(|(_, _, _, value)| match value {
            #[allow(clippy::cast_precision_loss, reason = "tests count little")]
            DebugValue::Counter(count) => count as f64,
            DebugValue::Gauge(value) => value.into_inner(),
            DebugValue::Histogram(values) => values.into_iter().map(f64::from).sum(),
        });
        values.sum()
    }

    /// Reports that a call of the store has ended.
    fn end_call(&self, result: &Outcome<()>) {
        let availability = self.cache.availability();
        availability.observe_call(availability.now(), result);
    }

    fn opened(&self) -> u32 {
        self.calls.opened.load(Ordering::SeqCst)
    }

    fn resumed(&self) -> u32 {
        self.calls.resumed.load(Ordering::SeqCst)
    }

    fn cache_session(&self, key: SessionKey) {
        let expires = WallTime::from_millis(self.clock.wall().millis() + 86_400_000);
        self.cache.begin(key).publish(Session::new(Data::new(), expires));
    }
}

#[tokio::test(start_paused = true)]
async fn a_position_that_is_not_reached_in_time_is_given_up() {
    let instance = Instance::start(FakeSource {
        batches: fail_once(20, || Fault::Passing),
        // The server needs longer than the timeout to walk through its history.
        resumes: always(|| Reply::Silence),
        ..FakeSource::new()
    });
    sleep(10 * TIMEOUT).await;
    assert_eq!((instance.opened(), instance.resumed()), (2, 3));
    assert!(instance.lag() < BOUND);
}

#[tokio::test(start_paused = true)]
async fn a_client_that_was_shut_down_ends_the_listener_with_one_warning() {
    Log::start();
    let shut_down_at = 20;
    let instance = Instance::start(FakeSource {
        batches: Box::new(move |n| match n {
            n if n < shut_down_at => Reply::Success,
            _ => Reply::Failure(Fault::Closed),
        }),
        opens: Box::new(|n| if n == 0 { Reply::Success } else { Reply::Failure(Fault::Closed) }),
        resumes: always(|| Reply::Failure(Fault::Closed)),
        ..FakeSource::new()
    });
    sleep(HOUR).await;
    let calls = || {
        let calls = &instance.calls;
        let all = [&calls.opened, &calls.resumed, &calls.batches, &calls.checkpoints];
        all.map(|calls| calls.load(Ordering::SeqCst))
    };
    let before = calls();
    assert_eq!(before[0] + before[1], 1, "not opened again");
    sleep(HOUR).await;
    assert_eq!(calls(), before, "nothing else is sent");
    assert!(instance.value("session_store_mongo_retries_total") < 0.5);
    instance.tasks.shutdown().await;
    let warned = ["WARN", "has shut down the MongoDB client"].map(Log::count);
    assert_eq!(warned, [1, 1]);
}

#[tokio::test(start_paused = true)]
async fn a_silent_server_does_not_cost_the_position() {
    let start = tokio::time::Instant::now();
    let script = move || -> Script {
        Box::new(move |_| {
            let stalled = (10..100).contains(&start.elapsed().as_secs());
            if stalled { Reply::Silence } else { Reply::Success }
        })
    };
    let stalled = FakeSource {
        resumes: script(),
        batches: script(),
        checkpoints: script(),
        ..FakeSource::new()
    };
    let instance = Instance::start(stalled);
    sleep(Duration::from_secs(120)).await;
    assert!(instance.resumed() > 3, "{}", instance.resumed());
    assert_eq!(instance.opened(), 1);
    assert!(instance.lag() < BOUND);
}

#[tokio::test(start_paused = true)]
async fn only_refusals_in_a_row_cost_the_position() {
    let no = |n: u32| if n.is_multiple_of(2) { Fault::Passing } else { refused() };
    let instance = Instance::start(FakeSource {
        batches: fail_once(20, || Fault::Passing),
        resumes: Box::new(move |n| if n < 9 { Reply::Failure(no(n)) } else { Reply::Success }),
        ..FakeSource::new()
    });
    sleep(HOUR).await;
    assert_eq!((instance.opened(), instance.resumed()), (1, 10), "never three refusals in a row");
}

#[tokio::test(start_paused = true)]
async fn only_the_first_refusal_is_logged() {
    Log::start();
    let instance = Instance::start(FakeSource {
        batches: fail_once(20, || Fault::Passing),
        resumes: always(|| Reply::Failure(refused())),
        ..FakeSource::new()
    });
    sleep(HOUR).await;
    assert_eq!((instance.opened(), instance.resumed()), (2, 3));
    assert_eq!(Log::count("refused the change stream"), 1);
}

#[tokio::test(start_paused = true)]
async fn a_lost_stream_is_logged_once_and_so_is_its_recovery() {
    for (failures, lost) in [(6, 0), (7, 1), (500, 1)] {
        Log::start();
        let instance = Instance::start(FakeSource {
            batches: fail_once(20, || Fault::Passing),
            resumes: Box::new(move |n| {
                if n < failures { Reply::Failure(Fault::Passing) } else { Reply::Success }
            }),
            ..FakeSource::new()
        });
        sleep(HOUR).await;
        assert_eq!(instance.resumed(), failures + 1);
        let logged = ["change stream lost", "recovered", "WARN"].map(Log::count);
        assert_eq!(logged, [lost, lost, 2 * lost], "after {failures} failures and the first");
    }
}

#[tokio::test(start_paused = true)]
async fn the_lag_is_reported_while_no_stream_is_open() {
    let unsupported = || Reply::Failure(Fault::Unsupported("not here"));
    for no in [|| Reply::Silence, || Reply::Failure(Fault::Passing), unsupported] {
        let instance = Instance::start(FakeSource {
            batches: fail_once(20, || Fault::Passing),
            resumes: always(no),
            opens: Box::new(move |n| if n == 0 { Reply::Success } else { no() }),
            ..FakeSource::new()
        });
        sleep(Duration::from_secs(100)).await;
        let lag = instance.lag().as_secs_f64();
        let reported = instance.value("session_store_stream_lag_seconds");
        assert!(lag > 80.0, "{lag}");
        assert!((reported - lag).abs() < 1.0, "{reported} is reported, and the lag is {lag}");
    }
}

#[tokio::test(start_paused = true)]
async fn an_outage_ends_with_a_primarys_answer_and_not_with_a_batch_of_the_stream() {
    let no = || Reply::Failure(Fault::Passing);
    for (checkpoints, ends) in [(always(no), false), (always(|| Reply::Success), true)] {
        let instance =
            Instance::start(FakeSource { checkpoints, keeps_up: false, ..FakeSource::new() });
        sleep(POLL_INTERVAL).await;
        let key = SessionKey::of(1);
        instance.cache_session(key);
        sleep(2 * BOUND).await;
        instance.end_call(&Err(Error::new(ErrorKind::Connection, "no primary")));
        assert!(matches!(instance.cache.get(key), Lookup::Grace(_)));
        sleep(2 * POLL_INTERVAL).await;
        let found = instance.cache.get(key);
        assert_eq!(matches!(found, Lookup::Expired), ends, "{found:?}");
        assert_eq!(matches!(found, Lookup::Grace(_)), !ends, "{found:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_stream_that_confirms_no_checkpoint_is_resumed() {
    let instance = Instance::start(FakeSource { keeps_up: false, ..FakeSource::new() });
    sleep(Duration::from_secs(25)).await;
    assert_eq!(instance.resumed(), 0, "an idle cluster may be more than ten seconds late");
    sleep(Duration::from_secs(10)).await;
    assert_eq!((instance.opened(), instance.resumed()), (1, 1));
}

#[tokio::test(start_paused = true)]
async fn a_checkpoint_that_is_not_answered_does_not_cost_the_lease() {
    let instance = Instance::start(FakeSource {
        checkpoints: Box::new(|n| if n == 20 { Reply::Silence } else { Reply::Success }),
        ..FakeSource::new()
    });
    sleep(4 * POLL_INTERVAL).await;
    for _ in 0..1_000 {
        sleep(Duration::from_millis(20)).await;
        assert!(instance.lag() < BOUND, "{:?}", instance.lag());
    }
    assert!(instance.calls.checkpoints.load(Ordering::SeqCst) > 20);
}

#[tokio::test(start_paused = true)]
async fn without_change_streams_the_cache_keeps_its_entries_and_one_warning_is_logged() {
    Log::start();
    let instance = Instance::start(FakeSource {
        opens: always(|| Reply::Failure(Fault::Unsupported("not here"))),
        ..FakeSource::new()
    });
    sleep(Duration::from_secs(59)).await;
    let key = SessionKey::of(1);
    instance.cache_session(key);
    sleep(Duration::from_secs(2)).await;
    assert_eq!(instance.opened(), 2);
    assert!(matches!(instance.cache.get(key), Lookup::Hit(_)));
    assert!(instance.value(EMPTIED).abs() < 0.5);
    sleep(HOUR).await;
    assert_eq!((Log::count("WARN"), Log::count("cannot follow changes")), (1, 1));
}

#[tokio::test(start_paused = true)]
async fn a_stream_that_is_no_longer_supported_empties_the_cache_once() {
    let instance = Instance::start(FakeSource {
        batches: Box::new(|n| {
            if n == 20 { Reply::Failure(Fault::Unsupported("any more")) } else { Reply::Success }
        }),
        opens: Box::new(|n| {
            if n == 0 { Reply::Success } else { Reply::Failure(Fault::Unsupported("any more")) }
        }),
        ..FakeSource::new()
    });
    sleep(POLL_INTERVAL).await;
    let key = SessionKey::of(1);
    instance.cache_session(key);
    sleep(30 * POLL_INTERVAL).await;
    assert!(matches!(instance.cache.get(key), Lookup::Miss));
    sleep(Duration::from_secs(200)).await;
    let gaps = instance.value(EMPTIED);
    assert!(instance.opened() > 2 && (gaps - 1.0).abs() < 0.5, "{gaps}");
}

#[tokio::test(start_paused = true)]
async fn a_panic_is_logged_and_resets_the_gauge_of_open_streams() {
    Log::start();
    let instance = Instance::start(FakeSource {
        batches: Box::new(|n| if n == 20 { panic!("on purpose") } else { Reply::Success }),
        ..FakeSource::new()
    });
    sleep(60 * POLL_INTERVAL).await;
    assert!(instance.value("session_store_stream_open").abs() < 0.5);
    assert_eq!(Log::count("ended the invalidation listener"), 1);
    assert!(instance.lag() > BOUND, "the staleness bound holds without the listener");
    instance.tasks.shutdown().await;
}

#[tokio::test(start_paused = true)]
async fn an_overloaded_server_costs_neither_the_position_nor_an_entry() {
    Log::start();
    let instance = Instance::start(FakeSource {
        batches: fail_once(20, || Fault::Overloaded),
        resumes: Box::new(
            |n| if n < 50 { Reply::Failure(Fault::Overloaded) } else { Reply::Success },
        ),
        ..FakeSource::new()
    });
    sleep(POLL_INTERVAL).await;
    let key = SessionKey::of(1);
    instance.cache_session(key);
    sleep(HOUR).await;
    assert_eq!((instance.opened(), instance.resumed()), (1, 51));
    assert!(instance.value(EMPTIED).abs() < 0.5);
    assert!(matches!(instance.cache.get(key), Lookup::Hit(_)), "its lease was renewed");
    assert_eq!(Log::count("has a gap"), 0);
}

#[tokio::test(start_paused = true)]
async fn attempts_to_open_a_stream_on_an_overloaded_server_back_off() {
    let instance = Instance::start(FakeSource {
        opens: always(|| Reply::Failure(Fault::Overloaded)),
        ..FakeSource::new()
    });
    sleep(Duration::from_secs(600)).await;
    let opened = instance.opened();
    assert!((300..700).contains(&opened), "{opened} attempts in 600 s");
}

#[tokio::test(start_paused = true)]
async fn checkpoints_back_off_on_an_overloaded_server() {
    let instance = Instance::start(FakeSource {
        checkpoints: always(|| Reply::Failure(Fault::Overloaded)),
        ..FakeSource::new()
    });
    sleep(Duration::from_secs(600)).await;
    let asked = instance.calls.checkpoints.load(Ordering::SeqCst);
    assert!((300..700).contains(&asked), "{asked} in 600 s");
}

#[tokio::test(start_paused = true)]
async fn an_overload_between_refusals_does_not_end_their_row() {
    let answer = |n: u32| if n.is_multiple_of(2) { refused() } else { Fault::Overloaded };
    let instance = Instance::start(FakeSource {
        batches: fail_once(20, || Fault::Passing),
        resumes: Box::new(move |n| Reply::Failure(answer(n))),
        ..FakeSource::new()
    });
    sleep(HOUR).await;
    assert_eq!((instance.opened(), instance.resumed()), (2, 5));
}

#[tokio::test(start_paused = true)]
async fn a_server_that_keeps_refusing_new_streams_has_none() {
    Log::start();
    let start = tokio::time::Instant::now();
    let mut instance = Instance::start(FakeSource {
        opens: always(|| Reply::Failure(refused())),
        ..FakeSource::new()
    });
    timeout(HOUR, &mut instance.opened_once).await.unwrap().unwrap().unwrap();
    assert!(start.elapsed() < Duration::from_millis(100), "build waits for {:?}", start.elapsed());
    let key = SessionKey::of(1);
    instance.cache_session(key);
    sleep(Duration::from_secs(59)).await;
    assert_eq!(instance.opened(), 3);
    sleep(Duration::from_secs(2)).await;
    assert_eq!(instance.opened(), 4);
    assert!(instance.value(EMPTIED).abs() < 0.5, "no stream was open, so nothing is lost");
    sleep(HOUR).await;
    assert!((60..70).contains(&instance.opened()), "{}", instance.opened());
    let why = "error 136 (CappedPositionLost)";
    assert_eq!(
        [why, "cannot follow changes", "modifyChangeStreams", "WARN"].map(Log::count),
        [1; 4]
    );
}

#[tokio::test(start_paused = true)]
async fn two_refusals_before_the_first_stream_are_not_logged() {
    Log::start();
    let instance = Instance::start(FakeSource {
        opens: Box::new(|n| if n < 2 { Reply::Failure(refused()) } else { Reply::Success }),
        ..FakeSource::new()
    });
    sleep(Duration::from_secs(10)).await;
    assert!(instance.opened() == 3 && instance.lag() < BOUND);
    assert_eq!(Log::count("WARN"), 0);
}

#[tokio::test(start_paused = true)]
async fn change_streams_that_are_enabled_later_are_used() {
    Log::start();
    let instance = Instance::start(FakeSource {
        opens: Box::new(|n| if n < 5 { Reply::Failure(refused()) } else { Reply::Success }),
        ..FakeSource::new()
    });
    sleep(Duration::from_secs(200)).await;
    assert!(instance.opened() == 6 && instance.lag() < BOUND);
    assert_eq!(["cannot follow changes", "recovered", "WARN"].map(Log::count), [1, 1, 2]);
}

#[tokio::test(start_paused = true)]
async fn a_server_whose_streams_open_and_deliver_nothing_has_none() {
    Log::start();
    let no = || always(|| Reply::Failure(refused()));
    let mut instance =
        Instance::start(FakeSource { batches: no(), resumes: no(), ..FakeSource::new() });
    sleep(HOUR).await;
    timeout(HOUR, &mut instance.opened_once).await.unwrap().unwrap().unwrap();
    assert!((55..70).contains(&instance.opened()), "{}", instance.opened());
    let logged =
        ["refused the change stream", "has a gap", "stream lost", "cannot follow changes", "WARN"];
    assert_eq!(logged.map(Log::count), [1, 2, 1, 1, 5], "however long it lasts");
}

#[tokio::test(start_paused = true)]
async fn a_position_that_the_server_is_too_slow_to_reach_is_given_up() {
    let instance = Instance::start(FakeSource {
        batches: fail_once(20, || Fault::Passing),
        resumes: always(|| Reply::Failure(Fault::TooSlow)),
        ..FakeSource::new()
    });
    sleep(HOUR).await;
    assert_eq!((instance.opened(), instance.resumed()), (2, 3));
    assert!(instance.lag() < BOUND);
}

#[tokio::test(start_paused = true)]
async fn an_overload_does_not_end_with_an_answer_to_hello() {
    let instance = Instance::start(FakeSource { keeps_up: false, ..FakeSource::new() });
    sleep(POLL_INTERVAL).await;
    let key = SessionKey::of(1);
    instance.cache_session(key);
    sleep(2 * BOUND).await;
    instance.end_call(&Err(Error::server_overloaded("error 462", true)));
    sleep(10 * POLL_INTERVAL).await;
    assert!(instance.calls.checkpoints.load(Ordering::SeqCst) > 20);
    assert!(matches!(instance.cache.get(key), Lookup::Grace(_)));
    instance.end_call(&Ok(()));
    assert!(matches!(instance.cache.get(key), Lookup::Expired));
}
