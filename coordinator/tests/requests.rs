//! Requests through a coordinator whose nodes do as they are told.

#![allow(clippy::unwrap_used)]

mod common;

use baton_proto::v1;
use baton_types::NodeRole;
use common::{Answer, Cluster, FakeNode, Script, request, text, until};
use std::sync::atomic::Ordering;
use tonic::Code;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pair_answers() {
    let (cluster, prefill, decode) = Cluster::pair(&[]).await;
    let answer = cluster.client.clone().generate(request("hello", 30)).await.unwrap();
    let request_id = answer
        .metadata()
        .get("x-request-id")
        .unwrap()
        .to_str()
        .unwrap()
        .to_owned();
    let mut whole = Answer::default();
    let mut stream = answer.into_inner();
    let first = stream.message().await.unwrap().unwrap();
    assert_eq!(first.request_id, request_id);
    whole.text.push_str(&first.text);
    whole.tokens.extend(first.tokens);
    whole.read(&mut stream, usize::MAX).await.unwrap();
    assert_eq!((whole.text, whole.finish), (text(30), v1::FinishReason::Length));
    assert_eq!((whole.usage.prompt_tokens, whole.usage.completion_tokens), (5, 30));
    let timeline = whole.timeline;
    assert_eq!(
        (timeline.prefill_node.as_str(), timeline.decode_node.as_str()),
        ("p0", "d0")
    );
    assert_eq!(
        (
            timeline.handover_path.as_str(),
            timeline.handover_bytes,
            timeline.attempts
        ),
        ("memory", 99, 1)
    );
    assert!(timeline.ttft_us > 0 && timeline.fallbacks.is_empty());
    assert_eq!((prefill.opened(), decode.opened()), (1, 1));
    assert_eq!(
        prefill.works.lock().unwrap()[0].block_hashes,
        decode.works.lock().unwrap()[0].block_hashes
    );
    cluster.idle().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_decode_node_alone_answers() {
    let cluster = Cluster::start(&[]).await;
    let _decode = cluster.node("d0", NodeRole::Decode);
    cluster.ready(1).await;
    let answer = cluster.ask(request("hello", 5)).await.unwrap();
    assert_eq!(
        (answer.text, answer.timeline.handover_path.as_str()),
        (text(5), "local")
    );
    assert_eq!(answer.timeline.prefill_node, "d0");
}

/// Two nodes of one role, of which the first that is asked is the one to fail.
async fn asked_first(nodes: [&FakeNode; 2]) -> usize {
    let asked = || nodes.iter().position(|node| node.opened() > 0);
    until(|| async { asked().is_some() }).await;
    asked().unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_prefill_node_that_fails_is_replaced() {
    for script in [Script::Fail(0), Script::Fail(1)] {
        let (cluster, first, decode) = Cluster::pair(&[]).await;
        let second = cluster.node("p1", NodeRole::Prefill);
        cluster.ready(3).await;
        first.script(script);
        second.load(|load| load.queued_tokens = 1_000_000);
        until(|| async {
            cluster
                .status()
                .await
                .nodes
                .iter()
                .any(|n| n.load.clone().unwrap().queued_tokens > 0)
        })
        .await;
        let answer = cluster.ask(request("hello", 12)).await.unwrap();
        assert_eq!((answer.text, answer.timeline.attempts), (text(12), 2), "{script:?}");
        assert_eq!(answer.timeline.prefill_node, "p1");
        assert_eq!(answer.timeline.fallbacks, ["p0 failed: as the test wants it"]);
        assert_eq!((first.opened(), second.opened(), decode.opened()), (1, 1, 1));
        assert_eq!(decode.counts.superseded.load(Ordering::SeqCst), 1);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_prefill_node_that_dies_is_replaced() {
    for script in [Script::Stall(0), Script::Stall(1)] {
        let (cluster, mut first, _decode) = Cluster::pair(&[]).await;
        let mut second = cluster.node("p1", NodeRole::Prefill);
        cluster.ready(3).await;
        first.script(script);
        second.script(script);
        let mut stream = cluster.stream(request("hello", 12)).await.unwrap();
        let victim = asked_first([&first, &second]).await;
        // The one that was asked keeps to what it was told then.
        first.script(Script::Serve);
        second.script(Script::Serve);
        let mut answer = Answer::default();
        if script == Script::Stall(1) {
            answer.read(&mut stream, 1).await.unwrap();
        }
        [&mut first, &mut second][victim].kill();
        answer.read(&mut stream, usize::MAX).await.unwrap();
        assert_eq!((answer.text, answer.timeline.attempts), (text(12), 2), "{script:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_a_spare_prefill_node_the_decode_node_does_it_all() {
    let (cluster, prefill, decode) = Cluster::pair(&[]).await;
    prefill.script(Script::Fail(1));
    let answer = cluster.ask(request("hello", 12)).await.unwrap();
    assert_eq!(
        (answer.text, answer.timeline.handover_path.as_str()),
        (text(12), "local")
    );
    assert_eq!(decode.opened(), 2);
    assert_eq!(decode.works.lock().unwrap()[1].generated.len(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_decode_node_that_dies_mid_stream_is_replaced() {
    for by_death in [true, false] {
        let (cluster, _prefill, mut first) = Cluster::pair(&[]).await;
        let mut second = cluster.node("d1", NodeRole::Decode);
        cluster.ready(3).await;
        first.script(Script::Stall(4));
        second.script(Script::Stall(4));
        let mut stream = cluster.stream(request("hello", 40)).await.unwrap();
        let victim = asked_first([&first, &second]).await;
        // The one that was asked keeps to what it was told then.
        first.script(Script::Serve);
        second.script(Script::Serve);
        let mut answer = Answer::default();
        answer.read(&mut stream, 5).await.unwrap();
        if by_death {
            [&mut first, &mut second][victim].kill();
        } else {
            [&first, &second][victim].fail();
        }
        answer.read(&mut stream, usize::MAX).await.unwrap();
        assert_eq!(
            (answer.text, answer.finish),
            (text(40), v1::FinishReason::Length),
            "by death: {by_death}"
        );
        assert!(answer.timeline.attempts >= 2);
        cluster.idle().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_a_spare_decode_node_the_error_is_retryable() {
    let (cluster, _prefill, decode) = Cluster::pair(&[]).await;
    decode.script(Script::Fail(3));
    let mut stream = cluster.stream(request("hello", 12)).await.unwrap();
    let mut answer = Answer::default();
    let status = answer.read(&mut stream, usize::MAX).await.unwrap_err();
    assert_eq!((status.code(), answer.text), (Code::Unavailable, text(4)));
    assert!(
        status.message().contains("d0 failed: as the test wants it"),
        "{status:?}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stutter_is_not_heard() {
    let (cluster, _prefill, decode) = Cluster::pair(&[]).await;
    decode.script(Script::Stutter);
    assert_eq!(cluster.ask(request("hello", 40)).await.unwrap().text, text(40));
    let mut with_logprobs = request("hello", 9);
    with_logprobs.sampling.as_mut().unwrap().logprobs = Some(1);
    assert_eq!(cluster.ask(with_logprobs).await.unwrap().text, text(9));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_goes_away_frees_both_nodes() {
    for (prefill_script, decode_script) in [(Script::Stall(1), Script::Serve), (Script::Serve, Script::Stall(3))] {
        let (cluster, prefill, decode) = Cluster::pair(&[]).await;
        prefill.script(prefill_script);
        decode.script(decode_script);
        let mut stream = cluster.stream(request("hello", 12)).await.unwrap();
        Answer::default().read(&mut stream, 1).await.unwrap();
        drop(stream);
        until(|| async { decode.cancelled() == 1 }).await;
        if prefill_script != Script::Serve {
            until(|| async { prefill.cancelled() == 1 }).await;
        }
        cluster.idle().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn cancel_by_name_and_by_time() {
    let (cluster, _prefill, decode) = Cluster::pair(&[]).await;
    decode.script(Script::Stall(3));
    let mut stream = cluster.stream(request("hello", 12)).await.unwrap();
    let request_id = stream.message().await.unwrap().unwrap().request_id;
    let cancel = |request_id: String| {
        let mut client = cluster.client.clone();
        async move {
            client
                .cancel(v1::CancelRequest { request_id })
                .await
                .map(|answer| answer.into_inner().cancelled)
        }
    };
    assert!(cancel(request_id.clone()).await.unwrap());
    let mut last = None;
    while let Some(message) = stream.message().await.unwrap() {
        last = Some(message);
    }
    assert_eq!(last.unwrap().finish_reason(), v1::FinishReason::Cancelled);
    assert!(!cancel(request_id).await.unwrap());
    assert_eq!(cancel("x".into()).await.unwrap_err().code(), Code::InvalidArgument);

    let short = v1::GenerateRequest {
        timeout_ms: Some(150),
        ..request("hello", 12)
    };
    assert_eq!(cluster.ask(short).await.unwrap_err().code(), Code::DeadlineExceeded);
    until(|| async { decode.cancelled() == 2 }).await;
    cluster.idle().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn overload_is_refused_at_once_with_a_hint() {
    let (cluster, _prefill, decode) = Cluster::pair(&["--requests-max=2"]).await;
    decode.script(Script::Stall(1));
    let mut streams = Vec::new();
    for _ in 0..2 {
        streams.push(cluster.stream(request("hello", 12)).await.unwrap());
    }
    let status = cluster.ask(request("hello", 12)).await.unwrap_err();
    assert_eq!(status.code(), Code::ResourceExhausted);
    assert!(status.metadata().get("retry-after-ms").is_some() && status.metadata().get("x-request-id").is_some());
    drop(streams);
    cluster.idle().await;
    decode.script(Script::Serve);
    assert_eq!(cluster.ask(request("hello", 3)).await.unwrap().text, text(3));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn full_nodes_are_waited_for() {
    let (cluster, prefill, _decode) = Cluster::pair(&[]).await;
    prefill.load(|load| load.queued_requests = 8);
    until(|| async {
        cluster
            .status()
            .await
            .nodes
            .iter()
            .any(|n| n.load.clone().unwrap().queued_requests == 8)
    })
    .await;
    let mut stream = cluster.stream(request("hello", 4)).await.unwrap();
    until(|| async { cluster.status().await.queued_requests == 1 }).await;
    assert_eq!(prefill.opened(), 0);
    prefill.load(|load| load.queued_requests = 0);
    let mut answer = Answer::default();
    answer.read(&mut stream, usize::MAX).await.unwrap();
    assert_eq!(answer.text, text(4));

    // A refusal that routing did not foresee costs no attempt either.
    prefill.script(Script::Full);
    let mut stream = cluster.stream(request("hello", 4)).await.unwrap();
    until(|| async { prefill.opened() >= 3 }).await;
    prefill.script(Script::Serve);
    let mut answer = Answer::default();
    answer.read(&mut stream, usize::MAX).await.unwrap();
    assert_eq!((answer.text, answer.timeline.attempts), (text(4), 1));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slow_client_holds_up_nobody() {
    let (cluster, _prefill, decode) = Cluster::pair(&[]).await;
    let mut slow = cluster.stream(request("hello", 400)).await.unwrap();
    // The node is done and the request over although the client has read nothing.
    cluster.idle().await;
    assert_eq!((decode.opened(), decode.cancelled()), (1, 0));
    assert_eq!(cluster.ask(request("hello", 4)).await.unwrap().text, text(4));
    let mut answer = Answer::default();
    answer.read(&mut slow, usize::MAX).await.unwrap();
    assert_eq!(answer.text, text(400));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn stop_strings_end_the_work() {
    let (cluster, _prefill, decode) = Cluster::pair(&[]).await;
    decode.script(Script::Stall(20));
    let stop = vec!["klm".to_owned(), "zz".to_owned()];
    let answer = cluster
        .ask(v1::GenerateRequest {
            stop,
            ..request("hello", 100)
        })
        .await
        .unwrap();
    assert_eq!(
        (answer.text.as_str(), answer.finish),
        ("abcdefghij", v1::FinishReason::Stop)
    );
    assert_eq!((answer.usage.completion_tokens, answer.tokens.len()), (13, 13));
    until(|| async { decode.cancelled() == 1 }).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_at_once_over_two_pairs() {
    let (cluster, _p0, d0) = Cluster::pair(&[]).await;
    let (_p1, d1) = (
        cluster.node("p1", NodeRole::Prefill),
        cluster.node("d1", NodeRole::Decode),
    );
    cluster.ready(4).await;
    let answers = (0..60).map(|index| cluster.ask(request("hello there", 1 + index * 3)));
    for (index, answer) in futures::future::join_all(answers).await.into_iter().enumerate() {
        assert_eq!(answer.unwrap().text, text(1 + index * 3));
    }
    assert!(
        d0.opened() > 5 && d1.opened() > 5,
        "{} and {}",
        d0.opened(),
        d1.opened()
    );
    assert_eq!(d0.opened() + d1.opened(), 60);
    cluster.idle().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_is_explained_with_what_was_weighed_and_what_came_of_it() {
    let (cluster, _prefill, _decode) = Cluster::pair(&["--decisions-max=1"]).await;
    let explain = async |request_id: &str| {
        let request_id = request_id.to_owned();
        let mut admin = cluster.admin.clone();
        admin.explain(v1::ExplainRequest { request_id }).await
    };
    let mut ids = Vec::new();
    for _ in 0..2 {
        let mut stream = cluster.stream(request("hello", 3)).await.unwrap();
        let first = stream.message().await.unwrap().unwrap();
        let mut rest = Answer {
            tokens: first.tokens,
            ..Answer::default()
        };
        rest.read(&mut stream, usize::MAX).await.unwrap();
        ids.push(first.request_id);
    }
    let known = explain(&ids[1]).await.unwrap().into_inner();
    let [decision] = known.decisions.as_slice() else {
        panic!("{known:?}");
    };
    assert_eq!(
        (decision.decision.as_str(), decision.policy.as_str()),
        ("place", "predicted")
    );
    assert_eq!(decision.context_tokens, 5);
    let chosen = decision.candidates.iter().find(|candidate| candidate.chosen).unwrap();
    assert_eq!(chosen.decode_node, "d0");
    assert!(chosen.measured && chosen.room && chosen.itl_us > 0, "{chosen:?}");
    assert_eq!(decision.candidates.len(), 2, "the pair, and the decode node alone");
    let timeline = known.timeline.unwrap();
    assert_eq!(
        (known.outcome.as_str(), timeline.decode_node.as_str()),
        ("length", "d0")
    );
    assert_eq!(explain(&ids[0]).await.unwrap_err().code(), Code::NotFound, "displaced");
    assert_eq!(explain("nonsense").await.unwrap_err().code(), Code::InvalidArgument);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn round_robin_takes_turns_and_never_prefills_locally() {
    let (cluster, first, _decode) = Cluster::pair(&["--routing-policy=round-robin"]).await;
    let second = cluster.node("p1", NodeRole::Prefill);
    cluster.ready(3).await;
    for _ in 0..4 {
        cluster.ask(request("hello", 2)).await.unwrap();
    }
    assert_eq!((first.opened(), second.opened()), (2, 2));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_that_would_be_late_is_refused_at_once_with_a_hint() {
    let (cluster, prefill, _decode) = Cluster::pair(&["--slo-ttft=200ms", "--routing-policy=least-loaded"]).await;
    // Nobody is refused for a guess; the first prompt teaches the node's speed.
    cluster.ask(request("hello", 2)).await.unwrap();
    prefill.load(|load| {
        load.queued_requests = 1;
        load.queued_tokens = 100_000_000;
    });
    until(|| async {
        let nodes = cluster.status().await.nodes;
        nodes
            .iter()
            .any(|node| node.load.as_ref().is_some_and(|load| load.queued_tokens > 0))
    })
    .await;
    let refused = cluster.ask(request("hello", 2)).await.unwrap_err();
    assert_eq!(refused.code(), Code::ResourceExhausted, "{refused}");
    assert!(refused.metadata().contains_key("retry-after-ms"), "{refused:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tenants_need_their_keys_and_keep_to_their_limits() {
    use sha2::{Digest, Sha256};
    let hash: String = Sha256::digest(b"open sesame")
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("tenants.toml");
    let text = format!("[[tenant]]\nname = 'ali'\nkey_sha256 = ['{hash}']\nconcurrent_max = 1\n");
    std::fs::write(&file, text).unwrap();
    let flag = format!("--tenants={}", file.display());
    let (cluster, prefill, decode) = Cluster::pair(&[&flag]).await;
    let ask = async |key: Option<&str>| {
        let mut asked = tonic::Request::new(request("hello", 3));
        if let Some(key) = key {
            let value = format!("Bearer {key}").parse().unwrap();
            asked.metadata_mut().insert("authorization", value);
        }
        cluster.client.clone().generate(asked).await
    };
    assert_eq!(ask(None).await.unwrap_err().code(), Code::Unauthenticated);
    assert_eq!(ask(Some("sesame")).await.unwrap_err().code(), Code::Unauthenticated);
    decode.script(Script::Stall(1));
    let running = ask(Some("open sesame")).await.unwrap();
    let refused = ask(Some("open sesame")).await.unwrap_err();
    assert_eq!(refused.code(), Code::ResourceExhausted);
    assert!(refused.message().contains("`ali`") && refused.metadata().contains_key("retry-after-ms"));
    until(|| async { !prefill.works.lock().unwrap().is_empty() }).await;
    assert_eq!(
        prefill.works.lock().unwrap()[0].cache_salt,
        "ali\0",
        "its blocks are its own"
    );
    drop(running);
    cluster.idle().await;
    decode.script(Script::Serve);
    assert!(ask(Some("open sesame")).await.is_ok(), "its place came back");
}
