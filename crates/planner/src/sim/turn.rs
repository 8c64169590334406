//! A node's turn: take what came, let waiters in, choose a step, and later finish it.

use super::decoding::Left;
use super::engine::{Arrived, Computing, Effect, Engine, Prefilled, Slot};
use super::record::{Record, Run};
use crate::Nanos;
use crate::profile::{DecodeRow, OutOfRange};
use crate::workload::Workload;
use baton_scheduling::step::{self, Candidate, Part};

/// Weight of the newest step in a node's averages, as live nodes have it.
const NEWEST: f64 = 0.2;

/// What a turn happens in.
pub(super) struct Turn<'a> {
    pub now: Nanos,
    pub workload: &'a Workload,
    pub prefix_cache: bool,
    pub record: &'a mut Record,
    pub out: &'a mut Vec<Effect>,
}

impl<'a> Turn<'a> {
    /// The prompt's blocks that have an identity, up to so many tokens.
    pub fn chain(&self, request: u32, tokens: u32) -> &'a [u32] {
        let size = match self.workload.block_tokens() {
            Some(size) if self.prefix_cache => size,
            Some(_) | None => return &[],
        };
        let chain = self.workload.chain(&self.workload.requests()[request as usize]);
        &chain[..chain.len().min((tokens / size) as usize)]
    }
}

impl Engine {
    /// Goes on as far as there is anything to do.
    pub fn turn(&mut self, turn: &mut Turn<'_>) -> Result<(), OutOfRange> {
        if self.computing.is_some() {
            return Ok(());
        }
        for mut slot in self.inbox.drain(..) {
            self.arrivals += 1;
            slot.arrival = self.arrivals;
            self.waiting.push(slot);
        }
        for mut arrived in std::mem::take(&mut self.arrived) {
            self.arrivals += 1;
            let chain = turn.chain(arrived.request, arrived.computed);
            self.pool.publish(&mut arrived.table, chain);
            self.join(arrived, self.arrivals);
        }
        loop {
            self.let_in(turn);
            // Who gave way may be the only one that is there.
            let before = self.preemptions;
            self.compute(turn)?;
            if self.computing.is_some() || self.preemptions == before {
                return Ok(());
            }
        }
    }

    /// Decodes it from the next step on. The gap before its next token began when it got its last one.
    fn join(&mut self, arrived: Arrived, arrival: u64) {
        let Arrived {
            request,
            computed,
            left,
            table,
            blocks,
        } = arrived;
        self.decoding.join(request, arrival, table, computed, left, blocks);
        self.fresh.push(request);
    }

    fn prompts(&self, now: Nanos) -> Vec<Candidate> {
        self.running.iter().map(|slot| slot.candidate(now)).collect()
    }

    /// All that have blocks: prompts first, then those that decode.
    fn candidates(&self, now: Nanos) -> Vec<Candidate> {
        let mut all = self.prompts(now);
        all.extend(self.decoding.arrivals().map(|(_, arrival)| Candidate {
            computed: 0,
            known: 1,
            decoding: true,
            held_back: false,
            time_left: std::time::Duration::ZERO,
            arrival,
        }));
        all
    }

    fn let_in(&mut self, turn: &mut Turn<'_>) {
        while !self.waiting.is_empty() {
            let waiters: Vec<_> = self.waiting.iter().map(|slot| slot.waiter(turn.now)).collect();
            let Some(next) = step::next_in(&waiters) else { return };
            let candidates = self.prompts(turn.now);
            if !step::lets_in(&candidates, &waiters[next], &self.limits) {
                return;
            }
            let slot = &self.waiting[next];
            let blocks = self.model.blocks_for(slot.known);
            let full = self.running.len() + self.decoding.len() as usize >= self.running_max;
            // At least one token is computed: its logits are what the next one is drawn from.
            let chain = turn.chain(slot.request, slot.known - 1);
            let table = if full {
                None
            } else {
                self.pool.acquire(chain, blocks, 0)
            };
            if let Some(table) = table {
                let mut slot = self.waiting.swap_remove(next);
                slot.computed = table.shared_blocks() * turn.workload.block_tokens().unwrap_or(0);
                slot.table = Some(table);
                self.running.push(slot);
                continue;
            }
            if blocks > self.pool.total() {
                let slot = self.waiting.swap_remove(next);
                turn.out.push(Effect::Stuck { request: slot.request });
                continue;
            }
            match step::gives_way_to(&candidates, &waiters[next]) {
                Some(index) => self.preempt(index, turn),
                None => return,
            }
        }
    }

