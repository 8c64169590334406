//! One node as a process of its own: this test binary, started again. It does what it is told on its standard input, a line
//! at a time, and says what came of it on its standard output, in lines that begin with `@`.

use crate::nodes::{self, GEOMETRY, Node, TestTable, ended, identity, until};
use crate::plan::{GivenUp, Moment, Plan, SHARED_BLOCKS, shared_content, shared_hash};
use baton_kv_transfer::{EndpointOptions, Incoming, IncomingEvent, OutgoingSpec, PathKind, Peer, TransferError};
use baton_types::{Attempt, Instance, NodeId};
use bytes::Bytes;
use std::any::Any;
use std::collections::HashMap;
use std::io::{BufRead, Write};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::sync::{mpsc, oneshot};

/// Says which path it takes; without it there is no such process to be.
pub const PATH: &str = "BATON_TEST_PEER";
pub const SEED: &str = "BATON_TEST_PEER_SEED";
pub const BLOCKS: &str = "BATON_TEST_PEER_BLOCKS";

/// Long enough for a slow machine, short enough to be waited for: death after a second of silence.
fn options(path: PathKind) -> EndpointOptions {
    let defaults = EndpointOptions::default();
    EndpointOptions {
        keep_alive: Duration::from_millis(500),
        fence_timeout: Duration::from_millis(500),
        reservation_lease: defaults.reservation_lease,
        progress_timeout: defaults.progress_timeout,
        // What is remembered of past hand-overs is bounded by this, and full soon.
        handovers_max: 128,
        ..nodes::options(path)
    }
}

fn say(line: &str) {
    let mut out = std::io::stdout().lock();
    // The test that listens may be gone; then so is this process, soon.
    let _ = writeln!(out, "@{line}");
    let _ = out.flush();
}

struct Process {
    node: Node,
    seed: u64,
    peers: Mutex<HashMap<String, Peer>>,
    drops: Mutex<HashMap<u64, oneshot::Sender<()>>>,
}

/// Not a test: the process that the others start.
#[test]
fn peer_process() {
    let Ok(path) = std::env::var(PATH) else { return };
    let path: PathKind = path.parse().unwrap();
    let [seed, blocks] = [SEED, BLOCKS].map(|name| std::env::var(name).unwrap().parse().unwrap());
    rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL)).unwrap();
    let usual = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        usual(info);
        std::process::exit(70);
    }));
    tracing_subscriber::fmt()
        .with_max_level(tracing::Level::INFO)
        .with_writer(std::io::stderr)
        .with_ansi(false)
        .init();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        // Each new thread takes memory that has nothing to do with what is kept.
        .max_blocking_threads(4)
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(run(path, seed, blocks));
}

async fn run(path: PathKind, seed: u64, blocks: u64) {
    let node = Node::with(options(path), identity(GEOMETRY), blocks as usize).await;
    for ordinal in 0..SHARED_BLOCKS {
        let block = node.pool.cache(shared_hash(ordinal));
        node.fill(block, shared_content(ordinal));
    }
    let peer = node.endpoint.peer();
    say(&format!(
        "peer {} {} {}",
        peer.node,
        peer.instance.0,
        peer.addresses.join(",")
    ));
    let process = Arc::new(Process {
        node,
        seed,
        peers: Mutex::default(),
        drops: Mutex::default(),
    });
    let (sender, mut lines) = mpsc::unbounded_channel();
    std::thread::spawn(move || {
        for line in std::io::stdin().lock().lines().map_while(Result::ok) {
            if sender.send(line).is_err() {
                break;
            }
        }
    });
    while let Some(line) = lines.recv().await {
        let words: Vec<&str> = line.split(' ').collect();
        match words[..] {
            ["quit"] => break,
            ["to", name, node, instance, addresses] => {
                let peer = Peer {
                    node: NodeId::new(node),
                    instance: Instance(instance.parse().unwrap()),
                    addresses: addresses.split(',').map(str::to_owned).collect(),
                };
                process.peers.lock().unwrap().insert(name.to_owned(), peer);
            }
            ["drop", number] => {
                let gone = process.drops.lock().unwrap().remove(&number.parse().unwrap());
                if let Some(gone) = gone {
                    // It may have ended meanwhile.
                    let _ = gone.send(());
                }
            }
            ["expect", kind, number] => process.expect(kind, number.parse().unwrap()),
            ["send", kind, to, number] => process.send(kind, to, number.parse().unwrap()),
            ["stats"] => {
                let stats = process.node.endpoint.stats();
                say(&format!(
                    "stats {} {} {} {}",
                    stats.handovers_in, stats.handovers_out, stats.reserved_blocks, stats.quarantined_blocks
                ));
            }
            ["clean"] => {
                process.node.is_clean().await;
                say(&format!("clean {}", process.node.supervisor.tasks()));
            }
            _ => panic!("`{line}` is no order"),
        }
    }
    let process = Arc::into_inner(process).expect("nothing runs after the last order");
    process.node.end().await;
    say("bye");
}

fn plan(seed: u64, kind: &str, number: u64) -> Plan {
    match kind {
        "long" => Plan::long(seed, number),
        "whole" => Plan::whole(seed, number),
        _ => Plan::of(seed, number),
    }
}

impl Process {
    fn expect(self: &Arc<Self>, kind: &str, number: u64) {
        let plan = plan(self.seed, kind, number);
        let (gone, dropped) = oneshot::channel();
        self.drops.lock().unwrap().insert(number, gone);
        let incoming = self
            .node
            .expect_with(plan.ticket, plan.tokens, plan.hashes(), Duration::from_secs(120));
        say(&format!("expecting {number}"));
        let this = Arc::clone(self);
        tokio::spawn(async move {
            let end = tokio::select! {
                end = this.receive(&plan, incoming) => end,
                _ = dropped => "dropped".to_owned(),
            };
            this.drops.lock().unwrap().remove(&number);
            this.node.endpoint.room_changed();
            // Whoever hears of the last end may tell this process to quit.
            drop(this);
            say(&format!("in {number} {end}"));
        });
    }

