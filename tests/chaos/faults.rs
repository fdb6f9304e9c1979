//! The faults: planned from the seed before the run, and then carried out.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use rand::Rng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;
use session_test_proxy::{
    Commands, Direction, Ending, Injected, Injection, Lasts, Proxy, Role, ServerError,
};
use session_test_server::TestServer;
use tokio::sync::Mutex;

use crate::history::{Clock, Nanos};

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Kind {
    /// All connections end.
    Cut,
    /// All connections are reset.
    Reset,
    /// All connections end, and new ones are refused for a while.
    Refuse,
    /// Requests are held back for a while.
    StallRequests,
    /// Replies are held back for a while.
    StallReplies,
    /// All messages are delayed for a while.
    Delay,
    /// Some connections are reset in the middle of a message.
    ResetMidMessage,
    /// Some connections end in the middle of a message.
    Truncate,
    /// The server is killed with SIGKILL, and restarted on its data.
    Kill,
    /// The server is paused for a while (SIGSTOP).
    Pause,
    /// The server refuses commands for a while, since it is overloaded.
    Overload,
    /// The server is not primary for a while. Commands that run at its beginning are interrupted.
    Election,
}

const OF_THE_NETWORK: [Kind; 8] = [
    Kind::Cut,
    Kind::Reset,
    Kind::Refuse,
    Kind::StallRequests,
    Kind::StallReplies,
    Kind::Delay,
    Kind::ResetMidMessage,
    Kind::Truncate,
];
const OF_THE_SERVER: [Kind; 2] = [Kind::Kill, Kind::Pause];
/// Faults in the server's replies. Each instance has its own.
const OF_THE_ANSWERS: [Kind; 2] = [Kind::Overload, Kind::Election];

/// One planned fault.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Fault {
    kind: Kind,
    at: Duration,
    lasts: Duration,
    /// The instances whose networks it affects: one bit for each.
    instances: u32,
    direction: Direction,
    /// The number of messages, or the milliseconds of delay.
    amount: u32,
}

/// Plans the faults: every kind at least once. A long run has bursts of some faults, and calm
/// periods between them.
pub(crate) fn plan(
    rng: &mut ChaCha8Rng,
    before: Duration,
    run: Duration,
    instances: u8,
    own_server: bool,
) -> Vec<Fault> {
    const AFTER: f64 = 1.5;
    const ROUND: f64 = 10.0;

    let server: &[Kind] = if own_server { &OF_THE_SERVER } else { &[] };
    let kinds = [&OF_THE_NETWORK, server, &OF_THE_ANSWERS].concat();
    let before = before.as_secs_f64();
    let time = (run.as_secs_f64() - before - AFTER).max(0.5);
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a small number")]
    let rounds = ((time / ROUND) as u32).max(1);
    let round = time / f64::from(rounds);
    let burst = if rounds == 1 { round } else { round * 0.5 };
    let count = usize::try_from(rounds).unwrap_or(1).saturating_mul(5).max(kinds.len());
    let mut bag = Vec::new();
    let mut plan = Vec::new();
    for number in 0..count {
        if bag.is_empty() {
            bag.clone_from(&kinds);
            bag.shuffle(rng);
        }
        let Some(kind) = bag.pop() else { break };
        let begin = before + round * f64::from(u32::try_from(number).unwrap_or(0) % rounds);
        let longest = (burst * 0.7).min(3.5);
        let lasts = longest * rng.random_range(0.3..1.0);
        let at = begin + rng.random_range(0.0..(burst - lasts).max(0.01));
        let all = (1_u32 << instances) - 1;
        plan.push(Fault {
            kind,
            at: Duration::from_secs_f64(at),
            lasts: Duration::from_secs_f64(lasts),
            // Often only one instance, as when one machine has lost its network.
            instances: match rng.random_range(0..4) {
                0 => all,
                1 => rng.random_range(1..=all),
                _ => 1 << rng.random_range(0..instances),
            },
            direction: if rng.random() { Direction::ToServer } else { Direction::ToClient },
            amount: rng.random_range(1..=4),
        });
    }
    plan.sort_by_key(|fault| fault.at);
    plan
}

