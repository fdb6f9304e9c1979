//! Measures in calm moments how long a change takes from its acknowledgement on one instance until
//! the other instances see it.

use std::sync::Arc;
use std::time::Duration;

use hdrhistogram::Histogram;
use rand::Rng;
use tokio::runtime::Handle;

use crate::actions::Run;
use crate::faults::ActiveFaults;
use crate::history::{Nanos, Seen, What};
use crate::session::Session;
use crate::workload::random;

/// How long it is not calm after a fault.
const QUIET: Duration = Duration::from_secs(2);
/// The pause between two loads. A thread can wait for less than the resolution of the runtime's
/// timer.
const LOOK: Duration = Duration::from_micros(200);
/// After this many loads the change counts as slow, and the loads get rarer.
const CLOSE_LOOKS: u32 = 500;
const SLOW_LOOK: Duration = Duration::from_millis(2);
/// The pause between two probes.
const PAUSE: Duration = Duration::from_millis(30);

/// Latencies in microseconds.
pub(crate) type Latencies = Histogram<u64>;

/// Probes until the run has ended. Call it on a thread of its own.
pub(crate) fn probe(
    run: &Arc<Run>,
    active_faults: &ActiveFaults,
    runtime: &Handle,
) -> Result<Latencies, String> {
    let mut latencies = Histogram::new(3).map_err(|error| error.to_string())?;
    let mut rng = random(run.settings.seed, 1);
    let instances = run.settings.instances;
    while !run.has_ended() {
        std::thread::sleep(PAUSE);
        let writer = rng.random_range(0..instances);
        let deletes = rng.random();
        if instances < 2 || !active_faults.is_calm(run.clock.now(), QUIET) {
            continue;
        }
        let created = run.create(writer, Duration::ZERO, false);
        let Some(session) = runtime.block_on(created) else { continue };
        let measured = runtime.block_on(one(run, &session, writer, deletes));
        if active_faults.is_calm(run.clock.now(), QUIET) {
            for latency in measured {
                let micros = latency / 1_000;
                latencies.record(micros).map_err(|error| error.to_string())?;
            }
        }
        run.leaving().push(session);
    }
    Ok(latencies)
}

/// Makes all other instances cache the session, changes it, and waits until each of them sees the
/// change.
async fn one(run: &Run, session: &Session, writer: u8, deletes: bool) -> Vec<Nanos> {
    let mut waiting: Vec<u8> =
        (0..run.settings.instances).filter(|instance| *instance != writer).collect();
    for instance in &waiting {
        run.load(*instance, session, None).await;
    }
    let acknowledged = if deletes {
        run.delete(writer, session, None).await
    } else {
        let turn = session.turn.lock().await;
        let saved = run.save(writer, session, turn, false, None).await;
        saved.then(|| run.clock.now())
    };
    let Some(acknowledged) = acknowledged else { return Vec::new() };
    let mut latencies = Vec::new();
    let mut looks = 0;
    while !waiting.is_empty() && !run.has_ended() {
        let mut unseeing = Vec::new();
        for instance in waiting {
            let look = run.look(instance, session, None).await;
            let sees = match look.what {
                What::Load(Seen::Absent) => deletes,
                What::Load(Seen::State(state)) => !deletes && state.version > 1,
                _ => false,
            };
            if sees {
                latencies.push(look.end.saturating_sub(acknowledged));
            } else {
                unseeing.push(instance);
            }
        }
        waiting = unseeing;
        looks += 1;
        // The prober has its own thread, so it may block it.
        std::thread::sleep(if looks < CLOSE_LOOKS { LOOK } else { SLOW_LOOK });
    }
    latencies
}
