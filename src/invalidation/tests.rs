//! The follower over a database whose answers a test decides, in paused time.

mod log;

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use metrics_util::debugging::{DebugValue, DebuggingRecorder, Snapshotter};

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
fn the_pace_keeps_a_lease_alive_several_times_over() {
    assert_eq!(poll_interval(Duration::from_secs(5)), Duration::from_millis(500));
    assert_eq!(poll_interval(Duration::from_secs(1)), Duration::from_millis(100));
    assert_eq!(poll_interval(Duration::ZERO), Duration::from_millis(10));
    assert_eq!(poll_interval(Duration::MAX), Duration::from_millis(500));
}

/// How a database takes a call.
enum Says {
    Yes,
    No(Fault),
    /// It never answers.
    Nothing,
}

type Manner = Box<dyn Fn(u32) -> Says + Send + Sync>;

fn always(says: fn() -> Says) -> Manner {
    Box::new(move |_| says())
}

/// As Amazon `DocumentDB` answers where change streams are not enabled.
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
    fences: AtomicU32,
}

/// A database whose answers a test decides, by the number of the call. An empty batch comes each
/// [`PACE`].
struct Fake {
    opens: Manner,
    resumes: Manner,
    batches: Manner,
    fences: Manner,
    /// Whether the stream keeps up with the primary.
    keeps_up: bool,
    start: tokio::time::Instant,
    calls: Arc<Calls>,
}

impl Fake {
    fn new() -> Self {
        let yes = || always(|| Says::Yes);
        Self {
            opens: yes(),
            resumes: yes(),
            batches: yes(),
            fences: yes(),
            keeps_up: true,
            start: tokio::time::Instant::now(),
            calls: Arc::default(),
        }
    }

    fn time(&self) -> ServerTime {
        ServerTime(u64::try_from(self.start.elapsed().as_millis()).unwrap() + 1)
    }

