//! Finds nodes for requests. Those of one model that have never been placed wait in line, fairly among tenants; who has
//! the turn tries again whenever the load changes. A request whose nodes failed does not stand in line again.

use super::decisions::{Choice, Decisions};
use super::line::Line;
use crate::core::Placement;
use crate::membership::{Candidate, Claim, Listener, Members};
use crate::tenants::Tenant;
use crate::{ApiCode, ApiError};
use baton_node_runtime::{Clock, Moment};
use baton_scheduling::{Decision, Entry, Policy, RefuseReason, RouteRequest, Routed, Slo, route};
use baton_types::{BlockHash, Instance, NumericsId, RequestId};
use std::collections::HashMap;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// What is asked for.
#[derive(Debug, Clone)]
pub(super) struct PlaceRequest {
    pub(super) request_id: RequestId,
    pub(super) tenant: Arc<Tenant>,
    pub(super) arrived: Moment,
    pub(super) model: String,
    /// The context's full blocks, once for each arithmetic among the nodes; none while no node's blocks are known.
    pub(super) chains: Vec<Vec<BlockHash>>,
    pub(super) context_tokens: u32,
    pub(super) excluded: Vec<Instance>,
    pub(super) keep_decode: Option<Instance>,
    /// It stood in line before.
    pub(super) again: bool,
    /// The client has a token: no bound on times holds the request up, or ends it.
    pub(super) begun: bool,
}

/// A running sequence that wants another decode node.
#[derive(Debug, Clone)]
pub(super) struct MoveRequest {
    pub(super) model: String,
    /// Only a node of equal arithmetic can go on where another one is.
    pub(super) numerics: NumericsId,
    pub(super) context_tokens: u32,
    pub(super) excluded: Vec<Instance>,
}

/// How nodes are chosen, for all requests alike.
#[derive(Debug, Clone, Copy)]
pub(crate) struct RoutingOptions {
    pub(crate) policy: Policy,
    /// The bound on TTFT counts from a request's arrival.
    pub(crate) slo: Slo,
}

/// Nodes with places that are held for the request.
pub(super) struct Placed {
    pub(super) prefill: Option<(Candidate, Claim)>,
    pub(super) decode: (Candidate, Claim),
}

impl Placed {
    pub(super) fn placement(&self) -> Placement {
        let decode = self.decode.0.node.clone();
        match &self.prefill {
            Some((prefill, _)) => Placement::Pair {
                prefill: prefill.node.clone(),
                decode,
            },
            None => Placement::Alone { decode },
        }
    }
}

/// Why one try gave no nodes.
enum NotNow {
    Held,
    Refused(RefuseReason, Duration),
}

/// The lines. One per coordinator.
pub(super) struct Placer {
    members: Members,
    clock: Clock,
    routing: RoutingOptions,
    decisions: Decisions,
    /// Counts choices.
    turn: AtomicU64,
    lines: Mutex<HashMap<String, Arc<Line>>>,
    queued: Arc<AtomicU32>,
    pace: Mutex<Pace>,
    wait_per_place_us: AtomicU64,
}

/// When the last request left a line, to tell how fast it moves.
#[derive(Default)]
struct Pace {
    last: Option<Moment>,
}

/// Counts as waiting while it lives.
pub(super) struct Waiting(Arc<AtomicU32>);

impl Drop for Waiting {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
        metrics::gauge!("baton_coordinator_queued_requests").decrement(1);
    }
}

impl Placer {
    pub(super) fn new(members: Members, clock: Clock, routing: RoutingOptions, decisions: Decisions) -> Self {
        Self {
            members,
            clock,
            routing,
            decisions,
            turn: AtomicU64::new(1),
            lines: Mutex::default(),
            queued: Arc::default(),
            pace: Mutex::default(),
            wait_per_place_us: AtomicU64::new(0),
        }
    }

    /// Requests that wait for a place.
    pub(super) fn queued(&self) -> u32 {
        self.queued.load(Ordering::Relaxed)
    }

    /// How long a place takes to come free while there is a line; zero while none was seen.
    pub(super) fn wait_per_place(&self) -> Duration {
        Duration::from_micros(self.wait_per_place_us.load(Ordering::Relaxed))
    }

    /// Counts a request that has been let in as waiting.
    pub(super) fn enter(&self) -> Waiting {
        self.queued.fetch_add(1, Ordering::Relaxed);
        metrics::gauge!("baton_coordinator_queued_requests").increment(1);
        Waiting(Arc::clone(&self.queued))
    }

    /// Waits for nodes with places.
    ///
    /// # Errors
    /// Where waiting would not help.
    pub(super) async fn place(&self, request: PlaceRequest) -> Result<Placed, ApiError> {
        let line = self.line(&request.model);
        let _turn = if request.again {
            None
        } else {
            let who = Entry {
                tenant: request.tenant.index,
                weight: request.tenant.weight,
                priority: request.tenant.priority,
                tokens: request.context_tokens.into(),
                item: (),
            };
            Some(line.turn(who).await)
        };
        let mut changes = self.members.changes();
        let mut waited = false;
        loop {
            changes.mark_unchanged();
            match self.try_place(&request) {
                Ok(placed) => {
                    self.measure_pace(waited);
                    return Ok(placed);
                }
                Err(NotNow::Held) => {}
                // A node that failed elsewhere may be left alone just now; it is worth the moment.
                Err(NotNow::Refused(RefuseReason::NoDecodeNode, _))
                    if self.members.next_release(&request.model).is_some() && !request.again => {}
                Err(NotNow::Refused(reason, retry_after)) => return Err(refusal(reason, retry_after)),
            }
            waited = true;
            self.wait(&mut changes, &request.model).await;
        }
    }

