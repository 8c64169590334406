//! The receiving machine, rule by rule.

use super::*;
use crate::transport::Reject;

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
                    Effect::Discard { .. }
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

#[test]
fn the_normal_path() {
    let mut bench = Bench::new(8);
    let epoch = bench.granted(9);
    assert_eq!(bench.machine.blocks_out(), (4, 0));
    assert_eq!(bench.write(epoch, 2), [Effect::FirstBlock { ticket: TICKET }]);
    assert_eq!(bench.write(epoch, 0), []);
    assert_eq!(bench.complete(WRITER, 1, epoch, 0..3), [], "one block is missing");
    let effects = bench.write(epoch, 1);
    let commit = Effect::Commit {
        ticket: TICKET,
        attempt: Attempt::FIRST,
        epoch,
        held: 0,
        payload: Bytes::from_static(b"t"),
        bytes: 300,
        path: PathKind::Tcp,
    };
    let told = Effect::Send {
        to: WRITER,
        header: header(1, epoch),
        message: ToSender::Committed,
    };
    assert_eq!(effects, [commit, told]);
    assert_eq!((bench.machine.expected(), bench.machine.blocks_out()), (0, (0, 0)));
}

#[test]
fn a_grant_names_what_is_lacking() {
    let mut bench = Bench::new(8);
    bench.held = 2;
    bench.expect(TICKET, 12);
    let effects = bench.reserve(WRITER, TICKET, 1, 12);
    let grant = effects.iter().find_map(|effect| match effect {
        Effect::Send {
            message:
                ToSender::Grant {
                    held,
                    wanted,
                    destinations,
                    ..
                },
            ..
        } => Some((*held, wanted.clone(), destinations.len())),
        _ => None,
    });
    assert_eq!(
        grant,
        Some((2, 2..3, 1)),
        "the block to run on in is not the writer's business"
    );
    bench.held = 3;
    bench.expect(Ticket(8), 12);
    let epoch = grant_in(&bench.reserve(WRITER, Ticket(8), 1, 12)).unwrap();
    let header = Header {
        ticket: Ticket(8),
        attempt: Attempt::FIRST,
        epoch: Some(epoch),
    };
    let complete = ToReceiver::Complete {
        blocks: 3..3,
        payload: Bytes::new(),
    };
    assert!(committed_in(&bench.say(WRITER, header, complete)), "nothing is lacking");
}

#[test]
fn complete_may_overtake_the_data_and_come_twice() {
    let mut bench = Bench::new(8);
    let epoch = bench.granted(4);
    assert_eq!(bench.complete(WRITER, 1, epoch, 0..1), []);
    assert_eq!(bench.complete(WRITER, 1, epoch, 0..1), []);
    assert!(committed_in(&bench.write(epoch, 0)));
    let again = bench.complete(WRITER, 1, epoch, 0..1);
    assert_eq!(
        again,
        [Effect::Send {
            to: WRITER,
            header: header(1, epoch),
            message: ToSender::Committed
        }]
    );
}

#[test]
fn a_complete_of_other_blocks_fails() {
    let mut bench = Bench::new(8);
    let epoch = bench.granted(8);
    let effects = bench.complete(WRITER, 1, epoch, 0..1);
    assert!(matches!(failure_in(&effects), Some(TransferError::Protocol { .. })));
    assert!(effects.contains(&Effect::Quarantine { epoch }));
}

#[test]
fn nothing_foreign_completes() {
    let mut bench = Bench::new(8);
    let epoch = bench.granted(4);
    bench.write(epoch, 0);
    for (from, attempt, named) in [(OTHER, 1, epoch), (WRITER, 2, epoch), (WRITER, 1, Epoch(99))] {
        let effects = bench.complete(from, attempt, named, 0..1);
        assert!(refusal_in(&effects).is_some());
        assert!(!committed_in(&effects));
    }
    assert!(committed_in(&bench.complete(WRITER, 1, epoch, 0..1)));
}

