//! The loop: the next event happens, until there is none.

use super::cluster::{Cluster, HEARTBEAT};
use super::engine::Engine;
use super::event::{Event, Events};
use super::options::{SimError, SimOptions};
use super::outcome::{Fate, NodeUse, Outcome, Served};
use super::record::Record;
use super::request::Journey;
use crate::Nanos;
use crate::slo::Metric;
use crate::workload::Workload;
use baton_scheduling::{
    BlockIndex, FairQueue, Fleet, FleetNode, HandoverTimes, Load, NodeView, Reported, Side, StepModel,
};
use baton_types::Instance;
use std::sync::Arc;

/// As the coordinator's `--default-timeout` has it. Requests are ordered by it, not ended.
const BUDGET: Nanos = Nanos(120_000_000_000);
/// As the coordinator's `--index-locations-max` has it.
const LOCATIONS_MAX: usize = 2_000_000;
/// As the coordinator bounds pairs of nodes.
const PAIRS_MAX: usize = 4096;
/// Heartbeats with nothing between them: so long nothing takes.
const BEATS_MAX: u32 = 100_000;
/// As a decode node's `--running` has it.
const DECODE_RUNNING_MAX: usize = 256;

/// Simulates a workload on a cluster.
///
/// # Errors
/// Where a node would do what its profile does not cover; nothing is extrapolated.
pub fn simulate(workload: &Workload, options: &SimOptions) -> Result<Outcome, SimError> {
    let mut cluster = cluster(workload, options)?;
    if let Some(first) = workload.requests().first() {
        cluster.events.at(first.at, Event::Arrival(0));
        cluster.events.at(first.at, Event::Heartbeat);
    }
    let (mut events, mut given_up) = (0, false);
    let mut beats = 0;
    while let Some(event) = cluster.events.next() {
        events += 1;
        beats = if event == Event::Heartbeat { beats + 1 } else { 0 };
        if beats > BEATS_MAX {
            return Err(SimError::Stalled { open: cluster.open });
        }
        let happened = happen(&mut cluster, event).and_then(|()| cluster.place_waiting());
        if let Err(source) = happened {
            let profile = cluster.failed.take().map_or_else(String::new, |(profile, _)| profile);
            return Err(SimError::OutOfRange { profile, source });
        }
        if options.give_up && is_lost(&cluster) {
            given_up = true;
            break;
        }
    }
    Ok(outcome(&cluster, events, given_up))
}

fn happen(cluster: &mut Cluster<'_>, event: Event) -> Result<(), crate::profile::OutOfRange> {
    match event {
        Event::Arrival(request) => {
            if let Some(next) = cluster.workload.requests().get(request as usize + 1) {
                cluster.events.at(next.at, Event::Arrival(request + 1));
            }
            cluster.arrives(request)
        }
        Event::StepEnds { node, generation } => cluster.step_ends(node, generation),
        Event::HandedOver(request) => cluster.handed_over(request),
        Event::Heartbeat => {
            cluster.heartbeat();
            // Where nothing happens any more, nodes need not say so.
            let last = cluster.workload.requests().last().map_or(Nanos::ZERO, |last| last.at);
            if cluster.open > 0 || cluster.events.now < last {
                let next = cluster.events.now + HEARTBEAT;
                cluster.events.at(next, Event::Heartbeat);
            }
            Ok(())
        }
    }
}

/// More is late already than may be in the end.
fn is_lost(cluster: &Cluster<'_>) -> bool {
    let requests = cluster.workload.requests();
    let over = |late: u64, of: u64, share: f64| late as f64 > (1.0 - share) * of as f64 + 1e-9;
    let slo = &cluster.options.slo;
    let firsts = slo.on(Metric::Ttft);
    let gaps = slo.on(Metric::Itl);
    firsts.is_some_and(|clause| over(cluster.record.late_firsts, requests.len() as u64, clause.share()))
        || gaps.is_some_and(|clause| over(cluster.record.late_gaps, cluster.gaps, clause.share()))
}

