//! The door before a fake frontend: each request's form, each answer's, each failure's, and the client's going away.

use super::fake::{Fake, Script, chunk, failed, finished};
use super::{HttpOptions, router};
use crate::{ApiCode, ApiError, PromptInput};
use axum::body::{Body, to_bytes};
use axum::response::Response;
use baton_text::Message;
use baton_types::FinishReason;
use http::{Request, StatusCode};
use serde_json::{Value, json};
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tower::ServiceExt;

const CHAT: &str = "/v1/chat/completions";
const COMPLETION: &str = "/v1/completions";

fn good() -> Script {
    Script::Events(vec![chunk("ab", 0), chunk("cd", 2), finished(FinishReason::Stop)])
}

async fn send(fake: &Arc<Fake>, method: &str, path: &str, body: impl Into<Body>) -> Response {
    let options = HttpOptions {
        body_bytes_max: 10_000,
        ..HttpOptions::default()
    };
    let request = Request::builder().method(method).uri(path).body(body.into()).unwrap();
    router(Arc::clone(fake) as _, options).oneshot(request).await.unwrap()
}

async fn text(response: Response) -> String {
    String::from_utf8(to_bytes(response.into_body(), 1 << 20).await.unwrap().to_vec()).unwrap()
}

async fn json_of(response: Response) -> Value {
    serde_json::from_str(&text(response).await).unwrap()
}

/// A body that is served, with other or more fields.
fn body(path: &str, more: Value) -> Vec<u8> {
    let mut whole = match path {
        CHAT => json!({"model": "m", "messages": [{"role": "user", "content": "hi"}]}),
        _ => json!({"model": "m", "prompt": "hi"}),
    };
    for (name, value) in more.as_object().unwrap() {
        whole[name] = value.clone();
    }
    whole.to_string().into_bytes()
}

async fn ask(script: Script, path: &str, more: Value) -> (Arc<Fake>, Response) {
    let fake = Arc::new(Fake::with(script));
    let response = send(&fake, "POST", path, body(path, more)).await;
    (fake, response)
}

/// SSE events as (name, data).
fn events(stream: &str) -> Vec<(String, String)> {
    let frames = stream.split_terminator("\n\n");
    let field = |frame: &str, name: &str| {
        frame
            .lines()
            .find_map(|line| line.strip_prefix(name).map(str::to_owned))
            .unwrap_or_default()
    };
    frames
        .map(|frame| (field(frame, "event: "), field(frame, "data: ")))
        .collect()
}

/// All data of a good stream, without `[DONE]`.
fn pieces(stream: &str) -> Vec<Value> {
    let mut data: Vec<String> = events(stream).into_iter().map(|(_, data)| data).collect();
    assert_eq!(data.pop().as_deref(), Some("[DONE]"), "{stream}");
    data.iter().map(|data| serde_json::from_str(data).unwrap()).collect()
}

#[tokio::test]
async fn a_chat_is_answered_whole() {
    let (fake, response) = ask(
        good(),
        CHAT,
        json!({"max_tokens": 9, "user": "u", "metadata": {"a": "b"}, "store": true}),
    )
    .await;
    assert_eq!(response.status(), StatusCode::OK);
    let id = response.headers()["x-request-id"].to_str().unwrap().to_owned();
    let answer = json_of(response).await;
    assert_eq!(answer["id"], format!("chatcmpl-{id}"));
    assert_eq!(answer["object"], "chat.completion");
    assert_eq!(answer["model"], "full-name");
    let message = json!({"role": "assistant", "content": "abcd", "refusal": null});
    assert_eq!(
        answer["choices"],
        json!([{"index": 0, "message": message, "logprobs": null, "finish_reason": "stop"}])
    );
    assert_eq!(
        answer["usage"],
        json!({"prompt_tokens": 5, "completion_tokens": 4, "total_tokens": 9, "prompt_tokens_details": {"cached_tokens": 3}})
    );
    let input = &fake.seen()[0];
    assert_eq!(input.request_id.to_string(), id);
    assert_eq!(
        input.prompt,
        PromptInput::Chat(vec![Message {
            role: "user".into(),
            content: "hi".into()
        }])
    );
    assert_eq!((input.max_tokens, input.seed), (Some(9), None));
}

