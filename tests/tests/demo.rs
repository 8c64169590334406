//! The main job, as a newcomer runs it: `baton demo` answers with the real model through three processes, prints the
//! timeline, and leaves nothing running.

use anyhow::{Context, Result, ensure};
use baton_tests::{baton_binary, model_path};
use serde_json::Value;
use std::path::Path;
use std::time::Duration;
use tokio::process::Command;

async fn demo(arguments: &[&str]) -> Result<std::process::Output> {
    let run = Command::new(baton_binary())
        .arg("demo")
        .args(arguments)
        .kill_on_drop(true)
        .output();
    Ok(tokio::time::timeout(Duration::from_secs(120), run)
        .await
        .context("demo did not end")??)
}

#[tokio::test(flavor = "multi_thread")]
async fn demo_answers_through_three_processes_and_ends() -> Result<()> {
    let model = model_path().display().to_string();
    let output = demo(&[
        "--json",
        "--model",
        &model,
        "--max-tokens",
        "24",
        "Why is the sky blue?",
    ])
    .await?;
    let (out, err) = (
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr),
    );
    ensure!(output.status.success(), "{out}\n{err}");
    let last: Value = serde_json::from_str(out.lines().last().context("it printed something")?)?;
    let text = last["text"].as_str().context("text")?;
    ensure!(
        text.to_lowercase().contains("light") && !text.contains('\u{fffd}'),
        "unlikely answer: {text}"
    );
    ensure!(
        last["completion_tokens"].as_u64() == Some(24) && last["finish_reason"] == "length",
        "{last}"
    );
    ensure!(
        last["prefill_node"] != last["decode_node"],
        "one node did it all: {last}"
    );
    let timeline = &last["timeline"];
    for field in ["queue_ms", "prefill_ms", "exposed_ms", "ttft_ms", "decode_ms_per_token"] {
        ensure!(timeline[field].is_number(), "timeline.{field} is missing: {last}");
    }
    ensure!(
        timeline["handover_path"] == "shm" && timeline["handover_bytes"].as_u64() > Some(0),
        "{last}"
    );
    ensure!(timeline["prefill_tokens"].as_u64() > Some(5), "{last}");
    let pids = last["pids"].as_object().context("pids")?;
    ensure!(pids.len() == 3, "three processes: {last}");
    for (name, pid) in pids {
        ensure!(
            !Path::new(&format!("/proc/{pid}")).exists(),
            "{name} ({pid}) still runs"
        );
    }

    let output = demo(&["--model", &model, "--max-tokens", "8", "Name a colour."]).await?;
    let out = String::from_utf8_lossy(&output.stdout).to_lowercase();
    ensure!(output.status.success());
    for word in ["queue", "prefill", "hand-over", "over shm", "decode"] {
        ensure!(out.contains(word), "`{word}` is not in the printed timeline: {out}");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn demo_refuses_a_stub() -> Result<()> {
    let output = demo(&["--model", "stub", "Hello"]).await?;
    let said = String::from_utf8_lossy(&output.stderr).to_lowercase();
    ensure!(!output.status.success() && said.contains("stub"), "{said}");
    Ok(())
}
