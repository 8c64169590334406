//! Sequences that leave a decode node which is to be empty: their KV goes ahead while they are decoded on, and with the end of
//! a step they are the other node's.

use super::cluster::Cluster;
use super::decoding::Left;
use super::engine::{Arrived, Effect, Engine, Slot};
use super::event::Event;
use super::life::State;
use super::pool::Table;
use super::request::Moving;
use super::turn::Turn;
use crate::Nanos;
use crate::profile::OutOfRange;
use baton_scheduling::Side;

/// Tokens that a sequence may draw on its way for which its new node keeps room. As the coordinator's.
const AHEAD: u32 = 8;

impl Engine {
    /// Those that are to leave do, with the end of this step. True where that gave blocks back.
    pub fn hand_on(&mut self, turn: &mut Turn<'_>) -> bool {
        let mut freed = false;
        for request in std::mem::take(&mut self.leaving) {
            if let Some(left) = self.decoding.take_request(request) {
                turn.record.leaves(request, left.drawn, left.late, turn.now);
                self.handed_on += 1;
                turn.out.push(Effect::HandedOn { left });
                freed = true;
            }
        }
        freed
    }
}

impl Cluster<'_> {
    /// Sends on what is decoded there, as far as other nodes have room.
    pub fn hand_on_all(&mut self, node: u32) -> Result<(), OutOfRange> {
        let (steps, _) = self.engines[node as usize].growing(self.events.now);
        let members: Vec<(u32, u32)> = self.engines[node as usize].decoding.requests().collect();
        for (request, computed) in members {
            if self.journeys[request as usize].moving.is_none() {
                self.moves(node, request, computed + steps as u32)?;
            }
        }
        Ok(())
    }

    fn moves(&mut self, node: u32, request: u32, tokens: u32) -> Result<(), OutOfRange> {
        let now = self.events.now;
        let wanted = self.workload.requests()[request as usize];
        let known = (tokens + AHEAD).min(wanted.input + wanted.output);
        let chain = self.chain(request, wanted.input);
        let ready = |to: &usize| self.lives[*to].state == State::Ready && self.lives[*to].side == Side::Decode;
        // The one with the most room, of equals the first.
        let to = (0..self.engines.len()).filter(ready).max_by_key(|to| {
            let engine = &self.engines[*to];
            (engine.pool.room().saturating_sub(engine.owed()), std::cmp::Reverse(*to))
        });
        let Some(to) = to else { return Ok(()) };
        let engine = &mut self.engines[to];
        let (_, growing) = engine.growing(now);
        let reserved = growing + engine.owed() + 1;
        let blocks = engine.model.blocks_for(known);
        let Some(table) = engine.pool.acquire(chain, blocks, reserved) else {
            return Ok(());
        };
        // The run under way was chosen for the room there was.
        let planned = engine.computing.as_ref().map_or(0, |computing| computing.steps);
        let short = engine.decoding.growth(planned) > engine.pool.room();
        if short {
            engine.cut(now, &mut self.effects);
            self.apply(to as u32)?;
        }
        let model = &self.engines[node as usize].model;
        let takes = model.handover(u64::from(table.own) * model.block_bytes)?;
        let from = self.engines[node as usize].sending_until;
        let start = now.max(from).max(self.engines[to].receiving_until);
        let ends = start + Nanos::from_seconds(takes);
        self.engines[node as usize].sending_until = ends;
        self.engines[to].receiving_until = ends;
        self.placed[to].comes(0);
        let journey = &mut self.journeys[request as usize];
        let (to, attempt) = (to as u32, journey.attempt);
        journey.moving = Some(Moving { to, table, blocks });
        self.events.at(ends, Event::Moved { request, attempt });
        Ok(())
    }

    /// The other node has everything: the sequence leaves with the end of the present step.
    pub fn moved(&mut self, request: u32, attempt: u32) -> Result<(), OutOfRange> {
        let journey = &self.journeys[request as usize];
        if journey.attempt != attempt || journey.moving.is_none() {
            return Ok(());
        }
        let node = journey.decode;
        let now = self.events.now;
        let engine = &mut self.engines[node as usize];
        if !engine.decoding.requests().any(|(there, _)| there == request) {
            // It gave way meanwhile, and is computed anew where it is.
            return self.cancel_move(request);
        }
        engine.leaving.push(request);
        engine.cut(now, &mut self.effects);
        self.apply(node)
    }

    /// It has left `node` and goes on where it was moved to.
    pub fn handed_on(&mut self, node: u32, left: Left) -> Result<(), OutOfRange> {
        let request = left.request;
        self.engines[node as usize].pool.release(left.table);
        self.placed[node as usize].ends();
        let Some(moving) = self.journeys[request as usize].moving.take() else {
            unreachable!("only who is moved leaves, and a move that is off takes nobody along")
        };
        let Moving { to, mut table, blocks } = moving;
        self.placed[to as usize].starts(0);
        self.journeys[request as usize].decode = to;
        self.changed = true;
        let wants = self.workload.requests()[request as usize].output - self.record.drawn(request);
        let now = self.events.now;
        let engine = &mut self.engines[to as usize];
        let needs = engine.model.blocks_for(left.computed);
        let (_, growing) = engine.growing(now);
        if needs > blocks && needs - blocks + growing + engine.owed() > engine.pool.room() {
            // It drew more on its way than there is room for: it is computed anew once there is.
            engine.pool.release(table);
            let mut slot = Slot::new(request, left.computed + 1, wants, self.record.deadline(request));
            slot.gave_way = true;
            engine.inbox.push(slot);
        } else {
            if needs > blocks {
                engine.pool.take(needs - blocks);
                table.own += needs - blocks;
            }
            let excess = blocks.saturating_sub(needs + 1).min(table.own);
            table.own -= excess;
            engine.pool.release(Table {
                shared: Vec::new(),
                own: excess,
            });
            engine.arrived.push(Arrived {
                request,
                computed: left.computed,
                left: wants,
                table,
                blocks: blocks.max(needs) - excess,
            });
        }
        engine.cut(now, &mut self.effects);
        self.apply(to)?;
        self.turn(to)
    }
}
