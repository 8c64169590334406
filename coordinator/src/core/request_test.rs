//! The rules of the machine, one order of events each. Many orders: `simulation_test`.

use super::*;
use crate::{ApiCode, ApiError};
use baton_types::{Attempt, FinishReason, Instance, NodeId, Ticket, TokenLogprobs};

fn node(name: &str) -> Node {
    let instance = Instance(name.bytes().fold(0, |sum, byte| sum * 256 + u64::from(byte)));
    Node {
        id: NodeId::new(name),
        instance,
    }
}

fn peer(name: &str) -> Peer {
    Peer {
        node: NodeId::new(name),
        instance: node(name).instance,
        addresses: vec!["memory://x".into()],
    }
}

struct Machine {
    request: Request,
    effects: Vec<Effect>,
    now: u64,
}

impl Machine {
    fn new(max_tokens: usize, logprobs: bool) -> Self {
        let (request, effects) = Request::new(RequestSpec {
            max_tokens,
            logprobs,
            eos_tokens: [99].into(),
            prompt_tokens: 5,
            block_tokens: 2,
            move_ahead: 1,
        });
        assert_eq!(effects, [Effect::Place { keep_decode: None }]);
        Self {
            request,
            effects: Vec::new(),
            now: 0,
        }
    }

    fn on(&mut self, event: Event) -> Vec<Effect> {
        self.now += 10;
        self.request.on(event, self.now, &mut self.effects);
        std::mem::take(&mut self.effects)
    }

    fn pair(&mut self, prefill: &str, decode: &str) -> Vec<Effect> {
        self.on(Event::Placed(Placement::Pair {
            prefill: node(prefill),
            decode: node(decode),
        }))
    }

    fn accepted(&mut self, leg: u32) -> Vec<Effect> {
        self.on(Event::Decode(
            Leg(leg),
            DecodeEvent::Accepted {
                ticket: Ticket(7),
                peer: peer("d"),
            },
        ))
    }

    fn first(&mut self, leg: u32, index: usize, token: u32) -> Vec<Effect> {
        self.first_of(
            leg,
            FirstToken {
                index,
                token,
                logprobs: None,
                finish: None,
                prefill_us: 5,
                prefill_tokens: 3,
            },
        )
    }

    fn first_of(&mut self, leg: u32, first: FirstToken) -> Vec<Effect> {
        self.on(Event::Prefill(Leg(leg), PrefillEvent::FirstToken(first)))
    }

    fn committed(&mut self, leg: u32, attempt: u32, index: usize, token: u32) -> Vec<Effect> {
        let event = DecodeEvent::Committed {
            attempt: Attempt(attempt),
            index,
            token,
            handover_bytes: 1000,
            held_tokens: 32,
        };
        self.on(Event::Decode(Leg(leg), event))
    }

    fn tokens(&mut self, leg: u32, first_index: usize, tokens: &[u32]) -> Vec<Effect> {
        let batch = TokenBatch {
            first_index,
            tokens: tokens.to_vec(),
            logprobs: Vec::new(),
        };
        self.on(Event::Decode(Leg(leg), DecodeEvent::Tokens { batch, local: None }))
    }

    fn done(&mut self, leg: u32, reason: FinishReason) -> Vec<Effect> {
        let event = DecodeEvent::Finished {
            reason,
            decoded_tokens: 2,
            decode_us: 50,
        };
        self.on(Event::Decode(Leg(leg), event))
    }

    fn handed_over(&mut self, leg: u32) -> Vec<Effect> {
        let event = PrefillEvent::HandedOver(Handover {
            path: "tcp".into(),
            bytes: 1000,
            exposed_us: 4,
            reserve_us: 2,
            ..Handover::default()
        });
        self.on(Event::Prefill(Leg(leg), event))
    }

    fn prefill_fails(&mut self, leg: u32, kind: FailureKind) -> Vec<Effect> {
        self.on(Event::Prefill(
            Leg(leg),
            PrefillEvent::Failed(Failure {
                kind,
                message: "oh".into(),
            }),
        ))
    }

