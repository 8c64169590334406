//! The loop: the next event happens, until there is none.

use super::cluster::{Cluster, HEARTBEAT};
use super::engine::Engine;
use super::event::{Event, Events};
use super::life::{Life, Order};
use super::look::Looked;
use super::options::{SimError, SimOptions};
use super::outcome::{Fate, NodeUse, Outcome, Served};
use super::record::Record;
use super::request::Journey;
use crate::Nanos;
use crate::slo::Metric;
use crate::workload::Workload;
use baton_scheduling::{BlockIndex, FairQueue, Fleet, FleetNode, HandoverTimes, Load, NodeView, Side, StepModel};
use baton_types::Instance;
use std::sync::Arc;

/// As the coordinator's `--default-timeout` has it. Requests are ordered by it, not ended.
pub(super) const BUDGET: Nanos = Nanos(120_000_000_000);
/// As the coordinator's `--index-locations-max` has it.
const LOCATIONS_MAX: usize = 2_000_000;
/// As the coordinator bounds pairs of nodes.
const PAIRS_MAX: usize = 4096;
/// Heartbeats with nothing between them: so long nothing takes.
const BEATS_MAX: u32 = 100_000;
/// As a decode node's `--running` has it.
pub(super) const DECODE_RUNNING_MAX: usize = 256;

/// Simulates a workload on a cluster.
///
/// # Errors
/// Where a node would do what its profile does not cover; nothing is extrapolated.
pub fn simulate(workload: &Workload, options: &SimOptions) -> Result<Outcome, SimError> {
    run(workload, options, None)
}

/// Looks at the cluster and gives orders.
pub type Director<'a> = dyn FnMut(&Looked<'_>) -> Vec<Order> + 'a;

/// Simulates a workload on a cluster that `director` looks at every so often.
///
/// # Errors
/// As [`simulate`].
pub fn simulate_directed(
    workload: &Workload,
    options: &SimOptions,
    every: Nanos,
    director: &mut Director<'_>,
) -> Result<Outcome, SimError> {
    run(workload, options, Some((every.max(HEARTBEAT), director)))
}

