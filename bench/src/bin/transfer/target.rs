//! The target: receives, and answers the initiator's questions over its standard input and output, a line of JSON each.

use crate::case::Case;
use crate::layout::Layout;
use crate::machine::cpu_of_process;
use crate::node::Node;
use crate::options::Options;
use crate::pool::Pool;
use anyhow::{Context, Result, bail};
use baton_kv_transfer::Peer;
use baton_types::{Epoch, Instance};
use serde::{Deserialize, Serialize};
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};
use tokio::runtime::Runtime;

/// How long a round may take to be counted once it was written.
const SETTLE_MAX: Duration = Duration::from_secs(5);

/// What the initiator asks.
#[derive(Serialize, Deserialize)]
pub enum Question {
    /// Start with that case of the command line.
    Start {
        case: usize,
    },
    /// Expect that round's blocks, or so many single ones that go through so many of its destinations.
    Grant {
        round: u64,
        writer: Instance,
        single: Option<(usize, usize)>,
    },
    Cpu,
    /// Did everything arrive, and is it right?
    Verify,
    Digest,
}

/// What the target answers.
#[derive(Serialize, Deserialize)]
pub enum Answer {
    Started { peer: Peer },
    Granted,
    Cpu { seconds: f64 },
    Verified { ok: bool },
    Digest { value: u64, seconds: f64 },
}

/// The receiving end, wherever it lives.
pub struct Receiver {
    node: Node,
    pool: Pool,
    blocks: usize,
    seed: u64,
    granted: Option<Layout>,
}

impl Receiver {
    pub async fn start(options: &Options, case: &Case) -> Result<Self> {
        let node = Node::start(options, case, "target").await?;
        let pool = Pool(node.view.clone());
        Ok(Self {
            node,
            pool,
            blocks: case.blocks_in(options.total_mib << 20),
            seed: options.seed,
            granted: None,
        })
    }

    /// Waits until everything of the present grant is counted. One-sided writes end when their bytes are here, which is
    /// before that.
    fn settle(&self) -> bool {
        let until = Instant::now() + SETTLE_MAX;
        while !self.node.book.is_complete() {
            if Instant::now() > until {
                return false;
            }
            std::thread::yield_now();
        }
        true
    }

    pub fn answer(&mut self, question: &Question) -> Result<Answer> {
        Ok(match question {
            Question::Start { .. } => Answer::Started { peer: self.node.peer() },
            Question::Grant { round, writer, single } => {
                if self.granted.is_some() && !self.settle() {
                    bail!("the round before did not arrive whole");
                }
                let layout = Layout::of_round(self.seed, *round, self.node.view.blocks(), self.blocks);
                let layout = match *single {
                    Some((count, distinct)) => layout.repeated(count, distinct),
                    None => layout,
                };
                self.node
                    .book
                    .grant(Epoch(1 + round), *writer, layout.destination.clone());
                self.granted = Some(layout);
                Answer::Granted
            }
            Question::Cpu => Answer::Cpu {
                seconds: cpu_of_process(),
            },
            Question::Verify => {
                let layout = self.granted.as_ref().context("nothing was granted")?;
                let ok = self.settle() && self.pool.holds(self.seed, layout);
                Answer::Verified { ok }
            }
            Question::Digest => {
                let layout = self.granted.as_ref().context("nothing was granted")?;
                let begun = Instant::now();
                let value = self.pool.digest(&layout.destination);
                let seconds = begun.elapsed().as_secs_f64();
                Answer::Digest { value, seconds }
            }
        })
    }

    pub async fn stop(self) {
        self.node.transport.shutdown().await;
    }
}

/// The target process: until its input ends.
pub fn serve(options: &Options, runtime: &Runtime) -> Result<()> {
    let cases = options.cases()?;
    let mut receiver: Option<Receiver> = None;
    let mut out = std::io::stdout().lock();
    for line in std::io::stdin().lock().lines() {
        let question: Question = serde_json::from_str(&line?)?;
        if let (Question::Start { case }, None) = (&question, &receiver) {
            let case = cases.get(*case).context("no such case")?;
            receiver = Some(runtime.block_on(Receiver::start(options, case))?);
        }
        let answer = receiver.as_mut().context("not started")?.answer(&question)?;
        writeln!(out, "{}", serde_json::to_string(&answer)?)?;
        out.flush()?;
    }
    if let Some(receiver) = receiver {
        runtime.block_on(receiver.stop());
    }
    Ok(())
}

/// The target as the initiator sees it.
pub enum Target {
    /// Both ends in this process.
    Here(Box<Receiver>),
    Process {
        child: Child,
        input: ChildStdin,
        output: BufReader<ChildStdout>,
    },
}

impl Target {
    /// Starts this program again.
    pub fn spawn() -> Result<Self> {
        let mut child = Command::new(std::env::current_exe()?)
            .args(Options::of_target())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("the target process cannot be started")?;
        let input = child.stdin.take().context("the target has no input")?;
        let output = BufReader::new(child.stdout.take().context("the target has no output")?);
        Ok(Self::Process { child, input, output })
    }

    pub fn ask(&mut self, question: &Question) -> Result<Answer> {
        match self {
            Self::Here(receiver) => receiver.answer(question),
            Self::Process { input, output, .. } => {
                writeln!(input, "{}", serde_json::to_string(question)?)?;
                input.flush()?;
                let mut line = String::new();
                if output.read_line(&mut line)? == 0 {
                    bail!("the target died");
                }
                Ok(serde_json::from_str(&line)?)
            }
        }
    }

    pub fn start(&mut self, case: usize) -> Result<Peer> {
        match self.ask(&Question::Start { case })? {
            Answer::Started { peer } => Ok(peer),
            _ => bail!("the target answered another question"),
        }
    }

    /// CPU seconds of the target's process; none of its own where it has none.
    pub fn cpu(&mut self) -> Result<f64> {
        if let Self::Here(_) = self {
            return Ok(0.0);
        }
        match self.ask(&Question::Cpu)? {
            Answer::Cpu { seconds } => Ok(seconds),
            _ => bail!("the target answered another question"),
        }
    }

    pub fn verify(&mut self) -> Result<bool> {
        match self.ask(&Question::Verify)? {
            Answer::Verified { ok } => Ok(ok),
            _ => bail!("the target answered another question"),
        }
    }

    pub fn digest(&mut self) -> Result<(u64, f64)> {
        match self.ask(&Question::Digest)? {
            Answer::Digest { value, seconds } => Ok((value, seconds)),
            _ => bail!("the target answered another question"),
        }
    }

    /// Ends it; kills it where it does not end by itself.
    pub fn stop(self, runtime: &Runtime) -> Result<()> {
        match self {
            Self::Here(receiver) => runtime.block_on(receiver.stop()),
            Self::Process { mut child, input, .. } => {
                drop(input);
                let until = Instant::now() + Duration::from_secs(10);
                while child.try_wait()?.is_none() {
                    if Instant::now() > until {
                        child.kill()?;
                    }
                    std::thread::sleep(Duration::from_millis(5));
                }
            }
        }
        Ok(())
    }
}