    fn decode_fails(&mut self, leg: u32, kind: FailureKind) -> Vec<Effect> {
        self.on(Event::Decode(
            Leg(leg),
            DecodeEvent::Failed(Failure {
                kind,
                message: "oh".into(),
            }),
        ))
    }

    /// A pair of nodes that has delivered its first token and committed.
    fn running() -> Self {
        let mut m = Self::new(8, false);
        m.pair("p", "d");
        m.accepted(0);
        assert_eq!(m.first(1, 0, 10), [deliver(0, &[10])]);
        assert_eq!(m.committed(0, 1, 0, 10), []);
        m
    }
}

fn deliver(first_index: usize, tokens: &[u32]) -> Effect {
    Effect::Deliver(TokenBatch {
        first_index,
        tokens: tokens.to_vec(),
        logprobs: Vec::new(),
    })
}

fn outcome(effects: &[Effect]) -> &Outcome {
    match effects.last() {
        Some(Effect::End(outcome)) => outcome,
        other => panic!("no end but {other:?}"),
    }
}

fn error(effects: &[Effect]) -> &ApiError {
    match outcome(effects) {
        Outcome::Failed(error) => error,
        Outcome::Finished { .. } => panic!("finished: {effects:?}"),
    }
}

#[test]
fn the_normal_path() {
    let mut m = Machine::new(8, false);
    let opened = m.pair("p", "d");
    let attempt = Attempt::FIRST;
    assert_eq!(
        opened,
        [Effect::OpenDecode {
            leg: Leg(0),
            node: node("d"),
            attempt,
            local_prefill: false
        }]
    );
    let asked = Effect::OpenPrefill {
        leg: Leg(1),
        node: node("p"),
        ticket: Ticket(7),
        attempt,
        peer: peer("d"),
        base: 0,
    };
    assert_eq!(m.accepted(0), [asked]);
    m.on(Event::Prefill(
        Leg(1),
        PrefillEvent::Started {
            queue_us: 3,
            cached_tokens: 16,
        },
    ));
    assert_eq!(m.first(1, 0, 10), [deliver(0, &[10])]);
    assert_eq!(m.handed_over(1), [Effect::Close(Leg(1))]);
    assert_eq!(m.committed(0, 1, 0, 10), []);
    assert_eq!(m.tokens(0, 1, &[11, 12]), [deliver(1, &[11, 12])]);
    let end = m.done(0, FinishReason::Length);
    assert_eq!(end[0], Effect::Close(Leg(0)));
    let Outcome::Finished {
        reason,
        completion_tokens,
        cached_tokens,
        timeline,
    } = outcome(&end)
    else {
        panic!()
    };
    assert_eq!(
        (*reason, *completion_tokens, *cached_tokens),
        (FinishReason::Length, 3, 16)
    );
    assert_eq!(
        (
            timeline.handover_path.as_str(),
            timeline.handover_bytes,
            timeline.held_tokens,
            timeline.exposed_us
        ),
        ("tcp", 1000, 32, 4)
    );
    assert_eq!(
        (timeline.prefill_node.as_str(), timeline.decode_node.as_str()),
        ("p", "d")
    );
    assert_eq!(
        (timeline.queue_us, timeline.ttft_us, timeline.decode_us_per_token),
        (23, 40, 25)
    );
    assert_eq!((timeline.attempts, timeline.fallbacks.len()), (1, 0));
    assert_eq!(m.on(Event::Cancelled), []);
}

#[test]
fn the_last_figures_are_waited_for_but_not_for_long() {
    let mut m = Machine::running();
    assert_eq!(m.done(0, FinishReason::Stop), [Effect::StartGrace]);
    let end = m.on(Event::GraceOver);
    let Outcome::Finished { timeline, .. } = outcome(&end) else {
        panic!()
    };
    assert_eq!(timeline.handover_path, "unknown");
    let mut m = Machine::running();
    m.done(0, FinishReason::Stop);
    assert!(
        matches!(outcome(&m.handed_over(1)), Outcome::Finished { timeline, .. } if timeline.handover_path == "tcp")
    );
}

