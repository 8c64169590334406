//! Shared memory between real processes: a writer that is killed, stopped, or told to go.
//!
//! The writer is this very program, started again to run [`writer_process`] alone. It is told what to do over its standard
//! input and answers on its standard error, a line each.

#![allow(unsafe_code)]

use crate::closed;
use crate::support::{Node, NodeOptions, Shm, geometry};
use baton_kv_transfer::Peer;
use baton_kv_transfer::transport::{ConnectError, PathError};
use baton_types::{BlockId, Epoch, Instance, NodeId};
use rustix::process::{Pid, Signal, WaitOptions, kill_process, waitpid};
use std::io::BufRead;
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines};
use tokio::process::{Child, ChildStderr, ChildStdin, Command};

const BLOCKS: u32 = 16;
const LAYERS: u32 = 4;
/// How long a thing that must not happen is awaited.
const NEVER: Duration = Duration::from_millis(200);
/// Far more than anything here takes.
const LONG: Duration = Duration::from_secs(60);

fn options() -> NodeOptions {
    NodeOptions::new(geometry(LAYERS, 64 << 10), BLOCKS)
}

/// A writer in a process of its own.
struct Writer {
    child: Child,
    orders: ChildStdin,
    answers: Lines<BufReader<ChildStderr>>,
    instance: Instance,
}

impl Writer {
    /// Starts it; it has connected to the receiver, and writes under epoch 1 for as long as it can.
    async fn start(receiver: &Node) -> Self {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "shm_writer::writer_process", "--ignored", "--nocapture"])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        let orders = child.stdin.take().unwrap();
        let answers = BufReader::new(child.stderr.take().unwrap()).lines();
        let mut writer = Self {
            child,
            orders,
            answers,
            instance: Instance(0),
        };
        let order = format!("{} {}", receiver.instance().0, receiver.transport.address());
        writer.order(&order).await;
        writer.instance = Instance(writer.answer("instance").await.parse().unwrap());
        for epoch in [1, 2] {
            let half = BLOCKS / 2;
            let blocks = (half * (epoch - 1)..half * epoch).map(BlockId).collect();
            receiver.book.grant(Epoch(epoch.into()), writer.instance, blocks);
        }
        writer.order("write").await;
        receiver
            .book
            .wait_arrived(Epoch(1), (BLOCKS / 2 * LAYERS) as usize)
            .await;
        writer
    }

    async fn order(&mut self, order: &str) {
        self.orders.write_all(format!("{order}\n").as_bytes()).await.unwrap();
    }

    /// The next answer that begins so; the rest of it.
    async fn answer(&mut self, what: &str) -> String {
        let answer = async {
            while let Some(line) = self.answers.next_line().await.unwrap() {
                if let Some(rest) = line.strip_prefix(what) {
                    return rest.trim().to_owned();
                }
                println!("writer: {line}");
            }
            panic!("the writer ended without `{what}`");
        };
        tokio::time::timeout(LONG, answer).await.unwrap()
    }

    fn signal(&self, signal: Signal) {
        kill_process(self.pid(), signal).unwrap();
    }

    fn pid(&self) -> Pid {
        Pid::from_raw(self.child.id().unwrap().cast_signed()).unwrap()
    }

    /// Stops it: none of its threads runs any more.
    fn stop(&self) {
        self.signal(Signal::STOP);
        let (_, status) = waitpid(Some(self.pid()), WaitOptions::UNTRACED).unwrap().unwrap();
        assert!(status.stopped(), "{status:?}");
    }
}

/// The writer's life, in its own process.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "the other tests start it as a process"]
async fn writer_process() {
    let order = || {
        let mut line = String::new();
        std::io::stdin().lock().read_line(&mut line).unwrap();
        line.trim().to_owned()
    };
    let Some((instance, address)) = order().split_once(' ').map(|(i, a)| (i.to_owned(), a.to_owned())) else {
        return;
    };
    let peer = Peer {
        node: NodeId::new("node"),
        instance: Instance(instance.parse().unwrap()),
        addresses: vec![address.clone()],
    };
    let node = Node::start(&Shm::default(), &options()).await;
    node.fill();
    eprintln!("instance {}", node.instance().0);
    for epoch in [1, 2] {
        assert_eq!(order(), "write");
        let path = match node.transport.connect(&peer, &address).await {
            Ok(path) => path,
            Err(error) => return eprintln!("refused {error}"),
        };
        let claim: Arc<()> = Arc::new(());
        let error = loop {
            let extents = (0..BLOCKS / 2).map(|ordinal| {
                let to = BlockId(ordinal + (epoch - 1) * BLOCKS / 2);
                node.extent(ordinal, 0..LAYERS, to, to, &(claim.clone() as _))
            });
            if let Err(error) = path.write(Epoch(epoch.into()), extents.collect()).await {
                break error;
            }
            // Not to fill the receiver's book with duplicates.
            tokio::time::sleep(Duration::from_millis(1)).await;
        };
        // It goes on trying.
        for _ in 0..10 {
            let extent = node.extent(0, 0..LAYERS, BlockId(0), BlockId(0), &(claim.clone() as _));
            assert!(path.write(Epoch(epoch.into()), vec![extent]).await.is_err());
        }
        assert!(matches!(error, PathError::Lost { .. }), "{error}");
        eprintln!("lost {error}");
    }
}

