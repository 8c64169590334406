//! Hand-overs: blocks are reserved late, pushed early, and links carry one push at a time.

use super::cluster::Cluster;
use super::engine::Arrived;
use super::event::Event;
use crate::Nanos;
use crate::profile::OutOfRange;
use baton_types::Instance;
use std::sync::Arc;

impl Cluster<'_> {
    /// The first chunk is computed now: the decode node is asked for blocks.
    pub fn asks(&mut self, request: u32) -> Result<(), OutOfRange> {
        let decode = self.journeys[request as usize].decode;
        let deadline = self.record.deadline(request);
        let asks = &self.engines[decode as usize].asks;
        // One that gave way begins again, and has what it asked for, or will.
        if self.journeys[request as usize].reserved.is_some() || asks.values().any(|asked| *asked == request) {
            return Ok(());
        }
        self.asked += 1;
        let asked = self.asked;
        self.engines[decode as usize].asks.insert((deadline, asked), request);
        self.grants(decode)
    }

    /// Gives blocks to those who asked, in order, as far as there is room. The first that does not fit holds up the others.
    pub fn grants(&mut self, node: u32) -> Result<(), OutOfRange> {
        loop {
            let now = self.events.now;
            let engine = &mut self.engines[node as usize];
            let Some((key, request)) = engine.asks.first_key_value().map(|(key, request)| (*key, *request)) else {
                return Ok(());
            };
            let input = self.journeys[request as usize].known;
            let blocks = engine.model.blocks_for(input) + 1;
            if blocks > engine.pool.total() {
                engine.asks.remove(&key);
                self.stuck(request)?;
                continue;
            }
            let (_, growing) = engine.growing(now);
            let reserved = growing + engine.owed();
            let chain = self.chain(request, input - 1);
            let engine = &mut self.engines[node as usize];
            let Some(table) = engine.pool.acquire(chain, blocks, reserved) else {
                return Ok(());
            };
            engine.asks.remove(&key);
            // The run under way was chosen for the room there was.
            let planned = engine.computing.as_ref().map_or(0, |computing| computing.steps);
            if engine.decoding.growth(planned) > engine.pool.room() {
                engine.cut(now, &mut self.effects);
                self.apply(node)?;
            }
            self.granted(request, table, blocks)?;
        }
    }

    fn granted(&mut self, request: u32, table: super::pool::Table, blocks: u32) -> Result<(), OutOfRange> {
        let held = table.shared_blocks() * self.workload.block_tokens().unwrap_or(0);
        let journey = &mut self.journeys[request as usize];
        (journey.reserved, journey.reserved_blocks, journey.sent) = (Some(table), blocks, held);
        let Some(prefill) = journey.prefill else { return Ok(()) };
        let (computed, prefilled) = (journey.computed, journey.prefilled);
        let engine = &mut self.engines[prefill as usize];
        let waiting = engine
            .running
            .iter_mut()
            .chain(&mut engine.waiting)
            .chain(&mut engine.inbox);
        waiting
            .filter(|slot| slot.request == request)
            .for_each(|slot| slot.granted = true);
        if prefilled.is_some() {
            return self.first_token(request);
        }
        self.push(request, computed, false)?;
        self.turn(prefill)
    }

    /// Sends what is computed up to `computed` tokens and was not sent. The last chunk's layers leave while the others are computed.
    pub fn push(&mut self, request: u32, computed: u32, last: bool) -> Result<(), OutOfRange> {
        let now = self.events.now;
        let journey = &mut self.journeys[request as usize];
        let Some(prefill) = journey.prefill else { return Ok(()) };
        let (p, d) = (prefill as usize, journey.decode as usize);
        let model = &self.engines[p].model;
        let until = if last {
            model.blocks_for(computed)
        } else {
            computed / model.block_tokens
        };
        let blocks = until.saturating_sub(journey.sent / model.block_tokens);
        if blocks == 0 {
            journey.pushed_until = journey.pushed_until.max(now);
            return Ok(());
        }
        // The slower of the two ends.
        let bytes = u64::from(blocks) * model.block_bytes;
        let receiver = &self.engines[d].model;
        let mut seconds = model.handover(bytes)?;
        if !Arc::ptr_eq(model, receiver) {
            seconds = seconds.max(receiver.handover(bytes)?);
        }
        let whole = Nanos::from_seconds(seconds);
        let layer = Nanos(whole.0 / u64::from(model.layers.max(1)));
        let ready = if last {
            now.saturating_sub(Nanos(
                journey.last_chunk.0 - journey.last_chunk.0 / u64::from(model.layers.max(1)),
            ))
        } else {
            now
        };
        let start = ready
            .max(self.engines[p].sending_until)
            .max(self.engines[d].receiving_until);
        let ends = (start + whole).max(now + if last { layer } else { Nanos::ZERO });
        let journey = &mut self.journeys[request as usize];
        journey.sent = until * self.engines[p].model.block_tokens;
        journey.tokens_handed += blocks * self.engines[p].model.block_tokens;
        journey.pushed_until = journey.pushed_until.max(ends);
        self.engines[p].sending_until = ends;
        self.engines[d].receiving_until = ends;
        Ok(())
    }

    /// Computed and granted: the client gets its first token, and what is left is sent.
    pub fn first_token(&mut self, request: u32) -> Result<(), OutOfRange> {
        let now = self.events.now;
        self.record.draws(request, now);
        let journey = &mut self.journeys[request as usize];
        let (prefill, decode, claimed) = (journey.prefill, journey.decode, journey.claimed);
        let (known, left, attempt) = (journey.known, journey.left, journey.attempt);
        journey.at_prefill = false;
        if let Some(prefill) = prefill {
            self.placed[prefill as usize].leaves_queue(claimed.into());
            self.changed = true;
        }
        if left <= 1 {
            self.gives_back_both(request)?;
            self.placed[decode as usize].leaves_queue(0);
            self.journeys[request as usize].placed = false;
            self.ended(request);
            return self.grants(decode);
        }
        self.push(request, known, true)?;
        let busy = prefill.is_some_and(|prefill| self.engines[prefill as usize].has_others(request));
        let tail = self.engines[decode as usize].model.handover_tail(request, known, busy);
        let ends = self.journeys[request as usize]
            .pushed_until
            .max(now + Nanos::from_seconds(tail));
        self.events.at(ends, Event::HandedOver { request, attempt });
        Ok(())
    }

    fn gives_back_both(&mut self, request: u32) -> Result<(), OutOfRange> {
        let journey = &mut self.journeys[request as usize];
        let (prefill, decode) = (journey.prefill, journey.decode);
        let (sending, reserved) = (journey.sending.take(), journey.reserved.take());
        if let Some(table) = reserved {
            self.engines[decode as usize].pool.release(table);
        }
        if let (Some(prefill), Some(table)) = (prefill, sending) {
            self.engines[prefill as usize].pool.release(table);
            self.turn(prefill)?;
        }
        Ok(())
    }

    /// All has arrived: the decode node commits.
    pub fn handed_over(&mut self, request: u32, attempt: u32) -> Result<(), OutOfRange> {
        let now = self.events.now;
        let journey = &mut self.journeys[request as usize];
        if journey.attempt != attempt {
            return Ok(());
        }
        let Some(prefill) = journey.prefill else { return Ok(()) };
        let decode = journey.decode;
        let exposed = journey.prefilled.map_or(Nanos::ZERO, |done| now.saturating_sub(done));
        let (p, d) = (Instance(u64::from(prefill) + 1), Instance(u64::from(decode) + 1));
        self.handovers
            .handed_over(p, d, journey.tokens_handed, exposed.duration());
        journey.committed = true;
        let sending = journey.sending.take();
        let reserved = journey.reserved.take();
        journey.started = true;
        self.placed[decode as usize].starts(0);
        self.changed = true;
        let blocks = self.journeys[request as usize].reserved_blocks;
        let (known, left) = (
            self.journeys[request as usize].known,
            self.journeys[request as usize].left,
        );
        if let Some(table) = reserved {
            let engine = &mut self.engines[decode as usize];
            engine.arrived.push(Arrived {
                request,
                computed: known,
                left: left - 1,
                table,
                blocks,
            });
            engine.cut(now, &mut self.effects);
            self.apply(decode)?;
            self.turn(decode)?;
        }
        if let Some(table) = sending {
            self.engines[prefill as usize].pool.release(table);
            self.grants(prefill)?;
            self.turn(prefill)?;
        }
        Ok(())
    }
}