#[test]
fn one_node_alone() {
    let mut m = Machine::new(8, false);
    let opened = m.on(Event::Placed(Placement::Alone { decode: node("d") }));
    assert!(matches!(
        opened[..],
        [Effect::OpenDecode {
            local_prefill: true,
            ..
        }]
    ));
    assert_eq!(m.accepted(0), []);
    let local = Some(LocalPrefill {
        queue_us: 1,
        prefill_us: 2,
        prefill_tokens: 3,
        cached_tokens: 4,
    });
    let batch = TokenBatch {
        first_index: 0,
        tokens: vec![10],
        logprobs: Vec::new(),
    };
    assert_eq!(
        m.on(Event::Decode(Leg(0), DecodeEvent::Tokens { batch, local })),
        [deliver(0, &[10])]
    );
    let end = m.done(0, FinishReason::Stop);
    let Outcome::Finished {
        timeline,
        cached_tokens,
        ..
    } = outcome(&end)
    else {
        panic!()
    };
    assert_eq!(
        (
            timeline.handover_path.as_str(),
            timeline.prefill_node.as_str(),
            *cached_tokens
        ),
        ("local", "d", 4)
    );
}

#[test]
fn a_first_token_that_is_the_last_needs_no_hand_over() {
    let mut m = Machine::new(1, false);
    m.pair("p", "d");
    m.accepted(0);
    let finish = Some(FinishReason::Length);
    let end = m.first_of(
        1,
        FirstToken {
            index: 0,
            token: 10,
            logprobs: None,
            finish,
            prefill_us: 0,
            prefill_tokens: 0,
        },
    );
    assert_eq!(
        end[..3],
        [deliver(0, &[10]), Effect::Close(Leg(1)), Effect::Close(Leg(0))]
    );
    assert!(matches!(
        outcome(&end),
        Outcome::Finished {
            reason: FinishReason::Length,
            ..
        }
    ));
}

#[test]
fn a_failed_prefill_node_is_replaced_while_the_decode_node_waits() {
    let mut m = Machine::new(8, false);
    m.pair("p", "d");
    m.accepted(0);
    m.first(1, 0, 10);
    let effects = m.prefill_fails(1, FailureKind::Died);
    let keep = Effect::Place {
        keep_decode: Some(node("d").instance),
    };
    let supersede = Effect::Supersede {
        leg: Leg(0),
        attempt: Attempt(2),
    };
    assert!(matches!(&effects[0], Effect::NodeFailed { node: failed, .. } if *failed == node("p")));
    assert_eq!(effects[1..], [Effect::Close(Leg(1)), supersede, keep]);
    assert_eq!(m.request.excluded(), [node("p").instance]);
    let asked = m.pair("p2", "d");
    assert!(
        matches!(
            &asked[..],
            [Effect::OpenPrefill {
                leg: Leg(2),
                attempt: Attempt(2),
                base: 0,
                ..
            }]
        ),
        "{asked:?}"
    );
    // The same token again is no news; what the dead one still says is ignored.
    assert_eq!(m.first(2, 0, 10), []);
    assert_eq!(m.first(1, 0, 77), []);
    assert_eq!(m.committed(0, 2, 0, 10), []);
    assert_eq!(m.tokens(0, 1, &[11]), [deliver(1, &[11])]);
}

#[test]
fn without_another_prefill_node_the_decode_node_starts_anew_alone() {
    let mut m = Machine::new(8, false);
    m.pair("p", "d");
    m.accepted(0);
    m.first(1, 0, 10);
    m.prefill_fails(1, FailureKind::Failed { peer: false });
    let effects = m.on(Event::Placed(Placement::Alone { decode: node("d") }));
    let attempt = Attempt::FIRST;
    let open = Effect::OpenDecode {
        leg: Leg(2),
        node: node("d"),
        attempt,
        local_prefill: true,
    };
    assert_eq!(effects, [Effect::Close(Leg(0)), open]);
    assert_eq!(m.request.generated(), [10]);
    assert_eq!(m.tokens(2, 1, &[11]), [deliver(1, &[11])]);
}

#[test]
fn an_attempt_that_was_given_up_may_still_win() {
    let mut m = Machine::new(8, false);
    m.pair("p", "d");
    m.accepted(0);
    m.first(1, 0, 10);
    m.prefill_fails(1, FailureKind::Died);
    // Its KV had arrived: no other prefill node is needed.
    assert_eq!(m.committed(0, 1, 0, 10), []);
    assert_eq!(m.pair("p2", "d"), []);
    assert_eq!(m.tokens(0, 1, &[11]), [deliver(1, &[11])]);
}