#[test]
fn the_same_ask_gets_the_same_grant() {
    let mut bench = Bench::new(8);
    let epoch = bench.granted(4);
    let again = bench.reserve(WRITER, TICKET, 1, 4);
    assert_eq!((again.len(), grant_in(&again)), (1, Some(epoch)));
    let foreign = bench.reserve(OTHER, TICKET, 1, 4);
    assert!(matches!(refusal_in(&foreign), Some(TransferError::Protocol { .. })));
    assert_eq!(bench.machine.blocks_out(), (2, 0));
}

#[test]
fn strangers_and_wrong_contexts_are_refused() {
    let mut bench = Bench::new(8);
    assert_eq!(
        refusal_in(&bench.reserve(WRITER, Ticket(9), 1, 4)),
        Some(&TransferError::UnknownTicket)
    );
    bench.expect(TICKET, 8);
    let effects = bench.reserve(WRITER, TICKET, 1, 9);
    assert!(matches!(refusal_in(&effects), Some(TransferError::Protocol { .. })));
    assert!(matches!(failure_in(&effects), Some(TransferError::Protocol { .. })));
    let effects = bench.reserve(WRITER, TICKET, 1, 8);
    assert!(
        matches!(refusal_in(&effects), Some(TransferError::Protocol { .. })),
        "this attempt is over"
    );
    assert!(
        grant_in(&bench.reserve(WRITER, TICKET, 2, 8)).is_some(),
        "a later one is another"
    );
}

#[test]
fn claims_are_checked() {
    let mut bench = Bench::new(8);
    let epoch = bench.granted(8);
    let mut claim = |from: Connection, epoch, ordinal| {
        bench
            .machine
            .claim(bench.now, from, epoch, ordinal, &LAYERS)
            .map(|claim| claim.block())
    };
    assert_eq!(claim(connection(1), Epoch(99), 0), Err(Reject::DeadEpoch));
    assert_eq!(
        claim(
            Connection {
                writer: OTHER,
                ..connection(1)
            },
            epoch,
            0
        ),
        Err(Reject::WrongWriter)
    );
    assert_eq!(
        claim(
            Connection {
                path: PathKind::Memory,
                ..connection(1)
            },
            epoch,
            0
        ),
        Err(Reject::WrongWriter)
    );
    assert_eq!(
        claim(connection(1), epoch, 2),
        Err(Reject::OutsideGrant),
        "the block to run on in"
    );
    assert!(claim(connection(1), epoch, 0).is_ok());
    assert_eq!(
        claim(connection(2), epoch, 0),
        Err(Reject::Duplicate),
        "it is on its way"
    );
    let overlap = bench.machine.claim(bench.now, connection(2), epoch, 1, &(0..1));
    assert!(overlap.is_ok());
    assert_eq!(bench.claim(epoch, 1), Err(Reject::OutsideGrant));
    assert!(
        matches!(failure_in(&bench.log), Some(TransferError::Protocol { .. })),
        "overlapping extents"
    );
}

#[test]
fn a_duplicate_is_counted_once() {
    let mut bench = Bench::new(8);
    let epoch = bench.granted(8);
    bench.complete(WRITER, 1, epoch, 0..2);
    bench.write(epoch, 0);
    assert_eq!(bench.claim(epoch, 0), Err(Reject::Duplicate));
    assert_eq!(bench.machine.expected(), 1, "one block is missing still");
    assert!(committed_in(&bench.write(epoch, 1)));
}

