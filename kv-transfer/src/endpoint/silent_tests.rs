//! A receiver against a sender that speaks the control protocol by hand: one that never proves, that repeats itself, that
//! lies about who it is, that comes back.

use crate::control::{Line, LineOptions, Spoken, greet, run};
use crate::nodes::{GEOMETRY, Node, SECOND, committed, failure, identity, source, until};
use crate::session::{Header, ToReceiver, ToSender};
use crate::{Identity, PathKind, TransferError};
use baton_node_runtime::Clock;
use baton_types::{Attempt, Epoch, Ticket};
use bytes::Bytes;
use tokio::net::TcpStream;
use tokio::sync::mpsc;

/// The sender made by hand.
struct Manual {
    line: Line,
    heard: mpsc::Receiver<(Header, ToSender)>,
    task: tokio::task::JoinHandle<String>,
}

impl Manual {
    async fn connect(to: &Node, me: &Identity) -> Self {
        let peer = to.endpoint.peer();
        let mut stream = TcpStream::connect(peer.address("control").unwrap()).await.unwrap();
        greet(&mut stream, me, peer.instance).await.unwrap();
        let (line, running) = Line::new(LineOptions {
            me: me.instance,
            peer: peer.instance,
            keep_alive: SECOND,
        });
        let (tx, heard) = mpsc::channel(64);
        let hear = move |spoken| match spoken {
            Spoken::ToSender(header, message) => tx.try_send((header, message)).unwrap(),
            Spoken::ToReceiver(..) => panic!("not for a sender"),
        };
        let task = tokio::spawn(run(stream, running, Clock::new(), hear));
        Self { line, heard, task }
    }

    fn say(&self, ticket: Ticket, attempt: u32, epoch: Option<Epoch>, message: ToReceiver) {
        self.line.tell_receiver(
            &Header {
                ticket,
                attempt: Attempt(attempt),
                epoch,
            },
            &message,
        );
    }

    fn reserve(&self, ticket: Ticket, attempt: u32) {
        let message = ToReceiver::Reserve {
            digest: false,
            context_tokens: 18,
            path: PathKind::Tcp,
            budget: 10 * SECOND,
        };
        self.say(ticket, attempt, None, message);
    }

    async fn hears(&mut self) -> (Header, ToSender) {
        tokio::time::timeout(10 * SECOND, self.heard.recv())
            .await
            .expect("a message in time")
            .expect("a message")
    }

