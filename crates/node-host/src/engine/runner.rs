//! The loop of the engine thread: take what came, let waiters in, choose a step, compute it, tell.

use super::drafting::{Bounds, Drafter, Speculation};
use super::ending::Ending;
use super::gauges::Gauges;
use super::inbox::{EngineHandle, Inbox};
use super::observer::Watch;
use super::sequence::SequenceError;
use super::slots::{DrawnFrom, Slot};
use crate::blocks::PoolBlocks;
use baton_engine::{Backend, Slice, StepError, StepOutput, WantedLogits};
use baton_node_runtime::{Clock, Supervisor, TaskHandle};
use baton_scheduling::step::{self, Candidate, Part, StepLimits, Waiter};
use baton_types::{ArenaView, KvGeometry};
use std::sync::Arc;
use std::time::Duration;

/// How often a waiter looks for room that came free elsewhere (a hand-over's claims, a quarantine).
const ROOM_PATIENCE: Duration = Duration::from_millis(5);

/// What an engine thread is made of.
pub struct EngineParts {
    /// The model.
    pub backend: Box<dyn Backend>,
    /// Where its KV is.
    pub arena: ArenaView,
    /// Who owns which block of it.
    pub blocks: Arc<PoolBlocks>,
    /// Sequences that may wait for blocks.
    pub queue_capacity: usize,
    /// Sequences that may have blocks at once.
    pub running_max: usize,
    /// Prompt tokens of one step.
    pub chunk_tokens: usize,
    /// Whether decoding sequences get drafts.
    pub speculation: Speculation,
    /// What ends a sequence.
    pub ending: Ending,
    /// Called after blocks were given back.
    pub room_changed: Box<dyn Fn() + Send>,
}

/// Starts the thread.
pub fn start(parts: EngineParts, clock: Clock, supervisor: &Supervisor) -> (EngineHandle, TaskHandle) {
    let inbox = Inbox::new(parts.queue_capacity, parts.running_max);
    let gauges = Arc::new(Gauges::default());
    let handle = EngineHandle {
        inbox: inbox.clone(),
        gauges: gauges.clone(),
    };
    let geometry = *parts.arena.geometry();
    let limits = StepLimits {
        block_tokens: geometry.block_tokens as usize,
        chunk_tokens: parts.chunk_tokens,
    };
    let runner = Runner {
        drafter: Drafter::new(parts.speculation),
        parts,
        geometry,
        limits,
        clock,
        inbox,
        gauges,
        waiting: Vec::new(),
        running: Vec::new(),
        arrivals: 0,
        freed: false,
    };
    let task = supervisor.spawn_blocking("engine", move || runner.run());
    (handle, task)
}

/// What one step brought.
#[derive(Default)]
struct Brought {
    /// Prompt tokens computed.
    prompt: usize,
    /// Sequences that decoded, and the tokens drawn for them.
    decoding: usize,
    drawn: usize,
    /// Draft tokens computed, and those of them that were right.
    drafted: usize,
    right: usize,
}

struct Runner {
    parts: EngineParts,
    drafter: Drafter,
    geometry: KvGeometry,
    limits: StepLimits,
    clock: Clock,
    inbox: Arc<Inbox>,
    gauges: Arc<Gauges>,
    /// Without blocks.
    waiting: Vec<Slot>,
    /// With blocks.
    running: Vec<Slot>,
    arrivals: u64,
    /// Blocks were given back since hand-overs were last told.
    freed: bool,
}

impl Runner {
    fn run(mut self) {
        // Whether the last round computed anything; if not, there is nothing to do before something changes.
        let mut idle = true;
        loop {
            let patience = (!self.waiting.is_empty()).then_some(ROOM_PATIENCE);
            let arrivals = self.inbox.look(idle, patience);
            let closed = arrivals.closed;
            for spec in arrivals.sequences {
                self.arrivals += 1;
                let slot = Slot::new(spec, self.arrivals, self.clock.now(), &self.geometry);
                if slot.table.is_some() {
                    self.running.push(slot)
                } else {
                    self.waiting.push(slot)
                }
            }
            if closed {
                return self.close();
            }
            self.drop_unwanted();
            self.let_in();
            idle = !self.compute();
            self.drop_unwanted();
            self.tell_room();
            self.show_load();
            if idle && self.waiting.is_empty() && self.running.is_empty() {
                self.check_when_idle();
            }
        }
    }

