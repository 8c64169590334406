//! The controller in a live cluster: what it advises, who leads, and that a change of roles under load costs no answer.

use anyhow::{Context, Result, ensure};
use baton_planner::profile::{FORMAT_VERSION, Grid, HandoverPath, HandoverTail, Kind, ModelShape, Profile};
use baton_proto::v1;
use baton_proto::v1::admin_client::AdminClient;
use baton_proto::v1::inference_client::InferenceClient;
use baton_tests::{Answer, Ask, Cluster, ClusterOptions, Etcd, Process, Store, ask, baton_binary, http_get, until};
use std::process::Stdio;
use std::time::Duration;
use tokio::task::JoinSet;
use tokio::time::{MissedTickBehavior, interval};
use tonic::transport::Channel;

/// A prompt of [`PROMPT`] tokens takes 100 ms: a prefill node computes ten of them per second.
const MODEL: &str = "stub:prefill_us=400,decode_us=5000";
const PROMPT: u32 = 250;
const ANSWER: u32 = 8;
/// Between two requests: a third more than one prefill node computes.
const EVERY: Duration = Duration::from_millis(75);
const LIMIT: Duration = Duration::from_secs(60);

/// What [`MODEL`] is like.
fn profile() -> Profile {
    Profile {
        version: FORMAT_VERSION,
        name: "stub".to_owned(),
        kind: Kind::Measured,
        sources: Vec::new(),
        hardware: "none".to_owned(),
        model: ModelShape {
            name: "stub".to_owned(),
            layers: 2,
            kv_bytes_per_token: 32,
        },
        block_tokens: 16,
        chunk_tokens: 512,
        kv_capacity_tokens: 100_000,
        queue_max: 64,
        prefill_running_max: 8,
        prefill: Grid::of(vec![0.0, 1e6], vec![0.0, 1e6], |new, _| new * 4e-4),
        decode: Grid::of(vec![1.0, 1e4], vec![0.0, 1e9], |_, _| 5e-3),
        mixed_saves_s: 0.0,
        handover: vec![HandoverPath {
            path: "shm".to_owned(),
            bytes: vec![0.0, 1e12],
            seconds: vec![0.001, 1.0],
        }],
        handover_tail: HandoverTail::always(0.001),
        contended: None,
        request_overhead_s: 0.002,
        startup_s: 1.0,
        role_change_s: 0.3,
        drain_s: 0.1,
        residuals: Vec::new(),
        error_bars: Vec::new(),
    }
}

/// Quick looks at a short time; decode nodes leave prompts to the prefill nodes.
fn flags(mode: &str, more: &[&str]) -> Vec<String> {
    let all = [
        "--control",
        mode,
        "--control-slo",
        "ttft_p90=700ms",
        "--control-every",
        "400ms",
        "--control-window",
        "9s",
        "--control-requests-min",
        "30",
        "--control-warm-up",
        "100ms",
        "--control-cooldown",
        "1500ms",
        "--routing-policy",
        "least-loaded",
    ];
    all.iter().chain(more).map(|&flag| flag.to_owned()).collect()
}

fn request(index: u32) -> Ask {
    // No two prompts share a block.
    let ids = (0..PROMPT).map(|i| (i.wrapping_mul(index + 3) + index) % 251);
    Ask::greedy_ids(ids.collect(), ANSWER)
}

/// Requests that come whatever becomes of those before.
struct Load(
    tokio::task::JoinHandle<Result<Vec<Answer>>>,
    tokio::sync::oneshot::Sender<()>,
);

impl Load {
    fn start(client: InferenceClient<Channel>) -> Self {
        let (stop, mut stopped) = tokio::sync::oneshot::channel();
        let load = async move {
            let (mut running, mut answers) = (JoinSet::new(), Vec::new());
            let mut due = interval(EVERY);
            due.set_missed_tick_behavior(MissedTickBehavior::Skip);
            for index in 0.. {
                tokio::select! {
                    _ = due.tick() => {}
                    _ = &mut stopped => break,
                }
                let client = client.clone();
                running.spawn(async move { ask(&client, &request(index)).await });
            }
            while let Some(done) = running.join_next().await {
                answers.push(done???);
            }
            Ok(answers)
        };
        Self(tokio::spawn(load), stop)
    }

