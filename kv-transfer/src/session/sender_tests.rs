//! The sending machine, rule by rule.

use super::*;

const SECOND: Duration = Duration::from_secs(1);

fn sender() -> Sender {
    Sender::new(SenderLimits {
        layers: 2,
        deadline: 60 * SECOND,
        fence_timeout: 2 * SECOND,
        answer_timeout: 10 * SECOND,
        digest: false,
    })
}

fn sends(sender: &mut Sender) -> Vec<ToReceiver> {
    let take = |effect| match effect {
        SenderEffect::Send { message, .. } => Some(message),
        SenderEffect::Fence { .. }
        | SenderEffect::NextPath { .. }
        | SenderEffect::Rewrite
        | SenderEffect::ClosePath => None,
    };
    sender.take_effects().into_iter().filter_map(take).collect()
}

fn grant(epoch: u64, wanted: Range<u32>) -> SenderEvent {
    let destinations = wanted.clone().map(baton_types::BlockId).collect();
    let message = ToSender::Grant {
        held: wanted.start,
        digest_from: wanted.start,
        wanted,
        destinations,
        lease: 10 * SECOND,
    };
    SenderEvent::Message {
        epoch: Some(Epoch(epoch)),
        message,
    }
}

fn say(epoch: u64, message: ToSender) -> SenderEvent {
    SenderEvent::Message {
        epoch: Some(Epoch(epoch)),
        message,
    }
}

fn granted(wanted: Range<u32>) -> Sender {
    let mut sender = sender();
    sender.handle(SECOND, SenderEvent::Reserve { context_tokens: 40 });
    assert!(
        sender.take_effects().is_empty(),
        "nothing can be said before there is a connection"
    );
    sender.handle(2 * SECOND, SenderEvent::Connected { path: PathKind::Tcp });
    let reserve = ToReceiver::Reserve {
        digest: false,
        context_tokens: 40,
        path: PathKind::Tcp,
        budget: 58 * SECOND,
    };
    assert_eq!(sends(&mut sender), [reserve]);
    sender.handle(3 * SECOND, grant(7, wanted));
    sender
}

#[test]
fn the_normal_path() {
    let mut sender = granted(1..3);
    let now = 4 * SECOND;
    assert_eq!(sender.push(now, 0, &(0..2)), Ok(Push::Drop), "the receiver holds it");
    assert_eq!(sender.push(now, 1, &(0..2)), Ok(Push::Write(BlockId(1))));
    assert_eq!(sender.push(now, 2, &(0..1)), Ok(Push::Write(BlockId(2))));
    assert_eq!(sender.push(now, 2, &(1..2)), Ok(Push::Write(BlockId(2))));
    sender.handle(
        now,
        SenderEvent::Complete {
            payload: Bytes::from_static(b"x"),
        },
    );
    assert_eq!(
        sends(&mut sender),
        [ToReceiver::Complete {
            blocks: 1..3,
            payload: Bytes::from_static(b"x"),
            digest: None,
        }]
    );
    assert_eq!(sender.next_tick(), 60 * SECOND);
    sender.handle(now, SenderEvent::Drained);
    assert_eq!(sender.next_tick(), 14 * SECOND);
    sender.handle(now, say(6, ToSender::Committed));
    assert_eq!(sender.outcome(), None, "another epoch was committed, not this one");
    sender.handle(now, say(7, ToSender::Committed));
    assert_eq!(sender.outcome(), Some(&Ok(())));
    assert!(sender.is_over());
    assert!(sender.take_effects().is_empty());
}

#[test]
fn nothing_is_pushed_before_the_grant_or_twice() {
    let mut early = sender();
    assert!(matches!(
        early.push(SECOND, 0, &(0..1)),
        Err(TransferError::Protocol { .. })
    ));
    assert_eq!(early.outcome(), None);
    for (ordinal, layers) in [(1, 0..2), (3, 0..2), (2, 1..3), (2, 1..1)] {
        let mut sender = granted(1..3);
        assert_eq!(sender.push(SECOND, 1, &(0..1)), Ok(Push::Write(BlockId(1))));
        assert!(sender.push(SECOND, ordinal, &layers).is_err(), "{ordinal} {layers:?}");
        assert!(matches!(sender.outcome(), Some(Err(TransferError::Protocol { .. }))));
    }
}