    /// Debug builds look into the pool before the thread goes to sleep; heartbeats do so in all builds, more rarely.
    fn check_when_idle(&self) {
        if cfg!(debug_assertions)
            && let Err(fault) = self.parts.blocks.pool().check_integrity()
        {
            // Ends the node: in a debug build a wrong book is to be found where it was written.
            panic!("the block pool contradicts itself: {fault}");
        }
    }

    fn close(&mut self) {
        for slot in self.waiting.iter_mut().chain(&mut self.running) {
            slot.fail(SequenceError::ShuttingDown);
        }
        self.waiting.clear();
        self.running.clear();
        self.show_load();
        self.freed = true;
        self.tell_room();
    }

    fn drop_unwanted(&mut self) {
        let inbox = &self.inbox;
        self.waiting.retain(|slot| {
            let keep = !slot.is_unwanted();
            if !keep && slot.holds_a_place {
                inbox.left_the_queue();
            }
            keep
        });
        let before = self.running.len();
        self.running.retain(|slot| !slot.is_unwanted());
        self.freed |= self.running.len() < before;
    }

    /// Lets hand-overs that ask have what came free, save what is owed to sequences that gave way.
    fn tell_room(&mut self) {
        let owed: usize = self.waiting.iter().map(|slot| slot.owed_blocks(&self.geometry)).sum();
        let less = owed < self.parts.blocks.set_owed(owed);
        if std::mem::take(&mut self.freed) || less {
            (self.parts.room_changed)();
        }
    }

    fn candidates(&self) -> Vec<Candidate> {
        let now = self.clock.now();
        self.running.iter().map(|slot| slot.candidate(now)).collect()
    }

    /// Gives blocks to waiters, as far as there is room.
    fn let_in(&mut self) {
        loop {
            let now = self.clock.now();
            let waiters: Vec<Waiter> = self.waiting.iter().map(|slot| slot.waiter(now)).collect();
            let Some(next) = step::next_in(&waiters) else { return };
            let candidates = self.candidates();
            if !step::lets_in(&candidates, &waiters[next], &self.limits) {
                return;
            }
            let full = self.running.len() >= self.inbox.running_max();
            if !full
                && self.waiting[next]
                    .take_blocks(self.parts.blocks.pool(), &self.geometry)
                    .is_ok()
            {
                let mut slot = self.waiting.swap_remove(next);
                if std::mem::take(&mut slot.holds_a_place) {
                    self.inbox.left_the_queue();
                }
                self.running.push(slot);
                continue;
            }
            // What was computed ahead of its reservation is the first to go.
            match step::gives_way_to(&candidates, &waiters[next]) {
                Some(index) => self.preempt(index),
                None => return,
            }
        }
    }

    fn preempt(&mut self, index: usize) {
        let mut slot = self.running.swap_remove(index);
        slot.give_way();
        metrics::counter!("baton_node_preemptions_total").increment(1);
        self.waiting.push(slot);
        self.freed = true;
    }

    /// Chooses and computes one step; false where there was nothing to compute.
    fn compute(&mut self) -> bool {
        let mut parts = step::step(&self.candidates(), &self.limits);
        // Those whose next token needs a block that cannot be had make the newest ones give way.
        while let Some(lacking) = parts.iter().position(|part| !self.has_room(part)) {
            let newest = step::gives_way(&self.candidates()).unwrap_or(parts[lacking].index);
            self.preempt(newest);
            parts = step::step(&self.candidates(), &self.limits);
        }
        if parts.is_empty() {
            return false;
        }
        self.draft(&parts);
        let began = self.clock.now();
        for part in &parts {
            let slot = &mut self.running[part.index];
            slot.start(began);
            let end = slot.computed + part.tokens;
            if let Err(error) = slot.zero_unfilled(end, &self.parts.arena) {
                slot.fail(error);
            }
        }
        match self.step(&parts) {
            Ok(output) => {
                let took = self.clock.elapsed(began);
                let brought = self.finish(&parts, &output);
                if brought.prompt == 0 {
                    self.drafter
                        .step_took(brought.decoding, brought.drafted, took.as_secs_f64());
                }
                self.gauges.drafted(brought.drafted, brought.right);
                self.gauges
                    .step_took(brought.prompt, (brought.decoding, brought.drawn), took);
            }
            Err(StepError::Aborted { .. }) => {
                metrics::counter!("baton_node_steps_aborted_total").increment(1);
            }
            Err(error) => self.blame(&parts, &error),
        }
        true
    }

