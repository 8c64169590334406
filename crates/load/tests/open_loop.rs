//! Load on a small server of the test's own that speaks OpenAI's form.

#![allow(clippy::unwrap_used)] // a test that panics fails, which is what is wanted

use axum::body::{Body, Bytes};
use axum::extract::Json;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use baton_load::{Failure, LoadError, Planned, Progress, Prompt, Run, Summary, Target, offer};
use serde_json::{Value, json};
use std::future::pending;
use std::time::Duration;
use tokio::task::JoinSet;

/// What it streams: one piece for each two tokens, told by the usage at the end only; a prompt of 9 tokens is refused, one of 8 gets
/// no end, one of 7 gets half of what it asked for.
async fn complete(Json(body): Json<Value>) -> Response {
    let prompt = body["prompt"].as_array().unwrap().len();
    if prompt == 9 {
        let said = json!({"error": {"message": "no room"}}).to_string();
        return (StatusCode::TOO_MANY_REQUESTS, [("retry-after", "3")], said).into_response();
    }
    let mut tokens = body["max_tokens"].as_u64().unwrap();
    if prompt == 7 {
        tokens /= 2;
    }
    let mut pieces: Vec<String> = (0..tokens.div_ceil(2))
        .map(|_| json!({"choices": [{"text": "x", "finish_reason": null}]}).to_string())
        .collect();
    if prompt != 8 {
        pieces.push(json!({"choices": [{"text": "", "finish_reason": "length"}]}).to_string());
        let usage = json!({"prompt_tokens": prompt, "completion_tokens": tokens});
        pieces.push(json!({"choices": [], "usage": usage}).to_string());
        pieces.push("[DONE]".to_owned());
    }
    let pieces = pieces
        .into_iter()
        .map(|piece| Ok::<_, std::io::Error>(Bytes::from(format!("data: {piece}\n\n"))));
    Body::from_stream(futures::stream::iter(pieces)).into_response()
}

/// Its address; it ends with the set.
async fn server() -> (String, JoinSet<()>) {
    let models = json!({"data": [{"id": "m", "owned_by": "someone", "max_model_len": 77}]});
    let app = axum::Router::new()
        .route("/v1/models", get(move || async move { Json(models) }))
        .route("/v1/completions", post(complete));
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}/v1", listener.local_addr().unwrap());
    let mut serving = JoinSet::new();
    serving.spawn(async move { axum::serve(listener, app).await.unwrap() });
    (url, serving)
}

fn planned(at_ms: u64, prompt: usize, output: u32) -> Planned {
    Planned {
        at: Duration::from_millis(at_ms),
        prompt: Prompt::Tokens(vec![40; prompt]),
        output,
    }
}

async fn run(url: &str, schedule: Vec<Planned>) -> Run {
    let target = Target::connect(url, None).await.unwrap();
    offer(&target, schedule, pending(), |_: Progress| {}).await
}

#[tokio::test]
async fn answers_refusals_and_broken_streams_are_told_apart() {
    let (url, _serving) = server().await;
    let schedule = vec![
        planned(0, 5, 8),
        planned(20, 9, 8),
        planned(10, 8, 8),
        planned(30, 7, 8),
    ];
    let run = run(&url, schedule).await;
    assert_eq!(run.requests.len(), 4);
    let [whole, endless, refused, short] = run.requests.as_slice() else {
        panic!()
    };
    assert_eq!(
        (whole.failure.clone(), whole.tokens(), whole.prompt_tokens),
        (None, 8, 5)
    );
    // Four pieces of eight tokens in all: one came with the first, the rest is dealt out.
    assert_eq!(whole.frames.len(), 4);
    assert_eq!(whole.token_gaps().count(), 7);
    assert_eq!(whole.frame_gaps().count(), 3);
    assert!(matches!(&endless.failure, Some(Failure::Error(said)) if said.contains("without a finish reason")));
    let again = Some(Duration::from_secs(3));
    assert!(
        matches!(&refused.failure, Some(Failure::Refused { reason, retry_after }) if reason.contains("no room") && *retry_after == again)
    );
    assert!(matches!(&short.failure, Some(Failure::Error(said)) if said.contains("4 tokens came of 8")));
    assert!(run.requests.iter().all(|r| r.ended >= r.at + r.dispatch_delay));

    let slo = "ttft_p50=60s,itl_p99=60s".parse().unwrap();
    let summary = Summary::of(&run, Some(&slo));
    assert_eq!((summary.served, summary.refused, summary.errors), (1, 1, 2));
    let goodput = summary.goodput.unwrap();
    assert_eq!(
        (goodput.share, goodput.attained[0].share, goodput.attained[1].share),
        (0.25, 0.25, 1.0)
    );
    assert!(!goodput.attained[0].met && goodput.attained[1].met);
    // Three of four failed: half of all is beyond every bound.
    assert_eq!((summary.ttft.p50, summary.ttft.count), (None, 1));
    assert!((summary.offered_rps - 100.0).abs() < 1e-6);
    assert_eq!(summary.said.len(), 3);
}

#[tokio::test]
async fn a_run_that_is_stopped_keeps_what_ended() {
    let (url, _serving) = server().await;
    let target = Target::connect(&url, Some("m")).await.unwrap();
    assert_eq!(target.model().context_tokens, Some(77));
    let (ended, stopped) = tokio::sync::oneshot::channel();
    let mut ended = Some(ended);
    // Both are due at once, and one in an hour; the report after 2 s ends the run.
    let schedule = vec![planned(0, 5, 2), planned(0, 5, 2), planned(3_600_000, 5, 2)];
    let stop = async {
        let _ = stopped.await;
    };
    let run = offer(&target, schedule, stop, |progress| {
        if progress.ended == 2 {
            let _ = ended.take().map(|ended| ended.send(()));
        }
    });
    let run = run.await;
    assert_eq!((run.requests.len(), run.unfinished, run.unsent), (2, 0, 1));
    assert_eq!(Summary::of(&run, None).unfinished, 1);
}

#[tokio::test]
async fn wrong_endpoints_and_models_are_named() {
    let (url, _serving) = server().await;
    let said = |result: Result<Target, LoadError>| result.unwrap_err().to_string();
    let other = said(Target::connect(&url, Some("n")).await);
    assert!(other.contains("does not serve the model `n`: it serves m"), "{other}");
    let nobody = std::net::TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap();
    for address in [format!("http://{nobody}"), nobody.to_string()] {
        let error = Target::connect(&address, None).await.unwrap_err();
        assert!(
            error.is_retryable() && error.to_string().contains(&nobody.to_string()),
            "{error}"
        );
    }
    assert!(said(Target::connect("https://x", None).await).contains("only http://"));
    assert!(said(Target::connect("no address", None).await).contains("HOST:PORT"));
}
