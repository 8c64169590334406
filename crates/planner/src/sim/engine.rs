//! One node: the loop of the live engine thread (`node-host`) without tensors. It asks the same `step` functions who is let in, what
//! the next step computes and who gives way; a step takes what the profile says.

use super::decoding::{DecodeBatch, Left};
use super::pool::{Pool, Table};
use crate::Nanos;
use crate::profile::{DecodeRow, Neighbour, NodeModel, OutOfRange};
use baton_scheduling::step::{Candidate, StepLimits, Waiter};
use std::collections::BTreeMap;
use std::sync::Arc;

/// A sequence that is not (or no more) only decoded.
#[derive(Debug)]
pub(super) struct Slot {
    pub request: u32,
    /// Tokens that are known: the prompt, and after it gave way what was drawn.
    pub known: u32,
    pub computed: u32,
    /// Computed here since it has blocks.
    pub prefilled: u32,
    /// Tokens that it still wants.
    pub left: u32,
    /// It ends here with its first token: another node decodes it.
    pub to_first: bool,
    /// The decode node has blocks for it.
    pub granted: bool,
    pub gave_way: bool,
    pub arrival: u64,
    pub deadline: Nanos,
    /// When its first chunk began.
    pub began: Option<Nanos>,
    pub table: Option<Table>,
}

impl Slot {
    pub fn new(request: u32, known: u32, left: u32, deadline: Nanos) -> Self {
        Self {
            request,
            known,
            computed: 0,
            prefilled: 0,
            left,
            to_first: false,
            granted: true,
            gave_way: false,
            arrival: 0,
            deadline,
            began: None,
            table: None,
        }
    }

    pub fn is_held_back(&self) -> bool {
        self.prefilled > 0 && !self.granted
    }

    pub fn candidate(&self, now: Nanos) -> Candidate {
        Candidate {
            computed: self.computed as usize,
            known: self.known as usize,
            decoding: false,
            held_back: self.is_held_back(),
            time_left: self.deadline.saturating_sub(now).duration(),
            arrival: self.arrival,
        }
    }

    pub fn waiter(&self, now: Nanos) -> Waiter {
        Waiter {
            preempted: self.could_go_on(),
            time_left: self.deadline.saturating_sub(now).duration(),
            arrival: self.arrival,
        }
    }

    pub fn could_go_on(&self) -> bool {
        self.gave_way && self.granted
    }
}

/// A sequence whose KV has arrived.
#[derive(Debug)]
pub(super) struct Arrived {
    pub request: u32,
    pub computed: u32,
    pub left: u32,
    pub table: Table,
    pub blocks: u32,
}

/// What happened on a node that others must know.
#[derive(Debug)]
pub(super) enum Effect {
    /// Its step ends then, unless it is cut short.
    Ends { at: Nanos, generation: u64 },
    /// The first chunk of a request that ends here with its first token is computed now.
    Started { request: u32 },
    /// Its prompt is computed up to here; `last`: all of it, and its next token is drawn.
    Computed {
        request: u32,
        computed: u32,
        took: Nanos,
        last: Option<Prefilled>,
    },
    /// It has all its tokens.
    Ended { request: u32 },
    /// It left for another decode node.
    HandedOn { left: Left },
    /// It can never go on: it alone needs more blocks than the node has.
    Stuck { request: u32 },
    /// Blocks came free.
    Room,
}

/// A prompt that is computed.
#[derive(Debug)]
pub(super) struct Prefilled {
    /// Computed here, and held before.
    pub tokens: u32,
    pub held: u32,
    pub took: Nanos,
    /// Its blocks, where they leave the node.
    pub table: Option<Table>,
}

/// A step, or a run of steps of one batch.
#[derive(Debug)]
pub(super) struct Computing {
    pub began: Nanos,
    pub ends: Nanos,
    pub generation: u64,
    /// Arrivals of the slots and tokens of each.
    pub parts: Vec<(u64, u32)>,
    /// Steps that the decoding sequences do meanwhile.
    pub steps: u64,
    /// How long these take.
    pub row: Option<DecodeRow>,
    /// How long all of it takes, beside what it began beside.
    pub seconds: f64,
    pub beside: Neighbour,
}

#[derive(Debug)]
pub(super) struct Engine {
    pub model: Arc<NodeModel>,
    pub limits: StepLimits,
    pub running_max: usize,
    pub pool: Pool,
    pub waiting: Vec<Slot>,
    pub running: Vec<Slot>,
    pub decoding: DecodeBatch,
    /// What came while a step was computed.
    pub inbox: Vec<Slot>,
    pub arrived: Vec<Arrived>,
    pub computing: Option<Computing>,
    pub generation: u64,
    pub arrivals: u64,
    /// Reservations that are asked for: by deadline, then in order.
    pub asks: BTreeMap<(Nanos, u64), u32>,
    /// When the last push out of it, and into it, is done.
    pub sending_until: Nanos,
    pub receiving_until: Nanos,
    /// As its heartbeats say it.
    pub step_us: f32,
    pub prefill_tokens_per_s: f32,
    /// Time that it computed prompts, and decoded, and the most blocks that were in use.
    pub busy: [Nanos; 2],
    pub blocks_peak: u32,
    pub preemptions: u64,
    pub handed_on: u64,
    /// Those whose first step here is yet to end.
    pub fresh: Vec<u32>,
    /// Sequences that leave for another node with the end of this step.
    pub leaving: Vec<u32>,
    /// Of the last batch size, beside what is beside it.
    pub row: Option<DecodeRow>,
    /// What other nodes of the machine compute.
    pub beside: Neighbour,
}

