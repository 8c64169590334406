//! Tickets, attempts, asks, grants and commits.

use super::*;

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
        fallbacks: Vec::new(),
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
        digest: None,
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
            digest: None,
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
            digest: false,
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
        digest: false,
        context_tokens: 12,
        path: PathKind::Tcp,
        budget: 5000 * MS,
    };
    assert_eq!(bench.say(OTHER, header, message), []);
    let mut order = Vec::new();
    let mut effects = bench.bring(Event::PeerLost { instance: WRITER });
    effects.extend(bench.bring(Event::Disconnected {
        instance: WRITER,
        path: PathKind::Tcp,
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
