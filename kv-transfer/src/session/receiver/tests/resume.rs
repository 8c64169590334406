//! Paths that break, and what is kept for who comes next.

use super::*;

fn broken() -> TransferError {
    TransferError::PathFailed {
        path: "tcp".into(),
        reason: "test".into(),
    }
}

/// The writer says that its path broke.
fn path_broken(bench: &mut Bench, epoch: Epoch) -> Vec<Effect> {
    bench.say(WRITER, header(1, epoch), ToReceiver::PathBroken { error: broken() })
}

fn ask(bench: &mut Bench, from: Instance, attempt: u32, epoch: Option<Epoch>, path: PathKind) -> Vec<Effect> {
    let header = Header {
        ticket: TICKET,
        attempt: Attempt(attempt),
        epoch,
    };
    let budget = 5000 * MS;
    bench.say(
        from,
        header,
        ToReceiver::Reserve {
            digest: false,
            context_tokens: 12,
            path,
            budget,
        },
    )
}

fn done(through: Epoch) -> Event {
    Event::Disconnected {
        instance: WRITER,
        path: PathKind::Tcp,
        through,
    }
}

/// Held, digest from, wanted, destinations.
fn terms_in(effects: &[Effect]) -> Option<(u32, u32, Range<u32>, Vec<BlockId>)> {
    effects.iter().find_map(|effect| match effect {
        Effect::Send {
            message:
                ToSender::Grant {
                    held,
                    digest_from,
                    wanted,
                    destinations,
                    ..
                },
            ..
        } => Some((*held, *digest_from, wanted.clone(), destinations.clone())),
        _ => None,
    })
}

fn write_over(bench: &mut Bench, path: PathKind, writer: Instance, epoch: Epoch, ordinal: u32) -> Vec<Effect> {
    let from = Connection {
        path,
        writer,
        number: 9,
    };
    let claim = bench
        .machine
        .claim(bench.now, from, epoch, ordinal, &LAYERS)
        .expect("a claim");
    assert_eq!(bench.machine.land(bench.now, claim, 100), Ok(()));
    bench.settle()
}

#[test]
fn what_arrived_whole_is_kept_and_the_rest_granted_anew() {
    let mut bench = Bench::new(8);
    let old = bench.granted(12);
    bench.write(old, 0);
    bench.write(old, 2);
    let blocks = bench.out[&old].clone();
    let effects = path_broken(&mut bench, old);
    let (instance, path) = (WRITER, PathKind::Tcp);
    assert_eq!(
        effects,
        [Effect::Disconnect {
            instance,
            path,
            through: old
        }]
    );
    assert_eq!(bench.claim(old, 1), Err(Reject::DeadEpoch));
    assert_eq!(
        ask(&mut bench, WRITER, 1, None, PathKind::Memory),
        [],
        "an ask of before"
    );
    assert_eq!(
        ask(&mut bench, WRITER, 1, Some(old), PathKind::Memory),
        [],
        "no proof yet"
    );
    let effects = bench.bring(done(old));
    let new = grant_in(&effects).expect("a grant");
    assert!(effects.contains(&Effect::Regrant { old, new }));
    assert_eq!(terms_in(&effects), Some((1, 0, 1..3, blocks[1..3].to_vec())));
    let late = Connection {
        path: PathKind::Memory,
        writer: WRITER,
        number: 3,
    };
    assert_eq!(
        bench.machine.claim(bench.now, late, old, 1, &LAYERS),
        Err(Reject::DeadEpoch)
    );
    assert_eq!(
        write_over(&mut bench, PathKind::Memory, WRITER, new, 1),
        [],
        "no second first block"
    );
    bench.complete(WRITER, 1, new, 1..3);
    let effects = write_over(&mut bench, PathKind::Memory, WRITER, new, 2);
    let fallback = effects.iter().find_map(|effect| match effect {
        Effect::Commit {
            held: 1,
            path: PathKind::Memory,
            fallbacks,
            ..
        } => fallbacks.first().cloned(),
        _ => None,
    });
    let (from, to) = (PathKind::Tcp, PathKind::Memory);
    assert_eq!(
        fallback,
        Some(Fallback {
            from,
            to,
            reason: broken().to_string()
        })
    );
    assert_eq!(bench.machine.blocks_out(), (0, 0));
}

#[test]
fn without_proof_in_time_there_are_fresh_blocks() {
    let mut bench = Bench::new(8);
    let old = bench.granted(12);
    bench.write(old, 0);
    path_broken(&mut bench, old);
    assert_eq!(ask(&mut bench, WRITER, 1, Some(old), PathKind::Memory), []);
    bench.now += 400 * MS;
    assert!(bench.machine.next_tick() <= bench.now);
    let effects = bench.bring(Event::Tick);
    assert!(effects.contains(&Effect::Quarantine { epoch: old }));
    assert_eq!(terms_in(&effects).map(|terms| terms.2), Some(0..3));
    assert_eq!(bench.machine.blocks_out(), (4, 4));
    assert!(released_in(&bench.bring(done(old)), old));
}

