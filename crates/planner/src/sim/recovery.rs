//! What becomes of requests whose node is lost to them: as live, they go on elsewhere from the tokens that their clients have.

use super::cluster::Cluster;
use super::decoding::Left;
use super::engine::{Effect, Engine};
use super::life::State;
use super::outcome::Fate;
use super::pool::{Pool, Table};
use super::record::Run;
use super::run::BUDGET;
use super::turn::Turn;
use crate::Nanos;
use crate::profile::OutOfRange;
use baton_scheduling::{Decision, Side};

/// As the coordinator has it.
const ATTEMPTS_MAX: u32 = 3;
/// After so many nodes died under a request it is not tried again.
const DEATHS_MAX: u32 = 2;

impl Engine {
    /// All that it keeps is gone.
    pub fn reset(&mut self) {
        self.pool = Pool::new(self.pool.total(), self.pool.per_prefix());
        self.asks.clear();
        self.inbox.clear();
        self.waiting.clear();
        self.running.clear();
        self.arrived.clear();
        self.computing = None;
        self.leaving.clear();
        self.row = None;
        (self.sending_until, self.receiving_until) = (Nanos::ZERO, Nanos::ZERO);
    }

    /// Stops where it is: nothing is computed, and nobody decodes here any more. Tokens that were drawn by now are.
    pub fn halt(&mut self, turn: &mut Turn<'_>) -> Result<(), OutOfRange> {
        let mut last = turn.now;
        if let Some(computing) = self.computing.take() {
            last = computing.began;
            self.computed(computing.began, turn.now, computing.parts.is_empty());
            if let Some(row) = computing.row.as_ref().filter(|_| computing.parts.is_empty()) {
                let (start, passed) = (self.decoding.tokens(), (turn.now - last).seconds());
                let (mut steps, ends) = row.first_after(start, computing.steps, passed)?;
                steps -= u64::from(ends > passed && steps > 0);
                let took = Nanos::from_seconds(row.seconds(start, steps)?);
                if steps > 0 {
                    last = (computing.began + took).min(turn.now);
                    self.advance_by(steps, row, last - computing.began, computing.began, turn)?;
                }
            }
        }
        let places: Vec<usize> = self.decoding.arrivals().map(|(place, _)| place).collect();
        for place in places {
            if let Some(left) = self.decoding.take(place) {
                turn.record.leaves(left.request, left.drawn, left.late, last);
                self.pool.release(left.table);
            }
        }
        // What has arrived would join with the next turn.
        for arrived in std::mem::take(&mut self.arrived) {
            self.pool.release(arrived.table);
        }
        self.fresh.clear();
        self.leaving.clear();
        Ok(())
    }

    fn advance_by(
        &mut self,
        steps: u64,
        row: &crate::profile::DecodeRow,
        took: Nanos,
        began: Nanos,
        turn: &mut Turn<'_>,
    ) -> Result<(), OutOfRange> {
        self.pool.take(self.decoding.growth(steps));
        let run = Run {
            began,
            took,
            row: Some(row),
            start: self.decoding.tokens(),
            steps,
            batch: self.decoding.len(),
        };
        self.decoding.late_steps += turn.record.run(&run, &self.fresh)?;
        let mut left: Vec<Left> = Vec::new();
        self.decoding.advance(steps, &mut left);
        for left in left {
            turn.record.leaves(left.request, left.drawn, left.late, began + took);
            self.pool.release(left.table);
            turn.out.push(Effect::Ended { request: left.request });
        }
        self.blocks_peak = self.blocks_peak.max(self.pool.used());
        Ok(())
    }

    /// It has nothing of the request any more, save what it decodes. True where that gave blocks back.
    fn removes(&mut self, request: u32) -> bool {
        let mut tables: Vec<Table> = Vec::new();
        for slots in [&mut self.inbox, &mut self.waiting, &mut self.running] {
            while let Some(index) = slots.iter().position(|slot| slot.request == request) {
                tables.extend(slots.remove(index).table);
            }
        }
        while let Some(index) = self.arrived.iter().position(|arrived| arrived.request == request) {
            tables.push(self.arrived.remove(index).table);
        }
        self.asks.retain(|_, asked| *asked != request);
        let freed = !tables.is_empty();
        tables.into_iter().for_each(|table| self.pool.release(table));
        freed
    }
}