/// The faults that are active, which other tasks read to find calm periods.
#[derive(Default)]
pub(crate) struct ActiveFaults {
    active: AtomicU64,
    /// When the last fault ended.
    ended: AtomicU64,
    faults: AtomicU64,
}

impl ActiveFaults {
    /// Whether no fault is active, and none was within the last `quiet`. The beginning of the run
    /// counts as calm.
    pub(crate) fn is_calm(&self, now: Nanos, quiet: Duration) -> bool {
        let ended = self.ended.load(Ordering::SeqCst);
        self.active.load(Ordering::SeqCst) == 0
            && (ended == 0 || u128::from(now.saturating_sub(ended)) > quiet.as_nanos())
    }

    /// Records that a fault begins.
    pub(crate) fn begin(&self) {
        self.active.fetch_add(1, Ordering::SeqCst);
        self.faults.fetch_add(1, Ordering::SeqCst);
    }

    /// Records that a fault has ended.
    pub(crate) fn end(&self, now: Nanos) {
        self.ended.fetch_max(now, Ordering::SeqCst);
        self.active.fetch_sub(1, Ordering::SeqCst);
    }

    /// How many faults there have been.
    pub(crate) fn faults(&self) -> u64 {
        self.faults.load(Ordering::SeqCst)
    }
}

/// The parts that faults affect.
pub(crate) struct Victims {
    pub(crate) proxies: Vec<Proxy>,
    /// `None` if the run must not stop the server.
    pub(crate) server: Option<Arc<Mutex<TestServer>>>,
}

/// The commands that read sessions and receive changes.
pub(crate) const READS: &[&str] = &["find", "aggregate", "getMore", "count"];

/// `IngressRequestRateLimitExceeded`, `AdmissionQueueOverflow`, `RateLimitExceeded` and
/// `PooledConnectionAcquisitionRejected`.
pub(crate) const OVERLOADED: [i32; 4] = [462, 433, 449, 450];

/// Makes the server refuse commands of one instance for overload, until that is stopped.
pub(crate) fn overload(proxy: &Proxy, commands: Commands, code: i32) -> Injected {
    proxy.inject(commands, Injection::Refuse(ServerError::new(code)), Lasts::UntilStopped)
}

/// Makes the server step down for one instance. The server interrupts the running commands, so
/// their outcome is unknown. It closes the cursors, and refuses every command until that is
/// stopped.
fn election(proxy: &Proxy, running: u32) -> [Injected; 3] {
    // InterruptedAtShutdown, NotWritablePrimary, ShutdownInProgress, InterruptedDueToReplStateChange.
    let codes = [11600, 10107, 91, 11602];
    let refused = codes[usize::try_from(running).unwrap_or(0) % codes.len()];
    proxy.introduce_as(Role::Secondary);
    let put_in = |commands: Commands, injection, lasts| proxy.inject(commands, injection, lasts);
    [
        // QueryPlanKilled.
        put_in("getMore".into(), Injection::Refuse(ServerError::new(175)), Lasts::Times(3)),
        put_in(
            Commands::All,
            Injection::RefuseAfterwards(ServerError::new(11602)),
            Lasts::Times(running),
        ),
        put_in(Commands::All, Injection::Refuse(ServerError::new(refused)), Lasts::UntilStopped),
    ]
}

/// Carries out the plan. Returns when all faults have ended, with the number of faults of each
/// kind.
pub(crate) async fn carry_out(
    plan: Vec<Fault>,
    victims: Arc<Victims>,
    active_faults: Arc<ActiveFaults>,
    clock: Clock,
) -> Result<BTreeMap<Kind, u32>, String> {
    let mut running = tokio::task::JoinSet::new();
    let mut done = BTreeMap::new();
    for fault in plan {
        *done.entry(fault.kind).or_default() += 1;
        let victims = victims.clone();
        let active_faults = active_faults.clone();
        running.spawn(async move {
            let now = Duration::from_nanos(clock.now());
            tokio::time::sleep(fault.at.saturating_sub(now)).await;
            active_faults.begin();
            let outcome = victims.suffer(fault).await;
            active_faults.end(clock.now());
            outcome
        });
    }
    while let Some(outcome) = running.join_next().await {
        outcome.map_err(|error| error.to_string())??;
    }
    Ok(done)
}

