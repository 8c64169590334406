//! Bad input, each with an error that names what is wrong and what to do.

use anyhow::{Context, Result, ensure};
use baton_proto::v1;
use baton_tests::{Ask, Cluster, ClusterOptions, ask, baton_binary, http_post, model_path, until};
use std::path::Path;
use std::time::Duration;
use tokio::process::Command;
use tonic::Code;

/// Runs `baton ARGUMENTS` to its end: it must fail by itself; gives what it said.
async fn refused(arguments: &[&str]) -> Result<String> {
    let run = Command::new(baton_binary()).args(arguments).kill_on_drop(true).output();
    let output = tokio::time::timeout(Duration::from_secs(15), run)
        .await
        .with_context(|| format!("{arguments:?} hangs"))??;
    ensure!(!output.status.success(), "baton {arguments:?} did not fail");
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(!said.contains("panicked"), "baton {arguments:?} panicked: {said}");
    Ok(said)
}

fn has_all(said: &str, words: &[&str]) -> Result<()> {
    let lower = said.to_lowercase();
    for word in words {
        ensure!(lower.contains(&word.to_lowercase()), "`{word}` is missing from: {said}");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_are_refused_by_field() -> Result<()> {
    let cluster = Cluster::start(ClusterOptions::pair("stub:context=2048")).await?;
    let client = cluster.client().await?;
    let refuse = async |ask_for: Ask, code: Code, words: &[&str]| -> Result<()> {
        let status = ask(&client, &ask_for).await?.err().context("it was answered")?;
        ensure!(status.code() == code, "{status:?}");
        ensure!(
            status.metadata().get("x-request-id").is_some(),
            "no x-request-id in {status:?}"
        );
        has_all(status.message(), words)
    };
    refuse(
        Ask::greedy_ids(vec![5; 3000], 8),
        Code::InvalidArgument,
        &["prompt", "3000", "2048"],
    )
    .await?;
    refuse(
        Ask::greedy_ids(vec![5; 8], 5000),
        Code::InvalidArgument,
        &["max_tokens", "5000", "2048"],
    )
    .await?;
    refuse(Ask::greedy_ids(vec![4_000_000], 8), Code::InvalidArgument, &["4000000"]).await?;
    refuse(Ask::greedy_ids(Vec::new(), 8), Code::InvalidArgument, &["prompt"]).await?;
    let mut unknown = Ask::greedy("x", 4);
    unknown.request.model = "no-such-model".into();
    refuse(unknown, Code::NotFound, &["no-such-model"]).await?;
    let mut negative = Ask::greedy("x", 4);
    negative.request.sampling.get_or_insert_default().temperature = Some(-1.0);
    refuse(negative, Code::InvalidArgument, &["temperature", "-1"]).await?;

    let http = cluster.http();
    let chat = "/v1/chat/completions";
    let cases: [(&str, &[u8], u16, &[&str]); 7] = [
        (chat, br#"{"model": "#, 400, &["json"]),
        (
            chat,
            b"{\"messages\": [{\"role\": \"user\", \"content\": \"\xff\xfe\"}]}",
            400,
            &["utf-8"],
        ),
        (
            chat,
            br#"{"messages": [{"role": "user", "content": "x"}], "temperature": -1}"#,
            400,
            &["temperature"],
        ),
        (
            chat,
            br#"{"messages": [{"role": "user", "content": "x"}], "n": 2}"#,
            400,
            &["\"n\""],
        ),
        (
            chat,
            br#"{"messages": [{"role": "user", "content": "x"}], "tools": []}"#,
            400,
            &["tools"],
        ),
        (
            chat,
            br#"{"messages": [{"role": "user", "content": "x"}], "wibble": 1}"#,
            400,
            &["wibble"],
        ),
        (
            "/v1/completions",
            br#"{"model": "no-such-model", "prompt": "x"}"#,
            404,
            &["no-such-model"],
        ),
    ];
    for (path, body, status, words) in cases {
        let (got, said) = http_post(&http, path, body).await?;
        ensure!(
            got == status,
            "{path} {:?}: {got} {said}",
            String::from_utf8_lossy(body)
        );
        has_all(&said, words)?;
        ensure!(said.contains("\"error\""), "not in OpenAI's shape: {said}");
    }
    cluster.wait_idle(Duration::from_secs(10)).await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_process_that_cannot_start_says_why() -> Result<()> {
    let cluster = Cluster::start(ClusterOptions::pair("stub")).await?;
    let store = format!(
        "etcd://{}",
        cluster.coordinator.announcement.store.as_deref().unwrap_or_default()
    );
    let node = |model: &'static str| {
        [
            "node",
            "--role",
            "decode",
            "--store",
            "STORE",
            "--kv-bytes",
            "64MiB",
            "--model",
            model,
        ]
    };
    let with_store = |arguments: &[&str]| -> Vec<String> {
        arguments
            .iter()
            .map(|&a| if a == "STORE" { store.clone() } else { a.to_owned() })
            .collect()
    };
    let refused_node = async |extra: &[&str], model: &str| -> Result<String> {
        let mut arguments = with_store(&node("stub"));
        let last = arguments.len() - 1;
        arguments[last] = model.to_owned();
        arguments.extend(extra.iter().map(|&flag| flag.to_owned()));
        refused(&arguments.iter().map(String::as_str).collect::<Vec<_>>()).await
    };

    let folder = tempfile::tempdir()?;
    let whole = std::fs::read(model_path())?;
    let truncated = folder.path().join("truncated.gguf");
    std::fs::write(&truncated, &whole[..whole.len() / 2])?;
    has_all(
        &refused_node(&[], path_text(&truncated)).await?,
        &["truncated.gguf", "truncated"],
    )?;
    let header_only = folder.path().join("header.gguf");
    std::fs::write(&header_only, &whole[..1000])?;
    has_all(&refused_node(&[], path_text(&header_only)).await?, &["header.gguf"])?;
    let mut foreign = whole;
    let at = foreign
        .windows(20)
        .position(|w| w == b"general.architecture")
        .context("the key is there")?;
    foreign[at + 20 + 4 + 8..][..5].copy_from_slice(b"mamba");
    let unsupported = folder.path().join("unsupported.gguf");
    std::fs::write(&unsupported, &foreign)?;
    has_all(
        &refused_node(&[], path_text(&unsupported)).await?,
        &["mamba", "architecture"],
    )?;
    has_all(
        &refused_node(&[], "/does/not/exist.gguf").await?,
        &["/does/not/exist.gguf"],
    )?;

    has_all(&refused_node(&["--kv-bytes", "900TiB"], "stub").await?, &["kv-bytes"])?;
    let taken = cluster.grpc_address();
    has_all(
        &refused_node(&["--listen", &taken], "stub").await?,
        &["--listen", &taken, "in use"],
    )?;
    let started = std::time::Instant::now();
    let said = refused(&[
        "node",
        "--role",
        "decode",
        "--model",
        "stub",
        "--store",
        "etcd://127.0.0.1:9",
    ])
    .await?;
    has_all(&said, &["--store", "127.0.0.1:9"])?;
    ensure!(
        started.elapsed() < Duration::from_secs(12),
        "an unreachable store took {:?}",
        started.elapsed()
    );
    let said = refused(&[
        "coordinator",
        "--store",
        "etcd://127.0.0.1:9",
        "--http-listen",
        "127.0.0.1:0",
    ])
    .await?;
    has_all(&said, &["--store", "127.0.0.1:9"])?;
    let said = refused(&["coordinator", "--http-listen", &taken, "--grpc-listen", "127.0.0.1:0"]).await?;
    has_all(&said, &["--http-listen", &taken, "in use"])?;
    Ok(())
}

fn path_text(path: &Path) -> &str {
    path.to_str().expect("temporary paths are text")
}

#[tokio::test(flavor = "multi_thread")]
async fn nodes_of_different_models_are_never_paired() -> Result<()> {
    let mut cluster = Cluster::start(ClusterOptions::pair("stub:layers=4")).await?;
    let client = cluster.client().await?;
    ask(&client, &Ask::greedy_ids(vec![1; 100], 8)).await??;
    cluster.set_model("stub:layers=2");
    cluster.decode[0].kill().await?;
    cluster.restart("decode", 0).await?;
    let fault = until(
        "the other node is refused by name of the field",
        Duration::from_secs(20),
        || async {
            let status = cluster.status().await.ok()?;
            let refused = status.nodes.into_iter().find(|node| node.state == "refused")?;
            Some(refused.load?.last_errors.first()?.message.clone())
        },
    );
    let fault = fault.await.with_context(|| cluster.logs())?;
    ensure!(
        fault.contains("fingerprint") || fault.contains("layers"),
        "the field is not named: {fault}"
    );
    // Nothing can be routed now: no pair fits, and that is said; tokens of a mixed pair would be wrong.
    let status = ask(&client, &Ask::greedy_ids(vec![1; 100], 8))
        .await?
        .err()
        .context("a mixed pair answered")?;
    ensure!(
        matches!(status.code(), Code::NotFound | Code::Unavailable),
        "{status:?}"
    );
    ensure!(!status.message().is_empty());
    let listed = client
        .clone()
        .list_models(v1::ListModelsRequest {})
        .await?
        .into_inner()
        .models;
    ensure!(listed.is_empty(), "a model is listed that no pair serves: {listed:?}");
    Ok(())
}