#[test]
fn a_dead_decode_node_is_replaced_and_nothing_is_said_twice() {
    let mut m = Machine::running();
    m.tokens(0, 1, &[11, 12]);
    let effects = m.decode_fails(0, FailureKind::Died);
    assert_eq!(
        effects[1..],
        [
            Effect::Close(Leg(1)),
            Effect::Close(Leg(0)),
            Effect::Place { keep_decode: None }
        ]
    );
    m.pair("p", "d2");
    let asked = m.accepted(2);
    assert!(
        matches!(
            &asked[..],
            [Effect::OpenPrefill {
                base: 3,
                attempt: Attempt(1),
                ..
            }]
        ),
        "{asked:?}"
    );
    assert_eq!(m.tokens(0, 3, &[66]), []);
    assert_eq!(m.first(3, 3, 13), [deliver(3, &[13])]);
    assert_eq!(m.committed(2, 1, 3, 13), []);
    assert_eq!(m.tokens(2, 3, &[13, 14]), [deliver(4, &[14])]);
    m.handed_over(3);
    let end = m.done(2, FinishReason::Stop);
    let Outcome::Finished {
        timeline,
        completion_tokens,
        ..
    } = outcome(&end)
    else {
        panic!()
    };
    assert_eq!((*completion_tokens, timeline.attempts), (5, 2));
    assert_eq!(timeline.fallbacks, ["d failed: oh"]);
}

#[test]
fn streams_are_never_spliced() {
    let mut m = Machine::new(8, false);
    m.pair("p", "d");
    m.accepted(0);
    m.first(1, 0, 10);
    let effects = m.committed(0, 1, 0, 11);
    assert_eq!(
        effects,
        [
            Effect::Close(Leg(1)),
            Effect::Close(Leg(0)),
            Effect::Place { keep_decode: None }
        ]
    );
    assert_eq!(m.request.excluded(), []);
    m.pair("p", "d");
    assert!(matches!(m.accepted(2)[..], [Effect::OpenPrefill { base: 1, .. }]));
}

#[test]
fn gaps_and_early_tokens_are_failures_of_the_node() {
    let mut m = Machine::running();
    assert!(matches!(m.tokens(0, 2, &[12])[0], Effect::NodeFailed { .. }));
    let mut m = Machine::new(8, false);
    m.pair("p", "d");
    m.accepted(0);
    assert!(matches!(m.tokens(0, 0, &[10])[0], Effect::NodeFailed { .. }));
    let mut m = Machine::running();
    assert!(matches!(
        m.tokens(0, 1, &[1, 2, 3, 4, 5, 6, 7, 8])[0],
        Effect::NodeFailed { .. }
    ));
}

#[test]
fn the_first_token_comes_from_whoever_is_faster() {
    let mut m = Machine::new(8, false);
    m.pair("p", "d");
    m.accepted(0);
    assert_eq!(m.committed(0, 1, 0, 10), [deliver(0, &[10])]);
    assert_eq!(m.first(1, 0, 10), []);
    assert_eq!(m.tokens(0, 1, &[11]), [deliver(1, &[11])]);
}

#[test]
fn probabilities_are_waited_for() {
    let mut m = Machine::new(8, true);
    m.pair("p", "d");
    m.accepted(0);
    let of = |logprob| TokenLogprobs {
        logprob,
        top: Vec::new(),
    };
    assert_eq!(m.committed(0, 1, 0, 10), []);
    let batch = TokenBatch {
        first_index: 1,
        tokens: vec![11],
        logprobs: vec![of(-2.0)],
    };
    assert_eq!(
        m.on(Event::Decode(Leg(0), DecodeEvent::Tokens { batch, local: None })),
        []
    );
    assert_eq!(m.done(0, FinishReason::Stop), [Effect::StartGrace]);
    let first = FirstToken {
        index: 0,
        token: 10,
        logprobs: Some(of(-1.0)),
        finish: None,
        prefill_us: 0,
        prefill_tokens: 0,
    };
    let all = TokenBatch {
        first_index: 0,
        tokens: vec![10, 11],
        logprobs: vec![of(-1.0), of(-2.0)],
    };
    assert_eq!(m.first_of(1, first), [Effect::Deliver(all)]);
    assert!(matches!(
        outcome(&m.handed_over(1)),
        Outcome::Finished {
            completion_tokens: 2,
            ..
        }
    ));
}