#[tokio::test]
async fn every_sampling_field_arrives() {
    let (fake, _) = ask(good(), CHAT, json!({
        "temperature": 0.5, "top_p": 0.25, "top_k": 7, "min_p": 0.125, "presence_penalty": -1, "frequency_penalty": 1.5,
        "repetition_penalty": 1.25, "seed": -1, "logit_bias": {"12": -100, "3": 5.5}, "logprobs": true, "top_logprobs": 4,
        "ignore_eos": true, "stop": ["a", "b"], "max_tokens": 3, "max_completion_tokens": 4, "n": 1,
        "response_format": {"type": "text"}, "tools": null,
    }))
    .await;
    let input = &fake.seen()[0];
    let sampling = &input.sampling;
    assert_eq!(
        (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p),
        (0.5, 0.25, 7, 0.125)
    );
    assert_eq!(
        (
            sampling.presence_penalty,
            sampling.frequency_penalty,
            sampling.repetition_penalty
        ),
        (-1.0, 1.5, 1.25)
    );
    assert_eq!(sampling.logit_bias, [(3, 5.5), (12, -100.0)]);
    assert_eq!((sampling.logprobs, sampling.ignore_eos), (Some(4), true));
    assert_eq!((input.seed, input.max_tokens), (Some(u64::MAX), Some(4)));
    assert_eq!(input.stop, ["a", "b"]);
}

