//! What only rdma has: a link that is cut or loses packets under a transfer, and slots that are bound again.

use super::support::{Event, Node, NodeOptions, Rdma, geometry};
use super::{EPOCH, assert_free, claim, ids, pair, scattered};
use baton_kv_transfer::transport::{Path, PathError};
use baton_types::{BlockId, Epoch};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Changes the link by the functions of the file that `BATON_TEST_RDMA_LINK` names.
fn link(change: &str) {
    let functions =
        std::env::var("BATON_TEST_RDMA_LINK").expect("BATON_TEST_RDMA_LINK names a file that cuts the link");
    let status = Command::new("sh")
        .args(["-c", &format!(". {functions}; {change}")])
        .status();
    assert!(status.expect("sh runs").success(), "{change}");
}

/// Longer than any of the verbs' own bounds, on a slow machine.
const BOUND: Duration = Duration::from_secs(30);

async fn connect(writer: &Node, receiver: &Node) -> Arc<dyn Path> {
    let begun = Instant::now();
    loop {
        match writer
            .transport
            .connect(&receiver.peer(), &receiver.transport.address())
            .await
        {
            Ok(path) => return path,
            Err(error) => assert!(begun.elapsed() < BOUND && error.is_retryable(), "{error}"),
        }
        // The port says by itself when it is active again; nobody can be asked to tell.
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

async fn cut(how: &str) {
    let Some(kind) = Rdma::here() else { return };
    link("link_heal");
    let options = NodeOptions {
        bytes_in_flight_max: 4 << 20,
        ..NodeOptions::new(geometry(4, 64 << 10), 64)
    };
    let (writer, receiver) = pair(&kind, &options).await;
    let path = connect(&writer, &receiver).await;
    let claim = claim();
    let extents = |to: &[BlockId]| {
        let all = to.iter().zip(0..);
        all.map(|(to, i)| writer.extent(i, 0..4, BlockId(i), *to, &claim))
            .collect()
    };
    // One hand-over after the other, so that the cut comes into the middle of one however long it takes to make.
    let write = async {
        for epoch in 1.. {
            receiver.book.grant(Epoch(epoch), writer.instance(), ids(0..64));
            if let Err(error) = path.write(Epoch(epoch), extents(&ids(0..64))).await {
                return (epoch, error);
            }
        }
        unreachable!("a cut link ends the path")
    };
    let cutting = async {
        while receiver.book.claims_ever() < 16 {
            tokio::task::yield_now().await;
        }
        let command = format!("link_cut {how}");
        tokio::task::spawn_blocking(move || link(&command)).await.unwrap();
        Instant::now()
    };
    let both = futures::future::join(write, cutting);
    let ended = tokio::time::timeout(2 * BOUND, both).await;
    let ((epoch, error), cut) = ended.expect("a cut link ends the path");
    println!("{how}: in hand-over {epoch}: {error} within {:?}", cut.elapsed());
    assert!(matches!(error, PathError::Lost { .. }), "{error:?}");
    path.close().await;
    assert_free(&claim);
    // Proof, whatever the receiver's device noticed: its queue pairs are destroyed.
    receiver.transport.disconnect_instance(writer.instance()).await;
    let closed = |events: &[Event]| events.iter().filter(|event| matches!(event, Event::Closed(_))).count();
    assert_eq!(closed(&receiver.book.events()), 2);

    link("link_heal");
    let path = connect(&writer, &receiver).await;
    let to = scattered(64);
    let again = Epoch(epoch + 1);
    receiver.book.grant(again, writer.instance(), to.clone());
    path.write(again, extents(&to)).await.unwrap();
    receiver.book.wait_arrived(again, 256).await;
    let expected: Vec<_> = to.iter().zip(0..).map(|(to, i)| (*to, BlockId(i), 0..4)).collect();
    receiver.assert_holds(&writer, &expected);
    assert_free(&claim);
    writer.end().await;
    receiver.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn cut_at_the_writer() {
    cut("near").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn cut_at_the_receiver() {
    cut("far").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn cut_without_a_word() {
    cut("silent").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn lost_packets_are_sent_again() {
    let Some(kind) = Rdma::here() else { return };
    link("link_heal");
    let (writer, receiver) = pair(&kind, &NodeOptions::new(geometry(2, 32 << 10), 32)).await;
    receiver.book.grant(EPOCH, writer.instance(), scattered(32));
    let path = connect(&writer, &receiver).await;
    let claim = claim();
    let to = scattered(32);
    let all = to.iter().zip(0..);
    let extents = all
        .map(|(to, i)| writer.extent(i, 0..2, BlockId(i), *to, &claim))
        .collect();
    link("link_lose 1%");
    let written = path.write(EPOCH, extents).await;
    link("link_heal");
    written.unwrap();
    receiver.book.wait_arrived(EPOCH, 64).await;
    let expected: Vec<_> = to.iter().zip(0..).map(|(to, i)| (*to, BlockId(i), 0..2)).collect();
    receiver.assert_holds(&writer, &expected);
    writer.end().await;
    receiver.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn slots_are_bound_again_after_all_were() {
    let Some(kind) = Rdma::here() else { return };
    link("link_heal");
    let options = NodeOptions {
        connections: 1,
        ..NodeOptions::new(geometry(1, 64), 8)
    };
    let (writer, receiver) = pair(&kind, &options).await;
    let path = connect(&writer, &receiver).await;
    let claim = claim();
    let epochs = 4096 + 300;
    for epoch in 0..epochs {
        let block = BlockId((epoch % 8) as u32);
        receiver.book.grant(Epoch(epoch), writer.instance(), vec![block]);
        path.write(Epoch(epoch), vec![writer.extent(0, 0..1, block, block, &claim)])
            .await
            .unwrap();
    }
    for epoch in 0..epochs {
        receiver.book.wait_arrived(Epoch(epoch), 1).await;
    }
    assert_eq!(receiver.book.events(), []);
    writer.end().await;
    receiver.end().await;
}