impl Engine {
    pub fn new(model: &Arc<NodeModel>, per_prefix: u32, running_max: usize) -> Self {
        Self {
            limits: StepLimits {
                block_tokens: model.block_tokens as usize,
                chunk_tokens: model.chunk_tokens as usize,
            },
            running_max,
            pool: Pool::new(model.blocks, per_prefix),
            waiting: Vec::new(),
            running: Vec::new(),
            decoding: DecodeBatch::new(model.block_tokens),
            inbox: Vec::new(),
            arrived: Vec::new(),
            computing: None,
            generation: 0,
            arrivals: 0,
            asks: BTreeMap::new(),
            sending_until: Nanos::ZERO,
            receiving_until: Nanos::ZERO,
            step_us: 0.0,
            prefill_tokens_per_s: 0.0,
            busy: [Nanos::ZERO; 2],
            blocks_peak: 0,
            preemptions: 0,
            handed_on: 0,
            fresh: Vec::new(),
            leaving: Vec::new(),
            row: None,
            beside: Neighbour::Idle,
            model: Arc::clone(model),
        }
    }

    /// Blocks that the run under way has begun to use up to now, and all that it will: neither is counted in the pool yet.
    pub fn growing(&self, now: Nanos) -> (u64, u32) {
        let Some(computing) = &self.computing else {
            return (0, 0);
        };
        let Some(row) = computing.row.as_ref().filter(|_| computing.steps > 1) else {
            return (computing.steps, self.decoding.growth(computing.steps));
        };
        let passed = (now - computing.began).seconds();
        let done = row.first_after(self.decoding.tokens(), computing.steps, passed);
        let done = done.map_or(computing.steps, |(steps, _)| steps);
        (done, self.decoding.growth(done))
    }

    /// It computed until now.
    pub fn computed(&mut self, began: Nanos, now: Nanos, decoding: bool) {
        self.busy[usize::from(decoding)] += now - began;
    }

    /// What it is to its neighbours.
    pub fn as_neighbour(&self) -> Neighbour {
        match &self.computing {
            None => Neighbour::Idle,
            Some(computing) if computing.parts.is_empty() => Neighbour::Decoding,
            Some(_) => Neighbour::Prefilling,
        }
    }

    /// Other nodes of the machine compute something else from now on. A run of decode steps ends with the one under way; what is left of
    /// a step that computes prompts takes longer, or less long.
    pub fn meets(&mut self, beside: Neighbour, now: Nanos, out: &mut Vec<Effect>) -> Result<(), OutOfRange> {
        if self.beside == beside {
            return Ok(());
        }
        (self.beside, self.row) = (beside, None);
        if self.as_neighbour() != Neighbour::Prefilling {
            self.cut(now, out);
            return Ok(());
        }
        let Some(mut computing) = self.computing.take() else {
            return Ok(());
        };
        let sizes: Vec<(u32, u32)> = computing
            .parts
            .iter()
            .filter_map(|(arrival, tokens)| {
                let slot = self.running.iter().find(|slot| slot.arrival == *arrival)?;
                Some((*tokens, slot.computed))
            })
            .collect();
        if !sizes.is_empty() {
            let (seconds, row) = self.step_seconds(&sizes, computing.steps)?;
            let left = (computing.ends - now).seconds() * seconds / computing.seconds;
            self.generation += 1;
            computing.ends = now + Nanos::from_seconds(left);
            computing.generation = self.generation;
            (computing.seconds, computing.row, computing.beside) = (seconds, row, beside);
            out.push(Effect::Ends {
                at: computing.ends,
                generation: self.generation,
            });
        }
        self.computing = Some(computing);
        Ok(())
    }

    /// Whether it has prompts besides this one.
    pub fn has_others(&self, request: u32) -> bool {
        let mut all = self.running.iter().chain(&self.waiting).chain(&self.inbox);
        all.any(|slot| slot.request != request)
    }

    /// Blocks promised to sequences that gave way.
    pub fn owed(&self) -> u32 {
        let owed = self.waiting.iter().filter(|slot| slot.could_go_on());
        owed.map(|slot| self.model.blocks_for(slot.known)).sum()
    }

    /// Ends the run of decode steps under way with the step that is computed now, so that what came can join.
    pub fn cut(&mut self, now: Nanos, out: &mut Vec<Effect>) {
        let (began, steps, start) = match &self.computing {
            Some(computing) if computing.steps > 1 => (computing.began, computing.steps, self.decoding.tokens()),
            _ => return,
        };
        let Some(computing) = &mut self.computing else { return };
        let Some(row) = &computing.row else { return };
        let Ok((done, seconds)) = row.first_after(start, steps, (now - began).seconds()) else {
            return;
        };
        if done >= steps {
            return;
        }
        self.generation += 1;
        computing.steps = done;
        computing.generation = self.generation;
        // Rounding must not put it before what is happening.
        computing.ends = (began + Nanos::from_seconds(seconds)).max(now);
        out.push(Effect::Ends {
            at: computing.ends,
            generation: self.generation,
        });
    }
}
