//! A path that breaks in mid hand-over, and a writer whose end cannot be proven.

use super::peer_paths::PathWish;
use super::receiving::{Receiving, ReceivingParts};
use super::stats::Counters;
use crate::control::{Line, LineOptions, Spoken, run};
use crate::nodes::{GEOMETRY, Node, PATIENCE, SECOND, TestBlocks, TestPool, failure, identity, options, source};
use crate::session::{Header, Limits, ToReceiver, ToSender};
use crate::transport::Path;
use crate::{EndpointOptions, ExpectSpec, Fallback, IncomingEvent, PathKind, TransferError};
use baton_node_runtime::Clock;
use baton_types::{Attempt, Epoch, Instance, Ticket};
use bytes::Bytes;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;

#[tokio::test(flavor = "multi_thread")]
async fn a_hand_over_goes_on_over_the_other_path() {
    let both = || EndpointOptions {
        transports: vec![PathKind::Memory, PathKind::Tcp],
        ..options(PathKind::Tcp)
    };
    for completed in [false, true] {
        let p = Node::with(both(), identity(GEOMETRY), 16).await;
        let d = Node::with(both(), identity(GEOMETRY), 16).await;
        let ticket = Ticket::random();
        let mut incoming = d.expect(ticket, 18);
        let kv = source(&p, 18, 100);
        let mut outgoing = p.open(&d, ticket, 18);
        let granted = outgoing.reserve().await.unwrap();
        kv.push(&outgoing, 0).unwrap();
        assert!(matches!(incoming.next().await, IncomingEvent::Granted { .. }));
        assert!(matches!(incoming.next().await, IncomingEvent::FirstBlock));
        let wish = PathWish {
            bytes: 1,
            deadline: Clock::new().now() + PATIENCE,
        };
        let path = p.endpoint.links().path(&d.endpoint.peer(), wish, &[]).await.unwrap();
        assert_eq!(path.kind(), PathKind::Memory);
        path.close().await;
        for ordinal in 1..5 {
            kv.push(&outgoing, ordinal).unwrap();
        }
        if !completed {
            assert_eq!(outgoing.reserve().await.unwrap(), granted, "the role need not know");
        }
        let (report, event) = tokio::join!(outgoing.complete(Bytes::from_static(b"x")), async {
            loop {
                match incoming.next().await {
                    IncomingEvent::Granted { held, fresh, .. } => assert_eq!((held, fresh), (1, 5)),
                    IncomingEvent::FirstBlock => panic!("a second first block"),
                    event => return event,
                }
            }
        });
        let report = report.unwrap();
        assert_eq!(
            (report.path, report.bytes),
            (PathKind::Tcp, 5 * GEOMETRY.block_bytes() as u64)
        );
        let [Fallback { from, to, .. }] = &report.fallbacks[..] else {
            panic!("{:?}", report.fallbacks)
        };
        assert_eq!((*from, *to), (PathKind::Memory, PathKind::Tcp));
        let IncomingEvent::Committed {
            blocks,
            held_blocks: 1,
            path: PathKind::Tcp,
            fallbacks,
            ..
        } = event
        else {
            panic!("{event:?}")
        };
        assert_eq!(fallbacks.len(), 1);
        let table = blocks.downcast::<crate::nodes::TestTable>().unwrap();
        for (ordinal, block) in (0..5).zip(table.blocks()) {
            assert!(d.holds(block, 100 + ordinal), "block {ordinal}");
        }
        drop((table, incoming, kv));
        p.end().await;
        d.end().await;
    }
}

/// A receiver without an endpoint: the test destroys connections for it, or does not.
struct Bare {
    receiving: Arc<Receiving>,
    pool: Arc<TestPool>,
}

impl Bare {
    fn new() -> Self {
        let pool = TestPool::new(16);
        let limits = Limits {
            layers: GEOMETRY.layers,
            block_tokens: GEOMETRY.block_tokens,
            paths: vec![PathKind::Shm, PathKind::Tcp],
            peer_blocks: 16,
            lease: 10 * SECOND,
            fence_timeout: 50 * Duration::from_millis(1),
            ageing: SECOND,
            handovers: 8,
            remembered: 8,
        };
        let receiving = Receiving::new(ReceivingParts {
            limits,
            arena_blocks: 16,
            geometry: GEOMETRY,
            blocks: Arc::new(TestBlocks(Arc::clone(&pool))),
            counters: Arc::new(Counters::default()),
            clock: Clock::new(),
        });
        Self {
            receiving: Arc::new(receiving),
            pool,
        }
    }

