//! A running control connection. Writing never waits for reading, nor the reverse; both ends speak at least every
//! `keep_alive`, and silence of twice that is death.
//!
//! [`Line`] is the handle to speak through. Its queue is bounded: a peer that takes nothing for so long is as good as dead,
//! and the line is closed.

use super::codec::{self, FRAME_BYTES_MAX};
use super::convert::{self, Meaning};
use super::wire::{Body, Envelope, KeepAlive};
use crate::session::{Header, ToReceiver, ToSender};
use baton_node_runtime::{CancellationToken, Clock};
use baton_types::Instance;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, BufReader};
use tokio::sync::mpsc;

/// Messages that may wait for the wire.
const QUEUE: usize = 16_384;
/// Bytes written at once, about.
const BATCH_BYTES: usize = 64 << 10;

/// What comes over a line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Spoken {
    ToReceiver(Header, ToReceiver),
    ToSender(Header, ToSender),
}

/// What a line is between.
#[derive(Debug, Clone, Copy)]
pub(crate) struct LineOptions {
    pub me: Instance,
    pub peer: Instance,
    pub keep_alive: Duration,
}

/// The handle to speak through. Clones share the connection.
#[derive(Debug, Clone)]
pub(crate) struct Line {
    options: LineOptions,
    queue: mpsc::Sender<Envelope>,
    closed: CancellationToken,
}

/// The other end of a [`Line`], for [`run`].
#[derive(Debug)]
pub(crate) struct Running {
    line: Line,
    queue: mpsc::Receiver<Envelope>,
}

impl Line {
    pub(crate) fn new(options: LineOptions) -> (Self, Running) {
        let (sender, queue) = mpsc::channel(QUEUE);
        let line = Self {
            options,
            queue: sender,
            closed: CancellationToken::new(),
        };
        (line.clone(), Running { line, queue })
    }

    pub(crate) fn tell_receiver(&self, header: &Header, message: &ToReceiver) {
        self.say(convert::to_receiver(header, message));
    }

    pub(crate) fn tell_sender(&self, header: &Header, message: &ToSender) {
        self.say(convert::to_sender(header, message));
    }

    /// Ends the connection. What waits is dropped.
    pub(crate) fn close(&self) {
        self.closed.cancel();
    }

    #[cfg(test)]
    fn is_closed(&self) -> bool {
        self.closed.is_cancelled()
    }

    fn say(&self, mut envelope: Envelope) {
        envelope.from = self.options.me.0;
        envelope.to = self.options.peer.0;
        if self.queue.try_send(envelope).is_err() {
            self.close();
        }
    }
}

/// Runs a connection to its end, and says why it ended. Each message is given to `heard` in order.
pub(crate) async fn run<S: AsyncRead + AsyncWrite>(
    stream: S,
    running: Running,
    clock: Clock,
    heard: impl FnMut(Spoken),
) -> String {
    let Running { line, queue } = running;
    let (from, to) = tokio::io::split(stream);
    let reason = tokio::select! {
        () = line.closed.cancelled() => "it was closed on this side".to_owned(),
        reason = read_all(from, line.options, clock, heard) => reason,
        reason = write_all(to, queue, line.options, clock) => reason,
    };
    line.close();
    reason
}

async fn read_all(
    from: impl AsyncRead + Unpin,
    options: LineOptions,
    clock: Clock,
    mut heard: impl FnMut(Spoken),
) -> String {
    let mut from = BufReader::with_capacity(BATCH_BYTES, from);
    let silence = 2 * options.keep_alive;
    loop {
        let envelope: Envelope = match clock.timeout(silence, codec::read(&mut from, FRAME_BYTES_MAX)).await {
            Err(_) => return format!("the peer was silent for {silence:?}"),
            Ok(Err(error)) if error.kind() == std::io::ErrorKind::UnexpectedEof => {
                return "the peer closed the control connection".to_owned();
            }
            Ok(Err(error)) => return error.to_string(),
            Ok(Ok(envelope)) => envelope,
        };
        if envelope.from != options.peer.0 || envelope.to != options.me.0 {
            return "a message names other process instances than its connection".to_owned();
        }
        match convert::meaning(envelope) {
            Err(meaningless) => return meaningless.to_string(),
            Ok(Meaning::KeepAlive) => {}
            Ok(Meaning::ToReceiver(header, message)) => heard(Spoken::ToReceiver(header, message)),
            Ok(Meaning::ToSender(header, message)) => heard(Spoken::ToSender(header, message)),
        }
    }
}

