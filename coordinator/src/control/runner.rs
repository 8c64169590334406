//! The loop: looks, rehearses on a thread of its own, publishes, and changes roles where it may.
//!
//! Only the coordinator that leads looks; the others keep their records, and take over with them. Before anything is
//! changed the intent is published by a txn that fails where the lead has passed on.

use super::advice::{counts, describe, fill, kind, ready, show};
use super::nodes::Nodes;
use super::target::{Shown, Target};
use super::{ControlMode, ControlPlan, Shared};
use crate::driver::Coordinator;
use baton_cluster_state::{AdviceRecord, Candidacy, DecidedRecord, NodeCounts, Standing, Store};
use baton_node_runtime::{CancellationToken, Clock, Supervisor};
use baton_planner::Nanos;
use baton_planner::control::{Advice, Change, Controller, Hold, Observation};
use baton_proto::v1;
use baton_scheduling::Side;
use std::panic::AssertUnwindSafe;
use std::sync::{Arc, PoisonError};
use tokio::sync::oneshot;

/// Where more of the decode nodes' requests than this are of other coordinators, this one does not know the load.
const FOREIGN_MAX: f64 = 0.2;

/// What the loop works with.
pub(super) struct Runner {
    pub(super) plan: ControlPlan,
    pub(super) coordinator: Coordinator,
    pub(super) store: Store,
    pub(super) candidacy: Candidacy,
    pub(super) shared: Arc<Shared>,
    pub(super) clock: Clock,
    pub(super) supervisor: Supervisor,
    pub(super) state: State,
}

/// What it carries from look to look.
#[derive(Default)]
pub(super) struct State {
    nodes: Nodes,
    target: Target,
    controller: Option<Controller>,
    /// The term in which this coordinator leads, and since when.
    term: Option<(i64, Nanos)>,
    last: Option<DecidedRecord>,
    /// What was logged last.
    told: String,
}

impl Runner {
    pub(super) async fn run(mut self, shutdown: CancellationToken) {
        describe();
        loop {
            let (clock, every) = (self.clock, self.plan.every);
            tokio::select! {
                biased;
                () = shutdown.cancelled() => break,
                () = self.candidacy.changed() => {}
                () = clock.sleep(every) => {}
            }
            tokio::select! {
                biased;
                () = shutdown.cancelled() => break,
                () = self.turn() => {}
            }
        }
        self.candidacy.resign().await;
    }

    async fn turn(&mut self) {
        let standing = self.candidacy.standing();
        *self.shared.standing.lock().unwrap_or_else(PoisonError::into_inner) = standing;
        let leads = matches!(standing, Standing::Leads { .. });
        metrics::gauge!("baton_control_leads").set(f64::from(u8::from(leads)));
        match standing {
            Standing::Leads { term } => self.lead(term).await,
            Standing::Follows(_) | Standing::Unknown => {
                (self.state.term, self.state.controller) = (None, None);
                // Nodes are followed all the time: a new leader knows who has been ready for how long.
                if let Ok(model) = self.model() {
                    let (members, now) = (self.coordinator.members().status(), self.now());
                    self.state.nodes.look(&members, &model, now);
                }
                match self.store.advice().await {
                    Ok(Some(advice)) => show(&advice),
                    Ok(None) => {}
                    Err(error) => tracing::debug!(%error, "no word on the leader's advice"),
                }
            }
        }
    }

    fn now(&self) -> Nanos {
        self.coordinator.record().nanos(self.clock.now())
    }

    /// The model whose nodes it looks at, or why there is none.
    fn model(&self) -> Result<String, String> {
        let served: Vec<String> = self
            .coordinator
            .members()
            .served()
            .into_iter()
            .map(|model| model.id)
            .collect();
        let wanted = self.plan.model.as_ref();
        match (wanted, served.as_slice()) {
            (Some(wanted), _) if served.contains(wanted) => Ok(wanted.clone()),
            (Some(wanted), _) => Err(format!("no node serves {wanted} (--control-model)")),
            (None, [only]) => Ok(only.clone()),
            (None, []) => Err("no model is served: no decode node is ready".to_owned()),
            (None, several) => Err(format!(
                "several models are served ({}): name one with --control-model",
                several.join(", ")
            )),
        }
    }

