//! KV on its way between two nodes: ask, grant under an epoch, pieces in any order and maybe twice, the last word, commit.
//! The machines that do this in the product have schedules of their own (`kv-transfer/src/session/campaign`); here it only
//! has to be late, lost and cut off as theirs can be.

use super::node::Process;
use super::{BLOCK_TOKENS, Planted};
use baton_engine::{BlockTable, Reservation};
use baton_types::{Attempt, BlockHash, BlockId, Instance, Ticket};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{mpsc, oneshot};

const ASK_TIMEOUT: Duration = Duration::from_secs(1);
const DONE_TIMEOUT: Duration = Duration::from_secs(2);
/// A reservation that was not filled by then is given up.
const RESERVATION_LEASE: Duration = Duration::from_secs(2);
const ROOM_EVERY: Duration = Duration::from_millis(5);

/// Where it goes.
#[derive(Clone, Copy)]
pub(super) struct Destination {
    pub(super) at: usize,
    pub(super) instance: Instance,
    pub(super) ticket: Ticket,
    pub(super) attempt: Attempt,
}

/// The last word: the token to go on from, its place, and generated tokens before it that the other node was not told.
#[derive(Debug, Clone)]
pub(super) struct Last {
    pub(super) index: usize,
    pub(super) token: u32,
    pub(super) between: Vec<u32>,
}

pub(super) struct Arrived {
    pub(super) table: BlockTable,
    pub(super) last: Last,
    pub(super) attempt: Attempt,
}

/// Why it failed; `full`: for want of place.
#[derive(Debug)]
pub(super) struct NotHanded {
    pub(super) full: bool,
    pub(super) why: &'static str,
}

fn failed(why: &'static str) -> NotHanded {
    NotHanded { full: false, why }
}

struct Granted {
    epoch: u64,
    held: usize,
}

/// A request that waits for its context.
struct Waiting {
    attempt: Attempt,
    hashes: Vec<BlockHash>,
    blocks: usize,
    arrived: mpsc::UnboundedSender<Arrived>,
}

struct Arrival {
    ticket: Ticket,
    attempt: Attempt,
    reservation: Reservation,
    held: usize,
    missing: BTreeSet<usize>,
    last: Option<(Last, oneshot::Sender<()>)>,
}

/// What a node expects.
#[derive(Default)]
pub(super) struct Arrivals {
    waiting: BTreeMap<Ticket, Waiting>,
    open: BTreeMap<u64, Arrival>,
    epochs: u64,
    /// For a planted bug: where the pieces of former epochs went.
    former: BTreeMap<u64, Vec<BlockId>>,
}

/// A request's wish for its context; dropped, nothing is let in for it any more.
pub(super) struct Wish {
    process: Arc<Process>,
    ticket: Ticket,
    pub(super) arrived: mpsc::UnboundedReceiver<Arrived>,
}

impl Drop for Wish {
    fn drop(&mut self) {
        let mut arrivals = self.process.arrivals.lock().unwrap();
        arrivals.waiting.remove(&self.ticket);
        arrivals.give_up(self.ticket, None);
    }
}

impl Arrivals {
    /// Gives up what is open under a ticket, but for one attempt's. Pieces of it find no epoch any more, so its blocks can go
    /// to others.
    fn give_up(&mut self, ticket: Ticket, but: Option<Attempt>) {
        let is_over = |arrival: &Arrival| arrival.ticket == ticket && Some(arrival.attempt) != but;
        let over = self.open.iter().filter(|(_, arrival)| is_over(arrival));
        let over: Vec<u64> = over.map(|(epoch, _)| *epoch).collect();
        over.into_iter().for_each(|epoch| self.end(epoch));
    }

    fn end(&mut self, epoch: u64) {
        if let Some(arrival) = self.open.remove(&epoch) {
            self.former.insert(epoch, arrival.reservation.fresh().to_vec());
            arrival.reservation.release();
        }
    }
}

impl Process {
    pub(super) fn wish(
        self: &Arc<Self>,
        ticket: Ticket,
        attempt: Attempt,
        hashes: Vec<BlockHash>,
        context: usize,
    ) -> Wish {
        let (sender, arrived) = mpsc::unbounded_channel();
        let waiting = Waiting {
            attempt,
            hashes,
            blocks: context.div_ceil(BLOCK_TOKENS),
            arrived: sender,
        };
        self.arrivals.lock().unwrap().waiting.insert(ticket, waiting);
        Wish {
            process: Arc::clone(self),
            ticket,
            arrived,
        }
    }

    pub(super) fn supersede(&self, ticket: Ticket, attempt: Attempt) {
        let mut arrivals = self.arrivals.lock().unwrap();
        if let Some(waiting) = arrivals.waiting.get_mut(&ticket) {
            waiting.attempt = attempt;
        }
        arrivals.give_up(ticket, Some(attempt));
    }

    /// Hands `context` over, whose blocks the caller holds.
    pub(super) async fn hand_over(
        self: &Arc<Self>,
        to: Destination,
        context: Vec<u32>,
        last: Last,
    ) -> Result<usize, NotHanded> {
        let granted = tokio::time::timeout(ASK_TIMEOUT, self.ask(to)).await;
        let granted = granted.map_err(|_| failed("it does not answer"))??;
        let pieces: Vec<(usize, Vec<u32>)> = context
            .chunks(BLOCK_TOKENS)
            .map(<[u32]>::to_vec)
            .enumerate()
            .skip(granted.held)
            .collect();
        let bytes = pieces.len() * BLOCK_TOKENS;
        for (ordinal, piece) in pieces {
            self.network_is_used().await;
            let copies = if self.sim.one_in(20) { 2 } else { 1 };
            for _ in 0..copies {
                let piece = piece.clone();
                self.send(to, move |process| process.take(granted.epoch, ordinal, piece));
            }
        }
        let (said, done) = oneshot::channel();
        self.send(to, move |process| process.end(granted.epoch, last, said));
        match tokio::time::timeout(DONE_TIMEOUT, done).await {
            Ok(Ok(())) => {
                self.sim.travel(to.at, self.at).await;
                Ok(bytes)
            }
            Ok(Err(_)) => Err(failed("it gave the hand-over up")),
            Err(_) => Err(failed("it does not say that all is there")),
        }
    }

