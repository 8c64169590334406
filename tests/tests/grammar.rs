//! Answers that hold to a grammar are the same wherever a request runs: on one node, handed over, gone on with by a second
//! decode node after the first was killed, or moved from one that drains. Real model, real processes.

use anyhow::{Context, Result, ensure};
use baton_proto::v1::{self, sampling_params::Grammar};
use baton_tests::{
    Answer, Ask, Cluster, ClusterOptions, Leave, Streams, ask, busy, leave_under_load, model_path, same_tokens,
};
use serde_json::Value;
use std::collections::HashSet;
use std::time::Duration;

const STREAMS: u64 = 4;
const TOKENS: u32 = 800;
/// Items of each answer: so many that a fault meets streams that run.
const ITEMS: usize = 10;

fn schema() -> String {
    let item = r#"{"type": "object", "properties": {"name": {"type": "string", "maxLength": 24}, "count": {"type": "integer",
        "minimum": 0, "maximum": 999}}, "required": ["name", "count"], "additionalProperties": false}"#;
    format!(r#"{{"type": "array", "items": {item}, "minItems": {ITEMS}, "maxItems": {ITEMS}}}"#)
}

/// Drawn at temperature 0.9, each by a seed of its own.
fn asks() -> Vec<Ask> {
    let held = |stream: u64| {
        let prompt = format!("Shop {stream} sells these things, as JSON:");
        let mut ask = Ask::sampled(&prompt, TOKENS, stream);
        let sampling = ask.request.sampling.get_or_insert_default();
        sampling.ignore_eos = false;
        sampling.grammar = Some(Grammar::JsonSchema(schema()));
        ask
    };
    (0..STREAMS).map(held).collect()
}

async fn all(cluster: &Cluster, asks: &[Ask]) -> Result<Vec<Answer>> {
    let client = cluster.client().await?;
    let mut answers = Vec::new();
    for request in asks {
        answers.push(ask(&client, request).await??);
    }
    Ok(answers)
}

fn check(answer: &Answer) -> Result<()> {
    ensure!(
        answer.finish == v1::FinishReason::Stop as i32,
        "it ended otherwise: {}",
        answer.text
    );
    let value: Value = serde_json::from_str(&answer.text).with_context(|| answer.text.clone())?;
    let items = value.as_array().context("no array")?;
    let right = |item: &Value| {
        let name = item["name"].as_str().is_some_and(|name| name.chars().count() <= 24);
        name && item["count"].as_u64().is_some_and(|count| count <= 999)
    };
    ensure!(items.len() == ITEMS && items.iter().all(right), "{value}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_is_the_same_wherever_it_is_held_to_its_schema() -> Result<()> {
    let model = model_path().display().to_string();
    let asks = asks();
    let colocated = Cluster::start(ClusterOptions::colocated(&model)).await?;
    let reference = all(&colocated, &asks).await?;
    drop(colocated);
    reference.iter().try_for_each(check)?;
    let different: HashSet<&str> = reference.iter().map(|answer| answer.text.as_str()).collect();
    ensure!(different.len() == asks.len(), "answers do not differ: {different:?}");

    let options = ClusterOptions {
        decode: 2,
        ..ClusterOptions::pair(&model)
    };
    let mut cluster = Cluster::start(options.node_flags(&["--threads", "1"])).await?;
    let handed = all(&cluster, &asks).await?;
    for (answer, reference) in handed.iter().zip(&reference) {
        ensure!(
            answer.tokens == reference.tokens,
            "handed over: {} is not {}",
            answer.text,
            reference.text
        );
        ensure!(!answer.timeline.prefill_node.is_empty(), "nothing was handed over");
    }

    // Heartbeats are late: until they say so, the node looks as busy as it was.
    cluster.wait_idle(Duration::from_secs(20)).await?;
    let running = Streams::start(&cluster, &asks).await?;
    // Whichever has some: prompts that begin alike may all go to one node.
    let index = tokio::select! {
        on = busy(&cluster, "decode-0", 1) => on.map(|()| 0),
        on = busy(&cluster, "decode-1", 1) => on.map(|()| 1),
    }?;
    cluster.decode[index].kill().await?;
    let answers = running.finish().await?;
    same_tokens(&answers, &reference)?;
    let again = answers.iter().filter(|answer| answer.timeline.attempts > 1).count();
    ensure!(again > 0, "the kill met no stream");
    println!("{again} of {} streams went on elsewhere", asks.len());
    cluster.wait_idle(Duration::from_secs(20)).await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_goes_on_by_its_schema_on_another_node() -> Result<()> {
    let options = ClusterOptions::pair(model_path().display().to_string()).node_flags(&["--threads", "1"]);
    let left = leave_under_load(options, &asks(), 2, Leave::Drain).await?;
    println!("{left:?}");
    ensure!(left.moved + left.anew > 0, "none was moved: {left:?}");
    Ok(())
}