    fn has_room(&mut self, part: &Part) -> bool {
        let slot = &mut self.running[part.index];
        let end = slot.computed + part.tokens;
        slot.make_room(end, &self.geometry).is_ok()
    }

    /// Gives drafts to decoding sequences. Never at the cost of somebody's blocks: while anybody waits, and where each
    /// running sequence could not grow by a block besides, drafts take none.
    fn draft(&mut self, parts: &[Part]) {
        let blocks = match self.waiting.is_empty() {
            true => self.parts.blocks.pool().room().saturating_sub(self.running.len()),
            false => 0,
        };
        let bounds = Bounds {
            geometry: &self.geometry,
            context_tokens: self.parts.ending.context_tokens(),
            blocks,
        };
        self.drafter.draft(&mut self.running, parts, bounds);
    }

    fn step(&mut self, parts: &[Part]) -> Result<StepOutput, StepError> {
        let mut watch = Watch::default();
        let mut batch = Vec::with_capacity(parts.len());
        for part in parts {
            let slot = &self.running[part.index];
            let end = slot.computed + part.tokens;
            let tokens = slot.slice(end);
            watch.parts.push((slot.control().clone(), tokens.len()));
            watch.told.extend(slot.layers_told(end));
            batch.push(Slice {
                tokens,
                start: slot.computed,
                blocks: slot.table.as_ref().map_or(&[], |table| table.blocks()),
                logits: if end < slot.tokens.len() {
                    WantedLogits::None
                } else if slot.drafting.drafted().is_empty() {
                    WantedLogits::Last
                } else {
                    WantedLogits::All
                },
            });
        }
        self.parts.backend.step(&self.parts.arena, &batch, &mut watch)
    }

    fn finish(&mut self, parts: &[Part], output: &StepOutput) -> Brought {
        let step = DrawnFrom {
            ending: &self.parts.ending,
            geometry: &self.geometry,
            now: self.clock.now(),
        };
        let (mut brought, mut row) = (Brought::default(), 0);
        for part in parts {
            let slot = &mut self.running[part.index];
            let decoded = slot.decoding;
            if decoded {
                brought.decoding += 1
            } else {
                brought.prompt += part.tokens
            }
            slot.advance(part.tokens, &self.geometry);
            if slot.computed < slot.tokens.len() {
                continue;
            }
            let drafted = slot.drafting.drafted().len();
            let rows = row..row + 1 + drafted;
            row = rows.end;
            let right = slot.draw_all(rows.map(|row| output.row(row)), &step);
            brought.drawn += if decoded { 1 + right } else { 0 };
            if drafted > 0 {
                brought.drafted += drafted;
                brought.right += right;
                // A sequence that ended says nothing of the rest of its draft.
                let judged = if slot.over { right } else { drafted };
                self.drafter.verified(slot, judged, right);
                slot.drafting.clear();
                self.freed |= slot.give_back_draft(&self.geometry);
            }
        }
        brought
    }

    /// Fails the sequence that the backend names; all of the step where it names none.
    fn blame(&mut self, parts: &[Part], error: &StepError) {
        let named = match error {
            StepError::EmptySlice { slice }
            | StepError::TokenOutOfRange { slice, .. }
            | StepError::BeyondContext { slice, .. }
            | StepError::TooFewBlocks { slice, .. }
            | StepError::OutOfArena { slice, .. }
            | StepError::BlockConflict { slice, .. } => parts.get(*slice),
            StepError::Aborted { .. } | StepError::Geometry(_) => None,
        };
        let failed = named.map_or(parts, std::slice::from_ref);
        for part in failed {
            self.running[part.index].fail(SequenceError::Step(error.clone()));
        }
    }

    fn show_load(&self) {
        let idle = |slot: &&Slot| slot.is_held_back() || slot.is_unstarted();
        let idle = self.running.iter().filter(idle).count();
        let uncomputed = |slot: &Slot| {
            if slot.decoding {
                0
            } else {
                slot.tokens.len() - slot.computed
            }
        };
        let tokens: usize = self.waiting.iter().chain(&self.running).map(uncomputed).sum();
        self.gauges
            .set_queue(self.waiting.len() + idle, tokens as u64, self.running.len() - idle);
    }
}