    async fn network_is_used(&self) {
        self.sim.network.awake(self.at).await;
        tokio::time::sleep(Duration::from_micros(20)).await;
    }

    /// What is on the wire arrives whatever becomes of its sender.
    fn send(&self, to: Destination, act: impl FnOnce(&Arc<Process>) + Send + 'static) {
        let (sim, from) = (Arc::clone(&self.sim), self.at);
        tokio::spawn(async move {
            sim.travel(from, to.at).await;
            if let Some(process) = sim.network.process(to.at).filter(|p| p.instance == to.instance) {
                act(&process);
            }
        });
    }

    async fn ask(self: &Arc<Self>, to: Destination) -> Result<Granted, NotHanded> {
        let (said, answer) = oneshot::channel();
        self.send(to, move |process| {
            let asked = Arc::clone(process);
            process.spawn(async move {
                let _ = said.send(asked.reserve(to.ticket, to.attempt).await);
            });
        });
        let answer = answer.await.map_err(|_| failed("another process answers, or none"))?;
        self.sim.travel(to.at, self.at).await;
        answer
    }

    async fn reserve(self: &Arc<Self>, ticket: Ticket, attempt: Attempt) -> Result<Granted, NotHanded> {
        for _ in 0..100 {
            self.sim.network.awake(self.at).await;
            if let Some(granted) = self.try_reserve(ticket, attempt)? {
                return Ok(granted);
            }
            tokio::time::sleep(ROOM_EVERY).await;
        }
        Err(NotHanded {
            full: true,
            why: "no room for the context",
        })
    }

    fn try_reserve(self: &Arc<Self>, ticket: Ticket, attempt: Attempt) -> Result<Option<Granted>, NotHanded> {
        let arrivals = &mut *self.arrivals.lock().unwrap();
        let waiting = arrivals
            .waiting
            .get(&ticket)
            .filter(|waiting| waiting.attempt == attempt);
        let waiting = waiting.ok_or_else(|| failed("nobody waits for this attempt"))?;
        let (hashes, blocks) = (waiting.hashes.clone(), waiting.blocks);
        let Ok(reservation) = self.pool.reserve(&hashes, hashes.len(), blocks) else {
            return Ok(None);
        };
        arrivals.give_up(ticket, None);
        arrivals.epochs += 1;
        let (epoch, held) = (arrivals.epochs, reservation.held().len());
        let arrival = Arrival {
            ticket,
            attempt,
            held,
            missing: (held..blocks).collect(),
            reservation,
            last: None,
        };
        arrivals.open.insert(epoch, arrival);
        let process = Arc::clone(self);
        self.spawn(async move {
            tokio::time::sleep(RESERVATION_LEASE).await;
            process.arrivals.lock().unwrap().end(epoch);
        });
        Ok(Some(Granted { epoch, held }))
    }

    /// A piece came.
    fn take(self: &Arc<Self>, epoch: u64, ordinal: usize, piece: Vec<u32>) {
        let arrivals = &mut *self.arrivals.lock().unwrap();
        let Some(arrival) = arrivals.open.get_mut(&epoch) else {
            if self.sim.bug == Some(Planted::LateWrite)
                && let Some(block) = arrivals.former.get(&epoch).and_then(|blocks| blocks.first())
            {
                self.contents.lock().unwrap().insert(*block, piece);
            }
            return;
        };
        if !arrival.missing.remove(&ordinal) {
            return;
        }
        let block = arrival.reservation.fresh()[ordinal - arrival.held];
        self.contents.lock().unwrap().insert(block, piece);
        self.commit_if_whole(arrivals, epoch);
    }

    /// The last word came, maybe before the pieces.
    fn end(self: &Arc<Self>, epoch: u64, last: Last, said: oneshot::Sender<()>) {
        let arrivals = &mut *self.arrivals.lock().unwrap();
        if let Some(arrival) = arrivals.open.get_mut(&epoch) {
            arrival.last = Some((last, said));
            self.commit_if_whole(arrivals, epoch);
        }
    }

    fn commit_if_whole(&self, arrivals: &mut Arrivals, epoch: u64) {
        let whole = |arrival: &Arrival| arrival.missing.is_empty() && arrival.last.is_some();
        if !arrivals.open.get(&epoch).is_some_and(whole) {
            return;
        }
        let Some(arrival) = arrivals.open.remove(&epoch) else {
            return;
        };
        let (Some((last, said)), Some(waiting)) = (arrival.last, arrivals.waiting.remove(&arrival.ticket)) else {
            arrival.reservation.release();
            return;
        };
        let table = arrival.reservation.commit();
        for (ordinal, hash) in waiting.hashes.iter().enumerate() {
            table.publish(ordinal, *hash);
        }
        let attempt = arrival.attempt;
        let _ = waiting.arrived.send(Arrived { table, last, attempt });
        let _ = said.send(());
    }
}
