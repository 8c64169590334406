//! `baton up`: a cluster on this machine, each role a process of its own, until Ctrl-C.

use super::signals::{INTERRUPTED, Signals, unless_interrupted};
use crate::cluster::{Cluster, ClusterOptions, Shape};
use crate::endpoint::Note;
use anyhow::{Context, Result};
use baton_coordinator::ControlMode;
use baton_node_runtime::{ConfigOptions, Supervisor, exit_with_parent, parse_bytes};
use baton_planner::slo::Slo;
use rustix::thread::{CpuSet, sched_getaffinity};
use serde_json::json;
use std::io::Write;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;

/// Runs a cluster on this machine until Ctrl-C.
#[derive(Debug, clap::Args)]
pub struct Up {
    #[command(flatten)]
    shape: Shape,
    /// KV memory of all nodes together, shared out evenly [default: half of the memory available, at most 1 GiB a node]
    #[arg(long, value_name = "BYTES", value_parser = parse_bytes)]
    kv_bytes: Option<u64>,
    /// Compute threads of each node; 0 takes all cores [default: the cores shared out evenly]
    #[arg(long, value_name = "N")]
    threads: Option<usize>,
    /// Each compute thread stays on a CPU of its own, for machines where nothing else computes
    #[arg(long)]
    pin: bool,
    /// Passed to every node, such as --node-flag=--speculation=off (see `baton node --help`); may be given several times
    #[arg(long, value_name = "FLAG")]
    node_flag: Vec<String>,
    /// Where membership lives: embedded in the coordinator, or etcd://HOST:PORT[,HOST:PORT...]; where that is guarded,
    /// BATON_ETCD_USER, BATON_ETCD_CA, BATON_ETCD_CERT and BATON_ETCD_KEY reach all processes
    #[arg(long, value_name = "STORE", default_value = "embedded")]
    store: String,
    /// The cluster's name in the store
    #[arg(long, value_name = "NAME", default_value = "default")]
    cluster: String,
    /// OpenAI-compatible HTTP; port 0 takes any free one
    #[arg(long, value_name = "HOST:PORT", default_value = "127.0.0.1:8000")]
    http_listen: SocketAddr,
    /// gRPC; port 0 takes any free one
    #[arg(long, value_name = "HOST:PORT", default_value = crate::endpoint::DEFAULT_GRPC)]
    grpc_listen: SocketAddr,
    /// The coordinator's controller: off, advise or apply (see `baton coordinator --help` and `baton status --advise`)
    #[arg(long, value_enum, value_name = "MODE", default_value_t = ControlMode::Off, help_heading = "Controller")]
    control: ControlMode,
    /// What clients were promised, such as ttft_p90=2s,itl_p99=50ms; needed unless it is off
    #[arg(long, value_name = "SLO", help_heading = "Controller")]
    control_slo: Option<Slo>,
    /// The nodes' profile (JSON, from `baton profile`), with which changes are rehearsed; needed by apply
    #[arg(long, value_name = "FILE", help_heading = "Controller")]
    control_profile: Option<PathBuf>,
    /// Prints one line of JSON when the cluster serves, instead of the text for people
    #[arg(long)]
    json: bool,
    /// What the processes log: a level, or directives such as `info,baton_kv_transfer=debug`
    #[arg(long, value_name = "FILTER", default_value = "info", help_heading = "Process")]
    log_filter: String,
    /// Ends the cluster when standard input ends
    #[arg(long, help_heading = "Process")]
    exit_with_parent: bool,
    #[command(flatten)]
    config: ConfigOptions,
}

/// CPUs on which this process may run.
fn allowed_cpus() -> Result<Vec<usize>> {
    let allowed = sched_getaffinity(None).context("ask on which CPUs this process may run")?;
    Ok((0..CpuSet::MAX_CPU).filter(|cpu| allowed.is_set(*cpu)).collect())
}