    async fn lead(&mut self, term: i64) {
        if self.state.term.is_none_or(|(known, _)| known != term) {
            self.take_over(term).await;
        }
        let begun = self.clock.now();
        let mut record = self.empty_record();
        match self.model() {
            Ok(model) => self.look(term, model, &mut record).await,
            Err(why) => record.hold = Some(why),
        }
        metrics::histogram!("baton_control_look_seconds").record(self.clock.elapsed(begun));
        self.publish(term, record).await;
    }

    /// Begins to lead, where the one before left off.
    async fn take_over(&mut self, term: i64) {
        self.state.term = Some((term, self.now()));
        self.state.controller = None;
        match self.store.advice().await {
            Ok(Some(advice)) => {
                self.state.target.resume(advice.target);
                self.state.last = advice.last;
            }
            Ok(None) => {}
            Err(error) => tracing::warn!(%error, "the last leader's advice cannot be read"),
        }
    }

    fn empty_record(&self) -> AdviceRecord {
        AdviceRecord {
            leader: self.coordinator.instance(),
            mode: self.plan.mode.to_string(),
            unix_s: self.clock.unix_seconds(),
            model: String::new(),
            slo: self.plan.options.slo.to_string(),
            ready: NodeCounts::default(),
            // Where nothing can be seen, what was wanted is still wanted.
            target: self.state.target.counts(),
            requests: 0,
            judged: 0,
            attainment: None,
            reasons: Vec::new(),
            change: None,
            hold: None,
            rehearsed: Vec::new(),
            last: self.state.last.clone(),
        }
    }

    async fn look(&mut self, term: i64, model: String, record: &mut AdviceRecord) {
        let members = self.coordinator.members().status();
        let now = self.now();
        record.model.clone_from(&model);
        record.ready = ready(&members, &model);
        let block_tokens = self
            .coordinator
            .members()
            .model(&model)
            .map(|model| model.card.block_tokens);
        if let Some(misfit) = block_tokens.and_then(|tokens| self.plan.misfit(&model, tokens)) {
            record.hold = Some(misfit);
            return;
        }
        let (nodes, names) = self.state.nodes.look(&members, &model, now);
        let mut controller = match self.state.controller.take() {
            Some(controller) => controller,
            None => Controller::new(self.plan.options.clone()),
        };
        let (requests, at) = (self.coordinator.record().clone(), self.clock.now());
        let line = self.coordinator.queued() as usize;
        let (answer, wait) = oneshot::channel();
        let look = move || {
            let seen = requests.look(at, &model);
            let observation = Observation {
                now,
                nodes,
                line,
                past: seen.past,
                open: seen.open,
                chains: seen.chains,
                chain_tokens: block_tokens,
            };
            // A fault of the controller must not end a coordinator that serves.
            let looked = std::panic::catch_unwind(AssertUnwindSafe(|| controller.look(&observation)));
            // Nobody waits any more where the process ends.
            drop(
                answer
                    .send(looked.map(|advice| (controller, advice, observation.past.len(), observation.is_changing()))),
            );
        };
        self.supervisor.spawn_blocking("control-look", look);
        let Ok(Ok((controller, advice, requests, changing))) = wait.await else {
            tracing::error!("the controller's look failed, it begins anew");
            record.hold = Some("the look failed: see the coordinator's log".to_owned());
            return;
        };
        self.state.controller = Some(controller);
        record.requests = u32::try_from(requests).unwrap_or(u32::MAX);
        fill(record, &advice, &names);
        if let (Some((change, _)), None) = (&advice.change, &advice.hold) {
            self.decide(term, *change, &advice, record).await;
        }
        record.target = self.state.target.look(Shown {
            now,
            ready: record.ready,
            changing,
            fine: matches!(advice.hold, Some(Hold::Fine | Hold::NoGain)),
            patience: self.plan.options.cooldown,
        });
    }