    async fn granted(&mut self, ticket: Ticket, attempt: u32) -> Epoch {
        self.reserve(ticket, attempt);
        let (header, message) = self.hears().await;
        assert!(matches!(message, ToSender::Grant { .. }), "{message:?}");
        header.epoch.expect("a grant names its epoch")
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_writer_that_never_proves_is_disconnected() {
    let d = Node::start(PathKind::Tcp, 16).await;
    let me = identity(GEOMETRY);
    let mut manual = Manual::connect(&d, &me).await;
    let ticket = Ticket::random();
    let mut incoming = d.expect(ticket, 18);
    let epoch = manual.granted(ticket, 1).await;
    assert_eq!(failure(&mut incoming).await, TransferError::LeaseExpired);
    assert_eq!(d.pool.reserved(), 0);
    let (header, message) = manual.hears().await;
    assert_eq!(
        (header.epoch, message),
        (
            Some(epoch),
            ToSender::Fence {
                error: TransferError::LeaseExpired
            }
        )
    );
    // It goes on keeping alive, and says nothing of the epoch.
    until("its connections are destroyed, which is proof", || d.pool.free() == 16).await;
    // Its control connection stays, and it may start afresh.
    incoming.supersede(Attempt(2));
    assert!(manual.granted(ticket, 2).await > epoch);
    drop(incoming);
    manual.line.close();
    d.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn repeated_and_late_messages_change_nothing() {
    let (d, p) = (
        Node::start(PathKind::Tcp, 16).await,
        Node::start(PathKind::Tcp, 16).await,
    );
    let mut manual = Manual::connect(&d, &identity(GEOMETRY)).await;
    let ticket = Ticket::random();
    let mut incoming = d.expect(ticket, 18);
    let epoch = manual.granted(ticket, 1).await;
    assert_eq!(manual.granted(ticket, 1).await, epoch, "the same ask, the same grant");
    incoming.supersede(Attempt(2));
    assert_eq!(
        manual.hears().await.1,
        ToSender::Fence {
            error: TransferError::Fenced
        }
    );
    manual.reserve(ticket, 1);
    assert_eq!(
        manual.hears().await.1,
        ToSender::Refused {
            error: TransferError::Fenced
        }
    );
    let complete = || ToReceiver::Complete {
        blocks: 0..5,
        payload: Bytes::from_static(b"stale"),
        digest: None,
    };
    manual.say(ticket, 1, Some(epoch), complete());
    assert_eq!(
        manual.hears().await.1,
        ToSender::Fence {
            error: TransferError::Fenced
        }
    );
    manual.say(ticket, 1, Some(epoch), ToReceiver::Fenced { connections: 0 });
    manual.say(ticket, 1, Some(epoch), ToReceiver::Fenced { connections: 0 });
    until("the old epoch's blocks are back", || d.pool.free() == 16).await;

    let kv = source(&p, 18, 40);
    let second = p.open_attempt(&d, ticket, Attempt(2), 18);
    let (sent, received) = tokio::join!(crate::nodes::send(second, &kv), committed(&mut incoming));
    sent.unwrap();
    assert_eq!((received.attempt, &received.payload[..]), (Attempt(2), &b"token"[..]));
    received.check(&d, 18, 40);
    // Words about what is over, and about what never was.
    manual.say(ticket, 1, Some(epoch), complete());
    assert_eq!(
        manual.hears().await.1,
        ToSender::Fence {
            error: TransferError::AlreadyCommitted
        }
    );
    manual.say(Ticket::random(), 1, Some(Epoch(1)), complete());
    assert_eq!(
        manual.hears().await.1,
        ToSender::Fence {
            error: TransferError::UnknownTicket
        }
    );
    manual.say(
        ticket,
        1,
        Some(epoch),
        ToReceiver::Abort {
            error: TransferError::Deadline,
        },
    );
    manual.say(ticket, 1, Some(epoch), ToReceiver::Renew);
    received.check(&d, 18, 40);
    drop((received, incoming, kv));
    manual.line.close();
    d.end().await;
    p.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_connection_of_a_process_takes_the_place_of_the_first() {
    let d = Node::start(PathKind::Tcp, 16).await;
    let me = identity(GEOMETRY);
    let mut first = Manual::connect(&d, &me).await;
    let ticket = Ticket::random();
    let mut incoming = d.expect(ticket, 18);
    first.granted(ticket, 1).await;
    let mut second = Manual::connect(&d, &me).await;
    assert!(matches!(failure(&mut incoming).await, TransferError::PeerGone { .. }));
    assert_eq!(first.task.await.unwrap(), "the peer closed the control connection");
    until("what it had is proven over", || d.pool.free() == 16).await;
    incoming.supersede(Attempt(2));
    second.granted(ticket, 2).await;
    drop(incoming);
    second.line.close();
    d.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_message_under_another_name_ends_the_connection() {
    let d = Node::start(PathKind::Tcp, 16).await;
    let me = identity(GEOMETRY);
    let peer = d.endpoint.peer();
    let mut stream = TcpStream::connect(peer.address("control").unwrap()).await.unwrap();
    greet(&mut stream, &me, peer.instance).await.unwrap();
    let other = identity(GEOMETRY).instance;
    let (line, running) = Line::new(LineOptions {
        me: other,
        peer: peer.instance,
        keep_alive: SECOND,
    });
    line.tell_receiver(
        &Header {
            ticket: Ticket(1),
            attempt: Attempt(1),
            epoch: None,
        },
        &ToReceiver::Renew,
    );
    let reason = run(stream, running, Clock::new(), |_| ()).await;
    assert_eq!(reason, "the peer closed the control connection");
    d.end().await;
}
