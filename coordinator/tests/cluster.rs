//! Who serves, what is listed, and how a coordinator ends.

#![allow(clippy::unwrap_used)]

mod common;

use baton_proto::v1;
use baton_types::{ModelFingerprint, NodeRole};
use common::{Answer, Cluster, Script, request, text, until};
use std::time::Duration;
use tonic::Code;
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_client::HealthClient;

async fn node(cluster: &Cluster, name: &str) -> Option<v1::NodeStatus> {
    cluster
        .status()
        .await
        .nodes
        .into_iter()
        .find(|node| node.node_id == name)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_model_is_listed_while_it_would_be_served() {
    let cluster = Cluster::start(&[]).await;
    assert_eq!(
        cluster.ask(request("x", 1)).await.unwrap_err().code(),
        Code::Unavailable
    );
    let _prefill = cluster.node("p0", NodeRole::Prefill);
    until(|| async { node(&cluster, "p0").await.is_some_and(|node| node.state == "ready") }).await;
    assert_eq!(cluster.models().await, []);
    let mut decode = cluster.node("d0", NodeRole::Decode);
    cluster.ready(2).await;
    let models = cluster.models().await;
    assert_eq!(
        (models[0].id.as_str(), models[0].context_tokens, models[0].stub),
        ("fake", 512, true)
    );
    decode.kill();
    until(|| async { cluster.models().await.is_empty() }).await;
    assert_eq!(node(&cluster, "d0").await.unwrap().state, "lost");
    let status = cluster.ask(request("x", 1)).await.unwrap_err();
    assert_eq!(status.code(), Code::Unavailable, "{status:?}");
    let _decode = cluster.node("d1", NodeRole::Decode);
    until(|| async { !cluster.models().await.is_empty() }).await;
    assert_eq!(cluster.ask(request("x", 3)).await.unwrap().text, text(3));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_of_another_model_is_never_paired() {
    let (cluster, _prefill, _decode) = Cluster::pair(&[]).await;
    let other = cluster.odd_node("d9", NodeRole::Decode, |record| {
        record.fingerprint = ModelFingerprint([9; 32])
    });
    let shape = cluster.odd_node("p9", NodeRole::Prefill, |record| record.geometry.block_tokens = 32);
    for (name, field) in [("d9", "fingerprint"), ("p9", "block_tokens")] {
        until(|| async { node(&cluster, name).await.is_some_and(|node| node.state == "refused") }).await;
        let errors = node(&cluster, name).await.unwrap().load.unwrap().last_errors;
        assert!(errors[0].message.contains(field), "{errors:?}");
    }
    for _ in 0..10 {
        assert_eq!(cluster.ask(request("x", 3)).await.unwrap().text, text(3));
    }
    assert_eq!((other.opened(), shape.opened()), (0, 0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bad_requests_are_refused_by_field() {
    let (cluster, _prefill, decode) = Cluster::pair(&[]).await;
    let refused = async |request: v1::GenerateRequest, code: Code, word: &str| {
        let status = cluster.ask(request).await.unwrap_err();
        assert_eq!(status.code(), code, "{status:?}");
        assert!(status.message().contains(word), "{status:?}");
        assert!(status.metadata().get("x-request-id").is_some());
    };
    let ids = |ids: Vec<u32>| {
        let input = Some(v1::generate_request::Input::PromptTokens(v1::TokenIds { ids }));
        v1::GenerateRequest {
            input,
            ..request("", 4)
        }
    };
    let sampling = |change: fn(&mut v1::SamplingParams)| {
        let mut request = request("x", 4);
        change(request.sampling.as_mut().unwrap());
        request
    };
    refused(request("", 4), Code::InvalidArgument, "prompt").await;
    refused(ids(vec![5; 512]), Code::InvalidArgument, "512").await;
    refused(ids(vec![259]), Code::InvalidArgument, "259").await;
    refused(ids(Vec::new()), Code::InvalidArgument, "prompt_tokens").await;
    refused(
        v1::GenerateRequest {
            input: None,
            ..request("", 4)
        },
        Code::InvalidArgument,
        "prompt",
    )
    .await;
    refused(
        sampling(|s| s.max_tokens = Some(512)),
        Code::InvalidArgument,
        "max_tokens",
    )
    .await;
    refused(
        sampling(|s| s.max_tokens = Some(0)),
        Code::InvalidArgument,
        "max_tokens",
    )
    .await;
    refused(
        sampling(|s| s.temperature = Some(-1.0)),
        Code::InvalidArgument,
        "temperature",
    )
    .await;
    refused(
        sampling(|s| s.logit_bias.extend([(300, 1.0)])),
        Code::InvalidArgument,
        "logit_bias",
    )
    .await;
    refused(
        v1::GenerateRequest {
            stop: vec![String::new()],
            ..request("x", 4)
        },
        Code::InvalidArgument,
        "stop",
    )
    .await;
    refused(
        v1::GenerateRequest {
            timeout_ms: Some(0),
            ..request("x", 4)
        },
        Code::InvalidArgument,
        "timeout_ms",
    )
    .await;
    refused(
        v1::GenerateRequest {
            model: "no".into(),
            ..request("x", 4)
        },
        Code::NotFound,
        "fake",
    )
    .await;
    let chat = v1::generate_request::Input::Messages(v1::ChatMessages::default());
    refused(
        v1::GenerateRequest {
            input: Some(chat),
            ..request("", 4)
        },
        Code::InvalidArgument,
        "messages",
    )
    .await;
    assert_eq!(decode.opened(), 0);
    cluster.idle().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_rest_of_the_context_is_the_default() {
    let (cluster, _prefill, decode) = Cluster::pair(&[]).await;
    let sampling = Some(v1::SamplingParams::default());
    let answer = cluster
        .ask(v1::GenerateRequest {
            sampling,
            ..request("hello", 4)
        })
        .await
        .unwrap();
    assert_eq!((answer.tokens.len(), answer.finish), (507, v1::FinishReason::Length));
    let again = cluster
        .ask(v1::GenerateRequest {
            sampling: None,
            ..request("hello", 4)
        })
        .await
        .unwrap();
    assert_eq!(again.tokens.len(), 507);
    let works = decode.works.lock().unwrap();
    assert_ne!(works[0].sampling.seed, works[1].sampling.seed);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tokenize_health_and_drain() {
    let cluster = Cluster::start(&[]).await;
    let channel = tonic::transport::Channel::from_shared(format!(
        "http://{}",
        cluster.service.as_ref().unwrap().announcement.grpc.clone().unwrap()
    ));
    let health = HealthClient::new(channel.unwrap().connect_lazy());
    let serving = async |service: &str| {
        let request = HealthCheckRequest {
            service: service.to_owned(),
        };
        health.clone().check(request).await.unwrap().into_inner().status == 1
    };
    assert!(!serving("").await && serving("baton.v1.Admin").await);
    let decode = cluster.node("d0", NodeRole::Decode);
    cluster.ready(1).await;
    until(|| async { serving("").await && serving("baton.v1.Inference").await }).await;

    let input = Some(v1::tokenize_request::Input::Text("hi".into()));
    let tokens = cluster
        .client
        .clone()
        .tokenize(v1::TokenizeRequest {
            input,
            ..Default::default()
        })
        .await
        .unwrap();
    assert_eq!(tokens.into_inner().tokens, [104, 105]);

    let drain = |node_id: &str| v1::DrainRequest {
        node_id: node_id.into(),
        deadline_ms: None,
    };
    let status = cluster.admin.clone().drain(drain("d7")).await.unwrap_err();
    assert!(
        status.code() == Code::NotFound && status.message().contains("d0"),
        "{status:?}"
    );
    cluster.admin.clone().drain(drain("d0")).await.unwrap();
    drop(decode);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_end_waits_for_what_runs_and_not_for_ever() {
    for patient in [true, false] {
        let (mut cluster, _prefill, decode) = Cluster::pair(&[]).await;
        decode.script(if patient { Script::Serve } else { Script::Stall(3) });
        let mut stream = cluster.stream(request("hello", 300)).await.unwrap();
        let mut answer = Answer::default();
        answer.read(&mut stream, 1).await.unwrap();
        let service = cluster.service.take().unwrap();
        let deadline = if patient {
            Duration::from_secs(20)
        } else {
            Duration::from_millis(50)
        };
        let stop = tokio::spawn(service.stop(deadline));
        answer.read(&mut stream, usize::MAX).await.unwrap();
        let expected = if patient {
            v1::FinishReason::Length
        } else {
            v1::FinishReason::Cancelled
        };
        assert_eq!(answer.finish, expected);
        stop.await.unwrap().unwrap();
        assert!(cluster.ask(request("x", 1)).await.is_err());
    }
}
