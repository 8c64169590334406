//! Both roles together: hand-overs, cancellation, deadlines, want of room, failed attempts. After each, every block of both
//! nodes is free or cached and the pools are sound. The scripted engine reads its context back from the arena, so equal
//! output means that the right blocks arrived whole.

#![allow(clippy::unwrap_used)]

mod harness;

use baton_node_host::NodeService;
use baton_node_host::engine::Speculation;
use baton_proto::v1::node_server::Node;
use baton_proto::v1::{self, decode_command::Command, prefill_event};
use baton_types::{Attempt, Budget, NodeRole, Ticket, Work};
use harness::{Shape, TestNode, eventually, run_alone, run_pair, soon};
use std::time::Duration;
use tonic::Code;

async fn pair() -> (TestNode, TestNode) {
    (
        TestNode::start(NodeRole::Prefill, Shape::default()).await,
        TestNode::start(NodeRole::Decode, Shape::default()).await,
    )
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn handed_over_alone_and_with_a_warm_cache_give_the_same_tokens() {
    let (p, d) = pair().await;
    let alone = TestNode::start(NodeRole::Decode, Shape::default()).await;
    for (seed, tokens) in [1, 15, 16, 17, 32, 33, 100, 300].into_iter().enumerate() {
        let seed = u32::try_from(seed).unwrap();
        let expected = run_alone(&alone, &alone.work(seed, tokens, 24)).await;
        assert_eq!(expected.tokens.len(), 24);
        assert_eq!(expected.finish, Some(v1::FinishReason::Length));
        let (prefilled, decoded) = run_pair(&p, &d, &d.work(seed, tokens, 24)).await;
        assert_eq!(decoded.tokens, expected.tokens, "{tokens} prompt tokens");
        assert_eq!(decoded.finish, expected.finish);
        let first = prefilled.first.clone().unwrap();
        assert_eq!((first.index, first.token), (0, expected.tokens[0]));
        assert!(prefilled.failed.is_none(), "{prefilled:?}");
        assert_eq!(prefilled.handed_over.unwrap().path, "memory");
        let (again, warm) = run_pair(&p, &d, &d.work(seed, tokens, 24)).await;
        assert_eq!(warm.tokens, expected.tokens);
        assert_eq!(again.cached_tokens, (tokens - 1) / 16 * 16, "the prefill node's cache");
        assert_eq!(warm.held_tokens, tokens / 16 * 16, "the decode node's cache");
        let once_more = run_alone(&alone, &alone.work(seed, tokens, 24)).await;
        assert_eq!(once_more.tokens, expected.tokens);
        assert_eq!(once_more.cached_tokens, (tokens - 1) / 16 * 16);
    }
    for node in [p, d, alone] {
        node.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn generated_tokens_go_on_where_they_ended_and_hit_the_cache() {
    let (p, d) = pair().await;
    let salted = |salt| d.salted(d.work(3, 40, 40), salt);
    let (_, whole) = run_pair(&p, &d, &salted("mine")).await;
    let (prefilled, decoded) = run_pair(&p, &d, &salted("yours")).await;
    assert_eq!(
        (prefilled.cached_tokens, decoded.held_tokens),
        (0, 0),
        "another's cache"
    );
    assert_eq!(decoded.tokens, whole.tokens);
    let mut work = d.work(3, 40, 40);
    work.generated = whole.tokens[..30].to_vec();
    let work = d.salted(work, "mine");
    let mut stream = d.open(&work, false);
    let accepted = stream.accepted().await;
    assert_eq!(
        accepted.held_blocks, 4,
        "70 tokens: blocks of generated tokens have their identity too"
    );
    let mut prefilling = p.prefill(&work, &d).unwrap();
    assert_eq!(
        prefilling.finish().await.first.map(|first| first.token),
        Some(whole.tokens[30])
    );
    match stream.next().await {
        Some(Ok(v1::decode_event::Event::Committed(committed))) => {
            assert_eq!((committed.index, committed.token), (30, whole.tokens[30]));
        }
        other => panic!("{other:?}"),
    }
    let mut rest = vec![whole.tokens[30]];
    while let Some(event) = stream.next().await {
        if let v1::decode_event::Event::Tokens(frame) = event.unwrap() {
            assert_eq!(frame.first_index as usize, 30 + rest.len());
            rest.extend(frame.tokens);
        }
    }
    assert_eq!(rest, whole.tokens[30..]);
    p.stop().await;
    d.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_first_token_that_ends_the_request_hands_nothing_over() {
    let (p, d) = pair().await;
    let work = d.work(1, 50, 1);
    let mut stream = d.open(&work, false);
    stream.accepted().await;
    let prefilled = p.prefill(&work, &d).unwrap().finish().await;
    assert_eq!(prefilled.first.unwrap().finish_reason(), v1::FinishReason::Length);
    assert!(prefilled.handed_over.is_none() && prefilled.failed.is_none());
    stream.command(Command::Cancel(v1::DecodeCancel {}));
    assert_eq!(stream.finish().await.finish, Some(v1::FinishReason::Cancelled));
    p.stop().await;
    d.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn cancelling_at_each_stage_frees_everything() {
    let slow = || Shape {
        stub: "stub:prefill_us=2000,decode_us=2000",
        ..Shape::default()
    };
    let p = TestNode::start(NodeRole::Prefill, slow()).await;
    let d = TestNode::start(NodeRole::Decode, slow()).await;
    // Before any prefill.
    let mut stream = d.open(&d.work(1, 100, 50), false);
    stream.accepted().await;
    drop(stream);
    d.is_empty_again().await;
    // While the prompt is computed: 600 tokens take more than a second, the cancel must not.
    let work = d.work(2, 600, 50);
    let mut stream = d.open(&work, false);
    stream.accepted().await;
    let mut prefilling = p.prefill(&work, &d).unwrap();
    assert!(matches!(
        prefilling.next().await,
        Some(prefill_event::Event::Started(_))
    ));
    eventually("a reservation", || d.host.pool().counts().reserved > 0).await;
    drop(prefilling);
    p.is_empty_again().await;
    assert!(
        p.host.pool().counts().cached < 600 / 16,
        "the prompt was not computed to its end"
    );
    drop(stream);
    d.is_empty_again().await;
    // While the decode node alone gives it up, the prefill node learns it by the hand-over's failure.
    let work = d.work(3, 600, 50);
    let mut stream = d.open(&work, false);
    stream.accepted().await;
    let mut prefilling = p.prefill(&work, &d).unwrap();
    eventually("a reservation", || d.host.pool().counts().reserved > 0).await;
    drop(stream);
    let prefilled = prefilling.finish().await;
    assert!(prefilled.failed.is_some() && prefilled.first.is_none(), "{prefilled:?}");
    p.is_empty_again().await;
    d.is_empty_again().await;
    // While tokens flow.
    let work = d.work(4, 40, 400);
    let mut stream = d.open(&work, false);
    stream.accepted().await;
    p.prefill(&work, &d).unwrap().finish().await;
    loop {
        match stream.next().await {
            Some(Ok(v1::decode_event::Event::Tokens(_))) => break,
            Some(Ok(_)) => {}
            other => panic!("{other:?}"),
        }
    }
    drop(stream);
    p.stop().await;
    d.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_deadline_ends_both_sides() {
    let slow = || Shape {
        stub: "stub:prefill_us=2000,decode_us=2000",
        ..Shape::default()
    };
    let p = TestNode::start(NodeRole::Prefill, slow()).await;
    let d = TestNode::start(NodeRole::Decode, slow()).await;
    let mut work = d.work(1, 600, 50);
    work.budget = Budget(Duration::from_millis(150));
    let mut stream = d.open(&work, false);
    stream.accepted().await;
    let prefilled = p.prefill(&work, &d).unwrap().finish().await;
    assert_eq!(
        prefilled.failed.map(|failed| failed.code),
        Some(Code::DeadlineExceeded as u32)
    );
    assert_eq!(stream.failure().await.code, Code::DeadlineExceeded as u32);
    p.stop().await;
    d.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_room_a_request_waits_until_there_is_some() {
    let p = TestNode::start(NodeRole::Prefill, Shape::default()).await;
    let small = Shape {
        blocks: 12,
        stub: "stub:decode_us=1000",
        ..Shape::default()
    };
    let d = TestNode::start(NodeRole::Decode, small).await;
    let alone = TestNode::start(NodeRole::Decode, Shape::default()).await;
    // Eight of twelve blocks.
    let first = d.work(1, 112, 64);
    let mut holding = d.open(&first, false);
    holding.accepted().await;
    p.prefill(&first, &d).unwrap().finish().await;
    // Needs eight too. Its prompt is of several chunks, of which only one is computed ahead.
    let second = d.work(2, 112, 10);
    let mut waiting = d.open(&second, false);
    waiting.accepted().await;
    let mut prefilling = p.prefill(&second, &d).unwrap();
    assert!(matches!(
        prefilling.next().await,
        Some(prefill_event::Event::Started(_))
    ));
    eventually("an ask that waits", || d.host.endpoint().stats().queued_asks == 1).await;
    eventually("one chunk", || p.host.engine().load().queued == 1).await;
    assert_eq!(p.host.engine().load().queued_tokens, 112 - 32);
    drop(holding);
    let prefilled = prefilling.finish().await;
    assert!(prefilled.failed.is_none(), "{prefilled:?}");
    let expected = run_alone(&alone, &alone.work(2, 112, 10)).await;
    assert_eq!(waiting.finish().await.tokens, expected.tokens);
    for node in [p, d, alone] {
        node.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_prefill_node_takes_over_after_a_failure_midway() {
    let slow = || Shape {
        stub: "stub:prefill_us=500",
        ..Shape::default()
    };
    let p1 = TestNode::start(NodeRole::Prefill, slow()).await;
    let (p2, d) = pair().await;
    let work = d.work(5, 400, 20);
    let mut stream = d.open(&work, false);
    stream.accepted().await;
    let mut prefilling = p1.prefill(&work, &d).unwrap();
    assert!(matches!(
        prefilling.next().await,
        Some(prefill_event::Event::Started(_))
    ));
    eventually("a reservation", || d.host.pool().counts().reserved > 0).await;
    drop(prefilling);
    let mut second = work.clone();
    second.attempt = Attempt(2);
    stream.command(Command::Supersede(v1::Supersede { attempt: 2 }));
    let prefilled = p2.prefill(&second, &d).unwrap().finish().await;
    assert!(prefilled.failed.is_none(), "{prefilled:?}");
    let decoded = stream.finish().await;
    let alone = TestNode::start(NodeRole::Decode, Shape::default()).await;
    assert_eq!(decoded.tokens, run_alone(&alone, &alone.work(5, 400, 20)).await.tokens);
    for node in [p1, p2, d, alone] {
        node.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_attempt_that_nobody_follows_up_is_told_as_the_prefill_node_s_failure() {
    let slow = Shape {
        stub: "stub:prefill_us=500",
        ..Shape::default()
    };
    let p = TestNode::start(NodeRole::Prefill, slow).await;
    let d = TestNode::start(NodeRole::Decode, Shape::default()).await;
    let work = d.work(5, 400, 20);
    let mut stream = d.open(&work, false);
    stream.accepted().await;
    let prefilling = p.prefill(&work, &d).unwrap();
    eventually("a reservation", || d.host.pool().counts().reserved > 0).await;
    drop(prefilling);
    let failed = stream.failure().await;
    assert!(failed.retryable && failed.peer_at_fault, "{failed:?}");
    drop(stream);
    p.stop().await;
    d.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sequences_that_outgrow_the_arena_give_way_and_still_give_their_tokens() {
    let small = Shape {
        blocks: 14,
        ..Shape::default()
    };
    let d = TestNode::start(NodeRole::Decode, small).await;
    let alone = TestNode::start(NodeRole::Decode, Shape::default()).await;
    let mut streams: Vec<_> = (0..4).map(|seed| d.open(&d.work(seed, 30, 120), true)).collect();
    for (seed, stream) in (0..).zip(&mut streams) {
        let decoded = stream.finish().await;
        let expected = run_alone(&alone, &alone.work(seed, 30, 120)).await;
        assert_eq!(decoded.tokens, expected.tokens, "seed {seed}");
    }
    drop(streams);
    d.stop().await;
    alone.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_at_once_and_some_cancelled_leave_nothing_behind() {
    let (p, d) = pair().await;
    let alone = TestNode::start(
        NodeRole::Decode,
        Shape {
            queue: 64,
            ..Shape::default()
        },
    )
    .await;
    let mut expected = Vec::new();
    for seed in 0..12 {
        expected.push(run_alone(&alone, &alone.work(seed, 20 + 13 * seed, 12)).await.tokens);
    }
    let runs = (0..12u32).map(|seed| {
        let (p, d) = (&p, &d);
        let expected = &expected[seed as usize];
        async move {
            let work = d.work(seed, 20 + 13 * seed, 12);
            if seed % 4 == 3 {
                let mut stream = d.open(&work, false);
                stream.accepted().await;
                let mut prefilling = p.prefill(&work, d).unwrap();
                prefilling.next().await;
                drop(stream);
            } else {
                assert_eq!(run_pair(p, d, &work).await.1.tokens, *expected, "seed {seed}");
            }
        }
    });
    soon("all of them", futures::future::join_all(runs)).await;
    for node in [p, d, alone] {
        node.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_cannot_be_served_is_refused_with_its_reason() {
    let shape = Shape {
        blocks: 8,
        queue: 1,
        running: 1,
        stub: "stub:prefill_us=1000,context=400",
        ..Shape::default()
    };
    let p = TestNode::start(NodeRole::Prefill, shape).await;
    let d = TestNode::start(
        NodeRole::Decode,
        Shape {
            stub: "stub:context=400",
            ..Shape::default()
        },
    )
    .await;
    let refused = |work: &baton_types::Work| p.prefill(work, &d).err().unwrap();
    let status = refused(&p.work(1, 390, 20));
    assert_eq!(status.code(), Code::InvalidArgument);
    assert!(
        status.message().contains("max_tokens") && status.message().contains("400"),
        "{status:?}"
    );
    let status = refused(&p.work(1, 200, 20));
    assert!(status.message().contains("--kv-bytes"), "{status:?}");
    let mut other = p.work(1, 20, 20);
    other.fingerprint = baton_types::ModelFingerprint([9; 32]);
    assert_eq!(refused(&other).code(), Code::FailedPrecondition);
    let mut late = p.work(1, 20, 20);
    late.budget = Budget(Duration::ZERO);
    assert_eq!(refused(&late).code(), Code::DeadlineExceeded);
    let mut foreign = p.work(1, 20, 20);
    foreign.prompt[3] = 5000;
    assert!(refused(&foreign).message().starts_with("prompt"));
    // A full queue: one is computed, one waits, the third is sent away.
    let streams: Vec<_> = (0..2)
        .map(|seed| {
            let work = d.work(seed, 100, 10);
            let stream = d.open(&work, false);
            (stream, p.prefill(&work, &d))
        })
        .collect();
    eventually("one that is computed", || p.host.engine().load().queued <= 1).await;
    let mut last = None;
    for seed in 2..5 {
        last = Some(p.prefill(&d.work(seed, 100, 10), &d));
        if let Some(Err(_)) = &last {
            break;
        }
    }
    let full = last.and_then(Result::err).unwrap();
    assert_eq!(full.code(), Code::ResourceExhausted);
    assert!(full.metadata().get("retry-after-ms").is_some());
    p.host.begin_drain(Duration::from_secs(1));
    assert_eq!(refused(&p.work(9, 20, 20)).code(), Code::Unavailable);
    drop(streams);
    p.stop().await;
    d.stop().await;
}

/// The same work as a node is told that is to take it over: with what was generated so far, under another ticket.
fn taken_over(node: &TestNode, work: &Work, generated: &[u32]) -> Work {
    let work = Work {
        ticket: Ticket::random(),
        generated: generated.to_vec(),
        ..work.clone()
    };
    node.salted(work, "")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_running_sequence_goes_on_elsewhere_with_its_kv_while_it_goes_on_here() {
    let slow = || Shape {
        stub: "stub:decode_us=3000",
        ..Shape::default()
    };
    goes_on_elsewhere(slow(), slow()).await;
}

/// Its tokens come several at a time then, and the last word with the next one's.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_running_sequence_with_drafts_goes_on_elsewhere_too() {
    let slow = |speculation| Shape {
        stub: "stub:decode_us=6000,vocab=3",
        speculation,
        ..Shape::default()
    };
    goes_on_elsewhere(slow(Speculation::Always), slow(Speculation::Off)).await;
}

async fn goes_on_elsewhere(from: Shape, to: Shape) {
    let from = TestNode::start(NodeRole::Decode, from).await;
    let to = TestNode::start(NodeRole::Decode, to).await;
    // Prompts that end within a block and at its border; known tokens that end within one.
    for (seed, prompt, ahead) in [(1, 37, 8), (2, 48, 13), (3, 5, 24)] {
        let work = from.work(seed, prompt, 100);
        let reference = run_alone(&to, &work).await;
        to.host.pool().clear_cache();
        let mut present = from.open(&work, true);
        let known = present.tokens(3).await;
        let context = (prompt as usize + known.len() + ahead).next_multiple_of(16);
        let ahead = context - prompt as usize - known.len();
        let mut next = to.open_ahead(&taken_over(&to, &work, &known), false, u32::try_from(ahead).unwrap());
        let accepted = next.accepted().await;
        present.hand_on(&accepted, &work, known.len(), ahead);
        // What the next node repeats of the last word is the token behind the border.
        let before = reference.tokens[..known.len() + ahead].to_vec();
        let (taken, stayed) = tokio::join!(next.finish_after(before), present.finish_after(known));
        assert_eq!(taken.tokens, reference.tokens);
        assert_eq!(stayed.tokens, reference.tokens, "it was not disturbed");
        let [word] = &stayed.handed_on[..] else {
            panic!("{stayed:?}")
        };
        assert_eq!(word.ticket, accepted.ticket);
        let Some(v1::handed_on::End::HandedOver(report)) = &word.end else {
            panic!("{word:?}")
        };
        assert!(report.bytes > 0);
    }
    for node in [from, to] {
        node.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sequence_that_gives_way_while_it_is_handed_on_still_arrives() {
    let shape = |blocks| Shape {
        blocks,
        stub: "stub:decode_us=2000,prefill_us=100",
        ..Shape::default()
    };
    // Two sequences of up to nine blocks in twelve: the later one gives way.
    let from = TestNode::start(NodeRole::Decode, shape(12)).await;
    let to = TestNode::start(NodeRole::Decode, shape(64)).await;
    let (first, second) = (from.work(1, 40, 100), from.work(2, 40, 100));
    let reference = run_alone(&to, &second).await;
    let mut greedy = from.open(&first, true);
    let begun = greedy.tokens(1).await;
    let mut present = from.open(&second, true);
    let known = present.tokens(2).await;
    let ahead = (40 + known.len() + 60).next_multiple_of(16) - 40 - known.len();
    let mut next = to.open_ahead(&taken_over(&to, &second, &known), false, u32::try_from(ahead).unwrap());
    let accepted = next.accepted().await;
    present.hand_on(&accepted, &second, known.len(), ahead);
    let before = reference.tokens[..known.len() + ahead].to_vec();
    // Nobody goes on whose stream nobody reads.
    let (taken, stayed, greedy) = tokio::join!(
        next.finish_after(before),
        present.finish_after(known),
        greedy.finish_after(begun)
    );
    assert_eq!(taken.tokens, reference.tokens);
    assert_eq!(stayed.tokens, reference.tokens);
    assert_eq!(greedy.tokens.len(), 100);
    for node in [from, to] {
        node.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hand_on_that_comes_to_nothing_disturbs_nobody() {
    let slow = |blocks| Shape {
        blocks,
        stub: "stub:decode_us=2000",
        ..Shape::default()
    };
    let from = TestNode::start(NodeRole::Decode, slow(64)).await;
    let to = TestNode::start(NodeRole::Decode, slow(10)).await;
    let work = from.work(1, 40, 100);
    let reference = run_alone(&from, &work).await;
    let mut present = from.open(&work, true);
    let known = present.tokens(2).await;
    let ahead = 64 - 40 - known.len();
    let mut next = to.open_ahead(&taken_over(&to, &work, &known), false, u32::try_from(ahead).unwrap());
    let accepted = next.accepted().await;
    drop(next);
    present.hand_on(&accepted, &work, known.len(), ahead);
    let stayed = present.finish_after(known).await;
    assert_eq!(stayed.tokens, reference.tokens);
    let [word] = &stayed.handed_on[..] else {
        panic!("{stayed:?}")
    };
    assert!(matches!(word.end, Some(v1::handed_on::End::Failed(_))), "{word:?}");

    let mut present = from.open(&work, true);
    present.tokens(2).await;
    present.hand_on(&accepted, &work, 2, 1);
    let refused = soon("a refusal", async {
        loop {
            match present.next().await {
                Some(Err(status)) => break status,
                Some(Ok(_)) => {}
                None => panic!("no refusal"),
            }
        }
    });
    let refused = refused.await;
    assert!(
        refused.message().starts_with("context_tokens: 43; whole blocks of 16"),
        "{refused}"
    );
    for node in [from, to] {
        node.stop().await;
    }
}

#[tokio::test]
async fn a_program_of_one_role_says_so_when_it_is_to_change() {
    let node = TestNode::start(NodeRole::Decode, Shape::default()).await;
    let service = NodeService::new(node.host.clone(), node.role.clone().into(), Vec::new());
    let ask = |role: v1::NodeRole| {
        tonic::Request::new(v1::SetRoleRequest {
            role: role.into(),
            ..Default::default()
        })
    };
    let refused = service.set_role(ask(v1::NodeRole::Prefill)).await.unwrap_err();
    assert_eq!(refused.code(), tonic::Code::FailedPrecondition);
    assert!(
        refused.message().contains("decode-node has the decode role only"),
        "{refused}"
    );
    service.set_role(ask(v1::NodeRole::Decode)).await.unwrap();
    assert!(node.host.phase().takes_work(), "it is a decode node already");
    node.stop().await;
}