#[test]
fn a_full_node_costs_no_attempt() {
    let mut m = Machine::new(8, false);
    for round in 0..10 {
        m.pair("p", "d");
        let effects = m.decode_fails(round, FailureKind::Full { peer: false });
        assert_eq!(effects[0], Effect::NodeFull(node("d")), "{effects:?}");
        assert_eq!(
            effects[1..],
            [Effect::Close(Leg(round)), Effect::Place { keep_decode: None }]
        );
    }
    assert_eq!(m.request.excluded(), []);
}

#[test]
fn attempts_and_deaths_are_bounded() {
    let mut m = Machine::new(8, false);
    m.pair("p", "d");
    m.decode_fails(0, FailureKind::Unreachable);
    m.pair("p", "d2");
    m.decode_fails(1, FailureKind::Failed { peer: false });
    m.pair("p", "d3");
    let end = m.decode_fails(2, FailureKind::Failed { peer: false });
    assert_eq!(error(&end).code, ApiCode::Unavailable);
    assert!(error(&end).is_retryable() && error(&end).retry_after.is_some());

    let mut m = Machine::new(8, false);
    m.pair("p", "d");
    m.decode_fails(0, FailureKind::Died);
    m.pair("p", "d2");
    assert_eq!(error(&m.decode_fails(1, FailureKind::Died)).code, ApiCode::Internal);
}

#[test]
fn a_lost_goodbye_is_no_failure() {
    let mut m = Machine::running();
    m.tokens(0, 1, &[11, 99]);
    assert!(matches!(
        outcome(&m.decode_fails(0, FailureKind::Died)),
        Outcome::Finished {
            reason: FinishReason::Stop,
            completion_tokens: 3,
            ..
        }
    ));
}

#[test]
fn the_blame_falls_on_whom_it_belongs() {
    let mut m = Machine::new(8, false);
    m.pair("p", "d");
    m.accepted(0);
    let effects = m.prefill_fails(1, FailureKind::Failed { peer: true });
    assert!(matches!(&effects[0], Effect::NodeFailed { node: failed, .. } if *failed == node("d")));
    assert_eq!(effects.last(), Some(&Effect::Place { keep_decode: None }));
    let end = m.on(Event::NotPlaced(ApiError::new(
        ApiCode::Unavailable,
        "no decode node is ready",
    )));
    assert_eq!(error(&end).message, "p failed: oh; then: no decode node is ready");
}

#[test]
fn the_client_and_the_clock_end_it() {
    let mut m = Machine::running();
    let end = m.on(Event::Cancelled);
    assert_eq!(end[..2], [Effect::Close(Leg(1)), Effect::Close(Leg(0))]);
    assert!(matches!(
        outcome(&end),
        Outcome::Finished {
            reason: FinishReason::Cancelled,
            completion_tokens: 1,
            ..
        }
    ));
    let mut m = Machine::running();
    assert_eq!(error(&m.on(Event::DeadlinePassed)).code, ApiCode::DeadlineExceeded);
    let mut m = Machine::running();
    m.tokens(0, 1, &[11, 12]);
    let end = m.on(Event::Stopped { completion_tokens: 2 });
    assert!(matches!(
        outcome(&end),
        Outcome::Finished {
            reason: FinishReason::Stop,
            completion_tokens: 2,
            ..
        }
    ));
}

impl Machine {
    fn move_to(&mut self, name: &str) -> Vec<Effect> {
        self.on(Event::MovePlaced(node(name)))
    }

    fn leaving(&mut self, leg: u32) -> Vec<Effect> {
        self.on(Event::Decode(Leg(leg), DecodeEvent::Leaving))
    }
}