fn run(
    workload: &Workload,
    options: &SimOptions,
    mut director: Option<(Nanos, &mut Director<'_>)>,
) -> Result<Outcome, SimError> {
    let mut cluster = cluster(workload, options)?;
    if let Some(first) = workload.requests().first() {
        cluster.events.at(first.at, Event::Arrival(0));
        cluster.events.at(first.at, Event::Heartbeat);
        if let Some((every, _)) = &director {
            cluster.events.at(first.at + *every, Event::Look);
        }
    }
    for (index, (at, _)) in options.orders.iter().enumerate() {
        cluster.events.at(*at, Event::Ordered(index as u32));
    }
    let (mut events, mut given_up) = (0, false);
    let mut beats = 0;
    while let Some(event) = cluster.events.next() {
        events += 1;
        beats = match event {
            Event::Heartbeat | Event::Look => beats + 1,
            _ => 0,
        };
        if beats > BEATS_MAX {
            return Err(SimError::Stalled { open: cluster.open });
        }
        let directed = match (event, &mut director) {
            (Event::Look, Some((every, director))) => look(&mut cluster, *every, *director),
            _ => Ok(()),
        };
        let happened = directed
            .and_then(|()| happen(&mut cluster, event))
            .and_then(|()| cluster.place_waiting())
            .and_then(|()| {
                if options.neighbours {
                    cluster.meet_neighbours()
                } else {
                    Ok(())
                }
            });
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

/// More can come, or there is something to do.
fn goes_on(cluster: &Cluster<'_>) -> bool {
    let last = cluster.workload.requests().last().map_or(Nanos::ZERO, |last| last.at);
    cluster.open > 0 || cluster.events.now < last
}

fn look(
    cluster: &mut Cluster<'_>,
    every: Nanos,
    director: &mut Director<'_>,
) -> Result<(), crate::profile::OutOfRange> {
    if !goes_on(cluster) {
        return Ok(());
    }
    let now = cluster.events.now;
    let arrived = cluster.workload.requests().partition_point(|request| request.at <= now);
    let orders = director(&Looked::new(cluster, arrived));
    cluster.events.at(now + every, Event::Look);
    orders.into_iter().try_for_each(|order| cluster.order(order))
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
        Event::HandedOver { request, attempt } => cluster.handed_over(request, attempt),
        Event::Moved { request, attempt } => cluster.moved(request, attempt),
        Event::Ordered(index) => cluster.order(cluster.options.orders[index as usize].1),
        Event::Ready { node, life } => {
            cluster.ready(node, life);
            Ok(())
        }
        Event::Look => Ok(()),
        Event::Heartbeat => {
            cluster.heartbeat();
            // Where nothing happens any more, nodes need not say so.
            if goes_on(cluster) {
                let next = cluster.events.now + HEARTBEAT;
                cluster.events.at(next, Event::Heartbeat);
            }
            cluster.drains()
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
    let nodes = options.prefill.iter().chain(&options.decode).chain(&options.spare);
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
        places: vec![None; engines.len()],
        lives: Vec::new(),
        again: Vec::new(),
        given: Vec::new(),
        speeds: engines.iter().map(|_| StepModel::default()).collect(),
        index: BlockIndex::new(LOCATIONS_MAX),
        line: FairQueue::default(),
        head: None,
        turns: 0,
        failed: None,
        engines,
    };
    if options.frames {
        cluster.record.tokens.keep(cluster.engines.len(), requests);
    }
    for node in 0..cluster.engines.len() {
        let side = if node < options.prefill.len() {
            Side::Prefill
        } else {
            Side::Decode
        };
        let there = node < options.prefill.len() + options.decode.len();
        cluster.lives.push(Life::new(side, there));
        if there {
            seat(&mut cluster, node);
        }
    }
    if let Some((_, wrong)) = options
        .orders
        .iter()
        .find(|(_, order)| order.node() >= cluster.engines.len())
    {
        return Err(SimError::NoSuchNode {
            node: wrong.node(),
            nodes: cluster.engines.len(),
        });
    }
    Ok(cluster)
}

/// The node takes work from now on.
pub(super) fn seat(cluster: &mut Cluster<'_>, node: usize) {
    let side = cluster.lives[node].side;
    let engine = &cluster.engines[node];
    let reported = cluster.reported(node);
    let placed = Arc::clone(&cluster.placed[node]);
    let view = NodeView {
        instance: Instance(node as u64 + 1),
        queued_requests: 0,
        queue_capacity: engine.model.queue_max,
        queued_tokens: 0,
        running_requests: 0,
        times: cluster.speeds[node].times(),
        blocks: reported.blocks,
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
    cluster.places[node] = Some(place);
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
            fate: journey.fate,
            retries: journey.attempt,
        }
    };
    let ended = cluster
        .record
        .seen
        .iter()
        .map(|seen| seen.last)
        .max()
        .unwrap_or_default();
    // A node may still compute for requests that fail.
    let busy = |engine: &Engine| (engine.busy[0] + engine.busy[1]).seconds();
    let time = cluster
        .engines
        .iter()
        .map(busy)
        .fold(ended.seconds().max(1e-9), f64::max);
    let until = ended.max(workload.requests().last().map_or(Nanos::ZERO, |last| last.at));
    let used = |(engine, life): (&Engine, &Life)| NodeUse {
        prefilling: engine.busy[0].seconds() / time,
        decoding: engine.busy[1].seconds() / time,
        kv_peak: f64::from(engine.blocks_peak) / f64::from(engine.pool.total().max(1)),
        preemptions: engine.preemptions,
        handed_on: engine.handed_on,
        paid: life.paid(until).min(until),
    };
    let mut outcome = Outcome {
        requests: workload.requests().iter().enumerate().map(served).collect(),
        itl: cluster.record.itl.clone(),
        late_gaps: cluster.record.late_gaps,
        nodes: cluster.engines.iter().zip(&cluster.lives).map(used).collect(),
        prefill_nodes: cluster.options.prefill.len(),
        span: workload.duration(),
        ended,
        events,
        tokens_computed: cluster.tokens_computed,
        given_up,
        orders: cluster.given.clone(),
    };
    if cluster.options.frames {
        super::frames::reframe(&mut outcome, cluster);
    }
    outcome.judge(&cluster.options.slo);
    outcome
}
