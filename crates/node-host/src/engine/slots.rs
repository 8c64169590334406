//! A sequence inside the engine thread: its tokens, its blocks, how far it is and who is told.

use super::constraint::Constraint;
use super::drafting::Drafting;
use super::ending::Ending;
use super::observer::{LayersTold, tell_progress};
use super::sequence::{Beginning, Drawn, PrefillDone, SequenceError, SequenceEvent, SequenceSpec, Until};
use super::sharing::Sharing;
use baton_engine::{BlockPool, BlockTable, NoRoom, sample_of};
use baton_node_runtime::Moment;
use baton_scheduling::step::speculation::{Proposal, Speculation as Learned};
use baton_scheduling::step::{Candidate, Waiter};
use baton_types::{ArenaView, KvGeometry};
use std::sync::{Arc, Weak};
use tokio::sync::mpsc::error::TrySendError;

pub(super) struct Slot {
    spec: SequenceSpec,
    /// The client's tokens, then the generated ones.
    pub tokens: Vec<u32>,
    prompt_len: usize,
    /// Tokens whose KV is in the table.
    pub computed: usize,
    /// Its blocks; none while it waits.
    pub table: Option<Arc<BlockTable>>,
    arrival: u64,
    arrived: Moment,
    /// When its first chunk began, in this life.
    began: Option<Moment>,
    /// Tokens computed since.
    prefilled: usize,
    /// It drew its last token itself, or came with its KV.
    pub decoding: bool,
    /// A step has computed something of it, in this life.
    started: bool,
    /// It had blocks and gave them back to others.
    gave_way: bool,
    /// It never had blocks, so that it counts in the bounded queue.
    pub holds_a_place: bool,
    /// Leading blocks that were given their identity.
    published: usize,
    /// The unfilled slots of its last block were zeroed.
    zeroed: bool,
    /// Full blocks that somebody else reads.
    sharing: Sharing,
    /// Guesses at the tokens to come.
    pub drafting: Drafting,
    /// Blocks that it had before a draft needed more.
    blocks_without_draft: usize,
    /// It is over: nobody listens, or everything was said.
    pub over: bool,
}

/// A step that was computed.
pub(super) struct DrawnFrom<'a> {
    pub ending: &'a Ending,
    pub geometry: &'a KvGeometry,
    /// When it had ended.
    pub now: Moment,
}

impl Slot {
    pub fn new(mut spec: SequenceSpec, arrival: u64, now: Moment, geometry: &KvGeometry) -> Self {
        let mut tokens = std::mem::take(&mut spec.prompt);
        let prompt_len = tokens.len();
        tokens.append(&mut spec.generated);
        let (table, computed) = match std::mem::replace(&mut spec.beginning, Beginning::Compute) {
            Beginning::Compute => (None, 0),
            Beginning::Resume(table) => (Some(Arc::new(table)), tokens.len().saturating_sub(1)),
        };
        let decoding = table.is_some();
        let mut slot = Self {
            spec,
            tokens,
            prompt_len,
            computed,
            table,
            arrival,
            arrived: now,
            began: None,
            prefilled: 0,
            decoding,
            started: decoding,
            gave_way: false,
            holds_a_place: !decoding,
            published: 0,
            zeroed: false,
            sharing: Sharing::default(),
            drafting: Drafting::default(),
            blocks_without_draft: 0,
            over: false,
        };
        slot.publish(geometry);
        slot
    }

    pub fn control(&self) -> &Arc<super::Control> {
        &self.spec.control
    }

    /// Nobody wants it any more.
    pub fn is_unwanted(&self) -> bool {
        self.over || self.spec.control.is_cancelled() || self.spec.events.is_closed()
    }

    /// It has done its first chunk and waits for leave to go on.
    pub fn is_held_back(&self) -> bool {
        self.prefilled > 0 && !self.decoding && !self.spec.control.may_continue()
    }

    pub fn candidate(&self, now: Moment) -> Candidate {
        Candidate {
            computed: self.computed,
            known: self.tokens.len(),
            decoding: self.decoding,
            held_back: self.is_held_back(),
            time_left: self.spec.deadline.saturating_since(now),
            arrival: self.arrival,
        }
    }

    pub fn waiter(&self, now: Moment) -> Waiter {
        let time_left = self.spec.deadline.saturating_since(now);
        Waiter {
            preempted: self.could_go_on(),
            time_left,
            arrival: self.arrival,
        }
    }

    /// It gave way, and nothing but blocks keeps it from going on.
    fn could_go_on(&self) -> bool {
        self.gave_way && self.table.is_none() && self.spec.control.may_continue()
    }

    /// Takes blocks for all known tokens.
    pub fn take_blocks(&mut self, pool: &Arc<BlockPool>, geometry: &KvGeometry) -> Result<(), NoRoom> {
        let block_tokens = geometry.block_tokens as usize;
        let known = self.tokens.len();
        // At least one token is computed: its logits are what the next one is drawn from.
        let max_held = known.saturating_sub(1) / block_tokens;
        let table = Arc::new(pool.acquire(&self.spec.hashes, max_held, geometry.blocks_for(known))?);
        let held_blocks = table.held();
        self.computed = held_blocks * block_tokens;
        self.published = held_blocks;
        self.table = Some(table);
        Ok(())
    }