    /// Waits until a decode node has room for a sequence that runs elsewhere. Nothing hurries: where none ever has, the sequence
    /// stays until its node gives it up.
    pub(super) async fn place_move(&self, request: MoveRequest) -> (Candidate, Claim) {
        let mut changes = self.members.changes();
        loop {
            changes.mark_unchanged();
            if let Some(placed) = self.try_place_move(&request) {
                return placed;
            }
            self.wait(&mut changes, &request.model).await;
        }
    }

    /// Waits until another try may end otherwise: something changed, or a node is no longer left alone.
    async fn wait(&self, changes: &mut Listener, model: &str) {
        let release = self.members.next_release(model);
        tokio::select! {
            biased;
            () = changes.changed() => {}
            () = async {
                match release {
                    Some(moment) => self.clock.sleep_until(moment).await,
                    None => std::future::pending().await,
                }
            } => {}
        }
    }

    /// Chooses as if the node had to prefill by itself: the least loaded one that has room, of those that are left.
    fn try_place_move(&self, request: &MoveRequest) -> Option<(Candidate, Claim)> {
        let mut excluded = request.excluded.clone();
        loop {
            let turn = self.turn.fetch_add(1, Ordering::Relaxed);
            let routed = self.members.route(&request.model, &[], |handovers, _, decode| {
                let asked = RouteRequest {
                    context_tokens: request.context_tokens,
                    excluded: &excluded,
                    keep_decode: None,
                    policy: self.routing.policy,
                    slo: Slo::default(),
                    turn,
                    handovers,
                };
                route(&asked, &[], decode)
            });
            let Decision::Place(chosen) = routed.decision else {
                return None;
            };
            match self.members.candidate(chosen.decode) {
                Some(candidate) if chosen.room && candidate.numerics == request.numerics => {
                    let claim = candidate.claim(0);
                    return Some((candidate, claim));
                }
                Some(_) | None => excluded.push(chosen.decode),
            }
        }
    }

    fn try_place(&self, request: &PlaceRequest) -> Result<Placed, NotNow> {
        let waited = self.clock.elapsed(request.arrived);
        let slo = if request.begun {
            Slo::default()
        } else {
            let ttft = self.routing.slo.ttft.map(|ttft| ttft.saturating_sub(waited));
            Slo {
                ttft,
                ..self.routing.slo
            }
        };
        let turn = self.turn.fetch_add(1, Ordering::Relaxed);
        let routed = self
            .members
            .route(&request.model, &request.chains, |handovers, prefill, decode| {
                let asked = RouteRequest {
                    context_tokens: request.context_tokens,
                    excluded: &request.excluded,
                    keep_decode: request.keep_decode,
                    policy: self.routing.policy,
                    slo,
                    turn,
                    handovers,
                };
                route(&asked, prefill, decode)
            });
        let decision = routed.decision.clone();
        self.note(request, waited, routed);
        match decision {
            Decision::Place(chosen) => {
                let hold = |instance, tokens: u32| {
                    let candidate = self.members.candidate(instance)?;
                    let claim = candidate.claim(tokens.into());
                    Some((candidate, claim))
                };
                let alone = if chosen.prefill.is_none() {
                    chosen.prefill_tokens
                } else {
                    0
                };
                let prefill = chosen.prefill.map(|instance| hold(instance, chosen.prefill_tokens));
                match (prefill, hold(chosen.decode, alone)) {
                    (None, Some(decode)) => Ok(Placed { prefill: None, decode }),
                    (Some(Some(prefill)), Some(decode)) => Ok(Placed {
                        prefill: Some(prefill),
                        decode,
                    }),
                    // One left this very moment, which is a change that wakes whoever waits.
                    _ => Err(NotNow::Held),
                }
            }
            Decision::Hold { reason } => {
                tracing::debug!(model = request.model, %reason, "request waits for a place");
                Err(NotNow::Held)
            }
            Decision::Refuse { reason, retry_after } => Err(NotNow::Refused(reason, retry_after)),
        }
    }

    fn note(&self, request: &PlaceRequest, waited: Duration, routed: Routed) {
        let nodes = routed
            .candidates
            .iter()
            .flat_map(|c| c.prefill.into_iter().chain([c.decode]));
        let choice = Choice {
            at_us: u64::try_from(waited.as_micros()).unwrap_or(u64::MAX),
            policy: self.routing.policy,
            context_tokens: request.context_tokens,
            names: self.members.names(nodes),
            routed,
        };
        self.decisions.chosen(request.request_id, choice);
    }

    fn line(&self, model: &str) -> Arc<Line> {
        let mut lines = self.lines.lock().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(lines.entry(model.to_owned()).or_default())
    }

    fn measure_pace(&self, waited: bool) {
        let now = self.clock.now();
        let mut pace = self.pace.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(last) = pace.last.filter(|_| waited) {
            let sample = u64::try_from(now.saturating_since(last).as_micros()).unwrap_or(u64::MAX);
            let before = self.wait_per_place_us.load(Ordering::Relaxed);
            let average = if before == 0 {
                sample
            } else {
                before - before / 8 + sample / 8
            };
            self.wait_per_place_us.store(average, Ordering::Relaxed);
        }
        pace.last = Some(now);
    }
}

fn refusal(reason: RefuseReason, retry_after: Duration) -> ApiError {
    match reason {
        RefuseReason::NoDecodeNode => ApiError::new(ApiCode::Unavailable, reason.to_string()).retry_after(retry_after),
        RefuseReason::TooLate { .. } => {
            ApiError::new(ApiCode::ResourceExhausted, reason.to_string()).retry_after(retry_after)
        }
        RefuseReason::TooLarge { .. } => ApiError::invalid("prompt", format!("the prompt is too long: {reason}")),
    }
}