#[test]
fn a_late_frame_lands_nowhere_and_holds_its_block() {
    let mut bench = Bench::new(3);
    let epoch = bench.granted(8);
    let late = bench.claim(epoch, 0).unwrap();
    let effects = bench.bring(Event::Supersede {
        ticket: TICKET,
        attempt: Attempt(2),
    });
    assert!(effects.contains(&Effect::Quarantine { epoch }));
    assert_eq!(refusal_in(&effects), Some(&TransferError::Fenced));
    assert_eq!(bench.claim(epoch, 1), Err(Reject::DeadEpoch));
    // The second sender's ask waits: the blocks are not to be had while the late frame may be written.
    assert_eq!(bench.reserve(OTHER, TICKET, 2, 8), []);
    assert_eq!(bench.marker(1, epoch), []);
    assert_eq!(bench.fenced(epoch, 1), [], "the claim is held still");
    assert_eq!(bench.machine.blocks_out(), (0, 3));
    assert_eq!(bench.land(late), Err(Reject::DeadEpoch));
    assert!(released_in(&bench.log, epoch));
    let second = grant_in(&bench.log).expect("the second sender's turn");
    assert!(second > epoch);
    assert_eq!(
        refusal_in(&bench.complete(WRITER, 1, epoch, 0..2)),
        Some(&TransferError::Fenced)
    );
}

#[test]
fn proof_is_every_marker_and_the_word() {
    let mut bench = Bench::new(8);
    let epoch = bench.granted(8);
    bench.write(epoch, 0);
    let error = TransferError::Aborted { reason: "test".into() };
    let effects = bench.say(WRITER, header(1, epoch), ToReceiver::Abort { error: error.clone() });
    assert_eq!(failure_in(&effects), Some(&error));
    assert_eq!(refusal_in(&effects), None, "the sender knows");
    assert!(!released_in(&bench.fenced(epoch, 2), epoch));
    assert!(!released_in(&bench.marker(2, epoch), epoch));
    assert!(!released_in(&bench.marker(2, epoch), epoch), "twice the same");
    assert!(!released_in(
        &bench.bring(Event::Marker {
            from: Connection {
                writer: OTHER,
                ..connection(1)
            },
            epoch
        }),
        epoch
    ));
    assert!(released_in(&bench.marker(1, epoch), epoch));
    assert_eq!(bench.machine.blocks_out(), (0, 0));
}

#[test]
fn markers_on_connections_that_carried_nothing_prove_nothing() {
    let mut bench = Bench::new(8);
    let epoch = bench.granted(8);
    bench.write(epoch, 0);
    bench.bring(Event::Forget { ticket: TICKET });
    assert!(!released_in(&bench.fenced(epoch, 0), epoch), "connection 1 carried it");
    assert!(!released_in(&bench.marker(2, epoch), epoch));
    assert!(released_in(
        &bench.bring(Event::ConnectionClosed { from: connection(1) }),
        epoch
    ));
}

#[test]
fn a_word_from_another_process_is_no_proof() {
    let mut bench = Bench::new(8);
    let epoch = bench.granted(8);
    bench.bring(Event::Forget { ticket: TICKET });
    let effects = bench.say(OTHER, header(1, epoch), ToReceiver::Fenced { connections: 0 });
    assert!(!released_in(&effects, epoch));
    assert!(released_in(&bench.fenced(epoch, 0), epoch), "the writer never wrote");
}

#[test]
fn time_alone_frees_nothing() {
    let mut bench = Bench::new(8);
    let epoch = bench.granted(8);
    bench.expect(Ticket(8), 4);
    let other = grant_in(&bench.reserve(WRITER, Ticket(8), 1, 4)).unwrap();
    bench.now += 900 * MS;
    let renew = Header {
        ticket: Ticket(8),
        attempt: Attempt::FIRST,
        epoch: Some(other),
    };
    assert_eq!(bench.say(WRITER, renew, ToReceiver::Renew), []);
    bench.now += 100 * MS;
    let effects = bench.bring(Event::Tick);
    assert_eq!(failure_in(&effects), Some(&TransferError::LeaseExpired));
    assert_eq!(refusal_in(&effects), Some(&TransferError::LeaseExpired));
    assert_eq!(bench.machine.blocks_out(), (2, 3));
    // No proof in time: the writer's connections go, and its other hand-over with them.
    bench.now += 200 * MS;
    let effects = bench.bring(Event::Tick);
    assert!(matches!(failure_in(&effects), Some(TransferError::PathFailed { .. })));
    let through = effects.iter().find_map(|effect| match effect {
        Effect::Disconnect {
            instance: WRITER,
            through,
        } => Some(*through),
        _ => None,
    });
    assert_eq!(through, Some(other));
    assert_eq!(bench.machine.blocks_out(), (0, 5));
    bench.now += 100_000 * MS;
    let effects = bench.bring(Event::Tick);
    assert!(
        !released_in(&effects, epoch) && !released_in(&effects, other),
        "however long it takes"
    );
    let effects = bench.bring(Event::Disconnected {
        instance: WRITER,
        through: other,
    });
    assert!(released_in(&effects, epoch) && released_in(&effects, other));
}

