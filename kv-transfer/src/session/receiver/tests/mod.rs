//! The receiving machine, rule by rule.

mod fencing;
mod grants;
mod resume;

use super::*;
use crate::transport::Reject;
use std::collections::HashMap;

const MS: Duration = Duration::from_millis(1);
const WRITER: Instance = Instance(11);
const OTHER: Instance = Instance(22);
const TICKET: Ticket = Ticket(7);
const LAYERS: Range<u32> = 0..2;

/// A machine with a small pool behind it.
struct Bench {
    machine: Receiver,
    now: Duration,
    free: Vec<BlockId>,
    /// Blocks that every context finds here already.
    held: u32,
    out: HashMap<Epoch, Vec<BlockId>>,
    log: Vec<Effect>,
}

impl Bench {
    fn new(blocks: u32) -> Self {
        let limits = Limits {
            layers: LAYERS.end,
            block_tokens: 4,
            paths: vec![PathKind::Tcp, PathKind::Memory],
            peer_blocks: blocks as usize,
            lease: 1000 * MS,
            fence_timeout: 200 * MS,
            ageing: 500 * MS,
            handovers: 16,
            remembered: 4,
        };
        let free = (0..blocks).rev().map(BlockId).collect();
        Self {
            machine: Receiver::new(limits),
            now: MS,
            free,
            held: 0,
            out: HashMap::new(),
            log: Vec::new(),
        }
    }

    /// Brings an event, plays the pool, and gives the other effects.
    fn bring(&mut self, event: Event) -> Vec<Effect> {
        self.machine.handle(self.now, event);
        self.settle()
    }

    fn settle(&mut self) -> Vec<Effect> {
        let mut others = Vec::new();
        loop {
            let effects = self.machine.take_effects();
            if effects.is_empty() {
                self.machine.check();
                return others;
            }
            for effect in effects {
                match effect {
                    Effect::Allocate { epoch, ticket } => {
                        let wanted = self.machine.tickets[&ticket].blocks - self.held;
                        let at = self.free.len().checked_sub(wanted as usize);
                        let answer = match at {
                            None => Event::NoRoom { epoch },
                            Some(at) => {
                                let fresh = self.free.split_off(at);
                                self.out.insert(epoch, fresh.clone());
                                Event::Allocated {
                                    epoch,
                                    held: self.held,
                                    fresh,
                                }
                            }
                        };
                        self.machine.handle(self.now, answer);
                    }
                    Effect::Release { epoch } => {
                        self.free.extend(self.out.remove(&epoch).expect("blocks of the epoch"));
                        others.push(Effect::Release { epoch });
                    }
                    Effect::Discard { epoch } => {
                        self.free.extend(self.out.remove(&epoch).expect("blocks of the epoch"));
                        others.push(Effect::Discard { epoch });
                    }
                    Effect::Regrant { old, new } => {
                        let blocks = self.out.remove(&old).expect("blocks of the epoch");
                        self.out.insert(new, blocks);
                        others.push(Effect::Regrant { old, new });
                    }
                    Effect::Verify { .. }
                    | Effect::Send { .. }
                    | Effect::Granted { .. }
                    | Effect::FirstBlock { .. }
                    | Effect::Commit { .. }
                    | Effect::Failed { .. }
                    | Effect::Quarantine { .. }
                    | Effect::Disconnect { .. } => others.push(effect),
                }
            }
        }
    }

    fn expect(&mut self, ticket: Ticket, tokens: u64) {
        let blocks = u32::try_from(tokens.div_ceil(4)).unwrap() + 1;
        let deadline = self.now + 10_000 * MS;
        let attempt = Attempt::FIRST;
        let effects = self.bring(Event::Expect {
            ticket,
            attempt,
            blocks,
            context_tokens: tokens,
            deadline,
        });
        assert_eq!(effects, []);
    }

    fn say(&mut self, from: Instance, header: Header, message: ToReceiver) -> Vec<Effect> {
        self.bring(Event::Message { from, header, message })
    }

    fn reserve(&mut self, from: Instance, ticket: Ticket, attempt: u32, tokens: u64) -> Vec<Effect> {
        let message = ToReceiver::Reserve {
            digest: false,
            context_tokens: tokens,
            path: PathKind::Tcp,
            budget: 5000 * MS,
        };
        self.say(
            from,
            Header {
                ticket,
                attempt: Attempt(attempt),
                epoch: None,
            },
            message,
        )
    }

    /// Expects and grants the ticket of `tokens` to [`WRITER`].
    fn granted(&mut self, tokens: u64) -> Epoch {
        self.expect(TICKET, tokens);
        let effects = self.reserve(WRITER, TICKET, 1, tokens);
        grant_in(&effects).expect("a grant")
    }

    fn claim(&mut self, epoch: Epoch, ordinal: u32) -> Result<ClaimTicket, Reject> {
        let claim = self.machine.claim(self.now, connection(1), epoch, ordinal, &LAYERS);
        self.log = self.settle();
        claim
    }

    fn land(&mut self, claim: ClaimTicket) -> Result<(), Reject> {
        let landed = self.machine.land(self.now, claim, 100);
        self.log = self.settle();
        landed
    }

    fn write(&mut self, epoch: Epoch, ordinal: u32) -> Vec<Effect> {
        let claim = self.claim(epoch, ordinal).expect("a claim");
        assert_eq!(self.land(claim), Ok(()));
        std::mem::take(&mut self.log)
    }

    fn complete(&mut self, from: Instance, attempt: u32, epoch: Epoch, blocks: Range<u32>) -> Vec<Effect> {
        self.say(
            from,
            header(attempt, epoch),
            ToReceiver::Complete {
                blocks,
                payload: Bytes::from_static(b"t"),
                digest: None,
            },
        )
    }

    fn fenced(&mut self, epoch: Epoch, connections: u32) -> Vec<Effect> {
        self.say(WRITER, header(1, epoch), ToReceiver::Fenced { connections })
    }

    fn marker(&mut self, number: u64, epoch: Epoch) -> Vec<Effect> {
        self.bring(Event::Marker {
            from: connection(number),
            epoch,
        })
    }
}

fn connection(number: u64) -> Connection {
    Connection {
        path: PathKind::Tcp,
        writer: WRITER,
        number,
    }
}

fn header(attempt: u32, epoch: Epoch) -> Header {
    Header {
        ticket: TICKET,
        attempt: Attempt(attempt),
        epoch: Some(epoch),
    }
}

fn grant_in(effects: &[Effect]) -> Option<Epoch> {
    effects.iter().find_map(|effect| match effect {
        Effect::Send {
            header,
            message: ToSender::Grant { .. },
            ..
        } => header.epoch,
        _ => None,
    })
}

fn refusal_in(effects: &[Effect]) -> Option<&TransferError> {
    effects.iter().find_map(|effect| match effect {
        Effect::Send {
            message: ToSender::Refused { error } | ToSender::Fence { error },
            ..
        } => Some(error),
        _ => None,
    })
}

fn failure_in(effects: &[Effect]) -> Option<&TransferError> {
    effects.iter().find_map(|effect| match effect {
        Effect::Failed { error, .. } => Some(error),
        _ => None,
    })
}

fn committed_in(effects: &[Effect]) -> bool {
    effects.iter().any(|effect| matches!(effect, Effect::Commit { .. }))
}

fn released_in(effects: &[Effect], epoch: Epoch) -> bool {
    effects.contains(&Effect::Release { epoch })
}
