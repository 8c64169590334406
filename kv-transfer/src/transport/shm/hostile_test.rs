//! Writers that err or mean harm: whatever they send or store, nothing false is counted, no task panics, and nothing but
//! their word or their death passes for proof that they write no more.

use super::connect::dial;
use super::map::SharedWords;
use super::ring::{CAPACITY, Notice, Producer, WORDS};
use super::socket::{Answer, Bell, DETACHED, Refusal, host_id, receive_answer, send, send_signal, socket_name};
use super::{ShmOptions, ShmTransport};
use crate::transport::tcp::wire::{Hello, Verdict};
use crate::transport::{Claim, ExtentHeader, Landing, Local, Reject, Transport, WriterConnection};
use crate::{Arena, Identity};
use baton_node_runtime::{Clock, Supervisor};
use baton_types::{Epoch, Instance, KvDtype, KvGeometry, ModelFingerprint, NodeId, NumericsId};
use rustix::process::{Pid, PidfdFlags, getpid, pidfd_open};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;
use tokio::net::UnixStream;
use tokio::sync::watch;

const GEOMETRY: KvGeometry = KvGeometry {
    layers: 2,
    kv_heads: 1,
    head_dim: 4,
    block_tokens: 16,
    dtype: KvDtype::F16,
};
const WRITER: Instance = Instance(0xbad);
/// How long a thing that must not happen is awaited.
const NEVER: Duration = Duration::from_millis(100);
const LONG: Duration = Duration::from_secs(60);

#[derive(Debug, Default, Clone, PartialEq, Eq)]
struct Seen {
    asked: usize,
    fenced: usize,
    closed: usize,
}

/// A book without grants.
struct NoGrants(watch::Sender<Seen>);

impl Landing for NoGrants {
    fn claim(&self, from: &WriterConnection, header: &ExtentHeader) -> Result<Box<dyn Claim>, Reject> {
        assert_eq!(from.instance, WRITER);
        assert!(header.layers.end <= GEOMETRY.layers && !header.layers.is_empty());
        self.0.send_modify(|seen| seen.asked += 1);
        Err(Reject::DeadEpoch)
    }

    fn fenced(&self, _from: &WriterConnection, _epoch: Epoch) {
        self.0.send_modify(|seen| seen.fenced += 1);
    }

    fn corrupt(&self, _from: &WriterConnection, _header: &ExtentHeader) {}

    fn closed(&self, _from: &WriterConnection) {
        self.0.send_modify(|seen| seen.closed += 1);
    }
}

struct Victim {
    transport: ShmTransport,
    identity: Identity,
    seen: watch::Receiver<Seen>,
    supervisor: Supervisor,
}

impl Victim {
    fn start() -> Self {
        let identity = Identity {
            node: NodeId::new("victim"),
            instance: Instance::random(),
            fingerprint: ModelFingerprint([3; 32]),
            geometry: GEOMETRY,
            numerics: NumericsId("test".into()),
            build: "test".into(),
        };
        let (told, seen) = watch::channel(Seen::default());
        let supervisor = Supervisor::new();
        let local = Local {
            identity: identity.clone(),
            arena: Arena::allocate(GEOMETRY, 16, &mut |_, _| ()).unwrap().view(),
            landing: Arc::new(NoGrants(told)),
            clock: Clock::new(),
            supervisor: supervisor.clone(),
        };
        let options = ShmOptions {
            connect_timeout: LONG,
            shutdown_timeout: NEVER,
            bytes_in_flight_max: 1 << 20,
        };
        Self {
            transport: ShmTransport::start(options, local).unwrap(),
            identity,
            seen,
            supervisor,
        }
    }

    fn hello(&self) -> Hello {
        let writer = Identity {
            instance: WRITER,
            ..self.identity.clone()
        };
        Hello::new(&writer, self.identity.instance, false, Verdict::Asking)
    }

    async fn ask(&self, hello: &Hello, fds: &[&OwnedFd]) -> (UnixStream, Answer, Vec<OwnedFd>) {
        let address = self.transport.address();
        let socket = dial(socket_name(&address, &host_id().unwrap()).unwrap()).await.unwrap();
        let fds: Vec<_> = fds.iter().map(|fd| fd.as_fd()).collect();
        send(&socket, &hello.encode(), &fds).await.unwrap();
        let mut fds = Vec::new();
        let answer = receive_answer(&socket, &mut fds).await.unwrap().unwrap();
        (socket, answer, fds)
    }

    /// A connection as this process may have it.
    async fn connect(&self) -> Intruder {
        let (socket, answer, fds) = self.ask(&self.hello(), &[&this_process()]).await;
        assert_eq!((answer.refusal, answer.blocks), (Refusal::None, 16));
        let [_arena, ring, bell, _room]: [OwnedFd; 4] = fds.try_into().unwrap();
        Intruder {
            socket,
            words: Arc::new(SharedWords::map(&ring, WORDS).unwrap()),
            bell: Bell::of(bell),
        }
    }

    async fn wait(&mut self, enough: impl FnMut(&Seen) -> bool) {
        tokio::time::timeout(LONG, self.seen.wait_for(enough))
            .await
            .unwrap()
            .unwrap();
    }

