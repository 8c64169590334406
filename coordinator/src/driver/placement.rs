//! Finds nodes for requests. Those of one model that have never been placed wait in line, in the order of their coming;
//! the first in line tries again whenever the load changes. A request whose nodes failed does not stand in line again.

use crate::core::Placement;
use crate::membership::{Candidate, Claim, Members};
use crate::{ApiCode, ApiError};
use baton_node_runtime::{Clock, Moment};
use baton_scheduling::{Decision, RefuseReason, RouteRequest, route};
use baton_types::{Instance, NodeRole};
use std::collections::HashMap;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// What is asked for.
#[derive(Debug, Clone)]
pub(super) struct PlaceRequest {
    pub(super) model: String,
    pub(super) context_tokens: u32,
    pub(super) excluded: Vec<Instance>,
    pub(super) keep_decode: Option<Instance>,
    /// It stood in line before.
    pub(super) again: bool,
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

/// The lines. One per coordinator.
pub(super) struct Placer {
    members: Members,
    clock: Clock,
    lines: Mutex<HashMap<String, Arc<tokio::sync::Mutex<()>>>>,
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
    pub(super) fn new(members: Members, clock: Clock) -> Self {
        Self {
            members,
            clock,
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
        let _turn = if request.again { None } else { Some(line.lock().await) };
        let mut changes = self.members.changes();
        let mut waited = false;
        loop {
            changes.mark_unchanged();
            match self.try_place(&request) {
                Ok(placed) => {
                    self.measure_pace(waited);
                    return Ok(placed);
                }
                Err((reason @ RefuseReason::QueuesFull { .. }, _)) => {
                    tracing::debug!(model = request.model, %reason, "request waits for a place");
                }
                // A node that failed elsewhere may be left alone just now; it is worth the moment.
                Err((RefuseReason::NoDecodeNode, _))
                    if self.members.next_release(&request.model).is_some() && !request.again => {}
                Err((reason, retry_after)) => return Err(refusal(reason, retry_after)),
            }
            waited = true;
            let release = self.members.next_release(&request.model);
            tokio::select! {
                _ = changes.changed() => {}
                () = async {
                    match release {
                        Some(moment) => self.clock.sleep_until(moment).await,
                        None => std::future::pending().await,
                    }
                } => {}
            }
        }
    }

    fn try_place(&self, request: &PlaceRequest) -> Result<Placed, (RefuseReason, Duration)> {
        let (prefill_views, prefill): (Vec<_>, Vec<_>) = self
            .members
            .candidates(&request.model, NodeRole::Prefill)
            .into_iter()
            .unzip();
        let (decode_views, decode): (Vec<_>, Vec<_>) = self
            .members
            .candidates(&request.model, NodeRole::Decode)
            .into_iter()
            .unzip();
        let asked = RouteRequest {
            context_tokens: request.context_tokens,
            excluded: &request.excluded,
            keep_decode: request.keep_decode,
        };
        let hold = |from: &[Candidate], instance: Instance| {
            let found = from
                .iter()
                .find(|candidate| candidate.node.instance == instance)
                .cloned();
            let candidate = found.expect("routing chooses among those it was given");
            let claim = candidate.claim(u64::from(request.context_tokens));
            (candidate, claim)
        };
        match route(&asked, &prefill_views, &decode_views) {
            Decision::Pair {
                prefill: p,
                decode: d,
                predicted,
            } => {
                tracing::trace!(?predicted, "placed on a pair");
                Ok(Placed {
                    prefill: Some(hold(&prefill, p)),
                    decode: hold(&decode, d),
                })
            }
            Decision::Alone { decode: d, predicted } => {
                tracing::trace!(?predicted, "placed alone");
                Ok(Placed {
                    prefill: None,
                    decode: hold(&decode, d),
                })
            }
            Decision::Refuse { reason, retry_after } => Err((reason, retry_after)),
        }
    }

    fn line(&self, model: &str) -> Arc<tokio::sync::Mutex<()>> {
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
        RefuseReason::QueuesFull { .. } => {
            ApiError::new(ApiCode::ResourceExhausted, reason.to_string()).retry_after(retry_after)
        }
        RefuseReason::TooLarge { .. } => ApiError::invalid("prompt", format!("the prompt is too long: {reason}")),
    }
}