    /// A line of a sender, and what it hears on it.
    fn dial(&self, sender: Instance) -> (u64, mpsc::Receiver<(Header, ToSender)>) {
        let line = |me, peer| {
            Line::new(LineOptions {
                me,
                peer,
                keep_alive: SECOND,
            })
        };
        let ((ours, ours_running), (_theirs, theirs_running)) = (line(Instance(1), sender), line(sender, Instance(1)));
        let (left, right) = tokio::io::duplex(1 << 16);
        let (tx, rx) = mpsc::channel(16);
        tokio::spawn(run(left, ours_running, Clock::new(), |_| ()));
        tokio::spawn(run(right, theirs_running, Clock::new(), move |spoken| {
            if let Spoken::ToSender(header, message) = spoken {
                tx.try_send((header, message)).unwrap();
            }
        }));
        (self.receiving.line_opened(sender, ours).unwrap(), rx)
    }

    fn reserve(&self, from: Instance, line: u64, header: Header, path: PathKind) {
        let budget = 5 * SECOND;
        let message = ToReceiver::Reserve {
            digest: false,
            context_tokens: 18,
            path,
            budget,
        };
        self.receiving.hear(from, line, header, message);
    }
}

#[tokio::test]
async fn a_stopped_writer_holds_up_its_kind_of_path_only() {
    let bare = Bare::new();
    let (writer, ticket) = (Instance(7), Ticket(1));
    let expect = |ticket| {
        let spec = ExpectSpec {
            ticket,
            attempt: Attempt::FIRST,
            hashes: Vec::new(),
            blocks: 6,
            context_tokens: 18,
            deadline: PATIENCE,
        };
        bare.receiving.expect(spec).unwrap()
    };
    let mut incoming = expect(ticket);
    let (line, mut heard) = bare.dial(writer);
    let header = |ticket, epoch| Header {
        ticket,
        attempt: Attempt::FIRST,
        epoch,
    };
    bare.reserve(writer, line, header(ticket, None), PathKind::Shm);
    let (granted, message) = heard.recv().await.unwrap();
    assert!(matches!(message, ToSender::Grant { .. }));
    // It says nothing any more, and its line breaks.
    bare.receiving.line_lost(writer, line);
    assert!(matches!(failure(&mut incoming).await, TransferError::PeerGone { .. }));
    let (errands, _) = bare.receiving.due();
    let mut disconnects: Vec<PathKind> = errands.disconnects.iter().map(|(_, path, _)| *path).collect();
    disconnects.sort_unstable();
    assert_eq!(disconnects, [PathKind::Tcp, PathKind::Shm]);
    // Tcp is proven at once; shm is not, for as long as the writer is stopped.
    let through = Epoch(u64::MAX);
    bare.receiving.disconnect_done(writer, PathKind::Tcp, through);
    assert_eq!((bare.pool.quarantined(), bare.pool.reserved()), (6, 0));
    // It goes on, and dials again: nobody waits for the proof.
    let patience = Duration::from_millis(20);
    tokio::time::timeout(SECOND, bare.receiving.clear_way_for(writer, patience))
        .await
        .unwrap();
    let (line, mut heard) = bare.dial(writer);
    let next = Ticket(2);
    let mut incoming = expect(next);
    bare.reserve(writer, line, header(next, None), PathKind::Shm);
    let (_, message) = heard.recv().await.unwrap();
    let refused = matches!(
        message,
        ToSender::Refused {
            error: TransferError::PathFailed { .. }
        }
    );
    assert!(refused, "{message:?}");
    bare.reserve(writer, line, header(next, None), PathKind::Tcp);
    let (again, message) = heard.recv().await.unwrap();
    assert!(matches!(message, ToSender::Grant { .. }), "{message:?}");
    assert!(again.epoch > granted.epoch);
    assert!(matches!(incoming.next().await, IncomingEvent::Granted { .. }));
    assert_eq!(bare.pool.quarantined(), 6, "time has freed nothing");
    bare.receiving
        .disconnect_done(writer, PathKind::Shm, granted.epoch.unwrap());
    assert_eq!(bare.pool.quarantined(), 0);
    drop(incoming);
    let message = ToReceiver::Fenced { connections: 0 };
    bare.receiving.hear(writer, line, header(next, again.epoch), message);
    assert_eq!(bare.pool.free(), 16);
}