#[test]
fn a_disconnect_proves_nothing_about_later_epochs() {
    let mut bench = Bench::new(8);
    let epoch = bench.granted(4);
    bench.bring(Event::PeerLost { instance: WRITER });
    bench.expect(Ticket(8), 4);
    let later = grant_in(&bench.reserve(WRITER, Ticket(8), 1, 4)).unwrap();
    bench.bring(Event::Forget { ticket: Ticket(8) });
    let effects = bench.bring(Event::Disconnected {
        instance: WRITER,
        through: epoch,
    });
    assert!(released_in(&effects, epoch) && !released_in(&effects, later));
}

#[test]
fn a_lost_peer_ends_its_asks_and_grants() {
    let mut bench = Bench::new(4);
    let epoch = bench.granted(8);
    bench.expect(Ticket(8), 8);
    assert_eq!(bench.reserve(WRITER, Ticket(8), 1, 8), [], "no room");
    bench.expect(Ticket(9), 8);
    assert_eq!(bench.reserve(OTHER, Ticket(9), 1, 8), [], "no room");
    let effects = bench.bring(Event::PeerLost { instance: WRITER });
    let failed = effects
        .iter()
        .filter(|effect| matches!(effect, Effect::Failed { .. }))
        .count();
    assert_eq!(failed, 2);
    assert_eq!((bench.machine.asking(), refusal_in(&effects)), (1, None));
    let effects = bench.bring(Event::Disconnected {
        instance: WRITER,
        through: epoch,
    });
    assert!(grant_in(&effects).is_some(), "room for the other");
}

#[test]
fn lower_attempts_are_fenced_and_equal_ones_idempotent() {
    let mut bench = Bench::new(8);
    bench.expect(TICKET, 4);
    assert_eq!(
        bench.bring(Event::Supersede {
            ticket: TICKET,
            attempt: Attempt(3)
        }),
        []
    );
    assert_eq!(
        bench.bring(Event::Supersede {
            ticket: TICKET,
            attempt: Attempt(2)
        }),
        []
    );
    assert_eq!(
        refusal_in(&bench.reserve(WRITER, TICKET, 2, 4)),
        Some(&TransferError::Fenced)
    );
    let first = grant_in(&bench.reserve(WRITER, TICKET, 3, 4)).unwrap();
    // A later attempt's sender may come before the role hears of it.
    let effects = bench.reserve(OTHER, TICKET, 4, 4);
    assert!(effects.contains(&Effect::Quarantine { epoch: first }));
    let second = grant_in(&effects).unwrap();
    assert_ne!(first, second);
    assert_eq!(
        bench.bring(Event::Supersede {
            ticket: TICKET,
            attempt: Attempt(4)
        }),
        []
    );
    let abort = ToReceiver::Abort {
        error: TransferError::Deadline,
    };
    assert_eq!(bench.say(WRITER, header(3, first), abort), [], "its abort is no news");
}