    async fn end(self) {
        self.transport.shutdown().await;
        assert_eq!((self.supervisor.tasks(), self.supervisor.fatal()), (0, None));
    }
}

struct Intruder {
    socket: UnixStream,
    words: Arc<SharedWords>,
    bell: Bell,
}

fn this_process() -> OwnedFd {
    pidfd_open(getpid(), PidfdFlags::NONBLOCK).unwrap()
}

#[tokio::test]
async fn a_ring_with_nonsense_ends_the_connection_but_proves_nothing() {
    const HEAD: usize = 0;
    const ENTRY: usize = 64;
    let pair = |low: u64, high: u64| low | high << 32;
    // (head, ordinal and kind, layers)
    let nonsense = [
        (u64::MAX, 0, 0),
        (CAPACITY as u64 + 1, pair(0, 1), pair(0, 1)),
        (1, 0, 0),
        (1, pair(0, 77), 0),
        (1, pair(0, 1), pair(1, 1)),
        (1, pair(0, 1), pair(0, 3)),
        (1, pair(0, 1), pair(2, 1)),
    ];
    for (head, what, layers) in nonsense {
        let mut victim = Victim::start();
        let intruder = victim.connect().await;
        let words = intruder.words.words();
        words[ENTRY + 1].store(what, Ordering::Relaxed);
        words[ENTRY + 2].store(layers, Ordering::Relaxed);
        words[HEAD].store(head, Ordering::Release);
        intruder.bell.ring();
        // It is asked to go: that byte comes.
        assert_eq!(
            super::socket::receive_signal(&intruder.socket).await.unwrap(),
            Some(super::socket::STOP)
        );
        assert_eq!(*victim.seen.borrow(), Seen::default());
        let (_socket, answer, _) = victim.ask(&victim.hello(), &[&this_process()]).await;
        assert_eq!(
            answer.refusal,
            Refusal::None,
            "nobody asked for the end of that instance yet"
        );
        send_signal(&intruder.socket, DETACHED);
        victim.wait(|seen| seen.closed == 1).await;
        assert_eq!(victim.seen.borrow().asked, 0);
        victim.end().await;
    }
}

#[tokio::test]
async fn a_socket_that_closes_without_a_word_proves_nothing() {
    let mut victim = Victim::start();
    let intruder = victim.connect().await;
    let mut producer = Producer::new(Arc::clone(&intruder.words));
    drop(intruder.socket);
    // It may go on writing, so it may go on telling.
    let notice = Notice::Extent {
        epoch: Epoch(1),
        ordinal: 0,
        layers: 0..2,
    };
    producer.push(&notice, 0);
    producer.push(&Notice::Fence { epoch: Epoch(1) }, 0);
    producer.publish();
    intruder.bell.ring();
    victim.wait(|seen| (seen.asked, seen.fenced) == (1, 1)).await;
    {
        let mut disconnected = victim.transport.disconnect_instance(WRITER);
        assert!(tokio::time::timeout(NEVER, &mut disconnected).await.is_err());
        let (_socket, answer, fds) = victim.ask(&victim.hello(), &[&this_process()]).await;
        assert_eq!((answer.refusal, fds.len()), (Refusal::Leaving, 0));
    }
    let mut seen = victim.seen.clone();
    victim.end().await;
    assert_eq!(seen.borrow_and_update().closed, 0);
}

#[tokio::test]
async fn what_a_dead_connection_published_is_counted_before_it_is_closed() {
    let mut victim = Victim::start();
    let intruder = victim.connect().await;
    let mut producer = Producer::new(Arc::clone(&intruder.words));
    for _ in 0..CAPACITY {
        producer.push(&Notice::Fence { epoch: Epoch(1) }, 0);
    }
    producer.publish();
    send_signal(&intruder.socket, DETACHED);
    victim.wait(|seen| seen.closed == 1).await;
    assert_eq!(victim.seen.borrow().fenced, CAPACITY);
    victim.end().await;
}

#[tokio::test]
async fn who_is_not_what_it_says_gets_no_memory() {
    let victim = Victim::start();
    let other = pidfd_open(Pid::INIT, PidfdFlags::NONBLOCK).ok();
    let (ours, bell) = (this_process(), Bell::new().unwrap());
    let bell = bell.fd().try_clone_to_owned().unwrap();
    let mut handles: Vec<Vec<&OwnedFd>> = vec![vec![], vec![&bell], vec![&ours, &ours]];
    handles.extend(other.as_ref().map(|other| vec![other]));
    for handle in handles {
        let (_socket, answer, fds) = victim.ask(&victim.hello(), &handle).await;
        assert_eq!((answer.refusal, fds.len()), (Refusal::NoProcess, 0));
    }
    let meant = Hello {
        to: Instance(1),
        ..victim.hello()
    };
    let model = Hello {
        fingerprint: ModelFingerprint([4; 32]),
        ..victim.hello()
    };
    for (hello, refusal) in [(meant, Refusal::OtherInstance), (model, Refusal::Differs)] {
        let (_socket, answer, fds) = victim.ask(&hello, &[&ours]).await;
        assert_eq!(
            (answer.refusal, answer.hello.verdict, fds.len()),
            (refusal, Verdict::Refused, 0)
        );
    }
    assert_eq!(*victim.seen.borrow(), Seen::default());
    victim.end().await;
}