#[test]
fn nothing_whole_is_nothing_kept() {
    let mut bench = Bench::new(8);
    let old = bench.granted(12);
    bench.write(old, 1);
    let effects = path_broken(&mut bench, old);
    assert!(effects.contains(&Effect::Quarantine { epoch: old }));
    let effects = ask(&mut bench, WRITER, 1, Some(old), PathKind::Memory);
    assert_eq!(terms_in(&effects).map(|terms| terms.2), Some(0..3));
}

#[test]
fn a_torn_extent_or_a_closed_connection_breaks_the_path() {
    for torn in [true, false] {
        let mut bench = Bench::new(8);
        let epoch = bench.granted(12);
        bench.expect(Ticket(8), 4);
        let other = grant_in(&bench.reserve(WRITER, Ticket(8), 1, 4)).unwrap();
        assert_eq!(
            bench.bring(Event::ConnectionClosed { from: connection(1) }),
            [],
            "it carried nothing"
        );
        let effects = if torn {
            let torn = bench.claim(epoch, 0).unwrap();
            bench.machine.release(bench.now, &torn);
            bench.settle()
        } else {
            bench.write(epoch, 0);
            bench.bring(Event::ConnectionClosed { from: connection(1) })
        };
        assert_eq!(failure_in(&effects), None, "the attempt may go on");
        let told = effects.iter().filter_map(|effect| match effect {
            Effect::Send {
                header,
                message:
                    ToSender::Fence {
                        error: TransferError::PathFailed { .. },
                    },
                ..
            } => header.epoch,
            _ => None,
        });
        assert_eq!(told.collect::<Vec<_>>(), [epoch, other], "a path is whole or over");
        // Nobody comes.
        bench.now += 1000 * MS;
        let effects = bench.bring(Event::Tick);
        assert!(matches!(failure_in(&effects), Some(TransferError::PathFailed { .. })));
        bench.bring(done(other));
        bench.bring(Event::Forget { ticket: TICKET });
        assert_eq!(bench.machine.blocks_out(), (0, 0));
    }
}

#[test]
fn a_later_attempt_of_another_sender_gets_what_it_lacks() {
    let mut bench = Bench::new(4);
    let old = bench.granted(12);
    bench.write(old, 0);
    bench.write(old, 1);
    let attempt = Attempt(2);
    let effects = bench.bring(Event::Supersede {
        ticket: TICKET,
        attempt,
    });
    assert_eq!(refusal_in(&effects), Some(&TransferError::Fenced));
    assert!(!effects.contains(&Effect::Quarantine { epoch: old }));
    assert_eq!(ask(&mut bench, OTHER, 2, None, PathKind::Tcp), []);
    bench.fenced(old, 1);
    let effects = bench.marker(1, old);
    let new = grant_in(&effects).unwrap();
    assert_eq!(
        terms_in(&effects).map(|terms| (terms.0, terms.1, terms.2)),
        Some((2, 2, 2..3))
    );
    assert_eq!(bench.machine.outstanding, BTreeMap::from([(OTHER, 4)]));
    bench.complete(OTHER, 2, new, 2..3);
    assert!(committed_in(&write_over(&mut bench, PathKind::Tcp, OTHER, new, 2)));
}

#[test]
fn what_is_kept_is_kept_for_the_lease() {
    let mut bench = Bench::new(4);
    let old = bench.granted(12);
    bench.write(old, 0);
    bench.say(WRITER, header(1, old), ToReceiver::Abort { error: broken() });
    bench.fenced(old, 1);
    assert_eq!(bench.marker(1, old), []);
    bench.now += 999 * MS;
    assert_eq!(bench.bring(Event::Tick), []);
    bench.now += MS;
    assert_eq!(bench.bring(Event::Tick), [Effect::Discard { epoch: old }]);
    assert_eq!(bench.machine.blocks_out(), (0, 0));
}

#[test]
fn asks_wait_on_no_path_that_is_being_destroyed() {
    let mut bench = Bench::new(4);
    let old = bench.granted(12);
    bench.expect(Ticket(8), 12);
    assert_eq!(bench.reserve(WRITER, Ticket(8), 1, 12), [], "no room");
    let effects = path_broken(&mut bench, old);
    assert!(matches!(refusal_in(&effects), Some(TransferError::PathFailed { .. })));
    assert_eq!(bench.machine.asking(), 0);
    let header = Header {
        ticket: Ticket(8),
        attempt: Attempt::FIRST,
        epoch: None,
    };
    let (context_tokens, budget) = (12, 5000 * MS);
    let path = PathKind::Memory;
    assert_eq!(
        bench.say(
            WRITER,
            header,
            ToReceiver::Reserve {
                digest: false,
                context_tokens,
                path,
                budget
            }
        ),
        []
    );
    let effects = bench.bring(done(old));
    assert!(grant_in(&effects).is_some(), "it had brought nothing to keep");
    // The one whose path broke finds no other.
    let effects = bench.say(
        WRITER,
        Header {
            ticket: TICKET,
            ..header
        },
        ToReceiver::Abort { error: broken() },
    );
    assert_eq!(failure_in(&effects), Some(&broken()));
}

