//! The coordinator's side: who is let in, whose turn it is, and which nodes serve a request: by the live code.

use super::engine::{Effect, Engine, Prefilled, Slot};
use super::event::{Event, Events};
use super::life::{Life, Order};
use super::options::SimOptions;
use super::outcome::Fate;
use super::record::Record;
use super::request::Journey;
use super::turn::Turn;
use crate::Nanos;
use crate::profile::{Neighbour, OutOfRange};
use crate::workload::Workload;
use baton_scheduling::{
    Admission, AdmissionLoad, BlockIndex, Candidate, Decision, Entry, FairQueue, Fleet, HandoverTimes, Held, Load,
    Place, Placed, Priority, Reported, RouteRequest, Slo as RouteSlo, StepModel, admit, route,
};
use baton_types::{BlockCounts, BlockHash, Instance};
use std::sync::Arc;

/// As the coordinator's `--heartbeat` has it.
pub(super) const HEARTBEAT: Nanos = Nanos(500_000_000);

pub(super) struct Cluster<'a> {
    pub workload: &'a Workload,
    pub options: &'a SimOptions,
    pub events: Events,
    pub record: Record,
    pub engines: Vec<Engine>,
    pub journeys: Vec<Journey>,
    pub placed: Vec<Arc<Placed>>,
    pub handovers: HandoverTimes,
    pub effects: Vec<Effect>,
    /// Reservations that were ever asked for.
    pub asked: u64,
    /// Something happened for which a request that is held may be tried again.
    pub changed: bool,
    pub open: u32,
    /// Gaps between tokens that there will be in all.
    pub gaps: u64,
    pub tokens_computed: u64,
    pub(super) fleet: Fleet,
    pub(super) places: Vec<Option<Place>>,
    pub(super) lives: Vec<Life>,
    /// Requests whose nodes were lost: they are tried before the line.
    pub(super) again: Vec<u32>,
    pub(super) given: Vec<(Nanos, Order)>,
    pub(super) speeds: Vec<StepModel>,
    pub(super) index: BlockIndex,
    pub(super) line: FairQueue<u32>,
    /// Who has the turn, and could not be placed yet.
    pub(super) head: Option<u32>,
    pub(super) turns: u64,
    /// The first error ends the simulation.
    pub failed: Option<(String, OutOfRange)>,
}

fn hash(id: u32) -> BlockHash {
    let mix = |salt: u64| {
        // Spreads ids over all numbers, as hashes are. Source: SplitMix64, Steele, Lea and Flood 2014.
        let mut z = (u64::from(id) + salt).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    };
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&mix(1).to_le_bytes());
    bytes[8..].copy_from_slice(&mix(1 << 40).to_le_bytes());
    BlockHash(bytes)
}

