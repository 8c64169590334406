//! A whole cluster on one machine hands requests over by one path, loses that path in mid hand-over as often as it is told
//! to, and must give the tokens that one node alone gives. Made for the guest of tests/rdma-guest.sh, where the path is RDMA;
//! it runs anywhere with any transport.
//!
//! Output: a line per request with its timeline, `ok` or what was wrong. Exit status: the number of requests that went wrong.

use anyhow::{Context, Result, ensure};
use baton_tests::{Answer, Ask, Cluster, ClusterOptions, RandomLlama, ask, http_get, until};
use clap::Parser;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};
use tokio::process::Command;

#[derive(Debug, Parser)]
struct Options {
    /// The model; without it a random one of 4 layers of 128
    #[arg(long, value_name = "PATH")]
    model: Option<PathBuf>,
    /// Transports of the nodes, best first
    #[arg(long, value_name = "NAME,...", default_value = "tcp")]
    transports: String,
    /// The path that hand-overs must take
    #[arg(long, value_name = "NAME", default_value = "tcp")]
    expect: String,
    /// The path that they must end on when the first one is cut
    #[arg(long, value_name = "NAME", default_value = "tcp")]
    fallback: String,
    /// Flags of all nodes, separated by spaces
    #[arg(long, value_name = "FLAGS", default_value = "", allow_hyphen_values = true)]
    node_flags: String,
    /// Flags of the prefill node alone
    #[arg(long, value_name = "FLAGS", default_value = "", allow_hyphen_values = true)]
    prefill_flags: String,
    /// Flags of the decode node alone
    #[arg(long, value_name = "FLAGS", default_value = "", allow_hyphen_values = true)]
    decode_flags: String,
    /// A shell command that cuts the path when the first block was sent; each makes one more request
    #[arg(long, value_name = "COMMAND")]
    cut: Vec<String>,
    /// The shell command that heals the path again
    #[arg(long, value_name = "COMMAND", default_value = "true")]
    heal: String,
    /// Tokens of the first prompt and, where paths are cut, of the others
    #[arg(long, value_name = "TOKENS,TOKENS", value_delimiter = ',', default_values_t = [100, 150])]
    prompt_tokens: Vec<usize>,
    /// Tokens generated
    #[arg(long, value_name = "COUNT", default_value_t = 12)]
    tokens: u32,
    /// KV memory of each node
    #[arg(long, value_name = "BYTES", default_value = "64MiB")]
    kv_bytes: String,
    /// How long one request may take, and the start of one process, seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 120)]
    limit: u64,
}

/// One request, and what is done to the path meanwhile.
struct Scenario {
    name: String,
    ask: Ask,
    cut: Option<String>,
    /// What one node alone answers.
    expected: Vec<u32>,
}

fn words(flags: &str) -> Vec<String> {
    flags.split_whitespace().map(str::to_owned).collect()
}

/// Numbers of prompts of short requests begin here.
const FIRST_QUESTION: usize = 100;
const QUESTION_TOKENS: usize = 16;

/// Prompts that differ within their first tokens, so that no node has any of one's blocks from another.
fn prompt(number: usize, tokens: usize) -> Vec<u32> {
    let number = u32::try_from(number).unwrap_or(u32::MAX);
    let tokens = u32::try_from(tokens).unwrap_or(u32::MAX);
    let head = [65 + number % 26, 65 + number / 26 % 26];
    let rest = (2..tokens).map(|i| 97 + (number * 5 + i * 7 + i / 11) % 26);
    head.into_iter().chain(rest).collect()
}

impl Options {
    fn scenarios(&self) -> Vec<Scenario> {
        let cuts = self
            .cut
            .iter()
            .map(|cut| (format!("cut by `{cut}`"), Some(cut.clone())));
        let all = [("undisturbed".to_owned(), None)].into_iter().chain(cuts);
        all.enumerate()
            .map(|(number, (name, cut))| {
                let length = self.prompt_tokens[number.min(self.prompt_tokens.len() - 1)];
                Scenario {
                    name,
                    ask: Ask::greedy_ids(prompt(number, length), self.tokens),
                    cut,
                    expected: Vec::new(),
                }
            })
            .collect()
    }

    fn cluster(&self, model: &str) -> ClusterOptions {
        let mut options = ClusterOptions::pair(model);
        options.kv_bytes.clone_from(&self.kv_bytes);
        options.start_limit = self.limit();
        options.node_flags = words(&self.node_flags);
        options
            .node_flags
            .extend(["--transports".to_owned(), self.transports.clone()]);
        options.prefill_flags = words(&self.prefill_flags);
        options.decode_flags = words(&self.decode_flags);
        options
    }

    fn limit(&self) -> Duration {
        Duration::from_secs(self.limit)
    }

    async fn ask(&self, cluster: &Cluster, scenario: &Scenario) -> Result<Answer> {
        let client = cluster.client().await?;
        let answer = tokio::time::timeout(self.limit(), ask(&client, &scenario.ask)).await;
        let answer = answer.with_context(|| format!("no answer after {:?}\n{}", self.limit(), cluster.logs()))??;
        answer.with_context(|| format!("refused\n{}", cluster.logs()))
    }