async fn write_all(
    mut to: impl AsyncWrite + Unpin,
    mut queue: mpsc::Receiver<Envelope>,
    options: LineOptions,
    clock: Clock,
) -> String {
    let stall = 2 * options.keep_alive;
    let keep_alive = || Envelope {
        from: options.me.0,
        to: options.peer.0,
        body: Some(Body::KeepAlive(KeepAlive {})),
        ..Envelope::default()
    };
    let mut batch = Vec::new();
    loop {
        batch.clear();
        match clock.timeout(options.keep_alive, queue.recv()).await {
            Ok(Some(envelope)) => codec::encode(&envelope, &mut batch),
            Ok(None) => return "it was closed on this side".to_owned(),
            Err(_) => codec::encode(&keep_alive(), &mut batch),
        }
        while batch.len() < BATCH_BYTES {
            let Ok(envelope) = queue.try_recv() else { break };
            codec::encode(&envelope, &mut batch);
        }
        let written = async {
            to.write_all(&batch).await?;
            to.flush().await
        };
        match clock.timeout(stall, written).await {
            Err(_) => return format!("the peer took no bytes for {stall:?}"),
            Ok(Err(error)) => return error.to_string(),
            Ok(Ok(())) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use baton_types::{Attempt, Ticket};

    const KEEP_ALIVE: Duration = Duration::from_secs(2);

    fn options(me: u64, peer: u64) -> LineOptions {
        LineOptions {
            me: Instance(me),
            peer: Instance(peer),
            keep_alive: KEEP_ALIVE,
        }
    }

    fn header() -> Header {
        Header {
            ticket: Ticket(5),
            attempt: Attempt::FIRST,
            epoch: None,
        }
    }

    #[tokio::test(start_paused = true)]
    async fn messages_arrive_in_order_and_silence_kills() {
        let clock = Clock::new();
        let (left, right) = tokio::io::duplex(256);
        let (a, running_a) = Line::new(options(1, 2));
        let (b, running_b) = Line::new(options(2, 1));
        let (tx, mut rx) = mpsc::channel(64);
        let task_a = tokio::spawn(run(left, running_a, clock, |_| ()));
        let task_b = tokio::spawn(run(right, running_b, clock, move |spoken| tx.try_send(spoken).unwrap()));
        for connections in 0..20 {
            a.tell_receiver(&header(), &ToReceiver::Fenced { connections });
        }
        for connections in 0..20 {
            assert_eq!(
                rx.recv().await,
                Some(Spoken::ToReceiver(header(), ToReceiver::Fenced { connections }))
            );
        }
        // Keep-alives carry it over a long pause.
        clock.sleep(Duration::from_secs(101)).await;
        assert!(!a.is_closed() && !b.is_closed());
        b.close();
        task_b.await.unwrap();
        assert_eq!(task_a.await.unwrap(), "the peer closed the control connection");
        assert!(a.is_closed());
    }

    #[tokio::test(start_paused = true)]
    async fn a_silent_peer_is_dead_after_twice_the_keep_alive() {
        let clock = Clock::new();
        let (left, _right) = tokio::io::duplex(1 << 16);
        let (_line, running) = Line::new(options(1, 2));
        let start = clock.now();
        assert_eq!(run(left, running, clock, |_| ()).await, "the peer was silent for 4s");
        assert_eq!(clock.elapsed(start), 2 * KEEP_ALIVE);
    }

    #[tokio::test(start_paused = true)]
    async fn foreign_instances_and_rubbish_end_it() {
        let clock = Clock::new();
        for (me, peer) in [(3, 1), (2, 3)] {
            let (left, right) = tokio::io::duplex(1 << 16);
            let (a, running_a) = Line::new(options(me, peer));
            let (_b, running_b) = Line::new(options(1, 2));
            a.tell_receiver(&header(), &ToReceiver::Renew);
            let a = tokio::spawn(run(left, running_a, clock, |_| ()));
            let reason = run(right, running_b, clock, |_| panic!("nothing is to be heard")).await;
            assert_eq!(reason, "a message names other process instances than its connection");
            a.await.unwrap();
        }
        let (mut left, right) = tokio::io::duplex(1 << 16);
        left.write_all(&[255; 64]).await.unwrap();
        let (_line, running) = Line::new(options(1, 2));
        assert!(run(right, running, clock, |_| ()).await.contains("frame"));
    }

    #[tokio::test(start_paused = true)]
    async fn a_queue_that_overflows_closes_the_line() {
        let (line, _running) = Line::new(options(1, 2));
        for _ in 0..=QUEUE {
            line.tell_receiver(&header(), &ToReceiver::Renew);
        }
        assert!(line.is_closed());
    }
}