    fn answers<T: Send + 'static>(says: Says, after: Duration, answer: T) -> SourceCall<T> {
        Box::pin(async move {
            sleep(after).await;
            match says {
                Says::Yes => Ok(answer),
                Says::No(fault) => Err(fault),
                Says::Nothing => std::future::pending().await,
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

impl ChangeSource for Fake {
    type Stream = ();
    type Position = ();

    fn open(&self, after: Option<()>) -> StreamCall<(), ()> {
        let says = match after {
            None => (self.opens)(count(&self.calls.opened)),
            Some(()) => (self.resumes)(count(&self.calls.resumed)),
        };
        Self::answers(says, Duration::ZERO, ((), self.batch()))
    }

    fn next_batch(&self, (): ()) -> StreamCall<(), ()> {
        let says = (self.batches)(count(&self.calls.batches));
        Self::answers(says, PACE, ((), self.batch()))
    }

    fn primary_time(&self) -> SourceCall<PrimaryTime> {
        let says = (self.fences)(count(&self.calls.fences));
        let answer = PrimaryTime { time: self.time(), visible_on: None };
        Self::answers(says, Duration::ZERO, answer)
    }
}

const EMPTIED: &str = "session_store_cache_invalidations_total";

const BOUND: Duration = Duration::from_secs(5);
const PACE: Duration = Duration::from_millis(500);
const TIMEOUT: Duration = Duration::from_secs(5);
const HOUR: Duration = Duration::from_secs(3_600);

/// A cache that follows a [`Fake`].
struct Followed {
    cache: Cache,
    clock: Clock,
    calls: Arc<Calls>,
    meters: Snapshotter,
    tasks: Tasks,
    /// What `build` waits for.
    opened_once: oneshot::Receiver<Outcome<()>>,
}

impl Followed {
    fn start(changes: Fake) -> Self {
        let recorder = DebuggingRecorder::new();
        let clock = Clock::tokio();
        let retries = metrics::with_local_recorder(&recorder, || {
            let mongo = MongoMetrics::new(Series::default(), clock.clone());
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
            Cache::new(&limits, clock.clone(), &Series::default())
        });
        let tasks = Tasks::new(tokio::runtime::Handle::current(), TIMEOUT);
        let calls = Arc::clone(&changes.calls);
        let follower = InvalidationListener {
            source: changes,
            cache: cache.clone(),
            clock: clock.clone(),
            poll_interval: PACE,
            timeout: TIMEOUT,
            metrics,
            rng: fastrand::Rng::with_seed(1),
        };
        let opened_once = follower.start(&tasks, tasks.closed().child_token());
        Self { cache, clock, calls, meters: recorder.snapshotter(), tasks, opened_once }
    }

    /// How long ago the moment is up to which all is known.
    fn lag(&self) -> Duration {
        self.clock.now().since(self.cache.synced_through())
    }

    /// The value of a metric by its name, since the last time that any was asked for.
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

    fn opened(&self) -> u32 {
        self.calls.opened.load(Ordering::SeqCst)
    }

    fn resumed(&self) -> u32 {
        self.calls.resumed.load(Ordering::SeqCst)
    }

    fn holds(&self, key: SessionKey) {
        let expires = WallTime::from_millis(self.clock.wall().millis() + 86_400_000);
        self.cache.begin(key).publish(Session { data: Data::new(), expires });
    }
}

#[tokio::test(start_paused = true)]
async fn a_resumption_that_takes_too_long_each_time_is_given_up() {
    let followed = Followed::start(Fake {
        batches: Box::new(|n| if n == 20 { Says::No(Fault::Passing) } else { Says::Yes }),
        // The server walks through more of its history than there is patience for.
        resumes: always(|| Says::Nothing),
        ..Fake::new()
    });
    sleep(10 * TIMEOUT).await;
    assert_eq!((followed.opened(), followed.resumed()), (2, 3));
    assert!(followed.lag() < BOUND);
}

#[tokio::test(start_paused = true)]
async fn a_client_that_was_shut_down_is_asked_no_more_and_warned_of_once() {
    Log::start();
    let shut_down_at = 20;
    let followed = Followed::start(Fake {
        batches: Box::new(move |n| match n {
            n if n < shut_down_at => Says::Yes,
            _ => Says::No(Fault::Closed),
        }),
        opens: Box::new(|n| if n == 0 { Says::Yes } else { Says::No(Fault::Closed) }),
        resumes: always(|| Says::No(Fault::Closed)),
        ..Fake::new()
    });
    sleep(HOUR).await;
    let calls = || {
        let calls = &followed.calls;
        let all = [&calls.opened, &calls.resumed, &calls.batches, &calls.fences];
        all.map(|calls| calls.load(Ordering::SeqCst))
    };
    let before = calls();
    assert_eq!(before[0] + before[1], 1, "not opened again");
    sleep(HOUR).await;
    assert_eq!(calls(), before, "nor is anything else asked");
    assert!(followed.value("session_store_mongo_retries_total") < 0.5);
    followed.tasks.shutdown().await;
    let warned = ["WARN", "has shut down the MongoDB client"].map(Log::count);
    assert_eq!(warned, [1, 1]);
}

#[tokio::test(start_paused = true)]
async fn a_server_that_answers_nothing_costs_no_position() {
    let start = tokio::time::Instant::now();
    let manner = move || -> Manner {
        Box::new(move |_| {
            let stalled = (10..100).contains(&start.elapsed().as_secs());
            if stalled { Says::Nothing } else { Says::Yes }
        })
    };
    let stalled = Fake { resumes: manner(), batches: manner(), fences: manner(), ..Fake::new() };
    let followed = Followed::start(stalled);
    sleep(Duration::from_secs(120)).await;
    assert!(followed.resumed() > 3, "{}", followed.resumed());
    assert_eq!(followed.opened(), 1);
    assert!(followed.lag() < BOUND);
}

#[tokio::test(start_paused = true)]
async fn refusals_are_counted_by_themselves() {
    let no = |n: u32| if n.is_multiple_of(2) { Fault::Passing } else { refused() };
    let followed = Followed::start(Fake {
        batches: Box::new(|n| if n == 20 { Says::No(Fault::Passing) } else { Says::Yes }),
        resumes: Box::new(move |n| if n < 9 { Says::No(no(n)) } else { Says::Yes }),
        ..Fake::new()
    });
    sleep(HOUR).await;
    assert_eq!((followed.opened(), followed.resumed()), (1, 10), "never three refusals in a row");
}

#[tokio::test(start_paused = true)]
async fn the_first_refusal_is_logged_and_the_next_ones_are_not() {
    Log::start();
    let followed = Followed::start(Fake {
        batches: Box::new(|n| if n == 20 { Says::No(Fault::Passing) } else { Says::Yes }),
        resumes: always(|| Says::No(refused())),
        ..Fake::new()
    });
    sleep(HOUR).await;
    assert_eq!((followed.opened(), followed.resumed()), (2, 3));
    assert_eq!(Log::count("answers the change stream with an error"), 1);
}

#[tokio::test(start_paused = true)]
async fn a_stream_that_is_lost_is_logged_once_and_so_is_its_return() {
    for (failures, lost) in [(6, 0), (7, 1), (500, 1)] {
        Log::start();
        let followed = Followed::start(Fake {
            batches: Box::new(|n| if n == 20 { Says::No(Fault::Passing) } else { Says::Yes }),
            resumes: Box::new(
                move |n| {
                    if n < failures { Says::No(Fault::Passing) } else { Says::Yes }
                },
            ),
            ..Fake::new()
        });
        sleep(HOUR).await;
        assert_eq!(followed.resumed(), failures + 1);
        let logged = ["stream of changes is lost", "is open again", "WARN"].map(Log::count);
        assert_eq!(logged, [lost, lost, 2 * lost], "after {failures} failures and the first");
    }
}

#[tokio::test(start_paused = true)]
async fn the_lag_is_told_while_no_stream_is_open() {
    let unsupported = || Says::No(Fault::Unsupported("not here"));
    for no in [|| Says::Nothing, || Says::No(Fault::Passing), unsupported] {
        let followed = Followed::start(Fake {
            batches: Box::new(|n| if n == 20 { Says::No(Fault::Passing) } else { Says::Yes }),
            resumes: always(no),
            opens: Box::new(move |n| if n == 0 { Says::Yes } else { no() }),
            ..Fake::new()
        });
        sleep(Duration::from_secs(100)).await;
        let (lag, told) =
            (followed.lag().as_secs_f64(), followed.value("session_store_stream_lag_seconds"));
        assert!(lag > 80.0 && (told - lag).abs() < 1.0, "it is {lag} and told as {told}");
    }
}

#[tokio::test(start_paused = true)]
async fn an_outage_ends_where_a_primary_answers_and_not_with_what_a_deposed_one_feeds_the_stream() {
    let no = || Says::No(Fault::Passing);
    for (fences, ends) in [(always(no), false), (always(|| Says::Yes), true)] {
        let followed = Followed::start(Fake { fences, keeps_up: false, ..Fake::new() });
        sleep(PACE).await;
        let key = SessionKey::of(1);
        followed.holds(key);
        sleep(2 * BOUND).await;
        followed.cache.observe::<()>(&Err(Error::new(ErrorKind::Connection, "no primary")));
        assert!(matches!(followed.cache.get(key), Lookup::Grace(_)));
        sleep(2 * PACE).await;
        let found = followed.cache.get(key);
        assert_eq!(matches!(found, Lookup::Expired), ends, "{found:?}");
        assert_eq!(matches!(found, Lookup::Grace(_)), !ends, "{found:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_stream_that_stays_behind_is_resumed_elsewhere() {
    let followed = Followed::start(Fake { keeps_up: false, ..Fake::new() });
    sleep(Duration::from_secs(25)).await;
    assert_eq!(followed.resumed(), 0, "an idle cluster is as late as ten seconds and more");
    sleep(Duration::from_secs(10)).await;
    assert_eq!((followed.opened(), followed.resumed()), (1, 1));
}

#[tokio::test(start_paused = true)]
async fn a_fence_that_is_lost_does_not_cost_the_lease() {
    let followed = Followed::start(Fake {
        fences: Box::new(|n| if n == 20 { Says::Nothing } else { Says::Yes }),
        ..Fake::new()
    });
    sleep(4 * PACE).await;
    for _ in 0..1_000 {
        sleep(Duration::from_millis(20)).await;
        assert!(followed.lag() < BOUND, "{:?}", followed.lag());
    }
    assert!(followed.calls.fences.load(Ordering::SeqCst) > 20);
}

#[tokio::test(start_paused = true)]
async fn without_change_streams_the_cache_keeps_what_it_has_and_one_warning_says_so() {
    Log::start();
    let followed = Followed::start(Fake {
        opens: always(|| Says::No(Fault::Unsupported("not here"))),
        ..Fake::new()
    });
    sleep(Duration::from_secs(59)).await;
    let key = SessionKey::of(1);
    followed.holds(key);
    sleep(Duration::from_secs(2)).await;
    assert_eq!(followed.opened(), 2);
    assert!(matches!(followed.cache.get(key), Lookup::Hit(_)));
    assert!(followed.value(EMPTIED).abs() < 0.5);
    sleep(HOUR).await;
    assert_eq!((Log::count("WARN"), Log::count("is not told")), (1, 1));
}

#[tokio::test(start_paused = true)]
async fn a_stream_that_is_no_longer_allowed_is_one_gap() {
    let followed = Followed::start(Fake {
        batches: Box::new(|n| {
            if n == 20 { Says::No(Fault::Unsupported("any more")) } else { Says::Yes }
        }),
        opens: Box::new(
            |n| if n == 0 { Says::Yes } else { Says::No(Fault::Unsupported("any more")) },
        ),
        ..Fake::new()
    });
    sleep(PACE).await;
    let key = SessionKey::of(1);
    followed.holds(key);
    sleep(30 * PACE).await;
    assert!(matches!(followed.cache.get(key), Lookup::Miss));
    sleep(Duration::from_secs(200)).await;
    let gaps = followed.value(EMPTIED);
    assert!(followed.opened() > 2 && (gaps - 1.0).abs() < 0.5, "{gaps}");
}

#[tokio::test(start_paused = true)]
async fn a_panic_is_logged_and_closes_the_gauge() {
    Log::start();
    let followed = Followed::start(Fake {
        batches: Box::new(|n| if n == 20 { panic!("on purpose") } else { Says::Yes }),
        ..Fake::new()
    });
    sleep(60 * PACE).await;
    assert!(followed.value("session_store_stream_open").abs() < 0.5);
    assert_eq!(Log::count("no longer follows"), 1);
    assert!(followed.lag() > BOUND, "and the bound holds by itself");
    followed.tasks.shutdown().await;
}

#[tokio::test(start_paused = true)]
async fn an_overloaded_server_costs_neither_a_position_nor_an_entry() {
    Log::start();
    let followed = Followed::start(Fake {
        batches: Box::new(|n| if n == 20 { Says::No(Fault::Overloaded) } else { Says::Yes }),
        resumes: Box::new(|n| if n < 50 { Says::No(Fault::Overloaded) } else { Says::Yes }),
        ..Fake::new()
    });
    sleep(PACE).await;
    let key = SessionKey::of(1);
    followed.holds(key);
    sleep(HOUR).await;
    assert_eq!((followed.opened(), followed.resumed()), (1, 51));
    assert!(followed.value(EMPTIED).abs() < 0.5);
    assert!(matches!(followed.cache.get(key), Lookup::Hit(_)), "renewed, and never removed");
    assert_eq!(Log::count("gap"), 0);
}

#[tokio::test(start_paused = true)]
async fn attempts_on_an_overloaded_server_are_seconds_apart() {
    let followed =
        Followed::start(Fake { opens: always(|| Says::No(Fault::Overloaded)), ..Fake::new() });
    sleep(Duration::from_secs(600)).await;
    let opened = followed.opened();
    assert!((300..700).contains(&opened), "{opened} attempts in 600 s");
}

#[tokio::test(start_paused = true)]
async fn fences_back_off_where_the_server_is_overloaded() {
    let followed =
        Followed::start(Fake { fences: always(|| Says::No(Fault::Overloaded)), ..Fake::new() });
    sleep(Duration::from_secs(600)).await;
    let asked = followed.calls.fences.load(Ordering::SeqCst);
    assert!((300..700).contains(&asked), "{asked} in 600 s");
}

#[tokio::test(start_paused = true)]
async fn a_refusal_is_not_forgotten_for_an_overload_in_between() {
    let answer = |n: u32| if n.is_multiple_of(2) { refused() } else { Fault::Overloaded };
    let followed = Followed::start(Fake {
        batches: Box::new(|n| if n == 20 { Says::No(Fault::Passing) } else { Says::Yes }),
        resumes: Box::new(move |n| Says::No(answer(n))),
        ..Fake::new()
    });
    sleep(HOUR).await;
    assert_eq!((followed.opened(), followed.resumed()), (2, 5));
}

#[tokio::test(start_paused = true)]
async fn a_server_that_goes_on_refusing_fresh_streams_has_none() {
    Log::start();
    let start = tokio::time::Instant::now();
    let mut followed =
        Followed::start(Fake { opens: always(|| Says::No(refused())), ..Fake::new() });
    timeout(HOUR, &mut followed.opened_once).await.unwrap().unwrap().unwrap();
    assert!(start.elapsed() < Duration::from_millis(100), "build ends after {:?}", start.elapsed());
    let key = SessionKey::of(1);
    followed.holds(key);
    sleep(Duration::from_secs(59)).await;
    assert_eq!(followed.opened(), 3);
    sleep(Duration::from_secs(2)).await;
    assert_eq!(followed.opened(), 4);
    assert!(followed.value(EMPTIED).abs() < 0.5, "nobody has listened, so nothing is lost");
    sleep(HOUR).await;
    assert!((60..70).contains(&followed.opened()), "{}", followed.opened());
    let why = "error 136 (CappedPositionLost)";
    assert_eq!([why, "is not told", "modifyChangeStreams", "WARN"].map(Log::count), [1; 4]);
}

#[tokio::test(start_paused = true)]
async fn a_stream_that_opens_after_two_refusals_is_followed_without_a_warning() {
    Log::start();
    let followed = Followed::start(Fake {
        opens: Box::new(|n| if n < 2 { Says::No(refused()) } else { Says::Yes }),
        ..Fake::new()
    });
    sleep(Duration::from_secs(10)).await;
    assert!(followed.opened() == 3 && followed.lag() < BOUND);
    assert_eq!(Log::count("WARN"), 0);
}

#[tokio::test(start_paused = true)]
async fn a_server_that_has_streams_one_day_is_followed_from_then_on() {
    Log::start();
    let followed = Followed::start(Fake {
        opens: Box::new(|n| if n < 5 { Says::No(refused()) } else { Says::Yes }),
        ..Fake::new()
    });
    sleep(Duration::from_secs(200)).await;
    assert!(followed.opened() == 6 && followed.lag() < BOUND);
    assert_eq!(["is not told", "is open again", "WARN"].map(Log::count), [1, 1, 2]);
}

#[tokio::test(start_paused = true)]
async fn a_stream_that_opens_and_brings_nothing_is_none() {
    Log::start();
    let no = || always(|| Says::No(refused()));
    let mut followed = Followed::start(Fake { batches: no(), resumes: no(), ..Fake::new() });
    sleep(HOUR).await;
    timeout(HOUR, &mut followed.opened_once).await.unwrap().unwrap().unwrap();
    assert!((55..70).contains(&followed.opened()), "{}", followed.opened());
    let said = ["answers the change stream", "has a gap", "is lost", "is not told", "WARN"];
    assert_eq!(said.map(Log::count), [1, 2, 1, 1, 5], "and no more, however long it lasts");
}

#[tokio::test(start_paused = true)]
async fn a_position_that_the_server_does_not_reach_within_its_own_limit_is_given_up() {
    let followed = Followed::start(Fake {
        batches: Box::new(|n| if n == 20 { Says::No(Fault::Passing) } else { Says::Yes }),
        resumes: always(|| Says::No(Fault::TooSlow)),
        ..Fake::new()
    });
    sleep(HOUR).await;
    assert_eq!((followed.opened(), followed.resumed()), (2, 3));
    assert!(followed.lag() < BOUND);
}

#[tokio::test(start_paused = true)]
async fn an_overload_does_not_end_where_the_primary_says_hello() {
    let followed = Followed::start(Fake { keeps_up: false, ..Fake::new() });
    sleep(PACE).await;
    let key = SessionKey::of(1);
    followed.holds(key);
    sleep(2 * BOUND).await;
    followed.cache.observe::<()>(&Err(Error::server_overloaded("error 462", true)));
    sleep(10 * PACE).await;
    assert!(followed.calls.fences.load(Ordering::SeqCst) > 20);
    assert!(matches!(followed.cache.get(key), Lookup::Grace(_)));
    followed.cache.observe(&Ok(()));
    assert!(matches!(followed.cache.get(key), Lookup::Expired));
}