#[test]
fn a_sender_that_goes_on_without_a_word_of_the_break() {
    let mut bench = Bench::new(8);
    let old = bench.granted(12);
    bench.write(old, 0);
    let effects = ask(&mut bench, WRITER, 1, Some(old), PathKind::Memory);
    assert!(matches!(effects[..], [Effect::Disconnect { .. }]));
    assert_eq!(terms_in(&bench.bring(done(old))).map(|terms| terms.0), Some(1));
}

#[test]
fn the_digest_is_compared_before_the_commit() {
    for matches in [true, false] {
        let mut bench = Bench::new(8);
        let epoch = bench.granted(8);
        bench.write(epoch, 0);
        let word = ToReceiver::Complete {
            blocks: 0..2,
            payload: Bytes::new(),
            digest: Some(77),
        };
        assert_eq!(bench.say(WRITER, header(1, epoch), word.clone()), []);
        let blocks: Vec<(u32, BlockId)> = (0..2).zip(bench.out[&epoch].clone()).collect();
        let effects = bench.write(epoch, 1);
        assert_eq!(
            effects,
            [Effect::Verify {
                epoch,
                blocks,
                digest: 77
            }]
        );
        assert_eq!(bench.say(WRITER, header(1, epoch), word), [], "once is enough");
        let effects = bench.bring(Event::Verified { epoch, matches });
        assert_eq!(committed_in(&effects), matches);
        if !matches {
            assert!(matches!(failure_in(&effects), Some(TransferError::Corrupt { .. })));
            assert!(effects.contains(&Effect::Quarantine { epoch }));
        }
    }
    // What is being read is not let go.
    let mut bench = Bench::new(8);
    let epoch = bench.granted(4);
    let (blocks, payload, digest) = (0..1, Bytes::new(), Some(1));
    bench.say(
        WRITER,
        header(1, epoch),
        ToReceiver::Complete {
            blocks,
            payload,
            digest,
        },
    );
    bench.write(epoch, 0);
    bench.bring(Event::Forget { ticket: TICKET });
    assert!(!released_in(&bench.bring(done(epoch)), epoch));
    assert!(released_in(
        &bench.bring(Event::Verified { epoch, matches: true }),
        epoch
    ));
}

#[test]
fn what_no_digest_covers_is_not_taken_over() {
    let mut bench = Bench::new(8);
    bench.expect(TICKET, 12);
    let ask = |attempt, epoch, path| {
        let header = Header {
            ticket: TICKET,
            attempt: Attempt(attempt),
            epoch,
        };
        let (context_tokens, budget, digest) = (12, 5000 * MS, true);
        let message = ToReceiver::Reserve {
            context_tokens,
            path,
            budget,
            digest,
        };
        Event::Message {
            from: WRITER,
            header,
            message,
        }
    };
    let old = grant_in(&bench.bring(ask(1, None, PathKind::Tcp))).unwrap();
    bench.write(old, 0);
    // The same attempt goes on: its digest covers what it brought.
    path_broken(&mut bench, old);
    bench.bring(ask(1, Some(old), PathKind::Memory));
    let effects = bench.bring(done(old));
    assert_eq!(terms_in(&effects).map(|terms| (terms.0, terms.1)), Some((1, 0)));
    let new = grant_in(&effects).unwrap();
    let (blocks, payload, digest) = (1..3, Bytes::new(), None);
    let word = ToReceiver::Complete {
        blocks,
        payload,
        digest,
    };
    let effects = bench.say(WRITER, header(1, new), word);
    assert!(
        matches!(failure_in(&effects), Some(TransferError::Protocol { .. })),
        "it was promised"
    );
    // Another one does not.
    bench.bring(Event::Supersede {
        ticket: TICKET,
        attempt: Attempt(2),
    });
    let effects = bench.bring(ask(2, None, PathKind::Memory));
    assert_eq!(terms_in(&effects).map(|terms| terms.0), Some(0));
    let newer = grant_in(&effects).unwrap();
    write_over(&mut bench, PathKind::Memory, WRITER, newer, 0);
    let effects = bench.bring(Event::Supersede {
        ticket: TICKET,
        attempt: Attempt(3),
    });
    assert!(effects.contains(&Effect::Quarantine { epoch: newer }));
}