    /// Stops asking; each request must have been answered in full.
    async fn finish(self) -> Result<Vec<Answer>> {
        let _ = self.1.send(());
        let answers = self.0.await??;
        ensure!(answers.iter().all(|answer| answer.tokens.len() == ANSWER as usize));
        Ok(answers)
    }
}

async fn advice(admin: &AdminClient<Channel>) -> Result<v1::AdviseResponse> {
    Ok(admin.clone().advise(v1::AdviseRequest {}).await?.into_inner())
}

fn advised(answer: &v1::AdviseResponse) -> Option<&str> {
    Some(&answer.advice.as_ref()?.change.as_ref()?.kind)
}

/// Ready nodes by role.
async fn roles(cluster: &Cluster) -> Result<(usize, usize)> {
    let nodes = cluster.status().await?.nodes;
    let of = |role: v1::NodeRole| {
        let ready = nodes.iter().filter(|node| node.role() == role && node.state == "ready");
        ready.count()
    };
    Ok((of(v1::NodeRole::Prefill), of(v1::NodeRole::Decode)))
}

/// What an operator reads.
async fn status_advise(address: &str) -> Result<String> {
    let output = tokio::process::Command::new(baton_binary())
        .args(["status", "--advise", "--endpoint", address])
        .stdin(Stdio::null())
        .output()
        .await?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8(output.stdout)?)
}