    /// One gives its blocks back and will compute everything anew: a prompt, or behind them one that decodes.
    fn preempt(&mut self, index: usize, turn: &mut Turn<'_>) {
        self.preemptions += 1;
        let slot = if index < self.running.len() {
            self.running.swap_remove(index)
        } else {
            let nth = self.decoding.arrivals().nth(index - self.running.len());
            let Some(left) = nth.and_then(|(place, _)| self.decoding.take(place)) else {
                return;
            };
            self.back_to_waiting(turn, left)
        };
        let mut slot = slot;
        if let Some(table) = slot.table.take() {
            self.pool.release(table);
        }
        (slot.computed, slot.prefilled, slot.gave_way, slot.began) = (0, 0, true, None);
        turn.out.push(Effect::Room);
        self.waiting.push(slot);
    }

    fn back_to_waiting(&mut self, turn: &mut Turn<'_>, left: Left) -> Slot {
        turn.record.leaves(left.request, left.drawn, left.late, turn.now);
        self.fresh.retain(|request| *request != left.request);
        let request = &turn.workload.requests()[left.request as usize];
        let wants = request.output - turn.record.drawn(left.request);
        let mut slot = Slot::new(
            left.request,
            left.computed + 1,
            wants,
            turn.record.deadline(left.request),
        );
        slot.arrival = left.arrival;
        slot.table = Some(left.table);
        slot
    }

    /// Chooses the next step, or run of steps, and begins it.
    fn compute(&mut self, turn: &mut Turn<'_>) -> Result<(), OutOfRange> {
        // Sequences that decode are in every step and take nothing of the prompts' share: only prompts need be asked about.
        let mut parts = step::step(&self.prompts(turn.now), &self.limits);
        while self.decoding.growth(1) > self.pool.room() {
            let candidates = self.candidates(turn.now);
            let Some(newest) = step::gives_way(&candidates) else {
                break;
            };
            self.preempt(newest, turn);
            parts = step::step(&self.prompts(turn.now), &self.limits);
        }
        let batch = self.decoding.len();
        if parts.is_empty() && batch == 0 {
            return Ok(());
        }
        let steps = match (parts.is_empty(), self.decoding.until_first_end()) {
            (true, Some(most)) => self.decoding.steps_within(self.pool.room(), most).max(1),
            (_, _) => 1,
        };
        let size = |part: &Part| (part.tokens as u32, self.running[part.index].computed);
        let sizes: Vec<(u32, u32)> = parts.iter().map(size).collect();
        let (seconds, row) = self.step_seconds(&sizes, steps)?;
        self.generation += 1;
        let ends = turn.now + Nanos::from_seconds(seconds);
        for part in &parts {
            let slot = &mut self.running[part.index];
            if slot.began.is_none() {
                slot.began = Some(turn.now);
                if slot.to_first {
                    turn.out.push(Effect::Started { request: slot.request });
                }
            }
        }
        let arrival = |part: &Part| (self.running[part.index].arrival, part.tokens as u32);
        self.computing = Some(Computing {
            began: turn.now,
            ends,
            generation: self.generation,
            parts: parts.iter().map(arrival).collect(),
            steps: if batch == 0 { 0 } else { steps },
            row,
            seconds,
            beside: self.beside,
        });
        turn.out.push(Effect::Ends {
            at: ends,
            generation: self.generation,
        });
        Ok(())
    }

    /// Beside what is beside it now: a step of parts of prompts, each `(new tokens, tokens before them)`, and of so many steps of those
    /// that decode; and the times of these.
    pub(super) fn step_seconds(
        &mut self,
        prompts: &[(u32, u32)],
        steps: u64,
    ) -> Result<(f64, Option<DecodeRow>), OutOfRange> {
        let row = self.row(self.decoding.len())?;
        let decode = match &row {
            Some(row) => row.seconds(self.decoding.tokens(), steps)?,
            None => 0.0,
        };
        if prompts.is_empty() {
            return Ok((decode, row));
        }
        let prefill = self.model.prefill_step(prompts, self.beside)?;
        let both = if row.is_some() {
            self.model.mixed(prefill, decode)
        } else {
            prefill
        };
        Ok((both, row))
    }

    fn row(&mut self, batch: u32) -> Result<Option<DecodeRow>, OutOfRange> {
        if batch == 0 {
            return Ok(None);
        }
        match self.row.take().filter(|row| row.batch() == batch) {
            Some(row) => Ok(Some(row)),
            None => self.model.decode_row(batch, self.beside).map(Some),
        }
    }