fn cluster<'a>(workload: &'a Workload, options: &'a SimOptions) -> Result<Cluster<'a>, SimError> {
    if options.decode.is_empty() {
        return Err(SimError::NoDecodeNode);
    }
    let nodes = options.prefill.iter().chain(&options.decode);
    let trace = workload.block_tokens().filter(|_| options.prefix_cache);
    let mut engines = Vec::new();
    for (index, model) in nodes.enumerate() {
        let per_prefix = match trace {
            Some(trace) if trace.is_multiple_of(model.block_tokens) => trace / model.block_tokens,
            Some(trace) => {
                return Err(SimError::BlockTokens {
                    trace,
                    node: model.block_tokens,
                });
            }
            None => 1,
        };
        let running_max = if index < options.prefill.len() {
            model.prefill_running_max as usize
        } else {
            DECODE_RUNNING_MAX
        };
        engines.push(Engine::new(model, per_prefix, running_max));
    }
    let overhead = Nanos::from_seconds(engines[0].model.request_overhead_s);
    let requests = workload.len();
    let mut cluster = Cluster {
        workload,
        options,
        events: Events::default(),
        record: Record::new(workload, &options.slo, BUDGET, overhead),
        journeys: (0..requests).map(|_| Journey::default()).collect(),
        placed: engines.iter().map(|_| Arc::default()).collect(),
        handovers: HandoverTimes::new(PAIRS_MAX),
        effects: Vec::new(),
        asked: 0,
        changed: false,
        open: 0,
        tokens_computed: 0,
        gaps: workload.requests().iter().map(|r| u64::from(r.output) - 1).sum(),
        fleet: Fleet::default(),
        places: Vec::new(),
        speeds: engines.iter().map(|_| StepModel::default()).collect(),
        index: BlockIndex::new(LOCATIONS_MAX),
        line: FairQueue::default(),
        head: None,
        turns: 0,
        failed: None,
        engines,
    };
    for node in 0..cluster.engines.len() {
        let side = if node < options.prefill.len() {
            Side::Prefill
        } else {
            Side::Decode
        };
        add(&mut cluster, node, side);
    }
    Ok(cluster)
}

fn add(cluster: &mut Cluster<'_>, node: usize, side: Side) {
    let engine = &cluster.engines[node];
    let blocks = cluster.blocks(engine);
    let reported = Reported {
        blocks,
        ..Reported::default()
    };
    let placed = Arc::clone(&cluster.placed[node]);
    let view = NodeView {
        instance: Instance(node as u64 + 1),
        queued_requests: 0,
        queue_capacity: engine.model.queue_max,
        queued_tokens: 0,
        running_requests: 0,
        times: StepModel::default().times(),
        blocks,
        block_tokens: cluster.view_tokens(engine),
        held_tokens: 0,
    };
    let load = Load::new(reported, placed.figures());
    let place = cluster.fleet.add(
        side,
        FleetNode {
            view,
            load,
            placed,
            full: false,
        },
    );
    cluster.places.push(place);
}

fn outcome(cluster: &Cluster<'_>, events: u64, given_up: bool) -> Outcome {
    let workload = cluster.workload;
    let overhead = Nanos::from_seconds(cluster.engines[0].model.request_overhead_s);
    let served = |(index, request): (usize, &crate::workload::Request)| {
        let (seen, journey) = (&cluster.record.seen[index], &cluster.journeys[index]);
        let done = journey.fate == Some(Fate::Served);
        Served {
            at: request.at,
            ttft: seen.first.filter(|_| done || given_up),
            e2e: done.then(|| seen.last - request.at + overhead),
            tokens: seen.drawn,
            late_gaps: seen.late,
            local: journey.prefill.is_none(),
            good: false,
        }
    };
    let ended = cluster
        .record
        .seen
        .iter()
        .map(|seen| seen.last)
        .max()
        .unwrap_or_default();
    let time = ended.seconds().max(1e-9);
    let used = |engine: &Engine| NodeUse {
        prefilling: engine.busy[0].seconds() / time,
        decoding: engine.busy[1].seconds() / time,
        kv_peak: f64::from(engine.blocks_peak) / f64::from(engine.pool.total().max(1)),
        preemptions: engine.preemptions,
    };
    let mut outcome = Outcome {
        requests: workload.requests().iter().enumerate().map(served).collect(),
        itl: cluster.record.itl.clone(),
        late_gaps: cluster.record.late_gaps,
        nodes: cluster.engines.iter().map(used).collect(),
        prefill_nodes: cluster.options.prefill.len(),
        span: workload.duration(),
        ended,
        events,
        tokens_computed: cluster.tokens_computed,
        given_up,
    };
    outcome.judge(&cluster.options.slo);
    outcome
}
