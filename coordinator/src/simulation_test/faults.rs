//! What goes wrong.

use super::network::{COORDINATOR, STORE};
use super::node::Process;
use super::{NODES, Sim};
use std::sync::Arc;
use std::time::Duration;
use tokio::task::JoinSet;

const FOR: Duration = Duration::from_secs(7);
/// A drained node that is not empty by then ends all the same.
const DRAIN: Duration = Duration::from_secs(4);

async fn pause(sim: &Sim, from_ms: usize, range_ms: usize) {
    tokio::time::sleep(Duration::from_millis((from_ms + sim.throw(range_ms)) as u64)).await;
}

/// Lets faults happen, some at once; at the end all is well, but for a coordinator that dies.
pub(super) async fn run(sim: &Arc<Sim>, coordinator_dies: bool) {
    let mut faults = JoinSet::new();
    // Some clusters fare better than others.
    let every_ms = [100, 400, 2_000][sim.throw(3)];
    while sim.begun.elapsed() < FOR {
        pause(sim, 20, every_ms * 2).await;
        let at = NODES.start() + sim.throw(NODES.count());
        let (sim, kind) = (Arc::clone(sim), sim.throw(8));
        sim.note("fault", (kind * 10 + at) as u64);
        faults.spawn(async move {
            match kind {
                0 => die(&sim, at, 300, 3_000).await,
                1 => {
                    sim.network.stop(at, true);
                    pause(&sim, 50, 6_000).await;
                    sim.network.stop(at, false);
                }
                2 | 3 => leave(&sim, at).await,
                4 => cut(&sim, COORDINATOR, at).await,
                5 => cut(&sim, at, NODES.start() + sim.throw(NODES.count())).await,
                6 => cut(&sim, STORE, if sim.one_in(2) { COORDINATOR } else { at }).await,
                _ => {
                    sim.store.set_up(false);
                    pause(&sim, 200, 9_000).await;
                    sim.store.set_up(true);
                }
            }
        });
    }
    if coordinator_dies {
        sim.note("coordinator dies", 0);
        sim.network.coordinator.cancel();
    }
    faults.join_all().await;
    sim.network.mend_all();
    for at in NODES.filter(|at| sim.network.process(*at).is_none()) {
        Process::start(sim, at);
    }
    sim.note("all is well", 0);
}

async fn cut(sim: &Arc<Sim>, a: usize, b: usize) {
    if a != b {
        sim.network.cut(a, b, true);
        pause(sim, 50, 6_000).await;
        sim.network.cut(a, b, false);
    }
}

/// Ends the process there, and starts another one later.
async fn die(sim: &Arc<Sim>, at: usize, from_ms: usize, range_ms: usize) {
    let Some(process) = sim.network.process(at) else { return };
    sim.network.put(at, None);
    process.life.cancel();
    drop(process);
    pause(sim, from_ms, range_ms).await;
    if sim.network.process(at).is_none() {
        Process::start(sim, at);
    }
}

async fn leave(sim: &Arc<Sim>, at: usize) {
    let Some(process) = sim.network.process(at) else { return };
    process.drain();
    let until = tokio::time::Instant::now() + DRAIN;
    while !process.is_empty() && tokio::time::Instant::now() < until {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let is_same = sim
        .network
        .process(at)
        .is_some_and(|now| now.instance == process.instance);
    drop(process);
    if is_same {
        die(sim, at, 100, 500).await;
    }
}
