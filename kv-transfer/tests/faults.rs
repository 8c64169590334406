//! Hand-overs that go wrong, over memory and over tcp: given up on either side at each stage, superseded in mid write,
//! processes that end, senders that say nothing, deadlines. Afterwards every block is back, on both sides.

mod nodes;

use baton_kv_transfer::{EndpointOptions, IncomingEvent, Outgoing, OutgoingSpec, PathKind, Peer, TransferError};
use baton_types::{Attempt, KvDtype, KvGeometry, Ticket};
use bytes::Bytes;
use nodes::proxy::Proxy;
use nodes::{Node, PATIENCE, committed, failure, identity, options, send, source, until};
use std::sync::Arc;
use std::time::Duration;

const PATHS: [PathKind; 2] = [PathKind::Memory, PathKind::Tcp];

/// How far a hand-over goes before it is given up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Stage {
    Opened,
    WaitsForRoom,
    Granted,
    HalfPushed,
    Pushed,
    Completing,
}

const STAGES: [Stage; 6] = [
    Stage::Opened,
    Stage::WaitsForRoom,
    Stage::Granted,
    Stage::HalfPushed,
    Stage::Pushed,
    Stage::Completing,
];

#[tokio::test(flavor = "multi_thread")]
async fn given_up_by_the_sender_at_each_stage() {
    for path in PATHS {
        let (p, d) = (Node::start(path, 16).await, Node::start(path, 16).await);
        for stage in STAGES {
            let ticket = Ticket::random();
            let mut incoming = d.expect(ticket, 18);
            let kv = source(&p, 18, 7);
            let mut outgoing = p.open(&d, ticket, 18);
            let running = (stage == Stage::WaitsForRoom).then(|| d.pool.acquire(12));
            if stage == Stage::WaitsForRoom {
                let asking = tokio::spawn(async move { outgoing.reserve().await });
                until("the ask waits", || d.endpoint.stats().queued_asks == 1).await;
                asking.abort();
                assert!(matches!(failure(&mut incoming).await, TransferError::Aborted { .. }));
            } else if stage == Stage::Opened {
                drop(outgoing);
                drop(incoming);
                continue;
            } else {
                outgoing.reserve().await.unwrap();
                let pushed = match stage {
                    Stage::Opened | Stage::WaitsForRoom | Stage::Granted => 0,
                    Stage::HalfPushed => 2,
                    Stage::Pushed => 5,
                    Stage::Completing => 4,
                };
                for ordinal in 0..pushed {
                    kv.push(&outgoing, ordinal).unwrap();
                }
                if stage == Stage::Completing {
                    let error = outgoing.complete(Bytes::new()).await.unwrap_err();
                    assert!(matches!(error, TransferError::Protocol { .. }), "{error}");
                } else {
                    drop(outgoing);
                }
                let error = failure(&mut incoming).await;
                assert!(
                    matches!(error, TransferError::Aborted { .. } | TransferError::Protocol { .. }),
                    "{error}"
                );
            }
            drop((incoming, running, kv));
            p.is_clean().await;
            d.is_clean().await;
        }
        p.end().await;
        d.end().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn given_up_by_the_receiver_at_each_stage() {
    for path in PATHS {
        let (p, d) = (Node::start(path, 16).await, Node::start(path, 16).await);
        for stage in STAGES {
            let ticket = Ticket::random();
            let incoming = d.expect(ticket, 18);
            let kv = source(&p, 18, 7);
            let mut outgoing = p.open(&d, ticket, 18);
            let running = (stage == Stage::WaitsForRoom).then(|| d.pool.acquire(12));
            let error = match stage {
                Stage::Opened => {
                    drop(incoming);
                    outgoing.reserve().await.unwrap_err()
                }
                Stage::WaitsForRoom => {
                    let asking = tokio::spawn(async move { outgoing.reserve().await.unwrap_err() });
                    until("the ask waits", || d.endpoint.stats().queued_asks == 1).await;
                    drop(incoming);
                    asking.await.unwrap()
                }
                Stage::Granted | Stage::HalfPushed | Stage::Pushed => {
                    outgoing.reserve().await.unwrap();
                    for ordinal in 0..[0, 2, 5][stage as usize - Stage::Granted as usize] {
                        kv.push(&outgoing, ordinal).unwrap();
                    }
                    drop(incoming);
                    let error = outgoing.failed().await;
                    assert_eq!(kv.push(&outgoing, 4), Err(error.clone()));
                    error
                }
                Stage::Completing => {
                    outgoing.reserve().await.unwrap();
                    kv.push_all(&outgoing).unwrap();
                    // Either the commit or the cancel is first; nothing else may come of it.
                    let completing = tokio::spawn(outgoing.complete(Bytes::new()));
                    drop(incoming);
                    match completing.await.unwrap() {
                        Ok(_) => TransferError::UnknownTicket,
                        Err(error) => error,
                    }
                }
            };
            assert!(
                matches!(error, TransferError::Aborted { .. } | TransferError::UnknownTicket),
                "{stage:?}: {error}"
            );
            drop((running, kv));
            p.is_clean().await;
            d.is_clean().await;
        }
        p.end().await;
        d.end().await;
    }
}

/// Blocks so large that writing one takes a while.
const LARGE: KvGeometry = KvGeometry {
    layers: 4,
    kv_heads: 8,
    head_dim: 2048,
    block_tokens: 16,
    dtype: KvDtype::F32,
};

#[tokio::test(flavor = "multi_thread")]
async fn a_superseded_writer_never_writes_into_the_next_ones_blocks() {
    for path in PATHS {
        for round in 0..5u64 {
            let start = |blocks| Node::with(options(path), identity(LARGE), blocks);
            let (p1, p2, d) = (start(3).await, start(3).await, start(4).await);
            let ticket = Ticket::random();
            let mut incoming = d.expect(ticket, 48);
            let (old, new) = (source(&p1, 48, 1000), source(&p2, 48, 2000));
            let mut first = p1.open(&d, ticket, 48);
            first.reserve().await.unwrap();
            old.push_all(&first).unwrap();
            // Somewhere in the middle of the first writer's blocks.
            for _ in 0..round * 3 {
                tokio::task::yield_now().await;
            }
            incoming.supersede(Attempt(2));
            // The arena has room for one of them only: the second gets the very blocks of the first, once it is fenced.
            let second = p2.open_attempt(&d, ticket, Attempt(2), 48);
            let (sent, received) = tokio::join!(send(second, &new), committed(&mut incoming));
            sent.unwrap();
            assert_eq!(received.attempt, Attempt(2));
            let of_the_first = received.held;
            let check = |received: &nodes::Received| {
                for (ordinal, block) in received.table.blocks()[..3].iter().enumerate() {
                    // What had arrived whole is the first one's, and stays.
                    let seed = if ordinal < of_the_first { 1000 } else { 2000 };
                    assert!(
                        d.holds(*block, seed + ordinal as u64),
                        "block {ordinal} holds something else"
                    );
                }
            };
            check(&received);
            let error = first.failed().await;
            assert_eq!(error, TransferError::Fenced);
            assert!(!error.is_retryable());
            // However late the first one's last bytes come, they go nowhere.
            p1.endpoint.shutdown().await;
            check(&received);
            assert!(d.pool.was_quarantined() > 0 || of_the_first > 0);
            drop((received, incoming, first, old, new));
            p2.end().await;
            d.end().await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_later_attempt_after_the_commit_is_told_so() {
    let (p1, p2) = (Node::start(PathKind::Tcp, 8).await, Node::start(PathKind::Tcp, 8).await);
    let d = Node::start(PathKind::Tcp, 16).await;
    let ticket = Ticket::random();
    let mut incoming = d.expect(ticket, 9);
    let kv = source(&p1, 9, 3);
    let (sent, received) = tokio::join!(send(p1.open(&d, ticket, 9), &kv), committed(&mut incoming));
    sent.unwrap();
    let error = p2.open_attempt(&d, ticket, Attempt(2), 9).reserve().await.unwrap_err();
    assert_eq!(error, TransferError::AlreadyCommitted);
    drop(incoming);
    let error = p2.open_attempt(&d, ticket, Attempt(3), 9).reserve().await.unwrap_err();
    assert_eq!(error, TransferError::AlreadyCommitted, "even when the request is over");
    drop((received, kv));
    for node in [p1, p2, d] {
        node.end().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_attempt_that_failed_is_followed_by_another() {
    for path in PATHS {
        let (p, d) = (Node::start(path, 16).await, Node::start(path, 16).await);
        let ticket = Ticket::random();
        let mut incoming = d.expect(ticket, 18);
        let kv = source(&p, 18, 50);
        for attempt in 1..4 {
            let mut outgoing = p.open_attempt(&d, ticket, Attempt(attempt), 18);
            outgoing.reserve().await.unwrap();
            kv.push(&outgoing, 1).unwrap();
            drop(outgoing);
            let (failed, _) = nodes::ended(&mut incoming).await.err().expect("a failure");
            assert_eq!(failed, Attempt(attempt));
            incoming.supersede(failed.next());
        }
        let last = p.open_attempt(&d, ticket, Attempt(4), 18);
        let (sent, received) = tokio::join!(send(last, &kv), committed(&mut incoming));
        sent.unwrap();
        received.check(&d, 18, 50);
        drop((received, incoming, kv));
        p.end().await;
        d.end().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_receivers_end_is_seen_by_the_sender() {
    for path in PATHS {
        let (p, d) = (Node::start(path, 16).await, Node::start(path, 16).await);
        let (ticket, waiting) = (Ticket::random(), Ticket::random());
        let mut incoming = d.expect(ticket, 18);
        let incoming_too = d.expect(waiting, 60);
        let kv = source(&p, 18, 7);
        let mut outgoing = p.open(&d, ticket, 18);
        let mut asking = p.open(&d, waiting, 60);
        outgoing.reserve().await.unwrap();
        kv.push(&outgoing, 0).unwrap();
        let asking = tokio::spawn(async move { asking.reserve().await });
        until("the ask waits", || d.endpoint.stats().queued_asks == 1).await;
        d.endpoint.shutdown().await;
        assert_eq!(d.pool.free(), 16, "nothing is left in quarantine");
        assert_eq!(failure(&mut incoming).await, TransferError::ShuttingDown);
        for error in [outgoing.failed().await, asking.await.unwrap().unwrap_err()] {
            let expected = matches!(error, TransferError::PeerGone { .. } | TransferError::ShuttingDown);
            assert!(expected && error.is_retryable(), "{error}");
        }
        drop((outgoing, kv, incoming, incoming_too));
        // A new process at another address is a new peer.
        let next = Node::start(path, 16).await;
        let ticket = Ticket::random();
        let (mut incoming, kv) = (next.expect(ticket, 9), source(&p, 9, 8));
        let (sent, received) = tokio::join!(send(p.open(&next, ticket, 9), &kv), committed(&mut incoming));
        sent.unwrap();
        drop((received, incoming, kv));
        p.end().await;
        next.end().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_senders_end_is_seen_by_the_receiver() {
    for path in PATHS {
        let (p, d) = (Node::start(path, 16).await, Node::start(path, 16).await);
        let ticket = Ticket::random();
        let mut incoming = d.expect(ticket, 18);
        let kv = source(&p, 18, 7);
        let mut outgoing = p.open(&d, ticket, 18);
        outgoing.reserve().await.unwrap();
        kv.push(&outgoing, 0).unwrap();
        // Dropped, not shut down: nobody waits for it.
        let Node { endpoint, pool, .. } = p;
        drop(endpoint);
        let error = failure(&mut incoming).await;
        let expected = matches!(
            error,
            TransferError::PeerGone { .. } | TransferError::PathFailed { .. } | TransferError::Aborted { .. }
        );
        assert!(expected && error.is_retryable(), "{error}");
        assert_eq!(outgoing.failed().await, TransferError::ShuttingDown);
        drop((outgoing, kv, incoming));
        until("the source blocks are back", || pool.free() == 16).await;
        d.end().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn slow_compute_keeps_its_grant() {
    for path in PATHS {
        let (p, d) = (Node::start(path, 16).await, Node::start(path, 16).await);
        let ticket = Ticket::random();
        let mut incoming = d.expect(ticket, 18);
        let kv = source(&p, 18, 7);
        let mut outgoing = p.open(&d, ticket, 18);
        outgoing.reserve().await.unwrap();
        // Twice the lease of 400 ms between two pushes: this is what the lease is renewed for.
        for ordinal in 0..5 {
            kv.push(&outgoing, ordinal).unwrap();
            if ordinal % 2 == 0 {
                tokio::time::sleep(Duration::from_millis(800)).await;
            }
        }
        let (report, received) = tokio::join!(outgoing.complete(Bytes::new()), committed(&mut incoming));
        report.unwrap();
        received.check(&d, 18, 7);
        drop((received, kv, incoming));
        p.end().await;
        d.end().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deadline_ends_it_on_both_sides() {
    for path in PATHS {
        let generous = EndpointOptions {
            reservation_lease: PATIENCE,
            ..options(path)
        };
        let p = Node::with(generous.clone(), identity(nodes::GEOMETRY), 16).await;
        let d = Node::with(generous, identity(nodes::GEOMETRY), 16).await;
        let deadline = Duration::from_millis(150);
        // The receiver's first.
        let ticket = Ticket::random();
        let mut incoming = d.expect_with(ticket, 18, Vec::new(), deadline);
        let kv = source(&p, 18, 7);
        let mut outgoing = p.open(&d, ticket, 18);
        outgoing.reserve().await.unwrap();
        kv.push(&outgoing, 0).unwrap();
        assert_eq!(failure(&mut incoming).await, TransferError::Deadline);
        assert_eq!(outgoing.failed().await, TransferError::Deadline);
        drop(incoming);
        // The sender's first.
        let ticket = Ticket::random();
        let mut incoming = d.expect(ticket, 18);
        let peer = d.endpoint.peer();
        let spec = OutgoingSpec {
            peer,
            ticket,
            attempt: Attempt::FIRST,
            context_tokens: 18,
            deadline,
        };
        let mut outgoing_too = p.endpoint.open(spec);
        outgoing_too.reserve().await.unwrap();
        kv.push(&outgoing_too, 0).unwrap();
        assert_eq!(outgoing_too.failed().await, TransferError::Deadline);
        assert_eq!(failure(&mut incoming).await, TransferError::Deadline);
        // Nobody ever asks.
        let mut incoming_too = d.expect_with(Ticket::random(), 18, Vec::new(), deadline);
        assert_eq!(failure(&mut incoming_too).await, TransferError::Deadline);
        drop((outgoing, outgoing_too, kv, incoming, incoming_too));
        p.end().await;
        d.end().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn claims_are_kept_until_the_outcome_and_no_longer() {
    for path in PATHS {
        let (p, d) = (Node::start(path, 16).await, Node::start(path, 16).await);
        let ticket = Ticket::random();
        let mut incoming = d.expect(ticket, 18);
        let kv = source(&p, 18, 7);
        let mut outgoing = p.open(&d, ticket, 18);
        outgoing.reserve().await.unwrap();
        kv.push_all(&outgoing).unwrap();
        assert!(
            Arc::strong_count(&kv.claim) > 5,
            "another path might have to send them again"
        );
        let (report, received) = tokio::join!(outgoing.complete(Bytes::new()), committed(&mut incoming));
        report.unwrap();
        until("only the test's own claim is left", || {
            Arc::strong_count(&kv.claim) == 1
        })
        .await;
        drop((received, incoming, kv));
        p.end().await;
        d.end().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn events_come_in_order_and_only_once() {
    let (p, d) = (
        Node::start(PathKind::Tcp, 16).await,
        Node::start(PathKind::Tcp, 16).await,
    );
    let ticket = Ticket::random();
    let mut incoming = d.expect(ticket, 18);
    let kv = source(&p, 18, 7);
    let sent = send(p.open(&d, ticket, 18), &kv).await.unwrap();
    assert_eq!(sent.path, PathKind::Tcp);
    let names: Vec<&str> = [incoming.next().await, incoming.next().await, incoming.next().await]
        .iter()
        .map(|event| match event {
            IncomingEvent::Granted { .. } => "granted",
            IncomingEvent::FirstBlock => "first block",
            IncomingEvent::Committed { .. } => "committed",
            IncomingEvent::AttemptFailed { .. } => "failed",
        })
        .collect();
    assert_eq!(names, ["granted", "first block", "committed"]);
    assert!(
        tokio::time::timeout(Duration::from_millis(50), incoming.next())
            .await
            .is_err(),
        "and nothing after"
    );
    drop((incoming, kv));
    p.end().await;
    d.end().await;
}

/// The receiver's addresses, its tcp data behind a wire that the test has in hand.
async fn behind_a_proxy(d: &Node) -> (Peer, Proxy) {
    let mut peer = d.endpoint.peer();
    let proxy = Proxy::before(peer.address("tcp").expect("a tcp address")).await;
    for address in &mut peer.addresses {
        if address.starts_with("tcp://") {
            *address = format!("tcp://{}", proxy.address);
        }
    }
    (peer, proxy)
}

fn open_to(p: &Node, peer: &Peer, ticket: Ticket, attempt: Attempt) -> Outgoing {
    p.endpoint.open(OutgoingSpec {
        peer: peer.clone(),
        ticket,
        attempt,
        context_tokens: 48,
        deadline: PATIENCE,
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_what_was_sent_is_never_committed() {
    let options = EndpointOptions {
        crc: false,
        ..options(PathKind::Tcp)
    };
    let p = Node::with(options.clone(), identity(LARGE), 3).await;
    let d = Node::with(options, identity(LARGE), 4).await;
    let (peer, proxy) = behind_a_proxy(&d).await;
    let ticket = Ticket::random();
    let mut incoming = d.expect(ticket, 48);
    let kv = source(&p, 48, 100);
    let mut outgoing = open_to(&p, &peer, ticket, Attempt::FIRST);
    outgoing.reserve().await.unwrap();
    proxy.harm();
    kv.push_all(&outgoing).unwrap();
    let (sent, received) = tokio::join!(outgoing.complete(Bytes::new()), failure(&mut incoming));
    for error in [sent.unwrap_err(), received] {
        assert!(matches!(error, TransferError::Corrupt { .. }), "{error}");
        assert!(error.is_retryable());
    }
    // The next attempt gets nothing of it.
    incoming.supersede(Attempt(2));
    let mut outgoing = open_to(&p, &peer, ticket, Attempt(2));
    assert_eq!(outgoing.reserve().await.unwrap().wanted, 0..3);
    kv.push_all(&outgoing).unwrap();
    let (sent, received) = tokio::join!(outgoing.complete(Bytes::new()), committed(&mut incoming));
    sent.unwrap();
    received.check(&d, 48, 100);
    drop((received, incoming, kv));
    p.end().await;
    d.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_only_path_that_breaks_leaves_what_had_arrived_to_the_next_attempt() {
    // With a digest nothing is taken over from another attempt, since no digest would cover it.
    let options = EndpointOptions {
        digest: false,
        ..options(PathKind::Tcp)
    };
    let start = |blocks| Node::with(options.clone(), identity(LARGE), blocks);
    let (p, q, d) = (start(3).await, start(3).await, start(4).await);
    let (peer, proxy) = behind_a_proxy(&d).await;
    let ticket = Ticket::random();
    let mut incoming = d.expect(ticket, 48);
    let (kv, other) = (source(&p, 48, 100), source(&q, 48, 100));
    let mut outgoing = open_to(&p, &peer, ticket, Attempt::FIRST);
    outgoing.reserve().await.unwrap();
    kv.push(&outgoing, 0).unwrap();
    assert!(matches!(incoming.next().await, IncomingEvent::Granted { .. }));
    assert!(matches!(incoming.next().await, IncomingEvent::FirstBlock));
    proxy.cut();
    kv.push(&outgoing, 1).unwrap();
    let error = outgoing.failed().await;
    assert!(matches!(error, TransferError::PathFailed { .. }), "{error}");
    let error = failure(&mut incoming).await;
    assert!(matches!(error, TransferError::PathFailed { .. }), "{error}");
    drop(outgoing);
    // Another sender has only to send the rest.
    incoming.supersede(Attempt(2));
    let mut outgoing = open_to(&q, &d.endpoint.peer(), ticket, Attempt(2));
    let granted = outgoing.reserve().await.unwrap();
    assert_eq!((granted.held, granted.wanted), (1, 1..3));
    other.push_all(&outgoing).unwrap();
    let (sent, received) = tokio::join!(outgoing.complete(Bytes::new()), committed(&mut incoming));
    assert_eq!(sent.unwrap().bytes, 2 * LARGE.block_bytes() as u64);
    assert_eq!(received.held, 1);
    received.check(&d, 48, 100);
    drop((received, incoming, kv, other));
    for node in [p, q, d] {
        node.end().await;
    }
}