#[tokio::test]
async fn prompts_come_in_every_form() {
    for (prompt, expected) in [
        (json!("x"), PromptInput::Text("x".into())),
        (json!(["x"]), PromptInput::Text("x".into())),
        (json!([1, 2]), PromptInput::Tokens(vec![1, 2])),
        (json!([[1, 2]]), PromptInput::Tokens(vec![1, 2])),
    ] {
        let (fake, response) = ask(good(), COMPLETION, json!({"prompt": prompt, "stop": "."})).await;
        assert_eq!(response.status(), StatusCode::OK);
        let input = &fake.seen()[0];
        assert_eq!(input.prompt, expected);
        assert_eq!(
            (input.max_tokens, input.stop.as_slice()),
            (Some(16), &[".".to_owned()][..])
        );
    }
    let parts = json!([{"role": "developer", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
                       {"role": "assistant", "content": null, "refusal": null, "annotations": [], "tool_calls": null}]);
    let (fake, _) = ask(good(), CHAT, json!({"messages": parts, "model": null})).await;
    assert_eq!(fake.seen()[0].model, "");
    let message = |role: &str, content: &str| Message {
        role: role.into(),
        content: content.into(),
    };
    assert_eq!(
        fake.seen()[0].prompt,
        PromptInput::Chat(vec![message("system", "ab"), message("assistant", "")])
    );
}

#[tokio::test]
async fn bad_fields_are_named() {
    let both = [
        ("temperature", json!(-1)),
        ("temperature", json!("hot")),
        ("top_p", json!(0)),
        ("top_p", json!(1.5)),
        ("top_k", json!(-1)),
        ("min_p", json!(2)),
        ("repetition_penalty", json!(0)),
        ("presence_penalty", json!(3)),
        ("frequency_penalty", json!([])),
        ("seed", json!(1.5)),
        ("max_tokens", json!(0)),
        ("max_tokens", json!("9")),
        ("max_tokens", json!(5_000_000_000_u64)),
        ("stop", json!(5)),
        ("stream", json!("yes")),
        ("n", json!(2)),
        ("model", json!(5)),
        ("ignore_eos", json!(1)),
        ("logit_bias", json!([])),
        ("stream_options", json!({"include_usage": true})),
        ("tools", json!([])),
        ("functions", json!([])),
        ("web_search_options", json!({})),
        ("no_such_field", json!(1)),
    ];
    let chat = [
        ("top_logprobs", json!(2)),
        ("logprobs", json!(2)),
        ("messages", json!([])),
        ("messages", json!("hi")),
        ("max_completion_tokens", json!(-2)),
        ("prompt", json!("x")),
    ];
    let completion = [
        ("logprobs", json!(true)),
        ("logprobs", json!(21)),
        ("prompt", json!([])),
        ("prompt", json!(["a", "b"])),
        ("prompt", json!({})),
        ("suffix", json!("x")),
        ("echo", json!(true)),
        ("best_of", json!(2)),
        ("messages", json!([])),
    ];
    let cases = both.iter().flat_map(|case| [(CHAT, case), (COMPLETION, case)]);
    let cases = cases
        .chain(chat.iter().map(|case| (CHAT, case)))
        .chain(completion.iter().map(|case| (COMPLETION, case)));
    for (path, (field, value)) in cases {
        let (fake, response) = ask(good(), path, json!({*field: value})).await;
        let status = response.status();
        assert!(response.headers().contains_key("x-request-id"));
        let answer = json_of(response).await;
        assert_eq!(
            (status, &answer["error"]["param"]),
            (StatusCode::BAD_REQUEST, &json!(field)),
            "{path} {value}: {answer}"
        );
        assert!(answer["error"]["message"].as_str().unwrap().contains(field), "{answer}");
        assert_eq!(answer["error"]["type"], "invalid_request_error");
        assert!(fake.seen().is_empty());
    }
}

#[tokio::test]
async fn bad_parts_of_fields_are_named() {
    for (more, param) in [
        (
            json!({"messages": [{"role": "user", "content": "a"}, {"role": "robot", "content": "a"}]}),
            "messages[1].role",
        ),
        (
            json!({"messages": [{"role": "tool", "content": "a"}]}),
            "messages[0].role",
        ),
        (json!({"messages": [{"role": "user"}]}), "messages[0].content"),
        (
            json!({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}),
            "messages[0].content[0].type",
        ),
        (
            json!({"messages": [{"role": "user", "content": "a", "name": "b"}]}),
            "messages[0].name",
        ),
        (json!({"messages": [5]}), "messages[0]"),
        (json!({"logit_bias": {"x": 1}}), "logit_bias.x"),
        (json!({"logit_bias": {"1": "x"}}), "logit_bias.1"),
        (json!({"stop": ["a", 5]}), "stop[1]"),
        (json!({"logprobs": true, "top_logprobs": 21}), "top_logprobs"),
        (json!({"stream": true, "stream_options": {"x": 1}}), "stream_options.x"),
    ] {
        let (_, response) = ask(good(), CHAT, more.clone()).await;
        assert_eq!(response.status(), StatusCode::BAD_REQUEST);
        assert_eq!(json_of(response).await["error"]["param"], param, "{more}");
    }
}

#[tokio::test]
async fn bodies_that_are_no_requests_are_refused() {
    let fake = Arc::new(Fake::default());
    for (body, part) in [
        (b"{\"model\": ".to_vec(), "not valid JSON"),
        (b"".to_vec(), "not valid JSON"),
        (b"[]".to_vec(), "must be an object"),
        (b"{\"model\": \"\xFF\"}".to_vec(), "not valid UTF-8 at byte 11"),
        (vec![b'['; 5000], "not valid JSON"),
    ] {
        let response = send(&fake, "POST", CHAT, body).await;
        assert_eq!(response.status(), StatusCode::BAD_REQUEST);
        let answer = json_of(response).await;
        assert!(answer["error"]["message"].as_str().unwrap().contains(part), "{answer}");
    }
    let response = send(&fake, "POST", CHAT, vec![b' '; 10_001]).await;
    assert_eq!(response.status(), StatusCode::PAYLOAD_TOO_LARGE);
    assert!(
        json_of(response).await["error"]["message"]
            .as_str()
            .unwrap()
            .contains("10000 bytes")
    );
    assert_eq!(
        send(&fake, "GET", CHAT, "").await.status(),
        StatusCode::METHOD_NOT_ALLOWED
    );
    let response = send(&fake, "GET", "/v2/nothing", "").await;
    assert_eq!(response.status(), StatusCode::NOT_FOUND);
    assert!(response.headers().contains_key("x-request-id"));
    assert!(json_of(response).await["error"]["message"].is_string());
}

#[tokio::test]
async fn a_body_that_does_not_come_is_not_waited_for() {
    let options = HttpOptions {
        body_timeout: Duration::ZERO,
        ..HttpOptions::default()
    };
    let never = Body::from_stream(futures::stream::pending::<Result<bytes::Bytes, std::io::Error>>());
    let request = Request::builder().method("POST").uri(CHAT).body(never).unwrap();
    let response = router(Arc::new(Fake::default()) as _, options)
        .oneshot(request)
        .await
        .unwrap();
    assert_eq!(response.status(), StatusCode::REQUEST_TIMEOUT);
}

#[tokio::test]
async fn failures_before_the_first_token_are_statuses() {
    for (code, status, name) in [
        (ApiCode::InvalidArgument, 400, Value::Null),
        (ApiCode::Unauthenticated, 401, json!("invalid_api_key")),
        (ApiCode::NotFound, 404, json!("model_not_found")),
        (ApiCode::ResourceExhausted, 429, json!("overloaded")),
        (ApiCode::Unavailable, 503, json!("unavailable")),
        (ApiCode::DeadlineExceeded, 504, json!("deadline_exceeded")),
        (ApiCode::Internal, 500, json!("internal_error")),
    ] {
        let refused = Script::Refuse(ApiError::new(code, "it broke").retry_after(Duration::from_millis(1500)));
        for (script, stream) in [
            (refused, false),
            (Script::Events(vec![failed(code)]), true),
            (Script::Events(vec![failed(code)]), false),
        ] {
            let hinted = matches!(script, Script::Refuse(_));
            let (_, response) = ask(script, CHAT, json!({"stream": stream})).await;
            assert_eq!(response.status(), status);
            if hinted {
                assert_eq!(
                    (
                        &response.headers()["retry-after"],
                        &response.headers()["retry-after-ms"]
                    ),
                    (&"2".parse().unwrap(), &"1500".parse().unwrap())
                );
            } else {
                assert_eq!(
                    response.headers().contains_key("retry-after"),
                    matches!(status, 429 | 503)
                );
            }
            assert!(response.headers().contains_key("x-request-id"));
            let answer = json_of(response).await;
            assert_eq!(
                (&answer["error"]["code"], &answer["error"]["message"]),
                (&name, &json!("it broke"))
            );
        }
    }
    let (_, response) = ask(
        Script::Refuse(ApiError::invalid("max_tokens", "too many")),
        CHAT,
        json!({}),
    )
    .await;
    assert_eq!(json_of(response).await["error"]["param"], "max_tokens");
    let unknown = ApiError::invalid("prompt_tokens", "no such token");
    let (_, response) = ask(Script::Refuse(unknown), COMPLETION, json!({"prompt": [1]})).await;
    assert_eq!(json_of(response).await["error"]["param"], "prompt");
    let (_, response) = ask(Script::Events(vec![]), CHAT, json!({})).await;
    assert_eq!(response.status(), StatusCode::INTERNAL_SERVER_ERROR);
    let (_, response) = ask(
        Script::Events(vec![chunk("a", 0), finished(FinishReason::Cancelled)]),
        CHAT,
        json!({}),
    )
    .await;
    assert_eq!(response.status().as_u16(), 499);
}

#[tokio::test]
async fn a_chat_streams_from_role_to_done() {
    let held_back = chunk("", 4);
    let script = Script::Events(vec![
        chunk("ab", 0),
        held_back,
        chunk("cd", 4),
        finished(FinishReason::Length),
    ]);
    let (fake, response) = ask(
        script,
        CHAT,
        json!({"stream": true, "stream_options": {"include_usage": true}}),
    )
    .await;
    assert_eq!(response.headers()["content-type"], "text/event-stream; charset=utf-8");
    let stream = text(response).await;
    let pieces = pieces(&stream);
    let choices: Vec<Value> = pieces.iter().map(|piece| piece["choices"][0].clone()).collect();
    assert_eq!(choices[0]["delta"]["role"], "assistant");
    assert_eq!(choices[1]["delta"], json!({"content": "ab"}));
    assert_eq!(choices[2]["delta"], json!({"content": "cd"}));
    assert_eq!(
        (&choices[3]["delta"], &choices[3]["finish_reason"]),
        (&json!({}), &json!("length"))
    );
    assert_eq!((pieces.len(), &pieces[4]["choices"]), (5, &json!([])));
    assert_eq!(pieces[4]["usage"]["prompt_tokens_details"]["cached_tokens"], 3);
    assert!(
        pieces[..4]
            .iter()
            .all(|piece| piece["usage"].is_null() && piece["object"] == "chat.completion.chunk")
    );
    assert!(fake.dropped.is_cancelled());
}

#[tokio::test]
async fn a_completion_streams_text() {
    let (_, response) = ask(good(), COMPLETION, json!({"stream": true})).await;
    let pieces = pieces(&text(response).await);
    let texts: Vec<&str> = pieces
        .iter()
        .map(|piece| piece["choices"][0]["text"].as_str().unwrap())
        .collect();
    assert_eq!(texts, ["ab", "cd", ""]);
    assert_eq!(pieces[2]["choices"][0]["finish_reason"], "stop");
    assert!(pieces.iter().all(|piece| piece.get("usage").is_none()));
}

#[tokio::test]
async fn a_failure_in_a_stream_is_an_error_event_and_never_done() {
    for end in [
        vec![failed(ApiCode::Unavailable)],
        vec![finished(FinishReason::Cancelled)],
        vec![],
    ] {
        let mut script = vec![chunk("ab", 0)];
        script.extend(end);
        let (fake, response) = ask(Script::Events(script), CHAT, json!({"stream": true})).await;
        assert_eq!(response.status(), StatusCode::OK);
        let stream = text(response).await;
        let events = events(&stream);
        let (name, data) = events.last().unwrap();
        assert_eq!(name, "error");
        assert!(serde_json::from_str::<Value>(data).unwrap()["error"]["message"].is_string());
        assert!(!stream.contains("[DONE]") && stream.contains("ab"));
        assert!(fake.dropped.is_cancelled());
    }
}

#[tokio::test]
async fn log_probabilities_have_each_endpoints_form() {
    let (_, response) = ask(good(), CHAT, json!({"logprobs": true, "top_logprobs": 1})).await;
    let answer = json_of(response).await;
    let content = &answer["choices"][0]["logprobs"]["content"];
    assert_eq!(content.as_array().unwrap().len(), 4);
    let rival = json!({"token": "?", "logprob": -9999.0, "bytes": [63]});
    assert_eq!(
        content[0],
        json!({"token": "a", "logprob": -0.5, "bytes": [97], "top_logprobs": [rival]})
    );
    let (_, response) = ask(good(), COMPLETION, json!({"logprobs": 1})).await;
    let logprobs = json_of(response).await["choices"][0]["logprobs"].clone();
    assert_eq!(logprobs["tokens"], json!(["a", "b", "c", "d"]));
    assert_eq!(logprobs["token_logprobs"], json!([-0.5, -0.5, -0.5, -0.5]));
    assert_eq!(logprobs["top_logprobs"][3], json!({"?": -9999.0}));
    assert_eq!(logprobs["text_offset"], json!([0, 1, 2, 3]));
    let (_, response) = ask(good(), COMPLETION, json!({"logprobs": 0, "stream": true})).await;
    assert_eq!(
        pieces(&text(response).await)[1]["choices"][0]["logprobs"]["text_offset"],
        json!([2, 3])
    );
}

#[tokio::test]
async fn models_are_listed_and_found() {
    let fake = Arc::new(Fake::default());
    let model = json!({"id": "org/model", "object": "model", "created": 7, "owned_by": "baton", "context_tokens": 128, "stub": true});
    let list = json_of(send(&fake, "GET", "/v1/models", "").await).await;
    assert_eq!(list, json!({"object": "list", "data": [model]}));
    assert_eq!(
        json_of(send(&fake, "GET", "/v1/models/org/model", "").await).await,
        model
    );
    let response = send(&fake, "GET", "/v1/models/other", "").await;
    assert_eq!(response.status(), StatusCode::NOT_FOUND);
    assert_eq!(json_of(response).await["error"]["code"], "model_not_found");
    assert_eq!(text(send(&fake, "GET", "/healthz", "").await).await, "ok");
}

/// Over a real socket: the client hangs up before the first token, and in the middle of a stream.
#[tokio::test]
async fn a_client_that_goes_away_cancels() {
    for (script, stream) in [
        (vec![], false),
        (vec![], true),
        (vec![chunk("ab", 0)], false),
        (vec![chunk("ab", 0)], true),
    ] {
        let fake = Arc::new(Fake::with(Script::Hang(script.clone())));
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let app = router(Arc::clone(&fake) as _, HttpOptions::default());
        let server = tokio::spawn(async move { axum::serve(listener, app).await });
        let mut client = tokio::net::TcpStream::connect(address).await.unwrap();
        let body = body(CHAT, json!({"stream": stream}));
        let head = format!(
            "POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-length: {}\r\n\r\n",
            body.len()
        );
        client.write_all(head.as_bytes()).await.unwrap();
        client.write_all(&body).await.unwrap();
        fake.begun.cancelled().await;
        if stream && !script.is_empty() {
            let mut seen = Vec::new();
            while !String::from_utf8_lossy(&seen).contains("\"ab\"") {
                assert_ne!(client.read_buf(&mut seen).await.unwrap(), 0);
            }
        }
        assert!(!fake.dropped.is_cancelled());
        drop(client);
        let dropped = tokio::time::timeout(Duration::from_secs(10), fake.dropped.cancelled()).await;
        dropped.unwrap_or_else(|_| panic!("stream {stream}: the generation outlived its client"));
        server.abort();
    }
}