#[test]
fn completing_too_early_fails() {
    let mut sender = granted(1..3);
    assert_eq!(sender.push(SECOND, 1, &(0..2)), Ok(Push::Write(BlockId(1))));
    sender.handle(SECOND, SenderEvent::Complete { payload: Bytes::new() });
    assert!(matches!(sender.outcome(), Some(Err(TransferError::Protocol { .. }))));
    assert!(!sender.is_over(), "the epoch is to be fenced");
}

#[test]
fn a_failure_after_the_grant_is_fenced() {
    let mut sender = granted(0..1);
    let error = TransferError::Aborted { reason: "test".into() };
    sender.handle(5 * SECOND, SenderEvent::Abort { error: error.clone() });
    let epoch = Epoch(7);
    assert_eq!(
        sender.take_effects(),
        [
            SenderEffect::Send {
                epoch: Some(epoch),
                message: ToReceiver::Abort { error: error.clone() }
            },
            SenderEffect::Fence { epoch }
        ]
    );
    sender.handle(
        5 * SECOND,
        say(
            7,
            ToSender::Fence {
                error: TransferError::Fenced,
            },
        ),
    );
    assert!(sender.take_effects().is_empty(), "it is being fenced already");
    assert_eq!(sender.push(SECOND, 0, &(0..1)), Err(error));
    sender.handle(5 * SECOND, SenderEvent::FenceSent { connections: 2 });
    assert_eq!(sends(&mut sender), [ToReceiver::Fenced { connections: 2 }]);
    assert!(sender.is_over());
}

#[test]
fn a_fence_that_cannot_be_sent_closes_the_path() {
    for event in [SenderEvent::FenceFailed, SenderEvent::Tick] {
        let mut sender = granted(0..1);
        let error = TransferError::LeaseExpired;
        sender.handle(5 * SECOND, say(7, ToSender::Fence { error }));
        assert_eq!(sender.take_effects(), [SenderEffect::Fence { epoch: Epoch(7) }]);
        assert_eq!(sender.next_tick(), 7 * SECOND);
        sender.handle(7 * SECOND, event);
        let effects = sender.take_effects();
        assert!(matches!(
            &effects[..],
            [
                SenderEffect::Send {
                    epoch: Some(Epoch(7)),
                    message: ToReceiver::PathBroken { .. }
                },
                SenderEffect::ClosePath
            ]
        ));
        assert!(sender.is_over());
        assert_eq!(sender.outcome(), Some(&Err(TransferError::LeaseExpired)));
    }
}

#[test]
fn a_grant_that_comes_too_late_is_given_back() {
    let mut sender = sender();
    sender.handle(SECOND, SenderEvent::Connected { path: PathKind::Tcp });
    sender.handle(SECOND, SenderEvent::Reserve { context_tokens: 40 });
    sender.handle(
        SECOND,
        SenderEvent::Abort {
            error: TransferError::Deadline,
        },
    );
    assert!(sender.is_over(), "without a grant there is nothing to fence");
    sender.take_effects();
    sender.handle(SECOND, grant(7, 0..2));
    assert_eq!(sends(&mut sender), [ToReceiver::Fenced { connections: 0 }]);
}

#[test]
fn no_answer_ends_in_a_failure() {
    let mut sender = granted(0..0);
    sender.handle(5 * SECOND, SenderEvent::Complete { payload: Bytes::new() });
    assert_eq!(sender.next_tick(), 15 * SECOND, "there was nothing to write");
    sender.handle(15 * SECOND, SenderEvent::Tick);
    assert!(matches!(sender.outcome(), Some(Err(TransferError::PeerGone { .. }))));

    let mut sender = granted(0..1);
    sender.handle(60 * SECOND, SenderEvent::Tick);
    assert_eq!(sender.outcome(), Some(&Err(TransferError::Deadline)));
}

