//! The clients that people have: the official OpenAI library and gRPC from Python, each through a scripted session against
//! a cluster with the real model.

use anyhow::{Result, ensure};
use baton_tests::{Cluster, ClusterOptions, model_path, test_python};
use std::path::Path;
use std::time::Duration;
use tokio::process::Command;

async fn session(script: &str, arguments: &[&str]) -> Result<()> {
    let script = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/python")).join(script);
    let run = Command::new(test_python())
        .arg(&script)
        .args(arguments)
        .kill_on_drop(true)
        .output();
    let output = tokio::time::timeout(Duration::from_secs(180), run).await??;
    let (out, err) = (
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr),
    );
    println!("{out}");
    ensure!(output.status.success(), "{} failed:\n{out}\n{err}", script.display());
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn openai_and_grpc_clients_pass_their_sessions() -> Result<()> {
    let cluster = Cluster::start(ClusterOptions::pair(model_path().display().to_string())).await?;
    session("openai_session.py", &[&format!("{}/v1", cluster.http())]).await?;
    session("structured_session.py", &[&format!("{}/v1", cluster.http())]).await?;
    session("grpc_session.py", &[&cluster.grpc_address()]).await?;
    cluster.wait_idle(Duration::from_secs(10)).await?;
    Ok(())
}