#[test]
fn the_first_commit_is_a_latch() {
    let mut bench = Bench::new(8);
    let epoch = bench.granted(4);
    bench.write(epoch, 0);
    assert!(committed_in(&bench.complete(WRITER, 1, epoch, 0..1)));
    assert_eq!(
        bench.machine.may_expect(TICKET),
        Err(NotExpected::Duplicate(Attempt::FIRST))
    );
    assert_eq!(
        refusal_in(&bench.reserve(OTHER, TICKET, 2, 4)),
        Some(&TransferError::AlreadyCommitted)
    );
    let late = bench.complete(OTHER, 2, Epoch(99), 0..1);
    assert_eq!(refusal_in(&late), Some(&TransferError::AlreadyCommitted));
    assert_eq!(
        bench.claim(epoch, 0),
        Err(Reject::DeadEpoch),
        "and nothing is written under it any more"
    );
}

#[test]
fn committed_tickets_are_remembered_within_bounds() {
    let mut bench = Bench::new(64);
    for n in 0..10 {
        bench.expect(Ticket(n), 4);
        let epoch = grant_in(&bench.reserve(WRITER, Ticket(n), 1, 4)).unwrap();
        bench.write(epoch, 0);
        let header = Header {
            ticket: Ticket(n),
            attempt: Attempt::FIRST,
            epoch: Some(epoch),
        };
        let complete = ToReceiver::Complete {
            blocks: 0..1,
            payload: Bytes::new(),
        };
        assert!(committed_in(&bench.say(WRITER, header, complete)));
    }
    assert_eq!(
        refusal_in(&bench.reserve(OTHER, Ticket(9), 2, 4)),
        Some(&TransferError::AlreadyCommitted)
    );
    assert_eq!(
        refusal_in(&bench.reserve(OTHER, Ticket(0), 2, 4)),
        Some(&TransferError::UnknownTicket)
    );
}

#[test]
fn asks_are_served_by_deadline_with_ageing() {
    let mut bench = Bench::new(4);
    let running = bench.granted(12);
    for (ticket, budget) in [(8, 400), (9, 300), (10, 9000)] {
        bench.expect(Ticket(ticket), 12);
        let header = Header {
            ticket: Ticket(ticket),
            attempt: Attempt::FIRST,
            epoch: None,
        };
        let path = PathKind::Tcp;
        let message = ToReceiver::Reserve {
            context_tokens: 12,
            path,
            budget: budget * MS,
        };
        assert_eq!(bench.say(OTHER, header, message), []);
    }
    // Comes later, with an earlier deadline than the aged one but later than its turn.
    bench.now += 100 * MS;
    bench.expect(Ticket(11), 12);
    let header = Header {
        ticket: Ticket(11),
        attempt: Attempt::FIRST,
        epoch: None,
    };
    let message = ToReceiver::Reserve {
        context_tokens: 12,
        path: PathKind::Tcp,
        budget: 5000 * MS,
    };
    assert_eq!(bench.say(OTHER, header, message), []);
    let mut order = Vec::new();
    let mut effects = bench.bring(Event::PeerLost { instance: WRITER });
    effects.extend(bench.bring(Event::Disconnected {
        instance: WRITER,
        through: running,
    }));
    while let Some((ticket, epoch)) = effects.iter().find_map(|effect| match effect {
        Effect::Granted { ticket, epoch, .. } => Some((*ticket, *epoch)),
        _ => None,
    }) {
        order.push(ticket.0);
        effects = bench.bring(Event::Forget { ticket });
        let header = Header {
            ticket,
            attempt: Attempt::FIRST,
            epoch: Some(epoch),
        };
        effects.extend(bench.say(OTHER, header, ToReceiver::Fenced { connections: 0 }));
    }
    assert_eq!(order, [9, 8, 10, 11]);
}

#[test]
fn an_ask_ends_with_its_budget_and_a_ticket_with_its_deadline() {
    let mut bench = Bench::new(1);
    bench.expect(TICKET, 12);
    assert_eq!(bench.reserve(WRITER, TICKET, 1, 12), []);
    bench.now += 5000 * MS;
    let effects = bench.bring(Event::Tick);
    assert!(matches!(failure_in(&effects), Some(TransferError::NoRoom { .. })));
    assert!(matches!(refusal_in(&effects), Some(TransferError::NoRoom { .. })));
    bench.expect(Ticket(8), 4);
    bench.now += 10_000 * MS;
    assert!(bench.machine.next_tick() <= bench.now);
    let effects = bench.bring(Event::Tick);
    assert_eq!(failure_in(&effects), Some(&TransferError::Deadline));
    assert_eq!(bench.machine.next_tick(), Duration::MAX, "nothing is left to watch");
}