#[test]
fn a_lost_link_needs_no_fence() {
    let mut sender = granted(0..1);
    let error = TransferError::PeerGone { reason: "test".into() };
    sender.handle(5 * SECOND, SenderEvent::LinkLost { error: error.clone() });
    assert_eq!(sender.outcome(), Some(&Err(error)));
    assert!(sender.is_over());
    assert!(sender.take_effects().is_empty());
}

#[test]
fn the_lease_is_renewed_while_this_side_computes() {
    let mut sender = granted(0..1);
    sender.take_effects();
    for renewal in 1..5 {
        let due = 3 * SECOND + renewal * 5 * SECOND / 2;
        assert_eq!(sender.next_tick(), due);
        sender.handle(due, SenderEvent::Tick);
        assert_eq!(sends(&mut sender), [ToReceiver::Renew]);
    }
    assert_eq!(sender.push(14 * SECOND, 0, &(0..2)), Ok(Push::Write(BlockId(0))));
    assert_eq!(
        sender.next_tick(),
        60 * SECOND,
        "what waits for the wire renews nothing"
    );
    sender.handle(20 * SECOND, SenderEvent::Tick);
    assert_eq!(sends(&mut sender), []);
    sender.handle(21 * SECOND, SenderEvent::Drained);
    sender.handle(21 * SECOND, SenderEvent::Tick);
    assert_eq!(sends(&mut sender), [ToReceiver::Renew]);
}

#[test]
fn a_grant_that_contradicts_itself_is_refused() {
    let mut sender = sender();
    sender.handle(SECOND, SenderEvent::Connected { path: PathKind::Tcp });
    sender.handle(SECOND, SenderEvent::Reserve { context_tokens: 40 });
    let message = ToSender::Grant {
        held: 0,
        digest_from: 0,
        wanted: 1..3,
        destinations: Vec::new(),
        lease: SECOND,
    };
    sender.handle(SECOND, say(9, message));
    assert!(matches!(sender.outcome(), Some(Err(TransferError::Protocol { .. }))));
    assert!(!sender.is_over(), "the receiver has set blocks aside");
}

fn broke() -> TransferError {
    TransferError::PathFailed {
        path: "tcp".into(),
        reason: "test".into(),
    }
}

#[test]
fn a_broken_path_is_followed_by_another() {
    let mut sender = granted(1..4);
    let now = 4 * SECOND;
    assert_eq!(sender.push(now, 1, &(0..2)), Ok(Push::Write(BlockId(1))));
    let (epoch, error) = (Epoch(6), broke());
    sender.handle(now, SenderEvent::WriteFailed { epoch, error });
    assert!(sender.take_effects().is_empty(), "a write of long ago");
    let (epoch, error) = (Epoch(7), broke());
    sender.handle(now, SenderEvent::WriteFailed { epoch, error });
    let told = SenderEffect::Send {
        epoch: Some(epoch),
        message: ToReceiver::PathBroken { error: broke() },
    };
    let failed = vec![PathKind::Tcp];
    assert_eq!(sender.take_effects(), [told, SenderEffect::NextPath { failed }]);
    sender.handle(now, say(7, ToSender::Fence { error: broke() }));
    sender.handle(now, grant(7, 1..4));
    assert!(sender.take_effects().is_empty(), "it is known to be over");
    assert_eq!(sender.push(now, 2, &(0..2)), Ok(Push::Keep));
    sender.handle(now, SenderEvent::Connected { path: PathKind::Shm });
    let ask = SenderEffect::Send {
        epoch: Some(epoch),
        message: ToReceiver::Reserve {
            digest: false,
            context_tokens: 40,
            path: PathKind::Shm,
            budget: 56 * SECOND,
        },
    };
    assert_eq!(sender.take_effects(), [ask]);
    // One block had arrived whole.
    sender.handle(now, grant(9, 2..4));
    assert_eq!(sender.take_effects(), [SenderEffect::Rewrite]);
    assert_eq!(sender.push(now, 3, &(0..2)), Ok(Push::Write(BlockId(3))));
    sender.handle(now, SenderEvent::Drained);
    let payload = Bytes::new();
    sender.handle(now, SenderEvent::Complete { payload });
    assert!(matches!(&sends(&mut sender)[..], [ToReceiver::Complete { blocks, .. }] if *blocks == (2..4)));
    sender.handle(now, say(9, ToSender::Committed));
    assert_eq!(sender.outcome(), Some(&Ok(())));
    let (from, to, reason) = (PathKind::Tcp, PathKind::Shm, broke().to_string());
    assert_eq!(sender.fallbacks(), [Fallback { from, to, reason }]);
}