    /// It has blocks, and no step has computed anything of it yet.
    pub fn is_unstarted(&self) -> bool {
        !self.started
    }

    /// Its first chunk is computed now: time counts from here, and a reservation elsewhere is worth its while.
    pub fn start(&mut self, now: Moment) {
        if self.started {
            return;
        }
        self.started = true;
        self.began = Some(now);
        let Some(table) = &self.table else { return };
        let event = SequenceEvent::Started {
            // A sequence that goes on must be the only one to know its table, or it could not grow before the event is read.
            table: match self.spec.until {
                Until::FirstToken => Arc::downgrade(table),
                Until::End => Weak::new(),
            },
            held_blocks: table.held(),
            queued: now.saturating_since(self.arrived),
        };
        self.tell(event);
    }

    /// Gives its blocks back; it will wait and compute everything anew. One that was held back goes by its deadline
    /// then, until it may continue: with precedence it would take its blocks from the very one that it gave way to.
    pub fn give_way(&mut self) {
        self.gave_way = true;
        self.started = false;
        self.began = None;
        self.table = None;
        self.computed = 0;
        self.prefilled = 0;
        self.published = 0;
        self.zeroed = false;
        self.decoding = false;
        self.drafting.clear();
    }

    /// Blocks that it had, gave away and waits for.
    pub fn owed_blocks(&self, geometry: &KvGeometry) -> usize {
        if self.could_go_on() {
            geometry.blocks_for(self.tokens.len())
        } else {
            0
        }
    }

    /// Has blocks for `tokens` tokens, growing by what lacks.
    pub fn make_room(&mut self, tokens: usize, geometry: &KvGeometry) -> Result<(), NoRoom> {
        let Some(table) = &mut self.table else { return Ok(()) };
        let lacking = geometry.blocks_for(tokens).saturating_sub(table.blocks().len());
        if lacking == 0 {
            return Ok(());
        }
        let total = table.blocks().len() + lacking;
        match Arc::get_mut(table) {
            Some(table) => table.grow(lacking),
            // Only a sequence that ends with its first token shares its table, and that one never grows.
            None => Err(NoRoom {
                wanted: lacking,
                room: 0,
                total,
            }),
        }
    }

    /// A guess at what follows, where several tokens could be drawn from the next step.
    pub fn propose_draft(&mut self, context_tokens: usize, learned: &Learned) -> Option<Proposal> {
        let known = self.tokens.len();
        if self.spec.until != Until::End || self.computed + 1 != known {
            return None;
        }
        let generated = known - self.prompt_len;
        let to_come = (self.spec.sampling.max_tokens as usize).saturating_sub(generated);
        let to_come = to_come.min(context_tokens.saturating_sub(known));
        self.drafting.propose(&self.tokens, to_come, learned)
    }

    /// The next step computes `count` draft tokens too, or as many as its blocks hold where none of `blocks` are left.
    pub fn take_draft(&mut self, count: usize, blocks: &mut usize, geometry: &KvGeometry) {
        let Some(table) = &self.table else { return };
        self.blocks_without_draft = table.blocks().len();
        let known = self.tokens.len();
        let lacking = geometry
            .blocks_for(known + count)
            .saturating_sub(self.blocks_without_draft);
        let grown = lacking <= *blocks && self.make_room(known + count, geometry).is_ok();
        if grown {
            *blocks -= lacking;
        }
        let room = self.table.as_ref().map_or(0, |table| table.blocks().len()) * geometry.block_tokens as usize;
        self.drafting.take(&self.tokens, count.min(room.saturating_sub(known)));
    }

    /// Gives back what a draft alone needed. True where that was anything.
    pub fn give_back_draft(&mut self, geometry: &KvGeometry) -> bool {
        let needed = self.blocks_without_draft.max(geometry.blocks_for(self.computed));
        match self.table.as_mut().and_then(Arc::get_mut) {
            Some(table) if table.blocks().len() > needed => {
                table.shrink(needed);
                true
            }
            Some(_) | None => false,
        }
    }

    /// The tokens of a step that computes up to token `end`, with the draft behind it.
    pub fn slice(&self, end: usize) -> &[u32] {
        match self.drafting.line() {
            [] => &self.tokens[self.computed..end],
            line => line,
        }
    }

    /// The next step computes up to token `end`. Where that is the last one of a sequence whose blocks will leave the node,
    /// what stays unfilled of its last block is zeroed: before the step, which writes the other slots only, so that each layer
    /// can leave as soon as it is computed; and once, so that a step that is computed anew disturbs nothing on its way out.
    pub fn zero_unfilled(&mut self, end: usize, arena: &ArenaView) -> Result<(), SequenceError> {
        if self.spec.until != Until::FirstToken || end < self.tokens.len() || self.zeroed {
            return Ok(());
        }
        if let Some(table) = &self.table {
            table.zero_unfilled(arena, end)?;
            self.zeroed = true;
        }
        Ok(())
    }