#[test]
fn a_writer_keeps_to_its_share() {
    let mut bench = Bench::new(20);
    bench.machine.limits.peer_blocks = 6;
    let epoch = bench.granted(16);
    bench.expect(Ticket(8), 4);
    assert_eq!(bench.reserve(WRITER, Ticket(8), 1, 4), [], "5 of 6 are out");
    bench.expect(Ticket(9), 28);
    assert!(
        grant_in(&bench.reserve(OTHER, Ticket(9), 1, 28)).is_some(),
        "another's first, of any size"
    );
    bench.bring(Event::Forget { ticket: TICKET });
    assert_eq!(bench.machine.asking(), 1, "quarantined blocks count too");
    assert!(grant_in(&bench.fenced(epoch, 0)).is_some());
}

#[test]
fn a_pool_that_gives_blocks_of_an_unfenced_epoch_is_not_believed() {
    let mut bench = Bench::new(8);
    let epoch = bench.granted(4);
    bench.bring(Event::Forget { ticket: TICKET });
    let stolen = bench.out[&epoch].clone();
    bench.free.extend(stolen);
    bench.expect(Ticket(8), 4);
    let effects = bench.reserve(OTHER, Ticket(8), 1, 4);
    assert!(matches!(failure_in(&effects), Some(TransferError::Corrupt { .. })));
    assert!(effects.iter().any(|effect| matches!(effect, Effect::Discard { .. })));
    assert_eq!(grant_in(&effects), None);
}

#[test]
fn torn_and_corrupt_extents_fail_the_attempt() {
    let mut bench = Bench::new(8);
    let epoch = bench.granted(8);
    let torn = bench.claim(epoch, 0).unwrap();
    bench.machine.release(bench.now, &torn);
    let effects = bench.settle();
    assert!(matches!(failure_in(&effects), Some(TransferError::PathFailed { .. })));

    let mut bench = Bench::new(8);
    let epoch = bench.granted(8);
    assert_eq!(
        bench.bring(Event::Corrupt {
            from: Connection {
                writer: OTHER,
                ..connection(1)
            },
            epoch
        }),
        []
    );
    let effects = bench.bring(Event::Corrupt {
        from: connection(1),
        epoch,
    });
    assert!(matches!(failure_in(&effects), Some(TransferError::Corrupt { .. })));
}

#[test]
fn a_connection_that_closes_before_its_time_fails_what_it_carried() {
    let mut bench = Bench::new(8);
    let epoch = bench.granted(8);
    assert_eq!(
        bench.bring(Event::ConnectionClosed { from: connection(1) }),
        [],
        "it carried nothing"
    );
    bench.write(epoch, 0);
    let effects = bench.bring(Event::ConnectionClosed { from: connection(1) });
    assert!(matches!(failure_in(&effects), Some(TransferError::PathFailed { .. })));
}

#[test]
fn shutdown_ends_every_attempt() {
    let mut bench = Bench::new(8);
    bench.granted(8);
    bench.expect(Ticket(8), 40);
    bench.reserve(WRITER, Ticket(8), 1, 40);
    bench.expect(Ticket(9), 4);
    let effects = bench.bring(Event::Shutdown);
    let failed = |effect: &&Effect| {
        matches!(
            effect,
            Effect::Failed {
                error: TransferError::ShuttingDown,
                ..
            }
        )
    };
    assert_eq!(effects.iter().filter(failed).count(), 3);
    assert_eq!(bench.machine.writers(), [WRITER]);
    bench.bring(Event::Disconnected {
        instance: WRITER,
        through: Epoch(u64::MAX),
    });
    assert_eq!(bench.machine.blocks_out(), (0, 0));
}