#[test]
fn without_another_path_it_fails_as_the_first_one_did() {
    let mut sender = granted(0..2);
    sender.handle(4 * SECOND, say(7, ToSender::Fence { error: broke() }));
    sender.take_effects();
    let offered = String::new();
    let wanted = "tcp".to_owned();
    let error = TransferError::NoPath { wanted, offered };
    sender.handle(4 * SECOND, SenderEvent::ConnectFailed { error });
    assert_eq!(sender.outcome(), Some(&Err(broke())));
    assert!(sender.is_over(), "nothing is left to fence");
    assert_eq!(sends(&mut sender), [ToReceiver::Abort { error: broke() }]);
}

#[test]
fn an_ask_that_is_refused_for_its_path_takes_another() {
    let mut sender = sender();
    sender.handle(SECOND, SenderEvent::Connected { path: PathKind::Shm });
    sender.handle(SECOND, SenderEvent::Reserve { context_tokens: 40 });
    sender.take_effects();
    let message = ToSender::Refused { error: broke() };
    sender.handle(SECOND, SenderEvent::Message { epoch: None, message });
    let failed = vec![PathKind::Shm];
    assert_eq!(sender.take_effects(), [SenderEffect::NextPath { failed }]);
    sender.handle(SECOND, SenderEvent::Connected { path: PathKind::Tcp });
    assert!(matches!(
        &sends(&mut sender)[..],
        [ToReceiver::Reserve {
            path: PathKind::Tcp,
            ..
        }]
    ));
}

#[test]
fn a_commit_before_the_break_counts() {
    let mut sender = granted(0..0);
    sender.handle(SECOND, SenderEvent::Complete { payload: Bytes::new() });
    let (epoch, error) = (Epoch(7), broke());
    sender.handle(SECOND, SenderEvent::WriteFailed { epoch, error });
    sender.handle(SECOND, say(7, ToSender::Committed));
    assert_eq!(sender.outcome(), Some(&Ok(())));
    sender.take_effects();
    sender.handle(SECOND, SenderEvent::Connected { path: PathKind::Shm });
    assert!(sender.take_effects().is_empty());
}

#[test]
fn the_digest_is_said_when_all_is_summed() {
    let limits = SenderLimits {
        digest: true,
        ..sender().limits
    };
    let mut sender = Sender::new(limits);
    sender.handle(SECOND, SenderEvent::Connected { path: PathKind::Tcp });
    sender.handle(SECOND, SenderEvent::Reserve { context_tokens: 40 });
    sender.handle(SECOND, grant(7, 0..1));
    sender.take_effects();
    assert_eq!(sender.push(SECOND, 0, &(0..2)), Ok(Push::Write(BlockId(0))));
    sender.handle(SECOND, SenderEvent::Complete { payload: Bytes::new() });
    assert_eq!(sends(&mut sender), []);
    let (ordinal, layers, sum) = (0, 2, 55);
    sender.handle(SECOND, SenderEvent::Summed { ordinal, layers, sum });
    assert!(matches!(
        &sends(&mut sender)[..],
        [ToReceiver::Complete { digest: Some(55), .. }]
    ));
}
