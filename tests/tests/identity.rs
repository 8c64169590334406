//! The invariant that everything leans on: greedy output is the same, token for token, wherever and however a request ran;
//! sampled output likewise for equal seeds. Real model, real processes. 12 prompts; all 40 under `./test.sh --long`.

use anyhow::{Context, Result, ensure};
use baton_decode_node::DecodeRole;
use baton_node_host::{BringUpError, NodeOptions, Role, run_beside_others};
use baton_node_runtime::{Metrics, Supervisor};
use baton_prefill_node::PrefillRole;
use baton_proto::v1;
use baton_proto::v1::tokenize_request::Input as TokenizeInput;
use baton_tests::{Ask, Cluster, ClusterOptions, Prompt, ask, long_campaign, model_path, prompts};
use baton_types::NodeRole;
use clap::Parser;
use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;
use tokio::task::JoinSet;

const TOKENS: u32 = 32;

fn campaign() -> Vec<Prompt> {
    let mut all = prompts();
    if !long_campaign() {
        all.truncate(8);
    }
    all
}

/// The prompts as requests: those of a stated length become exactly so many token ids.
async fn asks(cluster: &Cluster, prompts: &[Prompt]) -> Result<Vec<Ask>> {
    let client = cluster.client().await?;
    let mut asks = Vec::new();
    for prompt in prompts {
        let mut ask = Ask::greedy(&prompt.text, TOKENS);
        ask.request.input = Some(prompt.input());
        if let Some(length) = prompt.tokens {
            let input = Some(TokenizeInput::Text(prompt.text.clone()));
            let request = v1::TokenizeRequest {
                input,
                ..v1::TokenizeRequest::default()
            };
            let mut ids = client.clone().tokenize(request).await?.into_inner().tokens;
            ensure!(
                ids.len() >= length,
                "a prompt of {} tokens cannot be cut to {length}",
                ids.len()
            );
            ids.truncate(length);
            ask = Ask::greedy_ids(ids, TOKENS);
        }
        asks.push(ask);
    }
    Ok(asks)
}

/// Asks everything, `at_once` at a time, and gives the token ids in order.
async fn run(cluster: &Cluster, asks: &[Ask], at_once: usize) -> Result<Vec<Vec<u32>>> {
    let client = cluster.client().await?;
    let mut outputs = vec![Vec::new(); asks.len()];
    let mut running = JoinSet::new();
    let mut waiting = asks.iter().cloned().enumerate();
    loop {
        while running.len() < at_once {
            let Some((index, request)) = waiting.next() else { break };
            let client = client.clone();
            running.spawn(async move { (index, ask(&client, &request).await) });
        }
        let Some(done) = running.join_next().await else { break };
        let (index, answer) = done?;
        let answer = answer?.with_context(|| format!("prompt {index}"))?;
        ensure!(
            answer.tokens.len() == TOKENS as usize,
            "prompt {index} gave {} tokens",
            answer.tokens.len()
        );
        outputs[index] = answer.tokens;
    }
    Ok(outputs)
}

fn compare(what: &str, reference: &[Vec<u32>], outputs: &[Vec<u32>]) -> Result<()> {
    for (index, (want, got)) in reference.iter().zip(outputs).enumerate() {
        let differs = want.iter().zip(got).position(|(a, b)| a != b);
        ensure!(
            want == got,
            "{what}: prompt {index} differs from colocated at token {differs:?}:\n{want:?}\n{got:?}"
        );
    }
    println!("{what}: {} of {} prompts identical", outputs.len(), reference.len());
    Ok(())
}

/// A node's flags, as its command line gives them.
#[derive(clap::Parser)]
struct Flags {
    #[command(flatten)]
    node: NodeOptions,
}

/// Both roles in this process, their hand-overs from memory to memory.
struct InProcess {
    cluster: Cluster,
    supervisor: Supervisor,
    roles: JoinSet<Result<(), BringUpError>>,
}

impl InProcess {
    async fn start(model: &str) -> Result<Self> {
        let mut cluster = Cluster::coordinator_alone(ClusterOptions::pair(model)).await?;
        let (supervisor, mut roles) = (Supervisor::new(), JoinSet::new());
        let store = cluster.store()?;
        let flags = |name| {
            let flags = [
                "--model",
                model,
                "--node-id",
                name,
                "--store",
                &store,
                "--kv-bytes",
                "256MiB",
            ];
            Flags::parse_from(["node"].into_iter().chain(flags).chain(["--transports", "memory"])).node
        };
        let prefill = |host| Arc::new(PrefillRole::new(host)) as Arc<dyn Role>;
        let decode = |host| Arc::new(DecodeRole::new(host)) as Arc<dyn Role>;
        let (metrics, sup) = (Metrics::detached(), &supervisor);
        roles.spawn(run_beside_others(
            flags("p"),
            NodeRole::Prefill,
            prefill,
            metrics.clone(),
            sup.clone(),
        ));
        roles.spawn(run_beside_others(
            flags("d"),
            NodeRole::Decode,
            decode,
            metrics,
            sup.clone(),
        ));
        cluster.foreign = 2;
        cluster.wait_listed().await?;
        Ok(Self {
            cluster,
            supervisor,
            roles,
        })
    }

