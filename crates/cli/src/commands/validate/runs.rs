//! The replays of one case, each on a cluster that was just started.

use super::super::profile::one_token_a_step;
use super::super::replay::offered;
use super::super::workload::check_fits;
use super::speed::{CHANGED, Speed};
use super::stored::Case;
use crate::cluster::{Cluster, ClusterOptions, Shape};
use crate::models::ModelSource;
use anyhow::{Result, ensure};
use baton_load::{BatonTarget, Planned, Prompt, Prompts, Summary, Target};
use baton_node_runtime::Supervisor;
use baton_planner::profile::Profile;
use baton_planner::slo::Slo;
use baton_planner::workload::Workload;
use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

/// Short requests before each replay: connections are made and caches warm.
const WARM_UP: u64 = 4;

/// What is replayed on what.
pub struct Runs<'a> {
    pub profile: &'a Profile,
    pub source: ModelSource,
    pub model: String,
    pub threads: usize,
    pub workload: &'a Workload,
    pub slo: &'a Slo,
}

impl Runs<'_> {
    fn cluster(&self, case: &Case) -> ClusterOptions {
        let any_port = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
        let nodes = case.division.prefill + case.division.decode;
        let kv = self.profile.kv_capacity_tokens * self.profile.model.kv_bytes_per_token;
        ClusterOptions {
            shape: Shape {
                prefill: case.division.prefill,
                decode: case.division.decode,
                model: self.source.clone(),
            },
            model: self.model.clone(),
            kv_bytes: Some(kv * nodes as u64),
            threads: Some(self.threads),
            cpus: Vec::new(),
            store: "embedded".to_owned(),
            name: "default".to_owned(),
            http_listen: any_port,
            grpc_listen: any_port,
            coordinator_flags: vec!["--routing-policy".to_owned(), case.division.policy().to_string()],
            node_flags: one_token_a_step(),
            log_filter: "warn".to_owned(),
            show_logs: false,
        }
    }

    /// One replay, and how fast the machine was before and after it; `number` makes its prompts other ones than those of the others.
    /// None where it was interrupted.
    pub async fn replay(&self, case: &Case, number: u64) -> Result<Option<(Summary, [Speed; 2])>> {
        let supervisor = Supervisor::new();
        let cluster = Cluster::start(&self.cluster(case), &supervisor).await?;
        let summary = self.against(&cluster, case, number).await;
        let stopped = cluster.stop().await;
        let summary = summary?;
        stopped?;
        Ok(summary)
    }

    async fn against(&self, cluster: &Cluster, case: &Case, number: u64) -> Result<Option<(Summary, [Speed; 2])>> {
        let target = Target::Baton(BatonTarget::over(cluster.channel(), cluster.doors().1, None).await?);
        let model = target.model();
        self.profile.check_model(&model.id)?;
        check_fits(self.workload, &model.id, model.context_tokens)?;
        let prompts = Prompts {
            salt: number,
            ..Prompts::default()
        };
        for name in 0..WARM_UP {
            let planned = Planned {
                at: Duration::ZERO,
                prompt: Prompt::Tokens(prompts.alone(1 << 32 | name, 200)),
                output: 8,
            };
            let warm = target.clone().send(planned, tokio::time::Instant::now()).await;
            ensure!(
                warm.is_served(),
                "a request before the replay failed: {:?}",
                warm.failure
            );
        }
        let before = Speed::measure(&target, self.profile, 2 * number).await?;
        let mut workload = self.workload.clone();
        workload.at_rate(case.rate)?;
        let what = format!("{} at {:.2} requests/s", case.division, case.rate);
        let run = offered(&target, prompts.schedule(&workload), &what).await?;
        if run.unfinished + run.unsent > 0 {
            return Ok(None);
        }
        let after = Speed::measure(&target, self.profile, 2 * number + 1).await?;
        for (when, speed) in [("before", before), ("after", after)] {
            if speed.is_changed() {
                eprintln!(
                    "baton: {when} this replay prompts took {:.2}x and steps {:.2}x of the profile's time: with more than {:.0}% the \
                     machine is not what was profiled; profile again on a quiet one",
                    speed.prompts,
                    speed.steps,
                    100.0 * CHANGED
                );
            }
        }
        Ok(Some((Summary::of(&run, Some(self.slo)), [before, after])))
    }
}