impl Up {
    /// Runs until a signal, or until the cluster cannot go on.
    pub async fn run(self) -> Result<ExitCode> {
        let supervisor = Supervisor::new();
        if self.exit_with_parent {
            exit_with_parent(&supervisor);
        }
        let Some(started) = unless_interrupted(self.start(&supervisor)).await? else {
            return Ok(ExitCode::from(INTERRUPTED));
        };
        let mut cluster = started?;
        let mut signals = Signals::install()?;
        let note = Note::leave(cluster.doors().1);
        self.tell(&cluster);
        let parent_gone = supervisor.shutdown_token();
        let mut code = ExitCode::SUCCESS;
        loop {
            tokio::select! {
                name = signals.next() => {
                    eprintln!("baton: {name}: stopping (once more: at once)");
                    break;
                }
                () = parent_gone.cancelled() => break,
                ended = cluster.next_end() => {
                    eprintln!("baton: {}", ended.report);
                    if ended.fatal {
                        eprintln!("baton: the cluster cannot go on without it: stopping");
                        code = ExitCode::FAILURE;
                        break;
                    }
                    eprintln!("baton: the cluster goes on without it");
                }
            }
        }
        drop(note);
        tokio::select! {
            stopped = cluster.stop() => stopped?,
            // The children are killed as their handles go.
            _ = signals.next() => return Ok(ExitCode::from(INTERRUPTED)),
        }
        Ok(code)
    }

    async fn start(&self, supervisor: &Supervisor) -> Result<Cluster> {
        let model = self.shape.model.resolve().await?;
        let options = ClusterOptions {
            shape: self.shape.clone(),
            model,
            kv_bytes: self.kv_bytes,
            threads: self.threads,
            cpus: if self.pin { allowed_cpus()? } else { Vec::new() },
            store: self.store.clone(),
            name: self.cluster.clone(),
            http_listen: self.http_listen,
            grpc_listen: self.grpc_listen,
            coordinator_flags: self.control_flags(),
            node_flags: self.node_flag.clone(),
            log_filter: self.log_filter.clone(),
            show_logs: true,
        };
        Cluster::start(&options, supervisor).await
    }

    fn control_flags(&self) -> Vec<String> {
        let mut flags = vec!["--control".to_owned(), self.control.to_string()];
        if let Some(slo) = &self.control_slo {
            flags.extend(["--control-slo".to_owned(), slo.to_string()]);
        }
        if let Some(path) = &self.control_profile {
            flags.extend(["--control-profile".to_owned(), path.display().to_string()]);
        }
        flags
    }

    fn tell(&self, cluster: &Cluster) {
        let text = if self.json {
            ready_line(cluster)
        } else {
            ready_text(cluster)
        };
        // Nobody may be listening, which is no reason to stop.
        let _ = writeln!(std::io::stdout(), "{text}");
    }
}

fn ready_line(cluster: &Cluster) -> String {
    let ((http, grpc), model) = (cluster.doors(), cluster.model());
    json!({
        "event": "ready", "http": http, "grpc": grpc, "model": model.id, "stub": model.stub, "pids": cluster.pids(),
    })
    .to_string()
}

fn ready_text(cluster: &Cluster) -> String {
    let ((http, grpc), model) = (cluster.doors(), cluster.model());
    let stub = if model.stub {
        " (a stub: scripted tokens, no model)"
    } else {
        ""
    };
    let processes = cluster.announcements().iter().map(|(name, announcement)| {
        let admin = announcement.admin.as_deref().unwrap_or("none");
        format!(
            "  {name:<13} pid {}, metrics http://{admin}/metrics\n",
            announcement.pid
        )
    });
    let body = json!({
        "model": model.id, "max_tokens": 64, "messages": [{"role": "user", "content": "Why is the sky blue?"}],
    });
    format!(
        "\nServing {}{stub}, contexts of up to {} tokens\n
  OpenAI HTTP   http://{http}/v1
  gRPC          {grpc}
{}
Try

  curl http://{http}/v1/chat/completions -H 'content-type: application/json' \\
    -d '{body}'
  baton chat
  baton status

Ctrl-C stops it.
",
        model.id,
        model.context_tokens,
        processes.collect::<String>()
    )
}