    async fn end(mut self) -> Result<()> {
        self.cluster.wait_idle(Duration::from_secs(10)).await?;
        self.supervisor.begin_shutdown();
        while let Some(ended) = self.roles.join_next().await {
            ended??;
        }
        Ok(())
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn greedy_and_sampled_output_do_not_depend_on_where_a_request_ran() -> Result<()> {
    let model = model_path().display().to_string();
    let prompts = campaign();

    let colocated = Cluster::start(ClusterOptions::colocated(&model)).await?;
    let asks = asks(&colocated, &prompts).await?;
    let reference = run(&colocated, &asks, 1).await?;
    let distinct = reference.iter().collect::<HashSet<_>>().len();
    ensure!(
        4 * distinct >= 3 * reference.len(),
        "only {distinct} of {} outputs are distinct",
        reference.len()
    );
    compare(
        "colocated, warm prefix cache",
        &reference,
        &run(&colocated, &asks, 1).await?,
    )?;
    compare(
        "colocated, eight at once",
        &reference,
        &run(&colocated, &asks, 8).await?,
    )?;
    let sampled: Vec<Ask> = (0..6)
        .map(|seed| Ask::sampled("The old map showed", TOKENS, seed))
        .collect();
    let drawn = run(&colocated, &sampled, 3).await?;
    ensure!(
        drawn.iter().collect::<HashSet<_>>().len() >= 5,
        "seeds hardly matter: {drawn:?}"
    );
    colocated.wait_idle(Duration::from_secs(10)).await?;
    drop(colocated);

    let memory = InProcess::start(&model).await?;
    compare(
        "both roles in one process, over memory",
        &reference,
        &run(&memory.cluster, &asks, 2).await?,
    )?;
    memory.end().await?;

    let pairs = [
        ("tcp", "16", "off"),
        ("tcp", "64", "always"),
        ("tcp", "512", "auto"),
        ("shm", "256", "always"),
    ];
    for (transport, chunk, speculation) in pairs {
        let flags = [
            "--transports",
            transport,
            "--chunk-tokens",
            chunk,
            "--speculation",
            speculation,
        ];
        let pair = Cluster::start(ClusterOptions::pair(&model).node_flags(&flags)).await?;
        let name = format!("handed over by {transport}, chunks of {chunk}, speculation {speculation}");
        compare(&name, &reference, &run(&pair, &asks, 1).await?)?;
        if chunk == "64" {
            compare(
                "handed over, warm prefix cache",
                &reference,
                &run(&pair, &asks, 1).await?,
            )?;
            compare("handed over, sampled", &drawn, &run(&pair, &sampled, 1).await?)?;
        }
        if chunk == "512" {
            compare("handed over, eight at once", &reference, &run(&pair, &asks, 8).await?)?;
        }
        pair.wait_idle(Duration::from_secs(10)).await?;
    }
    Ok(())
}

/// KV in 8 bits: what is handed over is what would have stood there.
#[tokio::test(flavor = "multi_thread")]
async fn kv_in_8_bits_is_handed_over_as_it_is() -> Result<()> {
    let model = model_path().display().to_string();
    let mut prompts = campaign();
    prompts.truncate(if long_campaign() { 40 } else { 4 });
    let flags = ["--kv-dtype", "q8"];
    let colocated = Cluster::start(ClusterOptions::colocated(&model).node_flags(&flags)).await?;
    let asks = asks(&colocated, &prompts).await?;
    let reference = run(&colocated, &asks, 1).await?;
    compare("8 bits, four at once", &reference, &run(&colocated, &asks, 4).await?)?;
    drop(colocated);
    for (transport, chunk) in [("tcp", "16"), ("shm", "256")] {
        let more = ["--transports", transport, "--chunk-tokens", chunk];
        let options = ClusterOptions::pair(&model).node_flags(&flags).node_flags(&more);
        let pair = Cluster::start(options).await?;
        let name = format!("8 bits, handed over by {transport}, chunks of {chunk}");
        compare(&name, &reference, &run(&pair, &asks, 2).await?)?;
        pair.wait_idle(Duration::from_secs(10)).await?;
    }
    Ok(())
}
