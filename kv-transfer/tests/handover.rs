//! Whole hand-overs between two endpoints in one process, over memory and over tcp: the normal path and its variants.

mod nodes;

use baton_kv_transfer::{
    EndpointOptions, ExpectError, ExpectSpec, IncomingEvent, OutgoingSpec, PathKind, Peer, TransferError,
};
use baton_types::{Attempt, BlockHash, Instance, KvGeometry, ModelFingerprint, NumericsId, Ticket};
use bytes::Bytes;
use nodes::{GEOMETRY, Node, PATIENCE, committed, failure, identity, options, send, source};
use std::sync::Arc;
use std::time::Duration;

const PATHS: [PathKind; 2] = [PathKind::Memory, PathKind::Tcp];

#[tokio::test(flavor = "multi_thread")]
async fn every_byte_arrives_and_every_block_returns() {
    for path in PATHS {
        let (p, d) = (Node::start(path, 16).await, Node::start(path, 16).await);
        let ticket = Ticket::random();
        let mut incoming = d.expect(ticket, 18);
        let kv = source(&p, 18, 100);
        let mut outgoing = p.open(&d, ticket, 18);
        let granted = outgoing.reserve().await.unwrap();
        assert_eq!((granted.held, granted.wanted.clone()), (0, 0..5));
        assert_eq!(outgoing.reserve().await.unwrap(), granted, "the same grant again");
        // Layer by layer, last block first.
        for layer in 0..GEOMETRY.layers {
            for ordinal in (0..5).rev() {
                let claim = Arc::clone(&kv.claim) as _;
                outgoing
                    .push(ordinal, layer..layer + 1, kv.blocks[ordinal as usize], claim)
                    .unwrap();
            }
        }
        let (report, ()) = tokio::join!(outgoing.complete(Bytes::from_static(b"hello")), async {
            assert!(matches!(
                incoming.next().await,
                IncomingEvent::Granted { held: 0, fresh: 6, .. }
            ));
            assert!(matches!(incoming.next().await, IncomingEvent::FirstBlock));
            let received = committed(&mut incoming).await;
            assert_eq!(
                (&received.payload[..], received.held, received.attempt),
                (&b"hello"[..], 0, Attempt::FIRST)
            );
            assert_eq!(received.bytes, 5 * GEOMETRY.block_bytes() as u64);
            assert_eq!(received.table.blocks().len(), 6);
            received.check(&d, 18, 100);
        });
        let report = report.unwrap();
        assert_eq!((report.path, report.bytes), (path, 5 * GEOMETRY.block_bytes() as u64));
        assert_eq!(d.pool.was_quarantined(), 0);
        drop((incoming, kv));
        assert_eq!(d.endpoint.stats().paths[&path].received, 1);
        assert_eq!(p.endpoint.stats().paths[&path].sent, 1);
        p.end().await;
        d.end().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_receiver_holds_is_not_sent() {
    for path in PATHS {
        let (p, d) = (Node::start(path, 16).await, Node::start(path, 16).await);
        let hashes: Vec<BlockHash> = (0..4).map(|i| BlockHash([i; 16])).collect();
        for (i, hash) in hashes[..3].iter().enumerate() {
            let block = d.pool.cache(*hash);
            d.fill(block, 500 + i as u64);
        }
        let kv = source(&p, 18, 500);
        let ticket = Ticket::random();
        let mut incoming = d.expect_with(ticket, 18, hashes.clone(), PATIENCE);
        let mut outgoing = p.open(&d, ticket, 18);
        let granted = outgoing.reserve().await.unwrap();
        assert_eq!((granted.held, granted.wanted), (3, 3..5));
        kv.push_all(&outgoing).unwrap();
        let (report, received) = tokio::join!(outgoing.complete(Bytes::new()), committed(&mut incoming));
        assert_eq!(report.unwrap().bytes, 2 * GEOMETRY.block_bytes() as u64);
        assert_eq!(received.held, 3);
        received.check(&d, 18, 500);
        drop((incoming, received));

        // All of it: nothing is to be sent, and it is committed all the same.
        let ticket = Ticket::random();
        let mut incoming = d.expect_with(ticket, 12, hashes[..3].to_vec(), PATIENCE);
        let mut outgoing = p.open(&d, ticket, 12);
        assert_eq!(outgoing.reserve().await.unwrap().wanted, 3..3);
        let (report, received) = tokio::join!(outgoing.complete(Bytes::new()), committed(&mut incoming));
        assert_eq!(report.unwrap().bytes, 0);
        received.check(&d, 12, 500);
        drop((incoming, received, kv));
        p.end().await;
        d.end().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_receiver_queues_the_ask() {
    for path in PATHS {
        let (p, d) = (Node::start(path, 16).await, Node::start(path, 16).await);
        let running = d.pool.acquire(12);
        let kv = source(&p, 18, 1);
        let ticket = Ticket::random();
        let mut incoming = d.expect(ticket, 18);
        let sending = tokio::spawn({
            let outgoing = p.open(&d, ticket, 18);
            async move {
                let sent = send(outgoing, &kv).await;
                drop(kv);
                sent
            }
        });
        nodes::until("the ask waits", || d.endpoint.stats().queued_asks == 1).await;
        drop(running);
        d.endpoint.room_changed();
        committed(&mut incoming).await.check(&d, 18, 1);
        sending.await.unwrap().unwrap();
        p.end().await;
        d.end().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn no_room_in_time_is_refused() {
    let (p, d) = (
        Node::start(PathKind::Tcp, 16).await,
        Node::start(PathKind::Tcp, 16).await,
    );
    let running = d.pool.acquire(12);
    let ticket = Ticket::random();
    let mut incoming = d.expect(ticket, 18);
    let deadline = Duration::from_millis(100);
    let peer = d.endpoint.peer();
    let spec = OutgoingSpec {
        peer,
        ticket,
        attempt: Attempt::FIRST,
        context_tokens: 18,
        deadline,
    };
    let error = p.endpoint.open(spec).reserve().await.unwrap_err();
    assert!(
        matches!(error, TransferError::NoRoom { .. } | TransferError::Deadline),
        "{error}"
    );
    let error = failure(&mut incoming).await;
    assert!(
        matches!(error, TransferError::NoRoom { .. } | TransferError::Deadline),
        "{error}"
    );
    drop((running, incoming));
    p.end().await;
    d.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hundred_at_once() {
    for path in PATHS {
        let (p, d) = (Node::start(path, 400).await, Arc::new(Node::start(path, 64).await));
        let mut tasks = Vec::new();
        for n in 0..100u64 {
            let tokens = 1 + (n as usize * 7) % 40;
            let ticket = Ticket::random();
            let mut incoming = d.expect(ticket, tokens);
            let outgoing = p.open(&d, ticket, tokens);
            let kv = source(&p, tokens.min(12), 1000 * n);
            let give_up = n % 10 == 3;
            let d = Arc::clone(&d);
            tasks.push(tokio::spawn(async move {
                // Contexts of more blocks than this test has sources for repeat the last one.
                let mut outgoing = outgoing;
                let granted = match outgoing.reserve().await {
                    Ok(granted) => granted,
                    Err(error) => panic!("{error}"),
                };
                for ordinal in granted.wanted {
                    let block = kv.blocks[(ordinal as usize).min(kv.blocks.len() - 1)];
                    outgoing
                        .push(ordinal, 0..GEOMETRY.layers, block, Arc::clone(&kv.claim) as _)
                        .unwrap();
                    if give_up && ordinal == 1 {
                        break;
                    }
                }
                if give_up {
                    drop(outgoing);
                    let error = failure(&mut incoming).await;
                    assert!(matches!(error, TransferError::Aborted { .. }), "{error}");
                    return;
                }
                let (report, received) = tokio::join!(
                    outgoing.complete(Bytes::copy_from_slice(&n.to_le_bytes())),
                    committed(&mut incoming)
                );
                report.unwrap();
                assert_eq!(&received.payload[..], &n.to_le_bytes());
                for (ordinal, block) in received.table.blocks()[..kv.blocks.len()].iter().enumerate() {
                    assert!(
                        d.holds(*block, 1000 * n + ordinal as u64),
                        "hand-over {n}, block {ordinal}"
                    );
                }
                drop(received);
                d.endpoint.room_changed();
            }));
        }
        for task in tasks {
            task.await.unwrap();
        }
        p.end().await;
        Arc::into_inner(d).expect("the last user").end().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn both_ways_between_one_pair() {
    let (a, b) = (
        Node::start(PathKind::Tcp, 32).await,
        Node::start(PathKind::Tcp, 32).await,
    );
    let (there, back) = (Ticket::random(), Ticket::random());
    let (mut at_b, mut at_a) = (b.expect(there, 9), a.expect(back, 9));
    let (from_a, from_b) = (source(&a, 9, 10), source(&b, 9, 20));
    let (x, y, u, v) = tokio::join!(
        send(a.open(&b, there, 9), &from_a),
        send(b.open(&a, back, 9), &from_b),
        committed(&mut at_b),
        committed(&mut at_a)
    );
    assert_eq!((x.is_ok(), y.is_ok()), (true, true));
    u.check(&b, 9, 10);
    v.check(&a, 9, 20);
    drop((u, v, from_a, from_b, at_a, at_b));
    a.end().await;
    b.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn peers_that_cannot_understand_each_other_name_the_field() {
    for path in [PathKind::Memory, PathKind::Shm, PathKind::Tcp] {
        cannot_understand(path).await;
    }
}

async fn cannot_understand(path: PathKind) {
    let d = Node::start(path, 4).await;
    let other_geometry = KvGeometry {
        head_dim: 32,
        ..GEOMETRY
    };
    let p = Node::with(options(path), identity(other_geometry), 4).await;
    match p.open(&d, Ticket::random(), 4).reserve().await {
        Err(TransferError::Refused { field, ours, theirs }) => {
            assert_eq!(
                (field.as_str(), ours.as_str(), theirs.as_str()),
                ("head_dim", "32", "16")
            );
        }
        other => panic!("{other:?}"),
    }
    let mut other_model = identity(GEOMETRY);
    other_model.fingerprint = ModelFingerprint([8; 32]);
    let q = Node::with(options(path), other_model, 4).await;
    let error = q
        .open(&d, Ticket::random(), 4)
        .reserve()
        .await
        .expect_err("another model");
    assert!(
        matches!(&error, TransferError::Refused { field, .. } if field == "fingerprint"),
        "{error}"
    );
    assert!(error.is_retryable() && error.peer_at_fault());

    // Other arithmetic and another build are no obstacle.
    let mut other_build = identity(GEOMETRY);
    (other_build.numerics, other_build.build) = (NumericsId("other".into()), "other".into());
    let r = Node::with(options(path), other_build, 4).await;
    let ticket = Ticket::random();
    let (mut incoming, kv) = (d.expect(ticket, 4), source(&r, 4, 1));
    let (sent, received) = tokio::join!(send(r.open(&d, ticket, 4), &kv), committed(&mut incoming));
    sent.expect("a hand-over");
    drop((received, kv, incoming));
    for node in [d, p, q, r] {
        node.end().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn another_process_at_the_address_is_a_peer_gone() {
    let (p, d) = (Node::start(PathKind::Tcp, 4).await, Node::start(PathKind::Tcp, 4).await);
    let open = |peer: Peer| {
        let spec = OutgoingSpec {
            peer,
            ticket: Ticket::random(),
            attempt: Attempt::FIRST,
            context_tokens: 4,
            deadline: PATIENCE,
        };
        p.endpoint.open(spec)
    };
    let restarted = Peer {
        instance: Instance::random(),
        ..d.endpoint.peer()
    };
    let error = open(restarted).reserve().await.unwrap_err();
    assert!(matches!(error, TransferError::PeerGone { .. }), "{error}");
    let nobody = Peer {
        instance: Instance::random(),
        addresses: vec!["control://127.0.0.1:1".into(), "tcp://127.0.0.1:1".into()],
        ..d.endpoint.peer()
    };
    let error = open(nobody).reserve().await.unwrap_err();
    assert!(matches!(error, TransferError::PeerGone { .. }), "{error}");
    let elsewhere = Peer {
        addresses: vec!["rdma://x".into()],
        instance: Instance::random(),
        ..d.endpoint.peer()
    };
    let error = open(elsewhere).reserve().await.unwrap_err();
    assert!(matches!(error, TransferError::NoPath { .. }), "{error}");
    p.end().await;
    d.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_path_that_cannot_be_had_gives_way_to_the_next() {
    let both = |path| EndpointOptions {
        transports: vec![PathKind::Memory, PathKind::Tcp],
        ..options(path)
    };
    let d = Node::with(both(PathKind::Tcp), identity(GEOMETRY), 8).await;
    let p = Node::with(both(PathKind::Tcp), identity(GEOMETRY), 8).await;
    let mut peer = d.endpoint.peer();
    for address in &mut peer.addresses {
        if address.starts_with("memory://") {
            *address = "memory://of-another-process".to_owned();
        }
    }
    let ticket = Ticket::random();
    let (mut incoming, kv) = (d.expect(ticket, 4), source(&p, 4, 1));
    let spec = OutgoingSpec {
        peer,
        ticket,
        attempt: Attempt::FIRST,
        context_tokens: 4,
        deadline: PATIENCE,
    };
    let (sent, received) = tokio::join!(send(p.endpoint.open(spec), &kv), committed(&mut incoming));
    assert_eq!(sent.unwrap().path, PathKind::Tcp);
    received.check(&d, 4, 1);
    drop((received, incoming, kv));
    p.end().await;
    d.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_expected_is_said_at_once() {
    let d = Node::with(
        EndpointOptions {
            handovers_max: 2,
            ..options(PathKind::Tcp)
        },
        identity(GEOMETRY),
        8,
    )
    .await;
    let spec = |ticket, tokens, deadline| ExpectSpec {
        ticket,
        attempt: Attempt(3),
        hashes: Vec::new(),
        blocks: 1,
        context_tokens: tokens,
        deadline,
    };
    let ticket = Ticket::random();
    let first = d.endpoint.expect(spec(ticket, 4, PATIENCE)).unwrap();
    let expect = |spec| d.endpoint.expect(spec).map(|_| ());
    assert_eq!(
        expect(spec(ticket, 4, PATIENCE)),
        Err(ExpectError::Duplicate { attempt: Attempt(3) })
    );
    assert_eq!(
        expect(spec(Ticket::random(), 33, PATIENCE)),
        Err(ExpectError::TooLarge { blocks: 9, limit: 8 })
    );
    assert_eq!(
        expect(spec(Ticket::random(), 4, Duration::ZERO)),
        Err(ExpectError::Deadline)
    );
    let second = d.endpoint.expect(spec(Ticket::random(), 4, PATIENCE)).unwrap();
    assert_eq!(
        expect(spec(Ticket::random(), 4, PATIENCE)),
        Err(ExpectError::TooMany { limit: 2 })
    );
    drop((first, second));
    let endpoint = d.endpoint.clone();
    d.end().await;
    assert_eq!(
        endpoint.expect(spec(ticket, 4, PATIENCE)).map(|_| ()),
        Err(ExpectError::ShuttingDown)
    );
}