    /// Asks short questions until one is answered over the expected path: until then it is being opened, or comes back
    /// after it was healed. What is asked until then takes another path, as it should.
    async fn wait_for_path(&self, cluster: &Cluster, asked: &mut usize) -> Result<()> {
        let end = Instant::now() + self.limit();
        loop {
            *asked += 1;
            let question = Scenario {
                name: "is the path there".to_owned(),
                ask: Ask::greedy_ids(prompt(FIRST_QUESTION + *asked, QUESTION_TOKENS), 2),
                cut: None,
                expected: Vec::new(),
            };
            let path = self.ask(cluster, &question).await?.timeline.handover_path;
            println!("      a short request went over {path}");
            if path == self.expect {
                return Ok(());
            }
            let expect = &self.expect;
            ensure!(Instant::now() < end, "the path {expect} never came\n{}", cluster.logs());
            tokio::time::sleep(Duration::from_millis(500)).await;
        }
    }

    /// Asks, and cuts the path as soon as something went over it.
    async fn ask_and_cut(&self, cluster: &Cluster, scenario: &Scenario) -> Result<Answer> {
        let Some(cut) = &scenario.cut else {
            return self.ask(cluster, scenario).await;
        };
        let before = sent_extents(cluster, &self.expect).await?;
        let cutting = async {
            until("the first block is sent", self.limit(), || async {
                let sent = sent_extents(cluster, &self.expect).await.ok()?;
                (sent > before).then_some(())
            })
            .await?;
            shell(cut).await
        };
        let (answer, cut) = tokio::join!(self.ask(cluster, scenario), cutting);
        shell(&self.heal).await?;
        cut?;
        answer
    }

    fn check(&self, scenario: &Scenario, answer: &Answer) -> Result<()> {
        let timeline = &answer.timeline;
        ensure!(
            answer.tokens == scenario.expected,
            "the tokens are not those of one node alone:\n{:?}\n{:?}",
            answer.tokens,
            scenario.expected
        );
        let path = if scenario.cut.is_some() {
            &self.fallback
        } else {
            &self.expect
        };
        ensure!(
            timeline.handover_path == *path,
            "handed over by `{}` instead of {path}",
            timeline.handover_path
        );
        let fallbacks: Vec<_> = timeline.path_fallbacks.iter().map(|f| (&f.from, &f.to)).collect();
        let expected = match scenario.cut {
            Some(_) => vec![(&self.expect, &self.fallback)],
            None => Vec::new(),
        };
        ensure!(
            fallbacks == expected,
            "fallbacks in the timeline: {:?}",
            timeline.path_fallbacks
        );
        ensure!(timeline.attempts <= 1, "{} attempts", timeline.attempts);
        Ok(())
    }
}

async fn shell(command: &str) -> Result<()> {
    let status = Command::new("sh").args(["-c", command]).status().await?;
    ensure!(status.success(), "`{command}`: {status}");
    println!("      did: {command}");
    Ok(())
}

/// Extents that the prefill node has handed to the wire of a path, by its metrics.
async fn sent_extents(cluster: &Cluster, path: &str) -> Result<u64> {
    let admin = cluster.prefill[0]
        .announcement
        .admin
        .as_deref()
        .context("an admin port")?;
    let (_, page) = http_get(&format!("http://{admin}"), "/metrics").await?;
    let name = format!("baton_transport_sent_extents_total{{path=\"{path}\"}} ");
    let value = page.lines().find_map(|line| line.strip_prefix(&name));
    Ok(value.map_or(Ok(0), str::parse)?)
}

async fn run(options: &Options) -> Result<u8> {
    let folder = tempfile::tempdir()?;
    let model = match &options.model {
        Some(model) => model.display().to_string(),
        None => {
            RandomLlama::TINY.write(folder.path())?;
            folder.path().display().to_string()
        }
    };
    let mut scenarios = options.scenarios();
    let alone = ClusterOptions {
        prefill: 0,
        ..options.cluster(&model)
    };
    let alone = Cluster::start(alone).await.context("one node alone")?;
    for scenario in &mut scenarios {
        scenario.expected = options.ask(&alone, scenario).await?.tokens;
    }
    drop(alone);
    for scenario in &scenarios {
        println!("alone, {}: {:?}", scenario.name, scenario.expected);
    }
    let cluster = Cluster::start(options.cluster(&model)).await.context("the cluster")?;
    let (mut wrong, mut asked) = (0, 0);
    for scenario in &scenarios {
        println!("== {}", scenario.name);
        options.wait_for_path(&cluster, &mut asked).await?;
        let result = match options.ask_and_cut(&cluster, scenario).await {
            Ok(answer) => {
                println!("      {:?}", answer.timeline);
                options.check(scenario, &answer)
            }
            Err(error) => Err(error),
        };
        match result {
            Ok(()) => println!("-- ok {}", scenario.name),
            Err(error) => {
                println!("-- WRONG {}: {error:#}\n{}", scenario.name, cluster.logs());
                wrong += 1;
            }
        }
    }
    cluster.wait_idle(options.limit()).await?;
    Ok(wrong)
}

#[tokio::main]
async fn main() -> ExitCode {
    let options = Options::parse();
    match run(&options).await {
        Ok(wrong) => ExitCode::from(wrong),
        Err(error) => {
            eprintln!("handover-cluster: {error:#}");
            ExitCode::from(100)
        }
    }
}