impl Victims {
    async fn suffer(&self, fault: Fault) -> Result<(), String> {
        let hit = |(index, proxy)| (fault.instances >> index & 1 == 1).then_some(proxy);
        let proxies: Vec<&Proxy> = self.proxies.iter().enumerate().filter_map(hit).collect();
        let all = |act: &dyn Fn(&Proxy)| proxies.iter().for_each(|proxy| act(proxy));
        let pass = || tokio::time::sleep(fault.lasts);
        let breaks = usize::try_from(fault.amount).unwrap_or(1);
        match fault.kind {
            Kind::Cut => all(&|proxy| proxy.break_off(Ending::Close)),
            Kind::Reset => all(&|proxy| proxy.break_off(Ending::Reset)),
            Kind::Refuse => {
                all(&|proxy| proxy.refuse(true));
                all(&|proxy| proxy.break_off(Ending::Reset));
                pass().await;
                all(&|proxy| proxy.refuse(false));
            }
            Kind::StallRequests | Kind::StallReplies => {
                let direction = match fault.kind {
                    Kind::StallRequests => Direction::ToServer,
                    _ => Direction::ToClient,
                };
                all(&|proxy| proxy.stall(direction, true));
                pass().await;
                all(&|proxy| proxy.stall(direction, false));
            }
            Kind::Delay => {
                let delay = Duration::from_millis(u64::from(fault.amount) * 60);
                all(&|proxy| proxy.delay(fault.direction, delay));
                pass().await;
                all(&|proxy| proxy.delay(fault.direction, Duration::ZERO));
            }
            Kind::ResetMidMessage | Kind::Truncate => {
                let ending = match fault.kind {
                    Kind::Truncate => Ending::Close,
                    _ => Ending::Reset,
                };
                all(&|proxy| proxy.break_next(fault.direction, ending, breaks));
                pass().await;
                all(&|proxy| proxy.break_next(fault.direction, ending, 0));
            }
            Kind::Kill => {
                self.server(TestServer::kill, fault.lasts / 4, TestServer::restart).await?;
            }
            Kind::Pause => self.server(TestServer::pause, fault.lasts, TestServer::resume).await?,
            Kind::Overload => {
                let commands = match fault.direction {
                    Direction::ToServer => Commands::All,
                    Direction::ToClient => READS.into(),
                };
                let code = OVERLOADED[breaks % OVERLOADED.len()];
                let refused: Vec<_> =
                    proxies.iter().map(|proxy| overload(proxy, commands.clone(), code)).collect();
                pass().await;
                refused.iter().for_each(Injected::stop);
            }
            Kind::Election => {
                let elections: Vec<_> =
                    proxies.iter().flat_map(|proxy| election(proxy, fault.amount)).collect();
                tokio::time::sleep(fault.lasts / 3).await;
                elections.iter().for_each(Injected::stop);
                all(&|proxy| proxy.introduce_as(Role::ItsOwn));
            }
        }
        Ok(())
    }

    /// One fault at a time: no other task may use the server meanwhile.
    async fn server(
        &self,
        begin: impl FnOnce(&mut TestServer) -> Result<(), session_test_server::Error> + Send + 'static,
        lasts: Duration,
        end: impl FnOnce(&mut TestServer) -> Result<(), session_test_server::Error> + Send + 'static,
    ) -> Result<(), String> {
        let Some(server) = self.server.clone() else { return Ok(()) };
        let mut server = server.lock_owned().await;
        let act = move || {
            begin(&mut server)?;
            std::thread::sleep(lasts);
            end(&mut server)
        };
        let acted = tokio::task::spawn_blocking(act).await.map_err(|error| error.to_string())?;
        acted.map_err(|error| error.to_string())
    }
}