    /// So many steps only decoded. As live nodes have it: a mixed step says little about either, so only pure ones count, in a
    /// moving average.
    fn decoded(&mut self, step_s: f64, steps: u64) {
        let left = (1.0 - NEWEST).powi(i32::try_from(steps).unwrap_or(i32::MAX)) as f32;
        let newest = (step_s * 1e6) as f32;
        self.step_us = if self.step_us == 0.0 {
            newest
        } else {
            newest + left * (self.step_us - newest)
        };
    }

    /// A step only computed so many prompt tokens.
    fn prefilled(&mut self, tokens: u32, seconds: f64) {
        let weight = (NEWEST * (f64::from(tokens) / 64.0).min(1.0)) as f32;
        let newest = (f64::from(tokens) / seconds.max(1e-9)) as f32;
        let known = &mut self.prefill_tokens_per_s;
        *known = if *known == 0.0 {
            newest
        } else {
            *known + weight * (newest - *known)
        };
    }

    /// The step or run under way is over.
    pub fn finish(&mut self, turn: &mut Turn<'_>) -> Result<(), OutOfRange> {
        let Some(computing) = self.computing.take() else {
            return Ok(());
        };
        let took = turn.now - computing.began;
        let tokens: u32 = computing.parts.iter().map(|(_, tokens)| tokens).sum();
        self.computed(computing.began, turn.now, tokens == 0);
        let mut freed = false;
        if computing.steps > 0 {
            self.pool.take(self.decoding.growth(computing.steps));
            if tokens == 0 {
                self.decoded(took.seconds() / computing.steps as f64, computing.steps);
            }
            let alone = computing.row.as_ref().filter(|_| tokens == 0);
            let run = Run {
                began: computing.began,
                took,
                row: alone,
                start: self.decoding.tokens(),
                steps: computing.steps,
                batch: self.decoding.len(),
            };
            self.decoding.late_steps += turn.record.run(&run, &self.fresh)?;
            self.fresh.clear();
            let mut left = Vec::new();
            self.decoding.advance(computing.steps, &mut left);
            for left in left {
                turn.record.leaves(left.request, left.drawn, left.late, turn.now);
                self.pool.release(left.table);
                turn.out.push(Effect::Ended { request: left.request });
                freed = true;
            }
        }
        freed |= self.hand_on(turn);
        self.row = computing.row.filter(|_| computing.beside == self.beside);
        if tokens > 0 && computing.steps == 0 {
            self.prefilled(tokens, took.seconds());
        }
        for (arrival, tokens) in computing.parts {
            if let Some(index) = self.running.iter().position(|slot| slot.arrival == arrival) {
                freed |= self.advance(index, tokens, took, turn);
            }
        }
        self.blocks_peak = self.blocks_peak.max(self.pool.used());
        if freed {
            turn.out.push(Effect::Room);
        }
        Ok(())
    }

    /// More of a prompt is computed. True where that gave blocks back.
    fn advance(&mut self, index: usize, tokens: u32, took: Nanos, turn: &mut Turn<'_>) -> bool {
        let slot = &mut self.running[index];
        slot.computed += tokens;
        slot.prefilled += tokens;
        let request = slot.request;
        if slot.computed < slot.known {
            turn.out.push(Effect::Computed {
                request,
                computed: slot.computed,
                took,
                last: None,
            });
            return false;
        }
        let mut slot = self.running.swap_remove(index);
        let mut table = slot.table.take().unwrap_or_default();
        let chain = turn.chain(request, slot.known);
        self.pool.publish(&mut table, chain);
        let mut freed = false;
        let mut leaving = None;
        let prefilled = slot.began.map_or(Nanos::ZERO, |began| turn.now - began);
        if !slot.to_first {
            turn.record.draws(request, turn.now);
        }
        if slot.to_first {
            leaving = Some(table);
        } else if slot.left <= 1 {
            self.pool.release(table);
            freed = true;
        } else {
            let arrived = Arrived {
                request,
                computed: slot.known,
                left: slot.left - 1,
                table,
                blocks: self.model.blocks_for(slot.known),
            };
            self.join(arrived, slot.arrival);
        }
        turn.out.push(Effect::Computed {
            request,
            computed: slot.known,
            took,
            last: Some(Prefilled {
                tokens: slot.prefilled,
                held: slot.known - slot.prefilled,
                took: prefilled,
                table: leaving,
            }),
        });
        if freed {
            turn.out.push(Effect::Ended { request });
        }
        freed
    }
}