    /// A change has been confirmed: it is done, or said, or held back for what the controller cannot know.
    async fn decide(&mut self, term: i64, change: Change, advice: &Advice, record: &mut AdviceRecord) {
        let Some(decided) = record.change.clone() else { return };
        let applies = self.plan.mode == ControlMode::Apply && matches!(change, Change::Role { .. });
        if let Some(why) = self.must_wait(applies, &decided.nodes, record) {
            record.hold = Some(why);
            if let Some(controller) = &mut self.state.controller {
                controller.not_done();
            }
            return;
        }
        self.state.target.decide(counts(advice.target));
        let tried = record.rehearsed.iter().find(|tried| tried.text == decided.text);
        let mut last = DecidedRecord {
            rehearsed: tried.cloned(),
            change: decided,
            outcome: "advised".to_owned(),
            unix_s: record.unix_s,
        };
        if applies {
            "is applied".clone_into(&mut last.outcome);
            (record.target, record.last) = (counts(advice.target), Some(last.clone()));
            last.outcome = match self.candidacy.publish(term, record).await {
                Ok(true) => self.apply(change, &last.change.nodes).await,
                Ok(false) => "failed: another coordinator leads now".to_owned(),
                Err(error) => format!("failed: {error}"),
            };
        }
        let outcome = match last.outcome.as_str() {
            "advised" => "advised",
            "applied" => "applied",
            _ => {
                // Nobody else makes that change either.
                self.state.target.decide(record.ready);
                "failed"
            }
        };
        metrics::counter!("baton_control_changes_total", "change" => kind(change), "outcome" => outcome).increment(1);
        record.last = Some(last.clone());
        self.state.last = Some(last);
    }

    /// Why a confirmed change is not followed now.
    fn must_wait(&self, applies: bool, picks: &[String], record: &AdviceRecord) -> Option<String> {
        let foreign = self.state.nodes.foreign();
        if foreign > FOREIGN_MAX {
            return Some(format!(
                "{:.0}% of the decode nodes' requests are of other coordinators, whose load this one does not see",
                foreign * 100.0
            ));
        }
        if !applies {
            return None;
        }
        let led = self
            .state
            .term
            .map_or(Nanos::ZERO, |(_, since)| self.now().saturating_sub(since));
        if led < self.plan.options.cooldown {
            let left = self.plan.options.cooldown.saturating_sub(led).seconds();
            return Some(format!("leads for a short time only: acts in {left:.0} s"));
        }
        // The rehearsal took its time: an operator may have changed the cluster meanwhile.
        let now = ready(&self.coordinator.members().status(), &record.model);
        if now != record.ready || picks.is_empty() {
            return Some("the nodes changed while it looked".to_owned());
        }
        None
    }

    /// Asks the nodes, as `baton role` does; gives what came of it.
    async fn apply(&self, change: Change, nodes: &[String]) -> String {
        let Change::Role { to, .. } = change else {
            return "advised".to_owned();
        };
        let role = match to {
            Side::Prefill => v1::NodeRole::Prefill,
            Side::Decode => v1::NodeRole::Decode,
        };
        for node_id in nodes {
            let request = v1::SetRoleRequest {
                node_id: node_id.clone(),
                role: role.into(),
                deadline_ms: u64::try_from(self.plan.options.drain.duration().as_millis()).ok(),
            };
            let asked = match self.coordinator.members().client(node_id) {
                Ok(mut client) => client
                    .set_role(request)
                    .await
                    .map_err(|status| status.message().to_owned()),
                Err(error) => Err(error.message),
            };
            if let Err(error) = asked {
                tracing::error!(node_id, error, "the controller could not change a node's role");
                return format!("failed: {node_id}: {error}");
            }
        }
        "applied".to_owned()
    }

    async fn publish(&mut self, term: i64, record: AdviceRecord) {
        show(&record);
        self.tell(&record);
        match self.candidacy.publish(term, &record).await {
            Ok(true) => {}
            Ok(false) => tracing::info!("another coordinator's controller leads now"),
            Err(error) => tracing::warn!(%error, "the controller's advice cannot be published"),
        }
        *self.shared.latest.lock().unwrap_or_else(PoisonError::into_inner) = Some(record);
    }

    /// Logs what is new.
    fn tell(&mut self, record: &AdviceRecord) {
        let change = record.change.as_ref().map_or("none", |change| change.text.as_str());
        let decided = record.last.as_ref().map_or("", |last| last.outcome.as_str());
        let told = format!(
            "{change}/{decided}/{}",
            record.change.is_some() && record.hold.is_none()
        );
        if told == self.state.told {
            return;
        }
        self.state.told = told;
        tracing::info!(
            change,
            hold = record.hold.as_deref().unwrap_or(""),
            reasons = record.reasons.join("; "),
            attainment = record.attainment,
            judged = record.judged,
            last = decided,
            "controller's advice"
        );
    }
}