impl<'a> Cluster<'a> {
    pub fn chain(&self, request: u32, tokens: u32) -> &'a [u32] {
        let size = match self.workload.block_tokens() {
            Some(size) if self.options.prefix_cache => size,
            Some(_) | None => return &[],
        };
        let chain = self.workload.chain(&self.workload.requests()[request as usize]);
        &chain[..chain.len().min((tokens / size) as usize)]
    }

    pub(super) fn instance(node: u32) -> Instance {
        Instance(u64::from(node) + 1)
    }

    /// A request comes.
    pub fn arrives(&mut self, request: u32) -> Result<(), OutOfRange> {
        let queued = self.line.len() as u32 + u32::from(self.head.is_some());
        let load = AdmissionLoad {
            requests: self.open,
            queued,
            wait_per_place: std::time::Duration::ZERO,
        };
        if let Admission::Refuse { .. } = admit(&self.options.admission, &load) {
            self.record.late_firsts += 1;
            self.journeys[request as usize].fate = Some(Fate::Refused);
            return Ok(());
        }
        self.open += 1;
        self.line.push(Entry {
            tenant: 0,
            weight: 1,
            priority: Priority::Normal,
            tokens: self.workload.requests()[request as usize].input.into(),
            item: request,
        });
        self.changed = true;
        Ok(())
    }

    /// Tries whoever has the turn, as long as somebody is placed.
    pub fn place_waiting(&mut self) -> Result<(), OutOfRange> {
        while std::mem::take(&mut self.changed) {
            self.place_again()?;
            let Some(request) = self.head.take().or_else(|| self.line.pop()) else {
                return Ok(());
            };
            match self.choose(request, None) {
                Decision::Place(chosen) => {
                    self.changed = true;
                    self.place(request, &chosen)?;
                }
                Decision::Hold { .. } => self.head = Some(request),
                Decision::Refuse { .. } => {
                    self.changed = true;
                    self.refused(request);
                }
            }
        }
        Ok(())
    }

    pub(super) fn choose(&mut self, request: u32, keep_decode: Option<Instance>) -> Decision {
        let wanted = self.workload.requests()[request as usize];
        let waited = self.events.now - wanted.at;
        let mut slo = self.options.route_slo;
        slo.ttft = slo.ttft.map(|ttft| ttft.saturating_sub(waited.duration()));
        let drawn = self.record.drawn(request);
        if drawn > 0 {
            slo = RouteSlo::default();
        }
        let chain: Vec<BlockHash> = self.chain(request, wanted.input).iter().map(|id| hash(*id)).collect();
        let held = if chain.is_empty() {
            Held::default()
        } else {
            self.index.held(&chain)
        };
        self.turns += 1;
        let asked = RouteRequest {
            context_tokens: wanted.input + drawn,
            excluded: &[],
            keep_decode,
            policy: self.options.policy,
            slo,
            turn: self.turns,
            handovers: &self.handovers,
        };
        self.fleet
            .choose(&held, |prefill, decode| route(&asked, prefill, decode))
            .decision
    }

    pub(super) fn place(&mut self, request: u32, chosen: &Candidate) -> Result<(), OutOfRange> {
        let node = |instance: Instance| (instance.0 - 1) as u32;
        let wanted = self.workload.requests()[request as usize];
        let deadline = self.record.deadline(request);
        let decode = node(chosen.decode);
        let drawn = self.record.drawn(request);
        let (known, left) = (wanted.input + drawn, wanted.output - drawn);
        let mut slot = Slot::new(request, known, left, deadline);
        let prefill = chosen.prefill.map(node);
        slot.to_first = prefill.is_some();
        slot.granted = prefill.is_none();
        let journey = &mut self.journeys[request as usize];
        (journey.prefill, journey.decode, journey.claimed) = (prefill, decode, chosen.prefill_tokens);
        (journey.known, journey.left) = (known, left);
        (journey.placed, journey.at_prefill) = (true, prefill.is_some());
        let tokens = u64::from(chosen.prefill_tokens);
        let at = match prefill {
            Some(prefill) => {
                self.placed[prefill as usize].comes(tokens);
                self.placed[decode as usize].comes(0);
                prefill
            }
            None => {
                self.placed[decode as usize].comes(tokens);
                decode
            }
        };
        let engine = &mut self.engines[at as usize];
        engine.inbox.push(slot);
        engine.cut(self.events.now, &mut self.effects);
        self.apply(at)?;
        self.turn(at)
    }

    /// A node goes on, and what that does to others happens.
    pub fn turn(&mut self, node: u32) -> Result<(), OutOfRange> {
        self.with_turn(node, |engine, turn| engine.turn(turn))
    }

    /// A node's step is over.
    pub fn step_ends(&mut self, node: u32, generation: u64) -> Result<(), OutOfRange> {
        let current = self.engines[node as usize]
            .computing
            .as_ref()
            .map(|computing| computing.generation);
        if current != Some(generation) {
            return Ok(());
        }
        self.with_turn(node, |engine, turn| engine.finish(turn))?;
        self.turn(node)
    }

    pub(super) fn with_turn(
        &mut self,
        node: u32,
        act: impl FnOnce(&mut Engine, &mut Turn<'_>) -> Result<(), OutOfRange>,
    ) -> Result<(), OutOfRange> {
        self.record.tokens.at_node(node);
        let mut turn = Turn {
            now: self.events.now,
            workload: self.workload,
            prefix_cache: self.options.prefix_cache,
            record: &mut self.record,
            out: &mut self.effects,
        };
        let engine = &mut self.engines[node as usize];
        if let Err(error) = act(engine, &mut turn) {
            self.failed.get_or_insert((engine.model.name.clone(), error));
            return Err(error);
        }
        self.tell_blocks(node);
        self.apply(node)
    }

    /// Nodes of one machine: each hears what the others compute now.
    pub fn meet_neighbours(&mut self) -> Result<(), OutOfRange> {
        let computing: Vec<Neighbour> = self.engines.iter().map(Engine::as_neighbour).collect();
        for node in 0..self.engines.len() {
            let others = computing[..node].iter().chain(&computing[node + 1..]);
            let beside = others.copied().max().unwrap_or_default();
            let engine = &mut self.engines[node];
            if let Err(error) = engine.meets(beside, self.events.now, &mut self.effects) {
                self.failed.get_or_insert((engine.model.name.clone(), error));
                return Err(error);
            }
            self.apply(node as u32)?;
        }
        Ok(())
    }

    /// The coordinator learns which blocks the node keeps. At once: live nodes write them every 100 ms at most.
    fn tell_blocks(&mut self, node: u32) {
        let pool = &mut self.engines[node as usize].pool;
        if pool.stored.is_empty() && pool.evicted.is_empty() {
            return;
        }
        let hashes = |ids: &mut Vec<u32>| ids.drain(..).map(hash).collect::<Vec<_>>();
        let (stored, evicted) = (hashes(&mut pool.stored), hashes(&mut pool.evicted));
        self.index.add(Self::instance(node), &stored);
        self.index.remove(Self::instance(node), &evicted);
    }

    pub fn apply(&mut self, node: u32) -> Result<(), OutOfRange> {
        for effect in std::mem::take(&mut self.effects) {
            match effect {
                Effect::Ends { at, generation } => self.events.at(at, Event::StepEnds { node, generation }),
                Effect::Started { request } => self.asks(request)?,
                Effect::Computed {
                    request,
                    computed,
                    took,
                    last,
                } => self.computed(node, request, computed, took, last)?,
                Effect::Ended { request } => {
                    self.placed[node as usize].ends();
                    self.changed = true;
                    self.journeys[request as usize].placed = false;
                    self.cancel_move(request)?;
                    self.ended(request);
                }
                Effect::HandedOn { left } => self.handed_on(node, left)?,
                Effect::Stuck { request } => self.stuck(request)?,
                Effect::Room => self.grants(node)?,
            }
        }
        Ok(())
    }

    fn computed(
        &mut self,
        node: u32,
        request: u32,
        computed: u32,
        took: Nanos,
        last: Option<Prefilled>,
    ) -> Result<(), OutOfRange> {
        let journey = &mut self.journeys[request as usize];
        let granted = journey.reserved.is_some();
        if journey.prefill == Some(node) {
            (journey.computed, journey.last_chunk) = (computed, took);
        }
        let Some(prefilled) = last else {
            return if granted && journey.prefill == Some(node) {
                self.push(request, computed, false)
            } else {
                Ok(())
            };
        };
        self.tokens_computed += u64::from(prefilled.tokens);
        self.learns(node, &prefilled);
        let journey = &mut self.journeys[request as usize];
        if journey.prefill == Some(node) {
            journey.prefilled = Some(self.events.now);
            journey.sending = prefilled.table;
            return if granted { self.first_token(request) } else { Ok(()) };
        }
        if !std::mem::replace(&mut journey.started, true) {
            let claimed = journey.claimed;
            self.placed[node as usize].starts(claimed.into());
            self.changed = true;
        }
        Ok(())
    }

    fn learns(&mut self, node: u32, prefilled: &Prefilled) {
        let speed = &mut self.speeds[node as usize];
        speed.prefilled(prefilled.tokens, prefilled.held, prefilled.took.duration());
        if let Some(place) = self.places[node as usize] {
            self.fleet.set_times(place, speed.times());
        }
    }

    /// It has all its tokens.
    pub fn ended(&mut self, request: u32) {
        debug_assert!(self.journeys[request as usize].fate.is_none(), "{request} ended twice");
        self.open -= 1;
        self.journeys[request as usize].fate = Some(Fate::Served);
    }

    /// It was let in, but can be served by nobody.
    fn refused(&mut self, request: u32) {
        self.open -= 1;
        self.record.late_firsts += 1;
        self.journeys[request as usize].fate = Some(Fate::Refused);
    }

    /// It was placed, but needs more blocks than its node has.
    pub fn stuck(&mut self, request: u32) -> Result<(), OutOfRange> {
        self.withdraw(request, None)?;
        self.refused(request);
        Ok(())
    }

    /// Nodes say how loaded they are.
    pub fn heartbeat(&mut self) {
        for node in 0..self.engines.len() {
            let Some(place) = self.places[node] else { continue };
            let (reported, ours) = (self.reported(node), self.placed[node].figures());
            let engine = &self.engines[node];
            self.speeds[node].reported(engine.prefill_tokens_per_s, engine.step_us, reported.running_requests);
            self.fleet
                .spoke(place, Load::new(reported, ours), engine.model.queue_max);
            self.fleet.set_times(place, self.speeds[node].times());
        }
        self.changed |= self.head.is_some() || !self.again.is_empty();
    }

    /// What a node says of itself now.
    pub(super) fn reported(&self, node: usize) -> Reported {
        let engine = &self.engines[node];
        let running = engine
            .running
            .iter()
            .filter(|slot| slot.began.is_some() && !slot.is_held_back())
            .count();
        let idle = engine.running.len() - running;
        let waiting = engine.waiting.iter().chain(&engine.inbox);
        let tokens = waiting
            .clone()
            .chain(&engine.running)
            .map(|slot| u64::from(slot.known - slot.computed));
        Reported {
            queued_requests: (waiting.count() + idle) as u32,
            queued_tokens: tokens.sum(),
            running_requests: running as u32 + engine.decoding.len(),
            blocks: self.blocks(engine),
        }
    }

    /// In the unit of views: prefix blocks, where the workload has them.
    pub(super) fn blocks(&self, engine: &Engine) -> BlockCounts {
        let per = self.view_tokens(engine) / engine.model.block_tokens;
        let pool = &engine.pool;
        let (free, cached) = (pool.free() / per, pool.cached() / per);
        let total = pool.total() / per;
        BlockCounts {
            total,
            free,
            cached,
            referenced: total.saturating_sub(free + cached),
            reserved: 0,
            quarantined: 0,
        }
    }

    pub(super) fn view_tokens(&self, engine: &Engine) -> u32 {
        match self.workload.block_tokens() {
            Some(tokens) if self.options.prefix_cache => tokens,
            Some(_) | None => engine.model.block_tokens,
        }
    }
}