#[tokio::test(flavor = "multi_thread")]
async fn an_overloaded_prefill_side_gets_a_decode_node_and_no_answer_is_lost() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("stub.json");
    profile().write(&path)?;
    let profile = path.display().to_string();
    let options = ClusterOptions {
        prefill: 1,
        decode: 3,
        coordinator_flags: flags("apply", &["--control-profile", &profile]),
        ..ClusterOptions::pair(MODEL)
    };
    let cluster = Cluster::start(options.node_flags(&["--queue", "256"])).await?;
    let admin = cluster.admin().await?;
    let load = Load::start(cluster.client().await?);
    let applied = until("a role was changed", LIMIT, || async {
        let answer = advice(&admin).await.ok()?;
        let last = answer.advice?.last?;
        (last.outcome == "applied").then_some(last)
    });
    let Ok(last) = applied.await else {
        anyhow::bail!(
            "nothing was applied: {:#?}\n{}",
            advice(&admin).await,
            cluster.coordinator.log()
        );
    };
    let (change, tried) = (last.change.unwrap_or_default(), last.rehearsed.unwrap_or_default());
    ensure!(change.kind == "to_prefill", "{change:?}");
    ensure!(tried.with > tried.without && tried.better == "yes", "{tried:?}");
    until("the node is a prefill node", LIMIT, || async {
        let (prefill, decode) = roles(&cluster).await.ok()?;
        (prefill >= 2 && prefill + decode == 4).then_some(())
    })
    .await?;
    let text = status_advise(&cluster.grpc_address()).await?;
    for words in [
        "controller: apply; this coordinator leads",
        "last change, ",
        ": applied; rehearsed: ",
    ] {
        ensure!(text.contains(words), "`{words}` is not in:\n{text}");
    }
    let answers = load.finish().await?;
    println!("{} requests answered; {}\n{text}", answers.len(), change.text);
    let (prefill, decode) = roles(&cluster).await?;
    ensure!(
        decode >= 1 && prefill >= 2,
        "{prefill} prefill and {decode} decode nodes"
    );
    let page = cluster
        .coordinator
        .announcement
        .admin
        .clone()
        .context("an admin port")?;
    let (_, metrics) = http_get(&page, "/metrics").await?;
    for line in [
        "baton_control_leads 1",
        "baton_control_target_nodes{role=\"prefill\"}",
        "baton_control_changes_total{change=\"to_prefill\",outcome=\"applied\"}",
        "baton_control_attainment_ratio",
    ] {
        ensure!(metrics.contains(line), "`{line}` is not in:\n{metrics}");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_last_decode_node_stays_and_where_it_is_off_it_says_so() -> Result<()> {
    let options = ClusterOptions {
        coordinator_flags: flags("advise", &[]),
        ..ClusterOptions::pair(MODEL)
    };
    let cluster = Cluster::start(options.node_flags(&["--queue", "256"])).await?;
    let admin = cluster.admin().await?;
    let load = Load::start(cluster.client().await?);
    let answer = until("the overload is seen", LIMIT, || async {
        let answer = advice(&admin).await.ok()?;
        let seen = answer.advice.as_ref()?;
        (!seen.reasons.is_empty() && seen.attainment.is_some()).then_some(answer)
    })
    .await?;
    let seen = answer.advice.clone().unwrap_or_default();
    ensure!(advised(&answer).is_none(), "{answer:?}");
    ensure!(
        seen.hold.contains("--control-profile") || seen.hold.contains("profile"),
        "{}",
        seen.hold
    );
    ensure!(roles(&cluster).await? == (1, 1));
    load.finish().await?;
    drop(cluster);

    let off = Cluster::coordinator_alone(ClusterOptions::pair(MODEL)).await?;
    ensure!(advice(&off.admin().await?).await?.mode == "off");
    let text = status_advise(&off.grpc_address()).await?;
    ensure!(
        text.contains("the controller is off: start the coordinator (or `baton up`) with --control advise"),
        "{text}"
    );
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn one_of_two_coordinators_leads_and_the_other_takes_over() -> Result<()> {
    let etcd = Etcd::start().await?;
    let lease = ["--lease-ttl", "3s"];
    let options = ClusterOptions {
        prefill: 1,
        decode: 2,
        store: Store::Etcd(etcd.store()),
        coordinator_flags: flags("advise", &lease),
        ..ClusterOptions::pair(MODEL)
    };
    let mut cluster = Cluster::start(options.node_flags(&["--queue", "256"])).await?;
    let first = cluster.admin().await?;
    until("it leads", LIMIT, || async {
        (advice(&first).await.ok()?.standing == "leads").then_some(())
    })
    .await?;
    let mut arguments: Vec<String> = ["coordinator", "--exit-with-parent", "--store", &etcd.store()]
        .map(String::from)
        .to_vec();
    arguments.extend(["--http-listen", "127.0.0.1:0", "--grpc-listen", "127.0.0.1:0"].map(String::from));
    arguments.extend(flags("advise", &lease));
    let other = Process::start("coordinator-2", &arguments, LIMIT).await?;
    let address = other.announcement.grpc.clone().context("a gRPC door")?;
    let second = AdminClient::connect(format!("http://{address}")).await?;
    let leader = cluster.status().await?.coordinator_instance;
    let load = Load::start(cluster.client().await?);
    // The one that follows tells what the leader sees.
    let told = until("both give the leader's advice", LIMIT, || async {
        let (of_first, of_second) = (advice(&first).await.ok()?, advice(&second).await.ok()?);
        let follows = of_second.standing == "follows" && of_second.leader_instance == leader;
        (follows && advised(&of_first).is_some() && advised(&of_second).is_some()).then_some(of_second)
    })
    .await?;
    ensure!(advised(&told) == Some("to_prefill"), "{told:?}");
    let seen = told.advice.unwrap_or_default();
    ensure!(
        seen.leader_instance == leader && seen.hold.contains("profile"),
        "{seen:?}"
    );
    ensure!(roles(&cluster).await? == (1, 2), "advice changes nothing");
    load.finish().await?;

    cluster.coordinator.kill().await?;
    let led = until("the other one leads", LIMIT, || async {
        let answer = advice(&second).await.ok()?;
        let looked = answer.advice.as_ref()?;
        (answer.standing == "leads" && looked.leader_instance != leader).then_some(answer)
    });
    let Ok(led) = led.await else {
        anyhow::bail!("nobody took over: {:?}\n{}", advice(&second).await, other.log());
    };
    println!("the other one leads: {:?}", led.advice.map(|advice| advice.hold));
    Ok(())
}