    async fn receive(&self, plan: &Plan, mut incoming: Incoming) -> String {
        let received = match plan.given_up {
            GivenUp::ByReceiver(moment) => match self.reach(moment, &mut incoming).await {
                None => return "dropped".to_owned(),
                Some(end) => end,
            },
            GivenUp::Superseded(moment) => match self.reach(moment, &mut incoming).await {
                None => {
                    incoming.supersede(Plan::second());
                    ended(&mut incoming).await
                }
                Some(end) => end,
            },
            _ => ended(&mut incoming).await,
        };
        match received {
            Err((attempt, error)) => format!("failed {} {error}", attempt.0),
            Ok(received) => {
                self.check(plan, &received.table);
                assert_eq!(received.payload, plan.payload()[..], "the payload is another's");
                format!("committed {}", received.attempt.0)
            }
        }
    }

    /// Waits for a moment of a hand-over; gives its end where that comes first.
    async fn reach(
        &self,
        moment: Moment,
        incoming: &mut Incoming,
    ) -> Option<Result<nodes::Received, (Attempt, TransferError)>> {
        match moment {
            Moment::After(micros) => tokio::select! {
                () = tokio::time::sleep(Duration::from_micros(micros)) => None,
                end = ended(incoming) => Some(end),
            },
            Moment::Granted => match incoming.next().await {
                IncomingEvent::AttemptFailed { attempt, error } => Some(Err((attempt, error))),
                _ => None,
            },
            Moment::FirstBlock => loop {
                match incoming.next().await {
                    IncomingEvent::Granted { .. } => {}
                    IncomingEvent::AttemptFailed { attempt, error } => return Some(Err((attempt, error))),
                    IncomingEvent::FirstBlock | IncomingEvent::Committed { .. } => return None,
                }
            },
        }
    }

    /// Every block of the context holds what its sender wrote.
    fn check(&self, plan: &Plan, table: &TestTable) {
        let blocks = table.blocks();
        for ordinal in 0..GEOMETRY.blocks_for(plan.tokens) as u32 {
            let block = blocks[ordinal as usize];
            assert!(
                self.node.holds(block, plan.content(ordinal)),
                "block {ordinal} of {plan:?} holds something else"
            );
        }
    }

    fn send(self: &Arc<Self>, kind: &str, to: &str, number: u64) {
        let plan = plan(self.seed, kind, number);
        let peer = self.peers.lock().unwrap()[to].clone();
        let this = Arc::clone(self);
        tokio::spawn(async move {
            let mut end = this.attempt(&plan, peer.clone(), Attempt::FIRST).await;
            if matches!((&end, plan.given_up), (Some(Err(_)), GivenUp::Superseded(_))) {
                end = this.attempt(&plan, peer, Plan::second()).await;
            }
            let end = match end {
                None => "dropped".to_owned(),
                Some(Ok(path)) => format!("ok {path}"),
                Some(Err(error)) => format!("failed {error}"),
            };
            drop(this);
            say(&format!("out {number} {end}"));
        });
    }

    /// None where the plan has it given up.
    async fn attempt(&self, plan: &Plan, peer: Peer, attempt: Attempt) -> Option<Result<PathKind, TransferError>> {
        let mut outgoing = self.node.endpoint.open(OutgoingSpec {
            peer,
            ticket: plan.ticket,
            attempt,
            context_tokens: plan.tokens,
            deadline: Duration::from_secs(60),
        });
        if plan.given_up == GivenUp::BeforeReserve {
            return None;
        }
        let granted = match outgoing.reserve().await {
            Ok(granted) => granted,
            Err(error) => return Some(Err(error)),
        };
        if plan.given_up == GivenUp::AfterGrant {
            return None;
        }
        let count = GEOMETRY.blocks_for(plan.tokens);
        // Claims of what was given up may live for a while.
        until("there are source blocks", || self.node.pool.free() >= count).await;
        let table = self.node.pool.acquire(count);
        let blocks = table.blocks();
        for (ordinal, block) in (0..).zip(&blocks) {
            self.node.fill(*block, plan.content(ordinal));
        }
        let claim: Arc<dyn Any + Send + Sync> = Arc::new(table);
        for (pushed, ordinal) in (0..).zip(granted.wanted) {
            if plan.given_up == GivenUp::MidPush(pushed) {
                return None;
            }
            if !plan.pause.is_zero() {
                tokio::time::sleep(plan.pause).await;
            }
            let block = blocks[ordinal as usize];
            // Whole blocks or layer by layer.
            let step = if plan.content(ordinal).is_multiple_of(3) {
                1
            } else {
                GEOMETRY.layers
            };
            for first in (0..GEOMETRY.layers).step_by(step as usize) {
                if let Err(error) = outgoing.push(ordinal, first..first + step, block, Arc::clone(&claim)) {
                    return Some(Err(error));
                }
            }
        }
        drop(claim);
        let completing =
            |outgoing: baton_kv_transfer::Outgoing| outgoing.complete(Bytes::copy_from_slice(&plan.payload()));
        match plan.given_up {
            GivenUp::BeforeComplete | GivenUp::MidPush(_) => None,
            GivenUp::WhileCompleting(micros) => tokio::select! {
                () = tokio::time::sleep(Duration::from_micros(micros)) => None,
                report = completing(outgoing) => Some(report.map(|report| report.path)),
            },
            _ => Some(completing(outgoing).await.map(|report| report.path)),
        }
    }
}
