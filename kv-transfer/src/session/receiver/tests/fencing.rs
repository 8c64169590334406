//! Claims, deaths of epochs, quarantine and proof.

use super::*;

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
    assert_eq!(bench.marker(1, epoch), [], "proven, and kept for the next attempt");
    assert_eq!(bench.machine.blocks_out(), (0, 3));
    let effects = bench.bring(Event::Forget { ticket: TICKET });
    assert_eq!(effects, [Effect::Discard { epoch }], "which there will not be");
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
    // No proof in time: the writer's connections go, and its other hand-over needs another path.
    bench.now += 200 * MS;
    let effects = bench.bring(Event::Tick);
    assert_eq!(failure_in(&effects), None);
    assert!(matches!(refusal_in(&effects), Some(TransferError::PathFailed { .. })));
    let through = other;
    let disconnect = |path, through| Effect::Disconnect {
        instance: WRITER,
        path,
        through,
    };
    assert!(effects.contains(&disconnect(PathKind::Tcp, through)));
    assert!(
        !effects.contains(&disconnect(PathKind::Memory, through)),
        "nothing happened there"
    );
    assert_eq!(bench.machine.blocks_out(), (0, 5));
    bench.now += 100_000 * MS;
    let effects = bench.bring(Event::Tick);
    assert!(
        !released_in(&effects, epoch) && !released_in(&effects, other),
        "however long it takes"
    );
    let path = PathKind::Tcp;
    let effects = bench.bring(Event::Disconnected {
        instance: WRITER,
        path: PathKind::Memory,
        through,
    });
    assert_eq!(effects, [], "of another path");
    let effects = bench.bring(Event::Disconnected {
        instance: WRITER,
        path,
        through,
    });
    assert!(released_in(&effects, epoch) && released_in(&effects, other));
}

#[test]
fn a_disconnect_proves_nothing_about_later_epochs() {
    let mut bench = Bench::new(8);
    let epoch = bench.granted(4);
    let effects = bench.bring(Event::PeerLost { instance: WRITER });
    let disconnects = effects
        .iter()
        .filter(|effect| matches!(effect, Effect::Disconnect { .. }));
    assert_eq!(disconnects.count(), 2, "one of each kind of path");
    bench.expect(Ticket(8), 4);
    let effects = bench.reserve(WRITER, Ticket(8), 1, 4);
    assert!(
        matches!(refusal_in(&effects), Some(TransferError::PathFailed { .. })),
        "not yet"
    );
    let done = || Event::Disconnected {
        instance: WRITER,
        path: PathKind::Tcp,
        through: epoch,
    };
    assert!(released_in(&bench.bring(done()), epoch));
    let later = grant_in(&bench.reserve(WRITER, Ticket(8), 1, 4)).unwrap();
    bench.bring(Event::Forget { ticket: Ticket(8) });
    assert!(!released_in(&bench.bring(done()), later));
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
        path: PathKind::Tcp,
        through: epoch,
    });
    assert!(grant_in(&effects).is_some(), "room for the other");
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
fn a_corrupt_extent_fails_the_attempt() {
    let mut bench = Bench::new(8);
    let epoch = bench.granted(8);
    bench.write(epoch, 0);
    let foreign = Connection {
        writer: OTHER,
        ..connection(1)
    };
    assert_eq!(bench.bring(Event::Corrupt { from: foreign, epoch }), []);
    let from = connection(1);
    let effects = bench.bring(Event::Corrupt { from, epoch });
    assert!(matches!(failure_in(&effects), Some(TransferError::Corrupt { .. })));
    assert!(
        effects.contains(&Effect::Quarantine { epoch }),
        "nothing of it is relied on"
    );
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
    assert_eq!(bench.machine.writers(), BTreeSet::from([WRITER]));
    bench.bring(Event::Disconnected {
        instance: WRITER,
        path: PathKind::Tcp,
        through: Epoch(u64::MAX),
    });
    assert_eq!(bench.machine.blocks_out(), (0, 0));
}
