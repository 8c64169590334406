//! A decode node that is told to leave while all of a cluster's streams run on it, with another one beside it.

use crate::{Answer, Ask, Cluster, ClusterOptions, ask, until};
use anyhow::{Context, Result, ensure};
use baton_proto::v1;
use std::time::{Duration, Instant};
use tokio::task::JoinSet;

/// For everything that is waited for.
const LIMIT: Duration = Duration::from_secs(120);

/// How it is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Leave {
    /// `baton drain`.
    Drain,
    /// SIGTERM to its process.
    Sigterm,
}

/// What the clients saw.
#[derive(Debug, Clone)]
pub struct Left {
    /// From the order on.
    pub longest_gap: Duration,
    /// The time that a token took, in the middle of all tokens of all streams.
    pub median_itl: Duration,
    /// The same of the run before, with nobody leaving.
    pub undisturbed_itl: Duration,
    /// Its longest gap.
    pub undisturbed_gap: Duration,
    /// From the order until the node's process had ended.
    pub took: Duration,
    /// Streams that went on elsewhere with their KV.
    pub moved: usize,
    /// Streams that were done anew.
    pub anew: usize,
}

/// Streams on their way, by number.
pub struct Streams(JoinSet<(usize, Result<Result<Answer, tonic::Status>>)>);

impl Streams {
    /// Asks all at once.
    pub async fn start(cluster: &Cluster, asks: &[Ask]) -> Result<Self> {
        let client = cluster.client().await?;
        let mut running = JoinSet::new();
        for (index, one) in asks.iter().enumerate() {
            let (client, one) = (client.clone(), one.clone());
            running.spawn(async move { (index, ask(&client, &one).await) });
        }
        Ok(Self(running))
    }

    /// Each answer, in order of the requests.
    pub async fn finish(mut self) -> Result<Vec<Answer>> {
        let mut answers = vec![Answer::default(); self.0.len()];
        while let Some(done) = tokio::time::timeout(LIMIT, self.0.join_next()).await? {
            let (index, answer) = done?;
            answers[index] = answer?.with_context(|| format!("stream {index}"))?;
        }
        Ok(answers)
    }
}

/// Fails where an answer is not the reference's, token for token.
pub fn same_tokens(answers: &[Answer], reference: &[Answer]) -> Result<()> {
    for (index, (answer, reference)) in answers.iter().zip(reference).enumerate() {
        ensure!(
            answer.tokens == reference.tokens,
            "stream {index} differs from the undisturbed run: {:?}",
            answer.timeline
        );
    }
    Ok(())
}

/// Waits until a node computes so many requests.
pub async fn busy(cluster: &Cluster, node: &str, requests: usize) -> Result<()> {
    until(&format!("{requests} requests run on {node}"), LIMIT, || async {
        let status = cluster.status().await.ok()?;
        let load = status.nodes.into_iter().find(|n| n.node_id == node)?.load?;
        (load.running_requests as usize >= requests).then_some(())
    })
    .await
}

/// Starts a pair, runs all `asks` on it undisturbed, runs them again, and takes the decode node out from under them once
/// `running` of them run at a time and another one is there. Every answer must be the undisturbed one, and the node must end with exit code 0.
///
/// # Errors
/// Whatever of that is not so.
pub async fn leave_under_load(options: ClusterOptions, asks: &[Ask], running: usize, leave: Leave) -> Result<Left> {
    let mut cluster = Cluster::start(options).await?;
    let reference = Streams::start(&cluster, asks).await?.finish().await?;
    // Heartbeats are late: until they say so, the node looks as busy as it was.
    cluster.wait_idle(LIMIT).await?;
    let streams = Streams::start(&cluster, asks).await?;
    busy(&cluster, "decode-0", running).await?;
    cluster.add("decode").await?;
    cluster.wait_listed().await?;

    let ordered = Instant::now();
    match leave {
        Leave::Drain => {
            let request = v1::DrainRequest {
                node_id: "decode-0".into(),
                deadline_ms: None,
            };
            cluster.admin().await?.drain(request).await?;
        }
        Leave::Sigterm => cluster.decode[0].signal("TERM").await?,
    }
    let mut leaver = cluster.decode.remove(0);
    let ended = async {
        let code = leaver.ended(LIMIT).await?;
        ensure!(
            code == 0,
            "{} ended with exit code {code}:\n{}",
            leaver.name,
            leaver.log()
        );
        Ok(ordered.elapsed())
    };
    let (answers, took) = tokio::join!(streams.finish(), ended);
    let (answers, took) = (answers.with_context(|| cluster.logs())?, took?);
    same_tokens(&answers, &reference)?;
    cluster.wait_idle(LIMIT).await?;

    let moved = |answer: &&Answer| answer.timeline.decode_node == "decode-1" && answer.timeline.attempts == 1;
    let since = |answers: &[Answer], start: Option<Instant>| {
        let gaps = answers.iter().flat_map(|answer| answer.gaps(start));
        gaps.max().unwrap_or_default()
    };
    Ok(Left {
        longest_gap: since(&answers, Some(ordered)),
        median_itl: median_itl(&answers),
        undisturbed_itl: median_itl(&reference),
        undisturbed_gap: since(&reference, None),
        took,
        moved: answers.iter().filter(moved).count(),
        anew: answers.iter().filter(|answer| answer.timeline.attempts > 1).count(),
    })
}

/// The time between tokens in the middle of all of them; tokens that came together share the time before them.
fn median_itl(answers: &[Answer]) -> Duration {
    let mut all: Vec<Duration> = answers.iter().flat_map(Answer::token_times).collect();
    all.sort_unstable();
    all.get(all.len() / 2).copied().unwrap_or_default()
}