/// Fills the blocks of an epoch with ones, as their next owner would.
fn reuse(receiver: &Node, blocks: std::ops::Range<u32>) {
    for block in blocks {
        let ones = vec![1; receiver.view.geometry().block_bytes()];
        // SAFETY: no epoch is live, and it is proven that nobody else writes.
        unsafe { receiver.view.write(BlockId(block), 0, &ones).unwrap() };
    }
}

fn assert_reused(receiver: &Node, blocks: std::ops::Range<u32>) {
    for block in blocks {
        for layer in 0..LAYERS {
            assert!(
                receiver.layer(BlockId(block), layer).iter().all(|byte| *byte == 1),
                "{block} was written late"
            );
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_killed_writer_is_proven_dead() {
    let receiver = Node::start(&Shm::default(), &options()).await;
    let mut writer = Writer::start(&receiver).await;
    assert_eq!(closed(&receiver.book.events()), 0);
    writer.signal(Signal::KILL);
    receiver
        .book
        .wait_events("proof of death", |events| closed(events) == 1)
        .await;
    reuse(&receiver, 0..BLOCKS / 2);
    writer.child.wait().await.unwrap();
    assert_reused(&receiver, 0..BLOCKS / 2);
    receiver.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_stopped_writer_keeps_its_blocks_until_it_goes_on() {
    let receiver = Node::start(&Shm::default(), &options()).await;
    let mut writer = Writer::start(&receiver).await;
    writer.stop();
    let mut disconnected = receiver.transport.disconnect_instance(writer.instance);
    assert!(
        tokio::time::timeout(NEVER, &mut disconnected).await.is_err(),
        "no proof can have come"
    );
    assert_eq!(closed(&receiver.book.events()), 0);

    // Another connection of that process would be no better than the one it has.
    let namesake = Node::start_as(&Shm::default(), &options(), writer.instance).await;
    let refused = namesake
        .transport
        .connect(&receiver.peer(), &receiver.transport.address())
        .await;
    match refused.map(|_| ()) {
        Err(error @ ConnectError::Handshake { reason, .. }) => {
            assert!(reason.contains("not proven") && error.is_retryable(), "{error}");
        }
        other => panic!("{other:?}"),
    }
    namesake.end().await;

    writer.signal(Signal::CONT);
    tokio::time::timeout(LONG, disconnected).await.unwrap();
    assert_eq!(closed(&receiver.book.events()), 1);
    reuse(&receiver, 0..BLOCKS / 2);
    writer.answer("lost").await;
    assert_reused(&receiver, 0..BLOCKS / 2);

    writer.order("write").await;
    receiver
        .book
        .wait_arrived(Epoch(2), (BLOCKS / 2 * LAYERS) as usize)
        .await;
    writer.signal(Signal::KILL);
    receiver
        .book
        .wait_events("proof of death", |events| closed(events) == 2)
        .await;
    assert_reused(&receiver, 0..BLOCKS / 2);
    receiver.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_stopped_writer_that_is_killed_is_proven_dead() {
    let receiver = Node::start(&Shm::default(), &options()).await;
    let writer = Writer::start(&receiver).await;
    writer.stop();
    let mut disconnected = receiver.transport.disconnect_instance(writer.instance);
    assert!(
        tokio::time::timeout(NEVER, &mut disconnected).await.is_err(),
        "no proof can have come"
    );
    writer.signal(Signal::KILL);
    tokio::time::timeout(LONG, disconnected).await.unwrap();
    assert_eq!(closed(&receiver.book.events()), 1);
    receiver.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_stopped_writer_does_not_hold_up_the_end_of_the_process() {
    let receiver = Node::start(&Shm::impatient(), &options()).await;
    let writer = Writer::start(&receiver).await;
    writer.stop();
    let book = Arc::clone(&receiver.book);
    tokio::time::timeout(LONG, receiver.end()).await.unwrap();
    assert_eq!(closed(&book.events()), 0, "nothing was proven");
    writer.signal(Signal::KILL);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_receiver_that_ends_is_lost_to_its_writers() {
    let receiver = Node::start(&Shm::default(), &options()).await;
    let mut writer = Writer::start(&receiver).await;
    receiver.end().await;
    writer.answer("lost").await;
}