    /// Whom to tell of the layers of a step that computes up to token `end`: the last chunk's layers leave the node while
    /// the step goes on. Earlier chunks are not told of: they leave whole, hidden behind the next one.
    pub fn layers_told(&self, end: usize) -> Option<LayersTold> {
        let wanted = end == self.tokens.len() && !self.decoding && !self.spec.layer_borders.is_empty();
        wanted.then(|| LayersTold {
            events: self.spec.events.clone(),
            borders: self.spec.layer_borders.clone(),
            tokens: end,
        })
    }

    /// A step has computed `tokens` more tokens.
    pub fn advance(&mut self, tokens: usize, geometry: &KvGeometry) {
        self.computed += tokens;
        if !self.decoding {
            self.prefilled += tokens;
        }
        self.publish(geometry);
        let full = self.computed / geometry.block_tokens as usize;
        self.sharing.go_on(&self.spec.control, self.table.as_deref(), full);
        if self.spec.until == Until::FirstToken && self.computed < self.tokens.len() {
            self.tell(SequenceEvent::Computed { tokens: self.computed });
        }
    }

    /// Gives every full block its identity. Full blocks never change again.
    fn publish(&mut self, geometry: &KvGeometry) {
        let Some(table) = &self.table else { return };
        let block_tokens = geometry.block_tokens as usize;
        let full = self.computed / block_tokens;
        while self.published < full {
            let ordinal = self.published;
            if ordinal == self.spec.hashes.len() {
                let Some(chain) = &mut self.spec.chain else { return };
                let tokens = &self.tokens[ordinal * block_tokens..(ordinal + 1) * block_tokens];
                self.spec.hashes.push(chain.push_block(tokens));
            }
            let Some(hash) = self.spec.hashes.get(ordinal) else {
                return;
            };
            table.publish(ordinal, *hash);
            self.published += 1;
        }
    }

    /// Draws the next token from the first of `rows`, and one more from each row whose token the draft had right. Gives how
    /// many of the draft were right.
    pub fn draw_all<'a>(&mut self, rows: impl Iterator<Item = &'a [f32]>, step: &DrawnFrom<'_>) -> usize {
        let mut right = 0;
        for logits in rows {
            self.draw(logits, right, step);
            if self.over || self.drafting.drafted().get(right) != self.tokens.last() {
                break;
            }
            // Its KV is there.
            self.advance(1, step.geometry);
            right += 1;
        }
        right
    }

    /// Draws the next token from `logits` and tells it; `before` were drawn from the same step. The sequence is over where
    /// that was its last.
    fn draw(&mut self, logits: &[f32], before: usize, step: &DrawnFrom<'_>) {
        let DrawnFrom { ending, now, .. } = *step;
        let (prompt, generated) = self.tokens.split_at(self.prompt_len);
        let index = u32::try_from(generated.len()).unwrap_or(u32::MAX);
        let allowed = match self.spec.constraint.as_mut().map(Constraint::allowed).transpose() {
            Ok(allowed) => allowed,
            Err(error) => return self.fail(error),
        };
        let sampled = sample_of(logits, &self.spec.sampling, [prompt, generated], allowed.as_ref());
        let finish = ending.finish(&self.spec.sampling, self.tokens.len(), index, sampled.token);
        let prefill = self.began.take().map(|began| PrefillDone {
            took: now.saturating_since(began),
            tokens: self.prefilled,
        });
        self.tokens.push(sampled.token);
        self.decoding = true;
        let drawn = Drawn {
            index,
            token: sampled.token,
            logprobs: sampled.logprobs,
            finish,
        };
        let ends = finish.is_some() || self.spec.until == Until::FirstToken;
        let table = match self.spec.until {
            Until::FirstToken => self.table.take(),
            Until::End => None,
        };
        self.tell(SequenceEvent::Token {
            drawn,
            table,
            prefill,
            at: now,
            drafted: match before {
                0 => u32::try_from(self.drafting.drafted().len()).unwrap_or(u32::MAX),
                _ => 0,
            },
            extra: before > 0,
        });
        self.over |= ends;
        if let Some(constraint) = self.spec.constraint.as_mut().filter(|_| !ends) {
            constraint.accept(vec![sampled.token]);
        }
    }

    pub fn fail(&mut self, error: SequenceError) {
        tracing::warn!(request_id = %self.spec.request_id, %error, "sequence failed");
        self.tell(SequenceEvent::Failed { error });
        self.over = true;
    }

    fn tell(&mut self, event: SequenceEvent) {
        if matches!(event, SequenceEvent::Computed { .. }) {
            return tell_progress(&self.spec.events, event);
        }
        match self.spec.events.try_send(event) {
            Ok(()) => {}
            Err(TrySendError::Full(_)) => {
                tracing::error!(request_id = %self.spec.request_id, "event channel is too small, sequence dropped");
                self.over = true;
            }
            Err(TrySendError::Closed(_)) => self.over = true,
        }
    }
}