fn alone_with_tokens(max_tokens: usize) -> Machine {
    let mut machine = Machine::new(max_tokens, false);
    machine.on(Event::Placed(Placement::Alone { decode: node("d") }));
    machine.accepted(0);
    machine.tokens(0, 0, &[1, 2]);
    machine
}

#[test]
fn a_draining_node_s_sequence_goes_on_elsewhere_without_gap_or_repeat() {
    let mut machine = alone_with_tokens(20);
    assert_eq!(machine.leaving(0), [Effect::PlaceMove]);
    assert_eq!(machine.leaving(0), [], "said twice");
    assert_eq!(machine.request.not_moved_to(), [node("d").instance]);
    // Five prompt tokens and two generated ones; the border behind the next one is at eight.
    assert_eq!(machine.move_to("e"), [Effect::OpenMove { leg: Leg(1), ahead: 1 }]);
    let handed_on = machine.accepted(1);
    let expected = Effect::HandOn {
        leg: Leg(0),
        ticket: Ticket(7),
        peer: peer("d"),
        context_tokens: 8,
        known: 2,
    };
    assert_eq!(handed_on, [expected]);
    // The other node is faster than the word of the present one.
    assert_eq!(machine.committed(1, 1, 3, 4), []);
    assert_eq!(machine.tokens(1, 4, &[5]), []);
    let batch = |first_index, tokens: &[u32]| {
        Effect::Deliver(TokenBatch {
            first_index,
            tokens: tokens.to_vec(),
            logprobs: Vec::new(),
        })
    };
    let taken_over = machine.tokens(0, 2, &[3, 4]);
    assert_eq!(
        taken_over,
        [
            batch(2, &[3, 4]),
            Effect::Close(Leg(0)),
            Effect::Promote(Leg(1)),
            batch(4, &[5])
        ]
    );
    assert_eq!(machine.tokens(0, 4, &[9]), [], "nobody listens there any more");
    assert_eq!(machine.tokens(1, 5, &[6]), [batch(5, &[6])]);
    // That one drains, too.
    assert_eq!(machine.leaving(1), [Effect::PlaceMove]);
    assert_eq!(machine.move_to("f"), [Effect::OpenMove { leg: Leg(2), ahead: 1 }]);
    let effects = machine.done(1, FinishReason::Length);
    let Some(Effect::End(Outcome::Finished { timeline, .. })) = effects.last() else {
        panic!("{effects:?}")
    };
    assert!(effects.contains(&Effect::Close(Leg(2))));
    assert_eq!((timeline.attempts, timeline.decode_node.as_str()), (1, "e"));
    assert_eq!(timeline.fallbacks, ["d is draining: e goes on from token 3"]);
}

#[test]
fn a_move_that_fails_leaves_the_sequence_where_it_is() {
    let mut machine = alone_with_tokens(20);
    machine.leaving(0);
    for leg in 1..=8 {
        let name = &format!("e{leg}");
        assert_eq!(machine.move_to(name).len(), 1);
        let failure = Failure {
            kind: FailureKind::Failed { peer: false },
            message: "x".into(),
        };
        let effects = machine.on(Event::Decode(Leg(leg), DecodeEvent::Failed(failure)));
        let mut expected = vec![Effect::Close(Leg(leg))];
        expected.extend((leg < 8).then_some(Effect::PlaceMove));
        assert_eq!(effects, expected);
        assert!(machine.request.not_moved_to().contains(&node(name).instance));
    }
    assert_eq!(machine.move_to("h"), [], "often enough");
    assert_eq!(machine.tokens(0, 2, &[3]).len(), 1);
    // Its time there is over: it is done anew.
    let failure = Failure {
        kind: FailureKind::Failed { peer: false },
        message: "its time is over".into(),
    };
    let effects = machine.on(Event::Decode(Leg(0), DecodeEvent::Failed(failure)));
    assert!(effects.contains(&Effect::Place { keep_decode: None }), "{effects:?}");
}

#[test]
fn what_is_nearly_done_is_not_moved() {
    let mut machine = alone_with_tokens(4);
    machine.leaving(0);
    assert_eq!(machine.move_to("e"), []);
    assert_eq!(machine.tokens(0, 2, &[3, 4]).len(), 1);
}
