//! The load: tasks that create, save, touch, load and delete through all instances.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use tokio::task::JoinSet;

use crate::actions::Run;
use crate::requests;
use crate::session::Session;

/// How many sessions are in use at a time. The first few of them are used most.
const SESSIONS: usize = 120;
const HOT: usize = 12;
/// The number of tasks for each instance. A task that waits for a stalled network does nothing
/// else.
const LOADERS: u64 = 16;
const WRITERS: u64 = 16;
/// The number of loads in a row, and the pause after them. There is no pause after each load, because
/// the timer has a resolution of a millisecond.
const LOADS: u32 = 4;
const LOAD_PAUSE: Duration = Duration::from_millis(15);
/// How often the writers of all instances wake. They wake at the same time, so that their saves are
/// batched.
const BURST: Duration = Duration::from_millis(50);
/// How long loads of a deleted session continue after the time for which it may be served.
pub(crate) const AFTERMATH: Duration = Duration::from_secs(2);

/// Each task has its own random numbers, so that no task depends on another task's speed.
pub(crate) fn random(seed: u64, task: u64) -> ChaCha8Rng {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    rng.set_stream(task);
    rng
}

/// Starts all tasks. They end when the run has ended.
pub(crate) fn start(run: &Arc<Run>, tasks: &mut JoinSet<()>) {
    let mut stream = 1_000;
    for instance in 0..run.settings.instances {
        for number in 0..LOADERS + WRITERS {
            stream += 1;
            let rng = random(run.settings.seed, stream);
            if number < LOADERS {
                tasks.spawn(loader(run.clone(), instance, rng));
            } else {
                tasks.spawn(writer(run.clone(), instance, rng));
            }
        }
    }
    requests::start(run, tasks);
    tasks.spawn(janitor(run.clone()));
}

async fn loader(run: Arc<Run>, instance: u8, mut rng: ChaCha8Rng) {
    while !run.has_ended() {
        for _ in 0..LOADS {
            let Some(session) = pick(&run, &mut rng) else { break };
            let patience = now_and_then(&mut rng, 400);
            run.load(instance, &session, patience).await;
        }
        tokio::time::sleep(LOAD_PAUSE).await;
    }
}

/// Picks a session. In three of four cases, it is one that is used often.
fn pick(run: &Run, rng: &mut ChaCha8Rng) -> Option<Arc<Session>> {
    let hot: bool = rng.random_ratio(3, 4);
    let any: f64 = rng.random();
    let pool = run.pool();
    let among = if hot { pool.len().min(HOT) } else { pool.len() };
    #[allow(
        clippy::cast_possible_truncation,
        clippy::cast_precision_loss,
        clippy::cast_sign_loss,
        reason = "one of some dozens"
    )]
    let index = (any * among as f64) as usize;
    pool.get(index).cloned()
}

/// A caller that gives up in the middle of one operation in `one_in`.
pub(crate) fn now_and_then(rng: &mut ChaCha8Rng, one_in: u32) -> Option<Duration> {
    let leaves = rng.random_ratio(1, one_in);
    let after = Duration::from_micros(rng.random_range(0..3_000));
    leaves.then_some(after)
}

async fn writer(run: Arc<Run>, instance: u8, mut rng: ChaCha8Rng) {
    while !run.has_ended() {
        let burst = u64::try_from(BURST.as_nanos()).unwrap_or(u64::MAX);
        let ahead = Duration::from_nanos(burst - run.clock.now() % burst);
        tokio::time::sleep(ahead + Duration::from_micros(rng.random_range(0..2_000))).await;
        if run.pool().len() < SESSIONS {
            let lives = Duration::from_millis(rng.random_range(2_000..12_000));
            let mortal = rng.random_ratio(4, 5);
            if let Some(session) = run.create(instance, lives, mortal).await {
                run.pool().push(session);
            }
            continue;
        }
        if let Some(session) = pick(&run, &mut rng) {
            write(&run, instance, &session, &mut rng).await;
        }
    }
}

/// Makes one write, if the session may still be written.
async fn write(run: &Run, instance: u8, session: &Session, rng: &mut ChaCha8Rng) {
    let patience = now_and_then(rng, 300);
    let touch = rng.random_ratio(1, 5);
    let beside = rng.random_ratio(1, 3);
    let ahead = Duration::from_micros(rng.random_range(0..2_000));
    let other = rng.random_range(0..run.settings.instances);
    let Ok(turn) = session.turn.try_lock() else { return };
    if session.deleted().is_some() {
        // The session is deleted. A late save must not bring it back.
        if rng.random_ratio(1, 8) {
            run.save(instance, session, turn, touch, patience).await;
        }
        return;
    }
    let undecided = session.undecided.load(Ordering::SeqCst);
    if run.clock.now() < session.ends {
        if !undecided {
            run.save(instance, session, turn, touch, patience).await;
        }
    } else if session.mortal {
        if beside && !undecided {
            // A log-out beside a slow request of the same session.
            let save = run.save(other, session, turn, false, patience);
            let delete = async {
                tokio::time::sleep(ahead).await;
                run.delete(instance, session, None).await
            };
            tokio::join!(save, delete);
        } else {
            run.delete(instance, session, patience).await;
        }
    }
}

/// Takes sessions out of use that are finished, and judges them once no task holds them.
async fn janitor(run: Arc<Run>) {
    while !run.has_ended() {
        tokio::time::sleep(Duration::from_millis(100)).await;
        sweep(&run, false);
    }
}

/// One round of the janitor. With `all`, after every task has ended, it takes all sessions.
pub(crate) fn sweep(run: &Run, all: bool) {
    let now = run.clock.now();
    let nanos = |time: Duration| u64::try_from(time.as_nanos()).unwrap_or(u64::MAX / 2);
    let aftermath = nanos(run.settings.max_staleness + AFTERMATH);
    let is_done = |session: &Session| match session.deleted() {
        Some(deleted) => now > deleted.saturating_add(aftermath),
        // A session that is to be deleted waits for the acknowledgement of its delete, up to a
        // limit.
        None if session.mortal => now > session.ends.saturating_add(4 * aftermath),
        None => now > session.ends,
    };
    let mut pool = run.pool();
    let done: Vec<_> = pool.extract_if(.., |session| all || is_done(session)).collect();
    drop(pool);
    let mut leaving = run.leaving();
    leaving.extend(done);
    let unused: Vec<_> =
        leaving.extract_if(.., |session| Arc::strong_count(session) == 1).collect();
    drop(leaving);
    for session in unused {
        run.ledger.judge(&session);
    }
    requests::sweep(run, all);
}