impl Cluster<'_> {
    fn there(&self, node: u32) -> bool {
        self.lives[node as usize].state != State::Away
    }

    /// It is gone, whatever it did.
    pub fn fail(&mut self, node: u32) -> Result<(), OutOfRange> {
        self.halts(node)?;
        let on: Vec<u32> = self.on(node);
        for request in &on {
            self.withdraw(*request, Some(node))?;
            let journey = &mut self.journeys[*request as usize];
            journey.deaths += 1;
        }
        self.unmoved(node)?;
        self.forget(node);
        on.into_iter().for_each(|request| self.goes_on(request));
        Ok(())
    }

    /// The deadline is over, and the node is not empty.
    pub fn give_up_all(&mut self, node: u32) -> Result<(), OutOfRange> {
        self.halts(node)?;
        let on = self.on(node);
        for request in &on {
            self.withdraw(*request, None)?;
        }
        on.into_iter().for_each(|request| self.goes_on(request));
        Ok(())
    }

    fn halts(&mut self, node: u32) -> Result<(), OutOfRange> {
        self.with_turn(node, |engine, turn| engine.halt(turn))
    }

    /// Requests that need this node.
    fn on(&self, node: u32) -> Vec<u32> {
        let uses = |request: &u32| {
            let journey = &self.journeys[*request as usize];
            // Once its KV is handed over it needs its prefill node no more.
            let prefills = journey.prefill == Some(node) && !journey.started;
            journey.placed && (journey.decode == node || prefills)
        };
        (0..self.journeys.len() as u32).filter(uses).collect()
    }

    /// Nobody is moved there any more.
    fn unmoved(&mut self, node: u32) -> Result<(), OutOfRange> {
        for request in 0..self.journeys.len() as u32 {
            let moving = &self.journeys[request as usize].moving;
            if moving.as_ref().is_some_and(|moving| moving.to == node) {
                self.cancel_move(request)?;
            }
        }
        Ok(())
    }

    /// No node has anything of it any more. What `dead` had is not given back: it is gone.
    pub fn withdraw(&mut self, request: u32, dead: Option<u32>) -> Result<(), OutOfRange> {
        self.cancel_move(request)?;
        let journey = &mut self.journeys[request as usize];
        if !std::mem::take(&mut journey.placed) {
            return Ok(());
        }
        let (prefill, decode, claimed) = (journey.prefill, journey.decode, u64::from(journey.claimed));
        journey.attempt += 1;
        if let Some(prefill) = prefill.filter(|_| std::mem::take(&mut journey.at_prefill)) {
            self.placed[prefill as usize].leaves_queue(claimed);
        }
        let here = &self.placed[decode as usize];
        match (std::mem::take(&mut journey.started), prefill) {
            (true, _) => here.ends(),
            (false, Some(_)) => here.leaves_queue(0),
            (false, None) => here.leaves_queue(claimed),
        }
        let (reserved, sending) = (journey.reserved.take(), journey.sending.take());
        (journey.computed, journey.sent, journey.tokens_handed) = (0, 0, 0);
        (journey.last_chunk, journey.prefilled, journey.pushed_until) = (Nanos::ZERO, None, Nanos::ZERO);
        self.changed = true;
        for (node, table) in [(Some(decode), reserved), (prefill, sending)] {
            let Some(node) = node else { continue };
            let engine = &mut self.engines[node as usize];
            let freed = engine.removes(request) | table.is_some();
            if let Some(table) = table {
                engine.pool.release(table);
            }
            if freed && Some(node) != dead {
                self.grants(node)?;
                self.turn(node)?;
            }
        }
        Ok(())
    }

    /// It is tried again, where the bounds allow.
    fn goes_on(&mut self, request: u32) {
        let journey = &self.journeys[request as usize];
        if journey.fate.is_some() {
            // It got its only token, or was refused, when another one made room.
            return;
        }
        if journey.deaths >= DEATHS_MAX || journey.attempt >= ATTEMPTS_MAX {
            return self.fails(request);
        }
        self.again.push(request);
        self.changed = true;
    }

    fn fails(&mut self, request: u32) {
        self.open -= 1;
        self.record.late_firsts += u64::from(self.record.drawn(request) == 0);
        self.journeys[request as usize].fate = Some(Fate::Failed);
    }

    /// Tries those again whose nodes were lost. They wait for nodes until their time is over.
    pub fn place_again(&mut self) -> Result<(), OutOfRange> {
        for request in std::mem::take(&mut self.again) {
            if self.events.now >= self.workload.requests()[request as usize].at + BUDGET {
                self.fails(request);
                continue;
            }
            // Before its KV was complete there, the decode node only loses the prefill node.
            let journey = &self.journeys[request as usize];
            let decode = journey.decode;
            let life = &self.lives[decode as usize];
            let keeps = journey.prefill.is_some() && life.state == State::Ready && life.side == Side::Decode;
            match self.choose(request, keeps.then(|| Self::instance(decode))) {
                Decision::Place(chosen) => self.place(request, &chosen)?,
                Decision::Hold { .. } | Decision::Refuse { .. } => self.again.push(request),
            }
        }
        Ok(())
    }

    /// Its move is off.
    pub fn cancel_move(&mut self, request: u32) -> Result<(), OutOfRange> {
        let Some(moving) = self.journeys[request as usize].moving.take() else {
            return Ok(());
        };
        let to = moving.to;
        self.placed[to as usize].leaves_queue(0);
        if self.there(to) {
            self.engines[to as usize].pool.release(moving.table);
            self.grants(to)?;
            self.turn(to)?;
        }
        Ok(())
    }
}
