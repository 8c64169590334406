//! Wires between processes: late, of different lengths, cut and mended. What was sent into a cut arrives when it is mended.

use super::Sim;
use super::node::Process;
use crate::membership::Changes;
use baton_node_runtime::CancellationToken;
use hyper_util::rt::TokioIo;
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, ReadHalf, WriteHalf};
use tokio::sync::mpsc;

pub(super) const COORDINATOR: usize = 0;
pub(super) const STORE: usize = 99;
const PIPE_BYTES: usize = 64 * 1024;

/// A process that can be reached.
pub(super) struct Reachable {
    pub(super) process: Arc<Process>,
    pub(super) connections: mpsc::UnboundedSender<DuplexStream>,
}

#[derive(Default)]
struct State {
    cut: BTreeSet<(usize, usize)>,
    stopped: BTreeSet<usize>,
    processes: BTreeMap<usize, Reachable>,
}

pub(super) struct Network {
    state: Mutex<State>,
    changed: Changes,
    /// The coordinator's process.
    pub(super) coordinator: CancellationToken,
}

fn wire(a: usize, b: usize) -> (usize, usize) {
    (a.min(b), a.max(b))
}

impl Network {
    pub(super) fn new() -> Self {
        Self {
            state: Mutex::default(),
            changed: Changes::default(),
            coordinator: CancellationToken::new(),
        }
    }

    fn change<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        let result = change(&mut self.state.lock().unwrap());
        self.changed.tell();
        result
    }

    pub(super) fn cut(&self, a: usize, b: usize, is_cut: bool) {
        self.change(|state| match is_cut {
            true => state.cut.insert(wire(a, b)),
            false => state.cut.remove(&wire(a, b)),
        });
    }

    /// As SIGSTOP and SIGCONT do.
    pub(super) fn stop(&self, at: usize, is_stopped: bool) {
        self.change(|state| match is_stopped {
            true => state.stopped.insert(at),
            false => state.stopped.remove(&at),
        });
    }

    pub(super) fn mend_all(&self) {
        self.change(|state| {
            state.cut.clear();
            state.stopped.clear();
        });
    }

    pub(super) fn put(&self, at: usize, reachable: Option<Reachable>) {
        self.change(|state| match reachable {
            Some(reachable) => state.processes.insert(at, reachable),
            None => state.processes.remove(&at),
        });
    }

    pub(super) fn process(&self, at: usize) -> Option<Arc<Process>> {
        let state = self.state.lock().unwrap();
        state.processes.get(&at).map(|reachable| Arc::clone(&reachable.process))
    }

    pub(super) fn is_open(&self, a: usize, b: usize) -> bool {
        let state = self.state.lock().unwrap();
        !state.cut.contains(&wire(a, b)) && !state.stopped.contains(&a) && !state.stopped.contains(&b)
    }

    async fn until(&self, holds: impl Fn(&State) -> bool) {
        let mut changed = self.changed.listen();
        while !holds(&self.state.lock().unwrap()) {
            changed.changed().await;
        }
    }

    /// Returns when the process is not stopped.
    pub(super) async fn awake(&self, at: usize) {
        self.until(|state| !state.stopped.contains(&at)).await;
    }
}

impl Sim {
    /// The time that a message takes, and as long as the wire is cut.
    pub(super) async fn travel(&self, from: usize, to: usize) {
        let us = match self.throw(40) {
            0 => 5_000 + self.throw(150_000),
            _ => 50 + self.throw(1_500),
        };
        tokio::time::sleep(Duration::from_micros(us as u64)).await;
        let open = |state: &State| {
            !state.cut.contains(&wire(from, to)) && !state.stopped.contains(&from) && !state.stopped.contains(&to)
        };
        self.network.until(open).await;
    }

    /// A connection of the coordinator's.
    pub(super) async fn connect(self: Arc<Self>, to: usize) -> io::Result<TokioIo<DuplexStream>> {
        self.travel(COORDINATOR, to).await;
        let refused = || io::Error::from(io::ErrorKind::ConnectionRefused);
        if self.network.coordinator.is_cancelled() {
            return Err(refused());
        }
        let (client, near) = tokio::io::duplex(PIPE_BYTES);
        let (far, server) = tokio::io::duplex(PIPE_BYTES);
        let life = {
            let state = self.network.state.lock().unwrap();
            let reachable = state.processes.get(&to).ok_or_else(refused)?;
            reachable.connections.send(server).map_err(|_| refused())?;
            reachable.process.life.clone()
        };
        let coordinator = self.network.coordinator.clone();
        let ((near_in, near_out), (far_in, far_out)) = (tokio::io::split(near), tokio::io::split(far));
        let sim = Arc::clone(&self);
        tokio::spawn(async move {
            let both = async {
                let there = sim.carry(near_in, far_out, COORDINATOR, to);
                let back = sim.carry(far_in, near_out, to, COORDINATOR);
                tokio::join!(there, back)
            };
            // Dropped, both ends see the connection's end.
            tokio::pin!(both);
            tokio::select! {
                biased;
                () = life.cancelled() => {}
                () = coordinator.cancelled() => {}
                _ = &mut both => {}
            }
            // Nobody hears of a death over a cut wire.
            sim.network
                .until(|state| !state.cut.contains(&wire(COORDINATOR, to)))
                .await;
        });
        Ok(TokioIo::new(client))
    }

    async fn carry(
        &self,
        mut from: ReadHalf<DuplexStream>,
        mut to: WriteHalf<DuplexStream>,
        sender: usize,
        receiver: usize,
    ) {
        let mut bytes = vec![0; 16 * 1024];
        while let Ok(count @ 1..) = from.read(&mut bytes).await {
            self.travel(sender, receiver).await;
            if to.write_all(&bytes[..count]).await.is_err() {
                return;
            }
        }
        let _ = to.shutdown().await;
    }
}
